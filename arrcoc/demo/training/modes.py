"""Ways to encode a training batch: the whole image as the stock model sees it, or tiles at mixed LODs.

whole, smaller: one image, at full resolution or scaled down. glimpse: the frame at LOD background alone.
refine, crops: an overview, then the refined tiles in the frame's positions or as images of their own.
replace: every tile once. high, uniform: every tile at one LOD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from arrcoc.demo.training import levels
from arrcoc.demo.training.batches import Batch
from arrcoc.demo.training.recipe import Recipe
from arrcoc.lod.tower import StaticTower, merge_order
from arrcoc.qwen import vision_weights
from arrcoc.records import Grid, Lod
from arrcoc.sequence import tile_positions
from arrcoc.vision import VisionWeights, axial_rotary, interpolated_positions

_STATS = ([0.5] * 3, [0.5] * 3)


class Part(NamedTuple):
    """Tokens of one LOD, or of one whole image.

    Attributes:
        tokens: [B, n, D].
        planes: [L, B, n, D].
        where: fp32 [B, 2, n], positions (h, w) in units of full-resolution tokens.
        spot: fp32 [B, 2, n], the centre (y, x) in px of what a token shows.
        reach: fp32 [B, n], half of the side in px of what a token shows.
    """

    tokens: Tensor
    planes: Tensor
    where: Tensor
    spot: Tensor
    reach: Tensor


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vision tokens of a batch, equally many for every example.

    Attributes:
        part: all tokens.
        extent: what the frame adds to the text position after it.
        crops: for layout crops, in each example the tiles after the overview in raster order, as (raster
            index, first token, side).
        glyph_states: [P, hidden], last hidden states of patches at full resolution.
        glyph_labels: int64 [P], the glyph in each of them.
    """

    part: Part
    extent: float
    crops: tuple[tuple[tuple[int, int, int], ...], ...]
    glyph_states: Tensor
    glyph_labels: Tensor


class BatchEncoder:
    """Encodes batches with the model's live weights."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        """Args: the stock model in training; the recipe."""
        self._model, self._recipe = model, recipe
        self._table = lru_cache(maxsize=64)(_position_table)

    def encode(
        self, batch: Batch, lod: Tensor | None = None, halo: int | None = None, stride: int | None = None
    ) -> Encoded:
        """Encode in the batch's mode.

        Args:
            batch: on the model's device.
            lod: int64 [B, R*C] instead of the batch's own allocation.
            halo: margin around tiles in tokens, instead of the step's.
            stride: of the overview, instead of the step's.
        """
        weights = vision_weights(self._model, _STATS)
        if batch.mode in {"whole", "smaller"}:
            return self._whole(weights, batch)
        drawn = self._recipe.margins(batch.plan_seed // 64)
        chosen = batch.lod if lod is None else lod.cpu()
        run = _TileRun(self._recipe, weights, batch, chosen, self._table)
        return run.encode(drawn[0] if halo is None else halo, drawn[1] if stride is None else stride)

    def _whole(self, weights: VisionWeights, batch: Batch) -> Encoded:
        """The image as one, positions counted as the stock model does."""
        side, images = batch.canvas // weights.token_px, batch.images
        if batch.mode == "smaller":
            generator = torch.Generator().manual_seed(batch.plan_seed // 64)
            least = max(1, side // 4)
            side = int(torch.randint(least, side, (1,), generator=generator)) if side > least else side
            images = _scaled(images, side * weights.token_px)
        hidden, (tokens, planes) = _run(weights, images, side)
        rows = torch.arange(side, dtype=torch.float32, device=images.device)
        where = torch.stack(torch.meshgrid(rows, rows, indexing="ij")).flatten(1).expand(len(images), -1, -1)
        size = batch.canvas / side
        reach = torch.full((len(images), side * side), size / 2, device=images.device)
        part = Part(tokens, planes, where, (where + 0.5) * size, reach)
        if batch.mode == "smaller":
            return Encoded(part, float(side), (), hidden[:0].flatten(0, 1), batch.glyphs[:0].flatten())
        labels = rearrange(batch.glyphs, "b (h i) (w j) -> (b h w i j)", i=weights.merge, j=weights.merge)
        return Encoded(part, float(side), (), hidden.flatten(0, 1), labels)


class _TileRun:
    """One batch, tile by tile."""

    def __init__(self, recipe: Recipe, weights: VisionWeights, batch: Batch, lod: Tensor, table: Any) -> None:
        count = batch.canvas // recipe.tile
        self.recipe, self.weights, self.batch, self.lod, self._table = recipe, weights, batch, lod, table
        self.grid = Grid(count, count, recipe.tile)
        self.high = recipe.sides[Lod.HIGH]
        self.device = batch.images.device

    def encode(self, halo: int, stride: int) -> Encoded:
        mode = self.batch.mode
        keeps = mode in {"refine", "crops", "glimpse"}
        first = [self._overview(stride if mode != "glimpse" else 1)] if keeps else []
        tiles: dict[Lod, tuple[Tensor, Part]] = {}
        states, labels = torch.zeros(0, self.weights.hidden, device=self.device), self._no_labels()
        for level in Lod:
            index = _rows_at(self.lod, level)
            if index is None or (level is Lod.BACKGROUND and keeps):
                continue
            if level is Lod.BACKGROUND:
                tiles[level] = index, self._background(index)
                continue
            hidden, part = self._tiles(level, index, halo)
            tiles[level] = index, part
            if level is Lod.HIGH:
                states, labels = hidden, _tile_labels(self.batch.glyphs, self.grid, self._sent(index))
        extent = float(self.grid.rows * self.high)
        parts = [part for _, part in tiles.values()]
        if mode == "crops":
            joined, crops = _joined([*first, *parts]), self._crop_order(first[0], tiles)
            return Encoded(joined, extent, crops, states, labels)
        refined = [_sorted(_joined(parts))] if parts else []
        return Encoded(_joined([*first, *refined]), extent, (), states, labels)

    def _overview(self, stride: int) -> Part:
        """The frame at LOD background, or coarser, as one image."""
        token = self.weights.token_px
        background = levels.level(self.batch.images, self.high, self.recipe.sides[0])
        images = levels.overview(background, stride, token)
        side = images.shape[-1] // token
        _, (tokens, planes) = _run(self.weights, images, side)
        scale = self.grid.rows * self.high / side
        rows = (torch.arange(side, dtype=torch.float32, device=self.device) + 0.5) * scale - 0.5
        where = torch.stack(torch.meshgrid(rows, rows, indexing="ij")).flatten(1)
        where = where.expand(len(tokens), -1, -1)
        reach = torch.full(where.shape[::2], scale * token / 2, device=self.device)
        return Part(tokens, planes, where, (where + 0.5) * token, reach)

    def _background(self, index: Tensor) -> Part:
        """Tiles that stay at LOD background, cut out of the joint glimpse."""
        glimpse, side = self._overview(1), self.recipe.sides[0]
        order = "(r i c j) -> (r c) (i j)"
        raster = torch.arange(glimpse.tokens.shape[1]).reshape(-1)
        chosen = rearrange(raster, order, r=self.grid.rows, i=side, c=self.grid.cols, j=side)[index]
        flat = self._sent(chosen.flatten(1))
        rows = torch.arange(len(flat), device=self.device)[:, None]
        return Part(
            glimpse.tokens[rows, flat],
            glimpse.planes[:, rows, flat],
            glimpse.where.transpose(1, 2)[rows, flat].transpose(1, 2),
            glimpse.spot.transpose(1, 2)[rows, flat].transpose(1, 2),
            glimpse.reach[:, : flat.shape[1]],
        )

    def _tiles(self, level: Lod, index: Tensor, halo: int) -> tuple[Tensor, Part]:
        """Last hidden states [P, hidden] and tokens of the tiles at a LOD."""
        side, token, merge = self.recipe.sides[level], self.weights.token_px, self.weights.merge
        sent = self._sent(index)
        pixels = levels.level(self.batch.images, self.high, side)
        cut = levels.cut(pixels, side * token, halo * token, sent, self.grid.cols)
        hidden, (tokens, planes) = _run(self.weights, cut, side + 2 * halo)
        tokens, planes = (_inner(t, side, halo) for t in (tokens, planes))
        patches = rearrange(hidden, "k (m p) d -> k m p d", p=merge * merge)
        patches = _inner(patches.transpose(1, 2), side, halo).transpose(1, 2)
        where = self._table(self.grid.count, self.grid.cols, side, self.high, self.device)
        placed = where[:, sent].flatten(2).transpose(0, 1)
        reach = torch.full(placed.shape[::2], self.high / side * token / 2, device=self.device)
        batch = len(index)
        part = Part(
            tokens.reshape(batch, -1, tokens.shape[-1]),
            planes.reshape(planes.shape[0], batch, -1, planes.shape[-1]),
            placed,
            (placed + 0.5) * token,
            reach,
        )
        return patches.reshape(-1, patches.shape[-1]), part

    def _crop_order(
        self, first: Part, tiles: dict[Lod, tuple[Tensor, Part]]
    ) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """For every example its tiles in raster order: raster index, first token, side."""
        start = first.tokens.shape[1]
        found: list[list[tuple[int, int, int]]] = [[] for _ in self.batch.families]
        for level, (index, part) in tiles.items():
            side = self.recipe.sides[level]
            for row, places in zip(found, index.tolist(), strict=True):
                row += [(tile, start + i * side * side, side) for i, tile in enumerate(places)]
            start += part.tokens.shape[1]
        return tuple(tuple(sorted(row)) for row in found)

    def _sent(self, tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _no_labels(self) -> Tensor:
        return self.batch.glyphs[:0].flatten()


def _run(weights: VisionWeights, images: Tensor, side: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Last hidden state [K, N, hidden], and tokens [K, m, D] with planes [L, K, m, D], of square images."""
    tower = StaticTower(weights)
    patches = _patches(images, weights)
    matrix, cos, sin = _shape_of(
        side, math.isqrt(len(weights.position_table)), weights.head_dim, weights.merge, images.device
    )
    positions = (matrix @ weights.position_table.float()).to(weights.patch_bias.dtype)
    hidden, planes = tower.trunk(patches, positions, cos, sin)
    return hidden, (tower.merge(weights.merger, hidden), planes)


@lru_cache(maxsize=64)
def _shape_of(
    side: int, table: int, head_dim: int, merge: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What `arrcoc.lod.tower.geometry` knows of a square image, its interpolation as a matrix [N, table**2].

    The matrix's gradient is a product too; that of indexing would be sorted and added up piece by piece.
    """
    patches = side * merge
    identity = torch.eye(table * table, device=device)
    matrix = merge_order(interpolated_positions(identity, patches, patches), merge)
    row = torch.arange(patches, device=device)[:, None].expand(patches, patches)
    cos, sin = axial_rotary(merge_order(row, merge), merge_order(row.T, merge), head_dim)
    return matrix, cos, sin


def _patches(images: Tensor, weights: VisionWeights) -> Tensor:
    """As `arrcoc.vision.patchify` at mean and deviation one half, but without constants that must be sent."""
    assert weights.mean == weights.std == (0.5, 0.5, 0.5)
    normal = ((images - 127.5) / 127.5).to(weights.patch_bias.dtype)
    clip = normal[:, :, None].expand(-1, -1, 2, -1, -1)
    order = "k c t (h i y) (w j x) -> k (h w i j) (c t y x)"
    return rearrange(clip, order, i=weights.merge, j=weights.merge, y=weights.patch, x=weights.patch)


def _inner(tokens: Tensor, side: int, halo: int) -> Tensor:
    """Tokens [..., (side + 2 * halo)**2, D] in raster order to the inner [..., side**2, D]."""
    if not halo:
        return tokens
    full = side + 2 * halo
    square = tokens.reshape(*tokens.shape[:-2], full, full, tokens.shape[-1])
    return square[..., halo : halo + side, halo : halo + side, :].flatten(-3, -2)


def _scaled(images: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _rows_at(lod: Tensor, level: Lod) -> Tensor | None:
    """Raster indices [B, k] of the tiles at a LOD, k the same for every row; None for no tile."""
    chosen = lod == int(level)
    count = int(chosen[0].sum())
    return chosen.nonzero()[:, 1].view(len(lod), count) if count else None


def _position_table(count: int, cols: int, side: int, high: int, device: torch.device) -> Tensor:
    """Positions of all tiles at a side: fp32 [2, count, side**2]."""
    return tile_positions(torch.arange(count), cols, side, high).to(device)


def _joined(parts: Sequence[Part]) -> Part:
    tokens, planes, where, spot, reach = zip(*parts, strict=True)
    return Part(
        torch.cat(tokens, 1),
        torch.cat(planes, 2),
        torch.cat(where, 2),
        torch.cat(spot, 2),
        torch.cat(reach, 1),
    )


def _sorted(part: Part) -> Part:
    """In raster order of position, row first."""
    by_column = part.where[:, 1].argsort(dim=1, stable=True)
    order = by_column.gather(1, part.where[:, 0].gather(1, by_column).argsort(dim=1, stable=True))
    return Part(
        permuted(part.tokens, order),
        permuted(part.planes, order),
        part.where.gather(2, order[:, None].expand(-1, 2, -1)),
        part.spot.gather(2, order[:, None].expand(-1, 2, -1)),
        part.reach.gather(1, order),
    )


class _Permuted(torch.autograd.Function):
    """Rows [..., B, n, D] in another order [B, n]; the gradient is read back, not added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return _gathered(rows, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _gathered(grad, order.argsort(dim=1)), None


def _gathered(rows: Tensor, order: Tensor) -> Tensor:
    return rows.gather(-2, order[..., None].expand(rows.shape))


def permuted(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [..., B, n, D] in the order int64 [B, n], a permutation of every row's n places."""
    moved: Tensor = _Permuted.apply(rows, order)  # type: ignore[no-untyped-call]
    return moved


def _tile_labels(glyphs: Tensor, grid: Grid, index: Tensor) -> Tensor:
    """Glyph labels int64 [B*k*N] of the patches of tiles, in merge order."""
    batch, height, _ = glyphs.shape
    size = height // grid.rows
    tiles = rearrange(glyphs, "b (r y) (c x) -> b (r c) y x", r=grid.rows, y=size, c=grid.cols, x=size)
    chosen = tiles[torch.arange(batch, device=glyphs.device)[:, None], index].flatten(0, 1)
    return rearrange(chosen, "k (h i) (w j) -> (k h w i j)", i=2, j=2)
