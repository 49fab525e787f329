"""Lettering: metrics per font and coverage masks of a code, cached per process."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_REFERENCE = 200
"""Font size at which metrics are taken, in px."""


class Lettering(NamedTuple):
    """Layout of a code at cap height 1: glyph centres along the baseline and total width."""

    centres: tuple[float, ...]
    width: float


@lru_cache(maxsize=2048)
def load(path: Path, size: float) -> ImageFont.FreeTypeFont:
    """A font at a size in px."""
    return ImageFont.truetype(str(path), size)


@cache
def cap_height(path: Path) -> float:
    """Height of a capital H as a share of the font size."""
    return -load(path, _REFERENCE).getbbox("H", anchor="ls")[1] / _REFERENCE


@cache
def _extent(path: Path, glyph: str) -> tuple[float, float]:
    """Left and right edge of a glyph's ink at cap height 1."""
    left, _, right, _ = load(path, _REFERENCE).getbbox(glyph, anchor="ls")
    unit = _REFERENCE * cap_height(path)
    return left / unit, right / unit


def lettering(path: Path, code: str, gap: float) -> Lettering:
    """Set glyphs side by side with `gap` cap heights of clear space between their inks."""
    centres, x = [], 0.0
    for glyph in code:
        left, right = _extent(path, glyph)
        centres.append(x + (right - left) / 2)
        x += right - left + gap
    return Lettering(tuple(centres), x - gap)


def draw(path: Path, code: str, cap: float, layout: Lettering, pad: int) -> Image.Image:
    """Coverage of a code ("L" image) at cap height `cap` px, its ink `pad` px from each edge."""
    # Opening a font costs more than drawing with it, so that few sizes are opened: to half a px of 30 to 65.
    font = load(path, round(2 * cap / cap_height(path)) / 2)
    mask = Image.new("L", (round(layout.width * cap) + 2 * pad, round(cap) + 2 * pad), 0)
    pen = ImageDraw.Draw(mask)
    for glyph, centre in zip(code, layout.centres, strict=True):
        left, right = _extent(path, glyph)
        start = pad + (centre - (left + right) / 2) * cap
        pen.text((start, pad + cap), glyph, fill=255, font=font, anchor="ls")
    return mask


class Hand(NamedTuple):
    """How a code is lettered beside its font.

    Attributes:
        shear: px to the right per px upwards, about the middle of the capitals.
        stroke: "plain", "bold", "thin" or "soft".
        amount: share in [0, 1] of the change from plain.
    """

    shear: float = 0.0
    stroke: str = "plain"
    amount: float = 0.0


PLAIN = Hand()
"""The font as it stands."""

_CHANGES = {
    "bold": ImageFilter.MaxFilter(3),
    "thin": ImageFilter.MinFilter(3),
    "soft": ImageFilter.GaussianBlur(1.5),
}
_LEAST_MOST = {"bold": (0.3, 1.0), "thin": (0.2, 0.6), "soft": (0.4, 1.0)}
"""Bounds of `amount`: hairlines of a px must outlast the thinning."""
_SHEAR, _CHANGED = 0.3, 1 / 3


def random_hand(rng: np.random.Generator) -> Hand:
    """A shear of up to 0.3 either way, and in a third of all hands another stroke."""
    shear = float(rng.uniform(-_SHEAR, _SHEAR))
    if rng.random() >= _CHANGED:
        return Hand(shear)
    stroke = list(_CHANGES)[rng.integers(len(_CHANGES))]
    return Hand(shear, stroke, float(rng.uniform(*_LEAST_MOST[stroke])))


def inked(mask: Image.Image, hand: Hand) -> Image.Image:
    """The mask ("L" image) with the hand's stroke; its shear is left to the caller."""
    if hand.stroke == "plain":
        return mask
    return Image.blend(mask, mask.filter(_CHANGES[hand.stroke]), hand.amount)
