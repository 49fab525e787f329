"""Which shapes are captured, what is kept of them, and what happens when that fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arrcoc import shape_graphs
from arrcoc.shape_graphs import ShapeGraphs, Tensors

CPU = torch.device("cpu")


@dataclass
class Doubling:
    """Stands for the work: twice its input."""

    given: Tensor
    fails: type[BaseException] | None = None

    @property
    def inputs(self) -> Tensors:
        return (self.given,)

    def compute(self) -> Tensors:
        if self.fails is not None:
            raise self.fails("no room")
        return (self.given * 2,)


class Noted:
    """Stands for a graph: a replay computes anew into the same memory."""

    def __init__(self, run: Callable[[], Tensors]) -> None:
        self.run, self.found, self.replays = run, run(), 0

    def replay(self) -> None:
        self.replays += 1
        for mine, new in zip(self.found, self.run(), strict=True):
            mine.copy_(new)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    """Captures that only note what they would capture."""
    noted: list[Noted] = []

    def capture(run: Callable[[], Tensors], *_: Any) -> Any:
        noted.append(Noted(run))
        return noted[-1], noted[-1].found

    monkeypatch.setattr(shape_graphs, "captured", capture)
    return noted


def graphs_of(keep_bytes: int = 1 << 20, keep_shapes: int = 8) -> ShapeGraphs[Doubling]:
    graphs: ShapeGraphs[Doubling] = ShapeGraphs(CPU, "work is done", keep_bytes, keep_shapes)
    graphs.captures, graphs._pool, graphs._first = True, None, None
    graphs._turn = threading.Lock  # type: ignore[method-assign, assignment]
    graphs._used = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
    return graphs


def double(
    graphs: ShapeGraphs[Doubling], values: list[float], fails: type[BaseException] | None = None
) -> list[float] | None:
    given = torch.tensor(values)
    found = graphs.run(
        len(values),
        lambda: Doubling(torch.zeros_like(given), fails),
        lambda work: work.given.copy_(given),
        lambda _, results: results[0].clone(),
    )
    return None if found is None else found.tolist()


def test_without_cuda_the_caller_does_everything(made: list[Noted]) -> None:
    graphs: ShapeGraphs[Doubling] = ShapeGraphs(CPU, "work is done", 1 << 20)
    assert [double(graphs, [1.0]) for _ in range(3)] == [None] * 3
    assert (made, graphs.describe()) == ([], "not captured")


def test_a_shape_is_captured_when_it_is_met_again(made: list[Noted]) -> None:
    graphs = graphs_of()
    assert double(graphs, [1.0]) is None
    assert double(graphs, [1.0, 2.0]) is None, "another shape"
    assert (double(graphs, [3.0]), len(made)) == ([6.0], 1)
    assert made[0].replays == 0, "what the rehearsal found"
    assert [double(graphs, [value]) for value in (4.0, 5.0)] == [[8.0], [10.0]]
    assert (len(made), made[0].replays) == (1, 2)
    assert graphs.describe() == "CUDA graphs (1 captured)"


def test_results_are_the_callers_own(made: list[Noted]) -> None:
    graphs = graphs_of()
    kept = []
    for value in (1.0, 2.0, 3.0, 4.0):
        given = torch.tensor([value])
        kept.append(
            graphs.run(
                "shape",
                lambda: Doubling(torch.zeros(1)),
                lambda work, given=given: work.given.copy_(given),  # type: ignore[misc]
                lambda _, results: results[0].clone(),
            )
        )
    assert kept[1:] == [torch.tensor([4.0]), torch.tensor([6.0]), torch.tensor([8.0])]


@pytest.mark.parametrize(("keep_bytes", "keep_shapes"), [(1 << 20, 1), (1, 8)])
def test_what_was_unused_for_longest_goes(made: list[Noted], keep_bytes: int, keep_shapes: int) -> None:
    graphs = graphs_of(keep_bytes, keep_shapes)
    for _ in range(2):
        double(graphs, [1.0])
    first = graphs._first
    for _ in range(2):
        double(graphs, [1.0, 2.0])
    assert list(graphs._shapes) == [2]
    assert graphs._first is first is made[0], "its pool would go with it"
    assert double(graphs, [1.0]) is None, "met as if for the first time"


def test_inputs_and_results_are_counted_and_let_go_of_at_once(made: list[Noted]) -> None:
    """8 bytes of one number, 16 of two; whoever used them last is waited for."""
    graphs, waited = graphs_of(keep_bytes=20), list[int]()
    graphs._used = SimpleNamespace(synchronize=lambda: waited.append(len(made)))  # type: ignore[assignment]
    for _ in range(2):
        double(graphs, [1.0])
    for _ in range(2):
        assert waited == []
        double(graphs, [1.0, 2.0])
    assert (list(graphs._shapes), waited) == ([2], [2])


def test_a_shape_that_was_just_used_stays(made: list[Noted]) -> None:
    graphs = graphs_of(keep_shapes=2)
    for values in ([1.0], [1.0], [1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0, 3.0]):
        double(graphs, values)
    assert list(graphs._shapes) == [1, 3]


def test_a_failed_capture_is_told_once_and_captured_shapes_go_on(
    made: list[Noted], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = graphs_of()
    for _ in range(2):
        double(graphs, [1.0])
    tried = []

    def refuse(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(shape_graphs, "captured", refuse)
    with caplog.at_level(logging.WARNING):
        found = [double(graphs, [1.0, 2.0]) for _ in range(4)]
    assert found == [None, [2.0, 4.0], None, None]
    assert (tried, double(graphs, [7.0])) == ([1], [14.0])
    assert graphs.describe() == "no CUDA graphs (operation not permitted)"
    assert [r.getMessage() for r in caplog.records] == [
        "work is done without CUDA graphs: operation not permitted"
    ]


def test_too_little_memory_is_no_failure_for_good(made: list[Noted], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of()
    assert double(graphs, [1.0]) is None
    assert double(graphs, [1.0], torch.OutOfMemoryError) is None, "in the rehearsal"
    capture = shape_graphs.captured

    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("in the capture")

    assert double(graphs, [1.0]) is None, "met as if for the first time"
    monkeypatch.setattr(shape_graphs, "captured", refuse)
    assert double(graphs, [1.0]) == [2.0], "what the rehearsal found"
    monkeypatch.setattr(shape_graphs, "captured", capture)
    assert [double(graphs, [1.0]) for _ in range(3)] == [None, [2.0], [2.0]]
    assert (graphs.failure, len(made)) == ("", 1)


def test_other_errors_of_the_work_pass_through(made: list[Noted]) -> None:
    graphs = graphs_of()
    double(graphs, [1.0])
    with pytest.raises(ZeroDivisionError):
        double(graphs, [1.0], ZeroDivisionError)
