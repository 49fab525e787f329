"""One tier of memory: which tiles it holds, on which pages, and when their data is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from arrcoc.cache.arena import DeviceArena, HostArena
from arrcoc.cache.fences import Ready
from arrcoc.cache.keys import TierStats, TileKey
from arrcoc.cache.ledger import Ledger
from arrcoc.cache.pages import Pages

A = TypeVar("A", DeviceArena, HostArena)


@dataclass(slots=True)
class Held:
    """A tile in a tier: its pages, and when they are filled."""

    pages: Pages
    ready: Ready | None = None


class MemoryTier(Generic[A]):
    """Tiles by key in one arena; the arena is made with the first tile."""

    def __init__(self, name: str, ledger: Ledger[TileKey]) -> None:
        """Args: a name for people, and the ledger that decides who stays."""
        self.name, self.ledger = name, ledger
        self.arena: A | None = None
        self.held: dict[TileKey, Held] = {}
        self.counts: Counter[str] = Counter()

    def hold(self, key: TileKey, held: Held) -> None:
        """Take in a tile that is being written to its pages."""
        assert key not in self.held, key
        self.held[key] = held
        self.counts["stored"] += 1

    def drop(self, key: TileKey, free: bool = True) -> Held:
        """Forget a tile; its pages are free, unless the caller still needs them and frees them later."""
        gone = self.held.pop(key)
        self.counts["left"] += 1
        if free:
            self.free(gone)
        return gone

    def free(self, gone: Held) -> None:
        """Return the pages of a tile that was dropped."""
        assert self.arena is not None
        self.arena.give(gone.pages)

    def stats(self) -> TierStats:
        """Counters since the tier was made, and what it holds."""
        assert len(self.held) == len(self.ledger), f"{self.name}: tensors and ledger disagree"
        return TierStats(
            state="on",
            hits=self.counts["hits"],
            stored=self.counts["stored"],
            left=self.counts["left"],
            entries=len(self.held),
            bytes=self.ledger.used,
            max_bytes=self.ledger.max_bytes,
        )
