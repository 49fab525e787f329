"""Loads engines that `arrcoc build` made: verifies the manifest, then hands out an engine for each LOD."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from arrcoc.errors import EngineMismatchError
from arrcoc.lod import manifest as manifests
from arrcoc.lod.beside import OnnxGraph, PlanGraphRunner
from arrcoc.lod.manifest import LodPlan, Manifest
from arrcoc.lod.onnx_engine import OnnxRunner
from arrcoc.lod.plan import PLAN_BACKENDS, Plan, trt_module
from arrcoc.lod.protocol import LodEngine
from arrcoc.lod.static_engine import DTYPES, Runner, StaticLodEngine, capped
from arrcoc.lod.tensorrt_engine import PlanRunner, Scratch
from arrcoc.lod.torch_engines import TorchEngines
from arrcoc.qwen import QwenVL
from arrcoc.vision import VisionWeights

ONNX_FILE = "tower.onnx"


class BuiltEngines:
    """The engines of one folder, for one checkpoint; files are read when the first engine needs them."""

    def __init__(self, folder: Path, manifest: Manifest, qwen: QwenVL) -> None:
        """Args: what `open` verified."""
        self.folder, self.manifest, self._qwen = folder, manifest, qwen
        self._plans: dict[str, tuple[Plan, Scratch]] = {}
        self._runners: dict[tuple[str, int], PlanRunner] = {}
        self._onnx: OnnxRunner | None = None
        self._torch: TorchEngines | None = None
        self._graphs: dict[str, OnnxGraph | PlanGraphRunner] = {}

    @classmethod
    def open(cls, folder: str | Path, qwen: QwenVL) -> BuiltEngines:
        """Read a build's manifest and verify it against a checkpoint and this machine.

        Raises:
            EngineMismatchError: the manifest is missing or was changed, or it was built from other weights,
                by another version, or for another device; the message names the field.
            EngineBuildError: the Python package that runs these engines is not installed.
        """
        place = Path(folder)
        manifest = manifests.read(place)
        _verify_model(place, manifest, qwen)
        _verify_machine(place, manifest, qwen)
        return cls(place, manifest, qwen)

    def serves(self, sides: Sequence[int], halo: int) -> bool:
        """Whether the build is for a preset of these sides and this halo."""
        return self.manifest.sides == tuple(sides) and self.manifest.halo == halo

    def require(self, sides: Sequence[int], halo: int) -> None:
        """Raise `EngineMismatchError`, naming the field, where `serves` says no."""
        if self.manifest.sides != tuple(sides):
            raise self.manifest.mismatch(self.folder, "sides", self.manifest.sides, tuple(sides))
        if self.manifest.halo != halo:
            raise self.manifest.mismatch(self.folder, "halo", self.manifest.halo, halo)

    def engine(
        self, side: int, buckets: Sequence[int], torch_engines: TorchEngines | None = None
    ) -> LodEngine:
        """The engine of one of the build's sides.

        Args:
            side: tokens along a tile's edge.
            buckets: ascending batch sizes; those above the build's largest batch are left out.
            torch_engines: what a build with backend `torch` runs on; None makes them as by default.

        Raises:
            EngineMismatchError: a file is missing or changed, or the runtime refuses it.
        """
        made, qwen = self.manifest, self._qwen
        (lod,) = [lod for lod in made.lods if lod.side == side]
        kept = capped(buckets, lod.max_batch)
        if made.backend == "torch":
            self._torch = torch_engines or self._torch or TorchEngines(qwen)
            return self._torch.engine(side, kept, made.halo)
        runner, runtime = self._runner(lod)
        backend = f"{runtime} {made.precision}"
        identity = f"{made.fingerprint} side={side} {backend} {qwen.dtype} {qwen.device.type}"
        fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        return StaticLodEngine(
            runner, qwen.vision, side, made.halo, kept, made.precision, qwen.dtype, backend, fingerprint
        )

    def plan_stage(self, height: int, width: int, cells: int) -> OnnxGraph | PlanGraphRunner | None:
        """What measures and scores frames of this shape; None where the build has nothing for it.

        Raises:
            EngineMismatchError: its file is missing or changed, or the runtime refuses it.
        """
        made = self.manifest
        for graph in made.plan_stage:
            if (graph.height, graph.width, graph.cells) == (height, width, cells):
                if graph.file not in self._graphs:
                    self._graphs[graph.file] = self._graph(graph.file)
                return self._graphs[graph.file]
        return None

    def _graph(self, name: str) -> OnnxGraph | PlanGraphRunner:
        data = self.manifest.read_file(self.folder, name)
        if self.manifest.backend == "onnx":
            return OnnxGraph(data)
        with torch.cuda.device(self._qwen.device):
            plan = Plan(self.manifest.backend, data, str(self.folder / name))
        return PlanGraphRunner(plan, self._qwen.device)

    def _runner(self, lod: LodPlan) -> tuple[Runner, str]:
        """What runs a LOD, and the runtime's name for people."""
        made = self.manifest
        assert lod.file is not None, "only torch has no files"
        if made.backend == "onnx":
            if self._onnx is None:
                made.verify_files(self.folder)
                self._onnx = OnnxRunner(self.folder / lod.file)
            return self._onnx, f"onnxruntime {self._onnx.version} cpu"
        if lod.file not in self._plans:
            data = made.read_file(self.folder, lod.file)
            with torch.cuda.device(self._qwen.device):
                plan = Plan(made.backend, data, str(self.folder / lod.file))
            self._plans[lod.file] = plan, Scratch(plan, self._qwen.device)
        place = lod.file, lod.profile
        if place not in self._runners:  # TensorRT 8.6 gives a profile to one context alone
            plan, scratch = self._plans[lod.file]
            self._runners[place] = PlanRunner(plan, lod.profile, self._qwen.device, scratch)
        return self._runners[place], made.builder


def tower_facts(weights: VisionWeights, width: int) -> dict[str, int]:
    """Dimensions of a vision tower whose tokens are `width` wide, by name."""
    return {
        "patch": weights.patch,
        "merge": weights.merge,
        "blocks": len(weights.blocks),
        "hidden": weights.hidden,
        "heads": weights.heads,
        "planes": len(weights.deepstack),
        "width": width,
    }


def builder_name(backend: str) -> str:
    """Name and version of what builds for a backend, here.

    Raises:
        EngineBuildError: it is not installed.
    """
    if backend in PLAN_BACKENDS:
        return f"{backend} {trt_module(backend).__version__}"
    # The version alone: a suffix such as +cpu or +cu130 says how torch itself was built.
    return f"torch {torch.__version__.partition('+')[0]}"


def compute_capability(device: torch.device) -> str | None:
    """`sm90` and the like; None for the CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _verify_model(folder: Path, made: Manifest, qwen: QwenVL) -> None:
    found = tower_facts(qwen.vision, qwen.width)
    for name in found:
        if made.tower.get(name) != found[name]:
            raise made.mismatch(folder, f"tower.{name}", made.tower.get(name), found[name])
    precision = DTYPES[made.precision]
    if made.backend == "torch" and precision != qwen.dtype:
        raise made.mismatch(folder, "precision", precision, qwen.dtype)
    same = precision == qwen.dtype
    weights = qwen.fingerprint if same else qwen.fingerprint_in(precision)
    if made.weights != weights:
        # Weights cast to the plan's precision by way of a coarser one differ.
        loaded = str(qwen.dtype).removeprefix("torch.")
        field = "weights" if same else f"weights in {made.precision} (this checkpoint was loaded in {loaded})"
        raise made.mismatch(folder, field, made.weights, weights)


def _verify_machine(folder: Path, made: Manifest, qwen: QwenVL) -> None:
    if made.backend not in PLAN_BACKENDS:
        return
    if qwen.device.type != "cuda":
        given = f"{folder}: engines of backend {made.backend} on device {qwen.device}"
        raise EngineMismatchError(given, "a CUDA device", "Choose one, or build with --backend onnx")
    here = builder_name(made.backend)
    if made.builder != here:
        raise made.mismatch(folder, "builder", made.builder, here)
    arch = compute_capability(qwen.device)
    if arch not in ((made.arch,) if made.archs == ("current",) else made.archs):
        raise made.mismatch(folder, "archs", made.arch if made.archs == ("current",) else made.archs, arch)
