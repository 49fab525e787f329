"""The picture of the way from JPEG bytes to tiles, from what `preprocess.py` measured on CPU and on a GPU.

python benchmarks/preprocess_picture.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common import RESULTS, ROOT, progress
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {
    "arrcoc": "#0072b2",
    "stock_torchvision": "#e69f00",
    "stock_pil": "#999999",
    "decode": "#0072b2",
    "frame": "#56b4e9",
    "tiles": "#009e73",
    "hash_copy": "#cc79a7",
}  # of Okabe and Ito (2008), told apart under colour blindness
_NAMES = {
    "stock_torchvision": "stock, torchvision",
    "stock_pil": "stock, PIL",
    "hash_copy": "hashes to the host",
}
_INK = "#222222"
_STAGES = ("decode", "frame", "tiles", "hash_copy")


def draw(results: Mapping[str, Any]) -> Figure:
    """One panel for each of `cpu` and `cuda` that there is."""
    figure = Figure(figsize=(5.2 * len(results), 3.8), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (kind, result) in zip(panels, results.items(), strict=True):
        (_on_cpu if kind == "cpu" else _on_gpu)(axes, result["cases"])
        axes.set_title(result["device"], loc="left", fontsize=10, color=_INK)
        axes.set_xticks(
            range(len(result["cases"])), [f"{c['width']} x\n{c['height']}" for c in result["cases"]]
        )
        axes.set_ylabel("milliseconds from JPEG bytes to tiles", color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0, colors=_INK, labelsize=8)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _on_cpu(axes: Axes, cases: list[Any]) -> None:
    """arrcoc beside stock's processors, with stock over arrcoc above the bars."""
    names = [name for name in _COLOURS if name in cases[0]["median_ms"]]
    width = 0.8 / len(names)
    for shift, name in enumerate(names):
        places = [place + (shift - (len(names) - 1) / 2) * width for place in range(len(cases))]
        heights = [case["median_ms"][name] for case in cases]
        axes.bar(places, heights, width * 0.92, color=_COLOURS[name], label=_NAMES.get(name, name))
        for place, height, case in zip(places, heights, cases, strict=True):
            ratio = case["stock_over_arrcoc"].get(name)
            text = f"{height:,.0f}" if ratio is None else f"{ratio:.1f} x"
            axes.text(place, height, text, ha="center", va="bottom", fontsize=7, color=_INK)


def _on_gpu(axes: Axes, cases: list[Any]) -> None:
    """Stages stacked, with the time of all together above the bar."""
    for place, case in enumerate(cases):
        bottom = 0.0
        for name in _STAGES:
            label = _NAMES.get(name, name) if place == 0 else None
            axes.bar(place, case["stages_ms"][name], 0.6, bottom=bottom, color=_COLOURS[name], label=label)
            bottom += case["stages_ms"][name]
        total = case["stages_ms"]["total"]
        axes.text(place, max(bottom, total), f"{total:.1f}", ha="center", va="bottom", fontsize=8, color=_INK)


def main() -> None:
    """Draw what there is."""
    files = {"cpu": RESULTS / "preprocess.json", "cuda": RESULTS / "preprocess_cuda.json"}
    found = {kind: json.loads(path.read_text("utf-8")) for kind, path in files.items() if path.exists()}
    if not found:
        progress("nothing measured yet")
        return
    draw(found).savefig(ROOT / "docs" / "preprocess.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
