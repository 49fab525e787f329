"""Five questions about each of many pictures of signs: how often a tile that is wanted is in the cache.

Every picture starts with an empty cache. Besides the hit rate with the cache alone, that of opened images
whose likely next tiles were encoded between questions is measured; how many of those were of use, too.

    python benchmarks/conversation.py [--images 50] [--budgets 0.1 0.25 0.5] [--device cpu]
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, facts, progress, write_result
from numpy.typing import NDArray

import arrcoc
from arrcoc.cache import CacheStats
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.demo.images import FURTHER, further
from arrcoc.demo.placards import sample

CLAIMED = (0.4, 0.6)
"""What the literature on ARR-COC claims for a conversation about one image."""
_MORE = ("read", "find", "exists", "count")


def questions(seed: int, index: int, canvas: int) -> tuple[NDArray[np.uint8], list[str]]:
    """A canvas and five different questions about it, of as many families."""
    family = sorted(FURTHER)[index % len(FURTHER)]  # canvases on which no two signs are alike
    drawn = sample(seed, index, "test", canvas, [family])
    rng = np.random.default_rng([seed, index])
    return drawn.image, [drawn.question, *(further(rng, drawn, other).text for other in _MORE)]


def converse(
    engine: arrcoc.Engine, image: NDArray[np.uint8], asked: Sequence[str], budget: float
) -> list[CacheStats]:
    """Ask one question after the other; the cache's counts before, and after each.

    Where tiles are encoded ahead, each question comes when that is done.
    """
    engine.evict_low_relevance(math.inf)
    counts = [engine.cache_stats()]
    with engine.open(image, budget=budget) as session:
        for question in asked:
            session.encode(question)
            engine.finish_prefetch()
            counts.append(engine.cache_stats())
    return counts


def summary(conversations: Sequence[Sequence[CacheStats]]) -> dict[str, Any]:
    """Hit rates over all pictures."""
    turns = len(conversations[0]) - 1
    hits = np.array([[b.hits - a.hits for a, b in pairwise(c)] for c in conversations])
    misses = np.array([[b.misses - a.misses for a, b in pairwise(c)] for c in conversations])
    ahead = [c[-1].prefetched - c[0].prefetched for c in conversations]
    useful = [c[-1].prefetch_hits - c[0].prefetch_hits for c in conversations]
    return {
        "tiles_asked_for": int(hits.sum() + misses.sum()),
        "hit_rate": round(float(hits.sum() / (hits.sum() + misses.sum())), 4),
        "hit_rate_of_follow_ups": round(float(hits[:, 1:].sum() / (hits + misses)[:, 1:].sum()), 4),
        "hit_rate_by_question": [
            round(float(hits[:, i].sum() / (hits + misses)[:, i].sum()), 4) for i in range(turns)
        ],
        "misses_after_the_first": int(misses[:, 1:].sum()),
        "prefetched": sum(ahead),
        "prefetched_and_used": sum(useful),
    }


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON."""
    options = _options(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(options.model) if options.model else bundled_checkpoint()[0]
    engines = {
        prefetch: arrcoc.Engine.from_pretrained(
            folder, preset="demo", device=options.device, dtype=options.dtype, prefetch=prefetch
        )
        for prefetch in ("off", "on")
    }
    told = engines["off"].describe()
    result: dict[str, Any] = {
        "benchmark": "conversation",
        **facts("benchmarks/conversation.py", arguments, torch.device(told["device"].split()[0])),
        "model": {"name": Path(options.model).name if options.model else "bundled"},
        "dtype": told["dtype"],
        "images": options.images,
        "canvas": options.canvas,
        "questions": 1 + len(_MORE),
        "claimed_in_the_literature": CLAIMED,
        "cases": [],
    }
    for budget in options.budgets:
        counts: dict[str, list[list[CacheStats]]] = {name: [] for name in engines}
        for index in range(options.images):
            image, asked = questions(options.seed, index, options.canvas)
            for name, engine in engines.items():
                counts[name].append(converse(engine, image, asked, budget))
        case = {"budget": budget} | {f"prefetch_{name}": summary(found) for name, found in counts.items()}
        result["cases"].append(case)
        write_result(Path(options.out), result)
        progress(str(case))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a Qwen3-VL checkpoint (default: the bundled one)")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--canvas", type=int, default=1024, help="edge in pixels")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="shares of full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=str(RESULTS / "conversation.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
