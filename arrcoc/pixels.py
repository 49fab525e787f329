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
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from arrcoc.errors import ImageError
from arrcoc.samples import check_size, from_array, from_tensor

ImageInput = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Tensor
"""What `decode` accepts: a path, an encoded file, a PIL image, an array or a tensor."""

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM")
"""File formats that are read, by Pillow's names. Formats are listed because some of Pillow's plugins
start other programs (EPS), hide the size of what they unpack (ICO) or accept cut files (JPEG 2000)."""

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


def decode(source: ImageInput, max_pixels: int) -> Tensor:
    """Decode an image to RGB, with its EXIF orientation applied and laid over white.

    Args:
        source: a path or `file://` URL; a `data:image/...;base64,` string; an encoded file as bytes;
            a PIL image; a numpy array [H, W] or [H, W, 1|3|4]; a tensor [H, W] or [1|3|4, H, W].
            Arrays and tensors hold bool, uint8, uint16, or floats in [0, 1]. Of an animation the
            frame that Pillow stands at is taken (the first, for files), with a warning in the log.
        max_pixels: most pixels of an image; files beyond it are refused before they are decoded.

    Returns:
        uint8 [3, h, w], contiguous and sharing no memory with the source; on the CPU, or where the
        tensor given lies.

    Raises:
        ImageError: the source cannot be read, is damaged, of another format, dtype or shape, or
            outside the limits. Whatever the bytes, nothing else is raised.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, "the PIL image", max_pixels)
    if isinstance(source, np.ndarray):
        return from_array(source, max_pixels)
    if isinstance(source, Tensor):
        return from_tensor(source, max_pixels)
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = _data_url_bytes(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(io.BytesIO(source), "the bytes given", max_pixels)
    if isinstance(source, str | os.PathLike):
        return _from_path(_local_path(os.fsdecode(source)), max_pixels)
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


def _from_path(path: Path, max_pixels: int) -> Tensor:
    """Decode a file; only regular files are opened, for reading a pipe could wait for ever."""
    name = _short(str(path))
    try:
        if path.is_file():
            with path.open("rb") as file:
                return _from_file(file, name, max_pixels)
        what = "is a directory" if path.is_dir() else "is no file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    raise ImageError(f"{name} {what}", "the path of a readable image file", "Check the path")


def _from_file(file: IO[bytes], name: str, max_pixels: int) -> Tensor:
    """Decode an encoded file."""
    return _from_pil(_open(file, name), name, max_pixels)


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


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> Tensor:
    """Decode a PIL image; its size is checked before its pixels are touched."""
    width, height = image.size
    check_size(height, width, max_pixels)
    try:
        with _pillow_settings(height * width):
            image.load()
            array, orientation = _samples(image), _orientation(image, name)
            animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:
        raise _damaged(name, error) from error
    if animated:
        _LOG.warning("%s has several frames: only frame %d is used", name, image.tell() + 1)
    return _oriented(from_array(_narrowed(array), max_pixels), orientation)


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
