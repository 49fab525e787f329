"""The static tower in as few passes as torch and Triton allow, made of operations that a CUDA graph captures.

It computes what `StaticTower` does up to rounding. What differs: equal frames of a patch share one summed
weight; the residual is added by the epilogue of the matrix product that makes it; biases of the residual
branches are summed ahead and added inside the next layer norm; the MLP's GELU is an epilogue as well; the
rotary embedding is part of attention's loads where that is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from arrcoc.lod import kernels
from arrcoc.lod.attention import Blocks, attend
from arrcoc.lod.fused_weights import (
    AnyDense,
    Convert,
    Dense,
    Float8Dense,
    FusedBlock,
    FusedMerger,
    Norm,
    fused_block,
    fused_merger,
    gelu_kind,
    summed_frames,
)
from arrcoc.lod.gemm import scaled_linear
from arrcoc.lod.tower import geometry
from arrcoc.records import Features
from arrcoc.vision import VisionWeights

_LIBRARIES = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


Activations = Tensor | tuple[Tensor, Tensor]
"""Rows [M, W], or the same in e4m3 with fp32 scales [M, 1] (ones where the layer has a step)."""


class FusedGeometry(NamedTuple):
    """What depends on an image's shape: start [N, hidden]; cos and sin, fp32 [N, head_dim / 2]."""

    start: Tensor
    cos: Tensor
    sin: Tensor


class FusedTower:
    """Weights arranged for `forward`; those that stay as they are, are shared with the stock model."""

    def __init__(
        self, weights: VisionWeights, convert: Convert | None = None, *, epilogue: bool | None = None
    ) -> None:
        """Arrange the weights.

        Args:
            weights: bf16 or fp16.
            convert: replaces linear layers, for another precision; None keeps all.
            epilogue: whether matrix products add the residual, else the layer norms do; None takes the
                first unless layers are replaced.
        """
        self.weights = weights
        self.epilogue = convert is None if epilogue is None else epilogue
        convert = convert or (lambda _, __, layer: layer)
        self._patch = summed_frames(weights).t()
        self._approximate = gelu_kind(weights)
        self._blocks, self._mergers = [], {}
        shift = torch.zeros(weights.hidden, device=weights.patch_bias.device)
        for number, block in enumerate(weights.blocks):
            middle = self._moved(shift, block.proj)
            after = self._moved(middle, block.mlp.linear_fc2)
            self._blocks.append(fused_block(block, number, shift, middle, convert))
            if number in weights.deepstack:
                kept = after if self.epilogue else torch.zeros_like(after)
                self._mergers[number] = fused_merger(weights.deepstack[number], kept, weights, convert)
            shift = after
        self._last = fused_merger(weights.merger, shift, weights, convert)

    def _moved(self, shift: Tensor, layer: Any) -> Tensor:
        """What is to be added to the residual after a layer whose bias was left out."""
        bias: Tensor = layer.bias.detach().float()
        return shift + bias if self.epilogue else bias

    def geometry(self, rows: int, cols: int) -> FusedGeometry:
        """Of an image of rows x cols merged tokens."""
        made, half = geometry(self.weights, rows, cols), self.weights.head_dim // 2
        bias = self.weights.patch_bias
        start = (made.positions.float() + bias.float()).to(bias.dtype)
        return FusedGeometry(start, made.cos[:, :half].contiguous(), made.sin[:, :half].contiguous())

    def shapes(self, batch: int, shape: FusedGeometry) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the tokens and planes that `forward` makes of `batch` images."""
        images = (batch, len(shape.start) // self.weights.merge**2, len(self._last.fc2.bias))
        return [(images, shape.start.dtype), ((len(self._mergers), *images), shape.start.dtype)]

    def forward(
        self, pixels: Tensor, shape: FusedGeometry, blocks: Blocks | None, out: Features | None = None
    ) -> Features:
        """Encode B images of one shape.

        Args:
            pixels: uint8 [B, 3, h, w], contiguous.
            shape: of one image.
            blocks: how arrcoc's attention kernel is cut; None for a library's attention.
            out: what to write to, contiguous; None takes new memory.

        Returns:
            Tokens [B, N / merge**2, D] and DeepStack planes [L, B, N / merge**2, D].
        """
        batch = len(pixels)
        if out is None:
            made = [pixels.new_empty(size, dtype=dtype) for size, dtype in self.shapes(batch, shape)]
            out = Features(*made)
        planes = dict(zip(self._mergers, out.deepstack, strict=True))
        patches = kernels.patches(pixels, self.weights, shape.start.dtype)
        hidden = shape.start.repeat(batch, 1)
        hidden.addmm_(patches, self._patch)
        unit = torch.ones(len(hidden), 1, device=pixels.device)  # scales that the weights' contain
        waiting: Tensor | None = None  # what the next norm adds to the residual
        for number, block in enumerate(self._blocks):
            normed = _normed(hidden, waiting, block.norm1, block.shift1, block.qkv)
            self._plane(number - 1, hidden, planes)
            qkv = _apply(block.qkv, normed)
            attended = self._attend(qkv, shape, batch, blocks, block.proj, unit)
            waiting = self._add(hidden, block.proj, attended)
            normed = _normed(hidden, waiting, block.norm2, block.shift2, block.fc1)
            waiting = self._add(hidden, block.fc2, self._expand(block, normed, unit))
        self._merge(self._last, hidden, waiting, out.tokens)
        self._plane(len(self._blocks) - 1, hidden, planes)
        return out

    def _plane(self, number: int, hidden: Tensor, planes: dict[int, Tensor]) -> None:
        """Write the DeepStack plane of a block's output, where it has one."""
        if number in self._mergers:
            self._merge(self._mergers[number], hidden, None, planes[number])

    def _attend(
        self,
        qkv: Tensor,
        shape: FusedGeometry,
        batch: int,
        blocks: Blocks | None,
        taker: AnyDense,
        unit: Tensor,
    ) -> Activations:
        """Attention of [M, 3 * hidden], as `taker` wants it."""
        step = taker.step if isinstance(taker, Float8Dense) else None
        heads, (rows, width) = self.weights.heads, qkv.shape
        # arrcoc's kernel rotates queries itself; keys it would rotate once for each block of queries.
        kernels.rotate_(qkv, shape.cos, shape.sin, heads, "qk" if blocks is None else "k")
        joint = qkv.view(batch, rows // batch, width)
        if blocks is not None:
            attended = attend(joint, shape.cos, shape.sin, heads, blocks, step)
            return attended if step is None else (attended, unit)
        query, key, value = joint.view(*joint.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        with _library_attention(qkv):
            attended = nn.functional.scaled_dot_product_attention(query, key, value)
        flat = attended.transpose(1, 2).reshape(rows, width // 3)
        return flat if step is None else kernels.quantize_rows(flat, step=step, warps=2)

    def _add(self, hidden: Tensor, layer: AnyDense, rows: Tensor | tuple[Tensor, Tensor]) -> Tensor | None:
        """Add a layer's output, less its bias, to the residual; or return it for the next norm to add."""
        if self.epilogue:
            assert isinstance(layer, Dense), "float8 has no such epilogue"
            assert isinstance(rows, Tensor)
            hidden.addmm_(rows, layer.weight.t())
            return None
        return _product(layer, rows)

    def _expand(self, block: FusedBlock, rows: Activations, unit: Tensor) -> Activations:
        """fc1 and GELU, as fc2 takes it."""
        if isinstance(block.fc2, Float8Dense):
            return self._expand_float8(block.fc1, block.fc2, rows, unit)
        if isinstance(block.fc1, Dense) and self._approximate == "tanh" and block.fc1.weight.is_cuda:
            assert isinstance(rows, Tensor)
            return torch._addmm_activation(block.fc1.bias, rows, block.fc1.weight.t(), use_gelu=True)
        kind = "tanh" if self._approximate == "tanh" else "none"
        return nn.functional.gelu(_apply(block.fc1, rows), approximate=kind)

    def _expand_float8(self, fc1: AnyDense, fc2: Float8Dense, rows: Activations, unit: Tensor) -> Activations:
        if fc2.step is None or isinstance(fc1, Dense) or self._approximate != "tanh":
            return kernels.quantize_rows(_apply(fc1, rows), gelu=self._approximate, step=fc2.step)
        values, scale = kernels.quantize_rows(rows) if isinstance(rows, Tensor) else rows
        made = scaled_linear(values, scale, fc1.weight, fc1.scale, fc1.bias, gelu=True, step=fc2.step)
        return made, unit

    def _merge(self, merger: FusedMerger, hidden: Tensor, waiting: Tensor | None, out: Tensor) -> None:
        """Write the tokens of the residual [M, hidden] and what is still to be added to it."""
        group = self.weights.merge**2
        joined = (len(hidden) // group, group * hidden.shape[1])
        if merger.shift.numel() == joined[1]:  # the norm comes after joining
            hidden = hidden.view(joined)
            waiting = None if waiting is None else waiting.view(joined)
        normed = _normed(hidden, waiting, merger.norm, merger.shift, None)
        assert isinstance(normed, Tensor)
        middle = _apply(merger.fc1, normed.view(joined))
        in_float8 = isinstance(merger.fc2, Float8Dense)
        wide = kernels.quantize_rows(middle, gelu="erf") if in_float8 else nn.functional.gelu(middle)
        _apply(merger.fc2, wide, out.view(joined[0], -1))


def _normed(
    hidden: Tensor, waiting: Tensor | None, norm: Norm, shift: Tensor, taker: AnyDense | None
) -> Activations:
    """Layer norm of what the residual has become, in the precision of the layer that takes it."""
    if isinstance(taker, Float8Dense):
        return kernels.layer_norm_float8(hidden, waiting, shift, *norm)
    if waiting is None:
        return kernels.layer_norm(hidden, shift, *norm)
    return kernels.add_layer_norm(hidden, waiting, shift, *norm)


def _apply(layer: AnyDense, rows: Activations, out: Tensor | None = None) -> Tensor:
    """A linear layer of rows [M, in]: [M, out], new or in `out`."""
    if isinstance(layer, Dense):
        assert isinstance(rows, Tensor)
        return torch.addmm(layer.bias, rows, layer.weight.t(), out=out)
    return _scaled_product(layer, rows, layer.bias, out)


def _product(layer: AnyDense, rows: Activations) -> Tensor:
    """`_apply` without the bias."""
    if isinstance(layer, Dense):
        assert isinstance(rows, Tensor)
        return rows @ layer.weight.t()
    return _scaled_product(layer, rows, None)


def _scaled_product(
    layer: Float8Dense, rows: Activations, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    assert layer.step is None or not isinstance(rows, Tensor), "rows come with the layer's step"
    values, scale = kernels.quantize_rows(rows) if isinstance(rows, Tensor) else rows
    weight, dtype = layer.weight.t(), layer.bias.dtype
    return torch._scaled_mm(
        values, weight, scale, layer.scale, bias, out_dtype=dtype, use_fast_accum=True, out=out
    )


@contextmanager
def _library_attention(like: Tensor) -> Iterator[None]:
    """cuDNN's attention where there is one: at a head of 72 it is the fastest of the libraries'."""
    if not like.is_cuda:
        yield
        return
    with sdpa_kernel(_LIBRARIES, set_priority=True):
        yield
