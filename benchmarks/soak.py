"""Half an hour of mixed requests: memory stays flat, nothing fails, and the cache keeps its bounds.

All tiers of the cache are on and tiny, so that tiles move all the time; tiles are encoded ahead; requests
are questions, encodings, streams that are dropped half-way, sessions, chats, and such as must be refused.

Writes benchmarks/results/soak.json and docs/soak.png.

    python benchmarks/soak.py [--minutes 30] [--threads 1]
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, ROOT, facts, progress, write_result
from numpy.typing import NDArray
from soak_picture import draw_soak

import arrcoc
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.demo.placards import sample

CACHE, HOST, DISK, PREFIXES = 1 << 20, 1 << 20, 4 << 20, 4 << 20
"""Bounds in bytes: far below what the requests would fill."""
_CANVASES = (256, 384, 512, (384, 640), 768, 1024)
_PICTURES = 8  # of each canvas
_SAMPLES = 360  # in a run, five seconds apart at most
_WARM_SHARE = 0.25  # of the run, in which allocators, pools and lazily made parts settle

Canvas = int | tuple[int, int]


class Sample(NamedTuple):
    """A moment: seconds since the start, resident bytes of the process, and bytes held, by tier."""

    at: float
    resident: int
    held: dict[str, int]


class Soak:
    """An engine, and requests drawn at random for it."""

    def __init__(self, engine: arrcoc.Engine, disk: Path, seed: int) -> None:
        self.engine, self.disk = engine, disk
        self.random = random.Random(seed)
        # Drawn beforehand: the fonts that drawing opens would count as memory of the engine.
        drawn = [sample(seed, index, "test", canvas) for canvas in _CANVASES for index in range(_PICTURES)]
        self.pictures = [(one.image, one.question) for one in drawn]
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self.held: dict[str, int] = {}
        self.most: Counter[str] = Counter()
        self._requests: dict[str, Callable[[], object]] = {
            "ask": self._ask,
            "encode": self._encode,
            "stream": self._stream,
            "session": self._session,
            "conversation": self._conversation,
            "chat": self._chat,
            "refused": self._refused,
            "evict": lambda: engine.evict_low_relevance(self.random.uniform(0, 0.5)),
        }

    def step(self) -> None:
        """One request, and a look at every bound."""
        kind = self.random.choice(list(self._requests))
        try:
            self._requests[kind]()
        except Exception as error:
            self.errors.append(f"{kind}: {type(error).__name__}: {error}")
        self.done[kind] += 1
        self._check()

    def _check(self) -> None:
        tiers = self.engine.cache_stats().tiers
        used = {name: tier.bytes for name, tier in tiers.items()}
        bounds = {name: tier.max_bytes for name, tier in tiers.items()}
        used["files"] = _folder_bytes(self.disk)
        bounds["files"] = DISK
        prefixes = self.engine.prefix_stats()
        used["prefixes"], bounds["prefixes"] = prefixes.bytes, prefixes.max_bytes
        self.held = used
        for name, size in used.items():
            self.most[name] = max(self.most[name], size)
            if size > bounds[name]:
                self.errors.append(f"{name}: {size} bytes, bound {bounds[name]}")
        if any(tier.state != "on" for tier in tiers.values()):
            self.errors.append(f"a tier is off: {tiers}")

    def _picture(self) -> tuple[NDArray[np.uint8], str]:
        """One of a few dozen pictures, so that some come again while they are cached."""
        return self.random.choice(self.pictures)

    def _budget(self) -> float:
        return self.random.choice((0.15, 0.25, 0.5, 1.0))

    def _ask(self) -> None:
        self.engine.ask(*self._picture(), budget=self._budget(), max_new_tokens=8)

    def _encode(self) -> None:
        self.engine.encode(*self._picture(), budget=self._budget())

    def _stream(self) -> None:
        """Half of the streams are dropped after a piece, or before the first."""
        stream = iter(self.engine.stream(*self._picture(), budget=self._budget(), max_new_tokens=8))
        for _ in range(self.random.choice((0, 1, 100, 100))):
            if next(stream, None) is None:
                break

    def _session(self) -> None:
        image, question = self._picture()
        with self.engine.open(image, budget=self._budget()) as session:
            for words in (question, "How many red signs are there?", question):
                session.ask(words, max_new_tokens=6)
                if self.random.random() < 0.5:
                    self.engine.finish_prefetch()

    def _conversation(self) -> None:
        image, question = self._picture()
        with self.engine.open(image, budget=self._budget(), conversation=True) as session:
            for words in (question, "How many blue signs are there?"):
                session.ask(words, max_new_tokens=6)

    def _chat(self) -> None:
        (image, question), (other, _) = self._picture(), self._picture()
        content = [{"type": "image", "image": image}, {"type": "image", "image": other}]
        content.append({"type": "text", "text": question})
        self.engine.chat([{"role": "user", "content": content}], budget=self._budget(), max_new_tokens=6)

    def _refused(self) -> None:
        image, question = self._picture()
        for budget, words in ((-1.0, question), (10**9, question), (0.5, "")):
            try:
                self.engine.ask(image, words, budget=budget)
            except arrcoc.ArrcocError:
                continue
            self.errors.append(f"budget {budget!r} and {words!r} were taken")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # evicted meanwhile
            continue
    return total


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flatness(samples: Sequence[Sample], warm: float) -> dict[str, float]:
    """Least-squares slope of memory over time after `warm` seconds, with its standard error.

    Samples of one process are not independent, so that the error is a lower bound.
    """
    later = np.array([(one.at, one.resident) for one in samples if one.at >= warm], dtype=float)
    at, size = later[:, 0] / 3600, later[:, 1] / 2**20
    (slope, level), residue, *_ = np.polyfit(at - at.mean(), size, 1, full=True)
    spread = float(((at - at.mean()) ** 2).sum())
    variance = float(residue[0]) / max(len(at) - 2, 1) if len(residue) else 0.0
    third = len(size) // 3
    return {
        "from_second": round(warm, 1),
        "mib_per_hour": round(float(slope), 2),
        "standard_error": round((variance / spread) ** 0.5, 2),
        "mean_mib": round(float(level), 1),
        "least_mib": round(float(size.min()), 1),
        "most_mib": round(float(size.max()), 1),
        "median_of_first_third_mib": round(float(np.median(size[:third])), 1),
        "median_of_last_third_mib": round(float(np.median(size[-third:])), 1),
    }


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON; it is written every minute, and at the end."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="arrcoc-soak-") as folder:
        bounds: dict[str, Any] = {"cache_bytes": CACHE, "cache_host_bytes": HOST, "cache_disk_bytes": DISK}
        engine = arrcoc.Engine.from_pretrained(
            bundled_checkpoint()[0],
            preset="demo",
            device=options.device,
            prefetch="on",
            prefix_bytes=PREFIXES,
            cache_disk_path=folder,
            **bounds,
        )
        soak = Soak(engine, Path(folder), options.seed)
        device = torch.device(engine.describe()["device"].split()[0])
        about = {"benchmark": "soak", **facts("benchmarks/soak.py", arguments, device)}
        samples = _run(soak, options.minutes * 60, Path(options.out), about)
        engine.close()
    result = _result(soak, about, samples)
    progress(str({key: value for key, value in result.items() if key != "samples"}))
    if options.picture:
        draw_soak(result).savefig(options.picture, dpi=110)
    if soak.errors:
        sys.exit(f"{len(soak.errors)} errors, the first: {soak.errors[0]}")


def _run(soak: Soak, seconds: float, out: Path, about: dict[str, Any]) -> list[Sample]:
    """Requests until the time is over, with samples in between."""
    begin, samples, told, apart = perf_counter(), list[Sample](), 0.0, min(5.0, seconds / _SAMPLES)
    while (now := perf_counter() - begin) < seconds:
        if not samples or now - samples[-1].at >= apart:
            gc.collect()
            samples.append(Sample(now, resident_bytes(), soak.held))
        if now - told > 60:
            told = now
            write_result(out, _result(soak, about, samples))
            progress(f"{now / 60:.0f} min, {soak.done.total()} requests, {samples[-1].resident >> 20} MiB")
        soak.step()
    write_result(out, _result(soak, about, samples))
    return samples


def _result(soak: Soak, about: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    stats = soak.engine.cache_stats()
    return about | {
        "seconds": round(samples[-1].at, 1),
        "requests": dict(soak.done),
        "errors": soak.errors[:20],
        "error_count": len(soak.errors),
        "bounds": {"device": CACHE, "host": HOST, "disk": DISK, "prefixes": PREFIXES},
        "most_bytes_held": dict(soak.most),
        "hit_rate": round(stats.hit_rate, 4),
        "evictions": stats.evictions,
        "prefetched": stats.prefetched,
        "prefetch_hits": stats.prefetch_hits,
        "memory": flatness(samples, samples[-1].at * _WARM_SHARE) if len(samples) > 12 else None,
        "samples": [
            {
                "seconds": round(one.at, 1),
                "resident_mib": round(one.resident / 2**20, 1),
                "held_kib": {name: size >> 10 for name, size in one.held.items()},
            }
            for one in samples
        ],
    }


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(RESULTS / "soak.json"))
    parser.add_argument("--picture", default=str(ROOT / "docs" / "soak.png"), help="'' for none")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
