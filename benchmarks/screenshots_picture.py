"""The picture of the screenshot stream: a frame, what of it was encoded, and what every frame cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from arrcoc.demo.desktop import Screenshot
from arrcoc.records import Lod

_LODS = ("#e8eef4", "#b9cfe3", "#7ba6cc", "#34699f")
_NEW, _OLD, _INK = "#d55e00", "#0072b2", "#222222"


def draw_stream(
    shot: Screenshot, lod: NDArray[np.int64], fresh: NDArray[np.bool_], result: Mapping[str, Any]
) -> Figure:
    """Draw the picture.

    Args:
        shot: the frame to show.
        lod: its plan, [R, C].
        fresh: bool [R, C], its new tiles.
        result: what the benchmark writes.
    """
    figure = Figure(figsize=(16, 5.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    left.imshow(shot.image)
    left.set_title(f"One of {len(result['frames'])} screenshots (“{shot.action}”)", loc="left", color=_INK)
    _map(middle, lod, fresh)
    _curve(right, result)
    for axes in (left, middle):
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def _map(axes: Axes, lod: NDArray[np.int64], fresh: NDArray[np.bool_]) -> None:
    axes.imshow(lod, cmap=ListedColormap(_LODS), norm=BoundaryNorm(np.arange(-0.5, 4), 4), aspect="equal")
    for row, col in zip(*np.nonzero(fresh), strict=True):
        axes.add_patch(
            Rectangle((col - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=_NEW, linewidth=2.4)
        )
    levels = [Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="#999999") for colour in _LODS]
    new = Rectangle((0, 0), 1, 1, fill=False, edgecolor=_NEW, linewidth=2.4)
    names = [level.name.lower() for level in Lod]
    axes.legend(
        [*levels, new], [*names, "encoded now"], ncol=5, loc="upper center", bbox_to_anchor=(0.5, 0.0)
    )
    hits = int(((lod > 0) & ~fresh).sum())
    axes.set_title(
        f"Level of detail: {hits} tiles from the cache, {int(fresh.sum())} new", loc="left", color=_INK
    )


def _curve(axes: Axes, result: Mapping[str, Any]) -> None:
    frames = result["frames"][1:]
    new = np.array([frame["new_tiles"] for frame in frames])
    axes.scatter(new, [f["plain_ms"] for f in frames], s=14, color="#999999", label="without the cache")
    axes.scatter(new, [f["cached_ms"] for f in frames], s=18, color=_OLD, label="with the cache")
    line = result["fit"]
    ends = np.array([0, new.max()])
    axes.plot(ends, line["ms_at_none"] + line["ms_per_new_tile"] * ends, color=_OLD, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"new tiles of {result['tiles']}")
    clock = "processor " if "processor" in result["clock"] else ""
    axes.set_ylabel(f"stage encode, ms of {clock}time")
    axes.set_title(f"Cost of a frame, {result['device']}", loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", frameon=False)
