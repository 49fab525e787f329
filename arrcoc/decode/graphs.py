"""Work captured once in a CUDA graph and replayed; called directly where there is no CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_capturing = threading.Lock()


class Memory(Protocol):
    """Static memory that captured work reads and writes; see `arrcoc.decode.slots.Slot`."""

    kv: Tensor
    generator: torch.Generator
    graphs: dict[str, Any]
    pool: Any

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        """What work changes that must be put back after a rehearsal."""
        ...


def run_captured(slot: Memory, name: str, work: Callable[[], None]) -> None:
    """Do `work` on a slot: from its graph `name`, which the first call captures.

    Before it is captured the work runs once on its own, so that whatever it compiles or loads is there; the
    slot's scalars and its generator are put back afterwards.
    """
    if slot.kv.device.type != "cuda":
        work()
        return
    with torch.cuda.device(slot.kv.device):
        if name not in slot.graphs:
            slot.graphs[name] = _capture(slot, work)
        slot.graphs[name].replay()


def _capture(slot: Memory, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    device = slot.kv.device
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    _rehearse(slot, work)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(slot.generator)
    stream.wait_stream(current)
    # One capture at a time; thread-local, so that other threads may go on allocating.
    with _capturing, torch.cuda.stream(stream):
        graph.capture_begin(pool=slot.pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph


def _rehearse(slot: Memory, work: Callable[[], None]) -> None:
    kept, random = [scalar.clone() for scalar in slot.scalars], slot.generator.get_state()
    work()
    for scalar, value in zip(slot.scalars, kept, strict=True):
        scalar.copy_(value)
    slot.generator.set_state(random)
