"""Builds the engines of a checkpoint and a preset into a folder: export, plans, manifest; all or nothing."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import arrcoc
from arrcoc.config import Config
from arrcoc.errors import EngineBuildError
from arrcoc.lod.beside import Beside
from arrcoc.lod.beside import export as export_beside
from arrcoc.lod.built import ONNX_FILE, builder_name, compute_capability, tower_facts
from arrcoc.lod.calibrate import calibrate, converted, encoding_error, require_accuracy, require_answers
from arrcoc.lod.export import FLOAT8_OPSET, LEGACY_OPSET, OPSET, compare, export, patch_count
from arrcoc.lod.float8_graph import quantized
from arrcoc.lod.manifest import Accuracy, Calibration, FrameGraph, LodPlan, Manifest, record_files
from arrcoc.lod.plan import PLAN_BACKENDS, trt_module
from arrcoc.lod.plan_builder import PlanOptions, Profile, strongly_typed
from arrcoc.lod.plan_builder import build as build_plan
from arrcoc.lod.recipe import Recipe, check
from arrcoc.lod.static_engine import DTYPES
from arrcoc.lod.tower import StaticTower
from arrcoc.qwen import QwenVL
from arrcoc.vision import VisionWeights

_LOG = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(what is under way, steps done, steps in all); 0 of 0 where a step of the build itself begins."""
Judge = Callable[[Mapping[str, float], Progress], Accuracy]
"""Given the largest input of every block layer by name: what float8 so calibrated costs in answers."""

PLAN_FILE = "tower.plan"
_LIMITS = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest relative error of the graph under ONNX Runtime against torch in the same precision."""
_WIDER, _KERNELS = 1.5, 32 << 20
"""A plan of more than this many times its graph's bytes, and this much for kernels, holds wider weights."""


def build(
    recipe: Recipe,
    qwen: QwenVL,
    progress: Progress | None = None,
    beside: Sequence[Beside] = (),
    tiles: Sequence[Tensor] = (),
    judge: Judge | None = None,
) -> Manifest:
    """Build engines into `recipe.out`; the folder appears, or is replaced, when all of it is done.

    Args:
        recipe: what to build.
        qwen: the checkpoint on the CPU, in the recipe's precision.
        progress: told what is under way.
        tiles: for each LOD, uint8 [K, 3, e, e], for an fp8 build to be calibrated on.
        beside: graphs for the recipe's `plan_stage`, of which two may have the same frame.
        judge: what the recipe's `max_accuracy_loss` is measured with.

    Raises:
        EngineBuildError: the exporter, parser or builder refused it, or the graph computes something else.
        ConfigError: no such preset.
    """
    config = check(recipe)
    assert qwen.dtype == DTYPES[recipe.precision], (qwen.dtype, recipe.precision)
    assert qwen.device.type == "cpu", qwen.device
    out = recipe.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    work.mkdir()
    try:
        begin = time.perf_counter()
        told = progress or (lambda what, done, total: None)
        weights, calibration = _weights(recipe, qwen, tiles, judge, told)
        lods, opset = _write(recipe, config, StaticTower(weights), work, told)
        graphs = [_write_beside(recipe, config, graph, work, told) for graph in _distinct(beside)]
        seconds = round(time.perf_counter() - begin, 2)
        manifest = _manifest(recipe, config, qwen, lods, opset, graphs, calibration, work, seconds)
        manifest.write(work)
        _replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def profile(weights: VisionWeights, side: int, halo: int, max_batch: int) -> Profile:
    """Shapes of the four inputs at one LOD: N is fixed, batches reach from 1 to `max_batch`."""
    count, width = patch_count(weights, side, halo), int(weights.patch_weight.shape[1])
    most, rotary = (max_batch, count, width), (count, weights.head_dim)
    fixed = {"positions": (count, weights.hidden), "cos": rotary, "sin": rotary}
    return {"patches": ((1, count, width), most, most)} | {n: (s, s, s) for n, s in fixed.items()}


def _weights(
    recipe: Recipe, qwen: QwenVL, tiles: Sequence[Tensor], judge: Judge | None, progress: Progress
) -> tuple[VisionWeights, Calibration | None]:
    """The weights to export; float8 is calibrated and judged in fp32, on a GPU if there is one."""
    if recipe.precision != "fp8":
        return qwen.vision, None
    assert len(tiles) == len(recipe.max_batch), "fp8 wants tiles of every LOD"
    progress("calibrating float8", 0, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wide = converted(qwen.vision, device, torch.float32)
    largest = calibrate(wide, tiles, recipe.percentile, progress)
    progress("judging float8", 0, 0)
    error = encoding_error(wide, largest, tiles)
    require_accuracy(error, recipe.max_error)
    accuracy = _answers(recipe, largest, judge, progress)
    calibration = Calibration(
        tiles=tuple(map(len, tiles)),
        percentile=recipe.percentile,
        error={name: round(value, 5) for name, value in error.items()},
        max_error=recipe.max_error,
        accuracy=accuracy,
        max_accuracy_loss=recipe.max_accuracy_loss,
    )
    return quantized(qwen.vision, largest), calibration


def _answers(
    recipe: Recipe, largest: Mapping[str, float], judge: Judge | None, progress: Progress
) -> Accuracy | None:
    """What float8 costs in answers, if the recipe limits that; refused above the limit."""
    if recipe.max_accuracy_loss is None:
        return None
    assert judge is not None, "a limit on answers wants something that asks"
    progress("answering questions", 0, 0)
    accuracy = judge(largest, progress)
    require_answers(accuracy, recipe.max_accuracy_loss)
    return accuracy


def _opset(recipe: Recipe) -> int:
    typed = strongly_typed(trt_module(recipe.backend))
    if recipe.precision == "fp8":
        if not typed:
            given = f"precision fp8 with {builder_name(recipe.backend)}"
            raise EngineBuildError(given, "a version with strong typing", "Choose fp16, or a newer version")
        return FLOAT8_OPSET
    return OPSET if typed else LEGACY_OPSET


def _write(
    recipe: Recipe, config: Config, tower: StaticTower, work: Path, progress: Progress
) -> tuple[list[LodPlan], int | None]:
    """Write the build's files into `work`; returns what serves each LOD, and the ONNX opset."""
    sizes = list(zip(config.sides, recipe.max_batch, strict=True))
    if recipe.backend == "torch":
        return [LodPlan(side=s, file=None, profile=0, max_batch=b) for s, b in sizes], None
    if recipe.backend == "onnx":
        progress("exporting the tower", 0, 0)
        export(tower, work / ONNX_FILE)
        progress("comparing with torch", 0, 0)
        _compare(work / ONNX_FILE, tower, config.sides[0] + 2 * config.halo, recipe.precision)
        return [LodPlan(side=s, file=ONNX_FILE, profile=0, max_batch=b) for s, b in sizes], OPSET
    opset = _opset(recipe)
    graphs = work / "graphs"
    graphs.mkdir()
    progress("exporting the tower", 0, 0)
    export(tower, graphs / ONNX_FILE, opset)
    profiles = [profile(tower.weights, side, config.halo, batch) for side, batch in sizes]
    if recipe.separate:
        names = [f"side{side}.plan" for side in config.sides]
        for name, made in zip(names, profiles, strict=True):
            _write_plan(recipe, graphs / ONNX_FILE, [made], work / name, progress)
        places = [(name, 0) for name in names]
    else:
        _write_plan(recipe, graphs / ONNX_FILE, profiles, work / PLAN_FILE, progress)
        places = [(PLAN_FILE, number) for number in range(len(profiles))]
    shutil.rmtree(graphs)
    served = zip(sizes, places, strict=True)
    return [LodPlan(side=s, file=f, profile=p, max_batch=b) for (s, b), (f, p) in served], opset


def _write_plan(recipe: Recipe, graph: Path, profiles: list[Profile], path: Path, progress: Progress) -> None:
    progress(f"building {path.name}", 0, 0)
    workspace = None if recipe.workspace_gb is None else int(recipe.workspace_gb * (1 << 30))
    options = PlanOptions(
        recipe.precision, recipe.arch, workspace, recipe.timing_cache, recipe.optimization_level
    )
    data = build_plan(recipe.backend, graph, profiles, options, progress)
    path.write_bytes(data)
    weights = sum(file.stat().st_size for file in graph.parent.iterdir())
    if len(data) > _WIDER * weights + _KERNELS:
        sizes = f"{path.name} has {len(data) / 1e6:.0f} MB, its graph {weights / 1e6:.0f} MB"
        _LOG.warning("%s: the builder did not keep to %s everywhere", sizes, recipe.precision)


def _distinct(beside: Sequence[Beside]) -> list[Beside]:
    return list({graph.name: graph for graph in beside}.values())


def _write_beside(
    recipe: Recipe, config: Config, graph: Beside, work: Path, progress: Progress
) -> FrameGraph:
    """Write one graph of `plan_stage` as ONNX, or as a plan in fp32."""
    pixels = graph.inputs["pixels"]
    suffix = "plan" if recipe.backend in PLAN_BACKENDS else "onnx"
    made = FrameGraph(
        height=pixels.shape[1], width=pixels.shape[2], cells=config.cells, file=f"{graph.name}.{suffix}"
    )
    if recipe.backend in PLAN_BACKENDS and not strongly_typed(trt_module(recipe.backend)):
        given = f"plan_stage with {builder_name(recipe.backend)}, which reads ONNX up to opset {LEGACY_OPSET}"
        raise EngineBuildError(given, f"a version that reads opset {OPSET}", "Leave it out")
    progress(f"exporting {graph.name}", 0, 0)
    if recipe.backend not in PLAN_BACKENDS:
        export_beside(graph, work / made.file)
        return made
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        source = Path(scratch) / f"{graph.name}.onnx"
        export_beside(graph, source)
        progress(f"building {made.file}", 0, 0)
        options = PlanOptions("fp32", recipe.arch)
        (work / made.file).write_bytes(build_plan(recipe.backend, source, [], options, progress))
    return made


def _compare(path: Path, tower: StaticTower, edge: int, precision: str) -> None:
    for output, error in compare(path, tower, edge).items():
        if not error <= _LIMITS[precision]:
            given = f"an export whose {output} differ from torch by {error:.1e} relative"
            allowed = f"at most {_LIMITS[precision]:.0e} in {precision}"
            raise EngineBuildError(given, allowed, "Try another version of torch or onnxruntime")


def _manifest(
    recipe: Recipe,
    config: Config,
    qwen: QwenVL,
    lods: list[LodPlan],
    opset: int | None,
    graphs: list[FrameGraph],
    calibration: Calibration | None,
    work: Path,
    seconds: float,
) -> Manifest:
    gpu = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    plans = recipe.backend in PLAN_BACKENDS
    first, second, third, fourth = lods
    return Manifest(
        backend=recipe.backend,
        builder=builder_name(recipe.backend),
        arrcoc=arrcoc.__version__,
        model=recipe.model,
        weights=qwen.fingerprint,
        tower=tower_facts(qwen.vision, qwen.width),
        preset=recipe.preset,
        halo=config.halo,
        lods=(first, second, third, fourth),
        precision=recipe.precision,
        calibration=calibration,
        archs=recipe.arch,
        separate=recipe.separate,
        arch=compute_capability(gpu) if plans else None,
        opset=opset,
        plan_stage=tuple(graphs),
        files=record_files(work, (path.name for path in work.iterdir())),
        build_seconds=seconds,
    ).sealed()


def _replace(made: Path, out: Path) -> None:
    """Put a finished folder where it belongs; an earlier build goes when the new one is in place."""
    old = made.with_name(made.name + ".old")
    if out.exists():
        out.rename(old)
    made.rename(out)
    shutil.rmtree(old, ignore_errors=True)
