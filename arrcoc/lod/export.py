"""The static tower as an ONNX graph, and the check that a graph computes what the tower does."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arrcoc.errors import EngineBuildError
from arrcoc.lod.float8_graph import in_float8, translations
from arrcoc.lod.tower import Geometry, StaticTower, geometry
from arrcoc.vision import VisionWeights

INPUTS = ("patches", "positions", "cos", "sin")
OUTPUTS = ("tokens", "deepstack")

OPSET = 18
FLOAT8_OPSET = 21
"""The first whose quantising operators take fp16 and float8 together."""
_SCALE_NODES = ("Sqrt", "Cast", "Div")
LEGACY_OPSET = 17
"""What TensorRT 8.6 reads; written by the tracing exporter, since the dynamo one begins at 18."""


class _Exportable(nn.Module):
    """A static tower whose weights are registered, so that exporters see parameters and not constants."""

    def __init__(self, tower: StaticTower) -> None:
        super().__init__()
        self.tower = tower
        weights = tower.weights
        mergers = [weights.merger, *weights.deepstack.values()]
        parts = [part for block in weights.blocks for part in block]
        parts += [part for m in mergers for part in (m.norm, m.fc1, m.activation, m.fc2)]
        self.parts = nn.ModuleList(parts)
        self.register_buffer("patch_weight", weights.patch_weight)
        self.register_buffer("patch_bias", weights.patch_bias)

    def forward(self, patches: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `StaticTower.forward`."""
        tokens, planes = self.tower(patches, positions, cos, sin)
        return tokens, planes


def patch_count(weights: VisionWeights, side: int, halo: int = 0) -> int:
    """N, patches of a tile of side x side tokens with a margin of `halo` tokens around it."""
    return (weights.merge * (side + 2 * halo)) ** 2


def export(tower: StaticTower, path: Path, opset: int = OPSET) -> None:
    """Write a tower as one ONNX graph for every LOD: batch and N are open.

    Inputs: patches [B, N, P] in the weights' precision, positions [N, hidden] likewise, cos and sin
    fp32 [N, head_dim]. Outputs: tokens [B, N / merge**2, D], deepstack [L, B, N / merge**2, D]. The rotary
    embedding is computed in fp32 whatever the weights' precision. The same weights give the same bytes.

    Args:
        tower: on the CPU.
        path: file to write; the weights go to `<name>.data` beside it (opset 17: into it).
        opset: 17 (for TensorRT 8.6), or 18 and above; a tower in float8 takes 21 and above.

    Raises:
        EngineBuildError: onnx or onnxscript is missing, or the exporter refused the graph.
    """
    require("onnx", *([] if opset < OPSET else ["onnxscript"]))
    weights = tower.weights
    shape = geometry(weights, 2, 2)
    patches = shape.positions.new_zeros(2, len(shape.positions), weights.patch_weight.shape[1])
    names: dict[str, Any] = {"input_names": INPUTS, "output_names": OUTPUTS, "opset_version": opset}
    if opset < OPSET:
        names |= {"dynamo": False, "dynamic_axes": _open_axes()}
    else:
        shapes = _dynamic_shapes(weights.merge**2)
        names |= {"dynamo": True, "dynamic_shapes": shapes, "external_data": True}
        if in_float8(weights):
            (opsets,) = require("onnxscript")
            names["custom_translation_table"] = translations(getattr(opsets, f"opset{opset}"))
    try:
        with quiet():
            torch.onnx.export(_Exportable(tower).eval(), (patches, *shape), path, **names)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        given = f"the tower of this checkpoint, which the ONNX exporter of torch {torch.__version__} refused"
        raise EngineBuildError(
            f"{given}: {reason}", "a tower it takes", "Try another torch version"
        ) from error
    _tidy(path, weights.head_dim)


def _tidy(path: Path, head_dim: int) -> None:
    """Drop the exporter's notes of where in which source file each node came from; fold attention's scale.

    The notes name folders of this machine, and would make equal builds on two machines differ.
    """
    (onnx,) = require("onnx")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    _fold_attention_scale(onnx, graph, head_dim)
    forget_origins(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def forget_origins(model: Any) -> None:
    """Drop the exporter's notes of where in which source file each node of an ONNX model came from."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for item in (model, graph, *graph.node, *values):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


def _fold_attention_scale(onnx: ModuleType, graph: Any, head_dim: int) -> None:
    """Replace what the tracing exporter writes for head_dim ** -0.25 by that number.

    It derives the number from the shape of each query, in the graph's precision, in seven nodes. A builder
    that cannot see through that keeps them between the products of attention.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        source, kinds = node, []
        while source is not None and source.op_type in _SCALE_NODES:
            kinds.append(source.op_type)
            source = makers.get(source.input[1 if source.op_type == "Div" else 0])
        if kinds[:1] != ["Sqrt"] or "Div" not in kinds or source is None or source.op_type != "Slice":
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(makers[node.input[0]].attribute[0].i)
        number = onnx.numpy_helper.from_array(np.array([head_dim**-0.25], kind))
        node.CopyFrom(onnx.helper.make_node("Constant", [], list(node.output), node.name, value=number))
    _drop_unused(graph)


def _drop_unused(graph: Any) -> None:
    """Remove nodes whose outputs nobody reads."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _open_axes() -> dict[str, dict[int, str]]:
    """Names of the axes that the tracing exporter leaves open."""
    return {
        "patches": {0: "batch", 1: "count"},
        "positions": {0: "count"},
        "cos": {0: "count"},
        "sin": {0: "count"},
        "tokens": {0: "batch", 1: "merged"},
        "deepstack": {1: "batch", 2: "merged"},
    }


def _dynamic_shapes(group: int) -> tuple[dict[int, Any], ...]:
    """Open axes of the four inputs for the dynamo exporter; N is a multiple of a token's patches."""
    batch: Any = torch.export.Dim("batch", min=1, max=1 << 16)
    count = group * torch.export.Dim("merged", min=1, max=1 << 14)
    return {0: batch, 1: count}, {0: count}, {0: count}, {0: count}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters talk on stdout, in warnings and in logs of what they try; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def require(*names: str) -> tuple[ModuleType, ...]:
    """Import optional packages.

    Raises:
        EngineBuildError: one of them is not installed.
    """
    from importlib import import_module

    found = []
    for name in names:
        try:
            found.append(import_module(name))
        except ImportError as error:
            given = f"a build that needs the Python package {name}, which cannot be imported ({error})"
            raise EngineBuildError(
                given, "an installation with arrcoc's extra", f"pip install {name}"
            ) from None
    return tuple(found)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Frobenius norms in fp64; infinite for other shapes or NaN."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm())


def compare(path: Path, tower: StaticTower, edge: int, batch: int = 2, seed: int = 0) -> dict[str, float]:
    """Relative error of a graph under ONNX Runtime's CPU provider against the tower in torch.

    Args:
        path: what `export` wrote.
        tower: on the CPU; its precision is the graph's.
        edge: tokens along a tile's edge, with its halo.
        batch: tiles.
        seed: of the patches, drawn from a normal distribution.

    Returns:
        By output; `deepstack` is the worst of the planes.

    Raises:
        EngineBuildError: onnxruntime is missing.
    """
    (ort,) = require("onnxruntime")
    shape: Geometry = geometry(tower.weights, edge, edge)
    generator = torch.Generator().manual_seed(seed)
    width = tower.weights.patch_weight.shape[1]
    patches = torch.randn(batch, len(shape.positions), width, generator=generator).to(shape.positions.dtype)
    options = ort.SessionOptions()
    # Else it takes products of float8 for ones of integers, and refuses them (1.31).
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {name: t.detach().numpy() for name, t in zip(INPUTS, (patches, *shape), strict=True)}
    tokens, planes = (torch.from_numpy(array) for array in session.run(list(OUTPUTS), feeds))
    with torch.inference_mode():
        expected_tokens, expected_planes = tower(patches, *shape)
    worst = max(relative_error(a, b) for a, b in zip(planes, expected_planes, strict=True))
    return {"tokens": relative_error(tokens, expected_tokens), "deepstack": worst}
