"""LODs of a request beside one another: one stream and one memory, or a stream and memory for each."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lod_engines_tower import Bench, report, tiles_of, timed
from torch import Tensor

from arrcoc.lod.graphed import MOST_PATCHES, Workspace
from arrcoc.records import Features
from arrcoc.streams import parallel

Counts = Mapping[int, int]
"""Number of tiles by side."""
Run = Callable[[], list[Features]]

FEW: Counts = {4: 16, 6: 12, 8: 4, 10: 2}
_SCALES = (1, 2, 4)
_LONG_MS, _MANY, _SOME = 50.0, 15, 5
"""Milliseconds from which a case is run fewer times, and the times of shorter and longer ones."""


def overlap(bench: Bench, photo: Counts, mix: Counts) -> dict[str, Any]:
    """Few tiles, preset photo's and multiples of them, and the mix (in float8 it is left out)."""
    named = {"few tiles": FEW}
    for scale in _SCALES:
        name = "photo" if scale == 1 else f"photo, {scale} times the tiles"
        named[name] = {side: scale * count for side, count in photo.items()}
    cases = [_case(bench, way, name, counts) for way in ("fused", "float8") for name, counts in named.items()]
    cases.append(_case(bench, "fused", "the mix", mix))
    return {"cases": cases}


def _case(bench: Bench, way: str, name: str, counts: Counts) -> dict[str, Any]:
    tiles = {str(side * side): count for side, count in counts.items()}
    found: dict[str, Any] = {"case": name, "way": way, "tiles": tiles}
    found["patches"] = sum((s * bench.weights.merge) ** 2 * n for s, n in counts.items())
    found["floor_ms"] = bench.floor_ms(sum(bench.flops(side, n) for side, n in counts.items()))
    pixels = {side: tiles_of(side, count) for side, count in counts.items()}
    start = _reserved()
    one = _ready(bench, way, pixels, 0)
    middle = _reserved()
    each = _ready(bench, way, pixels, MOST_PATCHES)
    found |= {"one_mib": (middle - start) >> 20, "each_mib": (_reserved() - middle) >> 20}
    found |= _compared(partial(_in_turn, one), partial(parallel, each, torch.device("cuda")))
    report(found, bench)
    return found


def _ready(bench: Bench, way: str, pixels: Mapping[int, Tensor], alone: int) -> list[Callable[[], Features]]:
    """A call for each side, captured already, over memory that no other case uses."""
    shared = Workspace(torch.device("cuda"))
    calls = [partial(bench.engine(way, side, shared, alone).encode, tiles) for side, tiles in pixels.items()]
    _in_turn(calls)
    return calls


def _in_turn(calls: list[Callable[[], Features]]) -> list[Features]:
    return [call() for call in calls]


def _compared(one: Run, each: Run) -> dict[str, Any]:
    """Medians of both, run alternately; what comes out is compared bit by bit every time."""
    want, times = one(), dict[str, list[float]](one_ms=[], each_ms=[])
    equal = _equal(each(), want)
    repeats = _MANY if timed(one, 1, 1) < _LONG_MS else _SOME
    kept: list[list[Features]] = [[]]

    def keep(run: Run) -> None:
        kept[0] = run()

    for _ in range(repeats):
        for key, run in (("one_ms", one), ("each_ms", each)):
            kept[0] = []  # whose memory is taken again
            times[key].append(timed(partial(keep, run), 1, 0))
            equal = equal and _equal(kept[0], want)
    found: dict[str, Any] = {key: round(statistics.median(taken), 4) for key, taken in times.items()}
    gain = found["one_ms"] / found["each_ms"]
    return found | {"repeats": repeats, "one_over_each": round(gain, 3), "bit_equal": equal}


def _equal(have: list[Features], want: list[Features]) -> bool:
    pairs = zip(have, want, strict=True)
    return all(torch.equal(a.tokens, b.tokens) and torch.equal(a.deepstack, b.deepstack) for a, b in pairs)


def _reserved() -> int:
    """Bytes that are reserved now and that cannot be given back: graphs' memory and what is in use."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
