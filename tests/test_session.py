"""Sessions: every answer is that of a fresh run, and what questions have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrcoc import Engine
from arrcoc.demo.placards import sample
from arrcoc.encoding import Encoding
from arrcoc.errors import BudgetError, DecodeError, ImageError, QueryError
from arrcoc.glimpse import JointGlimpse
from arrcoc.qwen import QwenVL
from arrcoc.scorers import TextureHead
from arrcoc.session import Turn

QUESTIONS = ("What is on her sleeve?", "Which colour is the rocket?", "Is she smiling?")


def make(folder: Path, head: bool = False, **overrides: Any) -> Engine:
    """An engine on the untrained checkpoint; with a texture head of fixed random weights if wanted."""
    engine = Engine.from_pretrained(folder, "demo", "cpu", **({"max_new_tokens": 5} | overrides))
    if head:
        torch.manual_seed(3)
        weights = TextureHead(engine._qwen.width)
        engine._head = engine._viewer._head = weights
        engine._viewer._pipelines = {c: engine._viewer._make_pipeline(c) for c in engine._viewer._pipelines}
    return engine


@pytest.fixture(scope="module")
def picture(photo: Image.Image) -> Image.Image:
    """384 x 384 pixels: 3 x 3 tiles of preset demo, a glimpse of 9 tokens, 144 in full."""
    return photo.resize((384, 384))


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return make(tiny_checkpoint)


def assert_same(one: Encoding | None, other: Encoding | None) -> None:
    assert one is not None
    assert other is not None
    for name in ("tokens", "deepstack", "positions", "lod", "relevance", "picture"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("propositional", "perspectival", "participatory"):
        assert torch.equal(getattr(one.scores, name), getattr(other.scores, name)), name
    assert (one.segments, one.tensions, one.budget) == (other.segments, other.tensions, other.budget)


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[torch.Tensor]]:
    """First logits of every answer of an engine, in order."""

    def watch(engine: Engine) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        prefill = engine._decoder.prefill

        def spy(prompt: Any, prefix: Any = None) -> Any:
            state = prefill(prompt, prefix)
            seen.append(state.logits)
            return state

        monkeypatch.setattr(engine._decoder, "prefill", spy)
        return seen

    return watch


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Whole images encoded, and rows run through decoder layers, counted."""
    counts = {"overviews": 0, "rows": 0}
    encode, run = JointGlimpse.encode_pixels, QwenVL.run_layers

    def encode_pixels(self: JointGlimpse, pixels: torch.Tensor) -> Any:
        counts["overviews"] += 1
        return encode(self, pixels)

    def run_layers(
        self: QwenVL, hidden: torch.Tensor, positions: Any, cache: Any, layers: range, **more: Any
    ) -> Any:
        counts["rows"] += hidden.shape[1] * len(layers)
        return run(self, hidden, positions, cache, layers, **more)

    monkeypatch.setattr(JointGlimpse, "encode_pixels", encode_pixels)
    monkeypatch.setattr(QwenVL, "run_layers", run_layers)
    return counts


# Equal to a fresh run.


@pytest.mark.parametrize("budget", [0.05, 0.4, 1.0])  # overview at stride 3, the glimpse, none
@pytest.mark.parametrize("layout", ["refine", "crops", "replace"])
@pytest.mark.parametrize("head", [False, True], ids=["glimpse", "texture"])
def test_every_answer_is_that_of_a_fresh_engine(
    tiny_checkpoint: Path,
    picture: Image.Image,
    logits: Callable[[Engine], list[torch.Tensor]],
    head: bool,
    layout: str,
    budget: float,
) -> None:
    if layout == "replace" and budget == 0.05:
        budget = 0.1  # every tile takes a token: 9 of 144
    engine = make(tiny_checkpoint, head, layout=layout)
    ours = logits(engine)
    with engine.open(picture, budget) as session:
        answers = [session.ask(question) for question in QUESTIONS[:2]]
    fresh = make(tiny_checkpoint, head, layout=layout, cache_bytes=0, prefix_bytes=0)
    wanted = logits(fresh)
    for question, answer, seen in zip(QUESTIONS[:2], answers, ours, strict=True):
        expected = fresh.ask(picture, question, budget)
        assert answer.text == expected.text
        assert (answer.prompt_tokens, answer.new_tokens) == (expected.prompt_tokens, expected.new_tokens)
        assert_same(answer.encoding, expected.encoding)
        # A prompt run in two parts, where the fresh engine runs it at once: last bits of fp32 sums.
        torch.testing.assert_close(seen, wanted[-1], rtol=1e-4, atol=1e-4)


def test_with_the_glimpse_scorer_a_session_is_bit_equal_to_a_fresh_engine(
    tiny_checkpoint: Path, picture: Image.Image, logits: Callable[[Engine], list[torch.Tensor]]
) -> None:
    engine, fresh = make(tiny_checkpoint), make(tiny_checkpoint)
    ours, wanted = logits(engine), logits(fresh)
    with engine.open(picture, 0.4) as session:
        session.ask(QUESTIONS[0])
        session.ask(QUESTIONS[1])
    fresh.ask(picture, QUESTIONS[1], 0.4)
    assert torch.equal(ours[1], wanted[0])


@pytest.fixture(scope="module")
def readers() -> dict[str, Engine]:
    """Engines on the bundled checkpoint, with prefixes as they are computed, in float8, and without."""
    more = {"shared": {}, "float8": {"prefix_dtype": "float8"}, "alone": {"prefix_bytes": 0}}
    return {
        name: Engine.from_pretrained(None, "demo", "cpu", max_new_tokens=12, **overrides)
        for name, overrides in more.items()
    }


@pytest.mark.parametrize("way", ["shared", "float8"])
@pytest.mark.parametrize("index", range(3))
def test_the_bundled_checkpoint_says_the_same(readers: dict[str, Engine], way: str, index: int) -> None:
    """Texture head: a session runs the overview apart, a single question runs the prompt at once."""
    drawn = sample(2026, index, "test", 512, ["read"])
    with readers[way].open(drawn.image, 0.25) as session:
        answer = session.ask(drawn.question)
    expected = readers["alone"].ask(drawn.image, drawn.question, 0.25)
    assert answer.text == expected.text
    assert_same(answer.encoding, expected.encoding)


def test_an_image_asked_again_without_a_session(
    tiny_checkpoint: Path, picture: Image.Image, work: dict[str, int]
) -> None:
    engine = make(tiny_checkpoint)
    engine.ask(picture, QUESTIONS[0], 0.4)
    assert work["overviews"] == 1
    again = engine.ask(picture.copy(), QUESTIONS[1], 0.4)
    assert work["overviews"] == 1, "the same pixels"
    assert engine.prefix_stats().hits == 1
    expected = make(tiny_checkpoint).ask(picture, QUESTIONS[1], 0.4)
    assert again.text == expected.text
    assert_same(again.encoding, expected.encoding)
    engine.ask(picture.rotate(90), QUESTIONS[1], 0.4)
    assert engine.prefix_stats().hits == 1, "other pixels"
    assert len(engine._prefixes) == 2


def test_a_budget_of_its_own_for_one_question(engine: Engine, picture: Image.Image) -> None:
    with engine.open(picture, 0.4) as session:
        made = session.ask(QUESTIONS[0], 0.05).encoding
        assert made is not None
        assert made.overview_stride == 3
        assert_same(made, engine.encode(picture, QUESTIONS[0], 0.05))
        assert_same(session.encode(QUESTIONS[0]), engine.encode(picture, QUESTIONS[0], 0.4))


# Computed once.


@pytest.mark.parametrize("head", [False, True], ids=["glimpse", "texture"])
@pytest.mark.parametrize(("budget", "overviews"), [(0.4, 1), (0.05, 2)])
def test_the_image_is_seen_once(
    tiny_checkpoint: Path,
    picture: Image.Image,
    work: dict[str, int],
    head: bool,
    budget: float,
    overviews: int,
) -> None:
    engine = make(tiny_checkpoint, head, max_new_tokens=1)
    with engine.open(picture, budget) as session:
        # At stride 2 the glimpse scorer still looks at the glimpse.
        assert work["overviews"] == (1 if head else overviews)
        session.ask(QUESTIONS[0])
        before = work.copy()
        answer = session.ask(QUESTIONS[1])
    assert work["overviews"] == before["overviews"]
    made = answer.encoding
    assert made is not None
    before_image = len(engine._viewer._pipelines[engine._presets.base]._overviews.head)
    suffix = answer.prompt_tokens - before_image - made.overview_tokens
    tail = len(engine._qwen.render(_turn(QUESTIONS[1]))[1])
    scorer = 0 if head else 2 * tail  # layers 0 and 1; the last probe, in layer 2, is of its input
    assert work["rows"] - before["rows"] == engine._qwen.n_layers * suffix + scorer


def _turn(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def test_tiles_come_from_the_cache(tiny_checkpoint: Path, picture: Image.Image) -> None:
    engine = make(tiny_checkpoint)
    with engine.open(picture, 0.5) as session:
        session.ask(QUESTIONS[0])
        misses = engine.cache_stats().misses
        session.ask(QUESTIONS[0])
    assert engine.cache_stats().misses == misses
    assert engine.cache_stats().hits > 0


def test_two_sessions_on_the_same_content_share_it(
    tiny_checkpoint: Path, picture: Image.Image, work: dict[str, int]
) -> None:
    engine = make(tiny_checkpoint)
    with engine.open(picture, 0.4) as one, engine.open(np.asarray(picture), 0.4) as other:
        assert work["overviews"] == 1
        assert len(engine._prefixes) == 1
        assert one.ask(QUESTIONS[0]).text == other.ask(QUESTIONS[0]).text
    assert engine.describe()["prefixes"]["hits"] >= 3


# Conversations.


@pytest.mark.parametrize("head", [False, True], ids=["glimpse", "texture"])
def test_a_turn_is_the_chat_of_all_turns_so_far(
    tiny_checkpoint: Path,
    picture: Image.Image,
    logits: Callable[[Engine], list[torch.Tensor]],
    head: bool,
) -> None:
    engine, fresh = make(tiny_checkpoint, head), make(tiny_checkpoint, head, prefix_bytes=0)
    ours, wanted = logits(engine), logits(fresh)
    messages: list[dict[str, Any]] = []
    with engine.open(picture, 0.4, conversation=True) as session:
        for number, question in enumerate(QUESTIONS):
            image = [] if number else [{"type": "image", "image": picture}]
            messages += [{"role": "user", "content": [*image, {"type": "text", "text": question}]}]
            answer, expected = session.ask(question), fresh.chat(messages, 0.4)
            assert answer.text == expected.text
            assert answer.prompt_tokens == expected.prompt_tokens
            assert_same(answer.encoding, expected.encoding)
            torch.testing.assert_close(ours[-1], wanted[-1], rtol=1e-4, atol=1e-4)
            messages += [{"role": "assistant", "content": expected.text}]
        assert session.turns == tuple(
            Turn(q, m["content"]) for q, m in zip(QUESTIONS, messages[1::2], strict=True)
        )
        session.forget()
        assert session.turns == ()
        assert session.ask(QUESTIONS[1]).text == fresh.ask(picture, QUESTIONS[1], 0.4).text


def test_a_dropped_stream_is_no_turn_and_a_complete_one_is(engine: Engine, picture: Image.Image) -> None:
    with engine.open(picture, 0.4, conversation=True) as session:
        stream = session.stream(QUESTIONS[0])
        next(stream)
        assert session.turns == ()
        del stream
        stream = session.stream(QUESTIONS[1])
        text = "".join(stream)
        assert session.turns == (Turn(QUESTIONS[1], text),)
        assert stream.answer is not None
        assert stream.answer.text == text
        session.encode(QUESTIONS[2])
        assert len(session.turns) == 1


def test_independent_questions_leave_no_turns(engine: Engine, picture: Image.Image) -> None:
    with engine.open(picture, 0.4) as session:
        assert session.ask(QUESTIONS[0]).text == session.ask(QUESTIONS[0]).text
        assert session.turns == ()


# Lifetime, threads, errors.


def test_a_closed_session_answers_no_more(engine: Engine, picture: Image.Image) -> None:
    with engine.open(picture, 0.4) as session:
        stream = session.stream(QUESTIONS[0])
        assert not session.closed
    assert session.closed
    assert "".join(stream) == engine.ask(picture, QUESTIONS[0], 0.4).text, "answers under way go on"
    with pytest.raises(QueryError, match=r"closed session.*engine\.open"):
        session.ask(QUESTIONS[0])
    with pytest.raises(QueryError, match="closed session"):
        session.encode(QUESTIONS[0])


def test_closing_frees_the_frame(engine: Engine, picture: Image.Image) -> None:
    import gc
    import weakref

    session = engine.open(picture, 0.4)
    assert session._view is not None
    frame = weakref.ref(session._view.scene.frame.pixels)
    session.close()
    gc.collect()
    assert frame() is None


def test_threads_share_a_session(engine: Engine, picture: Image.Image) -> None:
    expected = [engine.ask(picture, question, 0.4).text for question in QUESTIONS]
    found: dict[int, str] = {}
    with engine.open(picture, 0.4) as session:

        def run(number: int) -> None:
            found[number] = session.ask(QUESTIONS[number % 3]).text

        with ThreadPoolExecutor(9) as pool:
            list(pool.map(run, range(9)))
    assert [found[number] for number in range(9)] == expected * 3


def test_what_is_wrong_is_said_at_once(engine: Engine, picture: Image.Image) -> None:
    with pytest.raises(ImageError):
        engine.open("nowhere.png")
    with pytest.raises(BudgetError, match="budget 0"):
        engine.open(picture, 0)
    with engine.open(picture) as session:
        for bad in ("", "<|im_end|>", "\ud800"):
            with pytest.raises(QueryError):
                session.ask(bad)
        with pytest.raises(BudgetError):
            session.ask(QUESTIONS[0], 2.0)
        with pytest.raises(DecodeError):
            session.ask(QUESTIONS[0], temperature=-1.0)


def test_stages_of_opening_and_of_a_follow_up(engine: Engine, picture: Image.Image) -> None:
    with engine.open(picture, 0.4) as session:
        assert {"decode", "frame", "texture", "glimpse", "score", "prefix", "total"} == set(session.timings)
        answer = session.ask(QUESTIONS[0])
    assert not {"decode", "frame"} & set(answer.timings)
    assert answer.encoding is not None
    assert set(answer.encoding.timings) < set(answer.timings)


@pytest.mark.parametrize("most", [0, 200_000])
def test_a_bound_too_small_for_a_prefix_changes_no_answer(
    tiny_checkpoint: Path, picture: Image.Image, photo: Image.Image, most: int
) -> None:
    engine, plain = make(tiny_checkpoint, prefix_bytes=most), make(tiny_checkpoint)
    for image in (picture, photo, picture):
        with engine.open(image, 0.3) as session:
            assert session.ask(QUESTIONS[0]).text == plain.ask(image, QUESTIONS[0], 0.3).text
            assert engine.prefix_stats().bytes <= most


def test_the_first_of_several_images_goes_on_from_its_prefix(
    engine: Engine, picture: Image.Image, logits: Callable[[Engine], list[torch.Tensor]]
) -> None:
    made = [engine.encode(image, QUESTIONS[0], 0.4) for image in (picture, picture.rotate(90))]
    seen = logits(engine)
    for images in ((picture, picture.rotate(90)), made):
        content = [{"type": "image", "image": image} for image in images]
        engine.chat([{"role": "user", "content": [*content, {"type": "text", "text": QUESTIONS[0]}]}], 0.4)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)


def test_another_head_takes_no_prefix(engine: Engine, picture: Image.Image) -> None:
    """A system turn stands before the image: the prefix of a bare image would be wrong."""
    turn = {"role": "user", "content": [{"image": picture}, {"text": QUESTIONS[0]}]}
    made = engine.encode(picture, QUESTIONS[0], 0.4)
    plain = {"role": "user", "content": [{"image": made}, {"text": QUESTIONS[0]}]}
    system = {"role": "system", "content": "Be brief."}
    assert engine.chat([system, turn], 0.4).text == engine.chat([system, plain], 0.4).text


def test_an_encoding_cannot_be_opened(engine: Engine, picture: Image.Image) -> None:
    with pytest.raises(ImageError):
        engine.open(engine.encode(picture, QUESTIONS[0], 0.4))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0.4, 1.0])  # the glimpse first, none
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # stock layers, fused ones
def test_on_a_gpu_a_session_equals_a_fresh_engine(
    tiny_checkpoint: Path, picture: Image.Image, precision: str, budget: float
) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, "demo", "cuda", precision, max_new_tokens=8)
    asked = QUESTIONS * 3  # shapes are captured when they are met again
    with engine.open(picture, budget) as session:
        answers = [session.ask(question) for question in asked]
    for question, answer in zip(asked, answers, strict=True):
        engine._prefixes.clear()
        expected = engine.ask(picture, question, budget)
        assert answer.encoding is not None
        assert expected.encoding is not None
        assert torch.equal(answer.encoding.lod, expected.encoding.lod)
        assert answer.prompt_tokens == expected.prompt_tokens
        if precision == "float32":  # in bfloat16 an untrained model's choice may turn on the last bit
            assert answer.text == expected.text


@pytest.mark.gpu
def test_threads_on_a_gpu_share_a_session(tiny_checkpoint: Path, picture: Image.Image) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, "demo", "cuda", max_new_tokens=8)
    found: dict[int, str] = {}
    with engine.open(picture, 0.4) as session:
        expected = [session.ask(question).text for question in QUESTIONS]

        def run(number: int) -> None:
            found[number] = session.ask(QUESTIONS[number % 3]).text

        with ThreadPoolExecutor(9) as pool:
            list(pool.map(run, range(9)))
    assert [found[number] for number in range(9)] == expected * 3
