"""Order between CUDA streams that use one buffer; on other devices there is nothing to order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Ready(NamedTuple):
    """When data is there: after `event`, which was recorded on the stream with this handle."""

    stream: int
    event: torch.cuda.Event


class Fences:
    """The last use of a buffer on every CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        """Args: the device whose streams are meant."""
        self._cuda = device if device.type == "cuda" else None
        self._last: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}

    def wait(self) -> None:
        """Let the current stream go on only after every use so far on other streams: before writing."""
        if self._cuda is None:
            return
        current = torch.cuda.current_stream(self._cuda)
        for handle, (_, event) in self._last.items():
            if handle != current.cuda_stream:
                current.wait_event(event)

    def mark(self) -> Ready | None:
        """Remember that the current stream has used the buffer; returns when that will be done."""
        if self._cuda is None:
            return None
        current = torch.cuda.current_stream(self._cuda)
        event = current.record_event()
        self._last[current.cuda_stream] = current, event
        return Ready(current.cuda_stream, event)

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor that is about to be dropped until every use so far is over."""
        for stream, _ in self._last.values():
            tensor.record_stream(stream)


def await_all(ready: Iterable[Ready | None], device: torch.device) -> None:
    """Let the current stream of a CUDA device go on only when all of `ready` has happened."""
    distinct = {id(one): one for one in ready if one is not None}
    if not distinct:
        return
    current = torch.cuda.current_stream(device)
    for one in distinct.values():
        if one.stream != current.cuda_stream:
            current.wait_event(one.event)


def upload(values: Sequence[int] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Indices as int64 on the device, without the host waiting for it."""
    found = torch.tensor(values, dtype=torch.int64)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
