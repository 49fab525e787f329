"""Tiles in two tiers of memory, device and host: the ledger decides, this moves the tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from arrcoc.cache.arena import DeviceArena, HostArena, Kind, arrange
from arrcoc.cache.disk import QUEUE_BYTES, DiskTier
from arrcoc.cache.fences import Ready
from arrcoc.cache.keys import TierStats, TileKey
from arrcoc.cache.ledger import Moved
from arrcoc.cache.memory import A, Held, MemoryTier
from arrcoc.cache.pages import Pages
from arrcoc.cache.tiers import TierLedger
from arrcoc.records import Features

DEVICE, HOST = 0, 1

Tier = MemoryTier[DeviceArena] | MemoryTier[HostArena]


class TieredMemory:
    """What `TileCache` holds in memory. Callers hold `lock` over every call but `write_out`.

    A tile that leaves memory keeps its pages until the disk's thread has written it; those pages come on
    top of the bounds, `QUEUE_BYTES` of them at most.
    """

    def __init__(self, bounds: tuple[int, int], half_life: float, disk: DiskTier | None) -> None:
        """Args: bytes on the device and in host memory, see `Ledger`, and where tiles go that leave."""
        self.lock = threading.RLock()
        self.ledger: TierLedger[TileKey] = TierLedger(bounds, half_life)
        self.evictions = 0
        self._device: MemoryTier[DeviceArena] = MemoryTier("device", self.ledger.tiers[DEVICE])
        self._host: MemoryTier[HostArena] = MemoryTier("host", self.ledger.tiers[HOST])
        self._disk = disk
        self._kind: Kind | None = None
        self._place = torch.device("cpu")
        # Copies to the host have streams of their own, so that no request waits for them.
        self._side: torch.cuda.Stream | None = None
        self._reader: torch.cuda.Stream | None = None

    def use(self, weights: Mapping[TileKey, float], advance: bool = True) -> set[TileKey]:
        """Count a use of those keys that are held, with their relevance; returns them.

        Args:
            weights: relevance by key.
            advance: whether scores decay by one use.
        """
        if advance:
            self.ledger.advance()
        return {key for key, gain in weights.items() if self.ledger.use(key, gain) is not None}

    def read(self, keys: Sequence[TileKey]) -> Features:
        """A copy of held tiles of one side, on the device; those from host memory move up."""
        above = [key for key in keys if key in self._device.held]
        below = list(dict.fromkeys(key for key in keys if key not in self._device.held))
        parts = []
        if above:
            self._device.counts["hits"] += len(above)
            parts.append(_arena(self._device).read(*_listed(self._device, above)))
        if below:
            self._host.counts["hits"] += len(below)
            found = _arena(self._host).read(*_listed(self._host, below))
            parts.append(found)
            moved = [one for key in below for one in self._promoted(key)]
            self._settle(moved, found, {key: row for row, key in enumerate(below)})
        row = {key: row for row, key in enumerate(below, len(above))}
        upper = iter(range(len(above)))
        return arrange(parts, [row[key] if key in row else next(upper) for key in keys])

    def add(
        self,
        keys: Sequence[TileKey],
        features: Features,
        relevance: Sequence[float],
        levels: Sequence[float] | None = None,
    ) -> tuple[list[TileKey], int]:
        """Store copies of tiles of one side; one that is held already is used once more.

        Args:
            keys: different keys.
            features: theirs, on the device.
            relevance: of each.
            levels: log2 of the score that each brings along; None for no past.

        Returns:
            The keys that are new, and how many were refused.
        """
        kind = Kind.of(features)
        size = features.tokens.shape[1] * kind.page_bytes
        if not self._accepts(kind, features.tokens.device):
            return [], len(keys)
        moved, new, refused = list[Moved[TileKey]](), list[TileKey](), 0
        pasts = levels if levels is not None else [float("-inf")] * len(keys)
        for key, gain, past in zip(keys, relevance, pasts, strict=True):
            if self.ledger.use(key, gain) is not None:
                continue
            changed = self.ledger.add(key, size, gain, past)
            moved += changed
            new += [key] if changed else []
            refused += not changed
        self._settle(moved, features, {key: row for row, key in enumerate(keys)})
        return new, refused

    def evict_low_relevance(self, threshold: float) -> int:
        """Drop tiles whose score is below a threshold; returns how many."""
        low = self.ledger.evict_low_relevance(threshold)
        for key in low:
            (self._device if key in self._device.held else self._host).drop(key)
        self.evictions += len(low)
        return len(low)

    def clear(self) -> None:
        """Drop every tile."""
        self.ledger.clear()
        for tier in (self._device, self._host):
            for key in list(tier.held):
                tier.drop(key)

    def write_out(self, disk: DiskTier) -> None:
        """Write tiles to disk on this thread, highest score first; they stay in memory."""
        for tier in (self._device, self._host):
            with self.lock:
                ranked = [(key, tier.ledger.level(key)) for key in tier.ledger.ranked() if key not in disk]
            for key, level in ranked:
                with self.lock:
                    held = tier.held.get(key)
                    planes = None if held is None else self._to_host(tier, held)
                if planes is not None:
                    disk.store(key, planes, level)

    def stats(self) -> dict[str, TierStats]:
        """By name, those tiers whose bound is above 0."""
        return {tier.name: tier.stats() for tier in (self._device, self._host) if tier.ledger.max_bytes}

    def _accepts(self, kind: Kind, place: torch.device) -> bool:
        """Whether tiles of a kind can be held: all are of the first one's. Makes the arenas."""
        if self._kind is None:
            slack = QUEUE_BYTES if self._disk is not None else 0
            self._kind, self._place = kind, place
            self._device.arena = DeviceArena(kind, place, self._device.ledger.max_bytes + slack)
            self._host.arena = HostArena(kind, place, self._host.ledger.max_bytes + slack)
            if place.type == "cuda":
                self._side, self._reader = (torch.cuda.Stream(place) for _ in range(2))  # type: ignore[no-untyped-call]
        return (kind, place) == (self._kind, self._place)

    def _promoted(self, key: TileKey) -> list[Moved[TileKey]]:
        # An earlier promotion may have pushed this one out of the host's tier.
        return self.ledger.promote(key) if self.ledger.where(key) is not None else []

    def _settle(
        self, moved: Sequence[Moved[TileKey]], features: Features, rows: Mapping[TileKey, int]
    ) -> None:
        """Bring tensors to where the ledger now has their keys; `features` holds what is not held yet."""
        if not moved:
            return
        device, host = _arena(self._device), _arena(self._host)
        last = {one.key: one for one in moved}
        where = {key: self.ledger.where(key) for key in last}
        down = [key for key, place in where.items() if place == HOST and key in self._device.held]
        tiles = device.read_flat(*_listed(self._device, down)) if down else []
        new = [key for key, place in where.items() if place == HOST and not self._holds(key)]
        tiles += _flat(features, [rows[key] for key in new]) if new else []
        for key, place in where.items():
            self._leave(last[key], place)
        up = [key for key, place in where.items() if place == DEVICE and key not in self._device.held]
        if up:
            self._write_device(device, up, _rows(features, [rows[key] for key in up]))
        if tiles:
            self._write_host(host, [*down, *new], tiles)

    def _holds(self, key: TileKey) -> bool:
        return key in self._device.held or key in self._host.held

    def _leave(self, moved: Moved[TileKey], place: int | None) -> None:
        """Take a key out of the tier that it is no longer in; the disk is offered what leaves memory."""
        self.evictions += place is None
        for number, tier in ((DEVICE, self._device), (HOST, self._host)):
            if place == number or moved.key not in tier.held:
                continue
            disk, held = self._disk, tier.held[moved.key]
            written = (
                place is None
                and disk is not None
                and moved.key not in disk
                and disk.offer(moved.key, moved.level, moved.size, partial(self._fetch, tier, held))
            )
            tier.drop(moved.key, free=not written)

    def _write_device(self, arena: DeviceArena, keys: Sequence[TileKey], features: Features) -> None:
        count = features.tokens.shape[1]
        pages = arena.take(count * len(keys))
        ready = arena.write(pages, features)
        for key, own in zip(keys, pages.reshape(len(keys), count), strict=True):
            self._device.hold(key, Held(own, ready))

    def _write_host(self, arena: HostArena, keys: Sequence[TileKey], tiles: Sequence[Tensor]) -> None:
        pages = [arena.take(tile.shape[1]) for tile in tiles]
        ready = self._copy_aside(arena, pages, tiles)
        for key, own in zip(keys, pages, strict=True):
            self._host.hold(key, Held(own, ready))

    def _copy_aside(self, arena: HostArena, pages: list[Pages], tiles: Sequence[Tensor]) -> Ready | None:
        """Copy to the host on the side stream, after what the current stream has done so far."""
        if self._side is None:
            return arena.write(pages, tiles)
        self._side.wait_stream(torch.cuda.current_stream(self._place))
        with torch.cuda.stream(self._side):
            ready = arena.write(pages, tiles)
        for tile in tiles:
            tile.record_stream(self._side)
        return ready

    def _fetch(self, tier: Tier, held: Held) -> Tensor:
        """A tile that left memory, for the disk; its pages are free from then on."""
        try:
            return self._to_host(tier, held)
        finally:
            with self.lock:
                tier.free(held)

    def _to_host(self, tier: Tier, held: Held) -> Tensor:
        """The planes [1 + L, m, D] of a tile in ordinary host memory; waits for the device."""
        arena = tier.arena
        assert arena is not None
        if isinstance(arena, HostArena):
            if held.ready is not None:
                held.ready.event.synchronize()
            return arena.read_to_host(held.pages)
        with torch.cuda.stream(self._reader):  # does nothing for None
            with self.lock:
                (tile,) = arena.read_flat([held.pages], [held.ready])
            return tile.cpu()


def _arena(tier: MemoryTier[A]) -> A:
    assert tier.arena is not None, "an arena is made before a tile is held"
    return tier.arena


def _listed(tier: Tier, keys: Sequence[TileKey]) -> tuple[list[Pages], list[Ready | None]]:
    held = [tier.held[key] for key in keys]
    return [one.pages for one in held], [one.ready for one in held]


def _rows(features: Features, rows: Sequence[int]) -> Features:
    """Some tiles of a record, in the order given."""
    return arrange([features], rows)


def _flat(features: Features, rows: Sequence[int]) -> list[Tensor]:
    """Some tiles of a record, each [1 + L, m, D] and contiguous."""
    some = _rows(features, rows)
    tiles = torch.cat([some.tokens[None], some.deepstack]).transpose(0, 1).contiguous()
    return list(tiles.unbind())
