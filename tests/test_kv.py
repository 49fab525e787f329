"""Keys and values: grow, branch, cut back, a length of its own for each layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arrcoc.kv import KvCache, Prefix


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


def test_a_prefix_knows_where_its_image_lies():
    cache = KvCache(1, capacity=5)
    append(cache, 0, 0, 5)
    hidden, norms = torch.zeros(1, 5, 4), {0: torch.ones(3)}
    prefix = Prefix((7, 8), cache, hidden, torch.zeros(3, 5), torch.zeros(1, 3, 4), 1, norms, 6.0)
    assert prefix.length == 5
    assert prefix.image == slice(2, 5)
    assert prefix.vision.tolist() == [2, 3, 4]
    assert len(prefix.tensors()) == 6  # hidden, positions, deepstack, one norm, keys, values
