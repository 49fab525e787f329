"""Where rows of a prompt look: attention in some decoder layers, over an image's tokens and tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from arrcoc.records import Grid


def sinks(norms: Tensor, ratio: float) -> Tensor:
    """Which tokens are attention sinks, bool [m]: those whose norm exceeds `ratio` times the median."""
    return norms > ratio * norms.median()


def probe_layers(depth: Sequence[float], n_layers: int) -> list[int]:
    """Layer numbers at fractions of the depth, ascending, each once."""
    return sorted({min(int(fraction * n_layers), n_layers - 1) for fraction in depth})


def attention_shares(query: Tensor, keys: Tensor, excluded: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean attention of rows to image tokens, normalised over the tokens that are not excluded.

    Args:
        query: [heads, rows, head_dim], rotated.
        keys: [kv_heads, m, head_dim], rotated; query heads are grouped over them in order.
        excluded: bool [m].
        rows: fp32 [rows], what each row weighs in the mean, 1 in all; None for all alike.

    Returns:
        fp32 [m], sums to 1 (0 everywhere if all are excluded).
    """
    kv_heads, m, width = keys.shape
    grouped = query.float().reshape(kv_heads, -1, width)
    scores = grouped @ keys.float().transpose(1, 2) / width**0.5
    weights: Tensor = scores.masked_fill(excluded, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    if rows is None:
        return weights.mean(dim=(0, 1))
    return rows @ weights.view(-1, len(rows), m).mean(0)


def tile_shares(attention: Tensor, grid: Grid, side: int) -> Tensor:
    """Sum over each tile's glimpse tokens: [m] to [R, C]."""
    return reduce(attention, "(r i c j) -> r c", "sum", r=grid.rows, i=side, c=grid.cols, j=side)


def relative(asked: Tensor, anyhow: Tensor, gain: float) -> Tensor:
    """asked**gain / (asked**gain + anyhow**gain), 0.5 where neither looks."""
    floor = torch.finfo(torch.float32).tiny
    return torch.sigmoid(gain * (asked.clamp_min(floor).log() - anyhow.clamp_min(floor).log()))
