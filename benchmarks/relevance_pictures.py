"""Pictures of where scorers look: bars by scorer and family, and maps over the images they judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageOps
from summaries import ALL

from arrcoc.demo.placards import Example
from arrcoc.plot import wrapped

COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
"""Black for all families, then those of Okabe and Ito (2008), told apart under colour blindness."""
_INK = "#222222"
_LAYER = "glimpse, layer "


class Shown(NamedTuple):
    """An example with the map of every scorer."""

    example: Example
    maps: dict[str, NDArray[np.float64]]


def main_scorers(names: Sequence[str]) -> list[str]:
    """Without the single layers, which have a panel of their own, and without chance."""
    return [name for name in names if not name.startswith(_LAYER) and name != "chance"]


def draw_bars(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """AUC of every scorer by family with 95 % intervals, and of every probe layer alone."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _bars(upper, found, main_scorers(list(found)))
    _layers(lower, found, [name for name in found if name.startswith(_LAYER)])
    return figure


def _bars(axes: Axes, found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    kinds = list(found[names[0]])
    width = 0.8 / len(kinds)
    for place, (family, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        drawn = [(x, found[name][family]["auc"]) for x, name in enumerate(names)]
        known = [(x, value) for x, value in drawn if value is not None]
        spots = [x + (place - (len(kinds) - 1) / 2) * width for x, _ in known]
        means = [value["mean"] for _, value in known]
        spread = [
            [v["mean"] - v["low"] for _, v in known],
            [v["high"] - v["mean"] for _, v in known],
        ]
        axes.bar(spots, means, width * 0.9, color=colour, label=family)
        axes.errorbar(spots, means, spread, fmt="none", ecolor="#777777", elinewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_title("Where each scorer looks", loc="left", color=_INK)
    _dress(axes)


def _layers(axes: Axes, found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    for family, colour in zip(found[names[0]], COLOURS, strict=False):
        known = [(x, found[name][family]["auc"]) for x, name in enumerate(names, 1)]
        points = [(x, value["mean"]) for x, value in known if value is not None]
        heavy = 2.6 if family == ALL else 1.3
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=heavy, label=family)
    axes.set_xticks(range(1, len(names) + 1))
    axes.set_xlabel("decoder layer at which attention is probed", color=_INK)
    axes.set_title("The glimpse scorer, one layer alone", loc="left", color=_INK)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.axhline(0.5, color="#999999", linestyle="--", linewidth=1)
    axes.set_ylabel("AUC of target tiles", color=_INK)
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=_INK)


def draw_maps(shown: Sequence[Shown]) -> Figure:
    """One row for each example: the image, then every scorer's map over it, target boxes outlined."""
    names = main_scorers(list(shown[0].maps))
    columns = len(names) + 1
    figure = Figure(figsize=(2.0 * columns, 2.4 * len(shown)), layout="constrained")
    grid = np.reshape(figure.subplots(len(shown), columns), (len(shown), columns))
    for line, item in zip(grid, shown, strict=True):
        line[0].imshow(item.example.image)
        line[0].set_title(_caption(item.example), fontsize=7, loc="left", color=_INK)
        for axes, name in zip(line[1:], names, strict=True):
            values = item.maps[name]
            _heat(axes, item.example.image, values)
            axes.set_title(f"{name}\n{values.min():.2f} to {values.max():.2f}", fontsize=7, color=_INK)
        for axes in line:
            _outline(axes, item.example)
    return figure


def _caption(example: Example) -> str:
    return f"{example.family}: {wrapped(example.question, 36)}\n{example.answer}"


def _heat(axes: Axes, picture: NDArray[np.uint8], values: NDArray[np.float64]) -> None:
    """A map in [0, 1], half transparent over the faint grey image."""
    height, width = picture.shape[:2]
    grey = ImageOps.autocontrast(Image.fromarray(picture).convert("L"), cutoff=1)
    axes.imshow(grey.point(lambda level: 0.7 * level + 60), cmap="gray", vmin=0, vmax=255)
    extent = (0.0, float(width), float(height), 0.0)
    axes.imshow(values, extent=extent, cmap="inferno", vmin=0, vmax=1, alpha=0.6, interpolation="nearest")


def _outline(axes: Axes, example: Example) -> None:
    for x0, y0, x1, y1 in example.targets:
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="#56b4e9", linewidth=1.4)
        axes.add_patch(box)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
