"""Work that is launched as a CUDA graph of its own for each shape of its inputs that is met again."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from arrcoc.capture import captured
from arrcoc.errors import first_line

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

Tensors = tuple[Tensor, ...]


class StaticWork(Protocol):
    """Work of one shape: its inputs lie where they are."""

    @property
    def inputs(self) -> Tensors:
        """What is written before `compute`."""
        ...

    def compute(self) -> Tensors:
        """Read the inputs, launch everything on the current stream, return new tensors; nothing waits."""
        ...


W = TypeVar("W", bound=StaticWork)


@dataclass(frozen=True, slots=True)
class _Captured(Generic[W]):
    work: W
    graph: torch.cuda.CUDAGraph
    found: Tensors

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self.work.inputs, *self.found))


class ShapeGraphs(Generic[W]):
    """Graphs by shape, of which one runs at a time and all share memory. Threads may share an object.

    The first time that a shape is met it is left to the caller, the second time it is captured: what is never
    met again takes no memory, and what a capture needs compiled has run. Where there is no CUDA, everything
    is left to the caller.
    """

    def __init__(self, device: torch.device, purpose: str, keep_bytes: int, keep_shapes: int = 32) -> None:
        """Prepare; nothing is allocated or captured yet.

        Args:
            device: where the work runs.
            purpose: what runs without graphs if they fail, for the log: "glimpses are encoded".
            keep_bytes: most bytes of inputs and results that are kept; one shape alone may exceed it.
            keep_shapes: most shapes, whose graphs take memory too.
        """
        self._device, self._purpose = device, purpose
        self._keep_bytes, self._keep_shapes = keep_bytes, keep_shapes
        self._lock = threading.Lock()
        self._shapes: OrderedDict[Hashable, _Captured[W] | None] = OrderedDict()
        self.failure, self.captures = "", device.type == "cuda"
        if self.captures:
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            # A pool whose graphs are all gone cannot be used again: the first one stays.
            self._first: torch.cuda.CUDAGraph | None = None

    def describe(self) -> str:
        """How the work is launched, in words."""
        if not self.captures:
            return "not captured"
        if self.failure:
            return f"no CUDA graphs ({self.failure})"
        with self._lock:
            return f"CUDA graphs ({sum(made is not None for made in self._shapes.values())} captured)"

    def run(
        self,
        shape: Hashable,
        make: Callable[[], W],
        load: Callable[[W], object],
        take: Callable[[W, Tensors], T],
    ) -> T | None:
        """Do the work for inputs of a shape, on the current stream, after that of other threads.

        Args:
            shape: all that decides what is launched.
            make: allocates what the shape needs.
            load: writes the inputs.
            take: copies the work's results, which the next run overwrites.

        Returns:
            What `take` makes; None where the caller is to do the work.
        """
        if not self.captures:
            return None
        with self._turn():
            met, held = shape in self._shapes, self._shapes.get(shape)
            self._shapes[shape] = held
            self._shapes.move_to_end(shape)
            self._shrink()
            if held is not None:
                load(held.work)
                held.graph.replay()
                return take(held.work, held.found)
            if not met or self.failure:
                return None
            return self._rehearse_and_capture(shape, make, load, take)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Issue work on the shared memory after that of other threads, on the caller's stream."""
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._used)
            try:
                yield
            finally:
                self._used.record(stream)

    def _rehearse_and_capture(
        self,
        shape: Hashable,
        make: Callable[[], W],
        load: Callable[[W], object],
        take: Callable[[W, Tensors], T],
    ) -> T | None:
        """Run once directly, on the very memory that is captured; None where there is too little of it."""
        try:
            work = make()
            load(work)
            found = take(work, work.compute())
        except torch.OutOfMemoryError:
            del self._shapes[shape]
            return None
        try:
            graph, results = captured(work.compute, self._device, self._pool)
        except torch.OutOfMemoryError:  # another time there may be enough
            del self._shapes[shape]
        except RuntimeError as error:
            self.failure = first_line(error)
            _LOG.warning("%s without CUDA graphs: %s", self._purpose, self.failure)
        else:
            self._first = self._first or graph
            self._shapes[shape] = _Captured(work, graph, results)
            self._shrink()
        return found

    def _shrink(self) -> None:
        """Let go of what was unused for longest, beyond the bounds."""
        while len(self._shapes) > 1 and (
            len(self._shapes) > self._keep_shapes or self._bytes() > self._keep_bytes
        ):
            _, old = self._shapes.popitem(last=False)
            if old is not None:
                self._used.synchronize()  # its memory may go to another stream at once

    def _bytes(self) -> int:
        return sum(made.nbytes for made in self._shapes.values() if made is not None)
