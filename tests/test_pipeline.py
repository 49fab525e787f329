"""Dividing a budget, and the plan that fixes the token count before any tile is refined."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrcoc import allocation
from arrcoc.encoder import TileEncoder
from arrcoc.engine import Engine
from arrcoc.errors import BudgetError
from arrcoc.pipeline import divide_budget
from arrcoc.records import Plan

RANGES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 400)), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("budget", "ranges", "expected"),
    [
        # least 10 + 20, spare 30, room 90 + 180: 10 + 30 * 90 // 270 = 20, 20 + 30 * 180 // 270 = 40
        (60, [(10, 100), (20, 200)], [20, 40]),
        # spare 1 of room 270 rounds down to nothing for both
        (31, [(10, 100), (20, 200)], [10, 20]),
        (300, [(10, 100), (20, 200)], [100, 200]),
        # an image of fixed size takes no part in the division
        (57, [(7, 7), (10, 110)], [7, 50]),
        (7, [(7, 7)], [7]),
    ],
)
def test_divided_by_hand(budget: int, ranges: list[tuple[int, int]], expected: list[int]) -> None:
    assert divide_budget(budget, ranges) == expected


@given(RANGES, st.floats(0, 1))
def test_division_keeps_every_bound(sizes: list[tuple[int, int]], share: float) -> None:
    ranges = [(low, low + more) for low, more in sizes]
    least, most = sum(low for low, _ in ranges), sum(high for _, high in ranges)
    budget = least + int(share * (most - least))
    parts = divide_budget(budget, ranges)
    assert sum(parts) <= budget
    assert sum(parts) > budget - len(ranges)  # rounding loses less than a token an image
    assert all(low <= part <= high for part, (low, high) in zip(parts, ranges, strict=True))


@pytest.mark.parametrize("budget", [-1, 0, 29, 301])
def test_a_budget_outside_the_sums_is_refused(budget: int) -> None:
    with pytest.raises(BudgetError, match="30 to 300 tokens"):
        divide_budget(budget, [(10, 100), (20, 200)])


SMALL = {"preset": "demo", "max_tiles": 12}


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path) -> dict[str, Engine]:
    return {
        layout: Engine.from_pretrained(tiny_checkpoint, layout=layout, **SMALL)
        for layout in ("replace", "refine", "crops")
    }


@settings(max_examples=12, deadline=None)
@given(
    layout=st.sampled_from(["replace", "refine", "crops"]),
    height=st.integers(3, 500),
    width=st.integers(3, 500),
    part=st.floats(0, 1),
    as_share=st.booleans(),
)
def test_budgets_are_never_exceeded(
    engines: dict[str, Engine], layout: str, height: int, width: int, part: float, as_share: bool
) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    first = engines[layout].encode(pixels, "Where?", budget=1.0)
    least = int(first.lod.numel())  # side 1: a token for every tile, or as many for the glimpse
    tokens = least + int(part * (first.full_tokens - least))
    budget = tokens / first.full_tokens if as_share else tokens
    if as_share and int(budget * first.full_tokens) < least:
        return
    made = engines[layout].encode(pixels, "Where?", budget=budget)
    assert least <= made.n_tokens <= made.budget <= tokens
    assert made.full_tokens == 16 * made.lod.numel()
    # Counted anew from the LOD map: side**2 a tile, the glimpse instead of background where it is kept.
    squares = torch.tensor([1, 4, 9, 16])
    counted = int(squares[made.lod].sum())
    if layout != "replace" and made.n_tokens != made.full_tokens:
        counted += least - int((made.lod == 0).sum())
    assert made.n_tokens == counted
    assert made.tokens.shape == made.deepstack.shape[1:]
    assert made.positions.shape == (3, made.n_tokens)


def test_the_plan_fixes_the_count_before_a_tile_is_refined(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plans: list[Plan] = []
    real_plan, real_encode = allocation.plan, TileEncoder.encode

    def plan(*args: object) -> Plan:
        events.append("plan")
        plans.append(real_plan(*args))  # type: ignore[arg-type]
        return plans[-1]

    def encode(self: TileEncoder, *args: object) -> object:
        events.append("encode")
        return real_encode(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(allocation, "plan", plan)
    monkeypatch.setattr(TileEncoder, "encode", encode)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    made = engines["refine"].encode(pixels, "Where?", budget=0.5)
    assert events == ["plan", "encode"]
    assert made.n_tokens == plans[0].tokens <= plans[0].budget
