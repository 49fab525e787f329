"""The ledger on its own, against golden orders and a brute-force model; then the cache with its tensors."""

import math
import random
import threading
from typing import Literal

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arrcoc.cache import Ledger, TileCache, TileKey
from arrcoc.records import Features

TILE_BYTES = 3 * 4 * 4 + 2 * 3 * 4 * 4  # tokens [1, 3, 4] and deepstack [2, 1, 3, 4] in fp32


def key(number: int, lod: int = 1, engine: str = "e") -> TileKey:
    return TileKey((number, 0, 0, 0), lod, engine)


def tile(seed: int, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 3, 4, generator=generator).to(dtype)
    return Features(tokens, torch.randn(2, 1, 3, 4, generator=generator).to(dtype))


def same(a: Features | None, b: Features) -> bool:
    return a is not None and torch.equal(a.tokens, b.tokens) and torch.equal(a.deepstack, b.deepstack)


# The ledger.


def test_lowest_score_per_byte_leaves_first() -> None:
    """Scores per byte: a 1/32 = .03125, b 0.5/10 = .05, c 0.8/40 = .02, d 0.5/16 = .03125."""
    ledger: Ledger[str] = Ledger(98, half_life=10)
    for name, size, relevance in [("a", 32, 1.0), ("b", 10, 0.5), ("c", 40, 0.8), ("d", 16, 0.5)]:
        assert ledger.add(name, size, relevance) == []
    assert ledger.used == 98
    # 10 bytes: c (.02) leaves, 58 + 10 are in use; e has 0.01/10 = .001.
    assert ledger.add("e", 10, 0.01) == ["c"]
    # 50 bytes where 30 are free: e (10 bytes), then a before d at equal scores, being older.
    assert ledger.add("f", 50, 1.0) == ["e", "a"]
    assert ledger.used == 10 + 16 + 50


def test_a_use_adds_relevance() -> None:
    """a 0.2 + 0.4 = 0.6 outlives b 0.5, which is younger."""
    ledger: Ledger[str] = Ledger(2, half_life=10)
    ledger.add("a", 1, 0.2)
    ledger.add("b", 1, 0.5)
    ledger.touch("a", 0.4)
    assert ledger.score("a") == pytest.approx(0.6)
    assert ledger.add("c", 1, 0.0) == ["b"]


def test_recent_use_beats_old_use() -> None:
    """a 0.9 two half-lives ago is 0.225 now, less than b's 0.3."""
    ledger: Ledger[str] = Ledger(2, half_life=4)
    ledger.add("a", 1, 0.9)
    ledger.advance(8)
    ledger.add("b", 1, 0.3)
    assert ledger.score("a") == pytest.approx(0.225)
    assert ledger.add("c", 1, 0.1) == ["a"]


@pytest.mark.parametrize("half_life", [0.5, 1.0, 256.0, 1e6])
def test_score_halves_after_the_half_life(half_life: float) -> None:
    ledger: Ledger[str] = Ledger(10, half_life)
    ledger.add("a", 1, 0.8)
    uses = max(int(half_life), 1)
    ledger.advance(uses)
    assert ledger.score("a") == pytest.approx(0.8 * 0.5 ** (uses / half_life), rel=1e-12)


def test_equal_scores_leave_oldest_first() -> None:
    ledger: Ledger[str] = Ledger(3, half_life=10)
    for name in "xba":
        ledger.add(name, 1, 0.0)
    ledger.touch("x", 0.0)
    assert ledger.add("big", 3, 0.0) == ["x", "b", "a"]


def test_long_life_neither_overflows_nor_loses_order() -> None:
    ledger: Ledger[int] = Ledger(3, half_life=0.01)  # 2e11 half-lives
    ledger.add(0, 1, 1.0)
    for _ in range(2):
        ledger.advance(10**9)
        ledger.add(ledger._stored, 1, 0.5)
    assert ledger.score(2) == pytest.approx(0.5, rel=1e-3)
    assert ledger.score(0) == 0.0  # too small for a float, and yet in order:
    assert ledger.add(3, 2, 0.1) == [0, 1]
    for _ in range(100):
        ledger.advance(10**7)
        ledger.touch(2, 1.0)
    assert math.isfinite(ledger.score(2))


def test_too_large_is_refused_and_changes_nothing() -> None:
    ledger: Ledger[str] = Ledger(10, half_life=10)
    ledger.add("a", 6, 0.1)
    assert ledger.add("b", 11, 1.0) is None
    assert ledger.add("a", 11, 1.0) is None
    assert (len(ledger), ledger.used) == (1, 6)
    assert ledger.score("a") == pytest.approx(0.1)
    assert ledger.add("c", 10, 0.0) == ["a"]


def test_storing_again_keeps_score_and_age_and_takes_the_new_size() -> None:
    ledger: Ledger[str] = Ledger(10, half_life=10)
    ledger.add("a", 4, 0.25)
    ledger.add("b", 4, 0.5)
    assert ledger.add("a", 6, 0.125) == []
    assert ledger.used == 10
    assert ledger.score("a") == pytest.approx(0.375)
    assert ledger.add("c", 1, 0.0) == ["a"]  # .375/6 = .0625 a byte, b .125


def test_low_relevance_leaves_on_demand() -> None:
    """After one half-life: a 0.4, b 0.1, c 0.25; strictly below 0.25 is b alone."""
    ledger: Ledger[str] = Ledger(100, half_life=8)
    for name, relevance in [("a", 0.8), ("b", 0.2), ("c", 0.5)]:
        ledger.add(name, 10, relevance)
    ledger.advance(8)
    assert ledger.evict_low_relevance(0.2499) == ["b"]
    assert ledger.used == 20
    assert ledger.evict_low_relevance(1.0) == ["a", "c"]
    assert (ledger.used, len(ledger)) == (0, 0)


@pytest.mark.parametrize("relevance", [-0.1, math.nan, math.inf])
def test_relevance_must_be_finite_and_not_negative(relevance: float) -> None:
    with pytest.raises(AssertionError, match="relevance"):
        Ledger[str](10, 1.0).add("a", 1, relevance)


def test_queue_of_past_ranks_stays_small() -> None:
    ledger: Ledger[int] = Ledger(10, half_life=10)
    ledger.add(0, 1, 0.5)
    ledger.add(1, 1, 0.6)
    for _ in range(10_000):
        ledger.touch(0, 0.5)
    assert len(ledger._queue) < 100
    assert ledger.add(2, 9, 0.1) == [1]


class LedgerModel(RuleBasedStateMachine):
    """A ledger beside a dict that decays every score at every use and looks at all of them to evict.

    The two round differently, so scores that differ by rounding alone may leave in either order.
    """

    BOUND = 12
    keys = st.integers(0, 6)
    relevances = st.sampled_from([0.0, 0.25, 0.3, 0.7, 1.0])

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[int] = Ledger(self.BOUND, half_life=3.0)
        self.model: dict[int, list[float]] = {}  # score, size, age
        self.stored = 0

    def leaving(self) -> int:
        return min(self.model, key=lambda k: (self.model[k][0] / self.model[k][1], self.model[k][2]))

    @rule(key=keys, size=st.integers(1, 14), relevance=relevances)
    def add(self, key: int, size: int, relevance: float) -> None:
        evicted = self.ledger.add(key, size, relevance)
        if size > self.BOUND:
            assert evicted is None
            return
        old = self.model.pop(key, None)
        assert evicted is not None
        used = sum(int(entry[1]) for entry in self.model.values())
        for gone in evicted:
            assert used + size > self.BOUND, "evicted without need"
            best, real = self.model[self.leaving()], self.model[gone]
            assert real[0] / real[1] <= best[0] / best[1] * (1 + 1e-9)
            if real[0] == best[0] == 0:
                assert gone == self.leaving(), "exact ties leave oldest first"
            used -= int(self.model.pop(gone)[1])
        assert used + size <= self.BOUND, "too little evicted"
        self.model[key] = [(old[0] if old else 0.0) + relevance, size, old[2] if old else self.stored]
        self.stored += old is None

    @rule(key=keys, relevance=relevances)
    def touch(self, key: int, relevance: float) -> None:
        if key in self.model:
            self.ledger.touch(key, relevance)
            self.model[key][0] += relevance

    @rule(uses=st.integers(1, 5))
    def advance(self, uses: int) -> None:
        self.ledger.advance(uses)
        for entry in self.model.values():
            entry[0] *= 2 ** (-uses / 3.0)

    @rule(threshold=st.floats(0, 1.5))
    def evict_low_relevance(self, threshold: float) -> None:
        if any(abs(entry[0] - threshold) < 1e-9 for entry in self.model.values()):
            return
        low = [k for k, entry in self.model.items() if entry[0] < threshold]
        assert sorted(self.ledger.evict_low_relevance(threshold)) == sorted(low)
        for k in low:
            del self.model[k]

    @rule()
    def clear(self) -> None:
        self.ledger.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        assert len(self.ledger) == len(self.model)
        assert self.ledger.used == sum(entry[1] for entry in self.model.values()) <= self.BOUND
        for k, entry in self.model.items():
            assert k in self.ledger
            assert self.ledger.score(k) == pytest.approx(entry[0], rel=1e-9, abs=1e-12)


TestLedgerModel = LedgerModel.TestCase
TestLedgerModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# The cache.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("location", ["device", "host"])
def test_a_hit_is_bit_equal(location: Literal["device", "host"], dtype: torch.dtype) -> None:
    cache = TileCache(10_000, 8, location)
    assert cache.put(key(1), tile(1, dtype), 0.5)
    assert cache.put(key(2), tile(2, dtype), 0.5)
    second, missing, first = cache.get([key(2), key(3), key(1)], [0.1, 0.2, 0.3])
    assert same(second, tile(2, dtype))
    assert missing is None
    assert same(first, tile(1, dtype))
    assert second is not None
    assert second.tokens.dtype == dtype


def test_key_covers_content_lod_and_engine() -> None:
    cache = TileCache(10_000, 8)
    cache.put(key(1), tile(1), 0.5)
    others = [key(2), key(1, lod=2), key(1, engine="f"), TileKey((1, 0, 0, 1), 1, "e")]
    assert cache.get(others, [1.0] * 4) == [None] * 4


def test_nobody_elses_write_reaches_the_cache() -> None:
    cache, source = TileCache(10_000, 8), tile(1)
    cache.put(key(1), source, 0.5)
    source.tokens.zero_()
    source.deepstack.zero_()
    (hit,) = cache.get([key(1)], [0.5])
    assert same(hit, tile(1))
    assert hit is not None
    hit.tokens.zero_()
    hit.deepstack.zero_()
    (again,) = cache.get([key(1)], [0.5])
    assert same(again, tile(1))


def test_a_slice_of_a_batch_does_not_keep_the_batch_alive() -> None:
    batch = torch.randn(64, 3, 4)
    planes = torch.randn(2, 64, 3, 4)
    cache = TileCache(10_000, 8)
    cache.put(key(5), Features(batch[5:6], planes[:, 5:6]), 0.5)
    (stored,) = cache._tiles.values()
    for tensor, source in [(stored.tokens, batch[5:6]), (stored.deepstack, planes[:, 5:6])]:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(tensor, source)
    assert cache.stats().bytes == TILE_BYTES == 144


def test_what_is_stored_is_contiguous() -> None:
    cache = TileCache(10_000, 8)
    cache.put(key(1), Features(torch.randn(1, 4, 3).mT, torch.randn(2, 1, 4, 3).mT), 0.5)
    (hit,) = cache.get([key(1)], [0.5])
    assert hit is not None
    assert hit.tokens.is_contiguous()
    assert hit.deepstack.is_contiguous()


def test_gradients_do_not_enter() -> None:
    cache = TileCache(10_000, 8)
    cache.put(key(1), Features(tile(1).tokens.requires_grad_(), tile(1).deepstack), 0.5)
    (hit,) = cache.get([key(1)], [0.5])
    assert hit is not None
    assert not hit.tokens.requires_grad


def test_statistics_by_hand() -> None:
    cache = TileCache(2 * TILE_BYTES, 8)
    assert cache.stats().hit_rate == 0
    cache.get([key(1, lod=0), key(2, lod=3)], [0.9, 0.1])  # two misses
    cache.put(key(1, lod=0), tile(1), 0.9)
    cache.put(key(2, lod=3), tile(2), 0.1)
    cache.get([key(1, lod=0), key(2, lod=3), key(9, lod=3)], [0.9, 0.1, 0.5])  # two hits, a miss
    cache.put(key(9, lod=3), tile(9), 0.5)  # tile 2, scores 0.2 against 1.8, leaves
    cache.put(key(10), Features(torch.zeros(1, 60, 4), torch.zeros(2, 1, 60, 4)), 1.0)  # 2880 bytes: refused
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.puts, stats.evictions, stats.refused) == (2, 3, 3, 1, 1)
    assert (stats.entries, stats.bytes, stats.max_bytes) == (2, 2 * TILE_BYTES, 2 * TILE_BYTES)
    assert stats.hits_by_lod == {0: 1, 3: 1}
    assert stats.misses_by_lod == {0: 1, 3: 2}
    assert stats.hit_rate == pytest.approx(0.4)
    assert cache.get([key(2, lod=3)], [0.0]) == [None]
    cache.clear()
    assert (cache.stats().entries, cache.stats().bytes, cache.stats().evictions) == (0, 0, 1)
    assert cache.get([key(1, lod=0)], [0.0]) == [None]


def test_statistics_are_a_snapshot() -> None:
    cache = TileCache(10_000, 8)
    before = cache.stats()
    cache.get([key(1)], [0.5])
    assert (before.misses, before.misses_by_lod) == (0, {})


def test_relevance_of_hits_decides_who_stays() -> None:
    cache = TileCache(2 * TILE_BYTES, 100)
    cache.put(key(1), tile(1), 0.2)
    cache.put(key(2), tile(2), 0.3)
    cache.get([key(1)], [0.5])
    cache.put(key(3), tile(3), 0.1)
    found = cache.get([key(1), key(2), key(3)], [0.0] * 3)
    assert [f is not None for f in found] == [True, False, True]


def test_one_get_is_one_use_however_many_tiles() -> None:
    """Tiles of one question decay alike: half-life 2, so 0.8 is 0.4 after two calls of three keys."""
    cache = TileCache(10_000, 2)
    cache.put(key(1), tile(1), 0.8)
    for _ in range(2):
        cache.get([key(7), key(8), key(9)], [1.0] * 3)
    assert cache.evict_low_relevance(0.399) == 0
    assert cache.evict_low_relevance(0.401) == 1
    assert (cache.stats().evictions, cache.stats().entries) == (1, 0)
    assert cache.get([key(1)], [1.0]) == [None]


def test_zero_bytes_switch_the_cache_off() -> None:
    cache = TileCache(0, 8)
    assert not cache.put(key(1), tile(1), 1.0)
    assert cache.get([key(1)] * 2, [1.0] * 2) == [None, None]
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.entries, stats.bytes, stats.puts) == (2, 0, 0, 0, 0)


def test_only_single_tiles_are_stored() -> None:
    with pytest.raises(AssertionError, match="one tile"):
        TileCache(10_000, 8).put(key(1), Features(torch.zeros(2, 3, 4), torch.zeros(2, 2, 3, 4)), 1.0)


def test_every_key_needs_its_relevance() -> None:
    with pytest.raises(ValueError, match="zip"):
        TileCache(10_000, 8).get([key(1), key(2)], [1.0])


@pytest.mark.parametrize("location", ["device", "host"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_and_device_on_cuda(location: Literal["device", "host"]) -> None:
    cache = TileCache(10_000, 8, location)
    source = Features(tile(1).tokens.cuda(), tile(1).deepstack.cuda())
    cache.put(key(1), source, 0.5)
    (stored,) = cache._tiles.values()
    assert stored.tokens.device.type == ("cuda" if location == "device" else "cpu")
    (hit,) = cache.get([key(1)], [0.5], device="cuda")
    assert hit is not None
    assert hit.tokens.is_cuda
    assert same(hit, source)


def test_four_threads_and_a_tiny_bound() -> None:
    """Whatever the interleaving: every hit is the tile that belongs to its key, and every asserted
    invariant of ledger and cache holds."""
    cache = TileCache(5 * TILE_BYTES, 4)
    tiles = [tile(n) for n in range(12)]
    failures: list[BaseException] = []
    asked = [0] * 4

    def work(thread: int) -> None:
        draw = random.Random(thread)
        try:
            for _ in range(2000):
                numbers = [draw.randrange(12) for _ in range(draw.randrange(1, 4))]
                action = draw.random()
                if action < 0.45:
                    cache.put(key(numbers[0], lod=numbers[0] % 4), tiles[numbers[0]], draw.random())
                elif action < 0.9:
                    asked[thread] += len(numbers)
                    found = cache.get([key(n, lod=n % 4) for n in numbers], [draw.random() for _ in numbers])
                    assert all(f is None or same(f, tiles[n]) for f, n in zip(found, numbers, strict=True))
                elif action < 0.95:
                    cache.evict_low_relevance(draw.random())
                elif action < 0.96:
                    cache.clear()
                stats = cache.stats()
                assert stats.bytes == stats.entries * TILE_BYTES <= stats.max_bytes
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = cache.stats()
    assert stats.hits + stats.misses == sum(asked)
    assert stats.hits == sum(stats.hits_by_lod.values()) > 0
    assert stats.evictions > 0
