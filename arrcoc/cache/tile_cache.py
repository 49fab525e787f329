"""The tile cache: encoded tiles, kept by how relevant they have been lately for the bytes they take."""

from __future__ import annotations

import atexit
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from arrcoc.cache.arena import arrange
from arrcoc.cache.disk import DiskTier
from arrcoc.cache.keys import CacheStats, TileKey
from arrcoc.cache.tiered_memory import TieredMemory
from arrcoc.records import Features


@dataclass(frozen=True, slots=True)
class Found:
    """What a cache had.

    Attributes:
        places: which of the keys asked for were found, ascending.
        features: their features in that order, as a copy of one's own; None where none was found.
    """

    places: list[int]
    features: Features | None


class TileCache:
    """Features of encoded tiles by `TileKey`, in tiers: device, pinned host memory, disk.

    Every use adds the tile's relevance to its score, scores decay, and where a tier needs space the lowest
    score per byte moves on to the next one (see `TierLedger`); a tile that is found is moved up again.
    Threads may share a cache, each on a CUDA stream of its own: what one stream writes, another reads only
    when it is there.

    Args:
        max_bytes: bound of the bytes held in the first tier; 0 with no host tier switches the cache off.
        half_life: calls of `get` after which a score has halved.
        location: "device" keeps tiles where they were made; "host" has no tier there and adds `max_bytes`
            to the host's.
        host_bytes: bound of the tier in host memory; 0 for none.
        disk: the tier on disk, for what memory has no room for; None for none.
    """

    def __init__(
        self,
        max_bytes: int,
        half_life: float,
        location: Literal["device", "host"] = "device",
        host_bytes: int = 0,
        disk: DiskTier | None = None,
    ) -> None:
        bounds = (max_bytes, host_bytes) if location == "device" else (0, max_bytes + host_bytes)
        self._memory = TieredMemory(bounds, half_life, disk)
        self._disk = disk
        self._lock = self._memory.lock
        self._ahead: set[TileKey] = set()  # prefetched, and not asked for yet
        self._counts: Counter[str] = Counter()
        self._hits: Counter[int] = Counter()
        self._misses: Counter[int] = Counter()
        self._closed = False
        if disk is not None:
            atexit.register(_close, weakref.ref(self))
            # A cache that is dropped without being closed leaves no thread behind.
            weakref.finalize(self, disk.close).atexit = False

    def get(
        self, keys: Sequence[TileKey], relevance: Sequence[float], device: torch.device | str = "cpu"
    ) -> Found:
        """Look up tiles of one side; a hit adds the tile's relevance to its score.

        The call is one use of the cache, however many tiles it asks for.

        Args:
            keys: one key for each tile; the same key may come more than once.
            relevance: relevance of each tile, at least 0.
            device: the model's device.

        Returns:
            Those found, bit-equal to what was put.
        """
        weights = dict.fromkeys(keys, 0.0)
        for key, gain in zip(keys, relevance, strict=True):
            weights[key] += gain
        with self._lock:
            held = self._memory.use(weights)
            asked = [key for key in keys if key in held]
            parts = [self._memory.read(asked)] if asked else []
        if self._disk is not None:
            asked += self._load(self._disk, weights, held, torch.device(device), parts)
        places = [place for place, key in enumerate(keys) if key in held]
        self._count(keys, held)
        if not places:
            return Found([], None)
        row = {key: row for row, key in enumerate(asked)}
        return Found(places, arrange(parts, [row[keys[place]] for place in places]))

    def put(
        self,
        keys: Sequence[TileKey],
        features: Features,
        relevance: Sequence[float],
        ahead: bool = False,
    ) -> int:
        """Store a copy of K tiles of one side, moving others on where space is needed.

        A tile that is held already is used once more; its features are the same by what a key covers.

        Args:
            keys: K different keys.
            features: tokens [K, m, D], planes [L, K, m, D].
            relevance: of each tile, at least 0.
            ahead: whether they were encoded before anybody asked for them.

        Returns:
            How many are held now: a tile larger than every tier is refused.
        """
        assert len(keys) == len(set(keys)) == features.tokens.shape[0] == features.deepstack.shape[1]
        with self._lock:
            stored, refused = self._memory.add(keys, features, relevance)
            self._counts["puts"] += len(stored)
            self._counts["refused"] += refused
            if ahead:
                self._ahead.update(stored)
                self._counts["prefetched"] += len(stored)
            return len(self._memory.use(dict.fromkeys(keys, 0.0), advance=False))

    def missing(self, keys: Iterable[TileKey]) -> list[TileKey]:
        """Those of some keys that no tier holds, each once; counts as no use."""
        with self._lock:
            held = self._memory.use(dict.fromkeys(keys, 0.0), advance=False)
        disk = self._disk
        return [key for key in dict.fromkeys(keys) if key not in held and (disk is None or key not in disk)]

    def evict_low_relevance(self, threshold: float) -> int:
        """Drop the tiles in memory whose score is now below `threshold`; returns how many."""
        with self._lock:
            return self._memory.evict_low_relevance(threshold)

    def clear(self) -> None:
        """Drop every tile of every tier; the counters stay, and this counts as no eviction."""
        with self._lock:
            self._memory.clear()
        if self._disk is not None:
            self._disk.clear()

    def close(self) -> None:
        """Write what memory holds to disk, highest score first and as far as there is room, and stop writing.

        Without a tier on disk this does nothing. A closed cache can be used on; no tile goes to disk then.
        """
        with self._lock:
            disk = None if self._closed else self._disk
            self._closed = True
        if disk is not None:
            disk.close()
            self._memory.write_out(disk)

    def stats(self) -> CacheStats:
        """Counters since the cache was made, and what it holds now."""
        with self._lock:
            tiers = self._memory.stats()
            if self._disk is not None:
                tiers["disk"] = self._disk.stats()
            ledger = self._memory.ledger
            return CacheStats(
                hits=self._hits.total(),
                misses=self._misses.total(),
                puts=self._counts["puts"],
                evictions=self._memory.evictions,
                refused=self._counts["refused"],
                entries=len(ledger),
                bytes=ledger.used,
                max_bytes=ledger.max_bytes,
                hits_by_lod=dict(self._hits),
                misses_by_lod=dict(self._misses),
                prefetched=self._counts["prefetched"],
                prefetch_hits=self._counts["prefetch_hits"],
                tiers=tiers,
            )

    def _load(
        self,
        disk: DiskTier,
        weights: Mapping[TileKey, float],
        held: set[TileKey],
        device: torch.device,
        parts: list[Features],
    ) -> list[TileKey]:
        """Bring tiles from disk into memory; adds them to `held` and `parts`, and returns them."""
        disk.advance()
        disk.touch([key for key in weights if key in held], [weights[key] for key in weights if key in held])
        if len(held) == len(weights):
            return []
        disk.refresh()
        tiles = {key: disk.load(key, gain) for key, gain in weights.items() if key not in held}
        there = {key: tile for key, tile in tiles.items() if tile is not None}
        if not there:
            return []
        planes = torch.stack([tile for tile, _ in there.values()], dim=1)
        if device.type == "cuda":
            planes = planes.pin_memory().to(device, non_blocking=True)
        features = Features(planes[0], planes[1:])
        with self._lock:
            levels = [level for _, level in there.values()]
            self._memory.add(list(there), features, [weights[key] for key in there], levels)
        held.update(there)
        parts.append(features)
        return list(there)

    def _count(self, keys: Sequence[TileKey], held: set[TileKey]) -> None:
        with self._lock:
            for key in keys:
                (self._hits if key in held else self._misses)[key.lod] += 1
            early = self._ahead & held
            self._counts["prefetch_hits"] += len(early & set(keys))
            self._ahead -= early


def _close(reference: weakref.ref[TileCache]) -> None:
    cache = reference()
    if cache is not None:
        cache.close()
