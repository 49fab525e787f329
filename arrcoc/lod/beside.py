"""Graphs of fixed shape that a build holds beside the tower: export, check, and running them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arrcoc.errors import EngineBuildError
from arrcoc.lod.export import OPSET, forget_origins, quiet, relative_error, require
from arrcoc.lod.plan import Plan

LIMIT = 1e-4
"""Largest relative error of an output under ONNX Runtime against torch."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A module to export.

    Attributes:
        name: of its file, without suffix.
        module: in eval mode, on the CPU.
        inputs: examples by name, of the shapes that it is exported for.
        outputs: names of its outputs.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


@torch.no_grad()
def export(graph: Beside, path: Path) -> None:
    """Write a module as ONNX and check it under ONNX Runtime where that is installed.

    Raises:
        EngineBuildError: onnx or onnxscript is missing, the exporter refused the graph, or it computes
            something else.
    """
    onnx, _ = require("onnx", "onnxscript")
    expected = graph.module(*graph.inputs.values())  # also makes what is kept between calls, as real tensors

    options: dict[str, Any] = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
    options |= {"dynamo": True, "opset_version": OPSET, "external_data": False}
    try:
        with quiet():
            torch.onnx.export(graph.module, tuple(graph.inputs.values()), path, **options)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        given = f"{graph.name}, which the ONNX exporter of torch {torch.__version__} refused: {reason}"
        raise EngineBuildError(given, "a graph it takes", "Leave the plan stage out") from error
    model = onnx.load(path)
    forget_origins(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    _check(graph, path, expected)


def _check(graph: Beside, path: Path, expected: Sequence[Tensor]) -> None:
    found = OnnxGraph(path)(*graph.inputs.values())
    for name, one, other in zip(graph.outputs, found, expected, strict=True):
        error = relative_error(one, other)
        if not error <= LIMIT:
            given = f"{graph.name}, whose {name} differs from torch by {error:.1e} relative"
            remedy = "Try another version of torch or onnxruntime"
            raise EngineBuildError(given, f"at most {LIMIT:.0e}", remedy)


class OnnxGraph:
    """A graph under ONNX Runtime on the CPU; threads may share it."""

    def __init__(self, source: Path | bytes) -> None:
        """Load a graph that `export` wrote, from its file or its bytes.

        Raises:
            EngineBuildError: onnxruntime is not installed.
        """
        (ort,) = require("onnxruntime")
        options, model = ort.SessionOptions(), source if isinstance(source, bytes) else str(source)
        options.intra_op_num_threads = torch.get_num_threads()
        self._session: Any = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the graph's order, on the first input's device."""
        feeds = {
            name: t.detach().cpu().contiguous().numpy() for name, t in zip(self._inputs, inputs, strict=True)
        }
        return tuple(torch.from_numpy(array).to(inputs[0].device) for array in self._session.run(None, feeds))


class PlanGraphRunner:
    """A graph of fixed shape as a plan of TensorRT or TensorRT-RTX, with fp32 outputs."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Args: a plan on `device`."""
        self._plan, self._device, self._lock = plan, device, threading.Lock()
        with torch.cuda.device(device):
            self._scratch = torch.empty(max(plan.scratch_bytes(0), 1), dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream(device)
            self._context = plan.context(0, stream.cuda_stream, self._scratch.data_ptr())
            stream.synchronize()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Enqueue on the current stream; outputs in the graph's order, in memory of their own."""
        dense = {name: t.contiguous() for name, t in zip(self._plan.inputs, inputs, strict=True)}
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            shapes = self._context.bind({name: tuple(tensor.shape) for name, tensor in dense.items()})
            made = {name: torch.empty(shapes[name], device=self._device) for name in self._plan.outputs}
            stream.wait_event(self._done)
            addresses = {name: tensor.data_ptr() for name, tensor in (dense | made).items()}
            self._context.enqueue(addresses, stream.cuda_stream)
            self._done.record(stream)
        return tuple(made.values())
