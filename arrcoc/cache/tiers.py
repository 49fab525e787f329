"""Where each key is held among tiers of memory: bookkeeping without tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic

from arrcoc.cache.ledger import K, Ledger, Moved


class TierLedger(Generic[K]):
    """One `Ledger` for each tier, fastest first; a key is in one of them or in none.

    Scores are comparable across tiers: a key takes its score along, and all tiers decay alike. New keys go
    to the fastest tier that is large enough for them. A key that a tier evicts is offered to the next one,
    which keeps those with the most score per byte; from the last one it is gone.

    Args:
        bounds: bytes of each tier; 0 is no tier.
        half_life: uses after which a score has halved.
    """

    def __init__(self, bounds: Sequence[int], half_life: float) -> None:
        self.tiers: tuple[Ledger[K], ...] = tuple(Ledger(bound, half_life) for bound in bounds)

    def __len__(self) -> int:
        """Number of keys held."""
        return sum(len(tier) for tier in self.tiers)

    @property
    def used(self) -> int:
        """Bytes held in all tiers."""
        return sum(tier.used for tier in self.tiers)

    @property
    def max_bytes(self) -> int:
        """Sum of the bounds."""
        return sum(tier.max_bytes for tier in self.tiers)

    def where(self, key: K) -> int | None:
        """The tier that holds `key`."""
        return next((place for place, tier in enumerate(self.tiers) if key in tier), None)

    def advance(self) -> None:
        """Count one use of the whole: every score decays."""
        for tier in self.tiers:
            tier.advance()

    def use(self, key: K, relevance: float) -> int | None:
        """Count a use of `key`, if it is held; returns its tier."""
        place = self.where(key)
        if place is not None:
            self.tiers[place].touch(key, relevance)
        return place

    def add(self, key: K, size: int, relevance: float, level: float = -math.inf) -> list[Moved[K]]:
        """Store a key that is in no tier.

        Args:
            key: the key.
            size: in bytes.
            relevance: of its first use.
            level: log2 of the score that it has from elsewhere.

        Returns:
            Every key whose tier changed, `key` first; none where it is too large for every tier.
        """
        assert self.where(key) is None, key
        for place, tier in enumerate(self.tiers):
            if size <= tier.max_bytes:
                evicted = tier.make_room(size)
                tier.add(key, size, relevance)
                tier.lift(key, level)
                return [Moved(key, size, tier.level(key)), *self._demote(evicted, place + 1)]
        return []

    def promote(self, key: K) -> list[Moved[K]]:
        """Move a held key to the fastest tier, if its score per byte earns it a place there.

        Returns:
            Every key whose tier changed; none where `key` stays.
        """
        place = self.where(key)
        assert place is not None, key
        if place == 0:
            return []
        source, size = self.tiers[place], self.tiers[place].size(key)
        evicted = self.tiers[0].admit(key, size, source.level(key))
        if evicted is None:
            return []
        level = source.take(key)
        return [Moved(key, size, level), *self._demote(evicted, 1)]

    def _demote(self, left: Sequence[Moved[K]], place: int) -> list[Moved[K]]:
        """Offer what left a tier to tier `place`, and what leaves that one to the next; all that moved."""
        if place == len(self.tiers) or not left:
            return list(left)
        below = list[Moved[K]]()
        for moved in left:
            evicted = self.tiers[place].admit(moved.key, moved.size, moved.level)
            below += [moved] if evicted is None else evicted
        return [*left, *self._demote(below, place + 1)]

    def evict_low_relevance(self, threshold: float) -> list[K]:
        """Forget the keys whose score is now below `threshold`, in every tier, and return them."""
        return [key for tier in self.tiers for key in tier.evict_low_relevance(threshold)]

    def clear(self) -> None:
        """Forget every key."""
        for tier in self.tiers:
            tier.clear()
