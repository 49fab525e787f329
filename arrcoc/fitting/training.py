"""The loop: seeded batches, checkpoints, early stop; interrupted and resumed, it ends at the same weights."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from arrcoc.fitting.prepare import Sample, stack_batch
from arrcoc.fitting.settings import FitSettings
from arrcoc.scorers import TextureHead

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
_CLIP = 1.0
_JUDGED_AT_ONCE = 16


@dataclass
class History:
    """What a fit has come to.

    Attributes:
        step: steps made.
        curve: a record of step, training loss, held-out loss and learning rate for each judgement.
        best: least held-out loss.
        best_step: the step it was reached at.
        stale: judgements since.
    """

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    stale: int = 0


class HeadTrainer:
    """Fits a head to samples; see `fit`."""

    def __init__(
        self,
        head: TextureHead,
        train: Sequence[Sample],
        held_out: Sequence[Sample],
        settings: FitSettings,
        folder: Path,
        spec: str,
    ) -> None:
        """Make a trainer.

        Args:
            head: to begin from; changed in place.
            train: what it is fitted to.
            held_out: what it is judged by.
            settings: of the fit.
            folder: of the checkpoint.
            spec: what the result depends on; a checkpoint of another spec is not resumed.
        """
        self.head, self.settings = head, settings
        self._train, self._held_out = list(train), list(held_out)
        self._path, self._spec = folder / STATE_FILE, spec
        self._by_shape: dict[tuple[int, int, int], list[Sample]] = {}
        for sample in self._train:
            self._by_shape.setdefault(sample.shape, []).append(sample)
        self._device = next(head.parameters()).device
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=0.01)
        self.history = History()
        self._best = copy.deepcopy(head.state_dict())

    def fit(self, progress: Callable[[int, int, float], object]) -> History:
        """Train until the last step or until the held-out loss falls no more; `head` gets the best weights.

        Args:
            progress: called with steps made, steps in all and the training loss.
        """
        self._resume()
        saved, losses = time.monotonic(), list[Tensor]()
        while self.history.step < self.settings.steps and self.history.stale < self.settings.patience:
            losses.append(self._step())
            step = self.history.step
            if step % self.settings.judge_every == 0 or step == self.settings.steps:
                self._judge(float(torch.stack(losses).mean()))
                progress(step, self.settings.steps, self.history.curve[-1]["train"])
                losses.clear()
                # Only here, so that the mean of a resumed fit's losses is that of an unbroken one.
                if time.monotonic() - saved >= self.settings.save_every:
                    self._save()
                    saved = time.monotonic()
        self._save()
        self.head.load_state_dict(self._best)
        return self.history

    def _step(self) -> Tensor:
        history = self.history
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(history.step, self.settings)
        batch = stack_batch(self._draw(history.step), self._device)
        loss = head_loss(self.head, batch, cell_weight(history.step, self.settings.steps))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), _CLIP)
        self._optimizer.step()
        history.step += 1
        return loss.detach()

    def _draw(self, step: int) -> list[Sample]:
        """A batch as a function of seed and step alone, of samples with one grid."""
        rng = np.random.default_rng([self.settings.seed, step])
        first = self._train[rng.integers(len(self._train))]
        alike = self._by_shape[first.shape]
        return [first, *(alike[i] for i in rng.integers(len(alike), size=self.settings.batch - 1))]

    def _judge(self, train_loss: float) -> None:
        history = self.history
        loss = tile_loss(self.head, self._held_out)
        rate = learning_rate(history.step - 1, self.settings)
        history.curve.append({"step": history.step, "train": train_loss, "held_out": loss, "lr": rate})
        if loss < history.best:
            history.best, history.best_step, history.stale = loss, history.step, 0
            self._best = copy.deepcopy(self.head.state_dict())
        else:
            history.stale += 1

    def _save(self) -> None:
        state: dict[str, Any] = {
            "spec": self._spec,
            "history": json.dumps(vars(self.history)),
            "head": self.head.state_dict(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
        }
        scratch = self._path.with_suffix(f".{os.getpid()}.partial")
        torch.save(state, scratch)
        scratch.replace(self._path)

    def _resume(self) -> None:
        if not self._path.is_file():
            return
        state = torch.load(self._path, map_location=self._device, weights_only=True)
        if state["spec"] != self._spec:
            logger.warning("%s is of another fit (data, settings or model): beginning anew", self._path)
            return
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._best = state["best"]
        self.history = History(**json.loads(state["history"]))
        logger.info("resumed at step %d", self.history.step)


def head_loss(head: TextureHead, batch: tuple[Tensor, Tensor, Tensor, Tensor], cells_weight: float) -> Tensor:
    """Binary cross-entropy of the tiles' logits, plus `cells_weight` times that of the cells'.

    A tile's logit is the highest of its cells': its gradient reaches one cell in hundreds. The cells' term
    reaches all, so it teaches fast; the tiles' term is what the engine reads. Binary, not a softmax over
    tiles, which leaves the level of a maximum open and so a map in [0, 1] without meaning.

    Args:
        head: the head.
        batch: of `stack_batch`.
        cells_weight: weight of the cells' term.
    """
    maps, embeddings, cells, tiles = batch
    edge = cells.shape[1] // tiles.shape[1]
    cell_logits = head.logits(maps, embeddings, cells=1)
    bce = functional.binary_cross_entropy_with_logits
    return bce(functional.max_pool2d(cell_logits, edge), tiles) + cells_weight * bce(cell_logits, cells)


@torch.no_grad()
def tile_loss(head: TextureHead, samples: Sequence[Sample]) -> float:
    """Mean binary cross-entropy per tile, each sample counting alike, however batched."""
    total = 0.0
    for batch in _batches(samples):
        maps, embeddings, _, tiles = stack_batch(batch, next(head.parameters()).device)
        logits = head.logits(maps, embeddings, batch[0].cells)
        loss = functional.binary_cross_entropy_with_logits(logits, tiles, reduction="none")
        total += float(loss.double().mean((1, 2)).sum())
    return total / len(samples)


def _batches(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples in batches of one grid each."""
    groups: dict[tuple[int, int, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.shape, []).append(sample)
    n = _JUDGED_AT_ONCE
    return [group[i : i + n] for group in groups.values() for i in range(0, len(group), n)]


def cell_weight(step: int, steps: int) -> float:
    """Weight of the cells' loss: from 1 down to 0 at half of the steps, linearly."""
    return max(0.0, 1 - 2 * step / steps)


def learning_rate(step: int, settings: FitSettings) -> float:
    """Linear over the first tenth of the steps, then half a cosine down to 0."""
    warm = max(1, settings.steps // 10)
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))
