"""Device and precision, by the names that callers use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arrcoc.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for; `auto` is CUDA where there is one.

    Raises:
        ConfigError: no device, of another kind, or not in this machine.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.cuda.device_count()
    allowed = f"auto, cpu, or one of the {found} CUDA devices here (cuda, cuda:N)"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"device {device!r}", allowed, "Choose one of these") from None
    if place.type not in {"cpu", "cuda"} or (place.type == "cuda" and (place.index or 0) >= found):
        raise ConfigError(f"device {str(place)!r}", allowed, "Choose one of these")
    return place


def check_current(place: torch.device) -> None:
    """Raise `ConfigError` for a CUDA device that is not the current one.

    Triton launches on the calling thread's current device, so another one would get kernels with addresses
    that are not its own.
    """
    if place.type != "cuda" or place.index is None or place.index == torch.cuda.current_device():
        return
    allowed = f"cuda:{torch.cuda.current_device()}, the current device of this process"
    raise ConfigError(f"device {str(place)!r}", allowed, f"Set CUDA_VISIBLE_DEVICES={place.index}, use cuda")


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision a name stands for; `auto` is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: neither `auto` nor float32, bfloat16 or float16, by name or as `torch.dtype`.
    """
    if isinstance(dtype, str) and dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype {dtype!r}", ", ".join(["auto", *_DTYPES]), "Choose one of these")
    return found


def device_name(device: torch.device) -> str:
    """A device for people, for example `cuda:0 (NVIDIA H200)` or `cpu (8 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the host to CUDA through pinned memory, on the current stream.

    The host does not wait for the transfer. The tensor given may be changed or freed at once, unless it is
    pinned itself: then it may be freed.
    """
    if tensor.is_cuda or device.type != "cuda":
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def host_bytes(shape: tuple[int, ...], *, pinned: bool = False) -> Tensor:
    """An uninitialised uint8 tensor in the host's memory.

    What is not pinned is numpy's: it asks Linux for huge pages, torch does not, and first touching tens of
    megabytes page by page takes longer than filling them.
    """
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype=np.uint8))
