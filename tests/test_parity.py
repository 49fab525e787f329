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

CPU = torch.device("cpu")
QUESTIONS = ("What is on her sleeve?", "Which colour is the rocket?")


def make_engine(folder, preset="demo", **overrides) -> Engine:
    return Engine.from_pretrained(folder, preset=preset, device="cpu", **overrides)


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
def test_a_tile_in_any_batch_of_one_bucket_is_bit_equal(side, engine, photo):
    encoder = TorchLodEngine(engine._qwen, side, (4,))
    pixels = tiles_of(photo, 4, side * 32)
    together, turned = encoder.encode(pixels), encoder.encode(pixels.flip(0))
    for i in range(4):
        alone = encoder.encode(pixels[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.deepstack[:, 0], together.deepstack[:, i])
        assert torch.equal(alone.tokens[0], turned.tokens[3 - i])


def test_a_tile_across_buckets_is_within_the_tolerance(engine, photo):
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


# Streams, questions, threads and engines leave no trace.


def scores_both_ways(qwen, photo):
    config, device = load("demo"), qwen.device
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
        engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda", dtype="float32")
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
    config = build(load("demo").model_dump() | {"glimpse": "tiles"})
    engine = make_engine(tiny_checkpoint, glimpse="tiles")
    encoding = engine.encode(photo, QUESTIONS[0], budget=0.2)
    frame = image.frame(image.decode(photo, 10**8), config, 32, CPU)
    background = TorchLodEngine(engine._qwen, 1, (16,))
    tiles: Features = background.encode(image.tile_pixels(frame, 32, torch.arange(16)))
    assert parity.relative_error(encoding.tokens[:16], tiles.tokens[:, 0]) < parity.TOLERANCE
