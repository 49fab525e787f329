"""libnvjpeg through ctypes: JPEG files to planar RGB in a GPU's memory, on the current stream.

torchvision decodes by the same library, but has it repeat the samples of reduced colour planes, where
libjpeg-turbo interpolates them: up to 51 levels off at coloured edges. This binding asks for interpolation
(`NVJPEG_FLAGS_UPSAMPLING_WITH_INTERPOLATION`, of nvJPEG 12.1 and later), and does not wait for the GPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

OLDEST: Final = (12, 1)
"""First version that interpolates."""

_DEFAULT_BACKEND: Final = 0
_INTERPOLATE: Final = 1 << 5
_PLANAR_RGB: Final = 3  # NVJPEG_OUTPUT_RGB
_MESSAGES: Final = (
    "success", "not initialised", "invalid parameter", "bad JPEG", "JPEG not supported", "allocator failure",
    "execution failed", "architecture mismatch", "internal error", "not supported by the implementation",
    "incomplete bitstream",
)  # fmt: skip
"""nvjpegStatus_t, in order."""


class _Image(ctypes.Structure):
    """nvjpegImage_t."""

    _fields_ = (("channel", ctypes.c_void_p * 4), ("pitch", ctypes.c_size_t * 4))


_POINTER, _INTS = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
_OUT, _FILE = ctypes.POINTER(ctypes.c_void_p), (ctypes.c_char_p, ctypes.c_size_t)
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "nvjpegGetProperty": (ctypes.c_int, _INTS),
    "nvjpegCreateEx": (ctypes.c_int, _POINTER, _POINTER, ctypes.c_uint, _OUT),
    "nvjpegDestroy": (_POINTER,),
    "nvjpegJpegStateCreate": (_POINTER, _OUT),
    "nvjpegJpegStateDestroy": (_POINTER,),
    "nvjpegGetImageInfo": (_POINTER, *_FILE, _INTS, _INTS, _INTS, _INTS),
    "nvjpegDecode": (_POINTER, _POINTER, *_FILE, ctypes.c_int, ctypes.POINTER(_Image), _POINTER),
}


def decode(data: bytes, height: int, width: int, device: torch.device) -> Tensor:
    """Decode a file on the current stream of a CUDA device.

    Returns:
        uint8 [3, height, width]; the host does not wait for it.

    Raises:
        RuntimeError: nvJPEG is not to be had or refused the file, or its size in pixels is another.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return _decoder(index).decode(data, height, width)


def version() -> str:
    """Version of the library, for example `13.0.1`; raises `RuntimeError` where there is none."""
    return ".".join(map(str, _version(library())))


@lru_cache(maxsize=1)
def library() -> Any:
    """The first libnvjpeg found that is new enough; raises `RuntimeError` where there is none."""
    reasons = []
    for name in _names():
        try:
            found = ctypes.CDLL(name)
            for function, arguments in _FUNCTIONS.items():
                getattr(found, function).argtypes = arguments
            if _version(found) >= OLDEST:
                return found
            reasons.append(f"{Path(name).name} is of version {'.'.join(map(str, _version(found)))}")
        except (OSError, AttributeError) as error:
            reasons.append(f"{Path(name).name}: {error}")
    raise RuntimeError(
        f"no libnvjpeg from {'.'.join(map(str, OLDEST))} on ({'; '.join(reasons) or 'none found'})"
    )


def _names() -> Iterator[str]:
    """Files that may be libnvjpeg: torchvision's, those of NVIDIA's packages, the system's."""
    for package, pattern in (
        ("torchvision", "../torchvision.libs/libnvjpeg*"),
        ("nvidia", "*/lib/libnvjpeg.so*"),
    ):
        spec = importlib.util.find_spec(package)  # does not import it
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from map(str, sorted(Path(folder).resolve().glob(pattern)))
    if system := ctypes.util.find_library("nvjpeg"):
        yield system


def _version(found: Any) -> tuple[int, int, int]:
    numbers = [ctypes.c_int() for _ in range(3)]
    for which, number in enumerate(numbers):
        _check(found.nvjpegGetProperty(which, ctypes.byref(number)), "nvjpegGetProperty")
    major, minor, patch = (number.value for number in numbers)
    return major, minor, patch


def _check(status: int, call: str) -> None:
    if status:
        known = _MESSAGES[status] if 0 < status < len(_MESSAGES) else "unknown"
        raise RuntimeError(f"{call}: {known} (status {status})")


class _Owned:
    """A pointer that a library gave out, and takes back when nothing refers to it any more.

    Not when the interpreter ends: CUDA may be gone by then, and the memory goes with the process.
    """

    def __init__(self, make: Callable[..., int], release: Callable[..., int], *keeps: object) -> None:
        self.pointer = ctypes.c_void_p()
        _check(make(ctypes.byref(self.pointer)), getattr(make, "__name__", "nvJPEG"))
        weakref.finalize(self, _release, release, self.pointer, keeps).atexit = False


def _release(release: Callable[..., int], pointer: ctypes.c_void_p, keeps: object) -> None:
    """Give a pointer back; what it depends on is kept until then."""
    release(pointer)


class _Decoder:
    """nvJPEG on one device, which is the current one in every call; threads may share it."""

    def __init__(self, found: Any) -> None:
        create = partial(found.nvjpegCreateEx, _DEFAULT_BACKEND, None, None, _INTERPOLATE)
        self._library, self._handle = found, _Owned(create, found.nvjpegDestroy)
        self._local = threading.local()

    def decode(self, data: bytes, height: int, width: int) -> Tensor:
        """As `decode`."""
        self._check_size(data, height, width)
        state, done = self._state()
        out = torch.empty(3, height, width, dtype=torch.uint8, device="cuda")
        planes = _Image(
            (_POINTER * 4)(*(plane.data_ptr() for plane in out)), (ctypes.c_size_t * 4)(*[width] * 3)
        )
        stream = torch.cuda.current_stream()
        where = (self._handle.pointer, state.pointer, data, len(data), _PLANAR_RGB, ctypes.byref(planes))
        status = self._library.nvjpegDecode(*where, stream.cuda_stream)
        done.record(stream)
        self._local.file = data  # until the next file: the GPU may be reading it
        if status:
            done.synchronize()
        _check(status, "nvjpegDecode")
        return out

    def _check_size(self, data: bytes, height: int, width: int) -> None:
        """nvJPEG writes what it reads in the header: make sure that it is what will be allocated."""
        components, sampling, widths, heights = (ctypes.c_int * 1)(), (ctypes.c_int * 1)(), *_sizes()
        info = self._library.nvjpegGetImageInfo
        _check(info(self._handle.pointer, data, len(data), components, sampling, widths, heights), "header")
        if (heights[0], widths[0]) != (height, width):
            raise RuntimeError(f"nvJPEG reads {widths[0]} x {heights[0]} pixels, not {width} x {height}")

    def _state(self) -> tuple[_Owned, Any]:
        """The calling thread's scratch memory, when its last file is done with it."""
        found = getattr(self._local, "state", None)
        if found is None:
            create = partial(self._library.nvjpegJpegStateCreate, self._handle.pointer)
            state = _Owned(create, self._library.nvjpegJpegStateDestroy, self._handle)
            found = self._local.state = state, torch.cuda.Event()  # type: ignore[no-untyped-call]
        found[1].synchronize()
        return found


def _sizes() -> tuple[Any, Any]:
    return (ctypes.c_int * 4)(), (ctypes.c_int * 4)()


@lru_cache(maxsize=16)
def _decoder(index: int) -> _Decoder:
    """The decoder of a device, which is the current one."""
    return _Decoder(library())
