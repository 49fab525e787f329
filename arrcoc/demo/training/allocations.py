"""Allocations to train on: query-aware as a good scorer would choose, misled, broad, random or uniform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arrcoc.records import Lod

_AWARE, _DEMOTED, _BROAD = 0.92, 0.15, 0.2


def draw_allocation(targets: Tensor, mode: str, generator: torch.Generator) -> Tensor:
    """LODs int64 [B, R*C] with equal counts of each LOD in every row, as the mode says.

    Args:
        targets: bool [B, R, C], tiles that matter.
        mode: see `arrcoc.demo.training.modes`.
        generator: on the CPU.
    """
    size, count = len(targets), targets[0].numel()
    if mode in {"whole", "smaller", "glimpse"}:
        return torch.zeros(size, count, dtype=torch.long)
    if mode == "high":
        return torch.full((size, count), int(Lod.HIGH))
    if mode == "uniform":
        return torch.full((size, count), int(torch.randint(1, 4, (1,), generator=generator)))
    return _ranked(targets.flatten(1), _counts(targets, mode, count, generator), generator)


def _counts(targets: Tensor, mode: str, count: int, generator: torch.Generator) -> list[int]:
    """How many tiles are high, medium and low."""

    def draw(most: int) -> int:
        return int(torch.randint(0, most + 1, (1,), generator=generator))

    if mode == "crops":
        return [min(count, 1 + draw(4)), min(max(count - 5, 0), draw(2)), 0]
    if float(torch.rand(1, generator=generator)) < _BROAD:
        medium = min(count, draw(max(1, count // 8)))
        return [0, medium, min(count - medium, max(1, draw(max(1, count // 3))))]
    needed = int(targets.flatten(1).sum(1).float().quantile(0.75))
    high = min(count, max(1 + draw(max(1, count // 8)), needed if draw(9) < 8 else 1))
    medium = min(count - high, draw(max(1, count // 8)))
    return [high, medium, min(count - high - medium, draw(max(1, count // 4)))]


def _ranked(targets: Tensor, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Tiles ranked by need plus noise, the best of them at the highest LODs.

    In some rows need counts for nothing; in some others as many idle tiles as there are high ones come
    first, so that what matters is seen at a lower LOD.
    """
    noise = torch.rand(targets.shape, generator=generator)
    aware = (torch.rand(len(noise), 1, generator=generator) < _AWARE).float()
    demoted = (torch.rand(len(noise), 1, generator=generator) < _DEMOTED).float()
    ahead = torch.rand(targets.shape, generator=generator).argsort(1).argsort(1) < counts[0]
    rank = targets.float() * aware * 10 + noise + demoted * ahead * 20
    levels = torch.zeros(noise.shape[1], dtype=torch.long)
    start = 0
    for level, number in zip((Lod.HIGH, Lod.MEDIUM, Lod.LOW), counts, strict=True):
        levels[start : start + number] = int(level)
        start += number
    order = rank.argsort(1, descending=True)
    return torch.zeros_like(order).scatter(1, order, levels.expand(len(order), -1))
