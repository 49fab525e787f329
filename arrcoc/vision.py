"""The stock vision tower as plain weights, and the pure functions that prepare its inputs.

Nothing here knows a Hugging Face attribute: `arrcoc.qwen` takes a loaded model apart into these types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

_TEMPORAL = 2  # an image is a clip of two equal frames to the patch convolution
_VISION_THETA = 10_000.0


class Block(NamedTuple):
    """One vision transformer block: pre-norm attention, pre-norm MLP."""

    norm1: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    norm2: nn.Module
    mlp: nn.Module


class Merger(NamedTuple):
    """2x2 patch merger; `norm_after` says whether it normalises after the four patches are joined."""

    norm: nn.Module
    fc1: nn.Linear
    activation: nn.Module
    fc2: nn.Linear
    norm_after: bool


@dataclass(frozen=True)
class VisionWeights:
    """The stock vision tower, taken apart.

    Attributes:
        patch_weight: [hidden, 3 * 2 * patch**2], the patch convolution as a matrix.
        patch_bias: [hidden].
        position_table: [side**2, hidden], learned positions of a square grid.
        blocks: in order.
        merger: makes the tokens of the last hidden state.
        deepstack: by block number, the merger that makes a DeepStack plane of that block's output.
        heads: attention heads.
        patch: pixels along the edge of a patch.
        merge: patches along the edge of a merged token.
        mean, std: per channel, of pixels in [0, 1].
    """

    patch_weight: Tensor
    patch_bias: Tensor
    position_table: Tensor
    blocks: tuple[Block, ...]
    merger: Merger
    deepstack: dict[int, Merger]
    heads: int
    patch: int
    merge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def hidden(self) -> int:
        """Width of the tower."""
        return int(self.patch_bias.shape[0])

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def token_px(self) -> int:
        """Pixels along the edge of one merged token."""
        return self.patch * self.merge


def patchify(pixels: Tensor, weights: VisionWeights, dtype: torch.dtype) -> Tensor:
    """Normalised patches [K, N, 3 * 2 * patch**2] of images uint8 [K, 3, h, w], in the tower's merge order.

    h and w are whole merged tokens; N = h * w / patch**2. Order of patches: token row, token column, row
    and column inside the token, as the stock image processor lays them out.
    """
    height, width = pixels.shape[2:]
    patch, merge = weights.patch, weights.merge
    assert height % weights.token_px == width % weights.token_px == 0, (height, width)
    mean, std = _levels(weights.mean, pixels.device), _levels(weights.std, pixels.device)
    normal = ((pixels - mean) / std).to(dtype)
    # An image is a clip of equal frames (t); i, j count the patches inside a token.
    clip = normal[:, :, None].expand(-1, -1, _TEMPORAL, -1, -1)
    order = "k c t (h i y) (w j x) -> k (h w i j) (c t y x)"
    return rearrange(clip, order, i=merge, j=merge, y=patch, x=patch)


@lru_cache(maxsize=16)
def _levels(unit: tuple[float, float, float], device: torch.device) -> Tensor:
    """fp32 [1, 3, 1, 1] of three values in [0, 1], in levels of 255; kept, for making it waits for CUDA."""
    with torch.inference_mode(False):
        return torch.tensor(unit, device=device).view(1, 3, 1, 1) * 255


def axial_rotary(rows: Tensor, cols: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [N, head_dim], of the vision tower's 2D RoPE at patch rows and columns [N].

    Half of the frequencies follow the row, half the column (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=rows.device) / (head_dim // 2)
    frequency = 1.0 / (_VISION_THETA**exponent)
    angle = torch.cat((rows[:, None].float() * frequency, cols[:, None].float() * frequency), dim=-1)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def interpolated_positions(table: Tensor, rows: int, cols: int) -> Tensor:
    """Learned positions [rows, cols, hidden] for a grid of patches, bilinear with aligned corners.

    Args:
        table: [side**2, hidden], the checkpoint's square grid.
        rows: patches along the height.
        cols: patches along the width.
    """
    side = math.isqrt(table.shape[0])
    grid = table.view(side, side, -1)
    row, col = (torch.linspace(0, side - 1, count, device=table.device) for count in (rows, cols))
    row_low, col_low = row.long(), col.long()
    row_high, col_high = (row_low + 1).clamp(max=side - 1), (col_low + 1).clamp(max=side - 1)
    down, right = (row - row_low)[:, None, None], (col - col_low)[None, :, None]
    # Added in the stock tower's order: another one differs in the last bit.
    total = grid[row_low][:, col_low] * ((1 - down) * (1 - right))
    total = total + grid[row_low][:, col_high] * ((1 - down) * right)
    total = total + grid[row_high][:, col_low] * (down * (1 - right))
    return total + grid[row_high][:, col_high] * (down * right)
