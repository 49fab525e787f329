"""Time to the first token from the bytes of a JPEG file: stock transformers beside arrcoc, in one run.

Random weights of Qwen3-VL's sizes, made on the device: times, not answers. Stock is transformers' model with
its own processor at full resolution (up to that processor's limit of 16.8 megapixels), attention `sdpa`;
Pillow's decoding is a part of its `bytes`. arrcoc answers within a budget: a first question about an image of
which nothing is cached, a first question about an image whose left half has been seen, and further questions
in a session, once with tiles that are new to it and once with all of them cached. Time runs from the bytes to
the first token on the host. Every repeat is another image. The same requests run before, uncounted, so that
kernels are compiled and graphs captured; then all caches are emptied.

    python benchmarks/ttft.py [--shapes 2b 8b] [--images 1024 1792 3584 8960] [--budgets 1 0.25 0.125]
    python benchmarks/ttft.py --picture
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, ROOT, Usage, facts, measured, medians, progress, write_result
from jpegs import encoded, jpeg, photographs
from PIL import Image
from random_qwen import random_qwen
from stages import StockQwen
from transformers import AutoProcessor
from ttft_picture import STAGES, draw

import arrcoc
from arrcoc import config as configs
from arrcoc.answer import Answer
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.engine import Engine
from arrcoc.qwen import QwenVL
from arrcoc.timing import TOTAL

QUESTIONS = ("What is written on the round patch on her chest?", "What stands behind her on the right?")
NEW_TOKENS = 33
"""Of the run that times decoding: one by the prefill, 32 by decode steps."""
LARGE, REPEATS_OF_LARGE = 4096, 3
"""Edge in pixels beyond which there are fewer repeats."""
_PATIENCE = 5.0  # seconds for the prefetcher to finish
FULL_FRAME_LIMIT = 4096**2
"""Pixels up to which the budget 1, the whole image at full resolution, is run."""
VLLM = {
    "source": "another run: stock vLLM 0.26.0 on an H200, Qwen3-VL-8B with dummy weights, one image, "
    "max_tokens=1, prefix and processor caches off (shared facts, 2026-11-21)",
    "shape": "8b",
    "first_token_ms": {"1024": 62.5, "1792": 246, "3584": 1555},
    "of_it_engine_ms": {"1024": 41, "1792": 137, "3584": 1109},
    "decode_ms_per_token": {"1024": 5.29, "1792": 5.38, "3584": 5.78},
}


@dataclass(frozen=True, slots=True)
class Files:
    """JPEG files of one size, one of each kind for every repeat; no two of `new` have a tile in common."""

    edge: int
    new: list[bytes]
    half_seen: list[bytes]
    """Their left halves are those of `new`."""


class RandomStock(StockQwen):
    """Stock transformers with weights that are there already."""

    def __init__(self, qwen: QwenVL, processor: Any) -> None:
        self.processor, self.model, self.device = processor, qwen.model, qwen.device


class FileMaker:
    """Makes the files of all sizes beside other work."""

    def __init__(self, edges: Sequence[int], repeats: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=8)
        counts = {edge: min(repeats, REPEATS_OF_LARGE) if edge > LARGE else repeats for edge in edges}
        self._tasks = {
            edge: [
                [self._pool.submit(make, edge, seed) for seed in range(counts[edge])] for make in (new, half)
            ]
            for edge in sorted(edges, reverse=True)
        }
        self._edges = list(edges)

    def files(self) -> list[Files]:
        """All of them, in the order asked for."""
        made = [
            Files(edge, *([t.result() for t in kind] for kind in self._tasks[edge])) for edge in self._edges
        ]
        self._pool.shutdown()
        return made


def new(edge: int, seed: int) -> bytes:
    """An image that has no tile in common with those of other seeds."""
    return jpeg(edge, edge, seed)


def half(edge: int, seed: int) -> bytes:
    """An image whose left half is that of `new`, and whose right half no other image has."""
    mixed = photographs(edge, edge, 1000 + seed)
    mixed.paste(photographs(edge, edge, seed).crop((0, 0, edge // 2, edge)), (0, 0))
    return encoded(mixed)


def stock_case(stock: RandomStock, files: Files) -> dict[str, Any]:
    """First token and decoding of stock on images of one size."""

    def run(data: bytes, new_tokens: int) -> Any:
        return stock.run(Image.open(io.BytesIO(data)), QUESTIONS[0], new_tokens)

    run(files.new[0], 2)
    runs = [run(data, 1) for data in files.new]
    names = {"preprocess": "bytes", "vision": "encode", "prefill": "prefill", "generate": "first token"}
    made = _first_tokens([_grouped(r.stages, names, r.usage.milliseconds) for r in runs])
    made |= {"tokens": runs[0].tokens, "peak_bytes": max(_peaks(r.usage for r in runs), default=None)}
    longer = run(files.new[-1], NEW_TOKENS).usage.milliseconds
    made["decode_ms_per_token"] = round((longer - runs[-1].usage.milliseconds) / (NEW_TOKENS - 1), 3)
    return made


class Case:
    """arrcoc on images of one size within one budget."""

    def __init__(self, engine: Engine, files: Files, budget: float, device: torch.device) -> None:
        # A float, for a whole number is a count of tokens.
        self.engine, self.files, self.budget, self.device = engine, files, float(budget), device

    def measure(self, warm_seconds: float) -> dict[str, Any]:
        """Warm up, empty the caches, and run every request once for each pair of files."""
        warmed = self._warm_up(warm_seconds)
        self._forget()
        rounds = [
            self._round(new, half) for new, half in zip(self.files.new, self.files.half_seen, strict=True)
        ]
        cold, seen, new_tiles, cached = (list(asked) for asked in zip(*rounds, strict=True))
        encoding = cold[0].answer.encoding
        assert encoding is not None
        assert encoding.n_tokens <= math.floor(self.budget * encoding.full_tokens)
        return {
            **_asked(cold),
            "warm_up_rounds": warmed,
            "tokens": encoding.n_tokens,
            "full_tokens": encoding.full_tokens,
            "decode_ms_per_token": self._decoding(),
            "half_seen": _asked(seen),
            "follow_up": {"new_tiles": _asked(new_tiles), "tiles_cached": _asked(cached)},
        }

    def _warm_up(self, seconds: float) -> int:
        """The first files twice at least, then all files twice while there is time; how many rounds."""
        begin, count = perf_counter(), 0
        pairs = list(zip(self.files.new, self.files.half_seen, strict=True))
        # At full resolution every plan is the same: one image has met all shapes.
        for new, half in [*pairs[:1] * 2, *(pairs[1:] * 2 if self.budget < 1 else [])]:
            if count >= 2 and perf_counter() - begin > seconds:
                break
            self._forget()
            self._round(new, half)
            count += 1
        self.engine.ask(self.files.new[0], QUESTIONS[0], budget=self.budget, max_new_tokens=NEW_TOKENS)
        return count

    def _forget(self) -> None:
        """Empty both caches: of tiles, and of overviews with their keys and values."""
        self.engine.finish_prefetch(_PATIENCE)
        self.engine.evict_low_relevance(math.inf)
        self.engine._prefixes.clear()

    def _round(self, new: bytes, half: bytes) -> tuple[Asked, Asked, Asked, Asked]:
        """First question; first question on the half-seen image; two further questions in a session."""
        cold, seen = self._ask(new), self._ask(half)
        with self.engine.open(new, self.budget) as session:
            session.ask(QUESTIONS[0], max_new_tokens=1)
            further = [self._timed(lambda: session.ask(QUESTIONS[1], max_new_tokens=1)) for _ in range(2)]
        return cold, seen, further[0], further[1]

    def _ask(self, data: bytes, new_tokens: int = 1) -> Asked:
        return self._timed(
            lambda: self.engine.ask(data, QUESTIONS[0], budget=self.budget, max_new_tokens=new_tokens)
        )

    def _timed(self, work: Callable[[], Answer]) -> Asked:
        """Time a request on an idle device; people take longer to type than the prefetcher to finish."""
        self.engine.finish_prefetch(_PATIENCE)
        tiles, prefixes = self.engine.cache_stats(), self.engine.prefix_stats()
        with measured(self.device) as usage:
            begin = perf_counter()
            answer = work()  # its tokens are on the host: what the device does from now on is prefetching
            milliseconds = (perf_counter() - begin) * 1e3
            after = self.engine.cache_stats()
            self.engine.finish_prefetch(_PATIENCE)
        usage.milliseconds = milliseconds
        hits, misses = after.hits - tiles.hits, after.misses - tiles.misses
        return Asked(answer, usage, hits, misses, self.engine.prefix_stats().hits - prefixes.hits)

    def _decoding(self) -> float | None:
        """Milliseconds of one decode step: what more tokens take, median of three."""
        found = []
        for _ in range(3):
            one, many = (self._ask(self.files.new[-1], count) for count in (1, NEW_TOKENS))
            steps = many.answer.new_tokens - one.answer.new_tokens
            if steps > 0:
                found.append((many.usage.milliseconds - one.usage.milliseconds) / steps)
        return round(statistics.median(found), 3) if found else None


@dataclass(frozen=True, slots=True)
class Asked:
    """One timed request, and what the caches gave it."""

    answer: Answer
    usage: Usage
    tile_hits: int
    tile_misses: int
    prefix_hits: int


def _asked(runs: Sequence[Asked]) -> dict[str, Any]:
    names = {name: group for group, members in STAGES.items() for name in members}
    made = _first_tokens([_grouped(r.answer.timings, names, r.usage.milliseconds) for r in runs])
    raw = medians([{k: v for k, v in r.answer.timings.items() if k != TOTAL} for r in runs])
    hits, misses = sum(r.tile_hits for r in runs), sum(r.tile_misses for r in runs)
    return made | {
        "raw_stages_ms": raw,
        "peak_bytes": max(_peaks(r.usage for r in runs), default=None),
        "tiles_from_cache": round(hits / max(1, hits + misses), 3),
        "prefixes_from_cache": sum(r.prefix_hits for r in runs),
    }


def _grouped(times: Mapping[str, float], names: Mapping[str, str], wall: float) -> dict[str, float]:
    """Milliseconds by group of stages; `between` is what they leave of the wall time."""
    made = dict.fromkeys(STAGES, 0.0)
    for name, value in times.items():
        if name in names:
            made[names[name]] += value
    return made | {"between": max(0.0, wall - sum(made.values())), "wall": wall}


def _first_tokens(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    middle = medians(runs)
    return {
        "first_token_ms": middle.pop("wall"),
        "first_token_ms_runs": [round(run["wall"], 3) for run in runs],
        "stages_ms": middle,
    }


def _peaks(usages: Any) -> list[int]:
    return [usage.peak_bytes for usage in usages if usage.peak_bytes is not None]


class Run:
    """The result as it grows, written after every case, and the clock that bounds the run."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.device = torch.device(options.device)
        self.seconds, self.out, self.begin = options.seconds, Path(options.out), perf_counter()
        self.result: dict[str, Any] = {
            "benchmark": "ttft",
            **facts("benchmarks/ttft.py", arguments, self.device),
            "dtype": options.dtype,
            "repeats": options.repeats,
            "vllm": VLLM,
            "cases": [],
            "left_out": [],
        }

    def case(self, names: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Run one case; one that fails, or comes after the time is up, is noted as left out."""
        begin = perf_counter()
        if begin - self.begin > self.seconds:
            self._leave_out(names, f"more than {self.seconds:g} s had passed")
            return
        try:
            made = work()
        except (RuntimeError, ValueError, AssertionError, arrcoc.ArrcocError) as error:
            progress(traceback.format_exc())
            self._leave_out(names, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        else:
            self.result["cases"].append(names | made)
            write_result(self.out, self.result)
            progress(f"{names} in {perf_counter() - begin:.1f} s: {_line(made)}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave_out(self, names: dict[str, Any], reason: str) -> None:
        self.result["left_out"].append(names | {"reason": reason})
        write_result(self.out, self.result)


def _line(made: Mapping[str, Any]) -> str:
    stages = " ".join(f"{name} {value:.1f}" for name, value in made["stages_ms"].items())
    text = f"{made['tokens']} tokens, first token {made['first_token_ms']:.1f} ms ({stages})"
    text += f", {made.get('decode_ms_per_token')} ms/token"
    if made.get("peak_bytes"):
        text += f", peak +{made['peak_bytes'] / 2**30:.2f} GiB"
    if "follow_up" in made:
        text += f"\n    first question by stage {made['raw_stages_ms']}, runs {made['first_token_ms_runs']}"
        later = {"cold": made, "half seen": made["half_seen"], **made["follow_up"]}
        for name, what in later.items():
            text += (
                f"\n    {name}: {what['first_token_ms']:.1f} ms, {what['tiles_from_cache']:.0%} of tiles and"
            )
            text += f" {what['prefixes_from_cache']} overviews from the cache"
        text += f"\n    tiles cached by stage {later['tiles_cached']['raw_stages_ms']}"
    return text


def measure_shape(run: Run, shape: str, maker: FileMaker, options: argparse.Namespace) -> None:
    """All cases of one model size."""
    begin = perf_counter()
    qwen = make_model(shape, run.device, getattr(torch, options.dtype))
    engine = Engine(qwen, configs.PresetChoice.make("auto", {}))
    stock = RandomStock(qwen, AutoProcessor.from_pretrained(bundled_checkpoint()[0]))
    hidden = ("model", "cache", "prefixes", "notes")  # counts, and what is said elsewhere
    told = {name: value for name, value in engine.describe().items() if name not in hidden}
    run.result.setdefault("engines", {})[shape] = told
    progress(
        f"{shape}: {qwen.n_parameters / 1e9:.2f} B parameters after {perf_counter() - begin:.1f} s; {told}"
    )
    files = maker.files()
    progress(
        f"files of {[len(some.new[0]) for some in files]} bytes after {perf_counter() - run.begin:.1f} s"
    )
    for some in files:
        case = {"shape": shape, "image_px": some.edge, "jpeg_bytes": len(some.new[-1])}
        case["repeats"] = len(some.new)
        run.case(case | {"system": "stock"}, partial(stock_case, stock, some))
        for budget in options.budgets:
            names = case | {"system": "arrcoc", "budget": budget}
            if budget == 1 and some.edge**2 > FULL_FRAME_LIMIT:
                reason = f"budget 1 is run up to {FULL_FRAME_LIMIT} pixels"
                run.result["left_out"].append(names | {"reason": reason})
                continue
            case_ = Case(engine, some, budget, run.device)
            run.case(names, partial(case_.measure, options.warm_seconds))
    engine.close()


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> QwenVL:
    """Random weights of a published size, or `bundled` for the small checkpoint."""
    if shape == "bundled":
        from arrcoc.qwen import load

        return load(bundled_checkpoint()[0], device, dtype)
    qwen = random_qwen(shape, device, dtype)
    rotary: Any = qwen.model.model.visual.rotary_pos_emb  # computed, not drawn
    dim = 2 * rotary.inv_freq.numel()
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    rotary.inv_freq.copy_(10_000.0**-exponent)
    return qwen


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON, or draw what the JSON holds."""
    options = _options(arguments)
    if options.picture:
        figure = draw(json.loads(Path(options.out).read_text("utf-8")))
        figure.savefig(ROOT / "docs" / "ttft.png", dpi=110, metadata={"Software": None})
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run = Run(options, arguments)
    maker = FileMaker(options.images, options.repeats)
    for shape in options.shapes:
        measure_shape(run, shape, maker, options)
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    progress(f"{perf_counter() - run.begin:.0f} s in all, left out: {run.result['left_out']}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["2b", "8b"], choices=["2b", "8b", "bundled"])
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1024, 1792, 3584, 8960], help="edges in pixels"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.25, 0.125], help="shares of full")
    parser.add_argument("--repeats", type=int, default=5, help="images, each for one counted round")
    parser.add_argument("--warm-seconds", type=float, default=8, help="of warming up a case, at most")
    parser.add_argument("--seconds", type=float, default=280, help="no case begins after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default=str(RESULTS / "ttft.json"))
    parser.add_argument("--picture", action="store_true", help="draw docs/ttft.png from --out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
