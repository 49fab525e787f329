"""Keys and values: grow, branch, cut back, a length of its own for each layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arrcoc.kv import KvCache


def piece(start: int, count: int) -> torch.Tensor:
    """[1, 2, count, 3]; every element of position p is p, keys and values told apart by their sign."""
    return torch.arange(start, start + count).float().view(1, 1, -1, 1).expand(1, 2, -1, 3)


def append(cache: KvCache, layer: int, start: int, count: int):
    return cache.update(piece(start, count), -piece(start, count), layer)


def held(keys: torch.Tensor) -> list[int]:
    return keys[0, 0, :, 0].int().tolist()


def test_appends_and_returns_all_positions():
    cache = KvCache(2, capacity=4)
    append(cache, 0, 0, 3)
    keys, values = append(cache, 0, 3, 1)
    assert held(keys) == held(cache.keys(0)) == [0, 1, 2, 3]
    assert held(-values) == [0, 1, 2, 3]
    assert (cache.length(0), cache.length(1)) == (4, 0)


def test_grows_beyond_its_capacity_and_keeps_what_it_held():
    cache = KvCache(1, capacity=2)
    append(cache, 0, 0, 2)
    before = cache.nbytes  # keys and values of 2 heads * 2 positions * 3 numbers * 4 bytes
    assert before == 2 * 2 * 2 * 3 * 4
    keys, values = append(cache, 0, 2, 1)
    assert held(keys) == held(-values) == [0, 1, 2]
    assert cache.nbytes == 2 * before, "capacity doubles"
    append(cache, 0, 3, 20)
    assert held(cache.keys(0)) == list(range(23))


def test_branches_and_goes_on_from_where_it_was_cut():
    cache = KvCache(1, capacity=8)
    append(cache, 0, 0, 3)
    append(cache, 0, 100, 2)
    cache.truncate(3)
    assert held(cache.keys(0)) == [0, 1, 2]
    keys, _ = append(cache, 0, 200, 1)
    assert held(keys) == [0, 1, 2, 200]


def test_truncating_leaves_shorter_layers_alone():
    cache = KvCache(3, capacity=8)
    append(cache, 0, 0, 5)
    append(cache, 1, 0, 2)
    cache.truncate(3)
    assert [cache.length(layer) for layer in range(3)] == [3, 2, 0]


def test_an_unused_layer_has_no_keys():
    with pytest.raises(AssertionError, match="layer 0"):
        KvCache(1, capacity=1).keys(0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), max_size=12), st.integers(1, 8))
def test_holds_what_a_list_would(steps, capacity):
    cache, model = KvCache(1, capacity), []
    for number, (count, keep) in enumerate(steps):
        append(cache, 0, 100 * number, count)
        model += range(100 * number, 100 * number + count)
        assert held(cache.keys(0)) == model
        cache.truncate(keep)
        model = model[:keep]


def test_all_layers_lie_in_one_block():
    cache = KvCache(3, capacity=8, first=1)
    for layer in (1, 2):
        append(cache, layer, 10 * layer, 3)
    block = cache.block(2)
    assert block.shape == (2, 2, 2, 2, 3)  # layers, keys and values, heads, positions, width
    assert block[1, :, 1, :, 0].tolist() == [[20, 21], [-20, -21]]
    assert held(cache.keys(2)) == [20, 21, 22]
    assert held(-cache.values(2)) == [20, 21, 22]
    with pytest.raises(AssertionError):
        cache.block(4)


def test_a_filled_buffer_becomes_a_cache():
    buffer = torch.full((2, 2, 2, 5, 3), 7.0)
    cache = KvCache.holding(buffer, 2)
    keys, values = append(cache, 1, 40, 1)
    assert held(keys) == [7, 7, 40]
    assert held(values) == [7, 7, -40]
    assert (cache.length(0), cache.length(1)) == (2, 3)
    assert buffer[1, 0, 0, 2, 0] == 40, "without a copy"
