"""The tile cache, in tiers: device, pinned host memory, disk."""

from arrcoc.cache.arena import arrange
from arrcoc.cache.disk import DiskTier
from arrcoc.cache.fences import upload
from arrcoc.cache.keys import CacheStats, TierStats, TileKey
from arrcoc.cache.ledger import Ledger, Moved
from arrcoc.cache.opening import open_cache
from arrcoc.cache.tiers import TierLedger
from arrcoc.cache.tile_cache import Found, TileCache

__all__ = [
    "CacheStats",
    "DiskTier",
    "Found",
    "Ledger",
    "Moved",
    "TierLedger",
    "TierStats",
    "TileCache",
    "TileKey",
    "arrange",
    "open_cache",
    "upload",
]
