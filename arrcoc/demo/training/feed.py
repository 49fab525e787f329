"""Feeds the training loop with batches on the device, drawn or composed, from any step on."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from arrcoc.demo.placards.backgrounds import preload
from arrcoc.demo.training.bank import Drawn, Index, Map, Slot, build, draw, index_of, slots
from arrcoc.demo.training.batches import Batch, BatchDataset, Prompts
from arrcoc.demo.training.compose import compose
from arrcoc.demo.training.recipe import Recipe
from arrcoc.demo.training.sketch import Sketch, SketchDataset

_NICENESS = 10
_CHUNK = 4


class Feed:
    """Batches of a run for one process."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: Prompts,
        rank: int,
        device: torch.device,
        photographs: Path | None,
        workers: int,
    ) -> None:
        """Args: recipe; how prompts are written; which process; where to; more photographs; processes."""
        self.recipe, self.prompts, self.rank, self.device = recipe, prompts, rank, device
        self.photographs, self.workers = photographs, workers

    def batches(self, steps: range) -> Iterator[Batch]:
        """The batches of consecutive steps, on the device."""
        if self.workers:
            preload("train", self.photographs)
        return self._drawn(steps) if self.recipe.source == "drawn" else self._composed(steps)

    def _drawn(self, steps: range) -> Iterator[Batch]:
        data = BatchDataset(self.recipe, self.prompts, steps, self.rank, self.photographs)
        for batch in self._loader(data):
            yield batch.to(self.device)

    def _composed(self, steps: range) -> Iterator[Batch]:
        """While one generation is trained on, the slots of the next are drawn, and its first sketches too."""
        size, seed = self.recipe.bank, self.recipe.seed * 64 + self.rank
        generations = range(steps.start // size.refresh, -(-steps.stop // size.refresh))
        paint = partial(draw, size.side, self.photographs)
        with ExitStack() as stack:
            pool = stack.enter_context(_pool(self.workers)) if self.workers else None
            each: Map = partial(pool.imap, chunksize=_CHUNK) if pool else map
            index, pixels = build(size, seed, generations.start, self.photographs, each)
            pixels = pixels.to(self.device)
            sketches = self._sketches(index, steps, generations.start)
            for generation in generations[1:]:
                renewal = _Renewal(slots(size, seed, generation, renewed=True), paint, pool)
                upcoming: Iterator[Sketch] | None = None
                for sketch in sketches:
                    yield compose(sketch, pixels)
                    if upcoming is None and renewal.ready():
                        index = index_of(size, renewal.drawn, index)
                        upcoming = self._sketches(index, steps, generation)
                if upcoming is None:
                    index = index_of(size, renewal.drawn, index)
                    upcoming = self._sketches(index, steps, generation)
                pixels.renew(size, renewal.drawn)
                sketches = upcoming
            for sketch in sketches:
                yield compose(sketch, pixels)

    def _sketches(self, index: Index, steps: range, generation: int) -> Iterator[Sketch]:
        """The sketches of a generation; worker processes begin with them at once."""
        refresh = self.recipe.bank.refresh
        part = range(max(steps.start, generation * refresh), min(steps.stop, (generation + 1) * refresh))
        return iter(self._loader(SketchDataset(self.recipe, self.prompts, part, self.rank, index)))

    def _loader(self, data: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=False,
            prefetch_factor=4 if self.workers else None,
            persistent_workers=False,
            multiprocessing_context="fork" if self.workers else None,
        )


class _Renewal:
    """Newly drawn slots of a bank: a pool draws them in the background; without one, whoever asks."""

    def __init__(self, wanted: list[Slot], paint: Callable[[Slot], Drawn], pool: Pool | None) -> None:
        self._wanted, self._paint = wanted, paint
        self._pending = pool.map_async(paint, wanted, _CHUNK) if pool else None

    def ready(self) -> bool:
        """Whether asking for what was drawn takes no time."""
        return self._pending is not None and self._pending.ready()

    @cached_property
    def drawn(self) -> dict[Slot, Drawn]:
        """All slots, waiting for them if need be."""
        made = self._pending.get() if self._pending else [self._paint(slot) for slot in self._wanted]
        return dict(zip(self._wanted, made, strict=True))


def _pool(workers: int) -> Pool:
    """Processes that give way to those that make sketches."""
    return multiprocessing.get_context("fork").Pool(workers, _begin)


def _begin() -> None:
    os.nice(_NICENESS)
    # Threads that the parent has started do not exist in a forked process.
    torch.set_num_threads(1)
