"""Checkpoints and shapes of `tensorrt86_torch.py`, the LOD engines that it measures, and their errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_qwen import random_qwen
from tensorrt86_cases import picture_tiles, unit_scale
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from arrcoc import config as configs
from arrcoc import qwen
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.lod import BuiltEngines, LodEngine, TorchEngines, TorchLodEngine
from arrcoc.lod.bucketed import BucketedEngine, padded
from arrcoc.lod.export import relative_error
from arrcoc.lod.plan import Plan
from arrcoc.lod.recipe import Recipe
from arrcoc.lod.static_engine import StaticLodEngine
from arrcoc.lod.tensorrt_engine import PlanRunner, Scratch
from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.qwen import QwenVL
from arrcoc.records import Features
from arrcoc.vision import patchify

PRESETS = {"bundled": "demo", "2b": "photo"}
WAYS = ("plan", "eager", "compiled", "fused")


def load(name: str, device: torch.device) -> QwenVL:
    """A checkpoint in fp16: the bundled one, or one of 2B's shapes whose tower has weights of unit scale."""
    if name == "bundled":
        return qwen.load(bundled_checkpoint()[0], device, torch.float16)
    made = random_qwen("2b", device, torch.float16, layers=1)
    unit_scale(made.model.model.visual)
    return made


def recipe(name: str, out: Path, level: int) -> Recipe:
    """What is built: one plan of four profiles, at the recipes' largest batches."""
    values = {"preset": PRESETS[name], "backend": "tensorrt", "precision": "fp16", "out": out}
    return Recipe.make(values | {"optimization_level": level})


@dataclass(frozen=True, slots=True)
class Shape:
    """One LOD at one batch, and its tiles, uint8 [batch, 3, e, e]."""

    side: int
    batch: int
    pixels: Tensor

    @property
    def name(self) -> str:
        """For people and for keys."""
        return f"side {self.side} x{self.batch}"


class Case:
    """A checkpoint on the device, its four LODs, and its engines by way."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.config, self.qwen = name, configs.load(PRESETS[name]), load(name, device)
        self.largest = recipe(name, Path(name), 0).max_batch
        self._tiles = picture_tiles(device) if name == "bundled" else _noise(device)
        self.shapes = list(self._all_shapes())
        torch._dynamo.config.recompile_limit = 64
        self._compiled = torch.compile(StaticTower(self.qwen.vision), dynamic=False)
        self._fused = TorchEngines(self.qwen)

    def _all_shapes(self) -> Iterator[Shape]:
        for side, batch in zip(self.config.sides, self.largest, strict=True):
            edge = (side + 2 * self.config.halo) * self.qwen.vision.token_px
            pixels = self._tiles(edge, batch)
            yield Shape(side, batch, pixels)
            yield Shape(side, 1, pixels[:1].contiguous())

    def engine(self, way: str, side: int, opened: BuiltEngines | None = None) -> LodEngine:
        """An engine of one side that runs batches of its largest size and of one."""
        halo, buckets = self.config.halo, (1, self.largest[self.config.sides.index(side)])
        if way == "plan":
            assert opened is not None
            return opened.engine(side, buckets)
        if way == "compiled":
            return CompiledEngine(self.qwen, self._compiled, side, halo, buckets)
        if way == "fused":
            return self._fused.engine(side, buckets, halo)
        return TorchLodEngine(self.qwen, side, buckets, halo)

    def exact(self) -> dict[int, LodEngine]:
        """Engines of the same numbers in fp32, by side."""
        wide = QwenVL(copy.deepcopy(self.qwen.model).float(), self.qwen.tokenizer, self.qwen._pixel_stats)
        sides = zip(self.config.sides, self.largest, strict=True)
        return {side: TorchLodEngine(wide, side, (1, most), self.config.halo) for side, most in sides}

    def gflop(self, shape: Shape) -> float:
        """Of the tower's matrix products at a shape, a multiplication and an addition counted as two."""
        with FlopCounterMode(display=False) as counted:
            self.engine("eager", shape.side).encode(shape.pixels)
        return round(counted.get_total_flops() / 1e9, 3)


class CompiledEngine(BucketedEngine):
    """The eager tower under torch.compile; see `LodEngine`."""

    backend = fingerprint = "torch compiled"

    def __init__(self, qwen: QwenVL, tower: Any, side: int, halo: int, buckets: Sequence[int]) -> None:
        super().__init__(side, halo, buckets)
        self._qwen, self._tower = qwen, tower
        self._geometry = geometry(qwen.vision, side + 2 * halo, side + 2 * halo)

    def _encode_bucket(self, pixels: Tensor, size: int) -> Features:
        patches = patchify(padded(pixels, size), self._qwen.vision, self._qwen.dtype).contiguous()
        return self._cropped(Features(*self._tower(patches, *self._geometry)), len(pixels))


def apart(case: Case, opened: BuiltEngines) -> dict[int, StaticLodEngine]:
    """Engines of a second copy of the plan, each with scratch memory and a stream of its own."""
    device, made, engines = case.qwen.device, opened.manifest, {}
    plan = Plan(made.backend, made.read_file(opened.folder, "tower.plan"))
    for lod in made.lods:
        runner = PlanRunner(plan, lod.profile, device, Scratch(plan, device))
        buckets = (1, lod.max_batch)
        engines[lod.side] = StaticLodEngine(
            runner, case.qwen.vision, lod.side, made.halo, buckets, "fp16", case.qwen.dtype, "apart", ""
        )
    return engines


def errors(found: Features, wanted: Features) -> dict[str, Any]:
    """Relative error of the tokens and of every DeepStack plane."""
    planes = zip(found.deepstack.float(), wanted.deepstack, strict=True)
    return {
        "tokens": round(relative_error(found.tokens.float(), wanted.tokens), 6),
        "planes": [round(relative_error(a, b), 6) for a, b in planes],
    }


def turned(engine: Any, pixels: Tensor) -> Features:
    """What a plan makes of tiles when the rotation turns the other way."""
    shape = engine._geometry
    engine._geometry = shape._replace(sin=-shape.sin)
    try:
        features: Features = engine.encode(pixels)
        return features
    finally:
        engine._geometry = shape


def _noise(device: torch.device) -> Callable[[int, int], Tensor]:
    def tiles(edge: int, count: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(edge)
        shape = (count, 3, edge, edge)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    return tiles
