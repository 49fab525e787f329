"""Time to store and to find the tiles of one request, against a copy for every tile, and the byte floor.

Correctness comes first: threads on streams of their own, tiles moving between device, host and disk, and
the number of times that the host waits for the device. Sections are independent: one that fails is told of
and the next one runs.

    python benchmarks/tile_cache.py [--device cuda] [--repeats 20]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, facts, progress, write_result

from arrcoc.cache import DiskTier, TileCache, TileKey
from arrcoc.records import Features

SHAPES = {"2b": (4, 2048), "8b": (4, 4096)}
"""Planes (tokens and three DeepStack planes) and width."""
MIXES = {
    # Photo preset, 3584 x 3584 px are 196 tiles; gigapixel, 8960 x 8960 px likewise.
    "photo, 3584 px, 1/4": {2: (16, 60), 4: (36, 40), 6: (64, 18)},
    "gigapixel, 8960 px": {8: (64, 76), 14: (196, 40), 20: (400, 20)},
}
"""By side: tokens of a tile, and tiles."""


def tiles(count: int, tokens: int, planes: int, width: int, device: torch.device) -> Features:
    """Random features of `count` tiles."""
    made = torch.empty(planes, count, tokens, width, dtype=torch.bfloat16, device=device).normal_()
    return Features(made[0], made[1:])


def keys(side: int, count: int, start: int = 0) -> list[TileKey]:
    """Different keys."""
    return [TileKey((number, side, 0, 0), 1, "bench") for number in range(start, start + count)]


def constant(number: int, device: torch.device, planes: int = 4, tokens: int = 64) -> Features:
    """A tile that says which it is: every value of plane p is number + p."""
    values = torch.arange(planes, device=device)[:, None, None, None] + number
    made = values.expand(planes, 1, tokens, 256).to(torch.float32).contiguous()
    return Features(made[0], made[1:])


def check_streams(device: torch.device, folder: Path, threads: int = 4, steps: int = 150) -> dict[str, Any]:
    """Threads on streams of their own share a cache of three tiers, all tiny; every hit is the right tile."""
    size = 4 * 64 * 256 * 4
    disk = DiskTier(folder, 40 * size, 64.0, 1000.0)
    cache = TileCache(12 * size, 64.0, host_bytes=12 * size, disk=disk)
    wrong, failures = list[str](), list[str]()

    def work(thread: int) -> None:
        draw = random.Random(thread)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            with torch.cuda.stream(side):
                for _ in range(steps):
                    numbers = draw.sample(range(60), 6)
                    found = cache.get([keys(8, 1, n)[0] for n in numbers], [draw.random()] * 6, device)
                    bad = torch.zeros((), device=device)
                    for row, place in enumerate(found.places):
                        assert found.features is not None
                        right = constant(numbers[place], device)
                        bad += (found.features.tokens[row] != right.tokens[0]).sum()
                        bad += (found.features.deepstack[:, row] != right.deepstack[:, 0]).sum()
                    missing = [n for i, n in enumerate(numbers) if i not in found.places]
                    for number in missing:
                        cache.put(keys(8, 1, number), constant(number, device), [draw.random()])
                    if float(bad):
                        wrong.append(f"thread {thread}: {float(bad)} values of {numbers}")
        except Exception:
            failures.append(traceback.format_exc())

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stats = cache.stats()
    cache.close()
    for line in (*wrong[:3], *failures[:1]):
        progress(line)
    hits = {name: tier.hits for name, tier in stats.tiers.items()}
    return {"wrong": len(wrong), "failures": len(failures), "hits": hits, "evictions": stats.evictions}


def count_syncs(device: torch.device) -> dict[str, int]:
    """How often the host waits for the device in a put, a get, a put that demotes and a get that promotes."""
    if device.type != "cuda":
        return {}
    planes, width = SHAPES["2b"]
    size = 64 * planes * width * 2
    cache = TileCache(64 * size, 64.0, host_bytes=64 * size)
    waits = {}
    batches = [tiles(32, 64, planes, width, device) for _ in range(3)]
    steps: dict[str, Callable[[], object]] = {
        "put": lambda: cache.put(keys(8, 32), batches[0], [0.5] * 32),
        "put again": lambda: cache.put(keys(8, 32, 32), batches[1], [0.6] * 32),
        "get": lambda: cache.get(keys(8, 32), [0.5] * 32, device),
        "put that demotes": lambda: cache.put(keys(8, 32, 64), batches[2], [0.9] * 32),
        "get that promotes": lambda: cache.get(keys(8, 32, 32), [2.0] * 32, device),
    }
    torch.cuda.synchronize()
    for name, step in steps.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits[name] = sum("synchroniz" in str(one.message) for one in caught)
    return waits


def one_by_one(features: Features) -> tuple[list[Features], Features]:
    """What a cache of single tensors does: a copy of every tile to store, and one to find, then joined."""
    stored = [
        Features(features.tokens[i : i + 1].clone(), features.deepstack[:, i : i + 1].contiguous().clone())
        for i in range(len(features.tokens))
    ]
    found = [Features(one.tokens.clone(), one.deepstack.clone()) for one in stored]
    joined = Features(
        torch.cat([one.tokens for one in found]), torch.cat([one.deepstack for one in found], dim=1)
    )
    return stored, joined


def timed(step: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds until the device is done, and of the host alone."""
    total, host = [], []
    for repeat in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = perf_counter()
        step()
        issued = perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 2:
            host.append(issued - begin)
            total.append(perf_counter() - begin)
    return {
        "ms": round(statistics.median(total) * 1e3, 4),
        "host_ms": round(statistics.median(host) * 1e3, 4),
    }


def time_mix(shape: str, mix: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Put and get of the tiles of one request, with the floor: bytes read and written over copy bandwidth."""
    planes, width = SHAPES[shape]
    batches = {side: tiles(count, m, planes, width, device) for side, (m, count) in MIXES[mix].items()}
    size = sum(each.tokens.nbytes + each.deepstack.nbytes for each in batches.values())
    relevance = {side: [0.5] * count for side, (_, count) in MIXES[mix].items()}
    names = {side: keys(side, count) for side, (_, count) in MIXES[mix].items()}
    cache, host = TileCache(2 * size, 1e9), TileCache(0, 1e9, host_bytes=2 * size)

    def put(into: TileCache) -> None:
        into.clear()
        for side, batch in batches.items():
            into.put(names[side], batch, relevance[side])

    def get(out_of: TileCache) -> list[Features | None]:
        return [out_of.get(names[side], relevance[side], device).features for side in batches]

    put(cache)
    for found, batch in zip(get(cache), batches.values(), strict=True):
        assert found is not None
        assert torch.equal(found.tokens, batch.tokens)
        assert torch.equal(found.deepstack, batch.deepstack)
    whole = torch.empty(size // 2, dtype=torch.bfloat16, device=device)
    floor = timed(whole.clone, device, repeats)
    result = {
        "shape": shape,
        "mix": mix,
        "tiles": sum(count for _, count in MIXES[mix].values()),
        "bytes": size,
        "floor_one_copy": floor,
        "put": timed(lambda: put(cache), device, repeats),
        "get": timed(lambda: get(cache), device, repeats),
        "one_by_one_put_and_get": timed(lambda: [*map(one_by_one, batches.values())], device, repeats),
    }
    put(host)
    result["get_from_host"] = timed(lambda: get(host), device, max(3, repeats // 4))
    return result


def main(arguments: Sequence[str]) -> None:
    """Run every section and write what came out."""
    options = _options(arguments)
    device = torch.device(options.device)
    begin = perf_counter()
    result: dict[str, Any] = {
        "benchmark": "tile_cache",
        **facts("benchmarks/tile_cache.py", arguments, device),
        "repeats": options.repeats,
    }
    with tempfile.TemporaryDirectory(prefix="arrcoc-tiles-") as folder:
        sections: list[tuple[str, Callable[[], object]]] = [
            ("streams", lambda: check_streams(device, Path(folder))),
            ("host_waits", lambda: count_syncs(device)),
        ]
        for shape in options.shapes:
            for mix in MIXES:
                sections.append(
                    (f"{shape}, {mix}", lambda s=shape, m=mix: time_mix(s, m, device, options.repeats))
                )
        for name, section in sections:
            try:
                result[name] = section()
            except Exception as error:
                traceback.print_exc()
                result[name] = f"failed: {type(error).__name__}: {error}"
            progress(f"{perf_counter() - begin:6.1f} s  {name}: {result[name]}")
            write_result(Path(options.out), result)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["2b", "8b"], choices=sorted(SHAPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default=str(RESULTS / "tile_cache.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
