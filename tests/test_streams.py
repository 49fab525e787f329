"""Parallel tasks: order, errors, and on a GPU equality with the sequential path."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from arrcoc import streams

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA device")


@dataclass
class Pair:
    first: Tensor
    rest: tuple[Tensor, ...]


def test_inside_a_capture_streams_are_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of the usual kind may be any thread's, whose work must not land in the graph."""
    made: list[int] = []
    capturing = iter([False, True, False])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _, priority: made.append(priority))
    pool = streams._StreamPool()
    for _ in range(3):
        pool.take(0, 2)
    assert made == [0, 0, streams.PRIORITY, streams.PRIORITY]
    assert streams.PRIORITY != 0


def test_results_keep_the_order_of_the_tasks() -> None:
    tasks: list[Callable[[], int]] = [lambda: 3, lambda: 1, lambda: 2]
    assert streams.parallel(tasks, CPU) == [3, 1, 2]


def test_no_tasks() -> None:
    assert streams.parallel([], CPU) == []


def test_runs_in_sequence_on_cpu() -> None:
    seen: list[str] = []
    streams.parallel([lambda: seen.append("a"), lambda: seen.append("b")], CPU)
    assert seen == ["a", "b"]


def test_an_exception_passes_through_and_stops() -> None:
    seen: list[str] = []

    def fail() -> None:
        raise ValueError("task")

    with pytest.raises(ValueError, match="task"):
        streams.parallel([fail, lambda: seen.append("late")], CPU)
    assert seen == []


def test_finds_every_tensor_of_a_result() -> None:
    a, b, c, d = torch.zeros(4).unbind()
    found = list(streams._tensors([Pair(a, (b,)), {"c": c}, (d, None, "text")]))
    assert [id(tensor) for tensor in found] == [id(a), id(b), id(c), id(d)]


def work(seed: Tensor, factor: float) -> Pair:
    """Enough work that a missing wait would be seen."""
    value = seed
    for _ in range(30):
        value = torch.tanh(value @ seed * factor)
    return Pair(value, (value.sum(dim=0), value.abs().amax()))


@pytest.mark.gpu
@needs_cuda
def test_streams_equal_sequence() -> None:
    device = torch.device("cuda")
    for repeat in range(20):
        base = torch.randn(1024, 1024, device=device, generator=torch.Generator(device).manual_seed(repeat))
        seed = base / 32
        tasks = [lambda f=factor, s=seed: work(s, f) for factor in (0.5, 1.0, 1.5)]
        expected = [task() for task in tasks]
        got = streams.parallel(tasks, device)
        del seed, tasks
        for want, have in zip(expected, got, strict=True):
            assert torch.equal(want.first, have.first)
            assert torch.equal(want.rest[0], have.rest[0])


@pytest.mark.gpu
@needs_cuda
def test_caller_waits_and_host_does_not() -> None:
    device = torch.device("cuda")
    value = torch.zeros(1 << 20, device=device)
    streams.parallel([lambda: value.add_(0)], device)
    torch.cuda.synchronize()

    def slow() -> Tensor:
        torch.cuda._sleep(200_000_000)
        return value.add_(1)

    torch.cuda.set_sync_debug_mode("error")
    try:
        streams.parallel([slow, lambda: None], device)
        running = not torch.cuda.current_stream().query()
        after = value * 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert running
    assert after.eq(2).all()


@pytest.mark.gpu
@needs_cuda
def test_an_exception_leaves_the_streams_joined() -> None:
    device = torch.device("cuda")
    value = torch.zeros(1 << 20, device=device)

    def slow() -> Tensor:
        torch.cuda._sleep(200_000_000)
        return value.add_(1)

    def fail() -> Tensor:
        raise ValueError("task")

    with pytest.raises(ValueError, match="task"):
        streams.parallel([slow, fail], device)
    assert (value * 2).eq(2).all()


@pytest.mark.gpu
@needs_cuda
def test_tasks_start_after_the_callers_work_on_streams_of_their_own() -> None:
    device = torch.device("cuda")
    torch.cuda._sleep(200_000_000)
    value = torch.ones(1 << 20, device=device)
    used: list[int] = []

    def task() -> Tensor:
        used.append(torch.cuda.current_stream().cuda_stream)
        return value * 3

    first, second = streams.parallel([task, task], device)
    assert first.eq(3).all()
    assert second.eq(3).all()
    assert len({*used, torch.cuda.current_stream().cuda_stream}) == 3
    streams.parallel([task, task], device)
    assert used[:2] == used[2:], "streams are made once"
    other = threading.Thread(target=streams.parallel, args=([task, task], device))
    other.start()
    other.join()
    assert not set(used[4:]) & set(used[:4]), "threads do not share streams"
