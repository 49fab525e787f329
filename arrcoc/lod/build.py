"""Builds the engines of a checkpoint and a preset into a folder: export, plans, manifest; all or nothing."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

import arrcoc
from arrcoc.config import Config
from arrcoc.errors import EngineBuildError
from arrcoc.lod.built import ONNX_FILE, builder_name, compute_capability, tower_facts
from arrcoc.lod.export import LEGACY_OPSET, OPSET, compare, export, patch_count
from arrcoc.lod.manifest import LodPlan, Manifest, record_files
from arrcoc.lod.plan import PLAN_BACKENDS, trt_module
from arrcoc.lod.plan_builder import PlanOptions, Profile, strongly_typed
from arrcoc.lod.plan_builder import build as build_plan
from arrcoc.lod.recipe import Recipe, check
from arrcoc.lod.static_engine import DTYPES
from arrcoc.lod.tower import StaticTower
from arrcoc.qwen import QwenVL
from arrcoc.vision import VisionWeights

Progress = Callable[[str, int, int], None]
"""(what is under way, steps done, steps in all); 0 of 0 where a step of the build itself begins."""

PLAN_FILE = "tower.plan"
_LIMITS = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest relative error of the graph under ONNX Runtime against torch in the same precision."""


def build(recipe: Recipe, qwen: QwenVL, progress: Progress | None = None) -> Manifest:
    """Build engines into `recipe.out`; the folder appears, or is replaced, when all of it is done.

    Args:
        recipe: what to build.
        qwen: the checkpoint on the CPU, in the recipe's precision.
        progress: told what is under way.

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
        lods, opset = _write(recipe, config, StaticTower(qwen.vision), work, told)
        seconds = round(time.perf_counter() - begin, 2)
        manifest = _manifest(recipe, config, qwen, lods, opset, work, seconds)
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
    opset = OPSET if strongly_typed(trt_module(recipe.backend)) else LEGACY_OPSET
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
    options = PlanOptions(recipe.precision, recipe.arch, workspace, recipe.timing_cache)
    path.write_bytes(build_plan(recipe.backend, graph, profiles, options, progress))


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
        precision=recipe.precision,  # type: ignore[arg-type]  # `check` refused fp8
        archs=recipe.arch,
        separate=recipe.separate,
        arch=compute_capability(gpu) if plans else None,
        opset=opset,
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
