"""A stream of screenshots with a question each: what the tile cache saves, and that it changes no answer.

Two engines of one checkpoint, with the tile cache and without, answer every frame one after the other, so
that other load on the machine meets both. Which tiles are new is found from the pixels alone. On the CPU
stages are timed by this process's processor time on one thread, which other load hardly changes; on CUDA by
events.

    python benchmarks/screenshots.py [--frames 60] [--budget 1.0] [--repeats 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, facts, progress, write_result
from numpy.typing import NDArray
from screenshots_picture import draw_stream

import arrcoc
import arrcoc.timing
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.demo.desktop import Screenshot, session

TOKEN_PX = 32
WITHIN = 0.2
"""The bound on how far a frame's cost may lie from the line."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What one frame took, and what came out.

    Attributes:
        cached_ms: of stage encode with the cache.
        plain_ms: of stage encode without.
        cached_wall_ms: of the whole question with the cache.
        plain_wall_ms: of the whole question without.
        hits: tiles that the cache had.
        misses: tiles that it had not.
        same_text: whether both gave the same answer.
        difference: largest absolute difference of their vision tokens, over the largest value.
        right: whether both made the same plan.
    """

    cached_ms: float
    plain_ms: float
    cached_wall_ms: float
    plain_wall_ms: float
    hits: int
    misses: int
    same_text: bool
    difference: float
    right: bool


def new_tiles(frames: Sequence[Screenshot], tile: int, margin: int) -> list[NDArray[np.bool_]]:
    """For each frame, bool [R, C]: tiles that no earlier frame nor an earlier tile of this one has shown.

    A tile is what an engine takes for it: its pixels and `margin` pixels around, the edge's repeated.
    """
    seen: set[bytes] = set()
    found = []
    for shot in frames:
        height, width = shot.image.shape[:2]
        wide = np.pad(shot.image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
        fresh = np.zeros((height // tile, width // tile), bool)
        for row, col in np.ndindex(fresh.shape):
            y, x = row * tile, col * tile
            window = wide[y : y + tile + 2 * margin, x : x + tile + 2 * margin].tobytes()
            fresh[row, col] = window not in seen
            seen.add(window)
        found.append(fresh)
    return found


def run_stream(
    cached: arrcoc.Engine, plain: arrcoc.Engine, shots: Sequence[Screenshot], budget: float, new_tokens: int
) -> tuple[list[Frame], list[arrcoc.Encoding]]:
    """Ask both engines about every frame, in order."""
    made, encodings = [], []
    for shot in shots:
        before = cached.cache_stats()
        answers, walls = [], []
        for engine in (cached, plain):
            begin = perf_counter()
            answers.append(engine.ask(shot.image, shot.question, budget=budget, max_new_tokens=new_tokens))
            walls.append((perf_counter() - begin) * 1e3)
        after = cached.cache_stats()
        one, other = (answer.encoding for answer in answers)
        assert one is not None
        assert other is not None
        scale = float(other.tokens.abs().max())
        made.append(
            Frame(
                cached_ms=one.timings["encode"],
                plain_ms=other.timings["encode"],
                cached_wall_ms=walls[0],
                plain_wall_ms=walls[1],
                hits=after.hits - before.hits,
                misses=after.misses - before.misses,
                same_text=answers[0].text == answers[1].text,
                difference=float((one.tokens - other.tokens).abs().max()) / scale,
                right=torch.equal(one.lod, other.lod),
            )
        )
        encodings.append(one)
    return made, encodings


def fit(new: Sequence[int], milliseconds: Sequence[float]) -> dict[str, float]:
    """The least-squares line of milliseconds over new tiles, and how well frames follow it."""
    x, y = np.asarray(new, float), np.asarray(milliseconds)
    slope, intercept = np.polyfit(x, y, 1)
    line = intercept + slope * x
    spread = float(((y - y.mean()) ** 2).sum())
    return {
        "ms_per_new_tile": round(float(slope), 4),
        "ms_at_none": round(float(intercept), 3),
        "r_squared": round(1 - float(((y - line) ** 2).sum()) / spread, 4) if spread else math.nan,
        "share_of_frames_within_20_percent": round(float((abs(y - line) <= WITHIN * line).mean()), 3),
    }


def summary(
    runs: Sequence[Sequence[Frame]], fresh: Sequence[NDArray[np.bool_]], shots: Sequence[Screenshot]
) -> dict[str, Any]:
    """Medians over repeats by frame, then what the stream as a whole says."""
    cached = [statistics.median(run[i].cached_ms for run in runs) for i in range(len(shots))]
    plain = [statistics.median(run[i].plain_ms for run in runs) for i in range(len(shots))]
    counts = [int(tiles.sum()) for tiles in fresh]
    first = runs[0]
    line = fit(counts[1:], cached[1:])
    per_tile = fit([0, 0, fresh[0].size], [0.0, 0.0, statistics.median(plain)])["ms_per_new_tile"]
    hits, asked = sum(f.hits for f in first[1:]), sum(f.hits + f.misses for f in first[1:])
    return {
        "tiles": fresh[0].size,
        "hit_rate": round(hits / asked, 4),
        "encode_ms_cached": round(statistics.mean(cached[1:]), 3),
        "encode_ms_without": round(statistics.mean(plain[1:]), 3),
        "ratio": round(sum(plain[1:]) / sum(cached[1:]), 2),
        "question_wall_ms_cached": round(_mean(runs, "cached_wall_ms"), 1),
        "question_wall_ms_without": round(_mean(runs, "plain_wall_ms"), 1),
        "fit": line,
        "ms_per_tile_without": per_tile,
        "slope_over_ms_per_tile_without": round(line["ms_per_new_tile"] / per_tile, 3),
        "misses_are_new_tiles": all(f.misses >= n for f, n in zip(first, counts, strict=True)),
        "same_answers": sum(f.same_text for run in runs for f in run),
        "answers": len(runs) * len(shots),
        "largest_relative_difference": max(f.difference for run in runs for f in run),
        "same_plans": all(f.right for run in runs for f in run),
        "frames": [
            {
                "action": shot.action,
                "new_tiles": counts[i],
                "hits": first[i].hits,
                "misses": first[i].misses,
                "cached_ms": round(cached[i], 3),
                "plain_ms": round(plain[i], 3),
            }
            for i, shot in enumerate(shots)
        ],
    }


def _mean(runs: Sequence[Sequence[Frame]], field: str) -> float:
    """Over all frames but the first, of the median over repeats."""
    frames = zip(*(run[1:] for run in runs), strict=True)
    return float(np.mean([statistics.median(getattr(one, field) for one in same) for same in frames]))


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark, write its JSON and draw its picture."""
    options = _options(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(options.model) if options.model else bundled_checkpoint()[0]
    how: dict[str, Any] = {"preset": "demo", "device": options.device, "dtype": options.dtype}
    cached = arrcoc.Engine.from_pretrained(folder, **how, prefix_bytes=0)
    plain = arrcoc.Engine.from_pretrained(folder, **how, prefix_bytes=0, cache_bytes=0)
    told = cached.describe()
    clock = "CUDA events"
    if not told["device"].startswith("cuda"):
        torch.set_num_threads(1)
        arrcoc.timing.perf_counter = process_time  # type: ignore[attr-defined]
        clock = "processor time of this process, one thread"
    sides = told["sides"]["demo"]
    shots = list(session(options.frames, options.seed))
    fresh = new_tiles(shots, sides[3] * TOKEN_PX, told["halo"] * TOKEN_PX)
    runs: list[list[Frame]] = []
    encodings: list[arrcoc.Encoding] = []
    run_stream(cached, plain, shots[:2], options.budget, 2)  # the warm-up
    for repeat in range(options.repeats):
        cached.evict_low_relevance(math.inf)
        made, encodings = run_stream(cached, plain, shots, options.budget, options.new_tokens)
        runs.append(made)
        progress(f"repeat {repeat}: {sum(f.hits for f in made)} hits, {sum(f.misses for f in made)} misses")
    result: dict[str, Any] = {
        "benchmark": "screenshots",
        **facts("benchmarks/screenshots.py", arguments, torch.device(told["device"].split()[0])),
        "model": {"name": Path(options.model).name if options.model else "bundled"},
        "dtype": told["dtype"],
        "clock": clock,
        "budget": options.budget,
        "repeats": options.repeats,
        **summary(runs, fresh, shots),
    }
    write_result(Path(options.out), result)
    progress(str({key: value for key, value in result.items() if key != "frames"}))
    if options.picture:
        shown = max(range(1, len(shots)), key=lambda i: (6 <= fresh[i].sum() <= 30, int(fresh[i].sum())))
        figure = draw_stream(shots[shown], encodings[shown].lod.numpy(), fresh[shown], result)
        figure.savefig(options.picture, dpi=110)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a Qwen3-VL checkpoint (default: the bundled one)")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--budget", type=float, default=1.0, help="1 refines every tile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8, help="most tokens to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=str(RESULTS / "screenshots.json"))
    parser.add_argument("--picture", default=str(ROOT / "docs" / "screenshots.png"), help="'' for none")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
