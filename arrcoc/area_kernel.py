"""Area resampling as one Triton kernel: whole planes, or tiles with a margin straight from a frame."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from arrcoc import triton_support

logger = logging.getLogger(__name__)
_BLOCK = 512


@lru_cache(maxsize=8)
def runs_on(device: torch.device) -> bool:
    """Whether the kernel serves a device: CUDA, with Triton at work (else torch does the same, slower)."""
    if device.type != "cuda":
        return False
    if reason := triton_support.why_not():
        logger.warning("Images are resampled by torch: %s", reason)
    return reason is None


def resample(planes: Tensor, q: int, p: int) -> Tensor:
    """Planes uint8 [N, h, w] by p/q to uint8 [N, h*p/q, w*p/q]."""
    count, height, width = planes.shape
    level = height // q * p, width // q * p
    out = planes.new_empty(count, *level)
    _launch(planes, None, out, q, p, level, (1, 0, 0))
    return out


def resample_tiles(
    pixels: Tensor, index: Tensor, cols: int, side: int, q: int, p: int, margin: int
) -> Tensor:
    """Tiles of the frame's level p/q, with a margin; beyond the level its edge pixels repeat.

    Args:
        pixels: uint8 [3, H, W].
        index: int64 [K], raster indices of the tiles, on the frame's device.
        cols: tiles in a row.
        side: edge of a tile at the level, in pixels.
        q, p: the level has p pixels for q of the frame.
        margin: pixels of the level on every side.

    Returns:
        uint8 [K, 3, side + 2*margin, side + 2*margin].
    """
    _, height, width = pixels.shape
    edge = side + 2 * margin
    out = pixels.new_empty(len(index), 3, edge, edge)
    _launch(pixels, index, out, q, p, (height // q * p, width // q * p), (cols, side, margin))
    return out


def _launch(
    planes: Tensor,
    index: Tensor | None,
    out: Tensor,
    q: int,
    p: int,
    level: tuple[int, int],
    tiling: tuple[int, int, int],
) -> None:
    """Run the kernel: one program for 512 pixels of one plane of one tile."""
    if not out.numel():
        return
    kernel: Any = importlib.import_module("arrcoc.area_triton").area
    planes = planes.contiguous()
    channels, height, width = planes.shape
    edge_h, edge_w = out.shape[-2:]
    taps = max(((i + 1) * q - 1) // p - i * q // p + 1 for i in range(p))
    grid = (out.numel() // (edge_h * edge_w), -(-edge_h * edge_w // _BLOCK))
    with torch.cuda.device_of(planes):  # type: ignore[no-untyped-call]
        kernel[grid](
            planes,
            planes if index is None else index,
            out,
            channels,
            height,
            width,
            edge_h,
            edge_w,
            *level,
            *tiling,
            q=q,
            p=p,
            taps=taps,
            whole=index is None,
            block=_BLOCK,
        )
