"""The cache with its tensors, in memory: what is found is what was put, whatever moved in between."""

import random
import threading
from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from arrcoc.cache import TileCache, TileKey
from arrcoc.records import Features

TILE_BYTES = 3 * 4 * 4 + 2 * 3 * 4 * 4  # tokens [1, 3, 4] and deepstack [2, 1, 3, 4] in fp32


def key(number: int, lod: int = 1, engine: str = "e") -> TileKey:
    return TileKey((number, 0, 0, 0), lod, engine)


def tile(seed: int, dtype: torch.dtype = torch.float32, tokens: int = 3) -> Features:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(3, 1, tokens, 4, generator=generator).to(dtype)
    return Features(made[0], made[1:])


def same(a: Features | None, b: Features) -> bool:
    return a is not None and torch.equal(a.tokens, b.tokens) and torch.equal(a.deepstack, b.deepstack)


def put(cache: TileCache, key: TileKey, features: Features, relevance: float) -> bool:
    return cache.put([key], features, [relevance]) == 1


def get(cache: TileCache, keys: Sequence[TileKey], relevance: Sequence[float]) -> list[Features | None]:
    """For each key its features, or None."""
    found = cache.get(keys, relevance)
    assert found.places == sorted(found.places)
    result: list[Features | None] = [None] * len(keys)
    for row, place in enumerate(found.places):
        assert found.features is not None
        tokens, planes = found.features.tokens, found.features.deepstack
        result[place] = Features(tokens[row : row + 1], planes[:, row : row + 1])
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("location", ["device", "host"])
def test_a_hit_is_bit_equal(location: Literal["device", "host"], dtype: torch.dtype) -> None:
    cache = TileCache(10_000, 8, location)
    assert put(cache, key(1), tile(1, dtype), 0.5)
    assert put(cache, key(2), tile(2, dtype), 0.5)
    second, missing, first = get(cache, [key(2), key(3), key(1)], [0.1, 0.2, 0.3])
    assert same(second, tile(2, dtype))
    assert missing is None
    assert same(first, tile(1, dtype))
    assert second is not None
    assert second.tokens.dtype == dtype


def test_key_covers_content_lod_and_engine() -> None:
    cache = TileCache(10_000, 8)
    put(cache, key(1), tile(1), 0.5)
    others = [key(2), key(1, lod=2), key(1, engine="f"), TileKey((1, 0, 0, 1), 1, "e")]
    assert get(cache, others, [1.0] * 4) == [None] * 4


def test_nobody_elses_write_reaches_the_cache() -> None:
    cache, source = TileCache(10_000, 8), tile(1)
    put(cache, key(1), source, 0.5)
    source.tokens.zero_()
    source.deepstack.zero_()
    (hit,) = get(cache, [key(1)], [0.5])
    assert same(hit, tile(1))
    assert hit is not None
    hit.tokens.zero_()
    hit.deepstack.zero_()
    (again,) = get(cache, [key(1)], [0.5])
    assert same(again, tile(1))


@pytest.mark.parametrize("bounds", [(10_000, 0), (0, 10_000), (3 * TILE_BYTES, 10_000)])
def test_a_batch_is_put_and_found_in_any_order(bounds: tuple[int, int]) -> None:
    """Whether all of it stays on the device, none, or a part: which tier holds a tile shows nowhere."""
    cache = TileCache(bounds[0], 8, host_bytes=bounds[1])
    batch = Features(torch.randn(7, 3, 4), torch.randn(2, 7, 3, 4))
    numbers = [3, 1, 4, 5, 9, 2, 6]
    assert cache.put([key(n) for n in numbers], batch, [0.1 * n for n in numbers]) == 7
    asked = [6, 8, 3, 3, 2, 9, 1, 8]
    found = cache.get([key(n) for n in asked], [0.5] * 8)
    assert found.places == [0, 2, 3, 4, 5, 6]
    rows = [numbers.index(asked[place]) for place in found.places]
    assert same(found.features, Features(batch.tokens[rows], batch.deepstack[:, rows]))
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.puts, stats.entries) == (6, 2, 7, 7)
    assert stats.bytes == 7 * TILE_BYTES


def test_the_buffer_grows_with_what_it_holds_and_not_beyond_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("arrcoc.cache.arena._FIRST_BYTES", 2 * TILE_BYTES)
    cache = TileCache(11 * TILE_BYTES + 20, 8)
    tiles = [tile(n) for n in range(20)]
    reserved = []
    for n in range(20):
        put(cache, key(n), tiles[n], 0.5)
        arena = cache._memory._device.arena
        assert arena is not None
        reserved.append(arena.reserved // TILE_BYTES)
        for old in range(max(0, n - 10), n + 1):
            (hit,) = get(cache, [key(old)], [0.0])
            assert same(hit, tiles[old])
    assert reserved[:10] == [2, 2, 4, 4, 8, 8, 8, 8, 11, 11]
    assert reserved[-1] == 11
    assert cache.stats().entries == 11


def test_tiles_of_several_sides_share_the_bound_without_gaps() -> None:
    """90 tokens: 10 tiles of 9, then 90 of 1, which take their places whatever they were."""
    cache = TileCache(90 * 48, 1e9)
    for n in range(10):
        put(cache, key(n), tile(n, tokens=9), 0.01)
    for n in range(90):
        put(cache, key(100 + n), tile(n, tokens=1), 1.0)
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.refused) == (90, 90 * 48, 0)
    for n in range(90):
        (hit,) = get(cache, [key(100 + n)], [0.0])
        assert same(hit, tile(n, tokens=1))


def test_tiles_of_another_kind_than_the_first_are_refused() -> None:
    cache = TileCache(10_000, 8)
    put(cache, key(1), tile(1), 0.5)
    assert not put(cache, key(2), tile(2, torch.float16), 0.5)
    assert not put(cache, key(3), Features(torch.zeros(1, 3, 4), torch.zeros(1, 1, 3, 4)), 0.5)
    assert (cache.stats().refused, cache.stats().entries) == (2, 1)
    assert get(cache, [key(2)], [0.5]) == [None]


# Tiers.


def two_tiers() -> TileCache:
    return TileCache(2 * TILE_BYTES, 100, host_bytes=3 * TILE_BYTES)


def test_what_the_device_evicts_is_found_in_host_memory_and_moves_up_again() -> None:
    cache = two_tiers()
    for n, relevance in [(1, 0.2), (2, 0.6), (3, 0.4)]:
        put(cache, key(n), tile(n), relevance)
    device, host = (cache.stats().tiers[name] for name in ("device", "host"))
    assert (device.entries, device.stored, device.left) == (2, 3, 1)
    assert (host.entries, host.stored, host.hits) == (1, 1, 0)
    (hit,) = get(cache, [key(1)], [0.5])  # 0.7: moves up, and 3 (0.4) moves down
    assert same(hit, tile(1))
    device, host = (cache.stats().tiers[name] for name in ("device", "host"))
    assert (device.hits, device.entries, host.hits, host.entries, host.left) == (0, 2, 1, 1, 1)
    assert same(get(cache, [key(3)], [0.0])[0], tile(3))
    stats = cache.stats()
    assert (stats.hits, stats.evictions, stats.entries) == (2, 0, 3)
    assert (stats.bytes, stats.max_bytes) == (3 * TILE_BYTES, 5 * TILE_BYTES)


def test_only_what_leaves_the_last_tier_is_evicted() -> None:
    cache = two_tiers()
    for n in range(7):
        put(cache, key(n), tile(n), 0.1 * (n + 1))
    stats = cache.stats()
    assert (stats.entries, stats.evictions, stats.puts) == (5, 2, 7)
    found = get(cache, [key(n) for n in range(7)], [0.0] * 7)
    assert [f is not None for f in found] == [False, False, True, True, True, True, True]
    assert all(same(found[n], tile(n)) for n in range(2, 7))


def test_one_lookup_may_read_from_and_reorder_both_tiers() -> None:
    cache = two_tiers()
    for n in range(5):
        put(cache, key(n), tile(n), 0.1 * (n + 1))
    for _ in range(3):
        order = [4, 0, 3, 0, 1, 2]
        found = get(cache, [key(n) for n in order], [0.3, 1.0, 0.1, 1.0, 0.2, 0.0])
        assert all(same(hit, tile(n)) for hit, n in zip(found, order, strict=True))
    assert cache.stats().entries == 5


def test_low_relevance_leaves_every_tier() -> None:
    cache = two_tiers()
    for n in range(5):
        put(cache, key(n), tile(n), 0.1 * (n + 1))
    assert cache.evict_low_relevance(0.35) == 3
    assert (cache.stats().entries, cache.stats().evictions) == (2, 3)
    cache.clear()
    assert cache.stats().bytes == 0
    assert cache.stats().evictions == 3
    put(cache, key(1), tile(1), 0.5)
    assert same(get(cache, [key(1)], [0.5])[0], tile(1))


def test_what_was_encoded_ahead_is_counted_until_it_is_asked_for() -> None:
    cache = two_tiers()
    cache.put([key(1)], tile(1), [0.1], ahead=True)
    put(cache, key(2), tile(2), 0.1)
    assert (cache.stats().prefetched, cache.stats().prefetch_hits, cache.stats().puts) == (1, 0, 2)
    assert cache.missing([key(1), key(3), key(3)]) == [key(3)]
    for _ in range(2):
        get(cache, [key(1), key(2), key(1)], [0.1] * 3)
    assert cache.stats().prefetch_hits == 1


def test_gradients_do_not_enter() -> None:
    cache = TileCache(10_000, 8)
    put(cache, key(1), Features(tile(1).tokens.requires_grad_(), tile(1).deepstack), 0.5)
    (hit,) = get(cache, [key(1)], [0.5])
    assert hit is not None
    assert not hit.tokens.requires_grad


def test_statistics_by_hand() -> None:
    cache = TileCache(2 * TILE_BYTES, 8)
    assert cache.stats().hit_rate == 0
    get(cache, [key(1, lod=0), key(2, lod=3)], [0.9, 0.1])  # two misses
    put(cache, key(1, lod=0), tile(1), 0.9)
    put(cache, key(2, lod=3), tile(2), 0.1)
    get(cache, [key(1, lod=0), key(2, lod=3), key(9, lod=3)], [0.9, 0.1, 0.5])  # two hits, a miss
    put(cache, key(9, lod=3), tile(9), 0.5)  # tile 2, scores 0.2 against 1.8, leaves
    put(cache, key(10), Features(torch.zeros(1, 60, 4), torch.zeros(2, 1, 60, 4)), 1.0)  # 2880 bytes: refused
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.puts, stats.evictions, stats.refused) == (2, 3, 3, 1, 1)
    assert (stats.entries, stats.bytes, stats.max_bytes) == (2, 2 * TILE_BYTES, 2 * TILE_BYTES)
    assert stats.hits_by_lod == {0: 1, 3: 1}
    assert stats.misses_by_lod == {0: 1, 3: 2}
    assert stats.hit_rate == pytest.approx(0.4)
    assert get(cache, [key(2, lod=3)], [0.0]) == [None]
    cache.clear()
    assert (cache.stats().entries, cache.stats().bytes, cache.stats().evictions) == (0, 0, 1)
    assert get(cache, [key(1, lod=0)], [0.0]) == [None]


def test_statistics_are_a_snapshot() -> None:
    cache = TileCache(10_000, 8)
    before = cache.stats()
    get(cache, [key(1)], [0.5])
    assert (before.misses, before.misses_by_lod) == (0, {})


def test_relevance_of_hits_decides_who_stays() -> None:
    cache = TileCache(2 * TILE_BYTES, 100)
    put(cache, key(1), tile(1), 0.2)
    put(cache, key(2), tile(2), 0.3)
    get(cache, [key(1)], [0.5])
    put(cache, key(3), tile(3), 0.1)
    found = get(cache, [key(1), key(2), key(3)], [0.0] * 3)
    assert [f is not None for f in found] == [True, False, True]


def test_one_get_is_one_use_however_many_tiles() -> None:
    """Tiles of one question decay alike: half-life 2, so 0.8 is 0.4 after two calls of three keys."""
    cache = TileCache(10_000, 2)
    put(cache, key(1), tile(1), 0.8)
    for _ in range(2):
        get(cache, [key(7), key(8), key(9)], [1.0] * 3)
    assert cache.evict_low_relevance(0.399) == 0
    assert cache.evict_low_relevance(0.401) == 1
    assert (cache.stats().evictions, cache.stats().entries) == (1, 0)
    assert get(cache, [key(1)], [1.0]) == [None]


def test_zero_bytes_switch_the_cache_off() -> None:
    cache = TileCache(0, 8)
    assert not put(cache, key(1), tile(1), 1.0)
    assert get(cache, [key(1)] * 2, [1.0] * 2) == [None, None]
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.entries, stats.bytes, stats.puts) == (2, 0, 0, 0, 0)


def test_every_key_needs_its_relevance() -> None:
    with pytest.raises(ValueError, match="zip"):
        TileCache(10_000, 8).get([key(1), key(2)], [1.0])


@pytest.mark.parametrize("bounds", [(5, 0), (2, 3), (0, 5)])
def test_eight_threads_and_a_tiny_bound(bounds: tuple[int, int]) -> None:
    """Whatever the interleaving: every hit is the tile that belongs to its key, and every asserted
    invariant of ledgers, pages and cache holds. 8 x 10,000 operations where there are two tiers."""
    cache = TileCache(bounds[0] * TILE_BYTES, 4, host_bytes=bounds[1] * TILE_BYTES)
    tiles = [tile(n) for n in range(12)]
    failures: list[BaseException] = []
    asked = [0] * 8

    def step(thread: int, draw: random.Random) -> None:
        numbers = [draw.randrange(12) for _ in range(draw.randrange(1, 4))]
        action = draw.random()
        if action < 0.45:
            put(cache, key(numbers[0], lod=numbers[0] % 4), tiles[numbers[0]], draw.random())
        elif action < 0.9:
            asked[thread] += len(numbers)
            found = get(cache, [key(n, lod=n % 4) for n in numbers], [draw.random() for _ in numbers])
            assert all(f is None or same(f, tiles[n]) for f, n in zip(found, numbers, strict=True))
        elif action < 0.95:
            cache.evict_low_relevance(draw.random())
        elif action < 0.96:
            cache.clear()
        else:
            stats = cache.stats()
            assert stats.bytes == stats.entries * TILE_BYTES <= stats.max_bytes == 5 * TILE_BYTES

    def work(thread: int) -> None:
        draw = random.Random(thread)
        try:
            for _ in range(10_000 if all(bounds) else 1_000):
                step(thread, draw)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = cache.stats()
    assert stats.hits + stats.misses == sum(asked)
    assert stats.hits == sum(stats.hits_by_lod.values()) > 0
    assert stats.evictions > 0
    cache.clear()
    for tier in (cache._memory._device, cache._memory._host):
        stack = tier.arena._stack if tier.arena else None
        assert stack is None or sorted(stack._stack[: stack.free]) == list(range(stack.count)), "pages lost"
