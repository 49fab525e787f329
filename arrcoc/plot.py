"""The overview picture: where the engine looked, why, and what it cost."""

from __future__ import annotations

import math
import os
import textwrap
import unicodedata
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from arrcoc.errors import ConfigError
from arrcoc.records import Lod, Tensions

Picture = NDArray[np.uint8]
Extent = tuple[float, float, float, float]

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes that `save` can write."""
LOD_COLOURS = ("#00204d", "#575d6d", "#a69d75", "#ffea46")
"""Colour of each LOD: four steps of matplotlib's cividis, which rise in lightness and so stay distinct
in grey and under colour blindness."""

_HEAT = "inferno"  # perceptually uniform, rises in lightness
_INK = "#222222"
_BARS = {True: "#d55e00", False: "#0072b2"}  # vermillion and blue of Okabe and Ito (2008)
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
)
_LARGEST = 1024  # pixels along an edge of the drawn picture; a panel has fewer

# Inches.
_WIDTH, _MARGIN, _GAP, _CAPTION, _TITLE, _FOOT = 13.0, 0.3, 0.2, 0.32, 0.3, 1.5


def overview(
    picture: Picture,
    scores: Mapping[str, ArrayLike],
    relevance: ArrayLike,
    lod: ArrayLike,
    sides: Sequence[int],
    title: str,
    tokens: int,
    full_tokens: int,
    tensions: Tensions,
    overview_tokens: int = 0,
) -> Figure:
    """Draw image, score maps, relevance, levels of detail and tensions as one figure.

    Args:
        picture: uint8 [h, w, 3], RGB: the frame, which the tiles cover exactly.
        scores: maps [R, C] in [0, 1] by name, in the order in which they are drawn.
        relevance: [R, C] in [0, 1].
        lod: [R, C], values of `Lod`.
        sides: tokens along a tile's edge for each LOD.
        title: the question; a long one is wrapped, and cut after three lines.
        tokens: vision tokens in all, the overview included.
        full_tokens: vision tokens of the whole frame at LOD high, at least 1.
        tensions: as floats in [-1, 1].
        overview_tokens: vision tokens of the overview, 0 for none.

    Returns:
        A figure of its own, outside pyplot's global state. Its axes, by label and in order: `image`, each
        score's name, `relevance`, `levels of detail`, `legend`, `scale`, `tensions`.
    """
    levels = np.asarray(lod, dtype=np.int64)
    maps = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    maps["relevance"] = np.asarray(relevance, dtype=np.float64)
    assert picture.dtype == np.uint8, picture.dtype
    assert picture.ndim == 3, picture.shape
    assert all(values.shape == levels.shape for values in maps.values()), "maps of different grids"

    heading = wrapped(title)
    names = ["image", *maps, "levels of detail"]
    figure, panels, foot = _layout(picture.shape, names, heading.count("\n") + 1)
    _draw_image(panels[0], picture)
    for axes, values in zip(panels[1:-1], maps.values(), strict=True):
        _draw_heat(axes, picture, values)
    _draw_levels(panels[-1], picture, levels)
    _draw_legend(foot[0], legend_lines(levels, sides, overview_tokens), total_line(tokens, full_tokens))
    _draw_scale(foot[1])
    _draw_tensions(foot[2], tensions)
    _draw_heading(figure, heading)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, SVG or PDF, by the path's suffix; the file appears whole or not at all.

    Returns:
        The path.

    Raises:
        ConfigError: another suffix, or a place that cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"plot path {str(path)!r}", ", ".join(FORMATS), "Choose one of these suffixes")
    scratch = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # A question in a script that no installed font has is drawn as boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(scratch, dpi=120, facecolor="white")
        os.replace(scratch, target)
    except OSError as error:
        given = f"plot path {target}: {error.strerror}"
        raise ConfigError(given, "a file in a writable folder", "Name another one") from error
    finally:
        if scratch.parent.is_dir():
            scratch.unlink(missing_ok=True)
    return target


def wrapped(title: str, width: int = 96, lines: int = 3) -> str:
    """The title on at most `lines` lines of `width` columns, cut with an ellipsis.

    East Asian wide characters count as two columns (Unicode Standard Annex 11).
    """
    title = " ".join(title.split())
    columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in title)
    width = width * len(title) // max(columns, 1)
    return "\n".join(textwrap.wrap(title, max(width, 8), max_lines=lines, placeholder=" …"))


def legend_lines(lod: ArrayLike, sides: Sequence[int], overview_tokens: int = 0) -> list[str]:
    """One line for each LOD, highest first: its name, tokens of one tile, number of tiles.

    Where there is an overview, the tiles at background have no tokens but its own.

    Args:
        lod: [R, C], values of `Lod`.
        sides: tokens along a tile's edge for each LOD; a tile at side s has s*s tokens.
        overview_tokens: vision tokens of the overview, 0 for none.
    """
    counts = np.bincount(np.asarray(lod, dtype=np.int64).ravel(), minlength=len(Lod))
    tiles = {level: f"{level.name.lower()}: {_count(int(counts[level]), 'tile')}" for level in reversed(Lod)}
    spent = {level: f"of {_count(sides[level] ** 2, 'token')}" for level in Lod}
    if overview_tokens:
        spent[Lod.BACKGROUND] = f"in an overview of {_count(overview_tokens, 'token')}"
    return [f"{count} {spent[level]}" for level, count in tiles.items()]


def total_line(tokens: int, full_tokens: int) -> str:
    """Tokens in all, and their share of full resolution."""
    return f"{tokens:,} of {full_tokens:,} tokens: {tokens / full_tokens:.1%} of full resolution"


def columns_for(aspect: float, panels: int) -> int:
    """Panels in a row, so that the figure is neither a strip nor a tower; `aspect` is width / height."""
    for limit, columns in ((0.55, panels), (1.9, 3), (4.5, 2)):
        if aspect < limit:
            return min(columns, panels)
    return 1


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _layout(
    shape: tuple[int, ...], names: Sequence[str], heading_lines: int
) -> tuple[Figure, list[Axes], list[Axes]]:
    """An empty figure with one panel for each name, and the three axes at its foot."""
    aspect = shape[1] / shape[0]
    columns = columns_for(aspect, len(names))
    rows = math.ceil(len(names) / columns)
    panel_width = (_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) / columns
    panel_height = min(max(panel_width / aspect, 0.6), 7.0)
    top = 2 * _MARGIN + heading_lines * _TITLE
    height = top + rows * (panel_height + _CAPTION) + _GAP + _FOOT + _MARGIN
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)

    def place(label: str, left: float, upper: float, width: float, tall: float) -> Axes:
        box = (left / _WIDTH, 1 - (upper + tall) / height, width / _WIDTH, tall / height)
        return figure.add_axes(box, label=label)

    panels = []
    for index, name in enumerate(names):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (panel_width + _GAP)
        upper = top + row * (panel_height + _CAPTION)
        panels.append(place(name, left, upper, panel_width, panel_height))
    upper = height - _MARGIN - _FOOT
    foot = [
        place("legend", _MARGIN, upper, 4.6, _FOOT),
        place("scale", 5.6, upper + 0.27, 1.9, 0.16),
        place("tensions", 9.2, upper + 0.22, 2.4, _FOOT - 0.22),
    ]
    return figure, panels, foot


def _draw_heading(figure: Figure, heading: str) -> None:
    known = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in _CJK_FONTS if name in known)]
    x, y = _MARGIN / figure.get_figwidth(), 1 - _MARGIN / figure.get_figheight()
    style: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "color": _INK, "fontfamily": fonts}
    figure.suptitle(heading, x=x, y=y, ha="left", va="top", parse_math=False, **style)


def _draw_image(axes: Axes, picture: Picture) -> None:
    _frame(axes, "image")
    axes.imshow(_thumbnail(picture), extent=_extent(picture))


def _draw_heat(axes: Axes, picture: Picture, values: NDArray[np.float64]) -> None:
    """A map in [0, 1], half transparent over the faint grey picture."""
    _frame(axes, f"{axes.get_label()}, {values.min():.2f} to {values.max():.2f}")
    axes.imshow(_grey(picture), extent=_extent(picture), cmap="gray", vmin=0, vmax=255)
    axes.imshow(
        values, extent=_extent(picture), cmap=_HEAT, vmin=0, vmax=1, alpha=0.6, interpolation="nearest"
    )


def _draw_levels(axes: Axes, picture: Picture, levels: NDArray[np.int64]) -> None:
    """The LOD of each tile as a colour over the dimmed picture, with the tile grid."""
    _frame(axes, "levels of detail")
    extent = _extent(picture)
    axes.imshow(_grey(picture), extent=extent, cmap="gray", vmin=0, vmax=255)
    colours = ListedColormap(LOD_COLOURS)
    axes.imshow(levels, extent=extent, cmap=colours, vmin=0, vmax=3, alpha=0.6, interpolation="nearest")
    rows, cols = levels.shape
    across, down = np.arange(1, rows) * extent[2] / rows, np.arange(1, cols) * extent[1] / cols
    axes.hlines(across, 0, extent[1], colors="white", linewidth=0.5, alpha=0.7)
    axes.vlines(down, 0, extent[2], colors="white", linewidth=0.5, alpha=0.7)


def _draw_legend(axes: Axes, lines: Sequence[str], total: str) -> None:
    axes.set_axis_off()
    handles = [Patch(facecolor=colour, edgecolor=_INK, linewidth=0.5) for colour in reversed(LOD_COLOURS)]
    legend = axes.legend(
        handles,
        lines,
        title=total,
        loc="upper left",
        frameon=False,
        fontsize=10,
        borderaxespad=0,
        borderpad=0,
        alignment="left",
    )
    legend.get_title().set(fontsize=11, fontweight="bold", color=_INK)


def _draw_scale(axes: Axes) -> None:
    """The colour scale that all maps share."""
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=_HEAT, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_title("scores and relevance", fontsize=10, color=_INK, pad=6)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=9, color=_INK)
    axes.spines[:].set_visible(False)


def _draw_tensions(axes: Axes, tensions: Tensions) -> None:
    """Each tension as a bar from zero towards the word that it favours, with its value across zero."""
    axes.set(xlim=(-1, 1), ylim=(2.5, -0.6))
    axes.set_title("tensions", fontsize=10, color=_INK, pad=6)
    axes.set_axis_off()
    axes.vlines(0, -0.4, 2.4, color=_INK, linewidth=0.8)
    for row, (name, tension) in enumerate(zip(Tensions._fields, tensions, strict=True)):
        value = float(tension)
        negative, positive = name.split("_")
        axes.barh(row, 2, left=-1, height=0.34, color="#eeeeee", zorder=0)
        axes.barh(row, value, height=0.34, color=_BARS[value >= 0], zorder=1)
        side: Literal["left", "right"] = "right" if value >= 0 else "left"
        x = -0.04 if value >= 0 else 0.04
        axes.text(x, row, f"{value:+.2f}", ha=side, va="center", fontsize=9, color=_INK)
        axes.text(-1.06, row, negative, ha="right", va="center", fontsize=10, color=_INK)
        axes.text(1.06, row, positive, ha="left", va="center", fontsize=10, color=_INK)


def _frame(axes: Axes, caption: str) -> None:
    axes.set_title(caption, fontsize=10, loc="left", pad=4, color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _extent(picture: Picture) -> Extent:
    """Pixel coordinates of the picture, y downwards."""
    return (0.0, float(picture.shape[1]), float(picture.shape[0]), 0.0)


def _thumbnail(picture: Picture) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((_LARGEST, _LARGEST))
    return image


def _grey(picture: Picture) -> Image.Image:
    """The picture in grey, dark ones brightened, at reduced contrast so that a map over it stays readable."""
    grey = ImageOps.autocontrast(_thumbnail(picture).convert("L"), cutoff=1)
    return grey.point(lambda level: 0.7 * level + 60)
