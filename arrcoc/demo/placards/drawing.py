"""Signs as small sprites, pasted onto the canvas; everything is drawn at twice the size and averaged down."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import ImageDraw

from arrcoc.demo.placards import fonts, shapes
from arrcoc.demo.placards.records import Box, Image, Rng, Spec
from arrcoc.demo.placards.vocabulary import COLOURS

CAP_HEIGHTS = (12.0, 22.0)
"""Least and greatest cap height of a code, in px."""
SIZES = (56, 96)
"""Least and greatest size (longer side) of a sign, in px."""
TILT = 8.0
"""Greatest rotation of a sign, in degrees."""

_NARROW, _CLOSE = 0.85, 0.16
"""Stretch and gap of codes that are wide for their sign."""
_SCALE = 2
_SHADE = 0.38
_LUMINANCE = np.array([0.299, 0.587, 0.114])


class Sprite(NamedTuple):
    """A drawn sign; boxes and points are relative to its upper left corner."""

    rgb: Image
    """uint8 [h, w, 3]."""
    alpha: NDArray[np.float32]
    """Coverage [h, w] in [0, 1]."""
    code_box: Box
    glyphs: NDArray[np.float32]
    """Glyph centres [3, 2], (x, y) in px; empty [0, 2] on a blank sign."""


class Pose(NamedTuple):
    """Where the unit outline goes: size in px, rotation, origin in the sprite; and the sprite's extent."""

    size: float
    turn: NDArray[np.float64]
    origin: NDArray[np.float64]
    extent: tuple[int, int]

    def place(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points [N, 2] relative to the sign's centre, unrotated px -> px of the sprite."""
        return points @ self.turn.T + self.origin


def sign(
    rng: Rng, spec: Spec, font: Path, largest: float = SIZES[1], hand: fonts.Hand = fonts.PLAIN
) -> Sprite:
    """Draw a placard with its code, cap height 12 to 22 px.

    Args:
        rng: source of size, rotation, paint, rim and lettering.
        spec: colour, shape and code.
        font: font file of the code.
        largest: greatest size in px; exceeded only where the code would not fit at 12 px.
        hand: shear and stroke of the lettering; the shear gives way where the code would not fit at 12 px.
    """
    stretch, gap = rng.uniform(0.9, 1.1), rng.uniform(0.16, 0.3)
    layout = fonts.lettering(font, spec.code, gap)
    room = shapes.text_height(spec.shape, layout.width * stretch + abs(hand.shear))
    if CAP_HEIGHTS[0] > room * largest:
        stretch, layout, hand = _NARROW, fonts.lettering(font, spec.code, _CLOSE), hand._replace(shear=0.0)
        room = shapes.text_height(spec.shape, layout.width * stretch)
    size = max(_size(rng, spec.shape, largest), CAP_HEIGHTS[0] / room + 0.5)
    cap = rng.uniform(CAP_HEIGHTS[0], min(CAP_HEIGHTS[1], size * room))
    pose = _pose(spec.shape, size, rng.uniform(-TILT, TILT))
    offset = np.array([0.0, shapes.TEXT_CENTRE.get(spec.shape, 0.0) * size])
    width = layout.width * cap * stretch
    centres = np.array([((c - layout.width / 2) * cap * stretch, 0.0) for c in layout.centres])
    half = np.array([(width + abs(hand.shear) * cap) / 2, cap / 2])
    corners = pose.place(offset + half * [(-1, -1), (1, -1), (1, 1), (-1, 1)])
    (x0, y0), (x1, y1) = np.floor(corners.min(0)).astype(int), np.ceil(corners.max(0)).astype(int)
    box = int(x0), int(y0), int(x1), int(y1)
    inked = _grown(box, pose.extent)
    ink = _text(font, spec.code, cap, layout, stretch, pose, offset, inked, hand)
    rgb, alpha = _paint(rng, spec.shape, spec.colour, pose, ink, inked)
    return Sprite(rgb, alpha, box, pose.place(centres + offset).astype(np.float32))


def blank(rng: Rng, colour: str, shape: str, largest: float = SIZES[1]) -> Sprite:
    """Draw a sign that carries no code."""
    pose = _pose(shape, _size(rng, shape, largest), rng.uniform(-TILT, TILT))
    rgb, alpha = _paint(rng, shape, colour, pose, None)
    return Sprite(rgb, alpha, (0, 0, 0, 0), np.zeros((0, 2), np.float32))


def paste(canvas: Image, sprite: Sprite, x: int, y: int, shadow: float = 0.35) -> None:
    """Blend a sprite into the canvas with its corner at (x, y), over a faint drop shadow two px below."""
    height, width = sprite.alpha.shape
    soft = 1 - sprite.alpha[: height - 2, : width - 2, None] * np.float32(shadow)
    under = canvas[y + 2 : y + height, x + 2 : x + width]
    np.multiply(under, soft, out=under, casting="unsafe")
    region = canvas[y : y + height, x : x + width]
    # region + (rgb - region) * alpha, in place: half the temporaries of the usual blend.
    mixed = np.subtract(sprite.rgb, region, dtype=np.float32)
    mixed *= sprite.alpha[..., None]
    mixed += region
    np.add(mixed, np.float32(0.5), out=region, casting="unsafe")


def shade(canvas: Image, region: Box, axes: NDArray[np.float64]) -> None:
    """Darken a soft ellipse centred in `region`, by 38 % inside, fading out towards its edge.

    `axes` [2, 2] maps px from the centre to a disc of radius 1.
    """
    x0, y0, x1, y1 = region
    # Half-widths of the ellipse itself: the root of the diagonal of (axes^T axes)^-1.
    wide, tall = np.sqrt(np.diag(np.linalg.inv(axes.T @ axes))) + 1
    middle = (x0 + x1) / 2, (y0 + y1) / 2
    inner = (
        max(0, y0, int(middle[1] - tall)),
        max(0, min(canvas.shape[0], y1, int(middle[1] + tall) + 1)),
        max(0, x0, int(middle[0] - wide)),
        max(0, min(canvas.shape[1], x1, int(middle[0] + wide) + 1)),
    )
    dy = np.arange(inner[0], inner[1], dtype=np.float32)[:, None] - (y0 + y1) / 2
    dx = np.arange(inner[2], inner[3], dtype=np.float32)[None] - (x0 + x1) / 2
    u, v = (float(axes[k, 0]) * dx + float(axes[k, 1]) * dy for k in (0, 1))
    fall = np.clip(2.5 - 2.5 * np.sqrt(u * u + v * v), 0, 1)
    factor = (1 - _SHADE * fall * fall * (3 - 2 * fall)).astype(np.float32)
    part = canvas[inner[0] : inner[1], inner[2] : inner[3]]
    part[:] = (part * factor[..., None]).astype(np.uint8)


def ink_for(paint: NDArray[np.float64], tint: float) -> NDArray[np.float64]:
    """Near-black or near-white [3], whichever stands out from `paint` [3], softened by `tint` grey levels."""
    bright = float(paint @ _LUMINANCE) > 118
    return (
        np.array([tint * 0.6, tint * 0.6, tint])
        if bright
        else np.array([255.0, 255.0 - tint / 2, 255 - tint])
    )


@cache
def noise() -> NDArray[np.int16]:
    """A fixed plane [256, 256] of grain, standard deviation 5 grey levels."""
    grain = np.random.default_rng(0).normal(0, 5, (256, 256))
    return grain.round().astype(np.int16)


def _grown(box: Box, extent: tuple[int, int]) -> Box:
    """The box and what its letters may reach beyond it, within (width, height)."""
    edge = 5
    return (
        max(0, box[0] - edge),
        max(0, box[1] - edge),
        min(extent[0], box[2] + edge),
        min(extent[1], box[3] + edge),
    )


def _size(rng: Rng, shape: str, largest: float) -> float:
    least = min(shapes.SMALLEST.get(shape, SIZES[0]), largest)
    return float(rng.uniform(least, largest))


def _pose(shape: str, size: float, degrees: float) -> Pose:
    turn = shapes.rotation(degrees)
    rim = shapes.outline(shape) * size @ turn.T
    width, height = (int(v) for v in np.ceil(rim.max(0) - rim.min(0)) + 2)
    return Pose(size, turn, 1 - rim.min(0), (width, height))


def _paint(
    rng: Rng, shape: str, colour: str, pose: Pose, ink: NDArray[np.float32] | None, inked: Box = (0, 0, 0, 0)
) -> tuple[Image, NDArray[np.float32]]:
    """Fill, rim, code (coverage `ink` of the box `inked`), a little unevenness and grain."""
    rim = rng.uniform(1.5, 3.0)
    alpha = _coverage(shape, pose, 1.0)
    lines = alpha - _coverage(shape, pose, 1 - 2 * rim / pose.size * _rim_share(shape))
    if ink is not None:
        part = lines[inked[1] : inked[3], inked[0] : inked[2]]
        np.maximum(part, ink, out=part)
    paint = np.clip(np.array(COLOURS[colour]) + rng.uniform(-9, 9, 3), 0, 255)
    contrast = (ink_for(paint, rng.uniform(0, 40)) - paint).astype(np.float32)
    mixed = paint.astype(np.float32) + contrast * lines[..., None]
    height, width = alpha.shape
    slope = 1 + rng.uniform(-0.08, 0.08) * np.linspace(-1, 1, height)[:, None, None]
    top, left = rng.integers(0, 256 - max(height, width), 2)
    grain = noise()[top : top + height, left : left + width, None]
    mixed *= slope.astype(np.float32)
    mixed += grain
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8), alpha


def _rim_share(shape: str) -> float:
    """How much faster than on a square the rim must scale: the outline's edges lie closer to the origin."""
    return {"triangle": 1.5, "star": 1.5, "diamond": 1.35, "rectangle": 1.2}.get(shape, 1.0)


def _coverage(shape: str, pose: Pose, share: float) -> NDArray[np.float32]:
    """Coverage [h, w] of the outline shrunk to `share` about its centre."""
    mask = PilImage.new("L", _scaled(pose.extent), 0)
    centre = shapes.outline(shape).mean(0)
    points = pose.place((centre + (shapes.outline(shape) - centre) * share) * pose.size)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in points * _SCALE], fill=255)
    return _averaged(mask)


def _text(
    font: Path,
    code: str,
    cap: float,
    layout: fonts.Lettering,
    stretch: float,
    pose: Pose,
    offset: NDArray[np.float64],
    box: Box,
    hand: fonts.Hand,
) -> NDArray[np.float32]:
    """Coverage of the code in a box of the sprite: drawn upright, then warped into place at once."""
    pad = 4
    upright = fonts.inked(fonts.draw(font, code, cap * _SCALE, layout, pad), hand)
    middle = np.array([pad + layout.width * cap * _SCALE / 2, pad + cap * _SCALE / 2])
    # PIL asks for the map from output to input pixels.
    straight = np.array([(1 / stretch, hand.shear / stretch), (0.0, 1.0)])
    back = straight @ pose.turn.T
    corner = pose.origin - box[:2]
    # Sheared about `offset`, the middle of the capitals: the glyphs' centres stay where they are.
    shift = middle - straight @ offset * _SCALE - back @ corner * _SCALE
    data = (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1])
    affine, bilinear = PilImage.Transform.AFFINE, PilImage.Resampling.BILINEAR
    extent = box[2] - box[0], box[3] - box[1]
    return _averaged(upright.transform(_scaled(extent), affine, data, bilinear))


def _scaled(extent: tuple[int, int]) -> tuple[int, int]:
    return extent[0] * _SCALE, extent[1] * _SCALE


def _averaged(mask: PilImage.Image) -> NDArray[np.float32]:
    return np.asarray(mask.reduce(_SCALE), dtype=np.float32) / np.float32(255)
