"""Pre-drawn parts of composed canvases: signs, distractors, pictures and backgrounds, renewed part by part.

Signs come in quads: four kinds, of which 0 and 1 carry one code, and 2 and 3 a code that differs from it in
one glyph. So the bank holds equal and nearly equal codes for the questions that turn on them.

Every slot is a pure function of the seed and its version, which grows by one every `refresh * parts` steps;
a run that is resumed therefore draws the very bank that it was stopped with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arrcoc.demo.placards import backgrounds, distractors, drawing, pictures, questions
from arrcoc.demo.placards.drawing import Sprite
from arrcoc.demo.placards.fonts import random_hand
from arrcoc.demo.placards.pictures import PictureQuestion
from arrcoc.demo.placards.records import Image, Kind, Spec
from arrcoc.demo.placards.vocabulary import fonts, neighbours
from arrcoc.demo.training.recipe import BankSize
from arrcoc.errors import ConfigError

QUAD = 4
SIGN_SIDE, STRAY_SIDE, PICTURE_SIDE = 112, 256, 148
"""Width and height in px of the squares that sprites are kept in."""
SMALL_PICTURE = 96
"""Greatest side in px of one picture in four, for canvases that are tight for a picture and a sign."""


class Sign(NamedTuple):
    """What is known of a pre-drawn sign beside its pixels; see `placards.records.Placard`."""

    spec: Spec
    sprite: Sprite
    font: str


class Quad(NamedTuple):
    """Four signs; see above."""

    signs: tuple[Sign, ...]


class Stray(NamedTuple):
    """A distractor, and its kind if it is a blank sign."""

    sprite: Sprite
    kind: Kind | None


class Framed(NamedTuple):
    """A framed picture of easy-VQA."""

    image_id: int
    sprite: Sprite


class Slot(NamedTuple):
    """One part of a bank in one version."""

    store: str
    seed: int
    place: int
    version: int


Drawn = Quad | Stray | Framed | Image
Question = tuple[PictureQuestion, int]
"""A row of easy-VQA and the position of its picture in the bank."""


@dataclass(frozen=True, slots=True)
class Index:
    """What the host needs to know of a bank: no pixels.

    Attributes:
        signs, strays, pictures: their sprites keep arrays without content, for the shape.
        by_kind: positions in `signs` of each kind.
        asked: questions about the pictures, grouped so that answers balance.
        asked_small: those about pictures of at most `SMALL_PICTURE` px.
        backgrounds: number of backgrounds.
        side: of a background, in px.
    """

    signs: tuple[Sign, ...]
    strays: tuple[Stray, ...]
    pictures: tuple[Framed, ...]
    by_kind: dict[Kind, tuple[int, ...]]
    asked: tuple[tuple[Question, ...], ...]
    asked_small: tuple[tuple[Question, ...], ...]
    backgrounds: int
    side: int

    def texel(self, store: str, place: int) -> tuple[int, int]:
        """Position in `Pixels.texels` of a sprite's upper left px, and the distance between its rows."""
        side = _SIDES[store]
        return _start(store, len(self.signs), len(self.strays)) + place * side * side, side


@dataclass(frozen=True, slots=True)
class Pixels:
    """The pixels of a bank; four bytes each (red, green, blue, coverage), so that one look-up takes all.

    Attributes:
        texels: int32 [T], the squares of all signs, then strays, then pictures, row by row.
        backgrounds: int32 [G, side, side].
    """

    texels: Tensor
    backgrounds: Tensor

    def to(self, device: torch.device) -> Pixels:
        """The same pixels on a device."""
        return Pixels(self.texels.to(device), self.backgrounds.to(device))

    def renew(self, size: BankSize, drawn: dict[Slot, Drawn]) -> None:
        """Put newly drawn slots in their places, on the device."""
        for store, side in _SIDES.items():
            sprites = dict(sorted(_sprites(drawn, store).items()))
            if sprites:
                start = _start(store, size.signs, size.strays)
                square = self.texels[start : start + _counts(size)[store] * side * side].view(-1, side * side)
                places = torch.tensor(list(sprites)).to(square.device)
                square[places] = _stacked(list(sprites.values()), side).to(square.device)
        for slot, made in drawn.items():
            if isinstance(made, np.ndarray):
                self.backgrounds[slot.place].copy_(_opaque(made))


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""The builtin `map`, or that of a process pool."""


def version(slot: int, generation: int, parts: int) -> int:
    """How often a slot has been renewed: one slot in `parts` at every generation, each in its turn."""
    return (generation + parts - 1 - slot % parts) // parts


def slots(size: BankSize, seed: int, generation: int, renewed: bool = False) -> list[Slot]:
    """All slots of a generation (step // `size.refresh`), or those alone that it renews.

    Raises:
        ConfigError: a size out of bounds.
    """
    _check(size)
    counts = _counts(size) | {"signs": size.signs // QUAD}
    places = [(store, place) for store in ("backgrounds", *_SIDES) for place in range(counts[store])]
    now, before = ([version(p, g, size.parts) for _, p in places] for g in (generation, generation - 1))
    return [
        Slot(store, seed, place, new)
        for (store, place), new, old in zip(places, now, before, strict=True)
        if new != old or not renewed
    ]


def draw(side: int, photographs: Path | None, slot: Slot) -> Drawn:
    """Draw one slot, the same in every process; a background is uint8 [side, side, 3].

    Raises:
        ConfigError: `photographs` without a training photograph.
    """
    rng = np.random.default_rng([slot.seed, slot.place, slot.version, _STREAMS[slot.store]])
    if slot.store == "signs":
        return _quad(rng)
    if slot.store == "strays":
        return _stray(rng)
    if slot.store == "pictures":
        return _framed(rng, small=slot.place % 4 == 0)
    return backgrounds.background(rng, "train", side, side, photographs)[0]


def build(
    size: BankSize, seed: int, generation: int, photographs: Path | None = None, each: Map = map
) -> tuple[Index, Pixels]:
    """Draw the whole bank of a generation; errors as for `slots` and `draw`."""
    wanted = slots(size, seed, generation)
    drawn = dict(zip(wanted, each(partial(draw, size.side, photographs), wanted), strict=True))
    total = sum(count * _SIDES[store] ** 2 for store, count in _counts(size).items() if store in _SIDES)
    pixels = Pixels(
        torch.zeros(total, dtype=torch.int32),
        torch.zeros((size.backgrounds, size.side, size.side), dtype=torch.int32),
    )
    pixels.renew(size, drawn)
    return index_of(size, drawn), pixels


def index_of(size: BankSize, drawn: dict[Slot, Drawn], before: Index | None = None) -> Index:
    """The index of a bank that holds `drawn`, and where that lacks a slot, what the index `before` says."""
    signs = dict(enumerate(before.signs)) if before else {}
    strays = dict(enumerate(before.strays)) if before else {}
    shown = dict(enumerate(before.pictures)) if before else {}
    for slot, made in drawn.items():
        if isinstance(made, Stray):
            strays[slot.place] = made._replace(sprite=_hollow(made.sprite))
        elif isinstance(made, Framed):
            shown[slot.place] = made._replace(sprite=_hollow(made.sprite))
        elif isinstance(made, Quad):
            for number, sign in enumerate(made.signs):
                signs[slot.place * QUAD + number] = sign._replace(sprite=_hollow(sign.sprite))
    by_kind: dict[Kind, list[int]] = defaultdict(list)
    for position in sorted(signs):
        by_kind[Kind(signs[position].spec.colour, signs[position].spec.shape)].append(position)
    small = {place: framed for place, framed in shown.items() if len(framed.sprite.rgb) <= SMALL_PICTURE}
    return Index(
        signs=tuple(signs[i] for i in sorted(signs)),
        strays=tuple(strays[i] for i in sorted(strays)),
        pictures=tuple(shown[i] for i in sorted(shown)),
        by_kind={kind: tuple(places) for kind, places in by_kind.items()},
        asked=_asked(shown),
        asked_small=_asked(small),
        backgrounds=size.backgrounds,
        side=size.side,
    )


_SIDES = {"signs": SIGN_SIDE, "strays": STRAY_SIDE, "pictures": PICTURE_SIDE}
_STREAMS = {"signs": 1, "strays": 2, "backgrounds": 3, "pictures": 4}


def _counts(size: BankSize) -> dict[str, int]:
    shown = size.pictures if pictures.available() else 0
    return {"signs": size.signs, "strays": size.strays, "pictures": shown, "backgrounds": size.backgrounds}


def _start(store: str, signs: int, strays: int) -> int:
    """Position in the texels of the first square of a store."""
    before = {"signs": 0, "strays": signs * SIGN_SIDE**2}
    return before.get(store, signs * SIGN_SIDE**2 + strays * STRAY_SIDE**2)


def _check(size: BankSize) -> None:
    low = min(size.strays, size.backgrounds, size.parts, size.refresh)
    if size.signs < QUAD or size.signs % QUAD or low < 1 or size.pictures < 0 or size.side < 256:
        raise ConfigError(
            f"a bank of {size.signs} signs, {size.strays} strays, {size.backgrounds} x {size.side} px",
            "a multiple of 4 signs, 1 stray and 1 background of 256 px or more",
            "Raise them; 8192 signs give each kind about a hundred",
        )


def _asked(shown: dict[int, Framed]) -> tuple[tuple[Question, ...], ...]:
    if not shown:
        return ()
    places = {framed.image_id: place for place, framed in sorted(shown.items())}
    groups = pictures.balanced("train", places.keys())
    return tuple(tuple((row, places[row.image_id]) for row in group) for group in groups)


def _hollow(sprite: Sprite) -> Sprite:
    """The sprite without its pixels: arrays of the same shape that take no memory."""
    empty = np.broadcast_to(np.zeros((), np.uint8), sprite.rgb.shape)
    return sprite._replace(rgb=empty, alpha=np.broadcast_to(np.zeros((), np.float32), sprite.alpha.shape))


def _quad(rng: np.random.Generator) -> Quad:
    specs = questions.compose(rng, "read", QUAD, "train").specs
    near = neighbours(specs[0].code)
    codes = specs[0].code, near[rng.integers(len(near))]
    files = fonts("train")
    made = []
    for place, spec in enumerate(specs):
        file, coded = files[rng.integers(len(files))], spec._replace(code=codes[place // 2])
        sprite = drawing.sign(rng, coded, file, hand=random_hand(rng))
        while max(sprite.alpha.shape) > SIGN_SIDE:
            sprite = drawing.sign(rng, coded, file, hand=random_hand(rng))
        made.append(Sign(coded, sprite, file.name))
    return Quad(tuple(made))


def _stray(rng: np.random.Generator) -> Stray:
    sprite, kind = distractors.stray(rng, fonts("train"))
    while max(sprite.alpha.shape) > STRAY_SIDE:
        sprite, kind = distractors.stray(rng, fonts("train"))
    return Stray(sprite, kind)


def _framed(rng: np.random.Generator, small: bool) -> Framed:
    ids = pictures.pictured("train")
    image_id = ids[rng.integers(len(ids))]
    return Framed(image_id, pictures.framed(rng, image_id, "train", 1.2 if small else 2.0))


def _sprites(drawn: dict[Slot, Drawn], store: str) -> dict[int, Sprite]:
    """The sprites of a store by their position in it."""
    found: dict[int, Sprite] = {}
    for slot, made in drawn.items():
        if slot.store != store:
            continue
        if isinstance(made, Stray | Framed):
            found[slot.place] = made.sprite
        elif isinstance(made, Quad):
            found |= {slot.place * QUAD + number: sign.sprite for number, sign in enumerate(made.signs)}
    return found


def _stacked(sprites: Sequence[Sprite], side: int) -> Tensor:
    """Sprites as int32 [N, side * side], in the upper left corner of a square."""
    planes = np.zeros((len(sprites), side, side, 4), np.uint8)
    for plane, sprite in zip(planes, sprites, strict=True):
        height, width = sprite.alpha.shape
        plane[:height, :width, :3] = sprite.rgb
        plane[:height, :width, 3] = np.rint(sprite.alpha * 255)
    return torch.from_numpy(planes).view(torch.int32).flatten(1)


def _opaque(image: Image) -> Tensor:
    """A background as int32 [side, side]."""
    plane = np.full((*image.shape[:2], 4), 255, np.uint8)
    plane[..., :3] = image
    return torch.from_numpy(plane).view(torch.int32)[..., 0]
