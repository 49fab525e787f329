"""The tier on disk: a folder of tiles, bounded, with a time to live, shared between processes."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from arrcoc.cache import files
from arrcoc.cache.folder import SharedFolder
from arrcoc.cache.keys import TierStats, TileKey
from arrcoc.cache.ledger import Ledger, Moved
from arrcoc.cache.worker import Worker
from arrcoc.errors import ConfigError

logger = logging.getLogger(__name__)

QUEUE_BYTES = 64 << 20
"""Most bytes of tiles that wait to be written; more are dropped."""
_ABANDONED_SECONDS = 900.0  # after which an unfinished file is taken for one of a process that was killed


class _Pending:
    """A tile on its way to disk: read from memory once, by whoever needs it first."""

    def __init__(self, level: float, read: Callable[[], Tensor]) -> None:
        self.level, self._read = level, read
        self._planes: Tensor | None = None
        self._lock = threading.Lock()

    def planes(self) -> Tensor:
        with self._lock:
            if self._planes is None:
                self._planes = self._read()
            return self._planes


class DiskTier:
    """Tiles in safetensors files, within a byte bound.

    Reading happens on the caller's thread and verifies key and checksum; a damaged file is dropped with a
    warning. Writing happens on a thread of its own and never waits for space in its queue. Where writing
    fails, for want of space for example, the tier switches itself off and says so once.
    """

    def __init__(self, path: Path, max_bytes: int, half_life: float, ttl: float) -> None:
        """Open a folder, and take up what it holds.

        Args:
            path: the folder; made where it is missing.
            max_bytes: bound of the files' sizes, of all processes that share the folder.
            half_life: uses of the cache after which a score has halved.
            ttl: seconds after which a file is dropped, counted from its writing.

        Raises:
            ConfigError: the folder cannot be made or read.
        """
        self.ttl, self.state = ttl, "on"
        self._lock = threading.RLock()
        self._ledger: Ledger[str] = Ledger(max_bytes, half_life)
        self._written: dict[str, float] = {}  # when, of every file that is there, oldest first
        self._pending: dict[TileKey, _Pending] = {}
        self._counts: Counter[str] = Counter()
        self._worker = Worker("arrcoc-disk-cache", QUEUE_BYTES)
        self._folder = SharedFolder(path)
        self._looking = False  # whether the background thread has been asked to look at the folder
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self._folder.locked():
                self._rescan()
        except OSError as error:
            given = f"cache_disk_path {str(path)!r}: {error.strerror}"
            raise ConfigError(given, "a folder that can be written to", "Name another one") from error

    def __contains__(self, key: TileKey) -> bool:
        """Whether a tile is there or on its way, as far as this process knows."""
        return key in self._pending or files.file_name(key) in self._written

    def advance(self) -> None:
        """Count one use of the cache: every score decays."""
        with self._lock:
            self._ledger.advance()

    def touch(self, keys: Sequence[TileKey], relevance: Sequence[float]) -> None:
        """Count uses of tiles that are held in memory, too, if they are here."""
        with self._lock:
            for key, gain in zip(keys, relevance, strict=True):
                name = files.file_name(key)
                if name in self._ledger:
                    self._ledger.touch(name, gain)

    def refresh(self) -> None:
        """Let the background thread look at the folder again if another process has changed it."""
        if self.state == "on" and not self._looking and self._folder.changed_by_others():
            self._looking = self._worker.offer(lambda: self._guarded(self._look_again), 1)

    def load(self, key: TileKey, relevance: float) -> tuple[Tensor, float] | None:
        """A tile's planes [1 + L, m, D] in host memory and log2 of its score, or None.

        A file that is damaged is removed, with a warning; one that is too old is removed.
        """
        name, pending = files.file_name(key), self._pending.get(key)
        if pending is not None:
            self._counts["hits"] += 1
            return pending.planes(), pending.level
        with self._lock:
            written = self._written.get(name)
            if written is None or name not in self._ledger:  # which it leaves before the file is removed
                return None
            if written + self.ttl < time.time():
                self._expire()
                return None
            level = self._ledger.level(name)
            self._ledger.touch(name, relevance)
        try:
            planes = files.parse(key, (self._folder.path / name).read_bytes())
        except OSError:  # another process has removed it
            self._forget(name)
            return None
        except files.DamagedFileError as error:
            logger.warning("Cached tile %s is damaged (%s): it is dropped and encoded again", name, error)
            self._remove(name)
            self._counts["damaged"] += 1
            return None
        self._counts["hits"] += 1
        return planes, level

    def offer(self, key: TileKey, level: float, size: int, read: Callable[[], Tensor]) -> bool:
        """Have a tile written in the background.

        Args:
            key: the tile's key.
            level: log2 of its score.
            size: bytes of its features.
            read: gives its planes [1 + L, m, D] on the CPU; called once, on the background thread or by
                `load`, if and only if this returns True.

        Returns:
            Whether it is going to be written: not where the queue is full or the tier is off.
        """
        if self.state != "on" or key in self._pending:
            return False
        pending = self._pending[key] = _Pending(level, read)
        queued = self._worker.offer(lambda: self._write(key, pending), size)
        if not queued:
            del self._pending[key]
        return queued

    def store(self, key: TileKey, planes: Tensor, level: float) -> bool:
        """Write a tile now, on this thread, if its score earns it a place; returns whether it is there."""
        if self.state == "on" and key not in self:
            self._guarded(lambda: self._store(key, planes, level))
        return self.state == "on" and key in self

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that is queued is written; False if that took longer than `timeout` seconds."""
        return self._worker.flush(timeout)

    def close(self) -> None:
        """Write what is queued, then stop."""
        self._worker.close()

    def clear(self) -> None:
        """Remove every file, those of other processes too."""
        with self._lock:
            for name in list(self._written):
                self._remove(name)

    def stats(self) -> TierStats:
        """Counters since the tier was opened, and what it holds."""
        with self._lock:
            count = self._counts
            return TierStats(
                state=self.state,
                hits=count["hits"],
                stored=count["stored"],
                left=count["left"],
                entries=len(self._written),
                bytes=self._ledger.used,
                max_bytes=self._ledger.max_bytes,
            )

    def _write(self, key: TileKey, pending: _Pending) -> None:
        try:
            planes = pending.planes()
            if self.state == "on":
                self._guarded(lambda: self._store(key, planes, pending.level))
        finally:
            del self._pending[key]

    def _guarded(self, change: Callable[[], None]) -> None:
        try:
            change()
        except OSError as error:
            self._switch_off(error)

    def _switch_off(self, error: OSError) -> None:
        with self._lock:
            if self.state != "on":
                return
            self.state = f"off: {error.strerror or error}"
            self._ledger.clear()
            self._written.clear()
        logger.warning("The tile cache on disk (%s) is switched off: %s", self._folder.path, error)

    def _look_again(self) -> None:
        self._looking = False
        with self._folder.locked():
            self._rescan()

    def _store(self, key: TileKey, planes: Tensor, level: float) -> None:
        name, data = files.file_name(key), files.dump(key, planes, level)
        with self._folder.locked():
            if self._folder.changed_by_others():
                self._rescan()
            with self._lock:
                self._expire()
                evicted = None if name in self._ledger else self._ledger.admit(name, len(data), level)
            if evicted is None:
                return
            self._folder.mark()
            self._unlink(evicted)
            try:
                files.write_whole(self._folder.path / name, data)
            except BaseException:
                self._forget(name)
                raise
            with self._lock:
                self._written[name] = time.time()
                self._counts["stored"] += 1

    def _rescan(self) -> None:
        """Bring the books in line with the folder; under its lock."""
        self._folder.accept()
        found: dict[str, tuple[float, int]] = {}
        for entry in self._folder.path.iterdir():
            with suppress(FileNotFoundError):
                about = entry.stat()
                if entry.suffix == files.PARTIAL and about.st_mtime + _ABANDONED_SECONDS < time.time():
                    entry.unlink()
                elif entry.suffix == files.SUFFIX:
                    found[entry.name] = about.st_mtime, about.st_size
        with self._lock:
            for name in self._written.keys() - found.keys():
                self._forget(name)
            for name in found.keys() - self._written.keys():
                self._adopt(name, found[name][1])
            known = sorted((found[name][0], name) for name in found if name in self._ledger)
            self._written = {name: written for written, name in known}
            self._expire()

    def _adopt(self, name: str, size: int) -> None:
        """Take up a file that another process has written, if its score earns it a place."""
        path = self._folder.path / name
        try:
            evicted = self._ledger.admit(name, max(size, 1), files.read_level(path))
        except FileNotFoundError:  # another process has dropped it since, as damaged or too old
            return
        except files.DamagedFileError as error:
            logger.warning("Cached tile %s is damaged (%s): it is dropped", name, error)
            evicted = None
        if evicted is None:
            path.unlink(missing_ok=True)
        else:
            self._unlink(evicted)

    def _expire(self) -> None:
        oldest = time.time() - self.ttl
        for name in [name for name, written in self._written.items() if written < oldest]:
            self._remove(name)

    def _unlink(self, left: Sequence[Moved[str]]) -> None:
        """Remove files that have left the ledger."""
        for moved in left:
            with self._lock:
                self._written.pop(moved.key, None)
                self._counts["left"] += 1
            (self._folder.path / moved.key).unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        self._forget(name)
        with suppress(OSError):
            (self._folder.path / name).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with self._lock:
            if name in self._ledger:
                self._ledger.take(name)
                self._counts["left"] += 1
            self._written.pop(name, None)
