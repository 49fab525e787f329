"""Arrays and tensors of image samples, checked and brought to RGB pixels: uint8 [3, h, w]."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arrcoc.errors import ImageError

MAX_ASPECT: Final = 200
"""Longest edge over shortest edge, as in the stock Qwen-VL image processor."""

_CHANNELS = (1, 3, 4)
_NUMPY_DTYPES = ("bool", "uint8", "uint16", "float16", "float32", "float64")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH_DTYPES = (torch.bool, torch.uint8, torch.uint16, *_FLOATS)
_DTYPES_ALLOWED = "uint8, uint16, bool, or floats in [0, 1]"


def from_array(array: npt.NDArray[Any], max_pixels: int) -> Tensor:
    """Convert a numpy array to RGB.

    Args:
        array: [H, W] or [H, W, 1|3|4] of bool, uint8, uint16, or floats in [0, 1]; any byte order.
        max_pixels: most pixels of an image.

    Returns:
        uint8 [3, H, W] on the CPU, a copy.

    Raises:
        ImageError: another dtype, shape or range of values, or a size outside the limits.
    """
    shape = tuple(array.shape)
    _check_dtype(array.dtype.name, array.dtype.name in _NUMPY_DTYPES, "astype(np.uint8)")
    _check_rank(shape, "[H, W] or [H, W, 1|3|4]")
    if len(shape) == 3 and shape[2] not in _CHANNELS:
        turn = "transpose(1, 2, 0)" if shape[0] in _CHANNELS else ""
        raise _wrong_channels("a numpy array", shape, "[H, W] or [H, W, 1|3|4]", turn)
    check_size(shape[0], shape[1], max_pixels)
    planes = np.asarray(array).reshape(*shape[:2], -1).transpose(2, 0, 1)
    native = np.array(planes, dtype=array.dtype.newbyteorder("="), order="C")
    return _rgb(torch.from_numpy(native))


def from_tensor(tensor: Tensor, max_pixels: int) -> Tensor:
    """Convert a tensor to RGB.

    Args:
        tensor: [H, W] or [1|3|4, H, W] of bool, uint8, uint16, or floats in [0, 1].
        max_pixels: most pixels of an image.

    Returns:
        uint8 [3, H, W] on the tensor's device, a copy.

    Raises:
        ImageError: another dtype, shape or range of values, or a size outside the limits.
    """
    shape = tuple(tensor.shape)
    _check_dtype(str(tensor.dtype), tensor.dtype in _TORCH_DTYPES, "to(torch.uint8)")
    _check_rank(shape, "[H, W] or [1|3|4, H, W]")
    if len(shape) == 3 and shape[0] not in _CHANNELS:
        turn = "permute(2, 0, 1)" if shape[2] in _CHANNELS else ""
        raise _wrong_channels("a torch tensor", shape, "[H, W] or [1|3|4, H, W]", turn)
    check_size(shape[-2], shape[-1], max_pixels)
    return _rgb(tensor.detach().reshape(-1, *shape[-2:]).clone(memory_format=torch.contiguous_format))


def _rgb(channels: Tensor) -> Tensor:
    """[1|3|4, h, w] of any allowed dtype to uint8 [3, h, w]."""
    levels = _levels(channels)
    if levels.shape[0] == 4:
        return torch.stack([_over_white(plane, levels[3]) for plane in levels[:3]])
    return levels.expand(3, -1, -1).contiguous()


def _levels(channels: Tensor) -> Tensor:
    """Scale samples to uint8: bool by 255, uint16 by 1/257, floats by 255, each rounded."""
    if channels.dtype == torch.uint8:
        return channels
    if channels.dtype == torch.bool:
        return channels.to(torch.uint8) * 255
    if channels.dtype == torch.uint16:
        return ((channels.to(torch.int32) + 128) // 257).to(torch.uint8)
    unit = channels.float()
    low, high = (float(value) for value in torch.aminmax(unit))
    if not (low >= 0 and high <= 1):  # also true of NaN, which aminmax passes on
        over = low >= 0 and 1 < high <= 255
        remedy = "Divide by 255" if over else "Remove NaN and infinity and clamp to [0, 1]"
        raise ImageError(f"float samples from {low:g} to {high:g}", "finite floats in [0, 1]", remedy)
    return (unit * 255).round().to(torch.uint8)


def _over_white(plane: Tensor, alpha: Tensor) -> Tensor:
    """One uint8 [h, w] plane composited over white by its uint8 alpha, rounded to nearest."""
    share = alpha.to(torch.int32)
    blend = plane.to(torch.int32) * share + 255 * (255 - share)
    return ((blend + 127) // 255).to(torch.uint8)


def _check_dtype(name: str, known: bool, cast: str) -> None:
    if not known:
        raise ImageError(f"samples of dtype {name}", _DTYPES_ALLOWED, f"Scale to 0..255 and call {cast}")


def _check_rank(shape: tuple[int, ...], allowed: str) -> None:
    if len(shape) not in (2, 3):
        raise ImageError(f"an image of shape {list(shape)}", allowed, "Pass one image at a time")


def _wrong_channels(what: str, shape: tuple[int, ...], allowed: str, turn: str) -> ImageError:
    remedy = f"Call {turn} on it" if turn else "Keep 1, 3 or 4 channels"
    return ImageError(f"{what} of shape {list(shape)}", allowed, remedy)


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse an empty image, one of more than `max_pixels`, and one longer than `MAX_ASPECT` to 1.

    Raises:
        ImageError: the size in pixels is outside these limits.
    """
    given = f"an image of {width} x {height} pixels"
    if min(height, width) < 1:
        raise ImageError(given, "at least 1 x 1", "Pass an image that is not empty")
    if height * width > max_pixels:
        allowed = f"at most {max_pixels} pixels (max_source_pixels)"
        raise ImageError(given, allowed, "Scale it down, cut it, or raise max_source_pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(given, f"an aspect ratio of at most {MAX_ASPECT}:1", "Cut it into shorter pieces")
