"""What an example is made of. Boxes are (x0, y0, x1, y1), x1 and y1 exclusive, and points (x, y), in px."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arrcoc.demo.placards.vocabulary import Split

Box = tuple[int, int, int, int]
Image = NDArray[np.uint8]
Rng = np.random.Generator


class Kind(NamedTuple):
    """Signs that a question speaks of; None stands for any colour, or any shape."""

    colour: str | None
    shape: str | None

    def matches(self, colour: str, shape: str) -> bool:
        """Whether a sign of this colour and shape is of this kind."""
        return self.colour in (None, colour) and self.shape in (None, shape)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a question asks, apart from its wording."""

    family: str
    form: str
    """Key of `paraphrases.FORMS`."""
    kinds: tuple[Kind, ...] = ()
    """The signs named by colour and shape: one, or two to compare."""
    code: str | None = None
    """The code named, for find."""


class Spec(NamedTuple):
    """A placard before it is drawn; `corner` asks for a place in one corner of the canvas."""

    colour: str
    shape: str
    code: str
    corner: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Placard:
    """A sign on the canvas."""

    colour: str
    shape: str
    code: str
    box: Box
    code_box: Box
    """Smallest upright box around the rotated code; nothing covers it."""
    glyphs: NDArray[np.float32]
    """Centres of the three glyphs [3, 2], (x, y)."""
    font: str
    """Name of the font file."""


class Picture(NamedTuple):
    """A framed easy-VQA picture on the canvas; `box` includes the frame."""

    image_id: int
    box: Box


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A canvas, a question about it and everything needed to check the answer."""

    image: Image
    """uint8 [H, W, 3], sRGB."""
    question: str
    answer: str
    family: str
    targets: tuple[Box, ...]
    """Boxes that must be seen in detail to answer."""
    placards: tuple[Placard, ...]
    ask: Ask
    picture: Picture | None
    seed: int
    index: int
    split: Split
    background: str
    """Name of the photograph or texture behind the signs."""


def intersects(a: Box, b: Box, gap: int = 0) -> bool:
    """Whether two boxes share a pixel, or come closer than `gap` px."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def shifted(box: Box, x: int, y: int) -> Box:
    """The box moved by (x, y)."""
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y
