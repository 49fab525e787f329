"""Whole images through the fused tower, each at a shape of its own, one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arrcoc import triton_support
from arrcoc.qwen import QwenVL
from arrcoc.records import Features
from arrcoc.shape_graphs import ShapeGraphs, Tensors

if TYPE_CHECKING:
    from arrcoc.lod.attention import Blocks
    from arrcoc.lod.fused_tower import FusedGeometry, FusedTower

MOST_TOKENS = 4096
"""Most tokens of an image that is captured: with more, launching takes less time than computing."""
KEEP_BYTES = 256 << 20
"""Most bytes of pixels and features that captured shapes keep; one shape alone may exceed it."""


class JointTower:
    """Encodes one image of any shape, by a CUDA graph from the third of a shape on. Threads may share it."""

    def __init__(self, tower: FusedTower) -> None:
        """Args: of the checkpoint, in its own precision."""
        self._tower, device = tower, tower.weights.patch_bias.device
        self._geometry = lru_cache(maxsize=32)(partial(_geometry, tower))
        self._graphs: ShapeGraphs[_StaticImage] = ShapeGraphs(device, "glimpses are encoded", KEEP_BYTES)

    def describe(self) -> str:
        """How images are launched, in words."""
        return self._graphs.describe()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Features:
        """Features of images uint8 [1, 3, h, w] of whole tokens, in raster order."""
        weights = self._tower.weights
        rows, cols = pixels.shape[2] // weights.token_px, pixels.shape[3] // weights.token_px
        found = None
        if rows * cols <= MOST_TOKENS:
            found = self._graphs.run(
                (rows, cols),
                lambda: self._work(torch.empty_like(pixels, memory_format=torch.contiguous_format)),
                lambda work: work.pixels.copy_(pixels),
                lambda _, made: Features(made[0].clone(), made[1].clone()),
            )
        return Features(*self._work(pixels.contiguous()).compute()) if found is None else found

    def _work(self, pixels: Tensor) -> _StaticImage:
        from arrcoc.lod.attention import fastest_blocks  # needs Triton

        weights = self._tower.weights
        rows, cols = pixels.shape[2] // weights.token_px, pixels.shape[3] // weights.token_px
        blocks = fastest_blocks(rows * cols * weights.merge**2, weights.head_dim)
        return _StaticImage(self._tower, pixels, self._geometry(rows, cols), blocks)


@dataclass(frozen=True, slots=True)
class _StaticImage:
    """One image that lies where it is: see `StaticWork`."""

    tower: FusedTower
    pixels: Tensor
    shape: FusedGeometry
    blocks: Blocks | None

    @property
    def inputs(self) -> Tensors:
        return (self.pixels,)

    def compute(self) -> Tensors:
        made = self.tower.forward(self.pixels, self.shape, self.blocks)
        return made.tokens, made.deepstack


def _geometry(tower: FusedTower, rows: int, cols: int) -> FusedGeometry:
    made = tower.geometry(rows, cols)
    if made.start.is_cuda:  # other threads will read it on streams of their own
        torch.cuda.current_stream(made.start.device).synchronize()
    return made


def joint_tower(qwen: QwenVL) -> JointTower | None:
    """The fused tower where it can run; None where the stock weights' plain form must."""
    halves = qwen.dtype in (torch.bfloat16, torch.float16)
    if qwen.device.type != "cuda" or not halves or triton_support.why_not():
        return None
    from arrcoc.lod.fused_tower import FusedTower

    return JointTower(FusedTower(qwen.vision))
