"""Lays encoded tiles out as one sequence of vision tokens, and prompts as one sequence of embeddings.

Token (i, j) of a tile at row r, column c and side s stands at h = r*S + (i + 1/2) * S/s - 1/2, and w
likewise, S being the side of LOD high: the centre of what it shows, in units of full-resolution tokens.
When every tile is high these are the stock model's M-RoPE positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from arrcoc.records import Features, Grid, Layout, Lod, Plan, Prompt, Segment, Tiles, VisionSequence
from arrcoc.transfer import to_device

Order = Literal["raster", "tile"]


def tile_positions(index: Tensor, cols: int, side: int, high: int) -> Tensor:
    """Frame positions fp32 [2, K, side**2] (h, w) of the tokens of tiles with raster indices int64 [K].

    Args:
        cols: C, tiles per row.
        side: tokens along an encoded tile's edge.
        high: S, the side of LOD high.
    """
    offset = (torch.arange(side, dtype=torch.float32) + 0.5) * (high / side) - 0.5
    top, left = (index // cols * high).float(), (index % cols * high).float()
    rows = (top[:, None, None] + offset[None, :, None]).expand(-1, side, side)
    columns = (left[:, None, None] + offset[None, None, :]).expand(-1, side, side)
    return torch.stack((rows, columns)).flatten(2)


def glimpse_positions(grid: Grid, side: int, high: int, stride: int = 1) -> Tensor:
    """Frame positions fp32 [2, m] of the tokens of a whole frame, in raster order over it.

    With rows x cols = ceil(R*side/stride) x ceil(C*side/stride) tokens, token (i, j) stands at
    h = (i + 1/2) * R*S/rows - 1/2 and w = (j + 1/2) * C*S/cols - 1/2.

    Args:
        grid: the tile grid.
        side: tokens along a tile's edge.
        high: S, the side of LOD high.
        stride: 1 for the glimpse, above 1 for a coarser overview.
    """
    shape = grid.shape_in_tokens(side, stride)
    edges = (grid.rows * high, grid.cols * high)
    rows, cols = (
        (torch.arange(count, dtype=torch.float32) + 0.5) * (edge / count) - 0.5
        for count, edge in zip(shape, edges, strict=True)
    )
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij")).flatten(1)


def replace(grid: Grid, plan: Plan, tiles: Sequence[Tiles], order: Order) -> VisionSequence:
    """Each tile once, at its LOD.

    Args:
        tiles: every tile of the grid exactly once.
        order: `raster` sorts all tokens by position, row first, as the stock model orders an image's
            tokens; `tile` keeps a tile's tokens together, tiles in raster order.
    """
    assert sum(len(t.index) for t in tiles) == grid.count, "replace needs every tile exactly once"
    tokens, deepstack, where = _flatten(tiles, grid.cols, plan.sides[3], order)
    return _one_segment(tokens, deepstack, where, grid, plan)


def refine(
    grid: Grid, plan: Plan, overview: Features, tiles: Sequence[Tiles], order: Order
) -> VisionSequence:
    """The overview first, then the refined tiles, all in one frame.

    The overview comes first so that its keys and values are the same for every question on the image.

    Args:
        grid: the tile grid.
        plan: its sides and its overview's stride count.
        overview: K = 1, m = ceil(R*s0/stride) * ceil(C*s0/stride) tokens in raster order over the frame.
        tiles: those above LOD background.
        order: of the refined tiles' tokens, as for `replace`.
    """
    where = glimpse_positions(grid, plan.sides[0], plan.sides[3], plan.overview_stride)
    tokens, deepstack = overview.tokens[0], overview.deepstack[:, 0]
    if tiles:
        more_tokens, more_deepstack, more_where = _flatten(tiles, grid.cols, plan.sides[3], order)
        tokens = torch.cat((tokens, more_tokens))
        deepstack = torch.cat((deepstack, more_deepstack), dim=1)
        where = torch.cat((where, more_where), dim=1)
    else:  # the overview may be shared
        tokens, deepstack = tokens.clone(), deepstack.clone()
    return _one_segment(tokens, deepstack, where, grid, plan)


def crops(grid: Grid, plan: Plan, overview: Features, tiles: Sequence[Tiles]) -> VisionSequence:
    """The overview, then every refined tile as an image of its own with a caption of where it lies.

    Positions inside a crop count its own tokens from 0, as pretrained models saw zoomed crops.
    """
    where = [glimpse_positions(grid, plan.sides[0], plan.sides[3], plan.overview_stride)]
    tokens, deepstack = [overview.tokens[0]], [overview.deepstack[:, 0]]
    count = overview.tokens.shape[1]
    segments = [Segment(0, count, extent(grid, plan.sides[3]), "")]
    for tile, part, row in _in_raster_order(tiles):
        side = part.side
        tokens.append(part.features.tokens[row])
        deepstack.append(part.features.deepstack[:, row])
        where.append(tile_positions(torch.zeros(1, dtype=torch.long), 1, side, side)[:, 0])
        segments.append(Segment(count, count + side * side, float(side), caption(tile, grid.rows, grid.cols)))
        count += side * side
    positions = to_device(_with_time(torch.cat(where, dim=1)), tokens[0].device)
    return VisionSequence(torch.cat(tokens), torch.cat(deepstack, dim=1), positions, tuple(segments))


def assemble(
    grid: Grid, plan: Plan, overview: Features | None, tiles: Sequence[Tiles], order: Order
) -> VisionSequence:
    """Lay out one image as its plan says; the result has exactly `plan.tokens` tokens."""
    if not plan.overview_stride:
        sequence = replace(grid, plan, tiles, order)
    else:
        assert overview is not None, "this plan keeps an overview"
        if plan.layout is Layout.CROPS:
            sequence = crops(grid, plan, overview, tiles)
        else:
            sequence = refine(grid, plan, overview, tiles, order)
    assert sequence.tokens.shape[0] == plan.tokens, (sequence.tokens.shape[0], plan.tokens)
    return sequence


def background_tiles(grid: Grid, plan: Plan, glimpse: Features) -> Tiles:
    """The tiles that stay at LOD background, cut out of a joint glimpse."""
    side = plan.sides[0]
    index = (plan.lod.flatten() == Lod.BACKGROUND).nonzero()[:, 0]
    tokens = _cut(glimpse.tokens[0], grid, side)
    planes = torch.stack([_cut(plane, grid, side) for plane in glimpse.deepstack[:, 0]])
    chosen = to_device(index, tokens.device)
    return Tiles(Lod.BACKGROUND, side, index, Features(tokens[chosen], planes[:, chosen]))


def join_tiles(features: Features, grid: Grid, side: int) -> Features:
    """All R*C tiles of one LOD as one image: K = 1, tokens in raster order over the frame."""
    planes = torch.stack([_paste(plane, grid, side) for plane in features.deepstack])
    return Features(_paste(features.tokens, grid, side)[None], planes[:, None])


def prompt(
    text: Sequence[Tensor], images: Sequence[VisionSequence], captions: Sequence[Sequence[Tensor]]
) -> Prompt:
    """Join embedded text and laid out images, with M-RoPE positions counted as the stock model counts them.

    Args:
        text: k + 1 runs of embeddings [m, D]; run i stands before image i, the last one after all images.
        images: k images.
        captions: for every image, one run of embeddings per segment after the first: what stands between
            the segments (end of vision, caption, start of vision).
    """
    assert len(text) == len(images) + 1, (len(text), len(images))
    builder = _PromptBuilder()
    for run, image, between in zip(text[:-1], images, captions, strict=True):
        builder.add_text(run)
        for number, segment in enumerate(image.segments):
            if number:
                builder.add_text(between[number - 1])
            builder.add_segment(image, segment)
    builder.add_text(text[-1])
    return builder.build()


class _PromptBuilder:
    def __init__(self) -> None:
        self.embeds: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.vision: list[Tensor] = []
        self.deepstack: list[Tensor] = []
        self.next = 0.0

    def add_text(self, run: Tensor) -> None:
        steps = torch.arange(len(run), dtype=torch.float32, device=run.device) + self.next
        self._add(run, steps.expand(3, -1), is_vision=False)
        self.next += len(run)

    def add_segment(self, image: VisionSequence, segment: Segment) -> None:
        part = slice(segment.start, segment.stop)
        self._add(image.tokens[part], image.positions[:, part] + self.next, is_vision=True)
        self.deepstack.append(image.deepstack[:, part])
        self.next += segment.extent

    def _add(self, embeds: Tensor, positions: Tensor, *, is_vision: bool) -> None:
        self.embeds.append(embeds)
        self.positions.append(positions)
        self.vision.append(torch.full((len(embeds),), is_vision, device=embeds.device))

    def build(self) -> Prompt:
        embeds = torch.cat(self.embeds)
        planes = (
            torch.cat(self.deepstack, dim=1) if self.deepstack else embeds.new_zeros(0, 0, embeds.shape[1])
        )
        return Prompt(
            embeds[None], torch.cat(self.positions, dim=1), torch.cat(self.vision), planes, self.next
        )


def _flatten(tiles: Sequence[Tiles], cols: int, high: int, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [n, D], planes [L, n, D] and positions [2, n] of tiles of several LODs, in one order."""
    where = [tile_positions(t.index, cols, t.side, high).flatten(1) for t in tiles]
    owner = torch.cat([t.index.repeat_interleave(t.side**2) for t in tiles])
    positions = torch.cat(where, dim=1)
    permutation = owner.argsort(stable=True) if order == "tile" else _raster_permutation(positions)
    tokens = torch.cat([t.features.tokens.flatten(0, 1) for t in tiles])
    deepstack = torch.cat([t.features.deepstack.flatten(1, 2) for t in tiles], dim=1)
    chosen = to_device(permutation, tokens.device)
    return tokens[chosen], deepstack[:, chosen], positions[:, permutation]


def _raster_permutation(positions: Tensor) -> Tensor:
    by_column = positions[1].argsort(stable=True)
    return by_column[positions[0][by_column].argsort(stable=True)]


def _in_raster_order(tiles: Sequence[Tiles]) -> list[tuple[int, Tiles, int]]:
    found = [(tile, part, row) for part in tiles for row, tile in enumerate(part.index.tolist())]
    return sorted(found, key=lambda item: item[0])


def _one_segment(tokens: Tensor, deepstack: Tensor, where: Tensor, grid: Grid, plan: Plan) -> VisionSequence:
    whole = Segment(0, tokens.shape[0], extent(grid, plan.sides[3]), "")
    return VisionSequence(tokens, deepstack, to_device(_with_time(where), tokens.device), (whole,))


def extent(grid: Grid, high: int) -> float:
    """Text goes on after the longer edge, as in the stock model."""
    return float(max(grid.rows, grid.cols) * high)


def _with_time(where: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(where[:1]), where))


def caption(tile: int, rows: int, cols: int) -> str:
    """Where a tile lies, in thousandths of the frame (x0, y0, x1, y1), the unit Qwen3-VL grounds in."""
    row, col = divmod(tile, cols)
    x0, x1 = (round(1000 * c / cols) for c in (col, col + 1))
    y0, y1 = (round(1000 * r / rows) for r in (row, row + 1))
    return f"Detail at [{x0}, {y0}, {x1}, {y1}]:"


def _cut(plane: Tensor, grid: Grid, side: int) -> Tensor:
    """[R*side * C*side, D] in raster order over the frame to [R*C, side**2, D]."""
    return rearrange(plane, "(r i c j) d -> (r c) (i j) d", r=grid.rows, i=side, c=grid.cols, j=side)


def _paste(tiles: Tensor, grid: Grid, side: int) -> Tensor:
    """Inverse of `_cut`."""
    return rearrange(tiles, "(r c) (i j) d -> (r i c j) d", r=grid.rows, i=side, c=grid.cols, j=side)
