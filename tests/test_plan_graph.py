"""The plan stage by graphs: packing, which shapes are captured, failures, and how often the host waits."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from arrcoc import allocation, opponent, plan_graph, scorers, streams, texture, texture_kernel
from arrcoc.config import Config
from arrcoc.plan_graph import Judged, PlanGraphs
from arrcoc.records import Frame, Grid, Plan, Query, Relevance, Scores, Tensions

CONFIG = Config(cells=8)
CPU = torch.device("cpu")


def frame_of(rows: int = 3, cols: int = 4, tile: int = 32, seed: int = 0) -> Frame:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, rows * 2, cols * 2, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, (rows * tile, cols * tile), mode="bilinear")[0]
    pixels = (smooth + 30 * torch.randn(smooth.shape, generator=random)).clamp(0, 255).byte()
    background = torch.nn.functional.avg_pool2d(pixels[None].float(), 4)[0].round().byte()
    hashes = torch.zeros(rows * cols, 4, dtype=torch.int64)
    size = (rows * tile, cols * tile)
    return Frame(pixels, background, Grid(rows, cols, tile), hashes, size, size, 0.0, 1.0)


def moved(frame: Frame, device: torch.device) -> Frame:
    values = (getattr(frame, name) for name in frame.__slots__)
    return Frame(*(v.to(device) if isinstance(v, Tensor) else v for v in values))


def head_on(device: torch.device) -> scorers.TextureHead:
    torch.manual_seed(0)
    return scorers.TextureHead(12, width=16).requires_grad_(False).eval().to(device)


def query_on(device: torch.device, seed: int = 0) -> Query:
    embedding = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    return Query("?", (1,), embedding.to(device))


def staged(frame: Frame, head: scorers.Scorer, query: Query, config: Config = CONFIG) -> Judged:
    maps = texture.extract(frame, config)
    judges = (scorers.propositional, scorers.perspectival, head)
    found = streams.parallel([partial(judge, maps, query) for judge in judges], frame.pixels.device)
    return Judged(Scores(*found), opponent.balance(Scores(*found), config))


def same(found: Judged, expected: Judged, tolerance: float = 1e-5) -> None:
    for name in ("propositional", "perspectival", "participatory"):
        pair = getattr(found.scores, name).cpu(), getattr(expected.scores, name).cpu()
        torch.testing.assert_close(*pair, atol=tolerance, rtol=0)
    torch.testing.assert_close(
        found.relevance.map.cpu(), expected.relevance.map.cpu(), atol=10 * tolerance, rtol=0
    )
    tensions = [[float(t) for t in judged.relevance.tensions] for judged in (found, expected)]
    assert tensions[0] == pytest.approx(tensions[1], abs=10 * tolerance)


# Packing.


def test_unpacking_gives_what_was_packed() -> None:
    maps = torch.rand(4, 3, 5)
    judged = Judged(
        Scores(maps[0], maps[1], maps[2]), Relevance(maps[3], Tensions(torch.tensor(0.25), -1.0, 0.5))
    )
    packed = plan_graph.pack(judged)
    assert packed.shape == (4 * 15 + 3,)
    found = plan_graph.unpack(packed, Grid(3, 5, 32))
    same(found, judged, 0.0)
    assert found.relevance.tensions == (0.25, -1.0, 0.5)
    assert all(isinstance(t, float) for t in found.relevance.tensions)


def test_tensions_that_are_numbers_are_written_by_the_device() -> None:
    """Copying a number to a GPU makes the host wait."""
    maps = torch.rand(4, 2, 2)
    judged = Judged(Scores(*maps[:3]), Relevance(maps[3], Tensions(0.0, 0.5, -1.0)))
    with Watch() as watch, Reads(watch):
        packed = plan_graph.pack(judged)
    assert watch.waits == []
    assert packed[-3:].tolist() == [0.0, 0.5, -1.0]


def test_unpacking_another_grid_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError):
        plan_graph.unpack(torch.zeros(63), Grid(4, 5, 32))


# Which shapes are captured.


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Captures that only note their shape."""
    made: list[Any] = []

    def capture(shape: Any, **_: Any) -> Any:
        made.append(shape)
        return f"graph {len(made)}"

    monkeypatch.setattr(texture_kernel, "usable", lambda pixels: True)
    monkeypatch.setattr(plan_graph, "PlanGraph", capture)
    return made


def test_a_shape_is_captured_once_when_met_again(pretended: list[Any]) -> None:
    graphs = PlanGraphs(CONFIG, None, CPU)
    assert graphs.find(frame_of(2, 2)) is None
    assert graphs.find(frame_of(2, 3)) is None
    assert [graphs.find(frame_of(2, 2, seed=seed)) for seed in (1, 2)] == ["graph 1"] * 2
    assert pretended == [(Grid(2, 2, 32), 8)]
    assert graphs.describe() == "CUDA graphs (1 captured)"


def test_ahead_of_more_frames_the_first_is_captured(pretended: list[Any]) -> None:
    graphs = PlanGraphs(CONFIG, None, CPU)
    assert graphs.find(frame_of(2, 2), ahead=True) == "graph 1"
    assert graphs.find(frame_of(2, 2)) == "graph 1"
    assert len(pretended) == 1


def test_the_shape_unused_for_longest_goes_first(
    pretended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_graph, "SHAPES", 2)
    graphs = PlanGraphs(CONFIG, None, CPU)
    for cols in (1, 1, 2, 1, 3, 1):
        graphs.find(frame_of(1, cols))
    assert graphs.find(frame_of(1, 1)) == "graph 1"
    assert graphs.find(frame_of(1, 2)) is None, "it went when the third came"


def test_a_failed_capture_is_told_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def capture(shape: Any, **_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(texture_kernel, "usable", lambda pixels: True)
    monkeypatch.setattr(plan_graph, "PlanGraph", capture)
    graphs = PlanGraphs(CONFIG, None, CPU)
    with caplog.at_level(logging.WARNING):
        assert [graphs.find(frame_of()) for _ in range(4)] == [None] * 4
    assert tried == [1]
    assert graphs.describe() == "stage by stage (operation not permitted)"
    assert graphs.failure == "operation not permitted"
    assert [record.getMessage() for record in caplog.records] == [
        "the plan stage runs without CUDA graphs: operation not permitted"
    ]


def test_a_capture_without_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [torch.OutOfMemoryError("CUDA out of memory"), None]

    def capture(shape: Any, **_: Any) -> Any:
        if error := left.pop(0):
            raise error
        return "graph"

    monkeypatch.setattr(texture_kernel, "usable", lambda pixels: True)
    monkeypatch.setattr(plan_graph, "PlanGraph", capture)
    graphs = PlanGraphs(CONFIG, None, CPU)
    assert [graphs.find(frame_of()) for _ in range(4)] == [None, None, "graph", "graph"]
    assert not graphs.failure


def test_no_graphs_without_the_kernel() -> None:
    graphs = PlanGraphs(CONFIG, None, CPU)
    assert [graphs.find(frame_of()) for _ in range(3)] == [None] * 3


# The host waits once.

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2",
    "_to_copy", "lift_fresh", "bincount", "repeat_interleave",
}  # fmt: skip
"""What on CUDA makes the host wait, by itself or by a copy; `lift_fresh` is `torch.tensor` of numbers."""
READS = {"cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}


class Watch(TorchDispatchMode):
    """Notes operators that wait, up to the first copy to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        cast = name == "_to_copy" and kwargs.get("device") is None
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if not self.copies and (masked or (name in WAITS and not cast)):
            self.waits.append(name)
        return func(*args, **kwargs)


class Reads(TorchFunctionMode):
    """Notes what reads a tensor on the host: on the CPU copying is no operator."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "cpu":
            self.watch.copies += 1
        elif name in READS and not self.watch.copies:
            self.watch.waits.append(name)
        return func(*args, **(kwargs or {}))


def planned(frame: Frame, head: scorers.TextureHead, query: Query) -> Plan:
    """From the frame to the plan, stage by stage."""
    return allocation.plan(staged(frame, head, query).relevance, frame.grid, CONFIG, 200)


def test_nothing_waits_between_frame_and_plan_but_one_copy() -> None:
    frame, head, query = frame_of(), head_on(CPU), query_on(CPU)
    with torch.inference_mode():
        planned(frame, head, query)  # constants are made once
        with Watch() as watch, Reads(watch):
            planned(frame, head, query)
    assert watch.waits == []
    assert watch.copies == 1


@pytest.mark.parametrize(
    "bad",
    [
        lambda t: torch.tensor([1.0, 2.0]),
        lambda t: t[t > 0],
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: (t > 0).nonzero(),
    ],
)
def test_the_watch_sees_waits(bad: Callable[[Tensor], object]) -> None:
    with Watch() as watch, Reads(watch):
        bad(torch.ones(3))
    assert watch.waits


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["stages", "graph", "beside a scorer"])
def test_the_host_waits_once_on_cuda(way: str) -> None:
    device = torch.device("cuda")
    frame, head, query = moved(frame_of(), device), head_on(device), query_on(device)
    graphs = PlanGraphs(CONFIG, head if way == "graph" else None, device)

    def run() -> Plan:
        if way == "stages":
            return planned(frame, head, query)
        graph = graphs.find(frame) or graphs.find(frame)
        assert graph is not None, graphs.failure
        maps = texture.extract(frame, CONFIG)
        look = None if way == "graph" else partial(head, maps, query)
        judged = graph.judge(frame, query, look)
        return allocation.plan(judged.relevance, frame.grid, CONFIG, 200)

    with torch.inference_mode():
        expected = run()
        with counted_waits() as waits:
            found = run()
    assert len(waits) == 1, waits
    assert torch.equal(found.lod, expected.lod)


# Graphs give what stages give.


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", [False, True])
def test_a_graph_serves_every_frame_and_question_of_its_shape(parallel: bool) -> None:
    device = torch.device("cuda")
    head = head_on(device)
    graphs = PlanGraphs(CONFIG, head, device, parallel)
    graphs.find(moved(frame_of(), device))
    for seed in range(4):
        frame, query = moved(frame_of(seed=seed), device), query_on(device, seed)
        graph = graphs.find(frame)
        assert graph is not None, graphs.failure
        same(graph.judge(frame, query), staged(frame, head, query))
        same(graph.judge(frame, query), staged(frame_of(seed=seed), head_on(CPU), query_on(CPU, seed)), 2e-3)


@pytest.mark.gpu
def test_query_free_graph_beside_a_scorer() -> None:
    device = torch.device("cuda")
    head, graphs = head_on(device), PlanGraphs(CONFIG, None, device)
    graphs.find(moved(frame_of(), device))
    for seed in range(3):
        frame, query = moved(frame_of(seed=seed), device), query_on(device, seed)
        graph, maps = graphs.find(frame), texture.extract(frame, CONFIG)
        assert graph is not None, graphs.failure
        expected = staged(frame, head, query)
        same(graph.judge(frame, query, partial(head, maps, query)), expected)
        free = expected.scores.propositional, expected.scores.perspectival
        same(graph.weigh(free, expected.scores.participatory), expected)


@pytest.mark.gpu
def test_threads_share_a_graph() -> None:
    device = torch.device("cuda")
    head = head_on(device)
    graphs = PlanGraphs(CONFIG, head, device)
    graphs.find(moved(frame_of(), device))
    graph = graphs.find(moved(frame_of(), device))
    assert graph is not None, graphs.failure
    work = [(moved(frame_of(seed=seed), device), query_on(device, seed)) for seed in range(6)]
    expected = [staged(frame, head, query) for frame, query in work]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(20):
                found = graph.judge(*work[number])
                difference = found.relevance.map - expected[number].relevance.map.cpu()
                if float(difference.abs().max()) > 1e-4:
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
