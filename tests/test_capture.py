"""Captures: one at a time, on streams of their own, and over when they fail."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from arrcoc import capture
from arrcoc.capture import captured

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def test_a_replay_does_the_work_anew() -> None:
    given = torch.zeros(8, device=CUDA)
    graph, found = captured(lambda: given * 2, CUDA)
    for value in (3.0, 4.0):
        given.fill_(value)
        graph.replay()
        assert found.tolist() == [2 * value] * 8


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


def test_nobody_else_works_on_the_stream_of_captures() -> None:
    captured(lambda: torch.zeros(1, device=CUDA), CUDA)
    others = {torch.cuda.Stream().cuda_stream for _ in range(64)}  # type: ignore[no-untyped-call]
    assert len(others) == 32, "PyTorch hands the same streams out again"
    assert not others & {stream.cuda_stream for stream in capture._streams.values()}


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
