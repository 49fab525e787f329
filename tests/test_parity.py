"""arrcoc equals the stock Qwen3-VL where both see the same, and itself whatever the circumstances."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import parity
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from arrcoc import Engine, image, scorers, sequence, streams, texture
from arrcoc.config import build, load
from arrcoc.glimpse import GlimpseScorer, JointGlimpse
from arrcoc.lod import TorchLodEngine
from arrcoc.records import Features
from arrcoc.vision import patchify

CPU = torch.device("cpu")
QUESTIONS = ("What is on her sleeve?", "Which colour is the rocket?")


def make_engine(folder, preset="demo", **overrides) -> Engine:
    """Without a halo unless asked for: what equals the stock model is a tile that sees nothing else."""
    return Engine.from_pretrained(folder, preset=preset, device="cpu", **({"halo": 0} | overrides))


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return make_engine(tiny_checkpoint)


@pytest.fixture(scope="module")
def eager_model(tiny_checkpoint):
    return Qwen3VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


# One native tile: 128 px of `demo`, 256 px of `photo`.

ONE_TILE = [("demo", 128), ("photo", 256)]


@pytest.mark.parametrize(("preset", "edge"), ONE_TILE)
def test_one_native_tile_equals_the_stock_model(preset, edge, tiny_checkpoint, stock_model, photo):
    messages = parity.turn("What is this?", photo.crop((100, 0, 100 + edge, edge)))
    ours = parity.run_arrcoc(make_engine(tiny_checkpoint, preset), messages)
    stock = parity.run_stock(stock_model, messages)
    assert len(ours.tokens) == (edge // 32) ** 2
    for same in (
        parity.same_tokens,
        parity.same_deepstack,
        parity.same_positions,
        parity.same_logits,
        parity.same_text,
    ):
        same(ours, stock)


def test_two_images_equal_the_stock_model(engine, stock_model, photo):
    messages = parity.turn("Compare.", photo.crop((0, 0, 128, 128)), photo.crop((200, 60, 328, 188)))
    ours, stock = parity.run_arrcoc(engine, messages), parity.run_stock(stock_model, messages)
    assert len(ours.tokens) == 32
    parity.same_tokens(ours, stock)
    parity.same_deepstack(ours, stock)
    parity.same_positions(ours, stock)
    parity.same_logits(ours, stock)
    parity.same_text(ours, stock)


def test_text_alone_equals_the_stock_model(engine, stock_model):
    messages = parity.turn("Write a general description of the weather.")
    ours, stock = parity.run_arrcoc(engine, messages), parity.run_stock(stock_model, messages)
    parity.same_positions(ours, stock)
    parity.same_logits(ours, stock)
    parity.same_text(ours, stock)


def test_probed_attention_equals_the_stock_models(engine, eager_model, photo):
    parity.same_attention(engine, eager_model, parity.turn("What is it?", photo.crop((0, 0, 128, 128))))


# A tile alone, in a batch, from the cache.


def tiles_of(photo, count: int, edge: int):
    pixels = image.decode(photo, 10**8)
    return torch.stack([pixels[:, :edge, i * 16 : i * 16 + edge] for i in range(count)])


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_tile_is_bit_equal_whatever_its_neighbours_are(side, engine, photo):
    encoder = TorchLodEngine(engine._qwen, side, (4,))
    pixels = tiles_of(photo, 4, side * 32)
    together, others = encoder.encode(pixels), pixels.flip(-1)
    for i in range(4):
        others[i] = pixels[i]
        among = encoder.encode(others)
        assert torch.equal(among.tokens[i], together.tokens[i])
        assert torch.equal(among.deepstack[:, i], together.deepstack[:, i])


def test_a_tile_in_batches_of_two_sizes_is_within_the_tolerance(engine, photo):
    pixels = tiles_of(photo, 4, 64)
    one, four = (TorchLodEngine(engine._qwen, 2, (size,)).encode(pixels) for size in (1, 4))
    assert parity.relative_error(one.tokens, four.tokens) < parity.TOLERANCE
    assert parity.relative_error(one.deepstack, four.deepstack) < parity.TOLERANCE


def test_a_tile_from_the_cache_is_bit_equal(tiny_checkpoint, photo):
    warm = make_engine(tiny_checkpoint)
    first = warm.encode(photo, QUESTIONS[0], budget=0.5)
    again = warm.encode(photo, QUESTIONS[0], budget=0.5)
    assert warm.cache_stats().hits > 0
    cold = make_engine(tiny_checkpoint, cache_bytes=0).encode(photo, QUESTIONS[0], budget=0.5)
    for other in (again, cold):
        assert torch.equal(first.tokens, other.tokens)
        assert torch.equal(first.deepstack, other.deepstack)


# All tiles high.


@pytest.mark.parametrize("layout", ["replace", "refine"])
def test_all_high_stands_where_the_stock_model_puts_the_full_image(
    layout, tiny_checkpoint, stock_model, photo
):
    wide = photo.crop((0, 0, 384, 256))  # 2 x 3 tiles
    engine = make_engine(tiny_checkpoint, layout=layout, order="raster")
    messages = parity.turn("What is this?", wide)
    ours, stock = parity.run_arrcoc(engine, messages, 1), parity.run_stock(stock_model, messages, 1)
    parity.same_positions(ours, stock)
    # Token (h, w) of the frame is token (h % 4, w % 4) of its tile, encoded as an image of its own.
    for row in range(2):
        for col in range(3):
            tile = wide.crop((col * 128, row * 128, col * 128 + 128, row * 128 + 128))
            alone = parity.run_stock(stock_model, parity.turn("What is this?", tile), 1)
            here = ours.tokens.view(8, 12, -1)[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
            assert parity.relative_error(here.flatten(0, 1), alone.tokens) < parity.TOLERANCE


# Halos and overviews: what the stock tower makes of the same pixels.


def unit_scale(folder):
    """An engine whose vision weights are scaled up: untrained ones hardly let a patch see another."""
    engine = make_engine(folder, cache_bytes=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in engine._qwen.model.model.visual.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return engine


def stock_features(qwen, pixels):
    """Tokens [h, w, D] and DeepStack planes of one image uint8 [3, h*32, w*32] through the stock tower."""
    rows, cols = pixels.shape[1] // 32, pixels.shape[2] // 32
    patches = patchify(pixels[None], qwen.vision, qwen.dtype)[0]
    with torch.inference_mode():
        tower = qwen.model.model.visual
        made = tower(patches, torch.tensor([[1, 2 * rows, 2 * cols]]))
    return made.pooler_output.view(rows, cols, -1), [p.view(rows, cols, -1) for p in made.deepstack_features]


@pytest.fixture(scope="module")
def unit_engine(tiny_checkpoint):
    return unit_scale(tiny_checkpoint)


@pytest.mark.parametrize(("lod", "halo"), [(0, 1), (1, 1), (2, 2), (3, 1), (3, 0)])
def test_a_tile_with_a_halo_is_the_stock_towers_crop_without_its_margin(lod, halo, unit_engine, photo):
    qwen, config = unit_engine._qwen, load("demo").updated({"halo": halo})
    side = config.sides[lod]
    frame = image.frame(image.decode(photo, 10**8), config, 32, CPU)  # 4 x 4 tiles
    engine = TorchLodEngine(qwen, side, (2,), halo)
    index = torch.tensor([0, 6])
    found = engine.encode(image.tile_pixels(frame, side * 32, index, halo * 32))
    # The definition: the frame's level, its edge repeated, sliced.
    level = image.area_resample(frame.pixels, 128, side * 32)[None].float()
    padded = torch.nn.functional.pad(level, [halo * 32] * 4, mode="replicate")[0].to(torch.uint8)
    edge, kept = (side + 2 * halo) * 32, slice(halo, halo + side)
    for row, (down, right) in enumerate(((0, 0), (1, 2))):
        top, left = down * side * 32, right * side * 32
        tokens, planes = stock_features(qwen, padded[:, top : top + edge, left : left + edge])
        wanted = tokens[kept, kept].flatten(0, 1)
        assert parity.relative_error(found.tokens[row], wanted) < parity.TOLERANCE
        for have, plane in zip(found.deepstack[:, row], planes, strict=True):
            assert parity.relative_error(have, plane[kept, kept].flatten(0, 1)) < parity.TOLERANCE
        bare = engine.encode(image.tile_pixels(frame, side * 32, index, halo * 32).flip(-1))
        assert parity.relative_error(bare.tokens[row], wanted) > 0.1, "another image"
        if halo:
            margin = padded[:, top : top + edge, left : left + edge].clone()
            margin[:, :32] = 255 - margin[:, :32]
            seen = stock_features(qwen, margin)[0][kept, kept].flatten(0, 1)
            assert parity.relative_error(seen, wanted) > 1e-2, "the margin matters"


def test_an_overview_is_the_stock_towers_view_of_the_reduced_frame(unit_engine, photo):
    qwen = unit_engine._qwen
    encoding = unit_engine.encode(photo, QUESTIONS[0], budget=31)  # 4 x 4 glimpse tokens: stride 2
    assert encoding.overview_stride == 2
    frame = image.frame(image.decode(photo, 10**8), load("demo"), 32, CPU)
    small = torch.nn.functional.avg_pool2d(frame.background.float(), 2).round().to(torch.uint8)
    tokens, planes = stock_features(qwen, small)
    assert parity.relative_error(encoding.tokens[:4], tokens.flatten(0, 1)) < parity.TOLERANCE
    for have, plane in zip(encoding.deepstack, planes, strict=True):
        assert parity.relative_error(have[:4], plane.flatten(0, 1)) < parity.TOLERANCE


@pytest.mark.parametrize("glimpse", ["joint", "tiles"])
def test_a_halo_reaches_every_tile_and_repeats_from_the_cache(glimpse, tiny_checkpoint, photo):
    settings = {"glimpse": glimpse, "halo": 1, "layout": "replace"}
    engine = make_engine(tiny_checkpoint, **settings)
    first = engine.encode(photo, QUESTIONS[0], budget=0.5)
    misses = engine.cache_stats().misses
    again = engine.encode(photo, QUESTIONS[0], budget=0.5)
    assert engine.cache_stats().misses == misses
    cold = make_engine(tiny_checkpoint, cache_bytes=0, **settings).encode(photo, QUESTIONS[0], budget=0.5)
    for other in (again, cold):
        assert torch.equal(first.tokens, other.tokens)
        assert torch.equal(first.positions, other.positions)
    config = load("demo").updated({"halo": 1})
    frame = image.frame(image.decode(photo, 10**8), config, 32, CPU)
    sides = (0, 1, 2, 3) if glimpse == "tiles" else (1, 2, 3)
    rows = {tuple(row.tolist()) for row in first.tokens}
    checked = 0
    for lod in sides:
        index = (first.lod.flatten() == lod).nonzero()[:, 0]
        if len(index):
            side = config.sides[lod]
            made = TorchLodEngine(engine._qwen, side, config.buckets, 1)
            tiles = made.encode(image.tile_pixels(frame, side * 32, index, 32))
            wanted = tiles.tokens.flatten(0, 1)
            near = torch.cdist(wanted, first.tokens).min(1).values
            assert (near < 1e-3 * wanted.norm(dim=1)).all(), lod
            checked += 1
    assert checked >= 2
    assert len(rows) > 16
    described = engine.describe()
    assert (described["halo"], described["overview_stride"]) == (1, "auto")


# Streams, questions, threads and engines leave no trace.


def scores_both_ways(qwen, photo):
    config, device = load("demo").updated({"halo": 0}), qwen.device
    frame = image.frame(image.decode(photo, 10**8), config, qwen.vision.token_px, device)
    maps, query = texture.extract(frame, config), qwen.query(QUESTIONS[0])
    features = JointGlimpse(qwen).encode(frame)
    where = sequence.glimpse_positions(frame.grid, config.sides[0], config.sides[3])
    extent = sequence.extent(frame.grid, config.sides[3])

    def judges():
        looking = GlimpseScorer(qwen, features, where, extent, frame.grid, config)
        return [partial(j, maps, query) for j in (scorers.propositional, scorers.perspectival, looking)]

    return streams.parallel(judges(), device), [task() for task in judges()]


def test_scores_side_by_side_equal_scores_in_sequence(engine, photo):
    for have, want in zip(*scores_both_ways(engine._qwen, photo), strict=True):
        assert torch.equal(have, want)


@pytest.mark.gpu
def test_scores_on_streams_equal_scores_in_sequence_on_cuda(tiny_checkpoint, photo):
    qwen = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda")._qwen
    for _ in range(5):
        for have, want in zip(*scores_both_ways(qwen, photo), strict=True):
            assert torch.equal(have, want)


@pytest.mark.gpu
def test_an_engine_on_streams_equals_one_in_sequence_on_cuda(tiny_checkpoint, photo, monkeypatch):
    def run():
        engine = Engine.from_pretrained(
            tiny_checkpoint, preset="demo", device="cuda", dtype="float32", halo=0
        )
        return [engine.ask(photo, question, budget=0.4, max_new_tokens=8) for question in QUESTIONS]

    side_by_side = run()
    monkeypatch.setattr(streams, "parallel", lambda tasks, device: [task() for task in tasks])
    for have, want in zip(side_by_side, run(), strict=True):
        assert have.text == want.text
        for name in ("propositional", "perspectival", "participatory"):
            assert torch.equal(getattr(have.encoding.scores, name), getattr(want.encoding.scores, name))
        assert torch.equal(have.encoding.tokens, want.encoding.tokens)


def outcome(engine, photo, question):
    answer = engine.ask(photo, question, budget=0.4, max_new_tokens=8)
    return answer.text, answer.encoding.tokens, answer.encoding.positions, answer.encoding.relevance


def assert_same(have, want):
    assert have[0] == want[0]
    for a, b in zip(have[1:], want[1:], strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def fresh(tiny_checkpoint, photo):
    """Outcome of each question on an engine of its own."""
    return [outcome(make_engine(tiny_checkpoint), photo, question) for question in QUESTIONS]


def test_two_questions_on_one_engine_equal_two_fresh_engines(tiny_checkpoint, photo, fresh):
    engine = make_engine(tiny_checkpoint)
    for question, want in zip(QUESTIONS, fresh, strict=True):
        assert_same(outcome(engine, photo, question), want)
    assert not torch.equal(fresh[0][3], fresh[1][3]), "different questions, different relevance"


@pytest.mark.parametrize("shared", [True, False], ids=["one engine", "two engines"])
def test_threads_do_not_disturb_one_another(shared, tiny_checkpoint, photo, fresh):
    one = make_engine(tiny_checkpoint)
    engines = [one, one if shared else make_engine(tiny_checkpoint)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            runs = [pool.submit(outcome, e, photo, q) for e, q in zip(engines, QUESTIONS, strict=True)]
            for run, want in zip(runs, fresh, strict=True):
                assert_same(run.result(), want)


@pytest.mark.parametrize("layout", ["refine", "crops"])
def test_a_reused_prefix_equals_a_run_from_scratch(layout, tiny_checkpoint, photo, monkeypatch):
    engine = make_engine(tiny_checkpoint, layout=layout)
    original, seen = engine._decoder.prefill, []

    def from_scratch(prompt, prefix=None):
        assert prefix is not None
        seen.append(original(prompt).logits)
        return original(prompt)

    def reusing(prompt, prefix=None):
        assert prefix is not None
        state = original(prompt, prefix)
        seen.append(state.logits)
        return state

    texts = []
    for prefill in (from_scratch, reusing):
        monkeypatch.setattr(engine._decoder, "prefill", prefill)
        texts.append(engine.ask(photo, QUESTIONS[0], budget=0.4, max_new_tokens=12).text)
    assert parity.relative_error(seen[1], seen[0]) < parity.TOLERANCE
    assert texts[0] == texts[1] != ""


def test_tiles_glimpse_equals_background_tiles(tiny_checkpoint, photo):
    """A glimpse made tile by tile holds each background tile as its engine encodes it."""
    config = build(load("demo").model_dump() | {"glimpse": "tiles", "halo": 0})
    engine = make_engine(tiny_checkpoint, glimpse="tiles")
    encoding = engine.encode(photo, QUESTIONS[0], budget=0.2)
    frame = image.frame(image.decode(photo, 10**8), config, 32, CPU)
    background = TorchLodEngine(engine._qwen, 1, (16,))
    tiles: Features = background.encode(image.tile_pixels(frame, 32, torch.arange(16)))
    assert parity.relative_error(encoding.tokens[:16], tiles.tokens[:, 0]) < parity.TOLERANCE
