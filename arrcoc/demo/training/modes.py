"""Ways to encode a training batch: the whole image as the stock model sees it, or tiles at mixed LODs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arrcoc.demo.training.batches import Batch
from arrcoc.demo.training.recipe import Recipe
from arrcoc.image import area_resample
from arrcoc.lod.tower import StaticTower, geometry, merge_order
from arrcoc.qwen import vision_weights
from arrcoc.records import Grid, Lod
from arrcoc.sequence import glimpse_positions, tile_positions
from arrcoc.vision import VisionWeights, patchify

_STATS = ([0.5] * 3, [0.5] * 3)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vision tokens of a batch, equally many for every example.

    Attributes:
        tokens: [B, n, D].
        deepstack: [L, B, n, D].
        where: fp32 [B, 2, n] positions (h, w).
        extent: what the image adds to the text position after it.
        cuts: runs of tokens that are images of their own, as (start, stop, extent, corners [B, 4]); the
            first run is the image itself and has no corners.
        glyph_states: [P, hidden] last hidden states of patches at full resolution.
        glyph_labels: int64 [P], the glyph in each of them.
    """

    tokens: Tensor
    deepstack: Tensor
    where: Tensor
    extent: float
    cuts: tuple[tuple[int, int, float, Tensor | None], ...]
    glyph_states: Tensor
    glyph_labels: Tensor


class BatchEncoder:
    """Encodes batches with the model's live weights."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        """Args: the stock model in training; the recipe."""
        self._model, self._recipe = model, recipe

    def encode(self, batch: Batch, lod: Tensor | None = None) -> Encoded:
        """Encode in the batch's mode; `lod` int64 [B, R*C] overrides the drawn allocation."""
        weights = vision_weights(self._model, _STATS)
        if batch.mode in {"whole", "smaller"}:
            return self._whole(weights, batch)
        if lod is None:
            lod = draw_allocation(batch, torch.Generator().manual_seed(batch.plan_seed))
        return self._tiles(weights, batch, lod.to(batch.images.device))

    def _whole(self, weights: VisionWeights, batch: Batch) -> Encoded:
        """The image as one, at full resolution or scaled down, positions counted as the stock model does."""
        side, images = batch.canvas // weights.token_px, batch.images
        if batch.mode == "smaller":
            generator = torch.Generator().manual_seed(batch.plan_seed)
            least = max(1, side // 4)
            side = int(torch.randint(least, side, (1,), generator=generator)) if side > least else side
            images = _scaled(images, side * weights.token_px)
        hidden, features = _run(weights, images, side)
        rows = torch.arange(side, dtype=torch.float32, device=images.device)
        where = torch.stack(torch.meshgrid(rows, rows, indexing="ij")).flatten(1).expand(len(images), -1, -1)
        labels = batch.glyphs if batch.mode == "whole" else batch.glyphs[:0]
        states = hidden if batch.mode == "whole" else hidden[:0]
        ordered = torch.stack([merge_order(row, weights.merge) for row in labels]) if len(labels) else labels
        cuts = ((0, side * side, float(side), None),)
        return Encoded(*features, where, float(side), cuts, states.flatten(0, 1), ordered.flatten())

    def _tiles(self, weights: VisionWeights, batch: Batch, lod: Tensor) -> Encoded:
        recipe = self._recipe
        count = batch.canvas // recipe.tile
        grid = Grid(count, count, recipe.tile)
        glimpse = self._glimpse(weights, batch, grid)
        parts, states, labels = [], hidden_none(weights, batch), batch.glyphs.new_zeros(0)
        for level in Lod:
            index = _rows_at(lod, level)
            if index is None or (level is Lod.BACKGROUND and batch.mode != "replace"):
                continue
            side = recipe.sides[level]
            hidden, features = _run(weights, _cut(batch.images, grid, side, recipe.sides[3], index), side)
            where = tile_positions(index.flatten().cpu(), grid.cols, side, recipe.sides[3])
            parts.append(_by_example(*features, where.to(hidden.device), index.shape))
            if level is Lod.HIGH:
                states, labels = hidden.flatten(0, 1), _tile_labels(batch.glyphs, grid, index, weights)
        return self._lay_out(batch, grid, glimpse, parts, lod, states, labels)

    def _glimpse(self, weights: VisionWeights, batch: Batch, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        side = self._recipe.sides[0]
        small = area_resample(batch.images, self._recipe.sides[3], side)
        _, (tokens, planes) = _run(weights, small, grid.rows * side)
        where = glimpse_positions(grid, side, self._recipe.sides[3]).to(tokens.device)
        return tokens, planes, where.expand(len(tokens), -1, -1)

    def _lay_out(
        self,
        batch: Batch,
        grid: Grid,
        glimpse: tuple[Tensor, Tensor, Tensor],
        parts: list[tuple[Tensor, Tensor, Tensor]],
        lod: Tensor,
        states: Tensor,
        labels: Tensor,
    ) -> Encoded:
        extent = float(grid.rows * self._recipe.sides[3])
        if batch.mode == "crops":
            return self._crops(grid, glimpse, parts, lod, extent, states, labels)
        refined = _sorted(_joined(parts)) if parts else None
        keeps_glimpse = batch.mode == "refine"
        chosen = [glimpse] * keeps_glimpse + ([refined] if refined else [])
        tokens, planes, where = _joined(chosen)
        cuts = ((0, tokens.shape[1], extent, None),)
        return Encoded(tokens, planes, where, extent, cuts, states, labels)

    def _crops(
        self,
        grid: Grid,
        glimpse: tuple[Tensor, Tensor, Tensor],
        parts: list[tuple[Tensor, Tensor, Tensor]],
        lod: Tensor,
        extent: float,
        states: Tensor,
        labels: Tensor,
    ) -> Encoded:
        """The glimpse, then every refined tile as an image of its own, the most detailed LOD last."""
        cuts: list[tuple[int, int, float, Tensor | None]] = [(0, glimpse[0].shape[1], extent, None)]
        chosen, start = [glimpse], glimpse[0].shape[1]
        levels = [level for level in Lod if level is not Lod.BACKGROUND and _rows_at(lod, level) is not None]
        for level, (tokens, planes, _) in zip(levels, parts, strict=True):
            index, side = _rows_at(lod, level), self._recipe.sides[level]
            assert index is not None
            own = tile_positions(torch.zeros(1, dtype=torch.long), 1, side, side)[:, 0].to(tokens.device)
            chosen.append((tokens, planes, own.repeat(1, index.shape[1]).expand(len(tokens), -1, -1)))
            for place in range(index.shape[1]):
                stop = start + side * side
                cuts.append((start, stop, float(side), index[:, place]))
                start = stop
        tokens, planes, where = _joined(chosen)
        return Encoded(tokens, planes, where, extent, tuple(cuts), states, labels)


def draw_allocation(batch: Batch, generator: torch.Generator) -> Tensor:
    """LODs int64 [B, R*C], equal counts in every row: query-aware, random or uniform, as the mode says."""
    count = batch.targets[0].numel()
    if batch.mode == "high":
        return torch.full((len(batch.images), count), int(Lod.HIGH))
    if batch.mode == "uniform":
        level = int(torch.randint(1, 4, (1,), generator=generator))
        return torch.full((len(batch.images), count), level)
    return _ranked(batch, _counts(batch, count, generator), generator)


def _counts(batch: Batch, count: int, generator: torch.Generator) -> list[int]:
    """How many tiles are high, medium and low."""

    def draw(most: int) -> int:
        return int(torch.randint(0, most + 1, (1,), generator=generator))

    if batch.mode == "crops":
        return [min(count, 1 + draw(4)), min(max(count - 5, 0), draw(2)), 0]
    needed = int(batch.targets.flatten(1).sum(1).float().quantile(0.75))
    high = min(count, max(1 + draw(max(1, count // 8)), needed if draw(9) < 8 else 1))
    medium = min(count - high, draw(max(1, count // 8)))
    return [high, medium, min(count - high - medium, draw(max(1, count // 4)))]


def _ranked(batch: Batch, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Tiles ranked by need plus noise, the best of them at the highest LODs."""
    noise = torch.rand(batch.targets.flatten(1).shape, generator=generator)
    aware = (torch.rand(len(noise), 1, generator=generator) < 0.92).float()
    order = (batch.targets.flatten(1).cpu().float() * aware * 10 + noise).argsort(1, descending=True)
    levels = torch.zeros(noise.shape[1], dtype=torch.long)
    start = 0
    for level, number in zip((Lod.HIGH, Lod.MEDIUM, Lod.LOW), counts, strict=True):
        levels[start : start + number] = int(level)
        start += number
    return torch.zeros_like(order).scatter(1, order, levels.expand(len(order), -1))


def hidden_none(weights: VisionWeights, batch: Batch) -> Tensor:
    """No patches at full resolution: fp32 [0, hidden]."""
    return torch.zeros(0, weights.hidden, device=batch.images.device)


def _run(weights: VisionWeights, images: Tensor, side: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Last hidden state [K, N, hidden], and tokens [K, m, D] with planes [L, K, m, D], of square images."""
    tower = StaticTower(weights)
    patches = patchify(images, weights, torch.bfloat16 if images.is_cuda else torch.float32)
    hidden, planes = tower.trunk(patches, *geometry(weights, side, side))
    return hidden, (tower.merge(weights.merger, hidden), planes)


def _scaled(images: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _rows_at(lod: Tensor, level: Lod) -> Tensor | None:
    """Raster indices [B, k] of the tiles at a LOD, k the same for every row; None for no tile."""
    chosen = lod == int(level)
    count = int(chosen[0].sum())
    return chosen.nonzero()[:, 1].view(len(lod), count) if count else None


def _cut(images: Tensor, grid: Grid, side: int, high: int, index: Tensor) -> Tensor:
    """Tiles uint8 [B*k, 3, t, t] with raster indices [B, k], at `side` tokens along the edge."""
    level = area_resample(images, high, side)
    batch, _, height, _ = level.shape
    size = height // grid.rows
    tiles = level.view(batch, 3, grid.rows, size, grid.cols, size).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    rows = torch.arange(batch, device=images.device)[:, None]
    return tiles[rows, index].flatten(0, 1)


def _by_example(
    tokens: Tensor, planes: Tensor, where: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """From tiles [B*k, m, D] to examples [B, k*m, D]; planes and positions [2, B*k, m] likewise."""
    batch = shape[0]
    return (
        tokens.reshape(batch, -1, tokens.shape[-1]),
        planes.reshape(planes.shape[0], batch, -1, planes.shape[-1]),
        where.reshape(2, batch, -1).transpose(0, 1),
    )


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, planes, where = zip(*parts, strict=True)
    return torch.cat(tokens, 1), torch.cat(planes, 2), torch.cat(where, 2)


def _sorted(part: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """In raster order of position, row first."""
    tokens, planes, where = part
    by_column = where[:, 1].argsort(dim=1, stable=True)
    order = by_column.gather(1, where[:, 0].gather(1, by_column).argsort(dim=1, stable=True))
    spread = order[..., None].expand(-1, -1, tokens.shape[-1])
    return (
        tokens.gather(1, spread),
        planes.gather(2, spread[None].expand(planes.shape[0], -1, -1, -1)),
        where.gather(2, order[:, None].expand(-1, 2, -1)),
    )


def _tile_labels(glyphs: Tensor, grid: Grid, index: Tensor, weights: VisionWeights) -> Tensor:
    """Glyph labels int64 [B*k*N] of the patches of tiles, in merge order."""
    batch, height, _ = glyphs.shape
    size = height // grid.rows
    tiles = (
        glyphs.view(batch, grid.rows, size, grid.cols, size).transpose(2, 3).reshape(batch, -1, size, size)
    )
    chosen = tiles[torch.arange(batch, device=glyphs.device)[:, None], index].flatten(0, 1)
    merge = weights.merge
    blocks = chosen.view(-1, size // merge, merge, size // merge, merge).transpose(2, 3)
    return blocks.reshape(-1)
