"""Which keys are stored, and who leaves when space is needed: bookkeeping without tensors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Moved(Generic[K]):
    """A key that entered or left a ledger: `size` in bytes, and `level`, log2 of its decayed score then."""

    key: K
    size: int
    level: float


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
        return math.pow(2.0, self.level(key))

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
        evicted = [gone for gone, _ in self._make_room(size)]
        entry = _Entry(size, old.weight if old else -math.inf, old.order if old else self._stored)
        entry.weight = self._grown(entry.weight, relevance)
        self._stored += old is None
        self._insert(key, entry)
        assert self.used <= self.max_bytes, f"{self.used} bytes in use, bound {self.max_bytes}"
        return evicted

    def make_room(self, size: int) -> list[Moved[K]]:
        """Evict keys until `size` more bytes fit, the lowest score per byte first."""
        assert size <= self.max_bytes, size
        return [self._moved(key, entry) for key, entry in self._make_room(size)]

    def admit(self, key: K, size: int, level: float) -> list[Moved[K]] | None:
        """Store a key that comes with a past, if it is worth its bytes; it must not be stored already.

        Args:
            key: the key.
            size: in bytes.
            level: log2 of its decayed score now, as `level` gave it elsewhere.

        Returns:
            Who leaves for it, or None where all that would have to leave score higher per byte or `size`
            exceeds the bound: nothing has changed then.
        """
        assert key not in self, key
        assert size > 0, size
        if size > self.max_bytes:
            return None
        self._insert(key, _Entry(size, level + self._clock / self.half_life, self._stored))
        self._stored += 1
        left = self._make_room(0)
        if all(gone != key for gone, _ in left):
            return [self._moved(gone, entry) for gone, entry in left]
        for gone, entry in left:
            if gone != key:
                self._insert(gone, entry)
        return None

    def lift(self, key: K, level: float) -> None:
        """Add a score of 2 ** `level` to that of a stored key."""
        entry = self._entries[key]
        entry.weight = _log2_sum(entry.weight, level + self._clock / self.half_life)
        self._enqueue(key, entry)

    def take(self, key: K) -> float:
        """Forget a stored key; returns its `level`."""
        level = self.level(key)
        self._remove(key)
        return level

    def level(self, key: K) -> float:
        """log2 of the decayed score of a stored key, as of now; -inf for a score of 0."""
        return self._entries[key].weight - self._clock / self.half_life

    def size(self, key: K) -> int:
        """Bytes of a stored key."""
        return self._entries[key].size

    def ranked(self) -> list[K]:
        """Stored keys, highest score first; of equal scores the oldest first."""
        return sorted(self._entries, key=lambda key: (-self._entries[key].weight, self._entries[key].order))

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
        return _log2_sum(weight, math.log2(relevance) + self._clock / self.half_life)

    def _insert(self, key: K, entry: _Entry) -> None:
        self._entries[key] = entry
        self.used += entry.size
        self._enqueue(key, entry)

    def _moved(self, key: K, entry: _Entry) -> Moved[K]:
        return Moved(key, entry.size, entry.weight - self._clock / self.half_life)

    def _make_room(self, size: int) -> list[tuple[K, _Entry]]:
        evicted = []
        while self.used + size > self.max_bytes:
            rank, key = heapq.heappop(self._queue)
            entry = self._entries.get(key)
            # A rank that is no longer the entry's own was left behind by a later use.
            if entry is not None and entry.rank == rank:
                self._remove(key)
                evicted.append((key, entry))
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


def _log2_sum(a: float, b: float) -> float:
    """log2(2**a + 2**b), also where the powers are out of range; either may be -inf."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(2.0 ** (low - high)) / math.log(2)
