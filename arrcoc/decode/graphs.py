"""Work captured once in a CUDA graph and replayed; called directly where there is no CUDA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from arrcoc.capture import captured
from arrcoc.errors import first_line

_LOG = logging.getLogger(__name__)


@dataclass
class Captures:
    """Whether work is captured; shared by all memory of one decoder.

    Attributes:
        wanted: whether it is tried.
        failure: why it is no longer tried; empty while it is.
    """

    wanted: bool
    failure: str = ""

    @classmethod
    def on(cls, device: torch.device) -> Captures:
        """Wanted where it can be done."""
        return cls(device.type == "cuda")

    def describe(self) -> str:
        """How work is launched, in words."""
        if not self.wanted:
            return "not captured"
        return f"no CUDA graphs ({self.failure})" if self.failure else "CUDA graphs"

    def fail(self, error: RuntimeError) -> None:
        """Try no more, and tell so once."""
        if not self.failure:
            self.failure = first_line(error)
            _LOG.warning("decoding runs without CUDA graphs: %s", self.failure)


class Memory(Protocol):
    """Static memory that captured work reads and writes; see `arrcoc.decode.slots.Slot`."""

    kv: Tensor
    generator: torch.Generator
    graphs: dict[str, Any]
    pool: Any
    captures: Captures

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        """What work changes that must be put back after a rehearsal."""
        ...


def run_captured(slot: Memory, name: str, work: Callable[[], None]) -> None:
    """Do `work` on a slot: from its graph `name`, which the first call captures.

    Before it is captured the work runs once on its own, so that whatever it compiles or loads is there; the
    slot's scalars and its generator are put back afterwards. Work that cannot be captured is called directly.
    """
    if not slot.captures.wanted:
        work()
        return
    with torch.cuda.device(slot.kv.device):
        if name not in slot.graphs:
            slot.graphs[name] = None if slot.captures.failure else _capture(slot, name, work)
        graph = slot.graphs[name]
        if graph is None:
            work()
        else:
            graph.replay()


def _capture(slot: Memory, name: str, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """A graph of the work; None where CUDA refuses it or there is too little memory."""
    _rehearse(slot, work)
    random = slot.generator.get_state()
    try:
        return captured(work, slot.kv.device, slot.pool, slot.generator)[0]
    except torch.OutOfMemoryError as error:  # other slots may be smaller
        _LOG.warning("%s runs without a CUDA graph: %s", name, error)
    except RuntimeError as error:
        slot.captures.fail(error)
    # A generator that took part in a failed capture draws no more, nor does any graph that it is part of.
    torch.cuda.current_stream(slot.kv.device).synchronize()
    slot.graphs.update(dict.fromkeys(slot.graphs))
    slot.pool = torch.cuda.graph_pool_handle()
    slot.generator = torch.Generator(device=slot.kv.device)
    slot.generator.set_state(random)
    return None


def _rehearse(slot: Memory, work: Callable[[], None]) -> None:
    kept, random = [scalar.clone() for scalar in slot.scalars], slot.generator.get_state()
    work()
    for scalar, value in zip(slot.scalars, kept, strict=True):
        scalar.copy_(value)
    slot.generator.set_state(random)
