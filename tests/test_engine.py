"""The engine as its callers meet it, on the tiny checkpoint."""

import base64
import dataclasses
import gc
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from arrcoc import prompting
from arrcoc.chat import single
from arrcoc.encoding import Encoding
from arrcoc.engine import Engine
from arrcoc.errors import BudgetError, EncodingError, EngineMismatchError
from arrcoc.records import Layout
from arrcoc.scorers import TEXTURE_HEAD_FILE, TextureHead
from arrcoc.timing import TOTAL

QUESTION, OTHER = "What does the sign say?", "Which colour is the bus?"
STAGES = [
    *("decode", "query", "frame", "texture", "glimpse", "score", "balance", "allocate", "encode", "assemble"),
]


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path) -> Callable[..., Engine]:
    def build(preset: str = "demo", **overrides: Any) -> Engine:
        return Engine.from_pretrained(tiny_checkpoint, preset, "cpu", **overrides)

    return build


@pytest.fixture(scope="module")
def engine(make: Callable[..., Engine]) -> Engine:
    """Shared by tests that do not count cache hits."""
    return make(max_new_tokens=6)


@pytest.fixture(scope="module")
def picture(photo: Image.Image) -> Image.Image:
    """384 x 384 pixels: 3 x 3 tiles of preset demo."""
    return photo.resize((384, 384))


def pixels(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(one: Encoding, other: Encoding) -> None:
    for name in ("tokens", "deepstack", "positions", "lod", "relevance"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.segments, one.tensions, one.budget) == (other.segments, other.tensions, other.budget)


# Encoding.


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("preset", ["demo", "photo", "gigapixel"])
def test_every_layout_with_every_preset(make: Callable[..., Engine], preset: str, layout: Layout) -> None:
    engine = make(preset, layout=layout, max_tiles=3, max_new_tokens=2)
    answer = engine.ask(pixels(90, 200), QUESTION, budget=0.5)
    made = answer.encoding
    assert made is not None
    assert made.layout is layout
    assert made.n_tokens <= made.budget == made.full_tokens // 2
    assert len(made.segments) == (1 + int((made.lod > 0).sum()) if layout is Layout.CROPS else 1)
    assert answer.prompt_tokens > made.n_tokens
    assert answer.new_tokens <= 2


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (128, 128), (1, 200), (400, 2), (40, 900)])
def test_images_of_extreme_shape(engine: Engine, size: tuple[int, int]) -> None:
    made = engine.encode(pixels(*size), QUESTION, budget=1.0)
    assert made.source_size == size
    assert made.n_tokens == made.full_tokens
    assert bool(made.tokens.isfinite().all())


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((1024, 1024), (1, 2, 3, 4)),  # 1024**2 pixels are the last of demo
        ((1025, 1024), (2, 4, 6, 8)),
    ],
)
def test_auto_chooses_by_size(
    make: Callable[..., Engine], size: tuple[int, int], sides: tuple[int, ...]
) -> None:
    engine = make("auto", max_tiles=4)
    assert engine.encode(pixels(*size), QUESTION).sides == sides
    assert engine.describe()["sides"]["gigapixel"] == [4, 8, 14, 20]


def test_two_questions_see_two_things_and_the_second_hits_the_cache(
    make: Callable[..., Engine], picture: Image.Image
) -> None:
    engine = make()
    one = engine.encode(picture, QUESTION, budget=0.5)
    misses = engine.cache_stats().misses
    assert engine.cache_stats().hits == 0
    other = engine.encode(picture, OTHER, budget=0.5)
    assert engine.cache_stats().hits > 0
    assert not torch.equal(one.relevance, other.relevance)
    assert_same(engine.encode(picture, QUESTION, budget=0.5), one)
    assert engine.cache_stats().misses <= 2 * misses


@pytest.mark.parametrize("cached", [{"cache_bytes": 0}, {"cache_location": "host"}, {"cache_bytes": 10_000}])
@pytest.mark.parametrize("glimpse", ["joint", "tiles"])
def test_the_cache_changes_nothing(
    make: Callable[..., Engine], picture: Image.Image, cached: dict[str, Any], glimpse: str
) -> None:
    plain, other = make(glimpse=glimpse), make(glimpse=glimpse, **cached)
    for _ in range(2):
        assert_same(plain.encode(picture, QUESTION), other.encode(picture, QUESTION))
    stats = other.cache_stats()
    assert stats.bytes <= stats.max_bytes
    assert (stats.hits > 0) == (stats.max_bytes > 0)
    assert (stats.evictions > 0) == (stats.max_bytes == 10_000)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_glimpse_of_tiles_works_in_every_layout(
    make: Callable[..., Engine], picture: Image.Image, layout: Layout
) -> None:
    engine = make(glimpse="tiles", layout=layout, prefix_bytes=0)
    first = engine.encode(picture, QUESTION, budget=0.4)
    again = engine.encode(picture, QUESTION, budget=0.4)
    assert_same(first, again)
    assert engine.cache_stats().hits_by_lod[0] == 9  # all background tiles, the second time
    joint = make(layout=layout).encode(picture, QUESTION, budget=0.4)
    # A tile encoded alone does not see its neighbours.
    assert not torch.equal(joint.scores.participatory, first.scores.participatory)


def test_eviction_by_relevance_empties_the_cache(make: Callable[..., Engine], picture: Image.Image) -> None:
    engine = make()
    engine.encode(picture, QUESTION)
    held = engine.cache_stats().entries
    assert held > 0
    assert engine.evict_low_relevance(0.0) == 0
    assert engine.evict_low_relevance(1e9) == held
    assert engine.cache_stats().entries == 0
    assert engine.cache_stats().evictions == held


def test_threshold_mode_follows_the_cut_points(make: Callable[..., Engine], picture: Image.Image) -> None:
    made = make(mode="threshold", budget=1.0, layout="replace").encode(picture, QUESTION)
    assert torch.equal(made.lod, torch.bucketize(made.relevance, torch.tensor([0.25, 0.5, 0.75]), right=True))


def test_full_budget_is_all_high_and_still_explains_itself(engine: Engine, picture: Image.Image) -> None:
    made = engine.encode(picture, QUESTION, budget=144)  # 9 tiles * 4**2
    assert made.lod_counts["high"] == 9
    assert made.n_tokens == made.full_tokens == 144
    assert made.relevance.std() > 0


def test_gradients_and_inference_mode_change_nothing(engine: Engine, picture: Image.Image) -> None:
    plain = engine.ask(picture, QUESTION)
    with torch.inference_mode():
        inside = engine.ask(picture, QUESTION)
    with torch.enable_grad():
        recorded = engine.ask(picture, QUESTION)
    assert plain.text == inside.text == recorded.text
    assert recorded.encoding is not None
    assert not recorded.encoding.tokens.requires_grad


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16_on_the_cpu(
    make: Callable[..., Engine], picture: Image.Image, tmp_path: Path, dtype: Any
) -> None:
    engine = make(dtype=dtype, max_new_tokens=2)
    made = engine.encode(picture, QUESTION)
    assert made.tokens.dtype == made.deepstack.dtype == torch.bfloat16
    assert made.positions.dtype == torch.float32
    made.save(tmp_path / "e.safetensors")
    again = Encoding.load(tmp_path / "e.safetensors")
    assert_same(again, made)
    assert engine.ask(again, QUESTION).text == engine.ask(picture, QUESTION).text


def test_plot_writes_a_picture(engine: Engine, picture: Image.Image, tmp_path: Path) -> None:
    engine.encode(picture, QUESTION).plot(tmp_path / "look.png")
    with Image.open(tmp_path / "look.png") as drawn:
        assert drawn.width > 200


# Timings.


def test_timings_name_the_stages_and_add_up(engine: Engine, picture: Image.Image) -> None:
    answer = engine.ask(picture, QUESTION)
    assert answer.encoding is not None
    for timings, stages in (
        (answer.encoding.timings, STAGES),
        (answer.timings, [*STAGES, "prefill", "generate"]),
    ):
        assert list(timings) == [*stages, TOTAL]
        assert min(timings.values()) >= 0
        # rounding of sums of differences of a clock in seconds
        assert sum(timings.values()) - timings[TOTAL] <= timings[TOTAL] + 1e-6
    assert answer.encoding.timings[TOTAL] < answer.timings[TOTAL]
    assert list(engine.encode(picture, QUESTION).timings) == [*STAGES, TOTAL]


def test_images_of_one_chat_have_times_of_their_own(engine: Engine) -> None:
    answer = engine.chat([user(pixels(128, 128), pixels(512, 512, 1), QUESTION)])
    first, second = (made.timings for made in answer.encodings)
    assert list(first) == [*STAGES, TOTAL]
    assert list(second) == [*(name for name in STAGES if name != "query"), TOTAL]
    assert first["frame"] + second["frame"] == pytest.approx(answer.timings["frame"])
    assert first[TOTAL] + second[TOTAL] < answer.timings[TOTAL]


def test_no_request_pays_for_engines_or_the_fingerprint(
    make: Callable[..., Engine], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make("auto", max_new_tokens=1)
    for name in ("arrcoc.qwen._checksum", "arrcoc.lod.torch_engine.geometry"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("left for the first request"))
    assert engine.ask(picture, QUESTION).new_tokens == 1


# Answers.


def user(*parts: Any) -> dict[str, Any]:
    kinds = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
    ]
    return {"role": "user", "content": kinds}


def test_streamed_pieces_joined_are_the_answer(engine: Engine, picture: Image.Image) -> None:
    stream = engine.stream(picture, QUESTION, budget=0.3)
    assert stream.answer is None
    text = "".join(stream)
    assert stream.answer is not None
    assert stream.answer.text == text == engine.ask(picture, QUESTION, budget=0.3).text
    assert stream.answer.new_tokens == 6
    assert stream.answer.finish == "length"


def test_a_stream_stopped_early_harms_nobody(engine: Engine, picture: Image.Image) -> None:
    expected = engine.ask(picture, QUESTION).text
    stream = engine.stream(picture, QUESTION)
    next(stream)
    assert engine.ask(picture, QUESTION).text == expected
    assert stream.answer is None
    del stream
    gc.collect()
    assert engine.ask(picture, QUESTION).text == expected


def test_two_streams_taken_in_turns_do_not_mix(engine: Engine, picture: Image.Image) -> None:
    expected = [engine.ask(picture, question).text for question in (QUESTION, OTHER)]
    streams = [engine.stream(picture, question) for question in (QUESTION, OTHER)]
    told = ["", ""]
    for _ in range(7):
        for number, stream in enumerate(streams):
            told[number] += next(stream, "")
    assert told == expected


def test_sampling_is_reproducible_by_seed(engine: Engine, picture: Image.Image) -> None:
    def draw(seed: int) -> str:
        return engine.ask(picture, QUESTION, temperature=5.0, seed=seed, top_k=50, top_p=0.99).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("layout", list(Layout))
def test_an_encoding_answers_as_its_image(
    make: Callable[..., Engine], picture: Image.Image, tmp_path: Path, layout: Layout
) -> None:
    engine = make(layout=layout, max_new_tokens=6)
    answer = engine.ask(picture, QUESTION, budget=0.4)
    made = engine.encode(picture, QUESTION, budget=0.4)
    made.save(tmp_path / "e.safetensors")
    for given in (made, Encoding.load(tmp_path / "e.safetensors")):
        again = engine.ask(given, QUESTION)
        assert again.text == answer.text
        assert again.prompt_tokens == answer.prompt_tokens
        assert again.encoding is not None
        assert again.encoding.timings == made.timings, "those of making it"
        assert list(again.timings) == ["prefill", "generate", TOTAL]
    assert engine.ask(made, QUESTION, budget=0.4).text == answer.text
    with pytest.raises(BudgetError, match="an encoding of"):
        engine.ask(made, QUESTION, budget=made.n_tokens - 1)


@pytest.mark.parametrize("budget", [0.4, 1.0])
@pytest.mark.parametrize("layout", list(Layout))
def test_the_scorers_prefix_changes_no_logits(
    make: Callable[..., Engine],
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    budget: float,
) -> None:
    engine = make(layout=layout, max_new_tokens=1)
    prefixes, logits = [], []
    prefill = engine._decoder.prefill

    def spy(prompt: Any, prefix: Any = None) -> Any:
        state = prefill(prompt, prefix)
        prefixes.append(prefix is not None)
        logits.append(state.logits)
        return state

    monkeypatch.setattr(engine._decoder, "prefill", spy)
    engine.ask(picture, QUESTION, budget)
    engine.ask(engine.encode(picture, QUESTION, budget), QUESTION)
    keeps_glimpse = layout is not Layout.REPLACE and budget < 1
    assert prefixes == [keeps_glimpse, False]
    # Prefilling in two parts agrees to 2e-7 of unit-scale logits on the stock model.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_an_encoding_of_other_weights_or_precision_is_refused(
    engine: Engine, make: Callable[..., Engine], picture: Image.Image
) -> None:
    foreign = make(dtype="bfloat16").encode(picture, QUESTION)
    for given in (foreign, dataclasses.replace(engine.encode(picture, QUESTION), fingerprint="0" * 32)):
        with pytest.raises(EngineMismatchError, match="Encode the image again"):
            engine.ask(given, QUESTION)
    with pytest.raises(EncodingError):
        Encoding.load("nowhere.safetensors")


# Chats.


def test_a_chat_of_one_turn_is_ask(engine: Engine, picture: Image.Image) -> None:
    assert engine.chat([user(picture, QUESTION)], budget=0.3).text == engine.ask(picture, QUESTION, 0.3).text


def test_images_from_everywhere(engine: Engine, picture: Image.Image, tmp_path: Path) -> None:
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(raw.getvalue())
    array = np.asarray(picture)
    expected = engine.encode(picture, QUESTION)
    for source in (
        str(path),
        path,
        path.as_uri(),
        "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode(),
        raw.getvalue(),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ):
        assert_same(engine.chat([user_image(source)]).encodings[0], expected)


def user_image(source: Any) -> dict[str, Any]:
    image = {"type": "image", "image": source}
    return {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}


def test_text_only_chat(engine: Engine) -> None:
    answer = engine.chat([user(QUESTION)])
    assert answer.encodings == ()
    assert answer.encoding is None
    assert list(answer.timings) == ["prefill", "generate", TOTAL]
    assert answer.new_tokens == 6


def test_system_message_and_history_reach_the_model(engine: Engine, picture: Image.Image) -> None:
    turns = [user(picture, OTHER), {"role": "assistant", "content": "Red."}, user(QUESTION)]
    plain = engine.chat(turns)
    # A tiny untrained model may say the same by chance: one of several messages must change its answer.
    systems = ("Answer in rhymes.", "Reply with a number.", "Be brief.", "Zebra zebra zebra!", "?")
    answers = [engine.chat([{"role": "system", "content": system}, *turns]) for system in systems]
    told = answers[0]
    assert told.prompt_tokens > plain.prompt_tokens > engine.ask(picture, QUESTION).prompt_tokens
    assert any(answer.text != plain.text for answer in answers)
    assert plain.encodings[0].question == QUESTION
    assert_same(told.encodings[0], plain.encodings[0])


def test_tokens_are_divided_among_images_of_different_presets(make: Callable[..., Engine]) -> None:
    engine = make("auto", max_new_tokens=1, max_tiles=6)
    images = [pixels(256, 384), pixels(1030, 1030), pixels(50, 50)]
    for budget in (60, 200):
        made = engine.chat([user(*images, QUESTION)], budget=budget).encodings
        assert [e.sides[3] for e in made] == [4, 8, 4]
        assert sum(e.n_tokens for e in made) <= sum(e.budget for e in made) <= budget
    # A share is of each image; a configured number of tokens is divided like a requested one.
    assert all(
        e.n_tokens <= 0.5 * e.full_tokens for e in engine.chat([user(*images, QUESTION)], 0.5).encodings
    )
    configured = make("auto", max_new_tokens=1, max_tiles=6, budget=60)
    assert sum(e.n_tokens for e in configured.chat([user(*images, QUESTION)]).encodings) <= 60


def test_numpy_integers_are_tokens_too(engine: Engine) -> None:
    images = [pixels(256, 256), pixels(256, 256, 1)]
    made = engine.chat([user(*images, QUESTION)], budget=np.int64(40)).encodings  # type: ignore[arg-type]
    assert sum(e.n_tokens for e in made) <= 40


def test_an_encoding_beside_an_image_keeps_its_tokens(engine: Engine, picture: Image.Image) -> None:
    made = engine.encode(picture, QUESTION, budget=30)
    answer = engine.chat([user(made, pixels(256, 256), QUESTION)], budget=made.n_tokens + 20)
    assert_same(answer.encodings[0], made)
    assert answer.encodings[1].n_tokens <= 20


# The texture head.


@pytest.fixture
def with_head(tiny_checkpoint: Path, engine: Engine, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    torch.manual_seed(3)
    TextureHead(64).save(folder / TEXTURE_HEAD_FILE, "fitted here", engine._qwen.embedding_probe)
    return folder


def test_a_head_beside_the_model_is_used_unless_refused(
    with_head: Path, engine: Engine, picture: Image.Image
) -> None:
    by_glimpse = engine.encode(picture, QUESTION)
    for choice, name in (("auto", "texture"), ("texture", "texture"), ("glimpse", "glimpse")):
        other = Engine.from_pretrained(with_head, "demo", "cpu", participatory=choice, max_new_tokens=2)
        assert other.describe()["scorers"]["participatory"] == name
        made = other.encode(picture, QUESTION)
        assert torch.equal(made.scores.participatory, by_glimpse.scores.participatory) == (name == "glimpse")
        assert torch.equal(made.relevance, by_glimpse.relevance) == (name == "glimpse")
        assert other.ask(picture, QUESTION).new_tokens == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_head_serves_its_model_in_every_precision(with_head: Path, dtype: str) -> None:
    engine = Engine.from_pretrained(with_head, "demo", "cpu", dtype)
    assert engine.describe()["scorers"]["participatory"] == "texture"


@pytest.mark.parametrize("probe", ["of another model", "of another size", "left out"])
def test_a_head_fitted_to_another_model_is_refused(with_head: Path, engine: Engine, probe: str) -> None:
    mine = engine._qwen.embedding_probe
    other = {"of another model": mine.flip(0), "of another size": mine[:8], "left out": None}[probe]
    TextureHead(64).save(with_head / TEXTURE_HEAD_FILE, "fitted elsewhere", other)
    with pytest.raises(EngineMismatchError, match="fitted to other embeddings"):
        Engine.from_pretrained(with_head, "demo", "cpu")
    Engine.from_pretrained(with_head, "demo", "cpu", participatory="glimpse")


# What the engine says of itself.


def test_describe_is_json_and_true(make: Callable[..., Engine], picture: Image.Image) -> None:
    engine = make("auto", layout="crops", cache_bytes=1000, max_tiles=9)
    told = engine.describe()
    assert json.loads(json.dumps(told)) == told
    assert list(told["lod_engines"]) == ["1", "2", "3", "4", "6", "8", "14", "20"]
    assert set(told["lod_engines"].values()) == {"torch eager float32"}
    assert told["preset"] == "auto"
    assert list(told["sides"]) == ["demo", "photo", "gigapixel"]
    assert (told["layout"], told["dtype"], told["device"].split()[0]) == ("crops", "float32", "cpu")
    assert told["scorers"] == {"participatory": "glimpse", "parallel": "in sequence"}
    assert told["notes"] == []
    assert told["model"]["parameters"] == sum(p.numel() for p in engine._qwen.model.parameters())
    assert told["cache"]["misses"] == 0
    engine.encode(picture, QUESTION)
    after = engine.describe()
    assert json.loads(json.dumps(after)) == after
    assert after["cache"]["misses"] == sum(after["cache"]["misses_by_lod"].values()) > 0
    assert set(after["cache"]["misses_by_lod"]) <= {"low", "medium", "high"}


def test_the_bundled_checkpoint_is_noted(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("arrcoc.engine.bundled_checkpoint", lambda: (tiny_checkpoint, "It is untrained."))
    engine = Engine.from_pretrained()
    assert engine.describe()["notes"] == ["It is untrained."]
    assert "It is untrained." in caplog.text


# Threads.


def test_two_threads_share_an_engine(engine: Engine, picture: Image.Image) -> None:
    asked = [(picture, QUESTION), (pixels(200, 300), OTHER)] * 2
    expected = [engine.ask(*request).text for request in asked]
    told: dict[int, str] = {}

    def run(number: int) -> None:
        for _ in range(3):
            told[number] = engine.ask(*asked[number]).text

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [told[number] for number in range(len(asked))] == expected


def test_crops_stand_between_their_captions(make: Callable[..., Engine], picture: Image.Image) -> None:
    engine = make(layout="crops")
    made = engine.encode(picture, QUESTION, budget=0.5)
    prompt, head = prompting.build(engine._qwen, single(picture, QUESTION).messages, [made])
    special, first = engine._qwen.special, made.segments[1]
    caption = engine._qwen.tokenize("\n" + first.caption)
    expected = engine._qwen.embed([special.vision_end, *caption, special.vision_start])
    begin = len(head) + made.segments[0].stop
    assert head[-1] == special.vision_start
    assert torch.equal(prompt.embeds[0, begin : begin + len(expected)], expected)
    assert torch.equal(prompt.embeds[0, begin + len(expected)], made.tokens[first.start])
    assert int(prompt.vision.sum()) == made.n_tokens
