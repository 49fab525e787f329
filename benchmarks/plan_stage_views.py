"""Tables and picture of the plan stage's times, from benchmarks/results/plan_stage.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WAYS = {
    "sequence": "one after another",
    "three streams": "three streams",
    "graph": "one graph",
    "graph of three branches": "one graph,\nthree branches",
}
_STAGES = ("texture", "propositional", "perspectival", "texture head", "opponent", "allocation with its copy")
_COLOURS = ("#e69f00", "#56b4e9", "#0072b2", "#cc79a7", "#009e73", "#d55e00")  # Okabe and Ito (2008)
_BUSY, _HOST, _INK = "#666666", "#cccccc", "#222222"


def plan_stage_table(result: Mapping[str, Any]) -> str:
    """Milliseconds from the frame on the device to the plan on the host, and of each stage alone."""
    assert not result["device"].startswith("cpu"), "absolute times are quoted of a GPU only"
    names = [name.replace("\n", " ") for name in WAYS.values()]
    head = ("frame", *names, "of it the GPU is busy", "reading the frame once")
    rows = []
    for case in result["cases"]:
        best = case["graph_device_ms"]["graph of three branches"]
        whole = [f"{case['whole_ms'][way]:.2f} ms" for way in WAYS]
        rows.append([case["image"], *whole, f"{best:.2f} ms", f"{case['floor_ms']:.3f} ms"])
    return markdown_table(head, rows) + _source(result)


_GLIMPSE_PARTS = (
    "encode_ms", "prefix_ms", "prefix_by_graph_ms",
    "question_ms", "question_by_graph_ms", "question_floor_ms",
)  # fmt: skip


def plan_stage_glimpse_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of the glimpse scorer's parts, by model size and frame."""
    assert not result["device"].startswith("cpu"), "absolute times are quoted of a GPU only"
    head = (
        "model, frame", "glimpse tokens", "encoding it", "its layers, once an image",
        "the same, one graph", "a question, eager", "a question, one graph", "reading the layers' weights",
    )  # fmt: skip
    rows = []
    for model in result["glimpse"]:
        for image, found in model.items():
            if isinstance(found, Mapping) and "question_by_graph_ms" in found:
                times = [f"{found[part]:.1f} ms" if part in found else "" for part in _GLIMPSE_PARTS]
                rows.append([f"{model['model'].upper()}, {image}", f"{found['tokens']:,}", *times])
    return markdown_table(head, rows) + _source(result)


def draw(result: Mapping[str, Any]) -> Figure:
    """For each frame the ways to run the plan stage, and what its stages take alone."""
    cases = result["cases"]
    figure = Figure(figsize=(5.5 * len(cases), 4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        _panel(axes, case)
        axes.set_title(f"{case['image']}, {result['device']}", loc="left", fontsize=10, color=_INK)
    figure.supylabel("milliseconds from frame to plan", fontsize=10, color=_INK)
    return figure


def _panel(axes: Axes, case: Mapping[str, Any]) -> None:
    bottom = 0.0
    for stage, colour in zip(_STAGES, _COLOURS, strict=True):
        value = case["stages_ms"][stage]
        axes.bar(0, value, 0.7, bottom=bottom, color=colour, label=stage)
        bottom += value
    _label(axes, 0, bottom)
    for place, way in enumerate(WAYS, 1):
        whole = case["whole_ms"].get(way)
        if whole is None:
            continue
        axes.bar(
            place, whole, 0.7, color=_HOST, label="launching, the copy, allocation" if place == 1 else None
        )
        busy = case.get("graph_device_ms", {}).get(way)
        if busy is not None:
            axes.bar(place, busy, 0.7, color=_BUSY, label="the GPU is busy" if way == "graph" else None)
        _label(axes, place, whole)
    floor = case.get("floor_ms")
    if floor is not None:
        label = f"reading the frame: {floor:.3f}"
        axes.axhline(floor, color=_INK, linewidth=0.8, linestyle=":", label=label)
    axes.set_xticks(range(5), ["stages\nalone", *WAYS.values()], fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)


def _label(axes: Axes, place: int, value: float) -> None:
    axes.text(place, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8, color=_INK)


def _source(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    return (
        f"\n{result['device']}, torch {versions['torch']}, medians, commit {(result['commit'] or '?')[:7]}, "
        f"{result['date']}.\n"
    )
