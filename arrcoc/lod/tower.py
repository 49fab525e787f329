"""The vision tower for one fixed shape: positions and rotations are inputs, attention is dense.

The stock tower packs images of any size into one sequence and splits attention by image; here a batch of
equally sized images is a plain [B, N, hidden] tensor, which compiles, captures and exports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from arrcoc.records import Features
from arrcoc.vision import Merger, VisionWeights, axial_rotary, interpolated_positions


class Geometry(NamedTuple):
    """What the tower must know of an image's shape, for N patches in merge order.

    Attributes:
        positions: [N, hidden] learned positions.
        cos, sin: fp32 [N, head_dim].
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


def geometry(weights: VisionWeights, rows: int, cols: int) -> Geometry:
    """Positions and rotations of an image of rows x cols merged tokens."""
    merge, device = weights.merge, weights.position_table.device
    height, width = rows * merge, cols * merge
    table = interpolated_positions(weights.position_table, height, width)
    row = torch.arange(height, device=device)[:, None].expand(height, width)
    col = torch.arange(width, device=device)[None, :].expand(height, width)
    cos, sin = axial_rotary(merge_order(row, merge), merge_order(col, merge), weights.head_dim)
    return Geometry(merge_order(table, merge).to(weights.patch_bias.dtype), cos, sin)


def merge_order(grid: Tensor, merge: int) -> Tensor:
    """Flatten patches [h, w, ...] to [h*w, ...] so that the merge**2 patches of each token are neighbours."""
    return rearrange(grid, "(h i) (w j) ... -> (h w i j) ...", i=merge, j=merge)


class StaticTower(nn.Module):
    """The stock vision weights as a function of patches and geometry."""

    def __init__(self, weights: VisionWeights) -> None:
        """Args: weights, shared with the stock model, not copied."""
        super().__init__()
        self.weights = weights

    def forward(self, patches: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Encode B images of one shape.

        Args:
            patches: [B, N, 3 * 2 * patch**2], normalised, in merge order.
            positions, cos, sin: as in `Geometry`.

        Returns:
            tokens [B, N / merge**2, D] and DeepStack planes [L, B, N / merge**2, D].
        """
        hidden, planes = self.trunk(patches, positions, cos, sin)
        return self.merge(self.weights.merger, hidden), planes

    def trunk(
        self,
        patches: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` up to the last merger: last hidden state [B, N, hidden] and DeepStack planes.

        `observe` is called with the number of each block and its input [B, N, hidden].
        """
        weights = self.weights
        hidden = nn.functional.linear(patches, weights.patch_weight, weights.patch_bias) + positions
        planes = []
        for number, block in enumerate(weights.blocks):
            if observe is not None:
                observe(number, hidden)
            hidden = hidden + self._attend(block.qkv, block.proj, block.norm1(hidden), cos, sin)
            hidden = hidden + block.mlp(block.norm2(hidden))
            if number in weights.deepstack:
                planes.append(self.merge(weights.deepstack[number], hidden))
        return hidden, torch.stack(planes)

    def _attend(self, qkv: nn.Linear, proj: nn.Linear, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, count, _ = hidden.shape
        joint = qkv(hidden).view(batch, count, 3, self.weights.heads, self.weights.head_dim)
        query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value
        )
        return proj(attended.transpose(1, 2).reshape(batch, count, -1))  # type: ignore[no-any-return]

    def merge(self, merger: Merger, hidden: Tensor) -> Tensor:
        """[B, N, hidden] patches in merge order to [B, N / merge**2, D] tokens."""
        batch, width, group = hidden.shape[0], self.weights.hidden, self.weights.merge**2
        joined = (batch, -1, width * group)
        normed = merger.norm(hidden.view(joined)) if merger.norm_after else merger.norm(hidden).view(joined)
        return merger.fc2(merger.activation(merger.fc1(normed)))  # type: ignore[no-any-return]

    def encode(self, patches: Tensor, shape: Geometry) -> Features:
        """`forward`, as a record."""
        return Features(*self(patches, *shape))


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [B, heads, N, head_dim]; in fp32 as the stock tower does, or bf16 drifts by 1.3 %."""
    wide = vectors.float()
    half = int(wide.shape[-1]) // 2  # a number to the tracing ONNX exporter too
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos + turned * sin).to(vectors.dtype)
