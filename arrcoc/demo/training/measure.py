"""How well a model in training reads held-out placards: teacher-forced exact match by family and mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arrcoc.demo.placards import FAMILIES, sample
from arrcoc.demo.training.batches import Batch, Prompts, collate
from arrcoc.demo.training.forward import AnswerLoss
from arrcoc.demo.training.modes import BatchEncoder
from arrcoc.demo.training.recipe import Recipe
from arrcoc.records import Lod

MODES = ("whole", "high", "refine", "replace", "crops")

Accuracy = dict[str, dict[str, float]]
"""Mode -> family, or "all" -> share of right answers."""


class _Held(Dataset[Batch]):
    """Batches of the test split."""

    def __init__(
        self, recipe: Recipe, prompts: Prompts, canvas: int, size: int, count: int, photographs: Path | None
    ):
        self.recipe, self.prompts, self.canvas, self.size, self.count = recipe, prompts, canvas, size, count
        self.photographs = photographs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> Batch:
        torch.set_num_threads(1)
        examples = [
            sample(9001, item * self.size + place, "test", self.canvas, photographs=self.photographs)
            for place in range(self.size)
        ]
        return collate(examples, self.prompts, self.recipe.tile, self.canvas, "whole", item)


@torch.no_grad()
def accuracy(
    loss: AnswerLoss,
    encoder: BatchEncoder,
    recipe: Recipe,
    prompts: Prompts,
    device: torch.device,
    canvas: int,
    batches: Sequence[int],
    size: int,
    workers: int,
    photographs: Path | None = None,
    halo: int | None = None,
) -> Accuracy:
    """Share of right answers per mode and family, over `size` examples in each of `batches`.

    Refined modes see the target tiles and two more at full resolution and nothing else beyond the glimpse,
    whose every token is kept: an allocation by an ideal scorer. Tiles have the margin `halo`, in tokens; by
    default the one that most training batches have.
    """
    margin = round(recipe.halo) if halo is None else halo
    held = _Held(recipe, prompts, canvas, size, max(batches) + 1, photographs)
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    loader = DataLoader(torch.utils.data.Subset(held, list(batches)), batch_size=None, num_workers=workers)
    for batch in loader:
        for mode in MODES:
            shown = replace(batch, mode=mode).to(device)
            found = loss(shown, encoder.encode(shown, _allocation(shown), margin, 1))
            for family, hit in zip(batch.families, found.right.tolist(), strict=True):
                right[mode][family].append(hit)
                right[mode]["all"].append(hit)
    return {
        mode: {family: sum(hits) / len(hits) for family, hits in by.items()} for mode, by in right.items()
    }


def _allocation(batch: Batch) -> Tensor:
    """LODs int64 [B, R*C]: high everywhere in mode "high", else where an ideal scorer would have it.

    The latter gives LOD high to as many tiles of every example as any of them has targets, and to two more.
    """
    if batch.mode == "high":
        return torch.full_like(batch.targets.flatten(1), int(Lod.HIGH), dtype=torch.long)
    wanted = batch.targets.flatten(1).float()
    count = min(int(wanted.sum(1).max()) + 2, wanted.shape[1])
    noise = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(batch.plan_seed))
    best = (wanted + noise * 0.5).argsort(1, descending=True)[:, :count]
    return torch.zeros_like(wanted, dtype=torch.long).scatter(1, best, int(Lod.HIGH))


def table(found: Accuracy) -> str:
    """The shares as lines of text."""
    columns = ["all", *FAMILIES]
    lines = ["mode".ljust(10) + "".join(name.rjust(10) for name in columns)]
    for mode, by in found.items():
        lines.append(mode.ljust(10) + "".join(f"{by.get(name, float('nan')):10.3f}" for name in columns))
    return "\n".join(lines)
