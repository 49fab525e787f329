"""Time per stage, on the clock of the device that does the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any, Protocol

import torch

TOTAL = "total"
"""Key under which `StageTimer.milliseconds` reports the whole time."""


class _Mark(Protocol):
    """A point on a device's time line, with the calls of `torch.cuda.Event`."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class _HostMark:
    """A point on the host's clock."""

    def __init__(self) -> None:
        self.seconds = perf_counter()

    def record(self, stream: object) -> None:
        """Nothing to do: the mark is the moment it was made."""

    def synchronize(self) -> None:
        """Nothing to wait for: the host has passed this point."""

    def elapsed_time(self, end_event: _HostMark) -> float:
        """Milliseconds from this mark to `end_event`."""
        return (end_event.seconds - self.seconds) * 1e3


@dataclass(frozen=True, slots=True)
class _Span:
    name: str
    begin: _Mark
    end: _Mark


class StageTimer:
    """Times the stages of one request, which run one after another on one stream.

    On CUDA a stage is a pair of events on the stream that is current where it begins and ends: nothing
    waits until `milliseconds` is called. Elsewhere it is the host's `perf_counter`. Not thread-safe: make
    one for each request.

    Args:
        device: where the stages' work runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._spans: list[_Span] = []
        self._running: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`; a repeated name adds up. A body that raises is timed too.

        Stages do not nest, and none is called "total": both are assertions.
        """
        assert self._running is None, f"stage {name!r} inside stage {self._running!r}"
        assert name != TOTAL, f"{TOTAL!r} names the whole time"
        self._running, begin = name, self._mark()
        try:
            yield
        finally:
            self._spans.append(_Span(name, begin, self._mark()))
            self._running = None

    def __len__(self) -> int:
        """Number of stages run so far, repeats counted."""
        return len(self._spans)

    def milliseconds(self, *runs: slice) -> dict[str, float]:
        """Milliseconds by stage, in the order in which the stages first ran, and "total" last.

        The total runs from the beginning of the first stage to the end of the last one, so it also holds
        what happened between stages. Waits once, for the end of the last stage; asking again gives the
        same numbers.

        Args:
            runs: of the stages in the order in which they ran, the parts to report, for one of several
                pieces of work in a request; the total is then the sum over them. None reports all.
        """
        assert self._running is None, f"stage {self._running!r} has not ended"
        parts = [spans for run in runs or (slice(None),) if (spans := self._spans[run])]
        if parts:
            self._spans[-1].end.synchronize()
        times: dict[str, float] = {}
        for span in chain.from_iterable(parts):
            times[span.name] = times.get(span.name, 0.0) + span.begin.elapsed_time(span.end)
        total = sum((spans[0].begin.elapsed_time(spans[-1].end) for spans in parts), 0.0)
        return times | {TOTAL: total}

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return _HostMark()
        event: _Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
