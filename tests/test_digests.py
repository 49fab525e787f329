"""Digests of files are those of their bytes, whatever the size of the pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from arrcoc import digests


@pytest.mark.parametrize("size", [0, 1, 4, 5, 8])
def test_a_files_digest_is_that_of_its_bytes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_PIECE", 4)
    data = bytes(range(size))
    (tmp_path / "data").write_bytes(data)
    assert digests.file_digest(tmp_path / "data", hashlib.sha256()) == hashlib.sha256(data).hexdigest()
    blake = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert digests.file_digest(tmp_path / "data", hashlib.blake2b(digest_size=16)) == blake
