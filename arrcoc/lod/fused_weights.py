"""A vision tower's weights as the fused tower wants them: plain tensors, and biases summed ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arrcoc.vision import Merger, VisionWeights


class Norm(NamedTuple):
    """A layer norm: weight and bias [W], and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class Dense(NamedTuple):
    """A linear layer: weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor


class Float8Dense(NamedTuple):
    """A linear layer in e4m3: weight [out, in], fp32 scale of each output [1, out], bias [out].

    Where `step` is given, its inputs have this one scale, and `scale` contains it; else each row has its own.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    step: float | None = None


AnyDense = Dense | Float8Dense


class FusedBlock(NamedTuple):
    """One transformer block; `shift1` and `shift2`, fp32, are added to the residual before its norms."""

    norm1: Norm
    shift1: Tensor
    qkv: AnyDense
    proj: AnyDense
    norm2: Norm
    shift2: Tensor
    fc1: AnyDense
    fc2: AnyDense


class FusedMerger(NamedTuple):
    """A merger; `shift`, fp32, is as wide as its norm."""

    norm: Norm
    shift: Tensor
    fc1: AnyDense
    fc2: AnyDense


Convert = Callable[[str, int, Dense], AnyDense]
"""(`qkv`, `proj`, `fc1`, `fc2` or `merger`, number of the block, layer) to what takes the layer's place."""


def fused_block(block: Any, number: int, shift1: Tensor, shift2: Tensor, convert: Convert) -> FusedBlock:
    """Arrange block `number` (see `FusedBlock` for the shifts), its layers replaced by `convert`."""

    def layer(kind: str, module: Any) -> AnyDense:
        return convert(kind, number, _dense(module))

    return FusedBlock(
        _norm(block.norm1), shift1, layer("qkv", block.qkv), layer("proj", block.proj),
        _norm(block.norm2), shift2, layer("fc1", block.mlp.linear_fc1), layer("fc2", block.mlp.linear_fc2),
    )  # fmt: skip


def fused_merger(merger: Merger, shift: Tensor, weights: VisionWeights, convert: Convert) -> FusedMerger:
    """Arrange a merger; `shift` [hidden] is added to the residual that it is given."""
    wide = shift.repeat(weights.merge**2) if merger.norm_after else shift
    fc1, fc2 = (convert("merger", -1, _dense(layer)) for layer in (merger.fc1, merger.fc2))
    return FusedMerger(_norm(merger.norm), wide, fc1, fc2)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), float(module.eps))


def _dense(module: Any) -> Dense:
    return Dense(module.weight.detach(), module.bias.detach())


def summed_frames(weights: VisionWeights) -> Tensor:
    """[hidden, 3 * patch**2]: both frames of an image are equal, so their weights are summed, in fp32."""
    matrix = weights.patch_weight.detach()
    frames = matrix.float().view(len(matrix), 3, -1, weights.patch**2)
    return frames.sum(2).flatten(1).to(matrix.dtype)


def gelu_kind(weights: VisionWeights) -> str:
    """`tanh` or `erf`, the GELU of the blocks, told by what it does to 1: 0.84119 or 0.84134."""
    act: Any = weights.blocks[0].mlp.act_fn
    value = float(act(torch.ones(1)))
    exact = {
        kind: float(nn.functional.gelu(torch.ones(1), approximate=name)) for kind, name in _GELUS.items()
    }
    return min(exact, key=lambda kind: abs(exact[kind] - value))


_GELUS = {"tanh": "tanh", "erf": "none"}
