"""A contact sheet: many examples on one picture, to look at what the generator makes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from arrcoc.demo.placards import fonts
from arrcoc.demo.placards.records import Example
from arrcoc.demo.placards.vocabulary import fonts as font_files

_CAPTION = 54
_GAP = 8


def contact_sheet(examples: Sequence[Example], columns: int = 3, cell: int = 512) -> Image.Image:
    """Examples in rows, each fitted into `cell` px, target boxes outlined, question and answer below."""
    rows = -(-len(examples) // columns)
    pitch = cell + _GAP
    sheet = Image.new("RGB", (columns * pitch + _GAP, rows * (pitch + _CAPTION) + _GAP), "white")
    for i, example in enumerate(examples):
        corner = _GAP + i % columns * pitch, _GAP + i // columns * (pitch + _CAPTION)
        sheet.paste(_thumbnail(example, cell), corner)
        _caption(sheet, example, (corner[0], corner[1] + cell + 2), cell)
    return sheet


def _thumbnail(example: Example, cell: int) -> Image.Image:
    picture = Image.fromarray(example.image)
    pen = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in example.targets:
        pen.rectangle((x0 - 3, y0 - 3, x1 + 2, y1 + 2), outline=(255, 0, 220), width=2)
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _caption(sheet: Image.Image, example: Example, corner: tuple[int, int], width: int) -> None:
    text = f"{example.question}  \N{RIGHTWARDS ARROW}  {example.answer}"
    lines = textwrap.wrap(text, max(20, width // 7))
    face = fonts.load(font_files("train")[0], 13.0)
    ImageDraw.Draw(sheet).text(corner, "\n".join(lines[:3]), fill="black", font=face)
