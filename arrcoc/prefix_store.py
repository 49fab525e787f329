"""The prefixes of several images, kept within a byte bound."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from arrcoc.cache import Ledger
from arrcoc.config import Config
from arrcoc.prefixes import Prefix


class PrefixKey(NamedTuple):
    """Everything that a prefix of one engine depends on.

    Attributes:
        content: digest of the frame at LOD background, from which every overview is made.
        config: the configuration that laid the frame out.
        stride: glimpse tokens along each axis to one token of the overview.
        head: token ids before the overview.
    """

    content: bytes
    config: Config
    stride: int
    head: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Counters of a store since it was made, and what it holds now.

    Attributes:
        hits, misses: prefixes asked for and found, or not found.
        evictions: prefixes that left, for space.
        refused: prefixes larger than the bound, not stored.
        entries: prefixes held.
        bytes: bytes held, counted as if all layers had run.
        max_bytes: the bound.
    """

    hits: int
    misses: int
    evictions: int
    refused: int
    entries: int
    bytes: int
    max_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits over prefixes asked for, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class PrefixStore:
    """Prefixes of several images within a byte bound; safe to share between threads.

    Every use adds its relevance to the prefix's score, scores decay, and the lowest score per byte leaves
    when space is needed (see `arrcoc.cache.Ledger`). A request that uses a prefix keeps it alive.

    Args:
        max_bytes: bound of the bytes held; 0 stores nothing.
        half_life: uses of the store after which a score has halved.
    """

    def __init__(self, max_bytes: int, half_life: float) -> None:
        self._ledger: Ledger[PrefixKey] = Ledger(max_bytes, half_life)
        self._prefixes: dict[PrefixKey, Prefix] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """The bound of the bytes held."""
        return self._ledger.max_bytes

    def __len__(self) -> int:
        """Number of prefixes held."""
        with self._lock:
            return len(self._prefixes)

    def get(self, key: PrefixKey) -> Prefix | None:
        """The prefix stored under `key`, or None."""
        with self._lock:
            found = self._prefixes.get(key)
            self._counts["misses" if found is None else "hits"] += 1
            return found

    def use(self, key: PrefixKey, prefix: Prefix, relevance: float) -> Prefix:
        """Store a prefix, if it is not yet, and count a use.

        Args:
            key: what it depends on.
            prefix: the prefix.
            relevance: what the use adds to its score: the sum over the image's tiles of their relevance,
                which over the bytes is their mean, as for tiles in the tile cache.

        Returns:
            The prefix stored under `key`: another thread's, if that was first.
        """
        with self._lock:
            self._ledger.advance()
            held = self._prefixes.get(key)
            if held is not None:
                self._ledger.touch(key, relevance)
                return held
            evicted = self._ledger.add(key, prefix.nbytes, relevance)
            if evicted is None:
                self._counts["refused"] += 1
                return prefix
            self._prefixes[key] = prefix
            for old in evicted:
                del self._prefixes[old]
            self._counts["evictions"] += len(evicted)
            assert len(self._prefixes) == len(self._ledger), "prefixes and ledger disagree"
            return prefix

    def clear(self) -> None:
        """Drop every prefix; the counters stay, and this counts as no eviction."""
        with self._lock:
            self._ledger.clear()
            self._prefixes.clear()

    def stats(self) -> PrefixStats:
        """Counters since the store was made, and what it holds now."""
        with self._lock:
            return PrefixStats(
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                evictions=self._counts["evictions"],
                refused=self._counts["refused"],
                entries=len(self._prefixes),
                bytes=self._ledger.used,
                max_bytes=self._ledger.max_bytes,
            )
