"""Tables of what `tensorrt86_torch.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common import markdown_table

_NOT_YET = "Not measured yet.\n"
_WAYS = ("plan", "eager", "compiled", "fused")
_GRAPHS = ("plan", "eager", "compiled")


def times_table(result: Mapping[str, Any], case: str) -> str:
    """Milliseconds of whole calls of a case's engines, launched and as CUDA graphs, and the floor."""
    found = result["cases"].get(case, {})
    if "times" not in found:
        return _NOT_YET
    peak, graphs = result.get("matrix_peak_tflops"), found.get("graph_times", {})
    head = ("LOD", "tiles", *_WAYS, *(f"{way}, graph" for way in _GRAPHS), "floor")
    rows = []
    for name, entry in found["times"].items():
        work = found.get("gflop", {}).get(name)
        times = [entry.get(way) for way in _WAYS] + [graphs.get(name, {}).get(way) for way in _GRAPHS]
        rows.append([*_place(name), *map(_ms, times), _ms(work / peak if work and peak else None)])
    return markdown_table(head, rows) + _source(result)


def errors_table(result: Mapping[str, Any]) -> str:
    """Relative errors against torch in fp32, of the plan and of torch in fp16."""
    head = (
        "tower", "LOD", "tiles", "tokens, plan", "DeepStack, plan, worst", "tokens, eager", "tokens, fused",
        "tokens, plan, rotation turned round",
    )  # fmt: skip
    rows = []
    for case, found in result["cases"].items():
        for name, entry in found.get("errors", {}).items():
            ways = ("eager", "fused", "rotation turned")
            figures = [entry["plan"]["tokens"], max(entry["plan"]["planes"])]
            figures += [entry[way]["tokens"] for way in ways]
            rows.append([case, *_place(name), *(f"{figure:.2%}" for figure in figures)])
    return markdown_table(head, rows) + _source(result) if rows else _NOT_YET


def use_table(result: Mapping[str, Any]) -> str:
    """Building, loading, threads, answers, and LODs on streams of their own."""
    cases = {case: found for case, found in result["cases"].items() if "build_seconds" in found}
    facts: dict[str, list[str]] = {
        "build": [f"{found['build_seconds']:.0f} s" for found in cases.values()],
        "plan": [f"{found['plan_mb']:.0f} MB" for found in cases.values()],
        "scratch memory of the four profiles": [f"{found['scratch_mb']:.0f} MB" for found in cases.values()],
        "load, verification included": [f"{found['load_seconds']:.1f} s" for found in cases.values()],
        "two threads: calls with other features than one by one": [
            _of(found.get("threads"), "different", "calls") for found in cases.values()
        ],
    }
    for name in ("full", "eighth"):
        shown = [_answers(found.get("answers"), name) for found in cases.values()]
        if any(shown):
            facts[f"answers at budget {name}: other than eager torch's; right, plan and eager"] = shown
    for kind in ("largest", "single"):
        for way in ("shared scratch, in turn", "own scratch, in turn", "own scratch, side by side"):
            shown = [_ms(found.get("streams", {}).get(kind, {}).get(way)) for found in cases.values()]
            if any(shown):
                facts[f"the four LODs, {kind} batches: {way}"] = shown
    rows = [[what, *shown] for what, shown in facts.items()]
    return markdown_table(("", *cases), rows) + _source(result) if cases else _NOT_YET


def _place(name: str) -> tuple[str, str]:
    lod, _, batch = name.rpartition(" x")
    return lod, batch


def _of(found: Mapping[str, int] | None, part: str, whole: str) -> str:
    return "" if found is None else f"{found[part]} of {found[whole]}"


def _answers(found: Mapping[str, Any] | None, name: str) -> str:
    if found is None:
        return ""
    changed, right = found[name]["changed"], found[name]["right"]
    return f"{changed} of {found['questions']}; {right['plan']}, {right['eager']}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ms"


def _source(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    about = [f"{name} {versions[name]}" for name in ("python", "torch", "tensorrt") if name in versions]
    parts = [f"`{result['command']}`", result["date"], result["device"], *about, f"level {result['level']}"]
    return f"\n{', '.join(parts)}.\n"
