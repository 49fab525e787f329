"""The texture of a frame as one Triton kernel: every pixel is read once, whatever the channel.

Computes what `arrcoc.texture` says, on CUDA; the torch formulation there is its reference and stands in for
it elsewhere. Where the frame lies is passed in device memory, so that a captured CUDA graph serves every
frame of its shape without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arrcoc import triton_support

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - PyPI's torch for Linux brings it
    triton = None

CHANNELS = 13
COLUMNS = 128
"""Pixels side by side that one program works on, about."""
WARPS = 4
"""Warps of a program."""


def installed() -> bool:
    """Whether there is triton."""
    return triton is not None


def usable(pixels: Tensor) -> bool:
    """Whether the kernel can measure a frame here: on CUDA, with triton at work."""
    return installed() and pixels.is_cuda and triton_support.why_not() is None


class Addresses:
    """Where a frame's pixels and background lie, kept in device memory."""

    def __init__(self, device: torch.device) -> None:
        self.table = torch.zeros(2, dtype=torch.int64, device=device)

    def point(self, pixels: Tensor, background: Tensor) -> None:
        """Point to uint8 [3, H, W] and [3, h, w]; both must stay alive until the kernel has run.

        Filling takes the address as an argument of the launch: nothing is copied and no one waits.
        """
        for row, plane in enumerate((pixels, background)):
            assert plane.is_contiguous(), "planes lie one after another"
            assert plane.dtype == torch.uint8
            self.table[row].fill_(plane.data_ptr())


def measure(
    where: Addresses, tiles: tuple[int, int], tile: int, small_tile: int, cells: int, out: Tensor
) -> None:
    """Measure the texture of the frame that `where` points to.

    Args:
        where: the frame's place.
        tiles: rows and columns of tiles.
        tile: edge of a tile in pixels.
        small_tile: edge of a tile of the background in pixels.
        cells: cells along the edge of a tile.
        out: fp16 [13, rows*cells, cols*cells], written.
    """
    shape = (tiles[0] * cells, tiles[1] * cells)
    assert out.shape == (CHANNELS, *shape), (out.shape, shape)
    assert out.is_contiguous()
    common = math.gcd(tile, small_tile)
    assert 2 * max(tiles) * tile * small_tile // common < 2**31, "positions are counted in 32 bits"
    size = tiles[0] * small_tile, tiles[1] * small_tile
    small = torch.empty(size, dtype=torch.float32, device=out.device)
    span = -(-tile // cells) + (tile % cells > 0)
    span = triton.next_power_of_2(span)
    per_program = max(1, COLUMNS // span)
    block = 1024
    _small_luma[(-(-small.numel() // block),)](where.table, small, small.numel(), block=block)
    _cells[(shape[0], -(-shape[1] // per_program))](
        where.table,
        small,
        out,
        *tiles,
        tile,
        cells,
        small_tile // common,
        tile // common,
        *small.shape,
        group=per_program,
        span=span,
        num_warps=WARPS,
    )


def _jit(*varying: str) -> Callable[[Any], Any]:
    """`triton.jit` where there is triton; one compiled kernel serves all values of `varying`."""
    if triton is None:
        return lambda function: function
    return lambda function: triton.jit(function, do_not_specialize=list(varying))


@_jit()
def _luma(base, at, plane):  # type: ignore[no-untyped-def]
    """Red, green, blue (0..255) and BT.601 luma (0..1) at offsets `at` of three planes."""
    red = tl.load(base + at).to(tl.float32)
    green = tl.load(base + at + plane).to(tl.float32)
    blue = tl.load(base + at + 2 * plane).to(tl.float32)
    return red, green, blue, red * (0.299 / 255) + green * (0.587 / 255) + blue * (0.114 / 255)


@_jit()
def _row(base, y, left, here, right, plane, width, height):  # type: ignore[no-untyped-def]
    """Of a row clamped to the frame: r, g, b, luma, and along x its difference and (1, 2, 1) sum."""
    start = base + tl.minimum(tl.maximum(y, 0), height - 1).to(tl.int64) * width
    _, _, _, before = _luma(start, left, plane)
    red, green, blue, luma = _luma(start, here, plane)
    _, _, _, after = _luma(start, right, plane)
    return red, green, blue, luma, after - before, before + 2 * luma + after


@_jit("count")
def _small_luma(table, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Luma of the background, fp32."""
    base = tl.load(table + 1).to(tl.pointer_type(tl.uint8))
    at = tl.program_id(0) * block + tl.arange(0, block)
    _, _, _, luma = _luma(base, tl.minimum(at, count - 1), count.to(tl.int64))
    tl.store(out + at, luma, mask=at < count)


@_jit()
def _linear(value):  # type: ignore[no-untyped-def]
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    power = tl.exp2(2.4 * tl.log2((value + 0.055) / 1.055))
    return tl.where(value > 0.04045, power, value / 12.92)


@_jit()
def _lab_root(value):  # type: ignore[no-untyped-def]
    """The cube root of CIE L*a*b* with its linear foot."""
    power = tl.exp2(tl.log2(tl.maximum(value, 0.008856)) / 3)
    return tl.where(value > 0.008856, power, 7.787 * value + 4.0 / 29.0)


@_jit()
def _lab(red, green, blue):  # type: ignore[no-untyped-def]
    """L*, a*, b* of sRGB in [0, 1], as `arrcoc.texture` scales them."""
    red, green, blue = _linear(red), _linear(green), _linear(blue)
    # Linear sRGB to CIE XYZ over the D65 white point, as in kornia.color.rgb_to_lab.
    x = _lab_root((0.412453 * red + 0.357580 * green + 0.180423 * blue) / 0.95047)
    y = _lab_root(0.212671 * red + 0.715160 * green + 0.072169 * blue)
    z = _lab_root((0.019334 * red + 0.119193 * green + 0.950227 * blue) / 1.08883)
    return (116 * y - 16) / 50 - 1, 5 * (x - y), 200 * (y - z) / 110


@_jit()
def _between(at, p, q, count):  # type: ignore[no-untyped-def]
    """Where pixels lie among `count` of the background, bilinear without aligned corners, in integers.

    Returns:
        The places before and after, and how far it is from the first to the second.
    """
    along = tl.maximum((2 * at + 1) * p - q, 0)
    before = along // (2 * q)
    return before, tl.minimum(before + 1, count - 1), (along % (2 * q)).to(tl.float32) / (2 * q)


@_jit()
def _mean(sums, inside, count):  # type: ignore[no-untyped-def]
    """Mean of each cell, from the sums of its columns."""
    return tl.sum(tl.where(inside, sums, 0.0), 1) / count


@_jit()
def _store(at, step, keep, first, second, third):  # type: ignore[no-untyped-def]
    """Write three channels."""
    tl.store(at, first, mask=keep)
    tl.store(at + step, second, mask=keep)
    tl.store(at + 2 * step, third, mask=keep)


@_jit("tile_rows", "tile_cols", "tile", "cells", "p", "q", "small_height", "small_width")
def _cells(  # type: ignore[no-untyped-def]
    table,
    small,
    out,
    tile_rows,
    tile_cols,
    tile,
    cells,
    p,
    q,
    small_height,
    small_width,
    group: tl.constexpr,
    span: tl.constexpr,
):
    """All channels of group cells of one row of cells; a cell is at most span pixels wide.

    A row of pixels is read with its neighbours left and right; the rows above and below are kept from step
    to step. p : q is the size of the background over that of the frame, in lowest terms.
    """
    height, width = tile_rows * tile, tile_cols * tile
    rows, cols = tile_rows * cells, tile_cols * cells
    plane = height.to(tl.int64) * width
    base = tl.load(table).to(tl.pointer_type(tl.uint8))
    row = tl.program_id(0)
    col = tl.program_id(1) * group + tl.arange(0, group)
    top, bottom = row * tile // cells, ((row + 1) * tile + cells - 1) // cells
    first, last = col * tile // cells, ((col + 1) * tile + cells - 1) // cells
    x = first[:, None] + tl.arange(0, span)[None, :]
    inside = x < last[:, None]
    here = tl.minimum(x, width - 1)
    left, right = tl.maximum(here - 1, 0), tl.minimum(here + 1, width - 1)
    west, east, along = _between(here, p, q, small_width)

    zero = tl.zeros((group, span), tl.float32)
    red_sum, green_sum, blue_sum, x_sum, y_sum, lost_sum, peak = zero, zero, zero, zero, zero, zero, zero
    _, _, _, _, difference_up, sum_up = _row(base, top - 1, left, here, right, plane, width, height)
    red, green, blue, luma, difference, sum_here = _row(base, top, left, here, right, plane, width, height)
    for y in range(top, bottom):
        next_red, next_green, next_blue, next_luma, difference_down, sum_down = _row(
            base, y + 1, left, here, right, plane, width, height
        )
        red_sum += red
        green_sum += green
        blue_sum += blue
        gradient_x = (difference_up + 2 * difference + difference_down) * 0.125
        gradient_y = (sum_down - sum_up) * 0.125
        x_sum += tl.abs(gradient_x)
        y_sum += tl.abs(gradient_y)
        peak = tl.maximum(peak, gradient_x * gradient_x + gradient_y * gradient_y)
        north, south, aside = _between(y, p, q, small_height)
        upper, lower = small + north * small_width, small + south * small_width
        above = (1 - along) * tl.load(upper + west) + along * tl.load(upper + east)
        below = (1 - along) * tl.load(lower + west) + along * tl.load(lower + east)
        lost = luma - ((1 - aside) * above + aside * below)
        lost_sum += lost * lost
        red, green, blue, luma = next_red, next_green, next_blue, next_luma
        difference_up, difference, sum_up, sum_here = difference, difference_down, sum_here, sum_down

    count = ((bottom - top) * (last - first)).to(tl.float32)
    red, green, blue = (
        _mean(red_sum, inside, count) / 255,
        _mean(green_sum, inside, count) / 255,
        _mean(blue_sum, inside, count) / 255,
    )
    lightness, green_red, blue_yellow = _lab(red, green, blue)
    most = tl.sqrt(tl.max(tl.where(inside, peak, 0.0), 1)) * 2
    detail = tl.sqrt(_mean(lost_sum, inside, count)) * 2
    at, keep, step = out + row * cols + col, col < cols, rows * cols
    _store(at, step, keep, red * 2 - 1, green * 2 - 1, blue * 2 - 1)
    _store(at + 3 * step, step, keep, lightness, green_red, blue_yellow)
    x_mean, y_mean = _mean(x_sum, inside, count) * 2, _mean(y_sum, inside, count) * 2
    _store(at + 6 * step, step, keep, x_mean, y_mean, most)
    centre_y = (2 * row + 1).to(tl.float32) / rows - 1 + tl.zeros((group,), tl.float32)
    centre_x = (2 * col + 1).to(tl.float32) / cols - 1
    off_y, off_x = centre_y * tile_rows, centre_x * tile_cols
    corner = (tile_rows * tile_rows + tile_cols * tile_cols).to(tl.float32)
    distance = tl.sqrt((off_y * off_y + off_x * off_x) / corner)
    _store(at + 9 * step, step, keep, centre_y, centre_x, distance)
    tl.store(at + 12 * step, detail, mask=keep)
