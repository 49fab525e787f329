"""Small tensors from the host to the device without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, in order with the current stream's work.

    A copy from pageable memory waits until the stream has done everything before it; from pinned memory
    it does not. PyTorch's host allocator keeps the pinned copy until the transfer is over.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class Arrival:
    """A tensor on its way to the host, for whoever needs it later. Threads may share it."""

    def __init__(self, tensor: Tensor) -> None:
        """Send it off, after the current stream's work so far; nothing waits."""
        self._host, self._sent = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._sent = torch.cuda.current_stream(tensor.device).record_event()

    def get(self) -> Tensor:
        """The tensor on the CPU; waits until it is there."""
        if self._sent is not None:
            self._sent.synchronize()
            self._host = self._host.clone()  # pinned memory is scarce
            self._sent = None
        return self._host
