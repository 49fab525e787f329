"""Feeds the training loop with batches on the device, drawn or composed, from any step on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from arrcoc.demo.placards.backgrounds import preload
from arrcoc.demo.training.bank import Index, Pixels, build
from arrcoc.demo.training.batches import Batch, BatchDataset, Prompts
from arrcoc.demo.training.compose import compose
from arrcoc.demo.training.recipe import Recipe
from arrcoc.demo.training.sketch import SketchDataset


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
        refresh = self.recipe.bank.refresh
        for generation in range(steps.start // refresh, -(-steps.stop // refresh)):
            index, pixels = self._bank(generation)
            part = range(max(steps.start, generation * refresh), min(steps.stop, (generation + 1) * refresh))
            data = SketchDataset(self.recipe, self.prompts, part, self.rank, index, self.photographs)
            for sketch in self._loader(data):
                yield compose(sketch, pixels)

    def _bank(self, generation: int) -> tuple[Index, Pixels]:
        arguments = self.recipe.bank, self.recipe.seed * 64 + self.rank, generation, self.photographs
        if not self.workers:
            index, pixels = build(*arguments)
        else:
            # One thread each: threads that the parent has started do not exist in a forked process.
            with multiprocessing.get_context("fork").Pool(self.workers, torch.set_num_threads, (1,)) as pool:
                index, pixels = build(*arguments, lambda f, keys: pool.imap(f, keys, chunksize=16))
        return index, pixels.to(self.device)

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
