"""The contact sheet: for each photograph, where each of its two questions made the engine look."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from arrcoc.encoding import Encoding
from arrcoc.plot import LOD_COLOURS, wrapped
from arrcoc.records import Lod

_WIDTH, _PANEL, _HEAD = 16.0, 2.1, 0.62  # inches


def contact_sheet(rows: Sequence[tuple[str, Sequence[Encoding]]]) -> Figure:
    """Draw one row for each photograph: it, then relevance and levels of detail for each question.

    Relevance is drawn on the one scale from 0 to 1, so that a faint difference looks faint; each panel's
    caption gives the range of its map.

    Args:
        rows: a photograph's name and its encodings, equally many in every row.

    Returns:
        A figure outside pyplot's global state; its axes are labelled `name`, `name 1 relevance`,
        `name 1 lod`, `name 2 relevance` and so on.
    """
    questions = len(rows[0][1])
    assert all(len(encodings) == questions for _, encodings in rows), "rows of different length"
    height = len(rows) * (_PANEL + _HEAD) + _HEAD
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows), 1 + 2 * questions, left=0.01, right=0.99, wspace=0.05,
        top=1 - _HEAD / height, bottom=_HEAD / height, hspace=_HEAD / _PANEL,
    )  # fmt: skip
    for row, (name, encodings) in enumerate(rows):
        photograph = figure.add_subplot(grid[row, 0], label=name)
        _draw_photograph(photograph, name, encodings[0])
        for number, encoding in enumerate(encodings, start=1):
            column = 2 * number - 1
            seen = figure.add_subplot(grid[row, column], label=f"{name} {number} relevance")
            _draw_relevance(seen, encoding)
            spent = figure.add_subplot(grid[row, column + 1], label=f"{name} {number} lod")
            _draw_lod(spent, encoding)
    legend = " < ".join(lod.name.lower() for lod in Lod)
    note = f"relevance: dark 0 to bright 1.   levels of detail, blue to yellow: {legend}"
    figure.text(0.01, 0.12 / height, note, fontsize=10)
    return figure


def _draw_photograph(axes: Axes, name: str, encoding: Encoding) -> None:
    _bare(axes, name, bold=True)
    axes.imshow(_picture(encoding))


def _draw_relevance(axes: Axes, encoding: Encoding) -> None:
    values = encoding.relevance.numpy()
    _bare(axes, f"{wrapped(encoding.question, 36, 2)}\nrelevance, {values.min():.2f} to {values.max():.2f}")
    _over(axes, encoding, values, "inferno", 1)


def _draw_lod(axes: Axes, encoding: Encoding) -> None:
    _bare(axes, f"detail, {encoding.n_tokens:,} of {encoding.full_tokens:,} tokens")
    _over(axes, encoding, encoding.lod.numpy(), ListedColormap(LOD_COLOURS), len(Lod) - 1)


def _over(
    axes: Axes, encoding: Encoding, values: np.ndarray, colours: str | ListedColormap, top: int
) -> None:
    """A map of tiles, half transparent over the grey photograph."""
    grey = Image.fromarray(_picture(encoding)).convert("L")
    extent = (0.0, float(grey.width), float(grey.height), 0.0)
    axes.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255)
    axes.imshow(values, extent=extent, cmap=colours, vmin=0, vmax=top, alpha=0.6, interpolation="nearest")


def _picture(encoding: Encoding) -> np.ndarray:
    return encoding.picture.permute(1, 2, 0).cpu().numpy()


def _bare(axes: Axes, caption: str, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.set_title(caption, fontsize=9, loc="left", pad=3, fontweight=weight, parse_math=False)
    axes.set_axis_off()
