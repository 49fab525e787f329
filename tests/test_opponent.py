"""Opponent processing: each tension moves the map the way its formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arrcoc import opponent
from arrcoc.config import Config
from arrcoc.errors import ConfigError
from arrcoc.records import Relevance, Scores, Tensions

CONFIG = Config()


def scores(query: Tensor, free: Tensor | float = 0.5) -> Scores:
    """Scores with both query-free maps equal to `free`."""
    other = torch.as_tensor(free, dtype=torch.float32).expand_as(query).clone()
    return Scores(propositional=other, perspectival=other.clone(), participatory=query)


def peaks(rows: int, cols: int, *at: tuple[int, int], height: float = 0.9, ground: float = 0.1) -> Tensor:
    query = torch.full((rows, cols), ground)
    for row, col in at:
        query[row, col] = height
    return query


def balanced(query: Tensor, free: Tensor | float = 0.5, **override: float) -> Relevance:
    """Balance with some tensions overridden and the others neutral, or all measured."""
    neutral = {"compress_particularize": 0.0, "explore_exploit": 0.0, "diversify_focus": 0.0}
    tensions = Tensions(**(neutral | override)) if override else None
    return opponent.balance(scores(query, free), CONFIG, tensions)


def top_over_mean(plane: Tensor) -> float:
    return (plane.amax() / plane.mean()).item()


# Measuring the tensions.


def test_one_peak_is_all_positive() -> None:
    assert [float(t) for t in opponent.measure(peaks(6, 6, (2, 3)), CONFIG)] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_flat_map_is_all_negative(value: float) -> None:
    assert [float(t) for t in opponent.measure(torch.full((6, 6), value), CONFIG)] == [-1, -1, -1]


def test_tensions_by_hand() -> None:
    # 4x5 tiles, ground 0.2, two peaks of 0.3 and 0.25 far apart. N = 20, median 0.2, excess 0.1 and 0.05.
    query = torch.full((4, 5), 0.2)
    query[0, 0], query[3, 4] = 0.3, 0.25
    particularize, exploit, focus = (float(t) for t in opponent.measure(query, CONFIG))
    # n = 0.15**2 / (0.01 + 0.0025) = 1.8, M = 10: c = 8.2 / 9, t = 2c - 1 = 0.82222
    assert particularize == pytest.approx(0.82222, abs=1e-4)
    # k = 0.1 of confident_contrast 0.25: 2 * 0.4 - 1 = -0.2
    assert exploit == pytest.approx(-0.2, abs=1e-4)
    # rho = 0.1 / 0.15 = 2/3, a = 9/20: 2 * (0.66667 - 0.45) / 0.55 - 1 = -0.21212
    assert focus == pytest.approx(-0.21212, abs=1e-4)


def test_half_the_grid_in_equal_parts_is_full_compression() -> None:
    query = torch.zeros(4, 4)
    query[:, :2] = 0.8
    assert opponent.measure(query, CONFIG).compress_particularize == pytest.approx(-1, abs=1e-6)


def test_scaling_the_excess_changes_exploration_only() -> None:
    query = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 0.2
    small, large = opponent.measure(query / 4, CONFIG), opponent.measure(query, CONFIG)
    assert small.explore_exploit < large.explore_exploit
    assert float(small.compress_particularize) == pytest.approx(float(large.compress_particularize), abs=1e-4)
    assert float(small.diversify_focus) == pytest.approx(float(large.diversify_focus), abs=1e-4)


# compress <-> particularize


def test_concentrating_the_query_map_particularizes() -> None:
    generator = torch.Generator().manual_seed(1)
    broad = torch.rand(6, 6, generator=generator) * 0.8
    concentrated = 0.8 * (broad / broad.amax()) ** 6
    loose, tight = balanced(broad), balanced(concentrated)
    assert tight.tensions.compress_particularize > loose.tensions.compress_particularize + 0.3
    assert top_over_mean(tight.map) > top_over_mean(loose.map)


def test_particularizing_raises_contrast_and_keeps_the_peak() -> None:
    query = torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
    maps = [balanced(query, compress_particularize=t).map for t in (-1.0, 0.0, 1.0)]
    ratios = [top_over_mean(plane) for plane in maps]
    assert ratios[0] < ratios[1] < ratios[2]
    assert [plane.amax().item() for plane in maps] == pytest.approx([maps[1].amax().item()] * 3)


def test_gain_by_hand() -> None:
    # Neutral mixing and neighbours: m = (q + 0.5) / 2 = 0.7 at the peak and 0.3 elsewhere.
    # t = 1, gain 1.5: 0.7 * (0.3 / 0.7) ** 2.5 = 0.084174.
    plane = balanced(peaks(4, 4, (1, 1)), compress_particularize=1.0).map
    assert plane[1, 1].item() == pytest.approx(0.7)
    assert plane[3, 3].item() == pytest.approx(0.084174, abs=1e-5)


# explore <-> exploit


def test_contrast_makes_the_map_follow_the_question() -> None:
    free = torch.zeros(5, 5)
    free[0, 4] = 1.0
    unsure = balanced(peaks(5, 5, (4, 0), height=0.15), free)
    sure = balanced(peaks(5, 5, (4, 0), height=0.6), free)
    assert unsure.tensions.explore_exploit < 0 < sure.tensions.explore_exploit
    assert unsure.map.argmax() == 4
    assert sure.map.argmax() == 20


@pytest.mark.parametrize(("tension", "expected"), [(1.0, 0.9), (0.0, 0.55), (-1.0, 0.2)])
def test_share_of_the_question_by_hand(tension: float, expected: float) -> None:
    # At the peak q = 0.9, b = 0.2, w = (1 + t) / 2: 0.9w + 0.2(1 - w). The peak keeps it.
    plane = balanced(peaks(4, 4, (1, 1)), 0.2, explore_exploit=tension).map
    assert plane[1, 1].item() == pytest.approx(expected, abs=1e-5)


def test_both_query_free_maps_count_alike() -> None:
    query = peaks(3, 3, (0, 0))
    left, right = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(3)).unbind()
    one = opponent.balance(Scores(left, right, query), CONFIG, Tensions(0.0, -1.0, 0.0)).map
    other = opponent.balance(Scores(right, left, query), CONFIG, Tensions(0.0, -1.0, 0.0)).map
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, (left + right) / 2)


# diversify <-> focus


def test_far_peaks_diversify() -> None:
    # Two equal peaks far apart: rho = 1/2, a = 9/64: 2 * (0.5 - 0.140625) / 0.859375 - 1 = -0.163636.
    one, two = balanced(peaks(8, 8, (1, 1))), balanced(peaks(8, 8, (1, 1), (6, 6)))
    assert float(one.tensions.diversify_focus) == pytest.approx(1)
    assert float(two.tensions.diversify_focus) == pytest.approx(-0.163636, abs=1e-5)
    near, far = (1, 2), (4, 4)
    assert two.map[near] > two.map[far], "neighbours of a peak gain when the map is diversified"
    assert one.map[near] <= one.map[far], "and lose when it is focused"


def test_close_peaks_are_one_focus() -> None:
    apart = opponent.measure(peaks(8, 8, (1, 1), (6, 6)), CONFIG).diversify_focus
    together = opponent.measure(peaks(8, 8, (1, 1), (2, 3)), CONFIG).diversify_focus
    assert float(together) == pytest.approx(1)
    assert apart < 0


def test_lateral_interaction_by_hand() -> None:
    # Neutral otherwise: m = 0.7 at the peak, 0.3 elsewhere; mean3x3 = (0.7 + 8*0.3) / 9 = 0.344444
    # around the peak, 0.3 far away. lateral 0.5:
    # t = -1: peak 0.7 - 0.5 * 0.355556 = 0.522222, neighbour 0.3 + 0.5 * 0.044444 = 0.322222.
    # t = +1: peak 0.877778, neighbour 0.277778.
    query = peaks(7, 7, (3, 3))
    spread, sharp = (balanced(query, diversify_focus=t).map for t in (-1.0, 1.0))
    assert [spread[3, 3].item(), spread[3, 4].item()] == pytest.approx([0.522222, 0.322222], abs=1e-5)
    assert [sharp[3, 3].item(), sharp[3, 4].item()] == pytest.approx([0.877778, 0.277778], abs=1e-5)
    assert spread[0, 0].item() == sharp[0, 0].item() == pytest.approx(0.3)


def test_borders_do_not_count_as_empty() -> None:
    uniform = torch.full((4, 4), 0.6)
    uniform[0, 0] += 0.1
    plane = balanced(uniform, 0.6, diversify_focus=1.0, explore_exploit=-1.0).map
    torch.testing.assert_close(plane, torch.full((4, 4), 0.6))


# The flat fallback.


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 3), (5, 4)])
def test_flat_query_gives_uniform_relevance(shape: tuple[int, int]) -> None:
    free = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(balanced(torch.full(shape, 0.3), free).map, torch.full(shape, 0.5))


def test_nearly_flat_query_goes_half_way() -> None:
    # k = 0.01 of flat_contrast 0.02: u = 1/2. w = (0.01 / 0.25) with b = 0: m small; the rest is 0.25.
    query = peaks(6, 6, (0, 0), height=0.11)
    plane = balanced(query, 0.0).map
    assert 0.25 <= plane[5, 5].item() < plane[0, 0].item() < 0.26


# Overrides and input.


def test_override_is_reported_and_used() -> None:
    query = peaks(4, 4, (1, 1))
    made = opponent.balance(scores(query), CONFIG, Tensions(-0.5, torch.tensor(0.25), 0.75))
    assert [float(t) for t in made.tensions] == [-0.5, 0.25, 0.75]
    own = opponent.balance(scores(query), CONFIG)
    again = opponent.balance(scores(query), CONFIG, Tensions(*(float(t) for t in own.tensions)))
    torch.testing.assert_close(again.map, own.map)
    assert not torch.equal(made.map, own.map)


@pytest.mark.parametrize("value", [1.01, -2.0, float("nan"), float("inf")])
def test_impossible_override_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="diversify_focus"):
        balanced(peaks(2, 2, (0, 0)), diversify_focus=value)


@st.composite
def score_maps(draw: st.DrawFn) -> Scores:
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    value = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])
    plane = st.lists(value, min_size=rows * cols, max_size=rows * cols)
    return Scores(*(torch.tensor(draw(plane), dtype=torch.float32).reshape(rows, cols) for _ in range(3)))


@settings(max_examples=200, deadline=None)
@given(score_maps())
def test_always_finite_and_in_range(maps: Scores) -> None:
    made = opponent.balance(maps, CONFIG)
    assert made.map.shape == maps.participatory.shape
    assert made.map.dtype == torch.float32
    assert made.map.isfinite().all()
    assert made.map.min() >= 0
    assert made.map.max() <= 1
    assert all(isinstance(t, Tensor) and t.shape == () and -1 <= t <= 1 for t in made.tensions)


@settings(max_examples=100, deadline=None)
@given(score_maps(), st.sampled_from([(0,), (1,), (0, 1)]))
def test_flips_with_the_grid(maps: Scores, axes: tuple[int, ...]) -> None:
    flipped = Scores(*(getattr(maps, name).flip(axes) for name in Scores.__slots__))
    made, mirrored = opponent.balance(maps, CONFIG), opponent.balance(flipped, CONFIG)
    torch.testing.assert_close(mirrored.map, made.map.flip(axes), atol=1e-4, rtol=1e-4)
    for one, other in zip(made.tensions, mirrored.tensions, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="host waits show on a CUDA device only")
def test_never_waits_for_the_device() -> None:
    maps = Scores(*torch.rand(3, 6, 6, device="cuda").unbind())
    opponent.balance(maps, CONFIG)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opponent.balance(maps, CONFIG)
        made = opponent.balance(maps, CONFIG, Tensions(0.5, -0.5, 0.1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.map.isfinite().all()
