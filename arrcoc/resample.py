"""Exact area (box) resampling by small rational factors, in integers: equal on every device."""

import math
import sys
from typing import Final

import torch
from torch import Tensor

from arrcoc import area_kernel

_CHUNK: Final = 1 << 22  # elements of a working tensor on the CPU
_WORDS: Final = 1 << 20  # 32-bit words of a working tensor that stays in a CPU's last-level cache
_EVEN_BYTES: Final = 0x00FF00FF


def area_resample(pixels: Tensor, factor_in: int, factor_out: int) -> Tensor:
    """Resample by factor_out/factor_in with an exact area (box) filter.

    With the ratio p/q in lowest terms, every group of q pixels along an axis becomes p pixels, each
    the mean of what it covers, fractions included. So no window reaches beyond its group, nor
    beyond a tile whose edge is a multiple of q. All arithmetic is on integers (overlaps are counted
    in 1/p pixels): results are exact and equal on every device and for every batch.

    Args:
        pixels: uint8 [..., h, w] with h and w multiples of q.
        factor_in: any multiple of q.
        factor_out: the same multiple of p.

    Returns:
        uint8 [..., h*p/q, w*p/q], rounded half up; `pixels` itself where the factors are equal.
    """
    common = math.gcd(factor_in, factor_out)
    q, p = factor_in // common, factor_out // common
    *lead, height, width = pixels.shape
    assert pixels.dtype == torch.uint8
    assert (height % q, width % q) == (0, 0)
    assert q <= 2048, "sums must stay within 31 bits"
    if p == q:
        return pixels
    planes = pixels.reshape(-1, height, width)
    if pixels.numel() and area_kernel.runs_on(pixels.device):
        out = area_kernel.resample(planes, q, p)
    elif p == 1 and q in (4, 8, 16) and pixels.device.type == "cpu" and sys.byteorder == "little":
        out = _means(planes.contiguous(), q)
    else:
        out = _windows(planes, q, p)
    return out.view(*lead, height // q * p, width // q * p)


def _windows(planes: Tensor, q: int, p: int) -> Tensor:
    """Planes uint8 [N, h, w] by p/q, rows first, in pieces that bound the working memory."""
    width = planes.shape[2]
    bands = planes.reshape(-1, q, width)
    out = planes.new_empty(bands.shape[0], p, width // q * p)
    step = max(1, _chunk(planes.device) // (max(q, p) * width))
    for start in range(0, bands.shape[0], step):
        rows = _box_sums(bands[start : start + step].int(), q, p, dim=1)
        sums = _box_sums(rows.reshape(*rows.shape[:2], width // q, q), q, p, dim=3).flatten(2)
        out[start : start + step] = (2 * sums + q * q) // (2 * q * q)
    return out


def _chunk(device: torch.device) -> int:
    """Most elements of a working tensor: what suits a CPU's caches leaves a GPU waiting for launches."""
    return _CHUNK if device.type == "cpu" else 4 * _CHUNK


def _box_sums(groups: Tensor, q: int, p: int, dim: int) -> Tensor:
    """int32 sums over p windows of an axis of q pixels, weighted by overlap in 1/p pixels.

    Pixel j spans [j*p, (j+1)*p), window i spans [i*q, (i+1)*q): weights of a window add up to q.
    """
    taps = groups.unbind(dim)
    windows = []
    for i in range(p):
        first, last = i * q // p, ((i + 1) * q - 1) // p
        total = torch.zeros_like(taps[0])
        for j in range(first, last + 1):
            total.add_(taps[j], alpha=min((i + 1) * q, (j + 1) * p) - max(i * q, j * p))
        windows.append(total)
    return torch.stack(windows, dim)


def _means(planes: Tensor, q: int) -> Tensor:
    """Means over q x q blocks, q a power of two from 4, of planes uint8 [N, h, w] on the CPU.

    Four neighbouring pixels are read as one 32-bit word and added as two pairs of 16-bit sums: no sum of
    2 * q bytes reaches 2**16, so none touches its neighbour.
    """
    count, height, width = planes.shape
    words = planes.view(torch.int32).view(count * height // q, q, width // 4)
    out = planes.new_empty(words.shape[0], width // q)
    step = max(1, _WORDS // (q * width // 4))
    for start in range(0, words.shape[0], step):
        part = words[start : start + step]
        pairs = (part & _EVEN_BYTES).add_((part >> 8).bitwise_and_(_EVEN_BYTES)).sum(1, dtype=torch.int32)
        fours = (pairs & 0xFFFF).add_(pairs >> 16)
        blocks = fours.view(len(fours), -1, q // 4).sum(2, dtype=torch.int32) if q > 4 else fours
        out[start : start + step] = blocks.add_(q * q // 2).bitwise_right_shift_(2 * (q.bit_length() - 1))
    return out
