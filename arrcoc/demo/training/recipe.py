"""What is trained on, when, and how fast: a curriculum of canvas sizes and of ways to encode them.

Without the curriculum and the glyph loss nothing is learnt in a thousand steps; a last phase of one canvas
size forgets the others (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

_LEAST_BATCH, _MOST_BATCH = 4, 384

_PATCH_US, _PAIR_US, _TOKEN_US, _EXAMPLE_US = 0.22, 7.0e-5, 0.5, 60.0
"""Estimated device time of an example on an H200, forward and backward: for each patch, each pair of patches
that attend to each other, each token of the text model, and for the example itself. Only their ratios matter:
they set how large the batches of different modes are."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run.

    Attributes:
        until: share of all steps at which it ends.
        canvases: canvas side in px -> weight.
        modes: way of encoding -> weight.
        pictures: share of examples that ask about a framed easy-VQA picture.
        batch: examples per process and step; 0 takes as many as fill `Recipe.step_ms`.
    """

    until: float
    canvases: dict[int, float]
    modes: dict[str, float]
    pictures: float = 0.0
    batch: int = 0

    def draw_canvas(self, rng: np.random.Generator) -> int:
        """A canvas side."""
        sides = list(self.canvases)
        weights = np.array([self.canvases[side] for side in sides])
        return sides[int(rng.choice(len(sides), p=weights / weights.sum()))]

    def draw_mode(self, rng: np.random.Generator) -> str:
        """A way of encoding."""
        names = list(self.modes)
        weights = np.array([self.modes[name] for name in names])
        return names[int(rng.choice(len(names), p=weights / weights.sum()))]


_EARLY = {"whole": 0.35, "high": 0.25, "refine": 0.4}
_MIDDLE = {
    "whole": 0.28,
    "smaller": 0.04,
    "high": 0.08,
    "refine": 0.36,
    "replace": 0.08,
    "crops": 0.06,
    "glimpse": 0.10,
}
_LATE = {
    "whole": 0.24,
    "smaller": 0.08,
    "high": 0.05,
    "refine": 0.36,
    "replace": 0.10,
    "uniform": 0.03,
    "crops": 0.08,
    "glimpse": 0.06,
}


@dataclass(frozen=True, slots=True)
class BankSize:
    """Pre-drawn parts of composed canvases.

    Attributes:
        signs: number of signs, a multiple of 4 (see `arrcoc.demo.training.bank`): 50 kB each on the device.
        strays: number of distractors, 260 kB each.
        pictures: number of framed easy-VQA pictures, 90 kB each; none without the package easy-vqa.
        backgrounds: number of backgrounds of `side` x `side` px, 4 bytes a px.
        side: of a background, in px.
        refresh: steps after which a part of everything is drawn anew.
        parts: number of refreshes after which nothing is left of the first bank.
    """

    signs: int = 8192
    strays: int = 1024
    pictures: int = 1024
    backgrounds: int = 384
    side: int = 1024
    refresh: int = 1000
    parts: int = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole run.

    Attributes:
        steps: optimiser steps.
        begin: share of the curriculum that is skipped, for a run that starts from weights.
        seed: of everything random.
        tile: tile side in px.
        sides: tokens along a tile's edge at each LOD.
        halo: share of the batches whose tiles are encoded with a margin of one token.
        strides: overview stride -> weight, for the layouts that keep an overview.
        learning_rate: peak; linear warm-up, then cosine down to `final_rate` of it.
        warmup: steps.
        families: question family -> weight, 1 where none is given; pictures have their own share.
        glyph_weight: of the auxiliary glyph loss.
        evidence_weight: of the auxiliary loss on where the prompt's end looks.
        average: decay of the exponential moving average of the weights.
        batch_scale: multiplies every batch size.
        step_ms: device time that a step's batch is sized for.
        source: "drawn" draws every canvas in worker processes; "composed" pastes pre-drawn signs on the
            device (see `arrcoc.demo.training.compose`).
        bank: how many pre-drawn parts "composed" chooses from.
    """

    steps: int = 12_000
    begin: float = 0.0
    seed: int = 0
    tile: int = 128
    sides: tuple[int, int, int, int] = (1, 2, 3, 4)
    halo: float = 0.8
    strides: dict[int, float] = field(default_factory=lambda: {1: 0.6, 2: 0.34, 4: 0.06})
    families: dict[str, int] = field(default_factory=lambda: {"read": 2, "find": 2, "count": 2, "compare": 3})
    learning_rate: float = 1e-3
    final_rate: float = 0.02
    warmup: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    glyph_weight: float = 0.5
    evidence_weight: float = 0.3
    average: float = 0.999
    batch_scale: float = 1.0
    step_ms: float = 48.0
    source: Literal["drawn", "composed"] = "drawn"
    bank: BankSize = BankSize()
    phases: tuple[Phase, ...] = field(
        default=(
            Phase(0.08, {128: 1.0}, _EARLY),
            Phase(0.18, {256: 0.85, 128: 0.15}, _EARLY),
            Phase(0.34, {512: 0.8, 256: 0.2}, _MIDDLE, pictures=0.06),
            Phase(1.0, {1024: 0.66, 512: 0.20, 1536: 0.07, 2048: 0.07}, _LATE, pictures=0.08),
        )
    )

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        reached = self.begin + (1 - self.begin) * step / max(1, self.steps)
        return next(phase for phase in self.phases if reached < phase.until or phase is self.phases[-1])

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)

    def batch(self, phase: Phase, canvas: int, mode: str, halo: int) -> int:
        """Examples per process in a step."""
        fitting = 1000 * self.step_ms / self.cost(canvas, mode, halo)
        size = phase.batch or min(_MOST_BATCH, max(_LEAST_BATCH, fitting))
        return max(1, int(size * self.batch_scale))

    def often(self, families: Sequence[str]) -> list[str]:
        """Each family as often as its weight says, to be drawn from with equal chance."""
        return [family for family in families for _ in range(self.families.get(family, 1))]

    def margins(self, seed: int) -> tuple[int, int]:
        """Halo in tokens, and overview stride, of a step with this seed."""
        rng = np.random.default_rng([seed, 7])
        strides = list(self.strides)
        weights = np.array([self.strides[stride] for stride in strides])
        halo = int(rng.random() < self.halo)
        return halo, strides[int(rng.choice(len(strides), p=weights / weights.sum()))]

    def cost(self, canvas: int, mode: str, halo: int) -> float:
        """Estimated device time of an example, in microseconds."""
        tiles = (canvas // self.tile) ** 2
        background, high = self.sides[0], self.sides[3]
        whole = tiles * high**2
        if mode in {"whole", "smaller"}:
            share = 1.0 if mode == "whole" else 0.5
            return self._work(4 * whole * share, (4 * whole * share) ** 2, whole * share)
        encoded = tiles if mode in {"high", "uniform"} else max(1, tiles // 8) + 2
        patches = 4 * (high + 2 * halo) ** 2
        glimpse = 4 * tiles * background**2
        tokens = whole if mode in {"high", "uniform"} else tiles * background**2 + encoded * high**2
        return self._work(encoded * patches + glimpse, encoded * patches**2 + glimpse**2, tokens)

    @staticmethod
    def _work(patches: float, pairs: float, tokens: float) -> float:
        return _EXAMPLE_US + _PATCH_US * patches + _PAIR_US * pairs + _TOKEN_US * (tokens + 30)
