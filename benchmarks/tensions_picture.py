"""The picture of how tensions move with the kind of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arrcoc.records import Tensions

_INK = "#222222"
_DOTS, _BOX = "#0072b2", "#d55e00"  # of Okabe and Ito (2008)


def draw_families(values: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """One panel for each tension: a box and every question as a dot, by family.

    Args:
        values: for each family, the three tensions of every question.
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, len(Tensions._fields), sharey=True)
    names = sorted(values)
    for column, (axes, tension) in enumerate(zip(panels, Tensions._fields, strict=True)):
        _panel(axes, names, [[row[column] for row in values[name]] for name in names], tension)
    return figure


def _panel(axes: Axes, names: Sequence[str], groups: Sequence[Sequence[float]], tension: str) -> None:
    rng = np.random.default_rng(0)
    axes.axhline(0, color="#999999", linewidth=1)
    for place, group in enumerate(groups):
        axes.scatter(place + rng.uniform(-0.22, 0.22, len(group)), group, s=9, color=_DOTS, alpha=0.45, lw=0)
    box = axes.boxplot(groups, positions=range(len(groups)), widths=0.55, showfliers=False)
    for line in (*box["boxes"], *box["whiskers"], *box["caps"], *box["medians"]):
        line.set(color=_BOX, linewidth=1.4)
    negative, positive = tension.split("_")
    axes.set_title(f"{negative} (-1) to {positive} (+1)", loc="left", fontsize=11, color=_INK)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(-1.05, 1.05)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
