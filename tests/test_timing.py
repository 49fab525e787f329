import time

import pytest
import torch

from arrcoc import timing
from arrcoc.timing import StageTimer


class FakeEvent:
    """A CUDA event on a clock that goes on by 10 ms with every record."""

    now = 0.0
    waits: list["FakeEvent"] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self, stream: object) -> None:
        assert stream == "stream of cuda:1"
        FakeEvent.now += 10
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.waits.append(self)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.waits, "times are read only after waiting"
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEvent.now, FakeEvent.waits = 0.0, []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the whole device"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    return now


def test_cpu_stages_in_order_repeats_add_and_total_spans_gaps(clock: list[float]) -> None:
    timer = StageTimer("cpu")
    for name, seconds, gap in [("texture", 0.5, 0.25), ("scorers", 2.0, 0.0), ("texture", 1.0, 0.0)]:
        with timer.stage(name):
            clock[0] += seconds
        clock[0] += gap
    clock[0] += 50  # what comes after the last stage is nobody's time
    times = timer.milliseconds()
    assert list(times) == ["texture", "scorers", "total"]
    # texture 0.5 + 1.0, scorers 2.0, total 0.5 + 0.25 + 2.0 + 1.0 seconds
    assert times == pytest.approx({"texture": 1500, "scorers": 2000, "total": 3750})
    assert timer.milliseconds() == times


def test_cpu_clock_is_wall_time() -> None:
    timer = StageTimer()
    with timer.stage("sleep"):
        time.sleep(0.02)
    times = timer.milliseconds()
    assert 20 <= times["sleep"] == times["total"] < 1000


def test_no_stage_takes_no_time() -> None:
    assert StageTimer().milliseconds() == {"total": 0.0}


def test_cuda_waits_once_for_the_last_event(fake_cuda: None) -> None:
    timer = StageTimer("cuda:1")
    for name in ("a", "b", "a"):
        with timer.stage(name):
            pass
    assert FakeEvent.waits == []
    # Records at 10 20, 30 40, 50 60: each stage 10 ms, a twice; first begin to last end 50 ms.
    assert timer.milliseconds() == {"a": 20, "b": 10, "total": 50}
    assert [event.at for event in FakeEvent.waits] == [60]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_measures_the_device_not_the_launch() -> None:
    timer = StageTimer("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with timer.stage("product"):
        for _ in range(20):
            x = x @ x * 1e-3
    times = timer.milliseconds()
    elapsed = (time.perf_counter() - begin) * 1e3
    assert 0.5 * elapsed < times["product"] <= elapsed * 1.05
    assert times["total"] == times["product"]


def test_stages_do_not_nest() -> None:
    timer = StageTimer()
    with (
        timer.stage("outer"),
        pytest.raises(AssertionError, match="'inner' inside stage 'outer'"),
        timer.stage("inner"),
    ):
        pass
    assert list(timer.milliseconds()) == ["outer", "total"]


def test_times_are_not_read_inside_a_stage() -> None:
    timer = StageTimer()
    with timer.stage("outer"), pytest.raises(AssertionError, match="'outer' has not ended"):
        timer.milliseconds()


def test_total_is_reserved() -> None:
    with pytest.raises(AssertionError, match="names the whole time"), StageTimer().stage("total"):
        pass


def test_a_stage_that_raises_is_timed_and_closed(clock: list[float]) -> None:
    timer = StageTimer()

    def broken() -> None:
        clock[0] += 1
        raise KeyError("x")

    with pytest.raises(KeyError), timer.stage("broken"):
        broken()
    with timer.stage("next"):
        clock[0] += 2
    assert timer.milliseconds() == pytest.approx({"broken": 1000, "next": 2000, "total": 3000})
