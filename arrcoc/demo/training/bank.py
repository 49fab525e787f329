"""Pre-drawn parts of composed canvases: signs, distractors and backgrounds, a part of them renewed in turn.

Signs come in quads: four kinds, of which 0 and 1 carry one code, and 2 and 3 a code that differs from it in
one glyph. So the bank holds equal and nearly equal codes for the questions that turn on them.

Every slot is a pure function of the seed and its version, which grows by one every `refresh * parts` steps;
a run that is resumed therefore draws the very bank that it was stopped with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arrcoc.demo.placards import backgrounds, distractors, drawing, questions
from arrcoc.demo.placards.drawing import Sprite
from arrcoc.demo.placards.records import Image, Kind, Spec
from arrcoc.demo.placards.vocabulary import fonts, neighbours
from arrcoc.demo.training.recipe import BankSize
from arrcoc.errors import ConfigError

QUAD = 4
SIGN_SIDE, STRAY_SIDE = 112, 256
"""Width and height in px of the squares that signs and distractors are kept in."""


class Sign(NamedTuple):
    """What is known of a pre-drawn sign beside its pixels; see `placards.records.Placard`."""

    spec: Spec
    sprite: Sprite
    font: str


@dataclass(frozen=True, slots=True)
class Index:
    """What the host needs to know of a bank: no pixels.

    Attributes:
        signs: all signs; their sprites keep only an `alpha` without content, for its shape.
        strays: (width, height) of every distractor, and its kind if it is a blank sign.
        by_kind: positions in `signs` of each kind.
        backgrounds: number of backgrounds.
        side: of a background, in px.
    """

    signs: tuple[Sign, ...]
    strays: tuple[tuple[tuple[int, int], Kind | None], ...]
    by_kind: dict[Kind, tuple[int, ...]]
    backgrounds: int
    side: int


@dataclass(frozen=True, slots=True)
class Pixels:
    """The pixels of a bank.

    Attributes:
        signs: uint8 [N, 4, 112, 112], RGB and coverage, in the upper left corner.
        strays: uint8 [M, 4, 256, 256], likewise.
        backgrounds: uint8 [G, 3, side, side].
    """

    signs: Tensor
    strays: Tensor
    backgrounds: Tensor

    def to(self, device: torch.device) -> Pixels:
        """The same pixels on a device."""
        return Pixels(self.signs.to(device), self.strays.to(device), self.backgrounds.to(device))


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""The builtin `map`, or that of a process pool."""


def version(slot: int, generation: int, parts: int) -> int:
    """How often a slot has been renewed: one slot in `parts` at every generation, each in its turn."""
    return (generation + parts - 1 - slot % parts) // parts


def build(
    size: BankSize, seed: int, generation: int, photographs: Path | None = None, each: Map = map
) -> tuple[Index, Pixels]:
    """Draw the bank of a generation (step // `size.refresh`), the same in every process.

    Raises:
        ConfigError: a size out of bounds, or `photographs` without a training photograph.
    """
    _check(size)

    def keys(count: int) -> list[tuple[int, int, int]]:
        return [(seed, slot, version(slot, generation, size.parts)) for slot in range(count)]

    signs: list[Sign] = list(chain.from_iterable(each(_quad, keys(size.signs // QUAD))))
    strays: list[tuple[Sprite, Kind | None]] = list(each(_stray, keys(size.strays)))
    scenes = list(each(partial(_background, size.side, photographs), keys(size.backgrounds)))
    pixels = Pixels(
        _stacked((sign.sprite for sign in signs), SIGN_SIDE),
        _stacked((sprite for sprite, _ in strays), STRAY_SIDE),
        torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous(),
    )
    return _index(signs, strays, size), pixels


def _check(size: BankSize) -> None:
    if size.signs < QUAD or size.signs % QUAD or min(size.strays, size.backgrounds) < 1 or size.side < 256:
        raise ConfigError(
            f"a bank of {size.signs} signs, {size.strays} strays, {size.backgrounds} x {size.side} px",
            "a multiple of 4 signs, 1 stray and 1 background of 256 px or more",
            "Raise them; 8192 signs give each kind about a hundred",
        )


def _index(signs: list[Sign], strays: list[tuple[Sprite, Kind | None]], size: BankSize) -> Index:
    by_kind: dict[Kind, list[int]] = defaultdict(list)
    for position, sign in enumerate(signs):
        by_kind[Kind(sign.spec.colour, sign.spec.shape)].append(position)
    light = tuple(sign._replace(sprite=_hollow(sign.sprite)) for sign in signs)
    sizes = tuple(((s.alpha.shape[1], s.alpha.shape[0]), kind) for s, kind in strays)
    grouped = {kind: tuple(places) for kind, places in by_kind.items()}
    return Index(light, sizes, grouped, size.backgrounds, size.side)


def _hollow(sprite: Sprite) -> Sprite:
    """The sprite without its pixels: arrays of the same shape that take no memory."""
    empty = np.broadcast_to(np.zeros((), np.uint8), sprite.rgb.shape)
    return sprite._replace(rgb=empty, alpha=np.broadcast_to(np.zeros((), np.float32), sprite.alpha.shape))


def _quad(key: tuple[int, int, int]) -> list[Sign]:
    rng = np.random.default_rng([*key, 1])
    specs = questions.compose(rng, "read", QUAD, "train").specs
    near = neighbours(specs[0].code)
    codes = specs[0].code, near[rng.integers(len(near))]
    files = fonts("train")
    made = []
    for place, spec in enumerate(specs):
        file, coded = files[rng.integers(len(files))], spec._replace(code=codes[place // 2])
        sprite = drawing.sign(rng, coded, file)
        while max(sprite.alpha.shape) > SIGN_SIDE:
            sprite = drawing.sign(rng, coded, file)
        made.append(Sign(coded, sprite, file.name))
    return made


def _stray(key: tuple[int, int, int]) -> tuple[Sprite, Kind | None]:
    rng = np.random.default_rng([*key, 2])
    sprite, kind = distractors.stray(rng, fonts("train"))
    while max(sprite.alpha.shape) > STRAY_SIDE:
        sprite, kind = distractors.stray(rng, fonts("train"))
    return sprite, kind


def _background(side: int, photographs: Path | None, key: tuple[int, int, int]) -> Image:
    rng = np.random.default_rng([*key, 3])
    return backgrounds.background(rng, "train", side, side, photographs)[0]


def _stacked(sprites: Iterable[Sprite], side: int) -> Tensor:
    """Sprites as uint8 [N, 4, side, side]: colour and coverage in the upper left corner."""
    planes = []
    for sprite in sprites:
        height, width = sprite.alpha.shape
        plane = np.zeros((4, side, side), np.uint8)
        plane[:3, :height, :width] = sprite.rgb.transpose(2, 0, 1)
        plane[3, :height, :width] = np.rint(sprite.alpha * 255)
        planes.append(plane)
    return torch.from_numpy(np.stack(planes))
