"""The kernel of `arrcoc.area_kernel`; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["channels", "height", "width", "edge_h", "edge_w", "level_h", "level_w", "cols", "side", "margin"]


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def area(  # type: ignore[no-untyped-def]
    planes,
    index,
    out,
    channels,
    height,
    width,
    edge_h,
    edge_w,
    level_h,
    level_w,
    cols,
    side,
    margin,
    q: tl.constexpr,
    p: tl.constexpr,
    taps: tl.constexpr,
    whole: tl.constexpr,
    block: tl.constexpr,
):
    """`block` pixels of one plane: sums of overlaps in 1/p pixels, as `arrcoc.resample._box_sums`."""
    plane = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < edge_h * edge_w
    y, x = at // edge_w, at % edge_w
    source = plane
    if not whole:
        where = tl.load(index + plane // channels).to(tl.int32)
        source = plane % channels
        y = tl.minimum(tl.maximum(y + (where // cols) * side - margin, 0), level_h - 1)
        x = tl.minimum(tl.maximum(x + (where % cols) * side - margin, 0), level_w - 1)
    # Pixel j spans [j*p, (j+1)*p) of its group of q, window i spans [i*q, (i+1)*q).
    row, col = y % p, x % p
    top, left = row * q // p, col * q // p
    start = planes + source.to(tl.int64) * height * width
    total = tl.zeros((block,), tl.int32)
    for down in range(taps):
        j = top + down
        tall = tl.minimum((row + 1) * q, (j + 1) * p) - tl.maximum(row * q, j * p)
        line = ((y // p) * q + j).to(tl.int64) * width + (x // p) * q
        for right in range(taps):
            i = left + right
            wide = tl.minimum((col + 1) * q, (i + 1) * p) - tl.maximum(col * q, i * p)
            touched = inside & (tall > 0) & (wide > 0)
            value = tl.load(start + line + i, mask=touched, other=0).to(tl.int32)
            total += value * tall * wide
    mean = (2 * total + q * q) // (2 * q * q)
    tl.store(out + plane.to(tl.int64) * edge_h * edge_w + at, mean.to(tl.uint8), mask=inside)
