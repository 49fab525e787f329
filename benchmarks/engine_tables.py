"""Tables of what `engine_builds.py` and `tensorrt86.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common import markdown_table

_QUIET = 0.1
"""Share of the machine's cores that other work took, above which a build's seconds say nothing."""
_WAYS = ("eager", "eager graph", "compiled", "compiled graph")


def builds_table(result: Mapping[str, Any]) -> str:
    """Size, peak memory and, of a quiet machine, seconds of full-size builds without a GPU."""
    head = ("preset", "sides", "largest batches", "for", "plan", "fp16 weights", "peak memory", "build")
    rows = []
    for preset, build in result["builds"].items():
        sides, batches = (" / ".join(map(str, build[name])) for name in ("sides", "max_batch"))
        quiet = build.get("others_cpu_share", _QUIET) < _QUIET
        rows.append(
            [
                f"`{preset}`",
                sides,
                batches,
                ", ".join(build["archs"]),
                f"{sum(build['files'].values()) / 1e6:,.0f} MB",
                f"{build['weight_bytes'] / 1e6:,.0f} MB",
                f"{build['peak_bytes'] / 2**30:.1f} GiB",
                f"{build['seconds']:.0f} s" if quiet else "other work ran beside it",
            ]
        )
    first = next(iter(result["builds"].values()))
    return markdown_table(head, rows) + _source(result, first["builder"], f"opset {first['opset']}")


def tensorrt86_times(result: Mapping[str, Any], case: str) -> str:
    """Milliseconds of a case's shapes: the plan, launched and as a CUDA graph, and torch; and the floor."""
    chosen = _measured(result, case)
    if chosen is None:
        return "Not measured yet.\n"
    found, lines = result["cases"][case], chosen[1]
    peak = result.get("matrix_peak_tflops")
    head = ("LOD", "tiles", "plan", "plan, graph", *_WAYS, "floor")
    rows = []
    for run in (line for line in lines if line["kind"] == "run"):
        replay = next(line for line in lines if line["kind"] == "graph" and _place(line) == _place(run))
        torch = ((found["torch"] or {}).get("ms") or {}).get(f"{run['name']} x{run['batch']}", {})
        times = [run["ms"], replay["ms"], *(torch.get(way) for way in _WAYS)]
        most = run["batch"] == max(one["batch"] for one in _runs(lines) if one["name"] == run["name"])
        work = found.get("gflop", {}).get(run["name"])
        floor = work / peak if most and peak and work else None
        rows.append([run["name"].replace("side", "side "), str(run["batch"]), *map(_ms, [*times, floor])])
    return markdown_table(head, rows) + _source(result, *_about(*chosen))


def tensorrt86_errors(result: Mapping[str, Any]) -> str:
    """Relative errors against torch in fp32, of the plan and of eager torch in fp16."""
    head = (
        "tower", "LOD", "tiles", "tokens, plan", "DeepStack, plan, worst", "tokens, eager fp16",
        "tokens, plan, rotation turned round",
    )  # fmt: skip
    rows = []
    for case in result["cases"]:
        chosen = _measured(result, case)
        for run in [] if chosen is None else _runs(chosen[1]):
            errors = (run["fp32"]["tokens"], max(run["fp32"]["planes"]))
            eager = result["cases"][case]["eager_fp16_error"][run["name"]]
            figures = [f"{error:.2%}" for error in (*errors, eager, run["rotation_flipped_tokens"])]
            rows.append([case, run["name"].replace("side", "side "), str(run["batch"]), *figures])
    return markdown_table(head, rows) + _source(result) if rows else "Not measured yet.\n"


def _measured(result: Mapping[str, Any], case: str) -> tuple[str, Sequence[Mapping[str, Any]]] | None:
    """The first plan of a case that ran, by name, and its lines."""
    for name, lines in result["cases"].get(case, {}).get("plans", {}).items():
        if _runs(lines):
            return name, lines
    return None


def _runs(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["kind"] == "run"]


def _place(line: Mapping[str, Any]) -> tuple[str, int]:
    return line["name"], line["batch"]


def _about(name: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    built, loaded = (next(line for line in lines if line["kind"] == kind) for kind in ("built", "loaded"))
    level = name.split(":")[1]
    about = [f"{built['plan_mb']:.0f} MB"]
    if "build_seconds" in built:
        about.insert(0, f"level {level} built in {built['build_seconds']:.0f} s")
    apart, shared = loaded["contexts_apart_mb"], loaded["contexts_shared_mb"]
    return [*about, f"four contexts {apart:.0f} MB apart, {shared:.0f} MB over shared scratch"]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ms"


def _source(result: Mapping[str, Any], *more: str) -> str:
    versions = result["versions"]
    names = ("torch", "onnx", "tensorrt", "tensorrt-rtx-cu13")
    about = [f"{name} {versions[name]}" for name in names if name in versions]
    parts = [f"`{result['command']}`", result["date"], result["device"], *about, *more]
    return f"\n{', '.join(parts)}.\n"
