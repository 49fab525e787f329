"""From boxes in source pixels to what cells and tiles of a frame should say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from arrcoc.records import Grid

FrameBox = tuple[int, int, int, int]


def frame_boxes(
    boxes: Sequence[tuple[float, float, float, float]], source: tuple[int, int], content: tuple[int, int]
) -> list[FrameBox]:
    """Boxes of the source image as whole pixels of the frame: (x0, y0, x1, y1), x1 and y1 exclusive.

    An image of h x w pixels fills the frame's upper left `content` = H x W and not the padding beyond, so
    x' = x*W/w and y' = y*H/h (`Frame.scale` is the mean of both and too coarse here). Edges are rounded to
    the nearest pixel, within the content, and a box keeps at least one pixel.

    Args:
        boxes: (x0, y0, x1, y1) in source pixels.
        source: height and width of the source image.
        content: height and width of the part of the frame that shows it.
    """
    sy, sx = content[0] / source[0], content[1] / source[1]
    found = []
    for x0, y0, x1, y1 in boxes:
        left, right = _span(x0 * sx, x1 * sx, content[1])
        top, bottom = _span(y0 * sy, y1 * sy, content[0])
        found.append((left, top, right, bottom))
    return found


def _span(start: float, stop: float, end: int) -> tuple[int, int]:
    first = min(int(start + 0.5), end - 1)
    return first, min(max(int(stop + 0.5), first + 1), end)


def cell_coverage(boxes: Sequence[FrameBox], grid: Grid, cells: int) -> Tensor:
    """Share of each cell's area that the box covering most of it covers: fp32 [R*cells, C*cells] in [0, 1].

    Args:
        boxes: in frame pixels.
        grid: the tile grid.
        cells: cells along one edge of a tile.
    """
    edge = grid.tile / cells
    found = torch.zeros(grid.rows * cells, grid.cols * cells)
    for x0, y0, x1, y1 in boxes:
        rows = _overlap(y0, y1, grid.rows * cells, edge)
        cols = _overlap(x0, x1, grid.cols * cells, edge)
        found = torch.maximum(found, rows[:, None] * cols[None, :])
    return found


def _overlap(start: int, stop: int, count: int, edge: float) -> Tensor:
    """Share of each of `count` intervals of length `edge` that lies in [start, stop)."""
    lower = torch.arange(count, dtype=torch.float64) * edge
    shared = (lower + edge).clamp(max=stop) - lower.clamp(min=start)
    return (shared.clamp(min=0) / edge).float()


def tile_hits(boxes: Sequence[FrameBox], grid: Grid) -> Tensor:
    """Which tiles share a pixel with a box: fp32 [R, C], 0 or 1."""
    return (cell_coverage(boxes, grid, 1) > 0).float()


def spread(tiles: Tensor, cells: int) -> Tensor:
    """Give every cell its tile's value: [R, C] to [R*cells, C*cells]."""
    return functional.interpolate(tiles[None, None], scale_factor=cells, mode="nearest")[0, 0]
