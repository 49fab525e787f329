"""Linear layers in float8 (e4m3) as pairs of quantise and dequantise: the same numbers in torch and in ONNX.

A builder that finds such pairs around a matrix product computes it in float8. Weights are stored in float8
with a scale for each output, activations are rounded with one fixed scale for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from arrcoc.vision import Block, VisionWeights

LARGEST = 448.0
"""Largest finite number of e4m3 (arXiv 2209.05433, table 1)."""
_LEAST_SCALE = 2.0**-20
"""Scales are kept in fp16 by the graph: a layer that was never fed must not divide by nothing."""

MakeLinear = Callable[[str, nn.Linear], nn.Module]


def scale_for(largest: Tensor) -> Tensor:
    """fp16 scales that bring the largest magnitudes to the end of e4m3's range."""
    return (largest.float() / LARGEST).clamp(min=_LEAST_SCALE).half()


@torch.library.custom_op("arrcoc::float8_rounded", mutates_args=())
def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Values rounded to float8 with one scale, in their own precision again; larger ones saturate."""
    wide = (values.float() / scale.float()).clamp(-LARGEST, LARGEST)
    return (wide.to(torch.float8_e4m3fn).float() * scale.float()).to(values.dtype)


@rounded.register_fake
def _(values: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(values)


@torch.library.custom_op("arrcoc::float8_expanded", mutates_args=())
def expanded(weight: Tensor, scale: Tensor) -> Tensor:
    """A float8 weight [out, in] times the scale of each output, in the scales' precision."""
    return (weight.float() * scale.float()[:, None]).to(scale.dtype)


@expanded.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=scale.dtype, device=weight.device)


class Float8Linear(nn.Module):
    """A linear layer whose weight is float8 and whose input is rounded to it."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        """Args: the layer, and the largest magnitude of its input that is not cut off."""
        super().__init__()
        weight = linear.weight.detach()
        scale = scale_for(weight.abs().amax(1))
        rounded_weight = (weight.float() / scale.float()[:, None]).clamp(-LARGEST, LARGEST)
        self.register_buffer("weight", rounded_weight.to(torch.float8_e4m3fn))
        self.register_buffer("weight_scale", scale.to(weight.dtype))
        self.register_buffer("input_scale", scale_for(torch.tensor(largest)).to(weight))
        self.bias = linear.bias

    def forward(self, values: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        weight = torch.ops.arrcoc.float8_expanded(self.weight, self.weight_scale)
        return nn.functional.linear(
            torch.ops.arrcoc.float8_rounded(values, self.input_scale), weight, self.bias
        )


def with_linears(weights: VisionWeights, make: MakeLinear) -> VisionWeights:
    """A tower whose blocks have other linear layers; everything else is shared.

    Args:
        weights: of the tower.
        make: given a layer's name, such as `3.qkv` or `3.mlp.linear_fc1`, and the layer.
    """

    def made(number: int, block: Block) -> Block:
        # What computes attention calls these and looks at nothing else of them.
        qkv = cast(nn.Linear, make(f"{number}.qkv", block.qkv))
        proj = cast(nn.Linear, make(f"{number}.proj", block.proj))
        mlp = copy.deepcopy(block.mlp, {id(p): p for p in block.mlp.parameters()})
        for name, part in mlp.named_children():
            if isinstance(part, nn.Linear):
                setattr(mlp, name, make(f"{number}.mlp.{name}", part))
        return block._replace(qkv=qkv, proj=proj, mlp=mlp)

    return replace(weights, blocks=tuple(made(n, block) for n, block in enumerate(weights.blocks)))


def quantized(weights: VisionWeights, largest: Mapping[str, float]) -> VisionWeights:
    """A tower whose blocks compute in float8, given the largest input of every layer by name."""
    return with_linears(weights, lambda name, linear: Float8Linear(linear, largest[name]))


def in_float8(weights: VisionWeights) -> bool:
    """Whether `quantized` made these weights."""
    return isinstance(weights.blocks[0].qkv, Float8Linear)


def translations(opset: Any) -> dict[Any, Any]:
    """What the dynamo exporter writes for the two operators, given an opset module of onnxscript."""
    float8 = 17  # onnx.TensorProto.FLOAT8E4M3FN

    def write_rounded(values: Any, scale: Any) -> Any:
        zero = opset.Cast(opset.Constant(value_float=0.0), to=float8)
        return opset.DequantizeLinear(opset.QuantizeLinear(values, scale, zero), scale, zero)

    def write_expanded(weight: Any, scale: Any) -> Any:
        return opset.DequantizeLinear(weight, scale, axis=0)

    operators = torch.ops.arrcoc
    return {
        operators.float8_rounded.default: write_rounded,
        operators.float8_expanded.default: write_expanded,
    }
