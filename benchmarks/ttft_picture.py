"""The picture of the time to the first token: one stacked bar for each system, by image size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

STAGES = {
    "bytes": ("decode", "frame"),
    "plan": ("query", "texture", "score", "balance", "allocate"),
    "glimpse": ("glimpse",),
    "encode": ("encode", "assemble"),
    "prefill": ("prefill",),
    "first token": ("generate",),
    "between": (),
}
"""Groups of stages, each with arrcoc's own names for what it holds."""
_COLOURS = {
    "bytes": "#0072b2",
    "plan": "#e69f00",
    "glimpse": "#cc79a7",
    "encode": "#d55e00",
    "prefill": "#009e73",
    "first token": "#56b4e9",
    "between": "#bbbbbb",
}  # of Okabe and Ito (2008), told apart under colour blindness
_VLLM = "#666666"
_INK = "#222222"


def draw(result: Mapping[str, Any]) -> Figure:
    """One row of panels for each model size, one panel for each image size at which arrcoc was run."""
    reached = {case["image_px"] for case in result["cases"] if case["system"] == "arrcoc"}
    cases = [case for case in result["cases"] if case["image_px"] in reached]
    shapes = list(dict.fromkeys(case["shape"] for case in cases))
    edges = sorted({case["image_px"] for case in cases})
    figure = Figure(figsize=(4 * len(edges), 3.6 * len(shapes)), layout="constrained")
    panels = figure.subplots(len(shapes), len(edges), squeeze=False)
    for row, shape in zip(panels, shapes, strict=True):
        for axes, edge in zip(row, edges, strict=True):
            here = [case for case in cases if (case["shape"], case["image_px"]) == (shape, edge)]
            _panel(axes, _bars(here, result["vllm"]))
            axes.set_title(f"Qwen3-VL-{shape.upper()}, {edge} x {edge}", loc="left", fontsize=10, color=_INK)
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    figure.legend(
        handles=[*handles, Patch(color=_VLLM, label="vLLM, another run")], loc="outside lower center", ncols=8
    )
    figure.supylabel("milliseconds to the first token", fontsize=10, color=_INK)
    return figure


def _bars(cases: list[Any], vllm: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Stages of every bar, by its label."""
    bars: dict[str, dict[str, float]] = {}
    for case in cases:
        if case["system"] == "stock":
            bars["trans-\nformers"] = case["stages_ms"]
            theirs = vllm["first_token_ms"].get(str(case["image_px"]))
            if case["shape"] == vllm["shape"] and theirs is not None:
                bars["vLLM"] = {"vllm": theirs}
        else:
            bars[f"arrcoc\n{case['budget']:g}"] = case["stages_ms"]
    ours = [case for case in cases if "follow_up" in case]
    if ours:
        least = min(ours, key=lambda case: case["budget"])
        bars[f"next\nquestion\n{least['budget']:g}"] = least["follow_up"]["tiles_cached"]["stages_ms"]
    return bars


def _panel(axes: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    for place, stages in enumerate(bars.values()):
        bottom = 0.0
        for name, value in stages.items():
            axes.bar(place, value, 0.7, bottom=bottom, color=_COLOURS.get(name, _VLLM))
            bottom += value
        axes.text(place, bottom, f"{bottom:,.0f}", ha="center", va="bottom", fontsize=8, color=_INK)
    axes.set_xticks(range(len(bars)), list(bars), fontsize=8)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
