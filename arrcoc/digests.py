"""Digests of files, read in pieces, as `hashlib.file_digest` of Python 3.11 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

_PIECE = 1 << 20


class Digest(Protocol):
    """A digest of `hashlib`."""

    def update(self, data: Any, /) -> None:
        """Take in bytes."""

    def hexdigest(self) -> str:
        """The digest of all taken in so far, in hex."""
        ...


def file_digest(path: Path, digest: Digest) -> str:
    """Hex digest of a file's bytes.

    Args:
        path: the file.
        digest: a new one, such as `hashlib.sha256()`.
    """
    piece = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()
