"""The text decoder's weights as plain tensors, for kernels that read them without the stock modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weight of a linear layer without bias.

    Attributes:
        values: [rows, columns], row-major; of the model's precision, int8 or float8.
        scale: fp32 [rows], what each row of `values` is to be multiplied by; None for 1.
    """

    values: Tensor
    scale: Tensor | None = None

    @property
    def rows(self) -> int:
        """Outputs."""
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        """Inputs."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes read by one product."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass(frozen=True, slots=True)
class TextLayer:
    """One decoder layer: gains [D] or [head_dim] of its RMSNorms, and its matrices."""

    attention_gain: Tensor
    query: Matrix
    key: Matrix
    value: Matrix
    query_gain: Tensor
    key_gain: Tensor
    out: Matrix
    mlp_gain: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All that a step reads."""
        return self.query, self.key, self.value, self.out, self.gate, self.up, self.down


@dataclass(frozen=True, slots=True)
class TextWeights:
    """The whole text decoder; tensors are the stock modules' own.

    Attributes:
        embedding: [vocabulary, D].
        layers: in order.
        gain: [D], of the final RMSNorm.
        head: vocabulary rows.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        eps: of every RMSNorm.
        frequencies: fp32 [head_dim / 2], rotary angle for each unit of position.
    """

    embedding: Tensor
    layers: tuple[TextLayer, ...]
    gain: Tensor
    head: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    frequencies: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one step of one sequence reads: every matrix once."""
        return self.head.nbytes + sum(m.nbytes for layer in self.layers for m in layer.matrices)


def text_weights(model: Any) -> TextWeights:
    """Take a stock Qwen3-VL model's text decoder apart; nothing is copied."""
    text = model.model.language_model
    config = text.config
    return TextWeights(
        embedding=text.embed_tokens.weight,
        layers=tuple(_layer(block) for block in text.layers),
        gain=text.norm.weight,
        head=matrix(model.lm_head),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=text.layers[0].self_attn.head_dim,
        eps=config.rms_norm_eps,
        frequencies=text.rotary_emb.inv_freq.float(),
    )


def _layer(block: Any) -> TextLayer:
    attention, mlp = block.self_attn, block.mlp
    return TextLayer(
        attention_gain=block.input_layernorm.weight,
        query=matrix(attention.q_proj),
        key=matrix(attention.k_proj),
        value=matrix(attention.v_proj),
        query_gain=attention.q_norm.weight,
        key_gain=attention.k_norm.weight,
        out=matrix(attention.o_proj),
        mlp_gain=block.post_attention_layernorm.weight,
        gate=matrix(mlp.gate_proj),
        up=matrix(mlp.up_proj),
        down=matrix(mlp.down_proj),
    )


def matrix(linear: Any) -> Matrix:
    """A linear layer's weight, stock or quantised by torchao with one scale a row."""
    weight = linear.weight
    if hasattr(weight, "qdata"):
        return Matrix(weight.qdata, weight.scale.flatten().float())
    return Matrix(weight)


def joined(matrices: Sequence[Matrix]) -> Tensor:
    """Several whole matrices as one [sum of rows, columns], in the same memory.

    Where they do not lie one after another yet, they are moved to one buffer: what held their values holds
    a view of it afterwards, so that no weight is there twice. Work captured before that would read freed
    memory.
    """
    assert all(m.scale is None for m in matrices), "quantised matrices are not joined"
    values = [m.values for m in matrices]
    columns, moved = values[0].shape[1], not all(_follows(one, other) for one, other in pairwise(values))
    # In the mode in which they were made, without which they could be used in neither.
    with torch.inference_mode(values[0].is_inference()), torch.no_grad():
        if moved:
            storage, begin = torch.cat([v.detach() for v in values]).untyped_storage(), 0
            for value in values:
                value.set_(storage, begin, tuple(value.shape), (columns, 1))
                begin += value.numel()
        first, rows = values[0], sum(m.rows for m in matrices)
        whole = torch.empty(0, dtype=first.dtype, device=first.device)
        return whole.set_(first.untyped_storage(), first.storage_offset(), (rows, columns), (columns, 1))


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether a matrix lies right behind another in the same memory."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and other.storage_offset() == one.storage_offset() + one.numel()
