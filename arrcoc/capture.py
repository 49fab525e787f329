"""Capturing CUDA graphs while other threads go on working."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")

PRIORITY = -1
"""Of the streams that are captured on, and of no others: PyTorch hands out 32 streams of each priority, then
the same ones again, so a stream of the usual priority may at any time become another thread's."""

_one_at_a_time = threading.RLock()  # reentrant, so that a capture inside a capture fails instead of waiting
_streams: dict[int, torch.cuda.Stream] = {}
_spoilt: list[torch.cuda.CUDAGraph] = []


def captured(
    run: Callable[[], T],
    device: torch.device,
    pool: Any = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture what `run` launches, between the current stream's work before and after.

    One capture at a time in the whole process; other threads go on launching and allocating meanwhile.

    Args:
        run: reads and writes fixed memory only; has run before, so that its kernels are compiled and loaded.
        device: a CUDA device.
        pool: memory shared with other graphs, none of which runs at the same time.
        generator: what `run` draws random numbers from, if it draws any; each replay draws new ones.

    Returns:
        The graph, and what `run` returned, which a replay writes anew.

    Raises:
        RuntimeError: CUDA refuses something that `run` does, or there is too little memory
            (torch.OutOfMemoryError); captures go on being possible.
    """
    with _one_at_a_time, torch.cuda.device(device), _no_collection():
        index = torch.cuda.current_device()
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(index, priority=PRIORITY)  # type: ignore[no-untyped-call]
        caller, stream = torch.cuda.current_stream(index), _streams[index]
        assert caller != stream, "a capture inside a capture"
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                made = _capture(run, pool or torch.cuda.graph_pool_handle(), generator)
        finally:
            # cuBLAS's scratch memory belongs to the stream that it was first used on. The next graph needs
            # its own, as both may run at the same time; this graph's stays in its pool.
            torch._C._cuda_clearCublasWorkspaces()
        caller.wait_stream(stream)
    return made


def _capture(
    run: Callable[[], T], pool: Any, generator: torch.Generator | None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture on the current stream."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        # Not by torch.cuda.graph, which empties the allocator's cache and stops other threads' captures.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        found = run()
    except BaseException:
        with suppress(RuntimeError):  # the first error says more
            graph.capture_end()
        _give_up(graph, pool)
        raise
    try:
        graph.capture_end()
    except RuntimeError:
        _give_up(graph, pool)
        raise
    return graph, found


def _give_up(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Have the allocator forget a failed capture, which PyTorch leaves under way.

    Else it would never again reuse memory that several streams have worked on. The graph stays, because
    PyTorch's allocator of pinned memory may go on asking it.
    """
    with suppress(RuntimeError):  # where the capture ended properly
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    _spoilt.append(graph)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No cyclic garbage collection: what it frees may call CUDA in ways that a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
