"""From pixels to a frame: the tile grid, antialiased resampling, exact pyramid levels, tile hashes."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from arrcoc import area_kernel
from arrcoc.config import Config
from arrcoc.hashing import hash_tiles, tile_hashes
from arrcoc.host_tiles import squares
from arrcoc.pixels import ImageInput, decode
from arrcoc.records import Frame, Grid
from arrcoc.resample import area_resample
from arrcoc.transfer import to_device

__all__ = [
    "ImageInput",
    "area_resample",
    "choose_grid",
    "decode",
    "frame",
    "hash_tiles",
    "overview_pixels",
    "tile_hashes",
    "tile_pixels",
]

_STEEP = 16  # CUDA's antialiased filter runs out of shared memory at about 23
_AT_ONCE = 1 << 26  # pixels whose three planes a GPU resizes in one go


def choose_grid(
    height: int, width: int, tile: int, max_tiles: int, max_distortion: float
) -> tuple[Grid, tuple[int, int]]:
    """Choose the grid of tiles that shows an image with the least change.

    With the image h x w, a frame H x W and scales sy = H/h, sx = W/w, the image is stretched to the
    whole frame where max(sy/sx, sx/sy) - 1 <= max_distortion; elsewhere both axes are scaled by
    min(sy, sx) and the frame's bottom or right is padding. Among all grids of at most `max_tiles`
    tiles the least cost wins, ties going to fewer tiles, then fewer rows:

        cost = |ln(content area / image area)|   detail lost, or tokens spent on enlargement
             + ln(frame area / content area)     tokens spent on padding
             + ln(1 + distortion)                shape changed

    The cost is 0 only for a frame of exactly the image's size, so whole tiles are never resampled.

    Args:
        height: image height in pixels, at least 1.
        width: image width in pixels, at least 1.
        tile: edge of a tile in pixels.
        max_tiles: most tiles.
        max_distortion: largest relative change of the aspect ratio.

    Returns:
        The grid, and the content's (height, width) in frame pixels. In a padded frame the content's
        shorter side s is rounded to whole pixels, at least 1, which itself changes the aspect ratio
        by at most 1/(2s - 1) as long as the unrounded side is half a pixel or more.
    """
    assert min(height, width, tile, max_tiles) >= 1
    rows, cols = _candidates(max_tiles)
    sy, sx = rows * (tile / height), cols * (tile / width)
    change = np.maximum(sy / sx, sx / sy)
    stretched = change <= 1 + max_distortion
    frame_area = sy * sx
    content_area = np.where(stretched, frame_area, np.minimum(sy, sx) ** 2)
    cost = np.abs(np.log(content_area)) + np.log(frame_area / content_area)
    cost += np.where(stretched, np.log(change), 0.0)
    # Rounded, so that the order of candidates and not the last bit breaks ties.
    best = int(np.argmin(np.round(cost, 9)))
    grid = Grid(int(rows[best]), int(cols[best]), tile)
    if stretched[best]:
        return grid, (grid.height, grid.width)
    return grid, _fitted(height, width, grid)


@lru_cache(maxsize=16)
def _candidates(max_tiles: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows and columns of every grid of at most `max_tiles` tiles, by count, then by rows."""
    pairs = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    pairs.sort(key=lambda pair: (pair[0] * pair[1], pair[0]))
    table = np.asarray(pairs, dtype=np.float64)
    return table[:, 0], table[:, 1]


def _fitted(height: int, width: int, grid: Grid) -> tuple[int, int]:
    """Size of an image scaled to fit a grid's frame, in integer arithmetic, rounded half up."""
    if grid.height * width <= grid.width * height:
        return grid.height, max(1, (2 * width * grid.height + height) // (2 * height))
    return max(1, (2 * height * grid.width + width) // (2 * width)), grid.width


def frame(pixels: Tensor, config: Config, token_px: int, device: torch.device) -> Frame:
    """Bring an image onto the device as a frame of whole tiles.

    Args:
        pixels: uint8 [3, h, w], as `decode` returns it.
        config: `sides`, `max_tiles`, `max_distortion` and `halo` are read.
        token_px: edge of a merged vision token in pixels; a tile is `sides[3] * token_px` pixels.
        device: where the frame goes; resampling runs there.

    Returns:
        The frame. Its content is the image resampled with an antialiased bicubic filter, bit-equal
        to the image where the sizes are equal; padding repeats the content's last row and column.
    """
    assert pixels.dtype == torch.uint8
    assert tuple(pixels.shape[:-2]) == (3,)
    source = (int(pixels.shape[1]), int(pixels.shape[2]))
    tile = config.sides[3] * token_px
    grid, content = choose_grid(*source, tile, config.max_tiles, config.max_distortion)
    framed = _padded(_resize(pixels.to(device, non_blocking=True), content), grid)
    sy, sx = content[0] / source[0], content[1] / source[1]
    return Frame(
        pixels=framed,
        background=area_resample(framed, tile, config.sides[0] * token_px),
        grid=grid,
        hashes=framed.new_empty(0, 4, dtype=torch.int64) if config.halo else tile_hashes(framed, grid),
        source=source,
        content=content,
        distortion=max(sy / sx, sx / sy) - 1,
        scale=math.sqrt(sy * sx),
    )


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, h, w] to `size`; a large image plane by plane, because fp32 planes are large."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    at_once = pixels.is_cuda and max(pixels[0].numel(), math.prod(size)) <= _AT_ONCE
    return torch.cat([_resize_planes(part, size) for part in torch.split(pixels, 3 if at_once else 1)])


def _resize_planes(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [N, h, w]; a reduction too steep for CUDA's filter begins with means, to 8 times the size."""
    if size[1] == 1 < size[0]:
        # torch 2.13's antialiased filter on the CPU repeats the first row when the result is one column.
        return _resize_planes(planes.mT.contiguous(), (1, size[0])).mT
    wide = planes[:, None].float()
    pairs = list(zip(planes.shape[1:], size, strict=True))
    if any(old > _STEEP * new for old, new in pairs):
        rows, cols = (8 * new if old > _STEEP * new else old for old, new in pairs)
        wide = F.adaptive_avg_pool2d(wide, (rows, cols))
    wide = F.interpolate(wide, size, mode="bicubic", align_corners=False, antialias=True)
    return wide[:, 0].clamp_(0, 255).round_().to(torch.uint8)


def _padded(content: Tensor, grid: Grid) -> Tensor:
    """Repeat the last column and the last row until the frame is full."""
    _, height, width = content.shape
    if (height, width) == (grid.height, grid.width):
        return content.contiguous()
    padded = content.new_empty(3, grid.height, grid.width)
    padded[:, :height, :width] = content
    padded[:, :height, width:] = content[:, :, -1:]
    padded[:, height:] = padded[:, height - 1 : height]
    return padded


def tile_pixels(frame: Frame, side_px: int, index: Tensor, margin: int = 0) -> Tensor:
    """Tiles at a level of detail, resampled for the asked tiles only.

    Args:
        frame: the frame.
        side_px: edge of a tile at that level, in pixels.
        index: int64 [K], raster indices of the tiles, on any device.
        margin: pixels of the level to add on every side.

    Returns:
        uint8 [K, 3, side_px + 2*margin, side_px + 2*margin], bit-equal to slices of the whole frame's level,
        which goes on beyond the frame with its edge pixels repeated.
    """
    grid, where = frame.grid, to_device(index, frame.pixels.device)
    common = math.gcd(grid.tile, side_px)
    q, p = grid.tile // common, side_px // common
    if area_kernel.runs_on(frame.pixels.device):
        return area_kernel.resample_tiles(frame.pixels, where, grid.cols, side_px, q, p, margin)
    if margin == 0:
        return area_resample(_cut(frame.pixels, grid, where), grid.tile, side_px)
    if q == p and not frame.pixels.is_cuda:
        return squares(repeat(frame.pixels), _corners(grid, where, side_px, margin), side_px + 2 * margin)
    reach = -(-margin // p)  # groups of q pixels, which become p: a margin may end inside one
    span, groups = common + 2 * reach, (grid.rows * common, grid.cols * common)
    places = where // grid.cols, where % grid.cols
    starts = [
        (at * common - reach).clamp(0, max(count - span, 0)) for at, count in zip(places, groups, strict=True)
    ]
    level = area_resample(_windows(frame.pixels, starts, span, q), q, p)
    if not level.is_cuda:
        begins = zip(*((start * p).tolist() for start in starts), strict=True)
        corners = zip(_corners(grid, where, side_px, margin), begins, strict=True)
        return squares(level, [(y - dy, x - dx) for (y, x), (dy, dx) in corners], side_px + 2 * margin)
    # The level's own edge pixels are repeated, not the frame's: so places are clamped at the level.
    steps = torch.arange(-margin, side_px + margin, device=where.device)
    down, right = (
        (at[:, None] * side_px + steps).clamp(0, count * p - 1) - start[:, None] * p
        for at, count, start in zip(places, groups, starts, strict=True)
    )
    tall = level.gather(2, down[:, None, :, None].expand(-1, 3, -1, level.shape[3]))
    return tall.gather(3, right[:, None, None, :].expand(-1, 3, tall.shape[2], -1))


def _windows(pixels: Tensor, starts: Sequence[Tensor], span: int, group: int) -> Tensor:
    """[K, 3, h, w] of [3, H, W]: `span` groups of pixels along each axis, or all there are, from `starts`."""
    height, width = (min(span * group, edge) for edge in pixels.shape[1:])
    every = pixels.unfold(1, height, group).unfold(2, width, group)
    return every[:, starts[0], starts[1]].transpose(0, 1)


def overview_pixels(frame: Frame, height: int, width: int) -> Tensor:
    """The frame at LOD background, reduced further.

    Args:
        frame: the frame.
        height: pixels, at most those of `frame.background`.
        width: likewise.

    Returns:
        uint8 [3, height, width]: means over blocks where both edges divide exactly, else an antialiased
        bilinear reduction; rounded.
    """
    wide = frame.background[None].float()
    if wide.shape[2] % height == wide.shape[3] % width == 0:
        small = F.avg_pool2d(wide, (wide.shape[2] // height, wide.shape[3] // width))
    else:
        small = F.interpolate(wide, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return small[0].round_().clamp_(0, 255).to(torch.uint8)


def _corners(grid: Grid, index: Tensor, side_px: int, margin: int) -> list[tuple[int, int]]:
    """Top and left of tiles with a margin, at the level where a tile's edge is `side_px` pixels."""
    places = (divmod(tile, grid.cols) for tile in index.tolist())
    return [(row * side_px - margin, col * side_px - margin) for row, col in places]


def _cut(pixels: Tensor, grid: Grid, index: Tensor) -> Tensor:
    """Native tiles uint8 [K, 3, tile, tile]; `index` lies where the pixels do."""
    assert tuple(pixels.shape) == (3, grid.height, grid.width)
    if not pixels.is_cuda:
        return squares(repeat(pixels), _corners(grid, index, grid.tile, 0), grid.tile)
    tiled = pixels.view(3, grid.rows, grid.tile, grid.cols, grid.tile)
    if grid.tile % 8 == 0:  # by the word: indexing counts elements
        words = tiled.view(torch.int64)
        return words[:, index // grid.cols, :, index % grid.cols].view(torch.uint8)
    return tiled[:, index // grid.cols, :, index % grid.cols]
