"""The contact sheet: each canvas, and for each question where the engine looked and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from arrcoc.encoding import Encoding
from arrcoc.plot import wrapped
from arrcoc.records import Lod

TICK, CROSS = "\N{CHECK MARK}", "\N{BALLOT X}"

_WIDTH, _PANEL, _WORDS = 16.0, 3.8, 1.85  # inches
_INK, _MARK = "#222222", "#ff2d95"
_COLOURS = {True: "#00704a", False: "#b3261e"}
_DIM = 0.35


class Line(NamedTuple):
    """One answer on the sheet."""

    label: str
    text: str
    right: bool
    tokens: int


class Panel(NamedTuple):
    """One question on the sheet.

    Attributes:
        encoding: where the engine looked.
        question, expected: what was asked, and the right answer.
        boxes: (x0, y0, x1, y1) in px of the source image, of the signs in question.
        lines: the answers.
    """

    encoding: Encoding
    question: str
    expected: str
    boxes: Sequence[tuple[int, int, int, int]]
    lines: Sequence[Line]


def contact_sheet(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Figure:
    """Draw one row for each canvas: it, then for each question the canvas as the engine saw it.

    Args:
        rows: a canvas's name and its panels, equally many in every row.

    Returns:
        A figure outside pyplot's global state; its axes are labelled `name`, `name 1`, `name 1 words`,
        `name 2` and so on.
    """
    columns = 1 + len(rows[0][1])
    assert all(len(panels) == columns - 1 for _, panels in rows), "rows of different length"
    height = len(rows) * (_PANEL + _WORDS) + 0.5
    figure = Figure(figsize=(_WIDTH * columns / 4, height), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2 * len(rows), columns, left=0.008, right=0.992, wspace=0.04, hspace=0.02,
        top=1 - 0.08 / height, bottom=0.42 / height, height_ratios=[_PANEL, _WORDS] * len(rows),
    )  # fmt: skip
    for row, (name, panels) in enumerate(rows):
        _draw_canvas(figure.add_subplot(grid[2 * row, 0], label=name), panels[0].encoding)
        for column, panel in enumerate(panels, start=1):
            label = f"{name} {column}"
            _draw_seen(figure.add_subplot(grid[2 * row, column], label=label), panel)
            _write(figure.add_subplot(grid[2 * row + 1, column], label=f"{label} words"), panel)
    note = "Brightness is the level of detail: " + " < ".join(lod.name.lower() for lod in Lod)
    note += ".  A pink frame marks the signs that the question is about; the engine is not told."
    figure.text(0.008, 0.14 / height, note, fontsize=11, color=_INK)
    return figure


def lit(encoding: Encoding) -> NDArray[np.float64]:
    """The picture with every tile as bright as its LOD: [h, w, 3] in [0, 1].

    High shows the picture, background 0.35 of its grey, the LODs between are mixed of the two by thirds.
    """
    picture = _picture(encoding) / 255
    height, width, _ = picture.shape
    rows, cols = encoding.lod.shape
    level = encoding.lod.numpy() / max(Lod)
    y, x = np.arange(height) * rows // height, np.arange(width) * cols // width
    light = level[np.ix_(y, x)][..., None]
    shown: NDArray[np.float64] = light * picture + (1 - light) * _DIM * picture.mean(axis=2, keepdims=True)
    return shown


def _draw_canvas(axes: Axes, encoding: Encoding) -> None:
    axes.imshow(_picture(encoding))
    axes.set_axis_off()
    height, width = encoding.source_size
    axes.set_title(f"{width} x {height} px", y=-0.075, fontsize=11, loc="left", color=_INK)


def _draw_seen(axes: Axes, panel: Panel) -> None:
    shown = lit(panel.encoding)
    axes.imshow(shown)
    axes.set_axis_off()
    scale = shown.shape[0] / panel.encoding.source_size[0]
    for x0, y0, x1, y1 in panel.boxes:
        corner, size = (x0 * scale - 6, y0 * scale - 6), ((x1 - x0) * scale + 12, (y1 - y0) * scale + 12)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_MARK, linewidth=2.0))


def _write(axes: Axes, panel: Panel) -> None:
    """Question, right answer and answers, one below the other."""
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.set_axis_off()
    # Not parse_math: an answer may hold dollar signs.
    style: dict[str, Any] = {"va": "top", "parse_math": False}
    question = wrapped(panel.question, 40, 3)
    axes.text(0, 0.03, question, fontsize=11.5, fontweight="bold", color=_INK, **style)
    at = 0.17 + 0.115 * question.count("\n")
    axes.text(0, at, f"right answer: {wrapped(panel.expected, 30, 1)}", fontsize=11.5, color=_INK, **style)
    for number, (label, text, right, tokens) in enumerate(panel.lines, start=1):
        y, colour = at + 0.14 * number, _COLOURS[right]
        said = f"{TICK if right else CROSS} {wrapped(text, 15, 1)}"
        axes.text(0, y, said, fontsize=12, fontweight="bold", color=colour, **style)
        axes.text(0.42, y, f"{label}, {tokens:,} tokens", fontsize=11, color=_INK, **style)


def _picture(encoding: Encoding) -> NDArray[np.uint8]:
    shown: NDArray[np.uint8] = encoding.picture.permute(1, 2, 0).cpu().numpy()
    return shown
