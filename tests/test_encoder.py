"""The tile encoder: what is cached, what is encoded, and in which order it comes back."""

from __future__ import annotations

import pytest
import torch

from arrcoc import image
from arrcoc.cache import TileCache
from arrcoc.config import load
from arrcoc.encoder import TileEncoder
from arrcoc.records import Features, Lod

CONFIG = load("demo")
CPU = torch.device("cpu")


class CountingEngine:
    """A LOD engine whose token is the mean of its tile, and which remembers how many it encoded."""

    backend = "test"

    def __init__(self, side: int, fingerprint: str = "a") -> None:
        self.side, self.fingerprint, self.encoded = side, f"{fingerprint}{side}", 0

    def encode(self, pixels):
        assert pixels.shape[1:] == (3, self.side * 32, self.side * 32)
        self.encoded += len(pixels)
        mean = pixels.float().mean(dim=(1, 2, 3))
        tokens = mean[:, None, None].expand(-1, self.side**2, 2)
        return Features(tokens.clone(), torch.stack([tokens + 1000, tokens + 2000]))


@pytest.fixture
def engines():
    return {lod: CountingEngine(CONFIG.sides[lod]) for lod in Lod}


@pytest.fixture
def frame():
    """2 x 3 tiles; every pixel of tile i is 10 * i, but tile 5 is like tile 0."""
    shade = torch.tensor([[0, 10, 20], [30, 40, 0]], dtype=torch.uint8)
    pixels = shade.repeat_interleave(128, 0).repeat_interleave(128, 1).expand(3, -1, -1).contiguous()
    return image.frame(pixels, CONFIG, 32, CPU)


def make(engines, cache_bytes=1 << 20) -> tuple[TileEncoder, TileCache]:
    cache = TileCache(cache_bytes, 100.0, "device")
    return TileEncoder(engines, cache, image.tile_pixels, 32), cache


RELEVANCE = torch.full((2, 3), 0.5)


def test_tiles_come_back_in_the_order_asked_for(engines, frame):
    encoder, _ = make(engines)
    wanted = {
        Lod.HIGH: torch.tensor([1, 4]),
        Lod.LOW: torch.tensor([], dtype=torch.long),
        Lod.MEDIUM: torch.tensor([3]),
    }
    high, medium = encoder.encode(frame, wanted, RELEVANCE)
    assert (high.lod, high.side, high.index.tolist()) == (Lod.HIGH, 4, [1, 4])
    assert high.features.tokens[:, 0, 0].tolist() == [10, 40]
    assert high.features.deepstack[1, :, 15, 1].tolist() == [2010, 2040]
    assert (medium.lod, medium.features.tokens.shape) == (Lod.MEDIUM, (1, 9, 2))


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
def test_tiles_with_the_same_pixels_are_encoded_once(engines, frame, cache_bytes):
    encoder, _ = make(engines, cache_bytes)
    (tiles,) = encoder.encode(frame, {Lod.HIGH: torch.arange(6)}, RELEVANCE)
    assert engines[Lod.HIGH].encoded == 5  # tile 5 is like tile 0
    assert tiles.features.tokens[:, 0, 0].tolist() == [0, 10, 20, 30, 40, 0]


def test_every_use_of_an_equal_tile_counts(engines, frame):
    encoder, cache = make(engines)
    encoder.encode(frame, {Lod.HIGH: torch.tensor([0, 1, 5])}, RELEVANCE)
    # Tile 0 was used twice at relevance 0.5, tile 1 once.
    assert cache.evict_low_relevance(0.75) == 1
    encoder.encode(frame, {Lod.HIGH: torch.tensor([0, 1])}, RELEVANCE)
    assert engines[Lod.HIGH].encoded == 3


def test_only_what_is_missing_is_encoded(engines, frame):
    encoder, cache = make(engines)
    first = encoder.encode(frame, {Lod.HIGH: torch.tensor([1, 3])}, RELEVANCE)
    (second,) = encoder.encode(frame, {Lod.HIGH: torch.tensor([1, 2, 3])}, RELEVANCE)
    assert engines[Lod.HIGH].encoded == 3
    assert second.features.tokens[:, 0, 0].tolist() == [10, 20, 30]
    assert torch.equal(second.features.tokens[[0, 2]], first[0].features.tokens)
    assert (cache.stats().hits, cache.stats().misses) == (2, 3)


def test_a_hit_may_come_from_another_place_but_not_another_lod_or_engine(engines, frame):
    encoder, cache = make(engines)
    encoder.encode(frame, {Lod.HIGH: torch.tensor([0])}, RELEVANCE)
    encoder.encode(frame, {Lod.HIGH: torch.tensor([5])}, RELEVANCE)
    assert engines[Lod.HIGH].encoded == 1, "tile 5 shows what tile 0 shows"
    encoder.encode(frame, {Lod.LOW: torch.tensor([0])}, RELEVANCE)
    assert engines[Lod.LOW].encoded == 1
    other = {lod: CountingEngine(CONFIG.sides[lod], "b") for lod in Lod}
    TileEncoder(other, cache, image.tile_pixels, 32).encode(frame, {Lod.HIGH: torch.tensor([0])}, RELEVANCE)
    assert other[Lod.HIGH].encoded == 1


def test_what_the_caller_does_to_tiles_does_not_reach_the_cache(engines, frame):
    encoder, _ = make(engines)
    for _ in range(2):
        (tiles,) = encoder.encode(frame, {Lod.HIGH: torch.tensor([1])}, RELEVANCE)
        assert tiles.features.tokens[0, 0, 0] == 10
        tiles.features.tokens.zero_()


def test_without_a_cache_everything_is_encoded(engines, frame):
    encoder, _ = make(engines, cache_bytes=0)
    for _ in range(2):
        (tiles,) = encoder.encode(frame, {Lod.HIGH: torch.tensor([1, 2])}, RELEVANCE)
        assert tiles.features.tokens[:, 0, 0].tolist() == [10, 20]
    assert engines[Lod.HIGH].encoded == 4


def test_relevance_decides_what_stays(engines, frame):
    encoder, cache = make(engines)
    relevance = torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.0, 0.0]])
    encoder.encode(frame, {Lod.HIGH: torch.tensor([1, 2])}, relevance)
    assert cache.evict_low_relevance(0.5) == 1
    encoder.encode(frame, {Lod.HIGH: torch.tensor([1, 2])}, relevance)
    assert engines[Lod.HIGH].encoded == 3


def test_a_second_question_on_an_image_shows_hits_and_the_same_features(tiny_checkpoint, photo):
    from arrcoc import Engine

    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", layout="crops")
    first = engine.encode(photo, "What is on her sleeve?", budget=1.0)
    assert engine.cache_stats().hits == 0
    second = engine.encode(photo, "Which colour is the rocket?", budget=1.0)
    assert engine.cache_stats().hits > 0
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.deepstack, second.deepstack)
