"""Render a draft: background, distractors, framed picture, signs, shadows; and record what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arrcoc.demo.placards import distractors, drawing, layout, pictures, shapes
from arrcoc.demo.placards.backgrounds import background
from arrcoc.demo.placards.drawing import Sprite
from arrcoc.demo.placards.fonts import PLAIN, random_hand
from arrcoc.demo.placards.layout import Footprint
from arrcoc.demo.placards.questions import Draft
from arrcoc.demo.placards.records import Box, Image, Picture, Placard, Rng, Spec, intersects, shifted
from arrcoc.demo.placards.vocabulary import Split, fonts

_SHADED = 0.25
_SMALL_CANVAS = 256
"""At this side two signs, or a sign and a picture, have room only if they are small."""


class Scene(NamedTuple):
    """A rendered canvas uint8 [H, W, 3] and what is on it."""

    image: Image
    placards: tuple[Placard, ...]
    picture: Picture | None
    background: str


class Shadow(NamedTuple):
    """A soft ellipse centred in `region`; `axes` [2, 2] maps px from its centre to a disc of radius 1."""

    region: Box
    axes: NDArray[np.float64]


def render(
    rng: Rng,
    draft: Draft,
    split: Split,
    size: tuple[int, int],
    picture_id: int | None = None,
    photographs: Path | None = None,
) -> Scene:
    """Draw the placards of a draft, and a framed picture if given, on a canvas of (height, width) px."""
    height, width = size
    tight = min(size) == _SMALL_CANVAS
    frame = [] if picture_id is None else [pictures.framed(rng, picture_id, split, 1.2 if tight else 2.0)]
    files = [fonts(split)[rng.integers(len(fonts(split)))] for _ in draft.specs]
    signs = [
        drawing.sign(
            rng,
            spec,
            file,
            76.0 if tight else drawing.SIZES[1],
            random_hand(rng) if split == "train" else PLAIN,
        )
        for spec, file in zip(draft.specs, files, strict=True)
    ]
    corners = [None] * len(frame) + [spec.corner for spec in draft.specs]
    sprites = [*frame, *signs]
    boxes = layout.place(
        rng, [_footprint(s, c) for s, c in zip(sprites, corners, strict=True)], height, width
    )
    canvas, name = background(rng, split, height, width, photographs)
    distractors.scatter(rng, canvas, boxes, draft.ask, fonts(split))
    for sprite, box in zip(sprites, boxes, strict=True):
        drawing.paste(canvas, sprite, box[0], box[1])
    for shadow in shadows(rng, boxes):
        drawing.shade(canvas, shadow.region, shadow.axes)
    picture = Picture(picture_id, boxes[0]) if picture_id is not None else None
    own = boxes[len(frame) :]
    placards = tuple(_record(*drawn) for drawn in zip(draft.specs, signs, own, files, strict=True))
    return Scene(canvas, placards, picture, name)


def _footprint(sprite: Sprite, corner: str | None) -> Footprint:
    height, width = sprite.alpha.shape
    return Footprint(width, height, sprite.code_box, corner)


def _record(spec: Spec, sprite: Sprite, box: Box, file: Path) -> Placard:
    code_box = shifted(sprite.code_box, box[0], box[1])
    return Placard(spec.colour, spec.shape, spec.code, box, code_box, sprite.glyphs + box[:2], file.name)


def shadows(rng: Rng, boxes: Sequence[Box]) -> list[Shadow]:
    """Shade a quarter of the signs, in part; shadows never add up, or an orange sign would turn brown."""
    cast: list[Shadow] = []
    for box in boxes:
        if rng.random() >= _SHADED:
            continue
        side = box[2] - box[0]
        x = rng.uniform(box[0], box[2])
        y = rng.choice([box[1], box[3]]) + rng.uniform(-0.4, 0.4) * side
        long, short = side * rng.uniform(1.2, 2.4), side * rng.uniform(0.4, 0.8)
        axes = shapes.rotation(rng.uniform(0, 180)) / [[long], [short]]
        region = int(x - long), int(y - long), int(x + long), int(y + long)
        if not any(intersects(region, other.region) for other in cast):
            cast.append(Shadow(region, axes))
    return cast
