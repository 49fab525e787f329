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
_MEASURED = ("eager", "fused", "float8")
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
    about = ""
    if "at_once" in shape.get("compiled", {}):
        about = (
            "\n*Compiled* was measured in processes of its own, one for each shape; its mix is their sum.\n"
        )
    return markdown_table(head, rows) + about + _source(result, shape, name)


def small_table(result: Mapping[str, Any], name: str = "8b") -> str:
    """Few tiles, where launches rule."""
    shape = result["shapes"][name]
    head = ("tiles x tokens", "eager, ms", "fused, ms", "float8, ms", "eager over fused")
    rows = []
    for case in shape["small"]["cases"]:
        times = [f"{case[f'{way}_ms']:.2f}" for way in _MEASURED]
        rows.append([f"{case['tiles']} x {case['tokens']}", *times, f"{case['eager_over_fused']:.2f}"])
    return markdown_table(head, rows) + _source(result, shape, name)


def overlap_table(result: Mapping[str, Any]) -> str:
    """LODs one after another in one memory, and on a stream each in memory of their own."""
    head = ("model", "tiles x tokens", "", "one stream, ms", "a stream each, ms", "gain", "more memory")
    rows = []
    for name, shape in result["shapes"].items():
        for case in _overlaps(shape):
            tiles = ", ".join(f"{count} x {tokens}" for tokens, count in case["tiles"].items())
            times = [f"{case[key]:.2f}" for key in ("one_ms", "each_ms", "one_over_each")]
            more = f"{case['each_mib'] - case['one_mib']:,} MiB"
            rows.append([f"Qwen3-VL-{name.upper()}", tiles, case["way"], *times, more])
    if not rows:
        return "Not measured yet.\n"
    equal = all(case["bit_equal"] for shape in result["shapes"].values() for case in _overlaps(shape))
    about = (
        "\nBoth run alternately; what they encode is " + ("" if equal else "not ") + "equal bit for bit.\n"
    )
    first = next(iter(result["shapes"]))
    return markdown_table(head, rows) + about + _source(result, result["shapes"][first], first)


def _overlaps(shape: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return shape.get("overlap", {}).get("cases", [])  # type: ignore[no-any-return]


def frames_table(result: Mapping[str, Any], name: str = "8b") -> str:
    """Whole frames: the mix against all tiles at high, the stock tower on one image, and preset photo."""
    shape = result["shapes"][name]
    whole, high, stock = shape["mix"]["whole"], shape["all_high"], shape["stock"]
    frame, photo = shape["stock_frame"], shape["photo"]
    edge = f"{stock['image_px']} x {stock['image_px']}"
    large = f"{frame['image_px']} x {frame['image_px']}"
    rows = [
        _frame(f"{large}, the mix", whole, ""),
        _frame(f"{large}, {high['tiles']} tiles at high", high, ""),
        _frame(f"{edge}, {stock['tiles']} tiles at high", stock, f"{stock['stock_ms']:.1f}"),
        _frame(f"{photo['image_px']} x {photo['image_px']}, {photo['tile_tokens']:,} tokens", photo, ""),
    ]
    rows[0][1] = f"{frame['estimate_ms']:,.0f} (one block, times the blocks)"
    text = markdown_table(("image", "stock tower on one image, ms", *(f"{w}, ms" for w in _MEASURED)), rows)
    gains = ", ".join(f"{high[f'{way}_ms'] / whole[f'{way}_ms']:.2f} times {way}" for way in _MEASURED)
    speeds = ", ".join(f"{photo[f'{way}_tokens_per_second']:,} {way}" for way in _MEASURED)
    text += (
        f"\nThe mix is faster than all tiles at high {gains}. Tokens per second of the last row: {speeds}.\n"
    )
    return text + _source(result, shape, name)


def _frame(label: str, case: Mapping[str, Any], stock: str) -> list[str]:
    return [
        label,
        stock,
        *(_cell(case, way) if "floor_ms" in case else _plain(case, way) for way in _MEASURED),
    ]


def _plain(case: Mapping[str, Any], way: str) -> str:
    return f"{case[f'{way}_ms']:.1f}"


def accuracy_table(result: Mapping[str, Any]) -> str:
    """Relative errors of the bundled checkpoint's encodings, and right answers."""
    found = result["accuracy"]
    rows = []
    for way, right in found["right"].items():
        pairs = (found["error_against_fp32"][way], found["error_against_bf16"].get(way))
        errors = ["" if pair is None else f"{pair['tokens']:.4f} / {pair['planes']:.4f}" for pair in pairs]
        rows.append([way, *errors, f"{right} of {found['questions']}"])
    refused = f"\nfloat8 was refused: {found['float8_refused']}\n" if "float8_refused" in found else ""
    head = ("", "against fp32, tokens / planes", "against eager bf16", f"right at {found['budget']} tokens")
    about = (
        f"\n`{result['command']}`, {result['date']}, {result['device']}, the bundled checkpoint, preset "
        f"demo, {found['tiles']} tiles of 16 tokens; an error is the norm of the difference over the norm, "
        "of planes the largest.\n"
    )
    return markdown_table(head, rows) + refused + about


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
