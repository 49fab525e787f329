"""Decoder layers as four matrix products with fused kernels between them.

transformers' layers are some fifty launches each, and for the few rows of a question or the hundreds of a
prompt's rest, launching them takes longer than computing. These are nine, and read and write less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from arrcoc import triton_support
from arrcoc.kv import Room, RoomyCache
from arrcoc.text import Matrix, TextLayer, TextWeights, joined

_LOG = logging.getLogger(__name__)

_MANY = 192
"""Rows from which on attention runs by arrcoc's kernel: fewer leave processors idle, unless the keys are
divided among them too, as PyTorch's does."""


class Product:
    """Matrices of one input as one: whole ones are joined in place, quantised ones are widened when used."""

    def __init__(self, *matrices: Matrix) -> None:
        """Args: matrices with equally many columns, all whole or all quantised."""
        scales = [m.scale for m in matrices if m.scale is not None]
        assert len(scales) in (0, len(matrices)), "some are quantised, some not"
        self._parts, self._scale = [m.values for m in matrices], torch.cat(scales) if scales else None
        self._values = None if scales else joined(matrices)

    def __call__(self, x: Tensor) -> Tensor:
        """[m, sum of rows] of x [m, columns]."""
        if self._values is not None:
            return F.linear(x, self._values)
        assert self._scale is not None, "quantised"
        rows = [len(part) for part in self._parts]
        wide = x.new_empty(sum(rows), x.shape[1])
        for part, values in zip(torch.split(wide, rows), self._parts, strict=True):
            part.copy_(values)  # exact: bfloat16 holds every int8 and every e4m3
        return F.linear(x, wide).mul_(self._scale)


class LayerProducts:
    """One layer's matrices, those of one input together."""

    def __init__(self, layer: TextLayer) -> None:
        self.qkv = Product(layer.query, layer.key, layer.value)
        self.out = Product(layer.out)
        self.gate_up = Product(layer.gate, layer.up)
        self.down = Product(layer.down)


class FusedLayers:
    """The text decoder's layers for one sequence, on CUDA (or in Triton's interpreter).

    Making it moves the weights (see `arrcoc.text.joined`), so it comes before any work is captured.

    Attributes:
        weights: of the decoder.
        kernels: what runs between products, `arrcoc.text_kernels`.
        products: of each layer, the matrices of one input together.
    """

    name = "fused Triton kernels"

    def __init__(self, weights: TextWeights) -> None:
        """Args: weights of the decoder, whole or quantised with one scale a row."""
        self.weights, self.kernels = weights, _kernels()
        self.products = [LayerProducts(layer) for layer in weights.layers]

    @staticmethod
    def supports(weights: TextWeights) -> bool:
        """Whether these weights can be run: heads of a power of two."""
        return weights.head_dim >= 16 and weights.head_dim & (weights.head_dim - 1) == 0

    def run(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: RoomyCache,
        layers: range,
        *,
        vision: Tensor | None = None,
        deepstack: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """As `QwenVL.run_layers`, with cos and sin [1, m, head_dim] and the causal mask."""
        weights, add_norm = self.weights, self.kernels.add_norm
        turn = rotary[0][0].contiguous(), rotary[1][0].contiguous()
        x, delta, past = hidden[0].contiguous(), None, None
        # After the last layer's keys and values, no row is of use to another.
        trimmed = last_only and (deepstack is None or deepstack.shape[0] < layers.stop)
        for number in layers:
            layer, products = weights.layers[number], self.products[number]
            x, normed = add_norm(x, delta, layer.attention_gain, weights.eps)
            if observe is not None:
                observe(number, x[None])
            qkv = products.qkv(normed)
            room = cache.room(number, len(qkv), self._heads(qkv)[:, -weights.kv_heads :].transpose(0, 1))
            past = _on_device(room.past, x.device) if past is None else past
            gains = layer.query_gain, layer.key_gain
            self.kernels.rotate_into(qkv, gains, *turn, weights.eps, room.keys, room.values, past)
            first = len(qkv) - 1 if trimmed and number == layers.stop - 1 else 0
            mixed, x = self._mix(qkv, first, room, past), x[first:]
            x, normed = add_norm(x, products.out(mixed), layer.mlp_gain, weights.eps)
            delta = products.down(self.kernels.silu_mul(products.gate_up(normed)))
            if deepstack is not None and number < deepstack.shape[0]:
                plane = deepstack[number].to(x.dtype)
                x = x + delta
                x, delta = (x, plane) if vision is None else (x.index_add(0, vision, plane), None)
        whole = x if delta is None else x + delta
        return (whole[-1:] if last_only else whole)[None]

    def _heads(self, qkv: Tensor) -> Tensor:
        """[m, heads + 2 * kv_heads, head_dim] (a view)."""
        return qkv.view(len(qkv), -1, self.weights.head_dim)

    def _mix(self, qkv: Tensor, first: int, room: Room, past: Tensor) -> Tensor:
        """Attention [m - first, heads * head_dim] of the rows from `first` on to all up to themselves."""
        query = self._heads(qkv)[first:, : self.weights.heads]
        if isinstance(room.past, Tensor) or len(query) >= _MANY:
            assert first == 0, "rows of a static shape are all wanted"
            rows: Tensor = self.kernels.attend_rows(query, room.keys, room.values, past)
            return rows
        keys, values = (held[None, :, : room.past + len(qkv)] for held in (room.keys, room.values))
        mixed = attend(query.transpose(0, 1)[None], keys, values, room.past + first)
        return mixed[0].transpose(0, 1).flatten(1)


def attend(query: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """Causal attention [1, heads, m, head_dim] of rows that follow `past` others, heads grouped over keys."""
    count = query.shape[2]
    if past == 0 or count == 1:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=count > 1, enable_gqa=True)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        # This operator aligns a causal mask to the lower right, where the public function does not.
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, is_causal=True
        )[0]
        return found
    mask = torch.ones(count, past + count, dtype=torch.bool, device=query.device).tril(past)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def fused_layers(weights: TextWeights) -> FusedLayers | None:
    """Fused layers where they can run; None where the stock ones must, which is logged unless on the CPU."""
    reason = why_not(weights)
    if reason is None:
        return FusedLayers(weights)
    if weights.embedding.device.type == "cuda":
        _LOG.warning("prompts run through transformers' layers: %s", reason)
    return None


def why_not(weights: TextWeights) -> str | None:
    """What keeps the fused layers from running; None where they can."""
    table = weights.embedding
    if table.device.type != "cuda":
        return f"on {table.device.type}"
    if table.dtype not in (torch.bfloat16, torch.float16):
        return f"in {str(table.dtype).removeprefix('torch.')}"
    if reason := triton_support.why_not():
        return reason
    return None if FusedLayers.supports(weights) else f"heads of {weights.head_dim}"


def _on_device(past: int | Tensor, device: torch.device) -> Tensor:
    """How many positions precede, int32 [1]; nothing waits for it."""
    return past if isinstance(past, Tensor) else torch.full((1,), past, dtype=torch.int32, device=device)


def _kernels() -> ModuleType:
    from arrcoc import text_kernels  # needs Triton

    return text_kernels
