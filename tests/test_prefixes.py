"""Beginnings of prompts: run in parts, forked, kept within a bound."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arrcoc import Engine
from arrcoc.config import load
from arrcoc.kv import KvCache
from arrcoc.prefix_store import PrefixKey, PrefixStore
from arrcoc.prefixes import Prefix, narrowed, start
from arrcoc.qwen import QwenVL
from arrcoc.records import Features

HEAD = (5, 6, 7)
CONFIG = load("demo")


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint: Path) -> QwenVL:
    return Engine.from_pretrained(tiny_checkpoint, "demo", "cpu")._qwen


@pytest.fixture(scope="module")
def features(qwen: QwenVL) -> Features:
    torch.manual_seed(0)
    return Features(torch.randn(1, 6, qwen.width), torch.randn(2, 1, 6, qwen.width))


WHERE = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 4, 8, 0, 4, 8]])


def begin(qwen: QwenVL, features: Features, depth: int, float8: bool = False) -> Prefix:
    return start(qwen, HEAD, features, WHERE, 12.0, depth, float8)


def whole(qwen: QwenVL, features: Features) -> KvCache:
    """Head and overview through all layers at once."""
    cache = KvCache(qwen.n_layers, 16)
    placed = torch.cat((torch.zeros(1, 6), WHERE)) + 3
    positions = torch.cat((torch.arange(3).float().expand(3, -1), placed), dim=1)
    with torch.inference_mode():
        hidden = torch.cat((qwen.embed(HEAD), features.tokens[0]))[None]
        planes = features.deepstack[:, 0]
        vision = torch.arange(3, 9)
        qwen.run_layers(hidden, positions, cache, range(qwen.n_layers), vision=vision, deepstack=planes)
    return cache


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_run_in_parts_it_equals_a_run_at_once(qwen: QwenVL, features: Features, depth: int) -> None:
    prefix = begin(qwen, features, depth)
    assert (prefix.length, prefix.n_vision, prefix.depth) == (9, 6, depth)
    assert (prefix.image, prefix.next_position) == (slice(3, 9), 15.0)
    prefix.complete(qwen)
    prefix.complete(qwen)
    assert prefix.depth == qwen.n_layers == 4
    expected = whole(qwen, features)
    fork = prefix.fork(20)
    # The tail's two rows ran along: sums of other lengths, so equal up to their order.
    torch.testing.assert_close(fork.block(9), expected.block(9), rtol=1e-5, atol=1e-5)
    for number in range(4):
        keys, values = prefix.layer(number)
        assert torch.equal(keys, fork.keys(number))
        assert torch.equal(values, fork.values(number))


def test_a_fork_is_ones_own(qwen: QwenVL, features: Features) -> None:
    prefix = begin(qwen, features, 4)
    before = prefix.fork(9).block(9).clone()
    fork = prefix.fork(10)
    more = torch.ones(1, *fork.keys(0).shape[1:2], 3, fork.keys(0).shape[3])
    fork.update(more, more, 0)  # grows beyond its capacity
    fork.block(9).fill_(7)
    assert fork.length(0) == 12
    assert fork.length(1) == 9
    assert torch.equal(prefix.fork(9).block(9), before)


def test_the_first_layers_can_be_forked_before_the_others_have_run(qwen: QwenVL, features: Features) -> None:
    prefix = begin(qwen, features, 2)
    assert prefix.fork(9, layers=1).block(9).shape[0] == 1
    with pytest.raises(AssertionError, match="3 layers of 2"):
        prefix.fork(9, layers=3)
    buffer = torch.full((4, *prefix.fork(9, layers=1).block(9).shape[1:3], 11, 16), -1.0)
    prefix.complete(qwen)
    prefix.load_into(buffer)
    assert torch.equal(buffer[:, :, :, :9], prefix.fork(9).block(9))
    assert bool((buffer[:, :, :, 9:] == -1).all())


def test_threads_complete_it_once(qwen: QwenVL, features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, runs = begin(qwen, features, 2), []
    real = QwenVL.run_layers
    monkeypatch.setattr(QwenVL, "run_layers", lambda *a, **k: (runs.append(1), real(*a, **k))[1])
    threads = [threading.Thread(target=prefix.complete, args=(qwen,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == [1]


def test_bytes_are_those_of_all_layers(qwen: QwenVL, features: Features) -> None:
    one, all_of_it = begin(qwen, features, 2), begin(qwen, features, 4)
    assert one.nbytes == all_of_it.nbytes
    kv = all_of_it.fork(9).nbytes
    width = 4 * qwen.width
    assert one.nbytes == kv + 9 * width + (6 + 2 * 6) * width


def test_float8_is_half_of_bf16_and_close(qwen: QwenVL, features: Features) -> None:
    exact, narrow = begin(qwen, features, 4), begin(qwen, features, 4, float8=True)
    block, near = exact.fork(9).block(9), narrow.fork(9).block(9)
    largest = block.abs().amax(dim=(-2, -1), keepdim=True)
    error = (near - block).abs()
    assert bool((error <= torch.maximum(block.abs() / 16, largest / 448 / 1024 * 1.01)).all())
    assert 0 < float(error.norm() / block.norm()) < 0.04
    assert torch.equal(narrow.layer(3)[0], narrow.fork(9).keys(3))
    assert narrow._parts[0].block.dtype == torch.float8_e4m3fn


@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_narrowing_keeps_every_head_within_its_bound(seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(2, 2, 3, 4, 8, generator=generator) * 2.0**exponent
    codes, scale = narrowed(block)
    back = codes.float() * scale
    bound = torch.maximum(block.abs() / 16, scale * 2.0**-10)
    assert bool(((back - block).abs() <= bound * 1.001).all())


def test_narrowing_zeros_gives_zeros() -> None:
    codes, scale = narrowed(torch.zeros(1, 2, 1, 3, 4))
    assert bool((codes.float() * scale == 0).all())


# The store.


class Sized:
    """Stands for a prefix: the store reads its size alone."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def key(number: int) -> PrefixKey:
    return PrefixKey(bytes([number]), CONFIG, 1, HEAD)


def test_the_least_relevant_leaves() -> None:
    store = PrefixStore(100, 10.0)
    for number, relevance in enumerate((5.0, 1.0)):
        assert store.get(key(number)) is None
        store.use(key(number), Sized(50), relevance)  # type: ignore[arg-type]
    store.use(key(2), Sized(50), 1.0)  # type: ignore[arg-type]
    assert store.get(key(1)) is None
    assert store.get(key(0)) is not None
    stats = store.stats()
    assert (stats.entries, stats.bytes, stats.evictions, stats.hits, stats.misses) == (2, 100, 1, 1, 3)


def test_uses_add_up() -> None:
    store, often, once = PrefixStore(100, 10.0), Sized(50), Sized(50)
    store.use(key(1), once, 2.0)  # type: ignore[arg-type]
    for _ in range(4):
        store.use(key(0), often, 1.0)  # type: ignore[arg-type]
    store.use(key(2), Sized(50), 1.0)  # type: ignore[arg-type]
    assert store.get(key(0)) is often
    assert store.get(key(1)) is None


def test_what_does_not_fit_is_handed_back_and_not_kept() -> None:
    store, large = PrefixStore(100, 10.0), Sized(101)
    assert store.use(key(0), large, 1.0) is large  # type: ignore[arg-type]
    assert (len(store), store.stats().refused) == (0, 1)


def test_the_first_stays_where_two_made_the_same() -> None:
    store, one, other = PrefixStore(100, 10.0), Sized(50), Sized(50)
    assert store.use(key(0), one, 1.0) is one  # type: ignore[arg-type]
    assert store.use(key(0), other, 1.0) is one  # type: ignore[arg-type]
    store.clear()
    assert (len(store), store.stats().bytes) == (0, 0)


@pytest.mark.parametrize(
    "changed", [{"content": b"x"}, {"stride": 2}, {"head": (1,)}, {"config": load("photo")}]
)
def test_every_part_of_the_key_counts(changed: dict[str, object]) -> None:
    store = PrefixStore(100, 10.0)
    store.use(key(0), Sized(1), 1.0)  # type: ignore[arg-type]
    assert store.get(key(0)._replace(**changed)) is None


def test_threads_never_exceed_the_bound() -> None:
    store, failures = PrefixStore(1000, 20.0), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(500):
            number = int(random.integers(0, 20))
            if store.get(key(number)) is None or random.random() < 0.3:
                store.use(key(number), Sized(50 + 10 * number), float(random.random()))  # type: ignore[arg-type]
            stats = store.stats()
            if stats.bytes > 1000 or stats.entries != len(store._prefixes):
                failures.append(stats)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Entries may change between the two readings of one thread; bytes are read under the lock.
    assert not [f for f in failures if f.bytes > 1000]
    assert store.stats().bytes == sum(prefix.nbytes for prefix in store._prefixes.values())
