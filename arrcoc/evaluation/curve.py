"""The picture that matters: accuracy against tokens, one line for each method."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from arrcoc.evaluation.summary import Cell

_STYLES = {
    "arrcoc": ("#d55e00", "o"),
    "downscale": ("#0072b2", "s"),
    "random": ("#8c8c8c", "v"),
    "saliency": ("#e69f00", "D"),
    "fastv": ("#009e73", "^"),
    "visionzip": ("#cc79a7", "P"),
    "oracle": ("#222222", "X"),
}
"""Colours of Okabe and Ito (2008), told apart under colour blindness, and a marker each."""
_INK = "#222222"
_DASHED = {"oracle", "random"}  # bounds rather than rivals


def draw(cells: Sequence[Cell], full_tokens: int, title: str) -> Figure:
    """Exact match against mean vision tokens on a logarithmic axis, with bands of the 95 % intervals.

    Args:
        cells: of the whole data set; those without figures are left out.
        full_tokens: of the largest image; the axis is marked in shares of it as well.
        title: over the picture.
    """
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(cell.method for cell in cells):
        _line(axes, method, [cell for cell in cells if cell.method == method and cell.exact is not None])
    _dress(axes, sorted({round(c.tokens) for c in cells if c.tokens is not None}), full_tokens, title)
    return figure


def _line(axes: Axes, method: str, cells: Sequence[Cell]) -> None:
    points = sorted((cell.tokens, cell.exact) for cell in cells if cell.tokens is not None and cell.exact)
    if not points:
        return
    colour, marker = _STYLES[method]
    front = method == "arrcoc"
    where = [tokens for tokens, _ in points]
    axes.fill_between(
        where,
        [100 * e.low for _, e in points],
        [100 * e.high for _, e in points],
        color=colour,
        alpha=0.22 if front else 0.1,
        linewidth=0,
    )
    axes.plot(
        where,
        [100 * e.mean for _, e in points],
        color=colour,
        marker=marker,
        markersize=7 if front else 5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=2.6 if front else 1.5,
        linestyle="--" if method in _DASHED else "-",
        label=method,
        zorder=3 if front else 2,
    )


def _dress(axes: Axes, ticks: Sequence[int], full_tokens: int, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=12, pad=12)
    axes.set_xlabel("vision tokens per answer (share of full resolution)", color=_INK)
    axes.set_ylabel("exact match, %", color=_INK)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_spread(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}\n{100 * n / full_tokens:.3g} %"))
    axes.set_ylim(-2, 102)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=_INK)


def _spread(ticks: Sequence[int], ratio: float = 1.35) -> list[float]:
    """Of ascending ticks those a factor apart, from the largest down, so that labels do not touch."""
    chosen: list[float] = []
    for tick in reversed(ticks):
        if not chosen or chosen[-1] >= ratio * tick:
            chosen.append(float(tick))
    return chosen
