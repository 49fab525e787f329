"""VisionZip: vision tokens are dropped and merged before the decoder (Yang et al. 2024, arXiv 2412.04467).

The whole image is encoded. Dominant tokens are those that receive most attention in a late layer of the
vision tower; the tower has no CLS token, so it is the mean over all rows, as the paper has it for such
towers. Of the others some, evenly spaced, become contextual tokens: each of the rest is merged, by
averaging, into the one with the most similar key. Choices made here for Qwen3-VL: the last block; attention
and keys averaged over the patches of a merged token; keys before RoPE, as content; merging after the patch
merger, of DeepStack planes alike; tokens keep raster order, and a contextual token its own position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from arrcoc.evaluation.stock import TokenGrid, WholeImage
from arrcoc.lod.tower import Geometry, rotate
from arrcoc.records import Features
from arrcoc.vision import VisionWeights

CONTEXTUAL = 10 / 64
"""Contextual tokens as a share of those kept: the paper's 54 dominant and 10 contextual of 64."""

_SCORES = 1 << 27  # most attention scores held at a time


class Salience(NamedTuple):
    """What one block of the tower thinks of n merged tokens.

    Attributes:
        received: fp32 [n], mean attention received.
        keys: fp32 [n, hidden], mean key over the token's patches, heads side by side.
    """

    received: Tensor
    keys: Tensor


def mean_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention that each of N columns receives, averaged over heads and rows: fp32 [N], sums to 1.

    Args:
        query, key: [heads, N, head_dim], rotated.
    """
    heads, count, width = query.shape
    rows = max(1, _SCORES // (heads * count))
    total = torch.zeros(count, device=query.device)
    for start in range(0, count, rows):
        part = query[:, start : start + rows].float()
        total += (part @ key.float().mT / width**0.5).softmax(dim=-1).sum(dim=(0, 1))
    return total / (heads * count)


def representatives(salience: Salience, keep: int) -> Tensor:
    """Which token stands for each of n tokens, int64 [n]; exactly `keep` tokens stand for themselves.

    Dominant and contextual tokens stand for themselves, each of the others is stood for by the contextual
    token with the highest cosine similarity of keys; it is -1 where so few are kept that none is contextual.
    """
    count = len(salience.received)
    assert 0 < keep <= count, (keep, count)
    contextual = round(keep * CONTEXTUAL) if keep < count else 0
    order = salience.received.sort(descending=True, stable=True).indices
    found = torch.arange(count, device=order.device)
    rest = order[keep - contextual :].sort().values
    if not contextual:
        return found.index_fill(0, rest, -1)
    step = len(rest) // contextual
    centres = rest[::step][:contextual]
    keys = nn.functional.normalize(salience.keys, dim=-1)
    nearest = centres[(keys[rest] @ keys[centres].mT).argmax(dim=-1)]
    return found.index_copy(0, rest, nearest).index_copy(0, centres, centres)


def merge(tokens: Tensor, stands_for: Tensor) -> tuple[Tensor, Tensor]:
    """Average the tokens that share a representative.

    Args:
        tokens: [..., n, D].
        stands_for: int64 [n], from `representatives`; -1 drops a token.

    Returns:
        [..., keep, D] in raster order, and the representatives' raster indices int64 [keep].
    """
    counted = (stands_for >= 0).nonzero()[:, 0]
    kept, group, sizes = torch.unique(stands_for[counted], return_inverse=True, return_counts=True)
    sums = tokens.new_zeros(*tokens.shape[:-2], len(kept), tokens.shape[-1], dtype=torch.float32)
    sums = sums.index_add(-2, group, tokens[..., counted, :].float())
    return (sums / sizes[:, None]).to(tokens.dtype), kept


class Looked(NamedTuple):
    """A whole image, encoded and judged: all that does not depend on how much is kept.

    Attributes:
        tokens: [1, n, D].
        planes: [L, 1, n, D].
        salience: of every token.
        grid: of the image.
    """

    tokens: Tensor
    planes: Tensor
    salience: Salience
    grid: TokenGrid


@torch.inference_mode()
def look(whole: WholeImage, pixels: Tensor, most: int) -> Looked:
    """Encode an image uint8 [3, h, w] at up to `most` tokens."""
    patches, grid = whole.patches(pixels, most)
    shape, weights = whole.geometry(grid), whole.tower.weights
    inputs: list[Tensor] = []

    def observe(block: int, hidden: Tensor) -> None:
        if block == len(weights.blocks) - 1:
            inputs.append(hidden)

    hidden, planes = whole.tower.trunk(patches, *shape, observe=observe)
    tokens = whole.tower.merge(weights.merger, hidden)
    return Looked(tokens, planes, salience(weights, inputs[0], shape), grid)


@torch.inference_mode()
def compress(looked: Looked, keep: int) -> tuple[Features, Tensor]:
    """Keep `keep` tokens (all, if there are fewer).

    Returns:
        Features (K = 1, `keep` tokens) and the raster indices kept, int64 [keep].
    """
    stands_for = representatives(looked.salience, min(keep, looked.grid.tokens))
    merged, kept = merge(looked.tokens, stands_for)
    return Features(merged, merge(looked.planes, stands_for)[0]), kept


def encode(whole: WholeImage, pixels: Tensor, most: int, keep: int) -> tuple[Features, TokenGrid, Tensor]:
    """Both steps: features (K = 1, `keep` tokens), the whole image's grid, the raster indices kept."""
    looked = look(whole, pixels, most)
    features, kept = compress(looked, keep)
    return features, looked.grid, kept


def salience(weights: VisionWeights, hidden: Tensor, shape: Geometry) -> Salience:
    """Salience of merged tokens in the last block, from its input [1, N, hidden] in merge order."""
    block, group = weights.blocks[-1], weights.merge**2
    joint = block.qkv(block.norm1(hidden)).view(hidden.shape[1], 3, weights.heads, weights.head_dim)
    query, key, _ = joint.permute(1, 2, 0, 3)
    turned = (rotate(vectors[None], shape.cos, shape.sin)[0] for vectors in (query, key))
    received = mean_attention(*turned).view(-1, group).mean(1)
    keys = key.float().transpose(0, 1).reshape(-1, group, weights.hidden).mean(1)
    return Salience(received, keys)
