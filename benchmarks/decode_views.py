"""Tables and picture of what `decode.py` and `decode_accuracy.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_STEPS = {
    "eager_ms": "transformers' layers",
    "layers_in_graph_ms": "transformers' layers in a CUDA graph",
    "kernels_ms": "arrcoc's kernels in a CUDA graph",
}
_BYTES = {"int8": "the same, int8 weights", "float8": "the same, float8 weights"}
_OURS, _THEIRS, _FLOOR, _INK = "#0072b2", "#999999", "#d55e00", "#222222"


def decode_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of a decode step by model size, beside the time that reading its weights takes."""
    assert not result["device"].startswith("cpu"), "absolute times are quoted of a GPU only"
    head = ("model", "decode step", "ms", "weights", "reading them", "ratio")
    rows = []
    for shape in _shapes(result):
        for name, ms, found in _steps(result[shape]):
            floor = found["floor_ms"]
            size = f"{found['weight_bytes'] / 1e9:.2f} GB"
            rows.append([shape.upper(), name, f"{ms:.2f}", size, f"{floor:.2f} ms", f"{ms / floor:.2f} x"])
    return markdown_table(head, rows) + _source(result)


def prefill_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of a prefill by model size and length."""
    assert not result["device"].startswith("cpu"), "absolute times are quoted of a GPU only"
    names = {
        "stock_layers_ms": "transformers' layers",
        "slots_ms": "arrcoc's layers",
        "graphed_ms": "the same in a CUDA graph",
        "chunks_of_4096_ms": "in chunks of 4,096",
        "second_half_ms": "its second half, the first in the cache",
    }
    rows = []
    for shape in _shapes(result):
        for length, found in result[shape].get("prefill", {}).items():
            times = [f"{found[name]:.1f} ms" if name in found else "" for name in names]
            rows.append([shape.upper(), f"{int(length):,}", *times])
    return markdown_table(("model", "positions", *names.values()), rows) + _source(result)


def decode_accuracy_table(result: Mapping[str, Any]) -> str:
    """Right answers of the bundled checkpoint with each way of decoding, and how many texts changed."""
    head = ("decoding", "right, full resolution", "texts changed", "right, an eighth", "texts changed")
    rows = []
    for way, found in result["ways"].items():
        row = [way]
        for budget in ("full", "eighth"):
            row += [f"{found[budget]['right']} of {result['cases']}", str(found[budget]["changed"])]
        rows.append(row)
    return markdown_table(head, rows) + f"\n{_facts(result)}.\n"


def draw(result: Mapping[str, Any]) -> Figure:
    """For each model size, a bar of every kind of step, and the time that reading its weights takes."""
    shapes = _shapes(result)
    figure = Figure(figsize=(6.5 * len(shapes), 3.6), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        _panel(axes, result[shape])
        axes.set_title(f"{shape.upper()}, {result['device']}", loc="left", color=_INK)
    title = f"milliseconds of a decode step at {result['context']:,} positions"
    figure.supxlabel(title, fontsize=10, color=_INK)
    line = Line2D([], [], color=_FLOOR, linewidth=2.5, label="reading the weights once")
    figure.legend(handles=[line], loc="outside upper right", frameon=False, fontsize=9)
    return figure


def _panel(axes: Axes, found: Mapping[str, Any]) -> None:
    steps = _steps(found)[::-1]
    end = 1.25 * found["step"]["layers_in_graph_ms"]  # the eager step goes far beyond
    for row, (name, ms, part) in enumerate(steps):
        axes.barh(row, min(ms, end), color=_THEIRS if name.startswith("transformers") else _OURS, height=0.7)
        axes.plot([part["floor_ms"]] * 2, [row - 0.42, row + 0.42], color=_FLOOR, linewidth=2.5)
        text, at, colour, side = f"{ms:.2f}", ms, _INK, "left"
        if ms > end:
            text, at, colour, side = f"{ms:.1f}, beyond the picture", end, "white", "right"
        shift = (4 if side == "left" else -4, 0)
        axes.annotate(
            text, (at, row), shift, textcoords="offset points", va="center", ha=side, fontsize=9, color=colour
        )
    axes.set_xlim(0, end)
    axes.set_yticks(range(len(steps)), [name for name, *_ in steps])
    axes.spines[["top", "right"]].set_visible(False)


def _shapes(result: Mapping[str, Any]) -> list[str]:
    return [name for name in ("2b", "4b", "8b") if name in result]


def _steps(found: Mapping[str, Any]) -> list[tuple[str, float, Mapping[str, Any]]]:
    """Name, milliseconds, and where the floor of each kind of step stands."""
    whole = [(text, found["step"][name], found["step"]) for name, text in _STEPS.items()]
    return whole + [(text, found[n]["kernels_ms"], found[n]) for n, text in _BYTES.items() if n in found]


def _source(result: Mapping[str, Any]) -> str:
    rate = result["copy_bytes_per_second"] / 1e12
    return (
        f"\n{_facts(result)}, {result['dtype']}, random weights, text decoder only, steps at "
        f"{result['context']:,} positions; a copy moves {rate:.2f} TB/s.\n"
    )


def _facts(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    return (
        f"`{result['command']}`, {result['date']}, {result['device']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )
