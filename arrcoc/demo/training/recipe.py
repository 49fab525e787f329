"""What is trained on, when, and how fast: a curriculum of canvas sizes and of ways to encode them.

Without the curriculum and the glyph loss nothing is learnt in a thousand steps; a last phase of one canvas
size forgets the others (docs/decisions.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run.

    Attributes:
        until: share of all steps at which it ends.
        canvases: canvas side in px -> (weight, batch per process).
        modes: way of encoding -> weight.
        pictures: share of examples that ask about a framed easy-VQA picture.
    """

    until: float
    canvases: dict[int, tuple[float, int]]
    modes: dict[str, float]
    pictures: float = 0.0

    def draw_canvas(self, rng: np.random.Generator) -> tuple[int, int]:
        """A canvas side and its batch size."""
        sides = list(self.canvases)
        weights = np.array([self.canvases[side][0] for side in sides])
        side = sides[int(rng.choice(len(sides), p=weights / weights.sum()))]
        return side, self.canvases[side][1]

    def draw_mode(self, rng: np.random.Generator) -> str:
        """A way of encoding."""
        names = list(self.modes)
        weights = np.array([self.modes[name] for name in names])
        return names[int(rng.choice(len(names), p=weights / weights.sum()))]


_EARLY = {"whole": 0.4, "high": 0.3, "refine": 0.3}
_LATE = {
    "whole": 0.27,
    "smaller": 0.06,
    "high": 0.05,
    "refine": 0.34,
    "replace": 0.12,
    "uniform": 0.06,
    "crops": 0.10,
}


@dataclass(frozen=True, slots=True)
class BankSize:
    """Pre-drawn parts of composed canvases.

    Attributes:
        signs: number of signs, a multiple of 4 (see `arrcoc.demo.training.bank`): 50 kB each on the device.
        strays: number of distractors, 260 kB each.
        backgrounds: number of backgrounds of `side` x `side` px, 3 bytes a px.
        side: of a background, in px.
        refresh: steps after which a part of everything is drawn anew.
        parts: number of refreshes after which nothing is left of the first bank.
    """

    signs: int = 8192
    strays: int = 1024
    backgrounds: int = 384
    side: int = 1024
    refresh: int = 1000
    parts: int = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole run.

    Attributes:
        steps: optimiser steps.
        seed: of everything random.
        tile: tile side in px.
        sides: tokens along a tile's edge at each LOD.
        learning_rate: peak; linear warm-up, then cosine down to `final_rate` of it.
        warmup: steps.
        glyph_weight: of the auxiliary glyph loss.
        average: decay of the exponential moving average of the weights.
        batch_scale: multiplies every batch size.
        source: "drawn" draws every canvas in worker processes; "composed" pastes pre-drawn signs on the
            device (see `arrcoc.demo.training.compose`).
        bank: how many pre-drawn parts "composed" chooses from.
    """

    steps: int = 12_000
    seed: int = 0
    tile: int = 128
    sides: tuple[int, int, int, int] = (1, 2, 3, 4)
    learning_rate: float = 1e-3
    final_rate: float = 0.02
    warmup: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    glyph_weight: float = 0.5
    average: float = 0.999
    batch_scale: float = 1.0
    source: Literal["drawn", "composed"] = "drawn"
    bank: BankSize = BankSize()
    phases: tuple[Phase, ...] = field(
        default=(
            Phase(0.10, {128: (1.0, 256)}, _EARLY),
            Phase(0.20, {256: (0.8, 96), 128: (0.2, 256)}, _EARLY),
            Phase(0.35, {512: (0.8, 48), 256: (0.2, 96)}, _LATE, pictures=0.06),
            Phase(
                1.0,
                {1024: (0.64, 24), 512: (0.2, 48), 1536: (0.08, 10), 2048: (0.08, 6)},
                _LATE,
                pictures=0.10,
            ),
        )
    )

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        return next(
            phase for phase in self.phases if step < phase.until * self.steps or phase is self.phases[-1]
        )

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)
