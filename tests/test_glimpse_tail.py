"""Questions at static shapes: the same as at their own, whatever was asked before and whatever pads them."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from arrcoc import Engine, glimpse_tail, image, sequence
from arrcoc.attention_probe import attention_shares
from arrcoc.config import load
from arrcoc.glimpse import GlimpseScorer, JointGlimpse
from arrcoc.glimpse_tail import ROWS, Tails
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Frame
from arrcoc.timing import StageTimer

CONFIG = load("demo")
SHORT, LONG = "Why?", "What is on her sleeve?"
LONGER = "What is written on the sleeve of the person at the left, and in which colour is it?"


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint: Path) -> QwenVL:
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")._qwen


def framed(qwen: QwenVL, photo: Image.Image, left: int = 0, width: int = 384) -> Frame:
    cut = photo.crop((left, 0, left + width, 256))
    return image.frame(image.decode(cut, 10**8), CONFIG, 32, qwen.device)


def scorer(
    qwen: QwenVL, frame: Frame, tails: Tails | None = None, prefix: Prefix | None = None
) -> GlimpseScorer:
    features = JointGlimpse(qwen).encode(frame)
    where = sequence.glimpse_positions(frame.grid, CONFIG.sides[0], CONFIG.sides[3])
    extent = sequence.extent(frame.grid, CONFIG.sides[3])
    return GlimpseScorer(qwen, features, where, extent, frame.grid, CONFIG, prefix, tails)


def asked(made: GlimpseScorer, qwen: QwenVL, question: str) -> Tensor:
    return made.ask(qwen.query(question))


def test_rows_weigh_what_they_are_given():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 5, 8, generator=generator), torch.randn(2, 6, 8, generator=generator)
    excluded = torch.tensor([False, True, False, False, False, False])
    rows = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0])
    found = attention_shares(query, keys, excluded, rows)
    torch.testing.assert_close(found, attention_shares(query[:, 1:3], keys, excluded))
    one = attention_shares(query, keys, excluded, torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(one, attention_shares(query[:, 3:4], keys, excluded))


@pytest.mark.parametrize("question", [SHORT, LONG, LONGER, CONFIG.generic_prompt])
def test_a_static_pass_finds_what_a_question_finds_at_its_own_shape(qwen, photo, question):
    frame, tails = framed(qwen, photo), Tails(qwen, CONFIG)
    found = asked(scorer(qwen, frame, tails), qwen, question)
    assert len(tails._passes) == 1, "it was the static pass that found it"
    expected = asked(scorer(qwen, frame), qwen, question)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert (question == CONFIG.generic_prompt) == bool((expected - 0.5).abs().max() < 1e-5)


def test_what_the_static_pass_finds_is_the_score(qwen, photo, monkeypatch):
    monkeypatch.setattr(Tails, "ask", lambda *_: torch.full((2, 3), 0.25))
    found = asked(scorer(qwen, framed(qwen, photo), Tails(qwen, CONFIG)), qwen, LONG)
    assert torch.equal(found, torch.full((2, 3), 0.25))


def test_a_static_pass_leaves_sinks_out(qwen, photo, monkeypatch):
    frame = framed(qwen, photo)
    plain = asked(scorer(qwen, frame, Tails(qwen, CONFIG)), qwen, LONG)
    monkeypatch.setattr("arrcoc.prefix_graph.sinks", lambda norms, _: torch.arange(len(norms)) == 4)
    found = asked(scorer(qwen, frame, Tails(qwen, CONFIG)), qwen, LONG)
    assert found[1, 1] == 0.5, "nobody looks at tile 4"
    assert plain[1, 1] != 0.5
    torch.testing.assert_close(found, asked(scorer(qwen, frame), qwen, LONG), atol=2e-6, rtol=0)


def test_what_was_asked_before_leaves_no_trace(qwen, photo):
    frame, tails = framed(qwen, photo), Tails(qwen, CONFIG)
    made = scorer(qwen, frame, tails)
    first = asked(made, qwen, SHORT)
    for question in (LONG, LONGER):
        asked(made, qwen, question)
        assert torch.equal(asked(made, qwen, SHORT), first)


def test_images_of_one_shape_share_the_memory_and_keep_their_own_scores(qwen, photo):
    tails = Tails(qwen, CONFIG)
    scorers = [scorer(qwen, framed(qwen, photo, left), tails) for left in (0, 128)]
    expected = [asked(scorer(qwen, framed(qwen, photo, left)), qwen, LONG) for left in (0, 128)]
    assert not torch.allclose(*expected, atol=1e-4)
    for place in (0, 1, 1, 0):
        torch.testing.assert_close(asked(scorers[place], qwen, LONG), expected[place], atol=2e-6, rtol=0)
    assert len(tails._passes) == 1


def test_the_prefix_stays_as_it_was(qwen, photo):
    made = scorer(qwen, framed(qwen, photo), Tails(qwen, CONFIG))
    prefix = made.prepare()
    before = prefix.fork(prefix.length, layers=prefix.depth).block(prefix.length).clone()
    asked(made, qwen, LONG)
    assert torch.equal(prefix.fork(prefix.length, layers=prefix.depth).block(prefix.length), before)


def test_a_question_longer_than_any_pass_runs_at_its_own_shape(qwen, photo):
    frame, question = framed(qwen, photo), "word " * ROWS[-1]
    tails = Tails(qwen, CONFIG)
    assert torch.equal(
        asked(scorer(qwen, frame, tails), qwen, question), asked(scorer(qwen, frame), qwen, question)
    )
    assert tails._passes == {}


def test_keys_and_values_are_kept_within_a_bound(qwen, photo, monkeypatch):
    tails = Tails(qwen, CONFIG)
    small = framed(qwen, photo, width=256)
    for frame in (framed(qwen, photo), small):
        asked(scorer(qwen, frame, tails), qwen, SHORT)
    assert len(tails._passes) == 2
    monkeypatch.setattr(glimpse_tail, "KEEP_BYTES", 1)
    expected = asked(scorer(qwen, small), qwen, SHORT)
    torch.testing.assert_close(asked(scorer(qwen, small, tails), qwen, SHORT), expected, atol=2e-6, rtol=0)
    assert [shape.grid for shape in tails._passes] == [small.grid]


def test_no_more_than_so_many_shapes_are_kept(qwen, photo, monkeypatch):
    monkeypatch.setattr(glimpse_tail, "KEEP_SHAPES", 1)
    tails = Tails(qwen, CONFIG)
    small = framed(qwen, photo, width=256)
    for frame in (framed(qwen, photo), small):
        asked(scorer(qwen, frame, tails), qwen, SHORT)
    assert [shape.grid for shape in tails._passes] == [small.grid]


def test_memory_that_ran_out_half_way_leaves_no_image_in_anothers_place(qwen, photo, monkeypatch):
    tails = Tails(qwen, CONFIG)
    first, second = (scorer(qwen, framed(qwen, photo, left), tails) for left in (0, 128))
    expected = asked(first, qwen, LONG)
    load_into = Prefix.load_into

    def half(self: Prefix, buffer: Tensor) -> None:
        load_into(self, buffer)
        raise torch.OutOfMemoryError("out of memory")

    second.prepare()
    monkeypatch.setattr(Prefix, "load_into", half)
    with pytest.raises(torch.OutOfMemoryError):
        asked(second, qwen, LONG)
    monkeypatch.undo()
    assert torch.equal(asked(first, qwen, LONG), expected)


# Which passes are captured.


class Noted:
    """Stands for a graph: a replay computes anew into the same memory."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.found, self.replays = run, run(), 0

    def replay(self) -> None:
        self.replays += 1
        self.found.copy_(self.run())


@pytest.fixture
def pretended(qwen: QwenVL, monkeypatch: pytest.MonkeyPatch) -> tuple[Tails, list[Noted]]:
    """Captures that only note what they would capture."""
    made: list[Noted] = []

    def capture(run: Callable[[], Tensor], *_: Any) -> Any:
        made.append(Noted(run))
        return made[-1], made[-1].found

    monkeypatch.setattr(glimpse_tail, "captured", capture)
    tails = Tails(qwen, CONFIG)
    tails._pool = None
    tails._turn = threading.Lock  # type: ignore[method-assign, assignment]
    tails._captures = True
    return tails, made


def test_a_size_is_captured_when_it_is_met_again(qwen, photo, pretended):
    tails, made = pretended
    frame = framed(qwen, photo)
    one = scorer(qwen, frame, tails)
    first = asked(one, qwen, SHORT)
    assert made == []
    other = asked(one, qwen, LONG)
    assert len(made) == 1, "both have fewer rows than the shortest pass"
    again = asked(one, qwen, SHORT)
    assert torch.equal(asked(one, qwen, LONG), other)
    assert torch.equal(again, first), "what a replay gave is not overwritten by the next"
    assert (len(made), made[0].replays) == (1, 3)
    assert tails.describe().startswith("CUDA graphs (1 captured)")


def test_the_first_graph_outlives_its_shape_as_its_pool_goes_with_it(qwen, photo, pretended, monkeypatch):
    tails, made = pretended
    first, second = (scorer(qwen, framed(qwen, photo, width=width), tails) for width in (384, 256))
    for _ in range(2):
        asked(first, qwen, SHORT)
    monkeypatch.setattr(glimpse_tail, "KEEP_SHAPES", 1)
    tails._used = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
    asked(second, qwen, SHORT)
    assert len(made) == 1
    assert tails._first is made[0]
    asked(second, qwen, SHORT)
    assert tails._first is made[0], "not the newest"


def test_preparing_captures_before_the_first_question(qwen, photo, pretended):
    tails, made = pretended
    frame = framed(qwen, photo)
    one = scorer(qwen, frame, tails)
    tails.prepare(one.prepare(), frame.grid)
    tails.prepare(one.prepare(), frame.grid)
    assert [each.replays for each in made] == [1], "only the first time"
    torch.testing.assert_close(
        asked(one, qwen, LONG), asked(scorer(qwen, frame), qwen, LONG), atol=2e-6, rtol=0
    )
    assert len(made) == 1


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("operation not permitted\nwhen stream is capturing", "operation not permitted"),
        ("", "RuntimeError"),
    ],
)
def test_a_failed_capture_is_told_once_and_not_tried_again(
    message, told, qwen, photo, pretended, monkeypatch, caplog
):
    tails, tried = pretended[0], []

    def capture(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError(message)

    monkeypatch.setattr(glimpse_tail, "captured", capture)
    one = scorer(qwen, framed(qwen, photo), tails)
    with caplog.at_level(logging.WARNING):
        found = [asked(one, qwen, SHORT) for _ in range(4)]
    assert all(torch.equal(each, found[0]) for each in found)
    assert tried == [1]
    assert tails.describe().startswith(f"no CUDA graphs ({told}); first looks: not captured")
    assert [r.getMessage() for r in caplog.records] == [f"questions are read without CUDA graphs: {told}"]


# On a GPU.


@pytest.fixture(scope="module")
def on_gpu(tiny_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(
        tiny_checkpoint, preset="demo", device="cuda", dtype="bfloat16", prefetch="off"
    )


@pytest.mark.gpu
def test_a_graph_gives_what_the_pass_gives(on_gpu, photo):
    qwen = on_gpu._qwen
    tails = Tails(qwen, CONFIG)
    made = [scorer(qwen, framed(qwen, photo, left), tails) for left in (0, 128)]
    plain = [scorer(qwen, framed(qwen, photo, left)) for left in (0, 128)]
    first = [[asked(one, qwen, q) for q in (SHORT, LONG)] for one in made]  # captures on the way
    for _ in range(2):
        again = [[asked(one, qwen, q) for q in (SHORT, LONG)] for one in made]
        assert all(
            torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
        )
    assert tails.describe().startswith("CUDA graphs (1 captured)")
    for one, found in zip(plain, first, strict=True):
        for question, each in zip((SHORT, LONG), found, strict=True):
            torch.testing.assert_close(each, asked(one, qwen, question), atol=0.03, rtol=0)  # bf16


@pytest.mark.gpu
def test_threads_share_passes(on_gpu, photo):
    qwen = on_gpu._qwen
    tails = Tails(qwen, CONFIG)
    made = [scorer(qwen, framed(qwen, photo, left), tails) for left in (0, 64, 128)]
    expected = [asked(one, qwen, LONG) for one in made]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def run(place: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(20):
                if not torch.equal(asked(made[place], qwen, LONG).cpu(), expected[place].cpu()):
                    wrong.append(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0.4, 0.9])
def test_what_the_host_waits_for_in_a_question_about_an_open_image(on_gpu, photo, budget):
    """The plan and the tiles' hashes are read; what is encoded and assembled after them is only queued."""
    with on_gpu.open(photo.resize((512, 384)), budget) as session:
        for question in (SHORT, LONG, LONG):
            session.ask(question)
        view, query = session._view, on_gpu._qwen.query(SHORT)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                view.pipeline.look_at(view.scene, query, budget, StageTimer(on_gpu._qwen.device))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    # With a halo tiles are hashed as they are cut, which is the second time that the host reads.
    assert [Path(wait.rpartition(":")[0]).stem for wait in waits] == ["plan_graph", "encoder"]
