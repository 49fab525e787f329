"""Thirteen named feature maps of a frame, each measured on a fixed scale.

Nothing is normalised over an image or a batch: the same pixels always give the same texture.
"""

from __future__ import annotations

import math
from functools import lru_cache

import kornia
import torch
from torch import Tensor
from torch.nn import functional

from arrcoc import texture_kernel
from arrcoc.config import Config
from arrcoc.records import Channel, Frame, Grid, Texture

STRIP_PIXELS = 1 << 24
"""Native pixels worked on at once (plus a few rows above and below), which bounds memory."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G, B in luminance (ITU-R BT.601 luma)."""
GRADIENT_GAIN = 2.0
"""The Sobel operator divided by 8 answers a black-white step with 1/2; this makes it 1."""
DETAIL_GAIN = 2.0
"""Black and white in equal parts leave an RMS of 1/2 about their mean; this makes it 1."""
XYZ_OVER_WHITE = (
    ((0.412453, 0.357580, 0.180423), 0.95047),
    ((0.212671, 0.715160, 0.072169), 1.0),
    ((0.019334, 0.119193, 0.950227), 1.08883),
)
"""Weights of linear R, G, B in CIE X, Y, Z, and X, Y, Z of the D65 white point."""
LAB_CENTRE_SCALE = ((50.0, 50.0), (0.0, 100.0), (0.0, 110.0))
"""Centre and scale of L* (0..100), a* (-86..98) and b* (-108..94) of the sRGB gamut."""


def extract(frame: Frame, config: Config) -> Texture:
    """Measure the 13 texture channels of a frame (see `arrcoc.records.Channel`).

    A cell is 1/`config.cells` of a tile's edge. Where the tile's pixels are not divisible by that, cell i
    covers pixels floor(i*tile/cells) to ceil((i+1)*tile/cells), so neighbouring cells may share one row or
    column of pixels; cells never reach beyond their tile.

    - red, green, blue: area mean of sRGB, 0..255 mapped to [-1, 1].
    - lightness, green_red, blue_yellow: CIE L*a*b* (D65) of that mean: L*/50 - 1, a*/100, b*/110.
    - sobel_x, sobel_y: mean over the cell of the absolute Sobel derivative of native luminance, in [0, 1].
      Signed means would cancel on text, whose strokes have two opposite edges.
    - sobel_magnitude: maximum over the cell of sqrt(gx**2 + gy**2), about [0, 1]: 1 for a black-white step.
      The peak shows a single thin stroke and is not a function of the two means.
    - y, x: the cell's centre, -1 and 1 at the frame's edges.
    - eccentricity: distance in pixels from the frame's centre over that of its corner, in [0, 1].
    - detail: 2 * RMS over the cell of native luminance minus the bilinearly enlarged background luminance:
      the band of the Laplacian pyramid (Burt & Adelson 1983) that LOD background loses, in [0, 1].

    Args:
        frame: uint8 pixels [3, R*tile, C*tile] and background [3, R*t0, C*t0].
        config: `cells` is read.

    Returns:
        fp16 maps [13, R*cells, C*cells] on the frame's device. On CUDA with triton one kernel makes them,
        elsewhere torch; neither waits for the device.
    """
    grid = frame.grid
    assert frame.pixels.shape == (3, grid.height, grid.width), (frame.pixels.shape, grid)
    if not texture_kernel.usable(frame.pixels):
        return Texture(maps=extract_with_torch(frame, config.cells), grid=grid, cells=config.cells)
    pixels, background = frame.pixels.contiguous(), frame.background.contiguous()
    where = texture_kernel.Addresses(pixels.device)
    where.point(pixels, background)
    return extract_at(where, grid, background.shape[1] // grid.rows, config.cells)


def extract_at(where: texture_kernel.Addresses, grid: Grid, small_tile: int, cells: int) -> Texture:
    """`extract` by the kernel, of the frame that `where` points to.

    Args:
        where: the place of uint8 pixels [3, R*tile, C*tile] and background [3, R*t0, C*t0].
        grid: the tile grid.
        small_tile: t0, edge of a tile of the background in pixels.
        cells: cells along one edge of a tile.
    """
    shape = (len(Channel), grid.rows * cells, grid.cols * cells)
    maps = torch.empty(shape, dtype=torch.float16, device=where.table.device)
    texture_kernel.measure(where, (grid.rows, grid.cols), grid.tile, small_tile, cells, maps)
    return Texture(maps=maps, grid=grid, cells=cells)


def extract_with_torch(frame: Frame, cells: int) -> Tensor:
    """The maps of `extract`, fp16 [13, R*cells, C*cells], in torch alone."""
    grid = frame.grid
    strips = [_strip(frame, rows, cells) for rows in _strip_rows(grid)]
    measured = torch.cat(strips, dim=1)
    rgb, bands = measured[:3], measured[3:]
    maps = torch.cat([rgb * 2 - 1, _lab(rgb), bands[:3], _place(grid, cells, rgb.device), bands[3:]])
    assert maps.shape == (len(Channel), grid.rows * cells, grid.cols * cells), maps.shape
    return maps.half()


def _strip_rows(grid: Grid) -> list[tuple[int, int]]:
    """Split the rows of tiles into runs of at most `STRIP_PIXELS` native pixels, at least one row each."""
    step = max(1, STRIP_PIXELS // (grid.tile * grid.width))
    return [(start, min(start + step, grid.rows)) for start in range(0, grid.rows, step)]


def _strip(frame: Frame, rows: tuple[int, int], cells: int) -> Tensor:
    """Pooled R, G, B in [0, 1], Sobel x, y, magnitude and detail of some rows of tiles, fp32 [7, h, w]."""
    tile, small_tile = frame.grid.tile, frame.background.shape[1] // frame.grid.rows
    # A tile is `units` equal slabs of whole rows in both planes; one slab around the strip is all that the
    # filters and the enlargement inside it can see, so strips give what the whole frame would.
    units = math.gcd(tile, small_tile)
    first, last = max(rows[0] * units - 1, 0), min(rows[1] * units + 1, frame.grid.rows * units)
    pixels = frame.pixels[:, _slabs(first, last, tile // units)]
    small = frame.background[:, _slabs(first, last, small_tile // units)]
    inside = _slabs(rows[0] * units - first, rows[1] * units - first, tile // units)
    size = ((rows[1] - rows[0]) * cells, frame.grid.cols * cells)
    luma = luminance(pixels)
    parts = [
        _pool_rgb(pixels[:, inside], size),
        _pool_gradient(luma, inside, size),
        _pool_detail(luma, luminance(small), inside, size),
    ]
    return torch.cat(parts)


def _slabs(first: int, last: int, height: int) -> slice:
    return slice(first * height, last * height)


def luminance(pixels: Tensor) -> Tensor:
    """BT.601 luma of uint8 [3, H, W] as fp32 [H, W] in [0, 1], one plane at a time."""
    luma = pixels[0] * (LUMA[0] / 255)
    for plane, weight in zip(pixels[1:], LUMA[1:], strict=True):
        luma.add_(plane, alpha=weight / 255)
    return luma


def _pool_rgb(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Area mean of uint8 [3, H, W] per cell, fp32 [3, *size] in [0, 1]; one plane at a time."""
    return torch.cat([_mean(plane[None].float(), size) for plane in pixels]) / 255


def _pool_gradient(luma: Tensor, inside: slice, size: tuple[int, int]) -> Tensor:
    """Sobel |x|, |y| (means) and magnitude (maximum) per cell, fp32 [3, *size]."""
    bordered = functional.pad(luma[None, None], (1, 1, 1, 1), mode="replicate")
    gradient = functional.conv2d(bordered, _sobel(luma.device))[0, :, inside]
    peak = _maximum(gradient.square().sum(dim=0, keepdim=True), size).sqrt()
    means = _mean(gradient.abs(), size)
    return torch.cat([means, peak]) * GRADIENT_GAIN


@lru_cache(maxsize=16)
def _sobel(device: torch.device) -> Tensor:
    """The Sobel operators along x and y divided by 8, fp32 [2, 1, 3, 3].

    Kept, as making it copies numbers to the device and waits for that.
    """
    with torch.inference_mode(False):
        kernel: Tensor = kornia.filters.get_spatial_gradient_kernel2d("sobel", 1, dtype=torch.float32)
        return (kernel[:, None] / 8).to(device)


def _pool_detail(luma: Tensor, small: Tensor, inside: slice, size: tuple[int, int]) -> Tensor:
    """RMS per cell of what the small plane cannot show of the native one, fp32 [1, *size]."""
    shape = (luma.shape[0], luma.shape[1])
    shown = functional.interpolate(small[None, None], size=shape, mode="bilinear", align_corners=False)[0]
    lost = (luma[None, inside] - shown[:, inside]).square_()
    return _mean(lost, size).sqrt() * DETAIL_GAIN


def _mean(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean per cell, fp32 [n, H, W] to [n, *size]."""
    blocks = _blocks(planes, size)
    return functional.adaptive_avg_pool2d(planes, size) if blocks is None else blocks.mean(dim=(2, 4))


def _maximum(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Maximum per cell, fp32 [n, H, W] to [n, *size]."""
    blocks = _blocks(planes, size)
    return functional.adaptive_max_pool2d(planes, size) if blocks is None else blocks.amax(dim=(2, 4))


def _blocks(planes: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Cells as [n, rows, h, cols, w] where they are whole pixels, else None.

    Reducing these is the same as adaptive pooling, and 10 (mean) to 22 (maximum) times as fast on an H200.
    """
    count, height, width = planes.shape
    if height % size[0] or width % size[1]:
        return None
    return planes.reshape(count, size[0], height // size[0], size[1], width // size[1])


def _lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB [3, h, w] in [0, 1], each channel centred and scaled by constants.

    The formulas and figures of `kornia.color.rgb_to_lab`, which copies its matrices to the device anew each
    time and waits for that.
    """
    linear = kornia.color.rgb_to_linear_rgb(rgb)
    red, green, blue = linear.unbind()
    x, y, z = (_lab_root((red * r + green * g + blue * b) / white) for (r, g, b), white in XYZ_OVER_WHITE)
    lab = (116 * y - 16, 500 * (x - y), 200 * (y - z))
    return torch.stack([(plane - c) / s for plane, (c, s) in zip(lab, LAB_CENTRE_SCALE, strict=True)])


def _lab_root(value: Tensor) -> Tensor:
    """The cube root of CIE L*a*b* with its linear foot."""
    return torch.where(value > 0.008856, value.clamp_min(0.008856) ** (1 / 3), 7.787 * value + 4 / 29)


def _place(grid: Grid, cells: int, device: torch.device) -> Tensor:
    """The y, x and eccentricity channels, fp32 [3, R*cells, C*cells]."""
    y = _centres(grid.rows * cells, device)[:, None].expand(-1, grid.cols * cells)
    x = _centres(grid.cols * cells, device).expand(grid.rows * cells, -1)
    # In units of tiles both axes share one scale, whatever the frame's aspect ratio.
    corner = (grid.rows**2 + grid.cols**2) ** 0.5
    distance = ((y * grid.rows).square() + (x * grid.cols).square()).sqrt()
    return torch.stack([y, x, distance / corner])


def _centres(count: int, device: torch.device) -> Tensor:
    """Centres of `count` equal intervals that together cover [-1, 1]."""
    return (torch.arange(count, device=device) * 2 + 1) / count - 1
