"""Capturing CUDA graphs while other threads go on working."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_one_at_a_time = threading.Lock()


def captured(
    run: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture what `run` launches, between the current stream's work before and after.

    Args:
        run: reads and writes fixed memory only; has run before, so that its kernels are compiled and loaded.
        stream: captured on; not the current stream.
        pool: memory shared with other graphs, none of which runs at the same time.

    Returns:
        The graph, and what `run` returned, which a replay writes anew.

    Raises:
        RuntimeError: CUDA refuses something that `run` does.
    """
    caller, graph = torch.cuda.current_stream(stream.device), torch.cuda.CUDAGraph()
    stream.wait_stream(caller)
    # Not by torch.cuda.graph, which empties the allocator's cache and stops every other thread's capture.
    with _one_at_a_time, torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            found = run()
        finally:
            graph.capture_end()
    caller.wait_stream(stream)
    return graph, found
