"""What a placard can be: colours, shapes, glyphs, codes and fonts, and which belong to which split."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]

ALPHABET = "ACDEFHKLMNPRTUVXY2345678"
"""Glyphs of a code; of those easily confused (O/0/Q/D, I/1/J, B/8, S/5, Z/2, G/C, W/V) at most one stays."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 36, 40),
    "orange": (244, 138, 24),
    "yellow": (242, 216, 48),
    "green": (42, 150, 58),
    "teal": (0, 148, 156),
    "blue": (38, 72, 205),
    "purple": (132, 48, 172),
    "pink": (246, 150, 190),
    "brown": (112, 68, 36),
    "black": (26, 26, 28),
    "white": (244, 244, 240),
    "gray": (134, 134, 134),
}
"""Paint of each named colour, sRGB."""

SHAPES = ("circle", "square", "rectangle", "triangle", "hexagon", "diamond", "star")

ADJECTIVES = {
    "circle": "round",
    "square": "square",
    "rectangle": "rectangular",
    "triangle": "triangular",
    "hexagon": "hexagonal",
    "diamond": "diamond-shaped",
    "star": "star-shaped",
}
"""How each shape is said of a sign."""

_FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
        "cmr10",
        "cmb10",
        "cmti10",
        "cmtt10",
    ),
    "test": ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta", "cmss10"),
}
_STAND_INS = {"cmti10": "STIXGeneralItalic"}
"""For fonts that matplotlib brings along from 3.11 on, which does not run on Python 3.10."""
_TEST_SHARE = 5


def split_of(name: str) -> Split:
    """Split of a code or a file name: one in five hashes (BLAKE2b, 8 bytes) belongs to the test split."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


@cache
def codes(split: Split) -> tuple[str, ...]:
    """All three-glyph codes of a split, in alphabetical order."""
    return tuple(code for code in map("".join, product(ALPHABET, repeat=3)) if split_of(code) == split)


def neighbours(code: str) -> tuple[str, ...]:
    """Codes of the same split that differ from `code` in exactly one glyph."""
    changed = (code[:i] + glyph + code[i + 1 :] for i in range(3) for glyph in ALPHABET if glyph != code[i])
    return tuple(other for other in changed if split_of(other) == split_of(code))


@cache
def fonts(split: Split) -> tuple[Path, ...]:
    """Font files of a split, from those that matplotlib brings along."""
    folder = package_folder("matplotlib") / "mpl-data/fonts/ttf"
    there = {path.stem for path in folder.glob("*.ttf")}
    return tuple(folder / f"{name if name in there else _STAND_INS[name]}.ttf" for name in _FONTS[split])


@cache
def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is a dependency of arrcoc"
    assert spec.origin is not None
    return Path(spec.origin).parent
