"""The tile cache: encoded tiles, kept by how relevant they have been lately for the bytes they take."""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from arrcoc.records import Features

K = TypeVar("K", bound=Hashable)


class TileKey(NamedTuple):
    """Everything a tile's features depend on.

    Attributes:
        content: 128-bit hash of the tile's pixels, as in `Frame.hashes`.
        lod: level of detail, a value of `Lod`.
        engine: fingerprint of the LOD engine: weights, precision, sides.
    """

    content: tuple[int, int, int, int]
    lod: int
    engine: str


@dataclass(slots=True)
class _Entry:
    size: int
    weight: float
    """log2 of the score on the ledger's growing scale; -inf for a score of 0."""
    order: int
    """Number of entries stored before this one."""

    @property
    def rank(self) -> tuple[float, int]:
        """Sorts the next to be evicted first: log2 of the score per byte, then age."""
        return self.weight - math.log2(self.size), self.order


class Ledger(Generic[K]):
    """Which keys are stored, their sizes and scores, and who leaves when space is needed; no tensors.

    The score of a key is sum(relevance_i * 2 ** -(age_i / half_life)) over its uses, ages in uses of the
    whole cache (`advance`). Scores are held as log2 on a scale that grows with the clock instead of every
    score shrinking: decay costs nothing, keeps the order of scores exactly, and neither overflows nor
    underflows.

    Args:
        max_bytes: bound of the sum of sizes; 0 stores nothing.
        half_life: uses after which a score has halved.
    """

    def __init__(self, max_bytes: int, half_life: float) -> None:
        assert max_bytes >= 0, max_bytes
        assert half_life > 0, half_life
        self.max_bytes, self.half_life = max_bytes, half_life
        self.used = 0
        self._clock = 0
        self._stored = 0
        self._entries: dict[K, _Entry] = {}
        self._queue: list[tuple[tuple[float, int], K]] = []

    def __len__(self) -> int:
        """Number of stored keys."""
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        """Whether `key` is stored."""
        return key in self._entries

    def advance(self, uses: int = 1) -> None:
        """Let the clock, and so every score's decay, go on by `uses`."""
        assert uses >= 0, uses
        self._clock += uses

    def score(self, key: K) -> float:
        """Decayed score of a stored key, as of now."""
        return math.exp2(self._entries[key].weight - self._clock / self.half_life)

    def touch(self, key: K, relevance: float) -> None:
        """Count a use of a stored key: its score grows by `relevance` (finite, at least 0; asserted)."""
        entry = self._entries[key]
        entry.weight = self._grown(entry.weight, relevance)
        self._enqueue(key, entry)

    def add(self, key: K, size: int, relevance: float) -> list[K] | None:
        """Store a key of `size` bytes with a first use of `relevance`.

        A key that is stored already takes the new size and keeps its score and its age, and is used once
        more. Returns the keys evicted to make room, or None where `size` exceeds the bound: nothing has
        changed then.
        """
        assert size > 0, size
        if size > self.max_bytes:
            return None
        old = self._remove(key) if key in self else None
        evicted = self._make_room(size)
        entry = _Entry(size, old.weight if old else -math.inf, old.order if old else self._stored)
        entry.weight = self._grown(entry.weight, relevance)
        self._stored += old is None
        self._entries[key] = entry
        self.used += size
        self._enqueue(key, entry)
        assert self.used <= self.max_bytes, f"{self.used} bytes in use, bound {self.max_bytes}"
        return evicted

    def evict_low_relevance(self, threshold: float) -> list[K]:
        """Forget the keys whose score is now below `threshold`, and return them."""
        low = [key for key in self._entries if self.score(key) < threshold]
        for key in low:
            self._remove(key)
        self._recount()
        return low

    def clear(self) -> None:
        """Forget every key; the clock goes on."""
        self._entries.clear()
        self._queue.clear()
        self.used = 0

    def _grown(self, weight: float, relevance: float) -> float:
        assert 0 <= relevance < math.inf, f"relevance {relevance}"
        if relevance == 0:
            return weight
        gain = math.log2(relevance) + self._clock / self.half_life
        high, low = max(weight, gain), min(weight, gain)
        return high + math.log1p(2.0 ** (low - high)) / math.log(2)

    def _make_room(self, size: int) -> list[K]:
        evicted = []
        while self.used + size > self.max_bytes:
            rank, key = heapq.heappop(self._queue)
            entry = self._entries.get(key)
            # A rank that is no longer the entry's own was left behind by a later use.
            if entry is not None and entry.rank == rank:
                self._remove(key)
                evicted.append(key)
        return evicted

    def _enqueue(self, key: K, entry: _Entry) -> None:
        heapq.heappush(self._queue, (entry.rank, key))
        if len(self._queue) > 64 + 4 * len(self._entries):
            self._queue = [(entry.rank, key) for key, entry in self._entries.items()]
            heapq.heapify(self._queue)
            self._recount()

    def _remove(self, key: K) -> _Entry:
        entry = self._entries.pop(key)
        self.used -= entry.size
        assert self.used >= 0, f"{self.used} bytes in use after {key}"
        return entry

    def _recount(self) -> None:
        """Assert the running sum against a full one; called where all entries are visited anyway."""
        total = sum(entry.size for entry in self._entries.values())
        assert self.used == total, f"{self.used} bytes in use, entries hold {total}"


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a cache since it was made, and what it holds now.

    Attributes:
        hits, misses: keys asked for and found, or not found.
        puts: tiles stored.
        evictions: tiles that left, for space or for low relevance.
        refused: tiles larger than the bound, not stored.
        entries: tiles held.
        bytes: bytes held.
        max_bytes: the bound.
        hits_by_lod, misses_by_lod: the same hits and misses, by level of detail.
    """

    hits: int
    misses: int
    puts: int
    evictions: int
    refused: int
    entries: int
    bytes: int
    max_bytes: int
    hits_by_lod: Mapping[int, int]
    misses_by_lod: Mapping[int, int]

    @property
    def hit_rate(self) -> float:
        """Hits over keys asked for, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class TileCache:
    """Features of encoded tiles by `TileKey`, within a byte bound; safe to share between threads.

    Every use adds the tile's relevance to its score, scores decay, and the lowest score per byte leaves
    when space is needed (see `Ledger`). Tensors are copied on the current stream, so threads that share a
    cache must also share the CUDA stream.

    Args:
        max_bytes: bound of the bytes held; 0 switches the cache off: it only counts misses then.
        half_life: calls of `get` after which a score has halved.
        location: "device" keeps tiles where they were put, "host" in host memory.
    """

    def __init__(
        self, max_bytes: int, half_life: float, location: Literal["device", "host"] = "device"
    ) -> None:
        self._ledger: Ledger[TileKey] = Ledger(max_bytes, half_life)
        self._location = location
        self._tiles: dict[TileKey, Features] = {}
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._hits: Counter[int] = Counter()
        self._misses: Counter[int] = Counter()

    def get(
        self, keys: Sequence[TileKey], relevance: Sequence[float], device: torch.device | str | None = None
    ) -> list[Features | None]:
        """Look up tiles; a hit adds the tile's relevance to its score, and the call is one use of the cache.

        Args:
            keys: one key for each tile.
            relevance: relevance of each tile, at least 0.
            device: where the features are wanted; None leaves them where they are kept.

        Returns:
            For each key its features (K = 1: tokens [1, m, D], deepstack [L, 1, m, D]) as a copy of one's
            own, bit-equal to what was put, or None.
        """
        with self._lock:
            self._ledger.advance()
            found = [self._look_up(key, value) for key, value in zip(keys, relevance, strict=True)]
        # Tensors in the cache are never written to, so they may be copied after the lock is released.
        return [None if tile is None else _copy(tile, device) for tile in found]

    def put(self, key: TileKey, features: Features, relevance: float) -> bool:
        """Store a copy of one tile's features (K = 1, asserted), evicting others where space is needed.

        Returns:
            Whether it was stored: a tile larger than the bound is refused.
        """
        assert features.tokens.shape[0] == features.deepstack.shape[1] == 1, "one tile at a time"
        size = features.tokens.nbytes + features.deepstack.nbytes
        if size > self._ledger.max_bytes:
            with self._lock:
                self._counts["refused"] += 1
            return False
        tile = _copy(features, "cpu" if self._location == "host" else None)
        with self._lock:
            evicted = self._ledger.add(key, size, relevance)
            assert evicted is not None, "sizes within the bound are stored"
            self._tiles[key] = tile
            self._counts["puts"] += 1
            self._drop(evicted)
        return True

    def evict_low_relevance(self, threshold: float) -> int:
        """Drop the tiles whose score is now below `threshold`; returns how many."""
        with self._lock:
            evicted = self._ledger.evict_low_relevance(threshold)
            self._drop(evicted)
        return len(evicted)

    def clear(self) -> None:
        """Drop every tile; the counters stay, and this counts as no eviction."""
        with self._lock:
            self._ledger.clear()
            self._tiles.clear()

    def stats(self) -> CacheStats:
        """Counters since the cache was made, and what it holds now."""
        with self._lock:
            return CacheStats(
                hits=self._hits.total(),
                misses=self._misses.total(),
                puts=self._counts["puts"],
                evictions=self._counts["evictions"],
                refused=self._counts["refused"],
                entries=len(self._ledger),
                bytes=self._ledger.used,
                max_bytes=self._ledger.max_bytes,
                hits_by_lod=dict(self._hits),
                misses_by_lod=dict(self._misses),
            )

    def _look_up(self, key: TileKey, relevance: float) -> Features | None:
        tile = self._tiles.get(key)
        if tile is None:
            self._misses[key.lod] += 1
            return None
        self._hits[key.lod] += 1
        self._ledger.touch(key, relevance)
        return tile

    def _drop(self, keys: Sequence[TileKey]) -> None:
        for key in keys:
            del self._tiles[key]
        self._counts["evictions"] += len(keys)
        assert len(self._tiles) == len(self._ledger), "tensors and ledger disagree"


def _copy(features: Features, device: torch.device | str | None) -> Features:
    """Contiguous copies that share memory with nothing."""

    def copy(tensor: Tensor) -> Tensor:
        target = tensor.device if device is None else device
        return tensor.detach().to(target, copy=True, memory_format=torch.contiguous_format)

    return Features(copy(features.tokens), copy(features.deepstack))
