"""Things on the canvas that no question asks about: blank signs, blobs, tape and stray words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFilter

from arrcoc.demo.placards import drawing, fonts, layout
from arrcoc.demo.placards.drawing import Sprite
from arrcoc.demo.placards.records import Ask, Box, Image, Kind, Rng
from arrcoc.demo.placards.vocabulary import COLOURS, SHAPES

WORDS = (
    "PARKING", "GARAGE", "TICKETS", "LIBRARY", "MARKET", "STATION", "OFFICE", "BAKERY", "PLATFORM", "KITCHEN",
    "Welcome", "Thank you", "Open daily", "No smoking", "Lost property", "Way out", "Ring twice", "For rent",
)  # fmt: skip
"""Stray lettering; longer than any code."""


def scatter(rng: Rng, canvas: Image, taken: Sequence[Box], ask: Ask, faces: Sequence[Path]) -> list[Box]:
    """Draw a few distractors clear of all taken boxes; returns theirs. No blank sign is of an asked kind."""
    height, width = canvas.shape[:2]
    boxes: list[Box] = []
    for _ in range(int(rng.integers(0, most(height, width) + 1))):
        make = _MAKERS[rng.integers(len(_MAKERS))]
        sprite = make(rng, ask, faces[int(rng.integers(len(faces)))])
        size = sprite.alpha.shape[1], sprite.alpha.shape[0]
        box = layout.free_box(rng, size, [*taken, *boxes], height, width)
        if box is not None:
            drawing.paste(canvas, sprite, box[0], box[1], shadow=0.2)
            boxes.append(box)
    return boxes


def most(height: int, width: int) -> int:
    """Most distractors on a canvas."""
    return min(10, height * width // 130_000)


def stray(rng: Rng, faces: Sequence[Path]) -> tuple[Sprite, Kind | None]:
    """A distractor, and for a blank sign its kind, which no question that it stands beside may mean."""
    nothing = Ask("find", "find.shape")
    make = _MAKERS[rng.integers(len(_MAKERS))]
    if make is _blank:
        kind = blank_kind(rng, nothing)
        return drawing.blank(rng, str(kind.colour), str(kind.shape)), kind
    return make(rng, nothing, faces[int(rng.integers(len(faces)))]), None


def blank_kind(rng: Rng, ask: Ask) -> Kind:
    """A colour and shape that none of the question's kinds matches; for find, where none is named, any."""
    colours, shapes = list(COLOURS), list(SHAPES)
    while True:
        kind = Kind(colours[rng.integers(len(colours))], shapes[rng.integers(len(shapes))])
        if not any(asked.matches(str(kind.colour), str(kind.shape)) for asked in ask.kinds):
            return kind


def _blank(rng: Rng, ask: Ask, font: Path) -> Sprite:
    kind = blank_kind(rng, ask)
    return drawing.blank(rng, str(kind.colour), str(kind.shape))


def _blob(rng: Rng, ask: Ask, font: Path) -> Sprite:
    """A translucent, ragged, blurred stain of a muted colour."""
    side = int(rng.integers(30, 110))
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radius = side * rng.uniform(0.15, 0.45, 14)
    mask = PilImage.new("L", (side, side), 0)
    points = [
        (float(side / 2 + r * np.cos(a)), float(side / 2 + r * np.sin(a)))
        for a, r in zip(angle, radius, strict=True)
    ]
    ImageDraw.Draw(mask).polygon(points, fill=int(rng.integers(90, 200)))
    mask = mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(1.5, 4))))
    return _flat(mask, rng.uniform(30, 200) + rng.uniform(-35, 35, 3))


def _tape(rng: Rng, ask: Ask, font: Path) -> Sprite:
    """A strip of slanted stripes in two colours, lying or standing."""
    long, short, period = int(rng.integers(90, 200)), int(rng.integers(8, 20)), int(rng.integers(10, 28))
    along = np.arange(long)[None] + np.arange(short)[:, None]
    first, second = rng.uniform(20, 240, (2, 3))
    rgb = np.where((along % period < period // 2)[..., None], first, second).astype(np.uint8)
    if rng.random() < 0.5:
        rgb = np.ascontiguousarray(rgb.transpose(1, 0, 2))
    return Sprite(rgb, np.ones(rgb.shape[:2], np.float32), (0, 0, 0, 0), np.zeros((0, 2), np.float32))


def _word(rng: Rng, ask: Ask, font: Path) -> Sprite:
    """A word or two straight on the background, black or white."""
    text = WORDS[rng.integers(len(WORDS))]
    face = fonts.load(font, float(rng.integers(14, 31)))
    left, top, right, bottom = face.getbbox(text)
    mask = PilImage.new("L", (int(right - left) + 5, int(bottom - top) + 5), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=230, font=face)
    return _flat(mask, np.full(3, rng.choice([20.0, 235.0])))


def _flat(mask: PilImage.Image, colour: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Sprite:
    alpha = np.asarray(mask, dtype=np.float32) / np.float32(255)
    rgb = np.broadcast_to(np.clip(colour, 0, 255).astype(np.uint8), (*alpha.shape, 3))
    return Sprite(rgb, alpha, (0, 0, 0, 0), np.zeros((0, 2), np.float32))


_MAKERS: tuple[Callable[[Rng, Ask, Path], Sprite], ...] = (_blank, _blob, _tape, _word)
