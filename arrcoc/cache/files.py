"""One tile in one safetensors file: written whole or not at all, and verified when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from arrcoc.cache.keys import TileKey

SUFFIX, PARTIAL = ".safetensors", ".partial"
_FORMAT = "arrcoc tile 1"
_NAME = "planes"


class DamagedFileError(Exception):
    """A file does not hold what its name and its checksum say."""


def file_name(key: TileKey) -> str:
    """The file of a key: a 128-bit hash of all that it covers, the engine's fingerprint included."""
    return hashlib.blake2b(_identity(key).encode(), digest_size=16).hexdigest() + SUFFIX


def dump(key: TileKey, planes: Tensor, level: float) -> bytes:
    """A file's bytes.

    Args:
        key: the tile's key.
        planes: [1 + L, m, D] on the CPU, contiguous: tokens, then DeepStack planes.
        level: log2 of its score.
    """
    facts = {"format": _FORMAT, "key": _identity(key), "level": repr(level), "crc32": _checksum(key, planes)}
    return safetensors.torch.save({_NAME: planes}, facts)


def parse(key: TileKey, data: bytes) -> Tensor:
    """The planes [1 + L, m, D] in a file's bytes.

    Raises:
        DamagedFileError: they are not those of `key`, or were changed since they were written.
    """
    try:
        facts = _facts(data)
        (planes,) = safetensors.torch.load(data).values()
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise DamagedFileError(f"{type(error).__name__}: {error}") from error
    if facts.get("key") != _identity(key):
        raise DamagedFileError("it is of another tile")
    if facts.get("crc32") != _checksum(key, planes):
        raise DamagedFileError("its checksum does not match")
    return planes


def read_level(path: Path) -> float:
    """The score's log2 in a file's header.

    Raises:
        DamagedFileError: the header cannot be read.
        OSError: the file cannot.
    """
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        data = start + file.read(min(size, 1 << 16))
    try:
        return float(_facts(data)["level"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{type(error).__name__}: {error}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


def _facts(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    facts: dict[str, Any] = json.loads(data[8 : 8 + size])["__metadata__"]
    if facts["format"] != _FORMAT:
        raise ValueError(f"format {facts['format']!r}")
    return facts


def _identity(key: TileKey) -> str:
    return f"{'.'.join(map(str, key.content))} lod={key.lod} engine={key.engine}"


def _checksum(key: TileKey, planes: Tensor) -> str:
    """CRC-32 of the data, and of what says how to read it: against damage, not against an adversary."""
    about = f"{_identity(key)} {planes.dtype} {tuple(planes.shape)}".encode()
    data: Any = planes.contiguous().flatten().view(torch.uint8).numpy()
    return f"{zlib.crc32(data, zlib.crc32(about)):08x}"
