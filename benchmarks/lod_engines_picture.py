"""Tables and the picture of benchmarks/results/lod_engines.json.

python benchmarks/lod_engines_picture.py     writes docs/lod_engines.png, if there is a result
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, markdown_table, progress
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WAYS = ("eager", "compiled", "fused", "float8", "floor")
"""In the order of the bars: stock layers, torch.compile, fused kernels in CUDA graphs, float8, the floor."""
_COLOURS = {
    "eager": "#999999", "compiled": "#e69f00", "fused": "#0072b2", "float8": "#009e73", "floor": "#222222",
}  # of Okabe and Ito (2008)  # fmt: skip
_INK = "#222222"


def cases(shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases of the mix with the compiled times, where they were measured, and the whole mix last."""
    compiled = shape.get("compiled", {})
    found = []
    for case in shape["mix"]["cases"]:
        known = compiled.get(str(case["tokens"]))
        found.append({"name": f"{case['tiles']} x {case['tokens']}", **case} | _given(known))
    times = [case.get("compiled_ms") for case in found]
    whole = {"name": "the mix", **shape["mix"]["whole"]} | _given(None if None in times else sum(times))
    return [*found, whole]


def _given(milliseconds: float | None) -> dict[str, float]:
    return {} if milliseconds is None else {"compiled_ms": milliseconds}


def mix_table(result: Mapping[str, Any], name: str = "8b") -> str:
    """Milliseconds and share of the measured peak, for every shape of tiles and way to encode them."""
    shape = result["shapes"][name]
    head = ("tiles x tokens", *(f"{way}, ms" for way in WAYS))
    rows = [[case["name"], *(_cell(case, way) for way in WAYS)] for case in cases(shape)]
    high = {"name": f"{shape['all_high']['tiles']} x {shape['all_high']['tokens']}", **shape["all_high"]}
    rows.append([high["name"], *(_cell(high, way) for way in WAYS)])
    return markdown_table(head, rows) + _source(result, shape, name)


def small_table(result: Mapping[str, Any], name: str = "8b") -> str:
    """Few tiles, where launches rule."""
    shape = result["shapes"][name]
    head = ("tiles x tokens", "eager, ms", "fused, ms", "float8, ms", "eager over fused")
    rows = []
    for case in shape["small"]["cases"]:
        times = [f"{case[f'{way}_ms']:.2f}" for way in ("eager", "fused", "float8")]
        rows.append([f"{case['tiles']} x {case['tokens']}", *times, f"{case['eager_over_fused']:.2f}"])
    return markdown_table(head, rows) + _source(result, shape, name)


def _cell(case: Mapping[str, Any], way: str) -> str:
    took = case.get(f"{way}_ms")
    if took is None:
        return "not measured"
    return f"{took:.1f}" if way == "floor" else f"{took:.1f} ({case['floor_ms'] / took:.0%})"


def _source(result: Mapping[str, Any], shape: Mapping[str, Any], name: str) -> str:
    versions, peak = result["versions"], shape["peak_tflops"]
    return (
        f"\n`{result['command']}`, {result['date']}, {result['device']}, {result['dtype']}, "
        f"Qwen3-VL-{name.upper()} with random weights, torch {versions['torch']}, medians of "
        f"{result['repeats']} runs; the floor is the matrix products' operations at {peak:.0f} TFLOP/s, "
        "measured in a short burst in the same run, and shares are of that. For as long as the mix takes "
        f"the same product reaches {shape['sustained_tflops']:.0f} TFLOP/s, of which the mix is "
        f"{_of_sustained(shape, 'fused')} fused and {_of_sustained(shape, 'float8')} in float8.\n"
    )


def _of_sustained(shape: Mapping[str, Any], way: str) -> str:
    whole = shape["mix"]["whole"]
    share = whole["floor_ms"] / whole[f"{way}_ms"] * shape["peak_tflops"] / shape["sustained_tflops"]
    return f"{share:.0%}"


def draw(result: Mapping[str, Any], name: str = "8b") -> Figure:
    """Bars of milliseconds: a group for each shape of tiles and the whole mix."""
    groups = [*cases(result["shapes"][name])]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(groups))
    for axes, case in zip(panels, groups, strict=True):
        _group(axes, case)
    panels[0].set_ylabel("milliseconds", color=_INK)
    figure.suptitle(
        f"Vision tower of Qwen3-VL-{name.upper()}, {result['device']}: tiles x tokens of each",
        x=0.01, ha="left", fontsize=11, color=_INK,
    )  # fmt: skip
    return figure


def _group(axes: Axes, case: Mapping[str, Any]) -> None:
    known = [way for way in WAYS if f"{way}_ms" in case]
    heights = [case[f"{way}_ms"] for way in known]
    bars = axes.bar(known, heights, color=[_COLOURS[way] for way in known], width=0.72)
    labels = [f"{height:.1f}\n{case['floor_ms'] / height:.0%}" for height in heights]
    axes.bar_label(bars, labels, fontsize=8, padding=2, color=_INK)
    axes.set_ylim(0, max(heights) * 1.18)
    axes.set_title(case["name"], loc="left", fontsize=11, color=_INK)
    axes.tick_params(length=0, colors=_INK)
    axes.tick_params(axis="x", rotation=40)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw the picture."""
    source: Path = RESULTS / "lod_engines.json"
    if not source.exists():
        progress(f"no {source.name}: run benchmarks/lod_engines.py on a GPU first")
        return
    result = json.loads(source.read_text(encoding="utf-8"))
    draw(result).savefig(ROOT / "docs" / "lod_engines.png", dpi=130)


if __name__ == "__main__":
    main()
