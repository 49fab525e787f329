"""Any picture a caller can hand over, as RGB pixels: uint8 [3, h, w].

Colour profiles are ignored: samples are taken as sRGB. 16-bit grey is scaled by 1/257, so that 65535
becomes 255; Pillow itself reduces 16-bit colour to its high byte, which is at most one level off.
"""

import base64
import binascii
import io
import logging
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from arrcoc import jpeg
from arrcoc.devices import host_bytes, upload
from arrcoc.errors import ImageError
from arrcoc.samples import check_size, from_array, from_tensor
from arrcoc.streams import parallel

ImageInput = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Tensor
"""What `decode` accepts: a path, an encoded file, a PIL image, an array or a tensor."""

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM")
"""File formats that are read, by Pillow's names. Formats are listed because some of Pillow's plugins
start other programs (EPS), hide the size of what they unpack (ICO) or accept cut files (JPEG 2000)."""

_STRIP: Final = 64  # rows
_CPU: Final = torch.device("cpu")
_LOG = logging.getLogger(__name__)
_PIL_LIMIT = 89_478_485  # Pillow's default for Image.MAX_IMAGE_PIXELS
_PILLOW_LOCK = threading.Lock()

# EXIF orientation (CIPA DC-008, tag 274): whether to transpose, then which axes to flip.
_ORIENTATIONS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


@dataclass(frozen=True, slots=True)
class _Target:
    """Where an image goes, and under which limit.

    Attributes:
        max_pixels: most pixels.
        device: where its pixels go.
        nvjpeg: whether nvJPEG decodes the JPEG files that it can.
    """

    max_pixels: int
    device: torch.device
    nvjpeg: bool


def decode(source: ImageInput, max_pixels: int, device: torch.device = _CPU, nvjpeg: bool = False) -> Tensor:
    """Decode an image to RGB, with its EXIF orientation applied and laid over white.

    On CUDA the upload, from pinned memory, and what follows it run beside the caller's stream: the host does
    not wait for them, the stream does. nvJPEG's pixels differ from the CPU's by what its own inverse
    transform and upsampling of colour make (see `tests/test_jpeg.py` for the bounds).

    Args:
        source: a path or `file://` URL; a `data:image/...;base64,` string; an encoded file as bytes;
            a PIL image; a numpy array [H, W] or [H, W, 1|3|4]; a tensor [H, W] or [1|3|4, H, W].
            Arrays and tensors hold bool, uint8, uint16, or floats in [0, 1]. Of an animation the
            frame that Pillow stands at is taken (the first, for files), with a warning in the log.
        max_pixels: most pixels of an image; files beyond it are refused before they are decoded.
        device: where the pixels go.
        nvjpeg: decode JPEG files by nvJPEG where they are plain (`arrcoc.jpeg`); needs a CUDA device that
            is not `jpeg.unusable`.

    Returns:
        uint8 [3, h, w], contiguous and sharing no memory with the source; on `device`, or on the CUDA
        device where the tensor given lies.

    Raises:
        ImageError: the source cannot be read, is damaged, of another format, dtype or shape, or
            outside the limits. Whatever the bytes, nothing else is raised.
    """
    target = _Target(max_pixels, device, nvjpeg)
    (pixels,) = parallel([partial(_decode, source, target)], device)
    return pixels


def _decode(source: ImageInput, target: _Target) -> Tensor:
    if isinstance(source, Image.Image):
        return _from_pil(source, "the PIL image", target)
    if isinstance(source, np.ndarray):
        return upload(from_array(source, target.max_pixels), target.device)
    if isinstance(source, Tensor):
        return upload(from_tensor(source, target.max_pixels), target.device)
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = _data_url_bytes(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), "the bytes given", target)
    if isinstance(source, str | os.PathLike):
        return _from_path(_local_path(os.fsdecode(source)), target)
    raise ImageError(
        f"an image of type {type(source).__name__}",
        "a path, bytes, a PIL image, a numpy array or a torch tensor",
        "Convert it to one of these",
    )


def _local_path(text: str) -> Path:
    """The path that a string names; `file://` URLs are taken apart, other URLs refused."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if scheme is None:
        return Path(text)
    if scheme[1].lower() != "file":
        raise ImageError(
            f"the URL {_short(text)}",
            "local paths, file:// URLs and data:image/...;base64, strings",
            "Download it first and pass the file or its bytes",
        )
    host, _, path = text[len(scheme[0]) :].partition("/")
    if host not in ("", "localhost"):
        raise ImageError(f"the URL {_short(text)}", "file:// URLs without a host", "Write file:///path")
    return Path(url2pathname(urlsplit("/" + path).path))


def _data_url_bytes(text: str) -> bytes:
    """The file inside a `data:image/...;base64,` string."""
    header, comma, payload = text.partition(",")
    try:
        if not comma or not re.fullmatch(r"data:image/[^,]*;base64", header, re.IGNORECASE):
            raise ValueError("it is not base64 or not an image")
        return base64.b64decode("".join(unquote(payload).split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ImageError(
            f"the data URL {_short(text)}: {error}", "data:image/<format>;base64,<payload>", "Encode it again"
        ) from error


def _from_path(path: Path, target: _Target) -> Tensor:
    """Decode a file; only regular files are opened, for reading a pipe could wait for ever."""
    name = _short(str(path))
    try:
        if path.is_file():
            with path.open("rb") as file:
                return _from_file(file, name, target)
        what = "is a directory" if path.is_dir() else "is no file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    raise ImageError(f"{name} {what}", "the path of a readable image file", "Check the path")


def _from_file(file: IO[bytes], name: str, target: _Target) -> Tensor:
    """Decode an encoded file."""
    image = _open(file, name)
    if target.nvjpeg and image.format in ("JPEG", "MPO"):
        width, height = image.size
        check_size(height, width, target.max_pixels)
        file.seek(0)
        pixels = jpeg.decode(file.read(), height, width, target.device)
        if pixels is not None:
            return _oriented(pixels, _orientation(image, name))
        file.seek(0)
        image = _open(file, name)
    return _from_pil(image, name, target)


def _open(file: IO[bytes], name: str) -> Image.Image:
    """Read an image's header.

    `Image.open` is not used, because it applies Pillow's own pixel limit instead of ours, and tries
    every format that it knows.
    """
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{name}: 0 bytes", "a complete image file", "Save or download it again")
    Image.init()
    for kind in FORMATS:
        factory, accept = Image.OPEN.get(kind, (None, None))
        # An accept function answers with a sentence when the codec was left out of this Pillow.
        if factory is not None and accept is not None and accept(prefix) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except Exception as error:
                raise _damaged(name, error) from error
    raise ImageError(f"{name}: not a known image format", ", ".join(FORMATS), "Convert it to PNG or JPEG")


def _from_pil(image: Image.Image, name: str, target: _Target) -> Tensor:
    """Decode a PIL image; its size is checked before its pixels are touched."""
    width, height = image.size
    check_size(height, width, target.max_pixels)
    try:
        with _pillow_settings(height * width):
            image.load()
            plain = image.mode == "RGB" and "transparency" not in image.info
            samples = _planes(image, target.device) if plain else _samples(image)
            orientation = _orientation(image, name)
            animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:
        raise _damaged(name, error) from error
    if animated:
        _LOG.warning("%s has several frames: only frame %d is used", name, image.tell() + 1)
    if not isinstance(samples, Tensor):
        samples = from_array(_narrowed(samples), target.max_pixels)
    return _oriented(upload(samples, target.device), orientation)


def _planes(image: Image.Image, device: torch.device) -> Tensor:
    """uint8 [3, h, w] of a loaded RGB image, plane by plane; in pinned memory if it is for CUDA."""
    out = host_bytes((3, image.height, image.width), pinned=device.type == "cuda")
    planes = out.numpy()
    # In strips, whose copies stay in the processor's cache.
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        for plane, band in zip(planes, "RGB", strict=True):
            samples = np.frombuffer(strip.tobytes("raw", band), dtype=np.uint8)
            plane[top : top + _STRIP] = samples.reshape(-1, image.width)
    return out


@contextmanager
def _pillow_settings(n_pixels: int) -> Iterator[None]:
    """Have Pillow load an image that passed our limit but not its, and never load a cut file.

    Some plugins repeat Pillow's size check while loading, and other libraries like to switch
    LOAD_TRUNCATED_IMAGES on. Both are Pillow's globals: they are changed under a lock, and only for
    an image that needs it.
    """
    if n_pixels <= _PIL_LIMIT and not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _PILLOW_LOCK:
        limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, truncated


def _samples(image: Image.Image) -> npt.NDArray[Any]:
    """Samples of a loaded image: uint8 [h, w] or [h, w, 3|4], or [h, w] uint16, int32 or fp32."""
    if image.mode.startswith("I"):
        wide: npt.NDArray[Any] = np.asarray(image)
        clear = image.info.get("transparency")
        return np.where(wide == clear, 65535, wide).astype(wide.dtype) if isinstance(clear, int) else wide
    if image.mode == "La":  # the one mode that Pillow turns into its unpremultiplied self only
        image = image.convert("LA")
    if image.mode in ("L", "RGB", "F") and "transparency" not in image.info:
        return np.asarray(image)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mode I holds 16-bit samples in 32 bits (Pillow's reader of 16-bit PGM); make them uint16."""
    if array.dtype.kind != "i":
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"32-bit samples from {low} to {high}", "samples from 0 to 65535", "Scale them to 8 or 16 bits"
        )
    return array.astype(np.uint16)


def _orientation(image: Image.Image, name: str) -> int:
    """EXIF orientation left to apply after loading (Pillow's TIFF reader has applied its own)."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error) as error:
        _LOG.warning("%s: damaged EXIF data is ignored (%s)", name, error)
        return 1
    return value if isinstance(value, int) else 1


def _oriented(pixels: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation; values outside 1..8 mean none."""
    transposed, flips = _ORIENTATIONS.get(orientation, (False, ()))
    turned = pixels.transpose(-2, -1) if transposed else pixels
    return turned.flip(flips).contiguous() if flips else turned.contiguous()


def _damaged(name: str, error: Exception) -> ImageError:
    reason = str(error) or type(error).__name__
    return ImageError(
        f"{name}: damaged or cut short ({_short(reason)})",
        "a complete image file",
        "Save or download it again",
    )


def _short(text: str) -> str:
    """A quoted piece of text, cut to a readable length."""
    return repr(text if len(text) <= 120 else f"{text[:80]}...{text[-20:]}")
