"""JPEG files decoded by nvJPEG; what is unusual about a file sends it to the CPU.

The library is called itself (`arrcoc.nvjpeg`), or through torchvision where that does not work, whose pixels
are further from those of the CPU.

A file is taken if it is baseline, 8 bits, grey or YCbCr, one scan with all components, and its scan runs on
to the end marker without any other marker: nvJPEG may report success on files that end too early.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arrcoc import nvjpeg
from arrcoc.errors import ConfigError

logger = logging.getLogger(__name__)

Choice = Literal["auto", "cpu", "gpu"]
_START_OF_FRAME: Final = (0xC0, 0xC1)  # baseline and extended sequential, Huffman
_START_OF_SCAN: Final = 0xDA
_END_OF_IMAGE: Final = 0xD9
_OTHER_FRAMES: Final = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}  # progressive, lossless, arithmetic
_BARE_MARKERS: Final = frozenset({0x01, *range(0xD0, 0xDA)})  # of no length: never inside a header
_ADOBE: Final = 0xEE
_EXAMPLE: Final = (200, 100, 50)


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to nvJPEG.

    Attributes:
        name: for people.
        decode: (file, height, width) to uint8 [3, height, width] on the current stream.
    """

    name: str
    decode: Callable[[bytes, int, int], Tensor]


def chosen(choice: Choice, device: torch.device) -> bool:
    """Whether JPEG files are decoded by nvJPEG.

    Raises:
        ConfigError: `gpu` where it cannot be used.
    """
    reason = "it was not asked for" if choice == "cpu" else unusable(device)
    if reason and choice == "gpu":
        remedy = "Install a libnvjpeg, as in NVIDIA's packages or torchvision's, or choose jpeg='cpu'"
        raise ConfigError(f"jpeg='gpu', but {reason}", "nvJPEG on CUDA", remedy)
    return not reason


def describe(choice: Choice, device: torch.device) -> str:
    """What decodes JPEG files, for people."""
    if choice == "cpu" or device.type == "cpu":
        return "Pillow"
    found = backend(device)
    return found.name if isinstance(found, Backend) else f"Pillow ({found})"


def unusable(device: torch.device) -> str:
    """Why nvJPEG cannot decode for a device; empty if it can."""
    found = backend(device)
    return "" if isinstance(found, Backend) else found


@lru_cache(maxsize=8)
def backend(device: torch.device) -> Backend | str:
    """The way to nvJPEG that one small file has shown to work on a device, or why there is none."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    reasons = []
    for way in (_by_library, _by_torchvision):
        try:
            found = way(device)
            _try(found)
        except Exception as error:  # a torchvision built for another torch fails in many ways
            reasons.append((str(error) or repr(error)).splitlines()[0])
        else:
            if reasons:
                logger.warning("JPEG is decoded by %s: %s", found.name, reasons[0])
            return found
    reason = f"nvJPEG cannot be used ({reasons[0]}), nor torchvision ({reasons[1]})"
    logger.warning("%s: Pillow decodes JPEG on the CPU", reason)
    return reason


def decode(data: bytes, height: int, width: int, device: torch.device) -> Tensor | None:
    """Decode a file on the current stream of a device.

    Args:
        data: the whole file.
        height, width: its size in pixels, from its header.
        device: a CUDA device that is not `unusable`.

    Returns:
        uint8 [3, height, width] without the EXIF orientation; None for a file that is for the CPU to decode
        or to refuse.
    """
    if not is_plain(data):
        return None
    try:
        found = _decode(data, height, width, device)
    except RuntimeError as error:
        logger.warning("nvJPEG refused a file, Pillow decodes it: %s", str(error).splitlines()[0])
        return None
    return found if tuple(found.shape) == (3, height, width) else None


def is_plain(data: bytes) -> bool:
    """Whether a file is of the kind described above, from its markers alone."""
    begin = _scan(data)
    if begin is None or begin >= len(data):
        return False
    scan = np.frombuffer(data, dtype=np.uint8, offset=begin)
    marks = np.flatnonzero(scan[:-1] == 0xFF)
    after = scan[marks + 1]
    # Stuffed zeros and restart markers belong to the scan, further 0xFF fill up before a marker.
    others = after[(after != 0) & (after != 0xFF) & ((after & 0xF8) != 0xD0)]
    return len(others) > 0 and int(others[0]) == _END_OF_IMAGE


def _scan(data: bytes) -> int | None:
    """Where the only scan of a plain file begins; None if its headers are not those of a plain file."""
    at, components, adobe = 2, 0, 1
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker in _OTHER_FRAMES or marker in _BARE_MARKERS or length < 2 or len(body) != length - 2:
            return None
        if marker in _START_OF_FRAME:
            if components:
                return None
            components = _components(body)
        elif marker == _ADOBE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]  # 0: the components are RGB as they are
        elif marker == _START_OF_SCAN:
            whole = components == 1 or (components == 3 and adobe == 1)
            return at + 2 + length if whole and body[:1] == bytes([components]) else None
        at += 2 + length
    return None


def _components(body: bytes) -> int:
    """Components of a frame header; 0 where they are not 8-bit grey or YCbCr."""
    if len(body) < 6 or body[0] != 8 or len(body) != 6 + 3 * body[5]:
        return 0
    names, factors = body[6::3], body[7::3]
    if body[5] == 1 and factors != b"\x11":
        return 0  # one component is never subsampled, whatever its factors say; nvJPEG believes them
    return 0 if names == b"RGB" else body[5]


def _decode(data: bytes, height: int, width: int, device: torch.device) -> Tensor:
    found = backend(device)
    assert isinstance(found, Backend), found
    return found.decode(data, height, width)


def _by_library(device: torch.device) -> Backend:
    return Backend(f"nvJPEG {nvjpeg.version()}", partial(nvjpeg.decode, device=device))


def _by_torchvision(device: torch.device) -> Backend:
    io_module: Any = importlib.import_module("torchvision.io")
    rgb = io_module.ImageReadMode.RGB

    def decode(data: bytes, height: int, width: int) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = io_module.decode_jpeg(encoded, mode=rgb, device=device)
        return pixels

    return Backend(f"nvJPEG through torchvision {importlib.metadata.version('torchvision')}", decode)


def _try(found: Backend) -> None:
    """Decode a small file of one colour; raises `RuntimeError` where the result is not that."""
    file = io.BytesIO()
    Image.new("RGB", (40, 24), _EXAMPLE).save(file, "JPEG")
    pixels = found.decode(file.getvalue(), 24, 40)
    off = pixels.int().cpu() - torch.tensor(_EXAMPLE)[:, None, None]
    if tuple(pixels.shape) != (3, 24, 40) or int(off.abs().max()) > 3:
        raise RuntimeError(f"{found.name} gave another image, {list(pixels.shape)}")
