"""Tables in README and docs, written from benchmarks/results/*.json and configs/*.yaml, never by hand.

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`, or the same with `configs`.

    python benchmarks/tables.py           rewrite the tables
    python benchmarks/tables.py --check   exit with 1 where one differs from its results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from answers_kept import answers_kept_table
from bytes_tables import first_token_table, preprocess_cpu, preprocess_gpu
from cache_tables import conversation_table, screenshots_table, soak_table
from common import RESULTS, ROOT, markdown_table, progress
from decode_views import decode_accuracy_table, decode_table, prefill_table
from engine_tables import builds_table, tensorrt86_errors, tensorrt86_times
from judgements import (
    ablation_table,
    accuracy_families,
    accuracy_table,
    accuracy_times,
    decision_table,
    relevance_families,
    relevance_table,
    tension_table,
)
from lod_engines_picture import accuracy_table as lod_accuracy
from lod_engines_picture import frames_table, mix_table, overlap_table, small_table
from plan_stage_views import plan_stage_glimpse_table, plan_stage_table
from tensorrt86_tables import errors_table, times_table, use_table

from arrcoc import config as configs

PAGES = (
    "README.md",
    "docs/architecture.md",
    "docs/decisions.md",
    "docs/engines.md",
    "docs/relevance.md",
    "docs/speed.md",
)
"""Files whose marked tables are kept."""

TOKEN_PX = 32
"""Pixels along the edge of one merged token of Qwen3-VL."""

_MARKED = re.compile(r"(<!-- ((?:results|configs):[\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
_STAGES = ("frame", "texture", "glimpse", "score", "encode", "prefill", "generate")


def ratios(result: Mapping[str, Any]) -> str:
    """Tokens, and stock over arrcoc in time and peak memory, for every image size and budget."""
    head = (
        "image", "budget", "tokens, stock", "tokens, arrcoc", "time to first token",
        "the same, next question", "whole answer", "peak memory",
    )  # fmt: skip
    rows = []
    for case in result["cases"]:
        first, following = case["stock_over"]["arrcoc"], case["stock_over"]["arrcoc_next_question"]
        times = (first["first_token"], following["first_token"], first["wall"], first["peak_memory"])
        counts = (case["stock"]["tokens"], case["arrcoc"]["tokens"])
        rows.append([_edges(case), f"{case['budget']:g}", *(f"{n:,}" for n in counts), *map(_times, times)])
    return markdown_table(head, rows) + _source(result)


def shares(result: Mapping[str, Any]) -> str:
    """Share of each stage in arrcoc's time, first question with an empty cache."""
    rows = []
    for case in result["cases"]:
        stages = case["arrcoc"]["stages_ms"]
        total = sum(stages.values())
        parts = [stages.get(name, 0.0) / total for name in _STAGES]
        rows.append([_edges(case), f"{case['budget']:g}", *(f"{p:.0%}" for p in (*parts, 1 - sum(parts)))])
    return markdown_table(("image", "budget", *_STAGES, "all others"), rows) + _source(result)


def presets() -> str:
    """The presets as `configs/` has them, finest tiles first."""
    found = [(name, configs.load(name)) for name in configs.preset_names()]
    rows = []
    for name, config in sorted(found, key=lambda item: item[1].sides[3]):
        tokens = " / ".join(str(side**2) for side in config.sides)
        sides = " / ".join(map(str, config.sides))
        rows.append([f"`{name}`", f"{config.sides[3] * TOKEN_PX} px", sides, tokens, f"{config.max_tiles:,}"])
    return markdown_table(("preset", "tile", "sides", "tokens per tile", "most tiles"), rows)


CHOICES = (
    "layout", "glimpse", "halo", "overview", "order", "order-replace", "utility", "utility-replace", "sides",
    "levels", "gain", "lateral", "confident", "flat", "attention-gain", "probe", "participatory",
)  # fmt: skip
"""Choices of decisions.py, each with a table `results:decisions-NAME`."""


def _measured(file: str, render: Callable[[Mapping[str, Any]], str]) -> Callable[[Path], str]:
    """The table of a result that may not be there yet."""
    return lambda folder: render(_read(folder / file)) if (folder / file).exists() else "Not measured yet.\n"


def _decided(name: str) -> Callable[[Path], str]:
    return _measured("decisions.json", lambda result: decision_table(result, name))


_TABLES: dict[str, Callable[[Path], str]] = {
    "results:stages": lambda results: ratios(_read(results / "stages.json")),
    "results:stage-shares": lambda results: shares(_read(results / "stages.json")),
    "results:accuracy": _measured("accuracy.json", accuracy_table),
    "results:accuracy-times": _measured("accuracy_times.json", accuracy_times),
    "results:accuracy-pictures": _measured("accuracy_pictures.json", accuracy_table),
    "results:accuracy-families": _measured("accuracy.json", accuracy_families),
    "results:relevance": _measured("relevance.json", relevance_table),
    "results:relevance-families": _measured("relevance.json", lambda r: relevance_families(r, "auc")),
    "results:recall-families": _measured(
        "relevance.json", lambda r: relevance_families(r, "recall_at_targets")
    ),
    "results:plan-stage": _measured("plan_stage.json", plan_stage_table),
    "results:plan-stage-glimpse": _measured("plan_stage.json", plan_stage_glimpse_table),
    "results:decode": _measured("decode.json", decode_table),
    "results:decode-prefill": _measured("decode_prefill.json", prefill_table),
    "results:decode-accuracy": _measured("decode_accuracy.json", decode_accuracy_table),
    "results:lod-engines": _measured("lod_engines.json", mix_table),
    "results:lod-small": _measured("lod_engines.json", small_table),
    "results:lod-overlap": _measured("lod_engines.json", overlap_table),
    "results:lod-frames": _measured("lod_engines.json", frames_table),
    "results:lod-accuracy": _measured("lod_engines.json", lod_accuracy),
    "results:engine-builds": _measured("engine_builds.json", builds_table),
    "results:tensorrt86-bundled": _measured(
        "tensorrt86.json", lambda result: tensorrt86_times(result, "bundled")
    ),
    "results:tensorrt86-torch-bundled": _measured(
        "tensorrt86_torch.json", lambda result: times_table(result, "bundled")
    ),
    "results:tensorrt86-torch-2b": _measured(
        "tensorrt86_torch.json", lambda result: times_table(result, "2b")
    ),
    "results:tensorrt86-torch-errors": _measured("tensorrt86_torch.json", errors_table),
    "results:tensorrt86-torch-use": _measured("tensorrt86_torch.json", use_table),
    "results:tensorrt86-errors": _measured("tensorrt86.json", tensorrt86_errors),
    "results:tensions": _measured("tensions.json", tension_table),
    "results:tensions-ablation": _measured("tensions.json", ablation_table),
    **{f"results:decisions-{name}": _decided(name) for name in CHOICES},
    "results:preprocess-cpu": _measured("preprocess.json", preprocess_cpu),
    "results:preprocess-gpu": _measured("preprocess_cuda.json", preprocess_gpu),
    "results:ttft-8b": _measured("ttft.json", lambda result: first_token_table(result, "8b")),
    "results:ttft-2b": _measured("ttft.json", lambda result: first_token_table(result, "2b")),
    "results:answers-kept": _measured("answers_kept.json", answers_kept_table),
    "results:screenshots": _measured("screenshots.json", screenshots_table),
    "results:conversation": _measured("conversation.json", conversation_table),
    "results:soak": _measured("soak.json", soak_table),
    "configs:presets": lambda _: presets(),
}


def regenerated(page: str, results: Path = RESULTS) -> str:
    """A page's text with every marked table written anew; an unknown name is a KeyError."""
    return _MARKED.sub(lambda match: f"{match[1]}{_TABLES[match[2]](results)}{match[3]}", page)


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or only compare them; returns the exit status."""
    check, stale = "--check" in arguments, []
    for page in (ROOT / name for name in PAGES):
        old = page.read_text(encoding="utf-8")
        new = regenerated(old)
        if new != old:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale:
        progress(f"{', '.join(stale)}: {'not what the results say' if check else 'rewritten'}")
    return int(check and bool(stale))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _edges(case: Mapping[str, Any]) -> str:
    return f"{case['image_px']} x {case['image_px']}"


def _times(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f} x"


def _source(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    return (
        f"\n`{result['command']}`, {result['date']}, {result['device']}, {result['dtype']}, checkpoint "
        f"{result['model']['name']} ({result['model']['parameters'] / 1e6:.1f} M parameters), "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"median of {result['repeats']} runs; "
        f"slowest over fastest run of a row: at most {_spread(result):.1f} x.\n"
    )


def _spread(result: Mapping[str, Any]) -> float:
    """How far apart equal runs lay: what other load on the machine did to the figures."""
    runs: list[list[float]] = [
        case[name]["wall_ms_runs"] for case in result["cases"] for name in ("stock", "arrcoc")
    ]
    return max(max(times) / min(times) for times in runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
