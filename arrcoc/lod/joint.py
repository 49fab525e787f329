"""Whole images through the fused tower, each at a shape of its own, one at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arrcoc import triton_support
from arrcoc.qwen import QwenVL
from arrcoc.records import Features

if TYPE_CHECKING:
    from arrcoc.lod.fused_tower import FusedTower


class JointTower:
    """Encodes one image of any shape; not captured, as an image is long enough to keep a GPU busy."""

    def __init__(self, tower: FusedTower) -> None:
        """Args: of the checkpoint, in its own precision."""
        self._tower = tower
        self._geometry = lru_cache(maxsize=32)(tower.geometry)

    def encode(self, pixels: Tensor) -> Features:
        """Features of images uint8 [1, 3, h, w] of whole tokens, in raster order."""
        from arrcoc.lod.attention import fastest_blocks  # needs Triton

        weights = self._tower.weights
        rows, cols = pixels.shape[2] // weights.token_px, pixels.shape[3] // weights.token_px
        blocks = fastest_blocks(rows * cols * weights.merge**2, weights.head_dim)
        return self._tower.forward(pixels.contiguous(), self._geometry(rows, cols), blocks)


def joint_tower(qwen: QwenVL) -> JointTower | None:
    """The fused tower where it can run; None where the stock weights' plain form must."""
    halves = qwen.dtype in (torch.bfloat16, torch.float16)
    if qwen.device.type != "cuda" or not halves or triton_support.why_not():
        return None
    from arrcoc.lod.fused_tower import FusedTower

    return JointTower(FusedTower(qwen.vision))
