"""The tile cache that a configuration asks for."""

from __future__ import annotations

import os
from pathlib import Path

from arrcoc.cache.disk import DiskTier
from arrcoc.cache.tile_cache import TileCache
from arrcoc.config import Config


def open_cache(config: Config) -> TileCache:
    """Make a cache.

    Raises:
        ConfigError: the folder of the tier on disk cannot be made or written to.
    """
    disk = None
    if config.cache_disk_bytes:
        folder = Path(config.cache_disk_path) if config.cache_disk_path else default_folder()
        disk = DiskTier(folder, config.cache_disk_bytes, config.cache_half_life, config.cache_disk_ttl)
    return TileCache(
        config.cache_bytes, config.cache_half_life, config.cache_location, config.cache_host_bytes, disk
    )


def default_folder() -> Path:
    """Where tiles lie on disk if no folder is named: in the user's cache folder (XDG Base Directory)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arrcoc" / "tiles"
