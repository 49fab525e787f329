"""Texture and the two scorers that need no question, as one module of fixed shape that can be exported.

Opponent processing and allocation stay in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from arrcoc import image, scorers, texture
from arrcoc.config import Config
from arrcoc.errors import EngineBuildError
from arrcoc.lod.beside import Beside
from arrcoc.records import Channel, Frame, Grid, Query, Texture

Planes = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""What `QueryFree` computes, by whatever engine."""

INPUTS = ("pixels", "background")
OUTPUTS = ("texture", "propositional", "perspectival")
_ANY = Query("", (), torch.empty(0))


class QueryFree(nn.Module):
    """Texture, propositional and perspectival map of frames of one shape."""

    def __init__(self, grid: Grid, cells: int) -> None:
        """Args: the tile grid; cells along the edge of a tile, of which its pixels must be a multiple."""
        super().__init__()
        assert grid.tile % cells == 0, (grid, cells)
        self._grid, self._cells = grid, cells

    def forward(self, pixels: Tensor, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Measure and judge.

        Args:
            pixels: uint8 [3, R*tile, C*tile].
            background: uint8 [3, R*t0, C*t0].

        Returns:
            texture fp32 [13, R*cells, C*cells], rounded to half precision, and two fp32 maps [R, C].
        """
        size = (self._grid.height, self._grid.width)
        # Builders take uint8 as an input alone, so it is widened here.
        frame = Frame(pixels.float(), background.float(), self._grid, torch.empty(0), size, size, 0.0, 1.0)
        maps = texture.extract_with_torch(frame, self._cells)
        made = Texture(maps, self._grid, self._cells)
        return maps.float(), scorers.propositional(made, _ANY), scorers.perspectival(made, _ANY)


def exportable(config: Config, token_px: int, height: int, width: int) -> Beside:
    """The module for the frame of an image of height x width pixels, with what exporting it needs.

    Raises:
        EngineBuildError: cells of the texture are not whole pixels.
    """
    tile = config.sides[3] * token_px
    if tile % config.cells:
        given = f"a plan stage with {config.cells} cells to a tile of {tile} pixels"
        raise EngineBuildError(given, "cells of whole pixels", "Set cells to a divisor, or leave it out")
    grid, _ = image.choose_grid(height, width, tile, config.max_tiles, config.max_distortion)
    random = torch.Generator().manual_seed(0)
    small = config.sides[0] * token_px
    shapes = [(3, grid.rows * edge, grid.cols * edge) for edge in (tile, small)]
    coarse = [torch.rand(1, 3, rows // 32, cols // 32, generator=random) * 255 for _, rows, cols in shapes]
    sizes = [shape[1:] for shape in shapes]
    inputs = [
        torch.nn.functional.interpolate(plane, size, mode="bilinear")[0].byte()
        for plane, size in zip(coarse, sizes, strict=True)
    ]
    name = f"plan_stage_{grid.height}x{grid.width}"
    return Beside(name, QueryFree(grid, config.cells).eval(), dict(zip(INPUTS, inputs, strict=True)), OUTPUTS)


def judged(planes: Planes, frame: Frame, cells: int) -> tuple[Texture, tuple[Tensor, Tensor]]:
    """A frame's texture and its two maps by a built engine of its shape."""
    maps, propositional, perspectival = planes(frame.pixels, frame.background)
    assert maps.shape[0] == len(Channel), maps.shape
    return Texture(maps.half(), frame.grid, cells), (propositional, perspectival)
