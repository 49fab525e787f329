"""Runs an exported tower with ONNX Runtime on the CPU: the numeric reference of built engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arrcoc.lod.export import INPUTS, OUTPUTS, require
from arrcoc.lod.tower import Geometry
from arrcoc.records import Features


class OnnxRunner:
    """One session for all LODs of a build; threads may share it."""

    def __init__(self, path: Path) -> None:
        """Load a graph that `export` wrote.

        Raises:
            EngineBuildError: onnxruntime is not installed.
        """
        (ort,) = require("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.version = str(ort.__version__)

    def __call__(self, patches: Tensor, shape: Geometry) -> Features:
        """Encode patches [B, N, P]; tensors of another device are copied to the CPU and back."""
        tensors = (patches, *shape)
        feeds = {name: t.detach().cpu().numpy() for name, t in zip(INPUTS, tensors, strict=True)}
        tokens, planes = self._session.run(list(OUTPUTS), feeds)
        device = patches.device
        return Features(torch.from_numpy(tokens).to(device), torch.from_numpy(planes).to(device))
