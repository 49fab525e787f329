"""Draw docs/architecture.png: the way of the data through stages, LOD engines, cache and decoder.

python docs/make_architecture.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).with_name("architecture.png")

INK, FAINT = "#22303c", "#66757f"
LOOK, JUDGE, PLAN, ENCODE, SPEAK = "#dbe9f6", "#fde9c9", "#e3dcf1", "#d7eedd", "#f6dcdc"
EDGE = {LOOK: "#4a86b8", JUDGE: "#c88a1b", PLAN: "#7f62b3", ENCODE: "#3f9460", SPEAK: "#b95757"}

CACHE_TEXT = "device, host memory, disk;\nleast relevant per byte\nleaves first"

# name: (centre x, centre y, width, height, colour, title, what it does, record it gives)
Box = tuple[float, float, float, float, str, str, str, str]
BOXES: dict[str, Box] = {
    "image": (1.35, 6.2, 2.1, 1.0, LOOK, "image", "decode, grid of tiles,\nhashes", "Frame"),
    "texture": (4.15, 7.2, 2.1, 1.0, LOOK, "texture", "13 channels at\nnative resolution", "Texture"),
    "glimpse": (4.15, 5.2, 2.1, 1.0, LOOK, "glimpse", "whole frame at\nLOD background", "Features"),
    "propositional": (7.2, 7.95, 2.5, 0.8, JUDGE, "propositional", "what detail holds", ""),
    "perspectival": (7.2, 6.9, 2.5, 0.8, JUDGE, "perspectival", "what stands out", ""),
    "participatory": (7.2, 5.2, 2.5, 0.8, JUDGE, "participatory", "what the question asks for", "Scores"),
    "opponent": (10.35, 6.65, 2.2, 1.0, JUDGE, "opponent", "three tensions,\none map", "Relevance"),
    "allocation": (13.25, 6.65, 2.2, 1.0, PLAN, "allocation", "a LOD for every\ntile within budget", "Plan"),
    "cache": (10.0, 2.25, 2.1, 1.25, ENCODE, "tile cache", CACHE_TEXT, ""),
    "encoder": (13.25, 3.05, 2.2, 3.15, ENCODE, "encoder", "", "Tiles"),
    "sequence": (6.9, 2.25, 2.3, 1.0, SPEAK, "sequence", "one order, positions\nin the full frame", "Prompt"),
    "decoder": (3.85, 2.25, 2.1, 1.0, SPEAK, "decode", "prefill, step,\nstop, stream", "text"),
}  # fmt: skip
ENGINES = ("LOD background", "LOD low", "LOD medium", "LOD high")
# Straight arrows from edge to edge: (x0, y0) to (x1, y1).
ARROWS = (
    ((2.4, 6.4), (3.1, 7.1)),
    ((2.4, 6.0), (3.1, 5.3)),
    ((5.2, 7.3), (5.95, 7.85)),
    ((5.2, 7.1), (5.95, 6.9)),
    ((5.2, 5.2), (5.95, 5.2)),
    ((8.45, 7.85), (9.25, 6.95)),
    ((8.45, 6.85), (9.25, 6.68)),
    ((8.45, 5.35), (9.25, 6.35)),
    ((11.45, 6.65), (12.15, 6.65)),
    ((13.25, 6.15), (13.25, 4.63)),
)


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(14.8, 7.6), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 14.8)
    axes.set_ylim(0.9, 8.5)
    axes.axis("off")
    for box in BOXES.values():
        _box(axes, *box)
    _engines(axes)
    for start, stop in ARROWS:
        _arrow(axes, start, stop)
    _connections(axes)
    _endpoints(axes)
    return figure


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    colour: str,
    title: str,
    body: str,
    record: str,
) -> None:
    _rounded(axes, (x - width / 2, y - height / 2), (width, height), colour, EDGE[colour], 0.12)
    top = y + height / 2 - 0.12
    axes.text(x, top, title, ha="center", va="top", fontsize=12, fontweight="bold", color=INK)
    axes.text(x, top - 0.32, body, ha="center", va="top", fontsize=9.5, color=INK, linespacing=1.25)
    if record:
        at = (x - width / 2 + 0.08, y - height / 2 - 0.07)
        axes.text(*at, record, va="top", fontsize=9, family="monospace", color=EDGE[colour])


def _rounded(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], fill: str, edge: str, radius: float
) -> None:
    box = f"round,pad=0,rounding_size={radius}"
    patch = FancyBboxPatch(corner, *size, boxstyle=box, facecolor=fill, edgecolor=edge, linewidth=1.3)
    axes.add_patch(patch)


def _engines(axes: Axes) -> None:
    """The four LOD engines inside the encoder's box, each with squares of its tokens."""
    x, y = BOXES["encoder"][:2]
    for number, name in enumerate(ENGINES):
        bottom = y + 0.62 - 0.62 * number
        _rounded(axes, (x - 0.95, bottom - 0.12), (1.9, 0.5), "white", EDGE[ENCODE], 0.06)
        axes.text(x - 0.85, bottom + 0.13, name, va="center", fontsize=9, color=INK)
        _tokens(axes, x + 0.5, bottom - 0.04, number + 1)


def _tokens(axes: Axes, left: float, bottom: float, side: int) -> None:
    size = 0.34
    for i in range(side + 1):
        at = i * size / side
        axes.plot([left, left + size], [bottom + at] * 2, color=EDGE[ENCODE], linewidth=0.7)
        axes.plot([left + at] * 2, [bottom, bottom + size], color=EDGE[ENCODE], linewidth=0.7)


def _arrow(
    axes: Axes, start: tuple[float, float], stop: tuple[float, float], style: str = "-|>", **more: object
) -> None:
    look = {
        "arrowstyle": style,
        "mutation_scale": 13,
        "linewidth": 1.3,
        "color": FAINT,
        "shrinkA": 2,
        "shrinkB": 2,
    }
    axes.add_patch(FancyArrowPatch(start, stop, **(look | more)))  # type: ignore[arg-type]


def _connections(axes: Axes) -> None:
    """Arrows that carry a word."""
    _arrow(axes, (12.15, 2.25), (11.05, 2.25), "<|-|>")
    _word(axes, 11.6, 2.4, "miss, put")
    _arrow(axes, (8.95, 2.25), (8.05, 2.25))
    _word(axes, 8.5, 2.4, "tiles")
    _arrow(axes, (5.75, 2.25), (4.9, 2.25))
    _arrow(axes, (2.8, 2.25), (2.2, 2.25))
    # The glimpse is reused: its tokens in every answer, its keys and values by the decoder.
    _arrow(axes, (4.5, 4.7), (6.5, 2.75))
    _word(axes, 5.8, 3.75, "tokens of the glimpse,\nthe context of the answer", left=True)
    _arrow(axes, (3.85, 4.7), (3.85, 2.75), linestyle=(0, (4, 3)))
    _word(axes, 1.3, 3.55, "its keys and values, made once\nfor every question", left=True)


def _endpoints(axes: Axes) -> None:
    text = {"ha": "center", "va": "center", "fontsize": 11, "color": INK, "style": "italic"}
    axes.text(1.35, 8.1, "photograph", **text)  # type: ignore[arg-type]
    _arrow(axes, (1.35, 7.9), (1.35, 6.7))
    axes.text(7.2, 6.2, "question", **text)  # type: ignore[arg-type]
    _arrow(axes, (7.2, 6.05), (7.2, 5.6))
    axes.text(13.25, 8.1, "budget", **text)  # type: ignore[arg-type]
    _arrow(axes, (13.25, 7.9), (13.25, 7.15))
    axes.text(1.65, 2.25, "answer", **text)  # type: ignore[arg-type]
    note = (
        "One stage, one module, one record; stages never import one another, only pipeline.py and engine.py "
        "know their order. On CUDA texture, scorers and opponent are one graph."
    )
    axes.text(0.3, 1.12, note, fontsize=9.5, color=FAINT, va="center")


def _word(axes: Axes, x: float, y: float, text: str, *, left: bool = False) -> None:
    at = "left" if left else "center"
    axes.text(x, y, text, ha=at, va="bottom", fontsize=8.5, color=FAINT, linespacing=1.2)


if __name__ == "__main__":
    draw().savefig(TARGET, dpi=110)
