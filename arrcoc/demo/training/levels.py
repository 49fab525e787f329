"""A batch of canvases at the LODs of a preset: the same pixels as `arrcoc.image` makes, without loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def level(images: Tensor, factor_in: int, factor_out: int) -> Tensor:
    """Box-filtered images uint8 [B, 3, h, w], as `arrcoc.image.area_resample`, rounded half up.

    In whole numbers: a pixel is a sum of bytes with weights that add up to factor_in**2, in lowest terms.
    """
    common = math.gcd(factor_in, factor_out)
    q, p = factor_in // common, factor_out // common
    if p == q:
        return images
    kind = torch.int16 if 255 * q * q < 1 << 15 else torch.int32
    summed = _box_sums(_box_sums(images, q, p, 3, kind), q, p, 2, kind)
    return torch.div(2 * summed.int() + q * q, 2 * q * q, rounding_mode="floor").to(torch.uint8)


def cut(images: Tensor, size: int, margin: int, index: Tensor, columns: int) -> Tensor:
    """Tiles uint8 [B*k, 3, t, t], t = size + 2 * margin px, of one level; edge pixels repeat outside.

    Args:
        images: uint8 [B, 3, h, w], one level.
        size: tile side at this level, in px.
        margin: px around every tile.
        index: int64 [B, k] raster indices on the device.
        columns: tiles in a row.
    """
    padded = _with_edges(_with_edges(images, margin, 2), margin, 3) if margin else images
    span = size + 2 * margin
    windows = padded.unfold(2, span, size).unfold(3, span, size)
    rows = torch.arange(len(images), device=images.device)[:, None]
    return windows[rows, :, index // columns, index % columns].flatten(0, 1)


def overview(background: Tensor, stride: int, token_px: int) -> Tensor:
    """The frame for an overview: uint8 [B, 3, ceil(n / stride) * token_px, ...] of n x n tokens."""
    if stride == 1:
        return background
    size = -(-(background.shape[-1] // token_px) // stride) * token_px
    wide = background.float()
    if background.shape[-1] % size == 0:
        reduced = torch.nn.functional.adaptive_avg_pool2d(wide, (size, size))
    else:
        reduced = torch.nn.functional.interpolate(
            wide, (size, size), mode="bilinear", antialias=True, align_corners=False
        )
    return reduced.round().clamp(0, 255).to(torch.uint8)


def _box_sums(images: Tensor, q: int, p: int, dim: int, kind: torch.dtype) -> Tensor:
    """Every q pixels of an axis as p sums, weighted by overlap in units of 1/p pixel; weights sum to q."""
    pixels = images.unflatten(dim, (-1, q))  # type: ignore[no-untyped-call]
    windows = []
    for window in range(p):
        total = None
        for pixel in range(q):
            weight = min((window + 1) * q, (pixel + 1) * p) - max(window * q, pixel * p)
            if weight > 0:
                part = pixels.select(dim + 1, pixel).to(kind) * weight
                total = part if total is None else total + part
        assert total is not None
        windows.append(total)
    return torch.stack(windows, dim + 1).flatten(dim, dim + 1)


def _with_edges(images: Tensor, margin: int, dim: int) -> Tensor:
    """`margin` copies of the first and the last row of an axis before and after it."""
    size = images.shape[dim]
    repeats = [margin if axis == dim else -1 for axis in range(images.dim())]
    first, last = (images.narrow(dim, place, 1).expand(repeats) for place in (0, size - 1))
    return torch.cat((first, images, last), dim)
