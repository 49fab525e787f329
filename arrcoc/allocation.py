"""Which level of detail every tile gets, so that relevance is served within a token budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from numbers import Integral, Real
from operator import truediv

import numpy as np
import torch
from torch import Tensor

from arrcoc.config import Config
from arrcoc.errors import BudgetError
from arrcoc.records import Grid, Layout, Lod, Plan, Relevance, Tensions

AUTO_STRIDES = (1, 2, 3, 4)
"""What `overview_stride: auto` chooses from."""


def resolve_budget(budget: int | float | None, grid: Grid, config: Config, least: int | None = None) -> int:
    """The budget of a request, in tokens.

    Args:
        budget: a float in (0, 1] is a share of full resolution, floor(share * R*C*S**2); an int is a number
            of tokens, so 1.0 is everything and 1 is one token; None takes `config.budget`.
        grid: the tile grid.
        config: sides, LOD bounds, layout and overview.
        least: the fewest tokens that are possible; None takes `least_tokens`.

    Raises:
        BudgetError: not a finite number, not positive, above full resolution, or below the least that the
            configuration can do: every tile at `min_lod`, and in `refine` and `crops` the overview.
    """
    asked = config.budget if budget is None else budget
    full, least = full_tokens(grid, config), least_tokens(grid, config) if least is None else least
    if least > full:
        raise BudgetError(
            f"min_lod {config.min_lod} with layout {config.layout.value} takes {least} tokens",
            f"at most {full} tokens, the whole image at LOD high",
            "Lower min_lod, or use layout replace",
        )
    tokens = _as_tokens(asked, full)
    if tokens is None or not least <= tokens <= full:
        meaning = "" if tokens is None or not isinstance(asked, float) else f", which is {tokens} tokens"
        raise BudgetError(
            f"budget {asked!r}{meaning}",
            f"{least} to {full} tokens as an int, or {_share(least, full):.4g} to 1.0 of all as a float",
            "Choose a budget within these limits",
        )
    return tokens


def full_tokens(grid: Grid, config: Config) -> int:
    """Tokens of the whole frame at LOD high, R*C*S**2: what the stock image takes."""
    return grid.count * config.sides[Lod.HIGH] ** 2


def least_tokens(grid: Grid, config: Config) -> int:
    """Tokens below which no plan exists: every tile at `min_lod`, and the overview where the layout has one.

    An overview whose stride is `auto` counts at the coarsest. Where that would exceed full resolution but the
    plan may be all high instead, it is `full_tokens`.
    """
    coarsest = AUTO_STRIDES[-1] if config.overview_stride == "auto" else config.overview_stride
    floor = _least_tile_tokens(grid, config)
    if config.layout is not Layout.REPLACE:
        floor += overview_tokens(grid, config, coarsest)
    return min(floor, full_tokens(grid, config)) if _is_whole_at_full(grid, config) else floor


def overview_tokens(grid: Grid, config: Config, stride: int) -> int:
    """Tokens of the whole frame at LOD background with one for every `stride` along each axis; 0 for 0."""
    return math.prod(grid.shape_in_tokens(config.sides[Lod.BACKGROUND], stride)) if stride else 0


def overview_stride(grid: Grid, config: Config, budget: int) -> int:
    """Glimpse tokens along each axis to one token of the overview that a plan keeps.

    `auto` is the least of 1 to 4 at which the overview takes at most `overview_share` of the budget and
    leaves enough for every tile at `min_lod`; 4 if none does. It never grows with the budget. Strides that
    give the same number of rows and columns are the same overview: the least of them is taken.

    Args:
        grid: the tile grid.
        config: sides, layout, `min_lod`, `overview_stride` and `overview_share`.
        budget: most tokens, from `resolve_budget`.

    Returns:
        0 where there is no overview whatever the relevance: layout `replace`, or all tiles high.
    """
    whole = budget >= full_tokens(grid, config) and _is_whole_at_full(grid, config)
    if whole or config.layout is Layout.REPLACE:
        return 0
    if config.overview_stride == "auto":
        left = budget - _least_tile_tokens(grid, config)
        most = min(left, config.overview_share * budget)
        within = (k for k in AUTO_STRIDES if overview_tokens(grid, config, k) <= most)
        chosen = next(within, AUTO_STRIDES[-1])
    else:
        chosen = config.overview_stride
    shapes = [grid.shape_in_tokens(config.sides[Lod.BACKGROUND], k) for k in range(1, chosen + 1)]
    return shapes.index(shapes[-1]) + 1


def plan(relevance: Relevance, grid: Grid, config: Config, budget: int) -> Plan:
    """Choose the LOD of every tile, and so the exact number of vision tokens.

    Maximises sum(relevance * utility(LOD)) subject to tokens <= budget, greedily by marginal utility per
    token; utilities are concave in tokens, so the greedy choice loses at most the utility of one step
    against the optimum (where `lod_limits` do not bind). In threshold mode the same choice goes no higher
    than the LOD whose threshold the tile's relevance (compared in FP32) reaches. Bounds: `max_lod`,
    `lod_limits` and the budget; `min_lod` comes before `lod_limits`, so tiles at `min_lod` count towards a
    limit and may exceed it. A tile of relevance 0 stays at `min_lod`.

    A higher relevance never gets a lower LOD, neither among the tiles of one plan nor when one tile's
    relevance is raised.

    Where every tile may be high and the budget is full resolution, every tile is high and the overview is
    left out, whatever the layout: a sequence in which all is high needs none, and equals the stock image.

    The only host synchronisation of this stage is one copy of map and tensions together.

    Args:
        relevance: map fp32 [R, C], finite (asserted), on any device.
        grid: the tile grid.
        config: sides, utilities, bounds, mode, layout and overview.
        budget: most tokens, from `resolve_budget`.
    """
    values, tensions = _read(relevance, grid)
    ceilings = _ceilings(values, config)
    full = full_tokens(grid, config)
    whole = budget >= full and _may_be_all_high(ceilings, config)
    stride = 0 if whole else overview_stride(grid, config, budget)
    overview = overview_tokens(grid, config, stride)
    if whole:
        lods = [int(Lod.HIGH)] * grid.count
    else:
        spare = budget - overview - _least_tile_tokens(grid, config)
        assert spare >= 0, f"budget {budget} is below the least possible: use resolve_budget"
        lods = choose_lods(values.flatten().tolist(), ceilings, config, spare)
    tokens = overview + _tile_tokens(lods, config)
    assert tokens <= budget, f"{tokens} tokens planned for a budget of {budget}"
    return Plan(
        lod=torch.tensor(lods, dtype=torch.int64).reshape(grid.rows, grid.cols),
        relevance=values,
        tensions=tensions,
        sides=config.sides,
        layout=config.layout,
        overview_stride=stride,
        tokens=tokens,
        budget=budget,
        full_tokens=full,
    )


def choose_lods(relevance: Sequence[float], ceilings: Sequence[int], config: Config, spare: int) -> list[int]:
    """LOD of every tile, raised step by step from `min_lod` while `spare` tokens last.

    Steps are taken by falling relevance * utility / tokens; ties go to the lower LOD, then to the tile that
    comes first. A step that does not fit, or meets its LOD limit, closes its tile; the scan goes on, so a
    smaller step elsewhere may still fit.

    Args:
        relevance: one value for each tile, FP32 values held as Python floats: their products are taken in
            double precision, so that tiles of different relevance never tie.
        ceilings: the highest LOD of each tile; those below `min_lod` count as `min_lod`.
        config: steps, `min_lod` and `lod_limits`.
        spare: tokens that may be added to every tile at `min_lod`.
    """
    costs = config.step_costs
    lods = [config.min_lod] * len(relevance)
    room = [_room(config, lod, len(relevance)) for lod in (Lod.LOW, Lod.MEDIUM, Lod.HIGH)]
    for lod, tile in _steps(relevance, ceilings, config):
        if lods[tile] == lod - 1 and costs[lod - 1] <= spare and room[lod - 1] > 0:
            lods[tile] = lod
            spare -= costs[lod - 1]
            room[lod - 1] -= 1
    return lods


def _steps(relevance: Sequence[float], ceilings: Sequence[int], config: Config) -> Iterator[tuple[int, int]]:
    """LOD and tile of every step that bounds of its own allow a tile, in the order of `choose_lods`."""
    # The running minimum irons out the rounding that Config's concavity check lets through: a tile's
    # steps must come in order.
    gains = list(accumulate(map(truediv, config.utility_steps, config.step_costs), min))
    values, highest = np.asarray(relevance, np.float64), np.asarray(ceilings)
    levels = range(config.min_lod + 1, Lod.HIGH + 1)
    tiles = [np.flatnonzero((values > 0) & (highest >= lod)) for lod in levels]
    if not tiles:
        return iter(())
    lods = np.repeat(levels, [len(part) for part in tiles])
    worth = np.concatenate([values[part] * gains[lod - 1] for lod, part in zip(levels, tiles, strict=True)])
    places = np.concatenate(tiles)
    order = np.lexsort((places, lods, -worth))
    return zip(lods[order].tolist(), places[order].tolist(), strict=True)


def _room(config: Config, lod: Lod, tiles: int) -> int:
    """How many more tiles may reach `lod` when all are at `min_lod`."""
    limit = config.lod_limits[lod - 1]
    return tiles if limit is None else limit


def _ceilings(relevance: Tensor, config: Config) -> list[int]:
    """Highest LOD of each tile in raster order, without limits that tiles share."""
    if config.mode == "budget":
        return [config.max_lod] * relevance.numel()
    cuts = torch.tensor(config.thresholds, dtype=torch.float32)
    reached = torch.bucketize(relevance.flatten(), cuts, right=True)
    return [int(lod) for lod in reached.clamp(config.min_lod, config.max_lod).tolist()]


def _may_be_all_high(ceilings: Sequence[int], config: Config) -> bool:
    """Whether bounds other than the budget let every tile be high."""
    unlimited = all(limit is None or limit >= len(ceilings) for limit in config.lod_limits)
    return config.min_lod == Lod.HIGH or (unlimited and min(ceilings) == Lod.HIGH)


def _is_whole_at_full(grid: Grid, config: Config) -> bool:
    """Whether with a budget of full resolution all tiles are high, whatever the relevance."""
    for_any = config.mode == "budget" or config.min_lod == Lod.HIGH
    return for_any and _may_be_all_high([config.max_lod] * grid.count, config)


def _least_tile_tokens(grid: Grid, config: Config) -> int:
    """Tokens of all tiles at `min_lod`, without the overview."""
    return grid.count * config.lod_costs[config.min_lod]


def _tile_tokens(lods: Sequence[int], config: Config) -> int:
    """Tokens of the tiles at their LODs, without the overview."""
    costs = config.lod_costs
    return sum(costs[lod] for lod in lods)


def _as_tokens(budget: object, full: int) -> int | None:
    """Tokens that a budget stands for; None where it is no number, or a share outside (0, 1]."""
    if isinstance(budget, bool):
        return None
    if isinstance(budget, Integral):
        return int(budget)
    if isinstance(budget, Real) and 0 < float(budget) <= 1:
        return math.floor(float(budget) * full)
    return None


def _share(tokens: int, full: int) -> float:
    """The smallest share in steps of 1/10000 that `_as_tokens` turns into at least `tokens`."""
    first = math.ceil(tokens / full * 1e4)
    return next(n / 1e4 for n in (first, first + 1) if math.floor(n / 1e4 * full) >= tokens)


def _read(relevance: Relevance, grid: Grid) -> tuple[Tensor, Tensions]:
    """The map as fp32 [R, C] on the CPU and the tensions as floats, brought over in one copy."""
    assert relevance.map.shape == (grid.rows, grid.cols), f"map {tuple(relevance.map.shape)} for {grid}"
    on_device = [t.reshape(1).float() for t in relevance.tensions if isinstance(t, Tensor)]
    packed = torch.cat([relevance.map.flatten().float(), *on_device]).cpu()
    values, read = packed[: grid.count].reshape(grid.rows, grid.cols), iter(packed[grid.count :].tolist())
    assert bool(torch.isfinite(values).all()), "relevance is not finite"
    tensions = Tensions(*(next(read) if isinstance(t, Tensor) else float(t) for t in relevance.tensions))
    return values, tensions
