"""The tile encoder: what is cached, what is encoded, and in which order it comes back."""

from __future__ import annotations

import pytest
import torch

from arrcoc import image
from arrcoc.cache import TileCache
from arrcoc.config import load
from arrcoc.encoder import TileEncoder
from arrcoc.records import Features, Lod

CONFIG = load("demo").updated({"halo": 0})
CPU = torch.device("cpu")


class CountingEngine:
    """A LOD engine whose token is the mean of its tile, and which remembers how many it encoded."""

    backend, apart = "test", 0

    def __init__(self, side: int, fingerprint: str = "a", halo: int = 0) -> None:
        self.side, self.halo, self.fingerprint, self.encoded = side, halo, f"{fingerprint}{side}", 0

    def encode(self, pixels):
        edge = (self.side + 2 * self.halo) * 32
        assert pixels.shape[1:] == (3, edge, edge)
        self.encoded += len(pixels)
        mean = pixels.float().mean(dim=(1, 2, 3))
        tokens = mean[:, None, None].expand(-1, self.side**2, 2)
        return Features(tokens.clone(), torch.stack([tokens + 1000, tokens + 2000]))

    encode_ahead = encode


@pytest.fixture
def engines():
    return {lod: CountingEngine(CONFIG.sides[lod]) for lod in Lod}


@pytest.fixture
def frame():
    """2 x 3 tiles; every pixel of tile i is 10 * i, but tile 5 is like tile 0."""
    shade = torch.tensor([[0, 10, 20], [30, 40, 0]], dtype=torch.uint8)
    pixels = shade.repeat_interleave(128, 0).repeat_interleave(128, 1).expand(3, -1, -1).contiguous()
    return image.frame(pixels, CONFIG, 32, CPU)


def make(engines, cache_bytes=1 << 20, cache=None) -> tuple[TileEncoder, TileCache]:
    cache = cache or TileCache(cache_bytes, 100.0, "device")
    return TileEncoder(engines, cache, image.tile_pixels, image.hash_tiles, 32), cache


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
    make(other, cache=cache)[0].encode(frame, {Lod.HIGH: torch.tensor([0])}, RELEVANCE)
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


# LODs side by side.


def side_by_side(monkeypatch, engines, frame, wanted) -> tuple[list[int], list]:
    """How many tasks ran side by side at a time, and the tiles."""
    together: list[int] = []

    def parallel(tasks, device):
        assert device == frame.pixels.device
        together.append(len(tasks))
        return [task() for task in reversed(tasks)][::-1]

    monkeypatch.setattr("arrcoc.encoder.parallel", parallel)
    found = make(engines)[0].encode(frame, wanted, RELEVANCE)
    return together, found


WANTED = {Lod.LOW: torch.tensor([0, 1]), Lod.MEDIUM: torch.tensor([2]), Lod.HIGH: torch.tensor([3, 4, 5])}


@pytest.mark.parametrize(
    ("apart", "together"),
    [
        ((0, 0, 0), []),
        ((2, 0, 0), []),  # one alone has none beside it
        ((2, 1, 2), [2]),  # three tiles at HIGH are more than its two
        ((2, 1, 3), [3]),
    ],
)
def test_lods_run_side_by_side_where_their_engines_can(monkeypatch, engines, frame, apart, together):
    want = make({lod: CountingEngine(CONFIG.sides[lod]) for lod in Lod})[0].encode(frame, WANTED, RELEVANCE)
    for lod, most in zip(WANTED, apart, strict=True):
        engines[lod].apart = most
    found, have = side_by_side(monkeypatch, engines, frame, WANTED)
    assert found == together
    assert [engines[lod].encoded for lod in WANTED] == [2, 1, 3]
    for one, other in zip(have, want, strict=True):
        assert (one.lod, one.index.tolist()) == (other.lod, other.index.tolist())
        assert torch.equal(one.features.tokens, other.features.tokens)
        assert torch.equal(one.features.deepstack, other.features.deepstack)


def test_what_the_cache_has_takes_no_stream(monkeypatch, engines, frame):
    for engine in engines.values():
        engine.apart = 8
    encoder, _ = make(engines)
    encoder.encode(frame, {Lod.LOW: WANTED[Lod.LOW], Lod.MEDIUM: WANTED[Lod.MEDIUM]}, RELEVANCE)
    monkeypatch.setattr("arrcoc.encoder.parallel", lambda *_: pytest.fail("one LOD is left"))
    low, medium, high = encoder.encode(frame, WANTED, RELEVANCE)
    assert low.features.tokens[:, 0, 0].tolist() == [0, 10]
    assert medium.features.tokens[:, 0, 0].tolist() == [20]
    assert high.features.tokens[:, 0, 0].tolist() == [30, 40, 0]


# Halos.


def halo_run(halo: int, lod: Lod, tiles: list[int], pictures) -> tuple[CountingEngine, list[torch.Tensor]]:
    """Encode tiles of pictures of 2 x 3 tiles one after another through one cache."""
    engines = {each: CountingEngine(CONFIG.sides[each], halo=halo) for each in Lod}
    encoder, _ = make(engines)
    config = CONFIG.updated({"halo": halo})
    means = []
    for pixels in pictures:
        frame = image.frame(pixels, config, 32, CPU)
        (made,) = encoder.encode(frame, {lod: torch.tensor(tiles)}, RELEVANCE)
        means.append(made.features.tokens[:, 0, 0])
    return engines[lod], means


# A token of margin is 32 px at LOD high and 64 px at LOD low (sides 4 and 2); at background (side 1) it is
# 128 px, a whole tile, and two are two tiles. Tile 0 spans rows and columns 0 to 127 of 256 x 384.
REACH = [
    (1, Lod.HIGH, 32),
    (2, Lod.HIGH, 64),
    (1, Lod.LOW, 64),
    (1, Lod.BACKGROUND, 128),
    (2, Lod.BACKGROUND, 256),
    # Side 3: 32 px of the level are 42 and two thirds: part of the 43rd pixel counts.
    (1, Lod.MEDIUM, 43),
]


@pytest.mark.parametrize(("halo", "lod", "reach"), REACH)
@pytest.mark.parametrize("corner", [False, True])
def test_a_pixel_in_the_halo_is_part_of_the_key_and_one_beyond_is_not(halo, lod, reach, corner):
    pixels = torch.randint(0, 200, (3, 256, 384), dtype=torch.uint8)
    column = 128 + reach - 1
    row = 127 + min(reach, 128) if corner else 5

    def changed(at: int) -> torch.Tensor:
        other = pixels.clone()
        # A block as large as a pixel of the level, so that its mean moves; it begins at the column given.
        other[:, row - 3 : row + 1, at : at + 4] = 255
        return other

    inside = pixels.clone()
    inside[:, row - 3 : row + 1, column - 3 : column + 1] = 255
    engine, _ = halo_run(halo, lod, [0], [pixels, inside])
    assert engine.encoded == 2
    if column + 1 < 384:
        engine, means = halo_run(halo, lod, [0], [pixels, changed(column + 1)])
        assert engine.encoded == 1
        assert torch.equal(*means)


def test_equal_tiles_with_equal_surroundings_are_encoded_once(frame):
    """With a halo tile 5 of `frame` is no longer as tile 0; all tiles of a plain frame are alike."""
    engine, means = halo_run(1, Lod.HIGH, [0, 5], [frame.pixels])
    assert engine.encoded == 2
    engine, _ = halo_run(1, Lod.HIGH, [0, 1, 4, 5], [torch.full((3, 256, 384), 9, dtype=torch.uint8)])
    assert engine.encoded == 1
    # Tile 0 is 0 over 4 x 4 tokens; its margin repeats it on the left and above, and is 10 on the right,
    # 30 below and 40 in the corner: (4*10 + 4*30 + 40 + 1*10 + 1*30) / 36, the last two from the corners
    # above right and below left.
    assert means[0][0] == pytest.approx((4 * 10 + 4 * 30 + 40 + 10 + 30) / 36)


def test_several_lods_with_a_halo_come_back_in_order(frame):
    engines = {lod: CountingEngine(CONFIG.sides[lod], halo=1) for lod in Lod}
    encoder, cache = make(engines)
    made = image.frame(frame.pixels, CONFIG.updated({"halo": 1}), 32, CPU)
    wanted = {Lod.LOW: torch.tensor([2]), Lod.MEDIUM: torch.tensor([]), Lod.HIGH: torch.tensor([0, 1, 5])}
    first = encoder.encode(made, wanted, RELEVANCE)
    again = encoder.encode(made, wanted, RELEVANCE)
    assert [(t.lod, t.index.tolist()) for t in first] == [(Lod.LOW, [2]), (Lod.HIGH, [0, 1, 5])]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.features.tokens, other.features.tokens)
    assert (cache.stats().misses, cache.stats().hits) == (4, 4)
    assert encoder.encode(made, {Lod.LOW: torch.tensor([])}, RELEVANCE) == []


def test_frames_and_engines_of_different_halos_do_not_mix(engines, frame):
    made = image.frame(frame.pixels, CONFIG.updated({"halo": 1}), 32, CPU)
    with pytest.raises(AssertionError, match="halo"):
        make(engines)[0].encode(made, {Lod.LOW: torch.tensor([2])}, RELEVANCE)
    engines[Lod.HIGH].halo = 1
    with pytest.raises(ValueError, match="too many values"):
        make(engines)


def test_a_second_question_on_an_image_shows_hits_and_the_same_features(tiny_checkpoint, photo):
    from arrcoc import Engine

    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", layout="crops")
    first = engine.encode(photo, "What is on her sleeve?", budget=1.0)
    assert engine.cache_stats().hits == 0
    second = engine.encode(photo, "Which colour is the rocket?", budget=1.0)
    assert engine.cache_stats().hits > 0
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.deepstack, second.deepstack)
