"""What a cached tile is known by, and what a cache counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


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


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier of a cache.

    Attributes:
        state: "on", or "off: " and why.
        hits: tiles found here.
        stored: tiles that came in, from an engine or from another tier.
        left: tiles that left for another tier or for good.
        entries: tiles held.
        bytes: bytes held.
        max_bytes: the bound.
    """

    state: str
    hits: int
    stored: int
    left: int
    entries: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a cache since it was made, and what it holds now.

    Attributes:
        hits, misses: keys asked for and found in some tier, or not found.
        puts: tiles stored by an engine's work.
        evictions: tiles that left memory, for space or for low relevance.
        refused: tiles not stored: larger than the bounds, or of another kind than those held.
        entries: tiles held in memory.
        bytes: bytes held in memory, device and host.
        max_bytes: their bound.
        hits_by_lod, misses_by_lod: the same hits and misses, by level of detail.
        prefetched: tiles stored ahead of being asked for; part of `puts`.
        prefetch_hits: how many of them were asked for later, each counted once.
        tiers: by name, fastest first: "device", "host", "disk"; only those with a bound above 0.
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
    prefetched: int
    prefetch_hits: int
    tiers: Mapping[str, TierStats]

    @property
    def hit_rate(self) -> float:
        """Hits over keys asked for, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)
