"""Independent tasks side by side: on CUDA each on a stream of its own, elsewhere one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TypeVar

import torch
from torch import Tensor

from arrcoc.capture import PRIORITY

T = TypeVar("T")


class _StreamPool(threading.local):
    """Side streams by CUDA device. Each thread has its own pool, so two threads never share a stream."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[torch.cuda.Stream]] = {}

    def take(self, index: int, count: int) -> list[torch.cuda.Stream]:
        """The calling thread's first `count` side streams of a device, made once and kept.

        Inside a capture they are of a kind that nothing else works on: see `arrcoc.capture.PRIORITY`.
        """
        priority = PRIORITY if torch.cuda.is_current_stream_capturing() else 0
        streams = self._kept.setdefault((index, priority), [])
        while len(streams) < count:
            streams.append(torch.cuda.Stream(index, priority=priority))  # type: ignore[no-untyped-call]
        return streams[:count]


_POOL = _StreamPool()


def parallel(tasks: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Run tasks that do not depend on one another; return their results in order.

    On CUDA every task is issued on its own stream. All start after the work already on the caller's
    stream, and the caller's stream waits for all of them: later work on it may use the results. The host
    never waits. Tensors in the results (also inside dataclasses, sequences and mappings) are marked as
    used by the caller's stream, so that their memory is not reused too early. On other devices the tasks
    run in sequence.

    Raises:
        Whatever a task raises, at once: later tasks are not started, and the caller's stream waits for
        those that were.
    """
    if device.type != "cuda":
        return [task() for task in tasks]
    index = torch.cuda.current_device() if device.index is None else device.index
    caller = torch.cuda.current_stream(index)
    with _forked(caller, _POOL.take(index, len(tasks))) as streams:
        results = [_run_on(stream, task) for stream, task in zip(streams, tasks, strict=True)]
    for tensor in _tensors(results):
        if tensor.is_cuda:
            tensor.record_stream(caller)
    return results


@contextmanager
def _forked(caller: torch.cuda.Stream, streams: list[torch.cuda.Stream]) -> Iterator[list[torch.cuda.Stream]]:
    """Let `streams` start after the caller's work so far, and the caller go on after theirs."""
    start = caller.record_event()
    for stream in streams:
        stream.wait_event(start)
    try:
        yield streams
    finally:
        for stream in streams:
            caller.wait_event(stream.record_event())


def _run_on(stream: torch.cuda.Stream, task: Callable[[], T]) -> T:
    with torch.cuda.stream(stream):
        return task()


def _tensors(value: object) -> Iterator[Tensor]:
    """Every tensor inside nested dataclasses, mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
