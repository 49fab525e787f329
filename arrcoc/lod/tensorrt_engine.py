"""Binds torch tensors to a plan: in the caller's stream's order, no copies, outputs of the caller's own."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from arrcoc.lod.export import INPUTS, OUTPUTS
from arrcoc.lod.plan import Plan
from arrcoc.lod.tower import Geometry
from arrcoc.records import Features

_OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Scratch:
    """Device memory for the activations of all profiles of a plan, of which one runs at a time.

    Its contents are overwritten by the next call, whatever stream that comes on. So all work goes through
    one stream: calls wait for one another on the device, never on the host. It is a stream of its own also
    because TensorRT adds waits where it is given CUDA's default stream.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Args: a plan on `device`."""
        most = max(plan.scratch_bytes(profile) for profile in range(plan.n_profiles))
        self.memory = torch.empty(max(most, 1), dtype=torch.uint8, device=device)
        self.lock = threading.Lock()
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(device))  # where the memory may still be in use
        self.memory.record_stream(self.stream)


class PlanRunner:
    """One optimisation profile of a plan, with an execution context of its own, over shared memory."""

    def __init__(self, plan: Plan, profile: int, device: torch.device, scratch: Scratch) -> None:
        """Args: a plan on `device`, which of its profiles, and the plan's scratch memory."""
        assert set(plan.inputs) == set(INPUTS), plan.inputs
        assert set(plan.outputs) == set(OUTPUTS), plan.outputs
        self._plan, self._device, self._scratch = plan, device, scratch
        with torch.cuda.device(device):
            self._context = plan.context(profile, scratch.stream.cuda_stream, scratch.memory.data_ptr())

    def __call__(self, patches: Tensor, shape: Geometry) -> Features:
        """Enqueue in the current stream's order; see `Runner`."""
        inputs = dict(zip(INPUTS, (patches, *shape), strict=True))
        assert all(tensor.is_contiguous() for tensor in inputs.values())
        with self._scratch.lock, torch.cuda.device(self._device):
            caller, stream = torch.cuda.current_stream(self._device), self._scratch.stream
            shapes = self._context.bind({name: tuple(tensor.shape) for name, tensor in inputs.items()})
            # New memory for each call: what is returned may be cached, and is never written again. Inputs and
            # outputs are of the caller's stream, which waits for the plan: none is reused too early.
            outputs = {name: self._empty(name, shapes[name]) for name in OUTPUTS}
            stream.wait_stream(caller)
            addresses = {name: tensor.data_ptr() for name, tensor in (inputs | outputs).items()}
            self._context.enqueue(addresses, stream.cuda_stream)
            caller.wait_stream(stream)
        return Features(outputs["tokens"], outputs["deepstack"])

    def _empty(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=_OUTPUT_DTYPES[self._plan.dtype(name)], device=self._device)
