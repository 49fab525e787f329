"""A folder that several processes write to: one at a time, each knowing when another has."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"


class SharedFolder:
    """An advisory lock on a folder, with a mark of who wrote last.

    The lock goes with the process that holds it, however it ends. Where the system has no `flock` there is
    no lock: processes then keep the bound of the folder only approximately.
    """

    def __init__(self, path: Path) -> None:
        """Args: the folder, which exists."""
        self.path = path
        self._mark = b""
        self._flock = _flock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes and threads from writing.

        Raises:
            OSError: the lock file cannot be written.
        """
        handle = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if self._flock is not None:
                self._flock.flock(handle, self._flock.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def changed_by_others(self) -> bool:
        """Whether another process has marked the folder since this one did."""
        try:
            return (self.path / LOCK_FILE).read_bytes() != self._mark
        except FileNotFoundError:
            return self._mark != b""

    def accept(self) -> None:
        """Take the folder as known, as it is now."""
        try:
            self._mark = (self.path / LOCK_FILE).read_bytes()
        except FileNotFoundError:
            self._mark = b""

    def mark(self) -> None:
        """Let other processes know that this one is about to change the folder; under the lock only."""
        self._mark = os.urandom(8)
        with (self.path / LOCK_FILE).open("r+b") as file:
            file.write(self._mark)


def _flock() -> Any:
    try:
        return importlib.import_module("fcntl")
    except ImportError:
        return None
