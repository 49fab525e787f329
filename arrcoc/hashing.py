"""Content hashes of tiles: products of bytes and small random integers, equal on every device.

A hash is a tree of linear maps over the integers. A row of a tile's pixels, read as signed bytes b, becomes
24 sums of b(i) * r(i, lane) with independent r, uniform in [-64, 63]. The sums of up to 16 rows, written out
as bytes, are mapped to 24 sums in the same way, and so are a tile's groups of rows. What is left, 24 words,
goes through the multilinear hash of Lemire & Kaser 2014 ("Strongly universal string hashing is fast").

Two different rows of bytes meet in one lane with probability at most 2**-7: where they differ by d != 0 at
some place, given all other r at most one value of that place's r gives equal sums (d * r stays below 2**16,
so wrapping at 2**32 changes nothing). The lanes are independent, so each of the three linear steps lets two
different tiles meet with probability at most 2**-168, and the last step with 2**-128. Not meant against an
adversary: the seed is fixed. Seven bits and not eight, because int8 products of processors without VNNI
saturate beyond them.
"""

import math
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arrcoc.records import Grid

LANES: Final = 24
_JOINED: Final = 16  # rows whose sums are mapped together
_SEED: Final = 0x41525243_4F43
_WORD: Final = 0xFFFF_FFFF


def tile_hashes(pixels: Tensor, grid: Grid) -> Tensor:
    """Hash the pixels of every tile to 128 bits.

    Args:
        pixels: uint8 [3, R*tile, C*tile].
        grid: the tile grid.

    Returns:
        int64 [R*C, 4], each in [0, 2**32), raster order.
    """
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, grid.height, grid.width))
    rows = _lanes(pixels.reshape(-1, grid.tile), 0).view(3, grid.rows, grid.tile, grid.cols, LANES)
    return _digest(rows.permute(1, 3, 0, 2, 4).reshape(grid.count, -1, LANES), grid.tile)


def hash_tiles(tiles: Tensor) -> Tensor:
    """`tile_hashes` of tiles that are cut already: uint8 [K, 3, t, t] to int64 [K, 4]."""
    count, channels, height, tile = tiles.shape
    assert (tiles.dtype, channels, height) == (torch.uint8, 3, tile), (tiles.dtype, tiles.shape)
    return _digest(_lanes(tiles.reshape(-1, tile), 0).view(count, 3 * tile, LANES), tile)


def _digest(rows: Tensor, tile: int) -> Tensor:
    """int64 [K, 4] of the row sums int32 [K, 3*tile, LANES] of K tiles."""
    count, lines, _ = rows.shape
    joined = math.gcd(lines, _JOINED)
    bundles = rows.reshape(count * lines // joined, joined * LANES).contiguous()
    groups = _lanes(bundles.view(torch.uint8), 1)
    sums = _lanes(groups.view(count, lines // joined * LANES).view(torch.uint8), 2)
    multipliers = _multipliers(rows.device)
    words = sums.to(torch.int64) & _WORD
    total = (words[:, None] * multipliers[:, 2:]).sum(2) + multipliers[:, 0] + multipliers[:, 1] * tile
    return (total >> 32) & _WORD


def _lanes(rows: Tensor, level: int) -> Tensor:
    """int32 [M, LANES] sums of M rows of bytes, uint8 [M, n]."""
    rows = rows.contiguous()
    count, length = rows.shape
    factors = _factors(level, length + -length % 8, rows.device)
    if rows.device.type != "cuda":
        return torch._int_mm(rows.view(torch.int8), factors[:, :length].t())
    # The product on CUDA takes more than 16 rows of whole 8 bytes; zeros add nothing.
    padded = F.pad(rows, (0, -length % 8, 0, max(0, 17 - count))) if length % 8 or count < 17 else rows
    return torch._int_mm(padded.view(torch.int8), factors.t())[:count]


@lru_cache(maxsize=64)
def _factors(level: int, length: int, device: torch.device) -> Tensor:
    """int8 [LANES, length] in [-64, 63]; Philox, because numpy promises never to change its stream."""
    streams = [
        np.random.Philox(key=_SEED + (1 << 64) + (level << 8) + lane).random_raw(-(-length // 8))
        for lane in range(LANES)
    ]
    raw = np.stack(streams).astype("<u8").view(np.uint8)[:, :length]
    return torch.from_numpy((raw & 0x7F).astype(np.int8) - np.int8(64)).to(device)


@lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> Tensor:
    """int64 [4, LANES + 2] of the multilinear hash."""
    streams = [np.random.Philox(key=_SEED + row).random_raw(LANES + 2) for row in range(4)]
    return torch.from_numpy(np.stack(streams).view(np.int64)).to(device)
