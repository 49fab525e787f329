"""Captures: one at a time, on streams of their own, and over when they fail."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from arrcoc import capture
from arrcoc.capture import captured

CUDA = torch.device("cuda")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA device that captures nothing; gives what it was asked to do."""
    asked, current = list[str](), ["caller"]

    class Stream(str):
        def wait_stream(self, other: str) -> None:
            asked.append(f"{self} waits for {other}")

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    class Graph:
        def capture_begin(self, **_: Any) -> None:
            asked.append("begin")

        def capture_end(self) -> None:
            asked.append("end")

    monkeypatch.setattr(capture, "_streams", {})
    monkeypatch.setattr(capture, "_spoilt", [])
    for name, value in {
        "device": lambda _: nullcontext(),
        "current_device": lambda: 0,
        "Stream": lambda *_, **__: Stream("side"),
        "current_stream": lambda _: Stream(current[-1]),
        "stream": on,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: asked.append("clear"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: asked.append("forget"), raising=False)
    return asked


def test_nothing_is_collected_while_work_is_captured_between_the_callers(pretended: list[str]) -> None:
    assert not captured(gc.isenabled, CUDA)[1]
    assert gc.isenabled()
    assert pretended == ["side waits for caller", "begin", "end", "clear", "caller waits for side"]
    assert capture._spoilt == []


def test_a_failed_capture_ends_and_its_graph_is_kept(pretended: list[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        captured(lambda: 1 // 0, CUDA)
    assert gc.isenabled()
    assert pretended == ["side waits for caller", "begin", "end", "forget", "clear"]
    assert len(capture._spoilt) == 1


def test_a_capture_inside_a_capture_fails_and_does_not_wait_for_itself(pretended: list[str]) -> None:
    found: list[BaseException] = []

    def nested() -> None:
        try:
            captured(lambda: captured(lambda: 1, CUDA), CUDA)
        except AssertionError as error:
            found.append(error)

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(10)
    assert [str(error) for error in found] == ["a capture inside a capture"]


# On a GPU.


@pytest.mark.gpu
def test_a_replay_does_the_work_anew() -> None:
    given = torch.zeros(8, device=CUDA)
    graph, found = captured(lambda: given * 2, CUDA)
    for value in (3.0, 4.0):
        given.fill_(value)
        graph.replay()
        assert found.tolist() == [2 * value] * 8


@pytest.mark.gpu
def test_after_a_failed_capture_others_succeed_and_memory_is_used_again() -> None:
    given = torch.ones(8, device=CUDA)
    with pytest.raises(RuntimeError, match=r"captur"):
        captured(lambda: given.sum().item(), CUDA)

    def half() -> None:
        given.add_(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        captured(half, CUDA)
    graph, found = captured(lambda: given + 1, CUDA)
    graph.replay()
    assert found.tolist() == [2.0] * 8
    assert gc.isenabled()
    gc.collect()
    torch.cuda.empty_cache()
    block, side = torch.empty(96 << 20, dtype=torch.uint8, device=CUDA), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    place = block.data_ptr()
    block.record_stream(side)
    del block
    torch.cuda.synchronize()
    again = torch.empty(96 << 20, dtype=torch.uint8, device=CUDA)
    assert again.data_ptr() == place, "the allocator believes that a capture is under way"


@pytest.mark.gpu
def test_nobody_else_works_on_the_stream_of_captures() -> None:
    captured(lambda: torch.zeros(1, device=CUDA), CUDA)
    others = {torch.cuda.Stream().cuda_stream for _ in range(64)}  # type: ignore[no-untyped-call]
    assert len(others) == 32, "PyTorch hands the same streams out again"
    assert not others & {stream.cuda_stream for stream in capture._streams.values()}


@pytest.mark.gpu
def test_threads_go_on_working_on_every_stream_while_others_capture() -> None:
    """What they launch lands in no graph, and graphs hold no more than their own work."""
    stop, wrong = threading.Event(), list[str]()
    weights = torch.randn(256, 256, device=CUDA) / 16

    def work() -> None:
        while not stop.is_set():
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                count = torch.zeros(64, device=CUDA)
                for _ in range(16):
                    count += 1
                if count.sum().item() != 64 * 16:
                    wrong.append("work")

    def capture_some(number: int) -> None:
        given = torch.full((4, 256), float(number), device=CUDA)
        expected = given @ weights
        for _ in range(10):
            graph, found = captured(lambda: given @ weights, CUDA)
            for _ in range(3):
                graph.replay()
                if not torch.equal(found, expected):
                    wrong.append("capture")

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(work) for _ in range(2)]
        try:
            list(pool.map(capture_some, range(2)))
        finally:
            stop.set()
        for each in busy:
            each.result()
    assert wrong == []


@pytest.mark.gpu
def test_graphs_that_run_at_the_same_time_share_no_scratch_memory() -> None:
    """Products of few rows are summed in parts, in scratch memory of cuBLAS's."""
    torch.manual_seed(0)
    weights = torch.randn(8192, 512, device=CUDA, dtype=torch.bfloat16)
    given = [torch.randn(8, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2)]

    def products(x: Tensor) -> Tensor:
        return torch.stack([x @ weights for _ in range(50)])

    expected = [products(x) for x in given]
    graphs = [captured(lambda x=x: products(x), CUDA) for x in given]
    streams = [torch.cuda.Stream() for _ in graphs]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, found), want in zip(graphs, expected, strict=True):
            assert torch.equal(found, want)
