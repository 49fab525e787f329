"""Prefetching: what is encoded ahead, when, and that it stops for whoever asks."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_encoder import CPU, CountingEngine, make

from arrcoc import image
from arrcoc.config import load
from arrcoc.prefetch import TilePrefetcher, likely_next
from arrcoc.records import Layout, Lod, Plan, Tensions

CONFIG = load("demo").updated({"halo": 0})


def plan(lod: list[list[int]], relevance: list[list[float]]) -> Plan:
    levels = torch.tensor(lod)
    return Plan(
        levels,
        torch.tensor(relevance),
        Tensions(0.0, 0.0, 0.0),
        CONFIG.sides,
        Layout.REFINE,
        1,
        0,
        0,
        0,
    )


def test_runners_up_and_neighbours_come_first() -> None:
    """Tile 0 is refined at relevance 0.9: its neighbours 1, 4 and 5 count 0.45; tile 11 has 0.6."""
    made = plan(
        [[3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0.9, 0.1, 0.3, 0.0], [0.2, 0.0, 0.0, 0.0], [0.0, 0.4, 0.0, 0.6]],
    )
    expected = {1: [11], 4: [1, 4, 5, 11], 5: [1, 4, 5, 9, 11], 6: [1, 2, 4, 5, 9, 11]}
    for most, tiles in expected.items():
        (found,) = likely_next(made, most).values()
        assert found.tolist() == tiles
    assert list(likely_next(made, 3)) == [Lod.HIGH]


def test_tiles_that_are_refined_enough_are_left_out() -> None:
    """Three tiles at medium, one at high: medium it is, for the one at low and the background."""
    made = plan([[2, 2, 2], [3, 1, 0]], [[0.9, 0.8, 0.7], [1.0, 0.1, 0.0]])
    (found,) = likely_next(made, 10).values()
    assert list(likely_next(made, 10)) == [Lod.MEDIUM]
    assert found.tolist() == [4, 5]
    assert likely_next(plan([[0, 0]], [[0.5, 0.5]]), 3) == {}
    assert likely_next(made, 0) == {}


@pytest.mark.parametrize("halo", [0, 1])
def test_what_is_prefetched_is_a_hit_later(halo: int) -> None:
    engines = {lod: CountingEngine(CONFIG.sides[lod], halo=halo) for lod in Lod}
    pixels = torch.randint(0, 255, (3, 256, 384), dtype=torch.uint8)
    frame = image.frame(pixels, CONFIG.updated({"halo": halo}), 32, CPU)
    encoder, cache = make(engines)
    relevance = torch.full((2, 3), 0.5)
    encoder.encode(frame, {Lod.HIGH: torch.tensor([0])}, relevance)
    wanted = {Lod.HIGH: torch.tensor([0, 1, 2, 4])}
    assert encoder.prefetch(frame, wanted, relevance, lambda: False, at_once=2) == 3
    assert (engines[Lod.HIGH].encoded, cache.stats().prefetched) == (4, 3)
    assert (cache.stats().hits, cache.stats().misses) == (0, 1), "nobody has asked"
    (direct,) = make(engines)[0].encode(frame, wanted, relevance)
    count = engines[Lod.HIGH].encoded
    (tiles,) = encoder.encode(frame, wanted, relevance)
    assert engines[Lod.HIGH].encoded == count
    assert torch.equal(tiles.features.tokens, direct.features.tokens)
    assert (cache.stats().hits, cache.stats().prefetch_hits) == (4, 3)


def test_prefetching_stops_between_a_few_tiles() -> None:
    engines = {lod: CountingEngine(CONFIG.sides[lod]) for lod in Lod}
    frame = image.frame(torch.randint(0, 255, (3, 256, 384), dtype=torch.uint8), CONFIG, 32, CPU)
    encoder, cache = make(engines)
    asked = iter([False, False, True])
    wanted = {Lod.HIGH: torch.arange(6)}
    assert encoder.prefetch(frame, wanted, torch.ones(2, 3), lambda: next(asked), at_once=2) == 2
    assert (engines[Lod.HIGH].encoded, cache.stats().entries) == (2, 2)
    asked = iter([False, True, True])
    assert encoder.prefetch(frame, wanted, torch.ones(2, 3), lambda: next(asked), at_once=6) == 0
    assert cache.stats().entries == 2, "what was encoded in vain is not stored over others"


# When.


def test_jobs_run_only_while_no_request_is_in_flight() -> None:
    ahead, ran = TilePrefetcher(CPU), threading.Event()
    with ahead.request():
        ahead.submit(lambda stopped: ran.set())
        assert not ran.wait(0.05)
    assert ran.wait(5)
    assert ahead.flush(5)
    ahead.close()


def test_a_request_stops_a_running_job() -> None:
    ahead = TilePrefetcher(CPU)
    begun, ended = threading.Event(), threading.Event()

    def work(stopped) -> None:
        begun.set()
        while not stopped():
            time.sleep(0.001)
        ended.set()

    ahead.submit(work)
    assert begun.wait(5)
    assert not ended.is_set()
    with ahead.request():
        assert ended.is_set(), "a request begins when the job has stopped"
    ahead.submit(work)
    begun.clear()
    assert begun.wait(5)
    ahead.cancel()
    assert ahead.flush(0)
    ahead.close()


def test_a_request_interrupted_while_it_waits_is_over(monkeypatch) -> None:
    ahead, ran = TilePrefetcher(CPU), threading.Event()

    def interrupt(_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ahead._changed, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt), ahead.request():
            pass
    ahead.submit(lambda stopped: ran.set())
    assert ran.wait(5)
    ahead.close()


def test_a_new_job_replaces_one_that_waits_and_a_failing_one_harms_nobody(caplog) -> None:
    ahead, ran = TilePrefetcher(CPU), []
    with ahead.request():
        for number in range(3):
            ahead.submit(lambda stopped, number=number: ran.append(number))
    assert ahead.flush(5)
    assert ran == [2]

    def fail(stopped) -> None:
        raise RuntimeError("no")

    ahead.submit(fail)
    assert ahead.flush(5)
    ahead.submit(lambda stopped: ran.append(9))
    assert ahead.flush(5)
    assert ran == [2, 9]
    assert "prefetching tiles failed" in caplog.text
    ahead.close()
    ahead.submit(lambda stopped: ran.append(10))
    assert ran == [2, 9]


def test_switched_off_it_does_nothing() -> None:
    ahead, ran = TilePrefetcher(CPU, enabled=False), []
    ahead.submit(lambda stopped: ran.append(1))
    assert ahead.flush(0)
    assert ran == []
    ahead.close()


def test_a_session_finds_tiles_that_were_encoded_ahead(tiny_checkpoint, photo) -> None:
    """Two questions about an opened image; the answers and encodings are those without prefetching."""
    from arrcoc import Engine

    questions = ["What is on her sleeve?", "Which colour is the rocket?"]
    engines = [
        Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", prefetch=prefetch)
        for prefetch in ("on", "off")
    ]
    large, made = photo.resize((1024, 1024)), []
    for engine in engines:
        with engine.open(large, budget=0.15) as session:
            answers = [session.ask(questions[0], max_new_tokens=3)]
            assert engine._ahead.flush(20)
            assert (engine.cache_stats().prefetched > 0) == (engine is engines[0])
            answers.append(session.ask(questions[1], 0.3, max_new_tokens=3))
        made.append(answers)
        engine.close()
    assert engines[0].cache_stats().prefetch_hits > 0
    assert engines[0].cache_stats().prefetched <= 2 * 32
    assert engines[0].cache_stats().hits > engines[1].cache_stats().hits
    for one, other in zip(*made, strict=True):
        assert one.text == other.text
        assert torch.equal(one.encoding.tokens, other.encoding.tokens)


# At the end.

ENDLESS = """
import threading, time
import torch
from arrcoc.prefetch import TilePrefetcher
ahead, begun = TilePrefetcher(torch.device("cpu")), threading.Event()
def work(stopped):
    begun.set()
    tile = torch.ones(300, 300)
    while not stopped():
        for _ in range(5):
            tile @ tile
    time.sleep(0.1)
    print("stopped", flush=True)
ahead.submit(work)
begun.wait()
print("over", flush=True)
raise SystemExit(3)
"""


def test_the_interpreter_ends_only_after_the_running_job() -> None:
    """A daemon thread inside torch would otherwise take the process down: "terminate called ..."."""
    command = [sys.executable, "-c", ENDLESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["over", "stopped"], done.stderr
    assert "terminate" not in done.stderr
    assert done.returncode == 3


def test_an_engine_that_is_dropped_leaves_no_thread_behind(tiny_checkpoint, photo) -> None:
    from arrcoc import Engine

    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", prefetch="on")
    with engine.open(photo, budget=0.3) as session:
        session.encode("What is on her sleeve?")
    thread = engine._ahead._thread
    assert thread is not None
    assert thread.is_alive()
    del engine, session
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_no_graph_is_captured_for_what_nobody_has_asked() -> None:
    """The engine's own way of encoding ahead is taken, and not the one that captures."""

    class Engine(CountingEngine):
        def encode(self, pixels):
            raise AssertionError("captures")

        def encode_ahead(self, pixels):
            return CountingEngine.encode(self, pixels)

    engines = {lod: Engine(CONFIG.sides[lod]) for lod in Lod}
    frame = image.frame(torch.randint(0, 255, (3, 256, 384), dtype=torch.uint8), CONFIG, 32, CPU)
    encoder, _ = make(engines)
    wanted = {Lod.HIGH: torch.arange(3)}
    assert encoder.prefetch(frame, wanted, torch.ones(2, 3), lambda: False) == 3


@pytest.mark.gpu
def test_waiting_for_the_whole_device_meanwhile_breaks_no_capture(photo) -> None:
    """Which is what it does to whatever another thread captures."""
    from arrcoc import Engine

    engine = Engine.from_pretrained(device="cuda", prefetch="on")
    with engine.open(photo.resize((1024, 1024)), budget=0.15) as session:
        for question in ("What is on her sleeve?", "Which colour is the rocket?"):
            session.encode(question)
            while not engine.finish_prefetch(0):
                torch.cuda.synchronize()
    assert engine.cache_stats().prefetched > 0
    assert not any("no CUDA graphs" in name for name in engine.describe()["lod_engines"].values())
    engine.close()
