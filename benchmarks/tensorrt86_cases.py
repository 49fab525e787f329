"""The towers and shapes of `tensorrt86.py`, and the files that its child process reads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from arrcoc import config as configs
from arrcoc import qwen
from arrcoc.config import Config
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.lod.build import profile
from arrcoc.lod.export import INPUTS, LEGACY_OPSET, OUTPUTS, export, relative_error
from arrcoc.lod.tower import Geometry, StaticTower, geometry
from arrcoc.vision import VisionWeights, patchify

ROOT = Path(__file__).resolve().parent.parent
MAX_BATCH = (64, 16, 8, 4)
"""The recipes' largest batches at LOD background, low, medium, high."""


@dataclass(frozen=True)
class Case:
    """A tower and the shapes it is measured at.

    Attributes:
        name: for people.
        half: the tower in fp16.
        wide: the same numbers in fp32: the reference.
        config: the preset.
        tiles: (edge in pixels, how many) to uint8 [K, 3, edge, edge].
    """

    name: str
    half: StaticTower
    wide: StaticTower
    config: Config
    tiles: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """One LOD of a case: its name, its batch, and what goes into the tower."""

    name: str
    batch: int
    patches: Tensor
    geometry: Geometry

    def cut(self, batch: int) -> tuple[Tensor, ...]:
        """The tower's inputs at a smaller batch."""
        return (self.patches[:batch], *self.geometry)


def bundled(device: torch.device) -> Case:
    """The bundled checkpoint, on tiles of the demo's picture."""
    folder, _ = bundled_checkpoint()
    loaded = qwen.load(folder, device, torch.float16)
    stats = (loaded.vision.mean, loaded.vision.std)
    wide = qwen.vision_weights(copy.deepcopy(loaded.model).float(), stats)
    tower, wide_tower = StaticTower(loaded.vision), StaticTower(wide)
    return Case("bundled", tower, wide_tower, configs.load("demo"), picture_tiles(device))


def picture_tiles(device: torch.device) -> Callable[[int, int], Tensor]:
    """Cuts up to 64 tiles uint8 [count, 3, edge, edge] out of the demo's picture, given edge and count."""
    with Image.open(ROOT / "docs/demo.png") as picture:
        canvas = torch.from_numpy(np.array(picture.convert("RGB"))).to(device).permute(2, 0, 1)
    height, width = canvas.shape[1:]

    def tiles(edge: int, count: int) -> Tensor:
        rows = canvas.unfold(1, edge, (height - edge) // 7)
        cut = rows.unfold(2, edge, (width - edge) // 7).permute(1, 2, 0, 3, 4).flatten(0, 1)
        return cut[:count].contiguous()

    return tiles


def unit_scale(tower: nn.Module) -> None:
    """Weights of a stock tower normal of 1 / sqrt(fan-in), norms about 1, biases of 0.1; always the same."""
    torch.manual_seed(0)
    for name, weight in tower.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.1)


def random_2b(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], VisionWeights]]:
    """A stock fp16 tower of 2B's shape, weights of unit scale, and what takes such a tower apart."""
    text = {"hidden_size": 2048, "num_hidden_layers": 1, "vocab_size": 64}
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
        "patch_size": 16,
        "num_position_embeddings": 2304,
    }
    made = Qwen3VLConfig(text_config=text, vision_config=vision).vision_config
    with device:
        tower = Qwen3VLVisionModel._from_config(made, dtype=torch.float16).eval().requires_grad_(False)
    unit_scale(tower)

    def weights(model: nn.Module) -> VisionWeights:
        stock: Any = SimpleNamespace(
            model=SimpleNamespace(visual=model), config=SimpleNamespace(vision_config=made)
        )
        return qwen.vision_weights(stock, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))

    return tower, weights


def shaped_2b(device: torch.device) -> Case:
    """24 blocks of width 1024 with random weights, on noise."""
    tower, weights = random_2b(device)

    def tiles(edge: int, count: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(edge)
        shape = (count, 3, edge, edge)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    wide = weights(copy.deepcopy(tower).float())
    return Case("2b", StaticTower(weights(tower)), StaticTower(wide), configs.load("photo"), tiles)


CASES = {"bundled": bundled, "2b": shaped_2b}


def shapes(case: Case) -> Iterator[Shape]:
    """The four LODs at their largest batches."""
    weights = case.half.weights
    for side, batch in zip(case.config.sides, MAX_BATCH, strict=True):
        edge = side + 2 * case.config.halo
        pixels = case.tiles(edge * weights.token_px, batch)
        patches = patchify(pixels, weights, torch.float16).contiguous()
        yield Shape(f"side{side}", batch, patches, geometry(weights, edge, edge))


@torch.inference_mode()
def prepare(case: Case, folder: Path) -> tuple[list[Shape], dict[str, Any], dict[str, Any]]:
    """Write graph, inputs and references; returns the shapes, what to run, and eager fp16's own errors."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not (folder / "tower.onnx").is_file():
        export(case.half, folder / "tower.onnx", LEGACY_OPSET)
    found: dict[str, Any] = {"export_seconds": round(time.perf_counter() - start, 1), "eager_fp16_error": {}}
    found["gflop"] = {}
    listed, runs = list(shapes(case)), []
    for shape in listed:
        inputs = dict(zip(INPUTS, shape.cut(shape.batch), strict=True))
        wide = [value.float() for value in inputs.values()]
        with FlopCounterMode(display=False) as counted:
            outputs = {"fp32": case.wide(*wide), "eager_fp16": case.half(*inputs.values())}
        found["gflop"][shape.name] = round(counted.get_total_flops() / 2 / 1e9, 3)  # both count alike
        files = {name: save(folder, f"{shape.name}.{name}", value) for name, value in inputs.items()}
        references = {
            kind: {
                name: save(folder, f"{shape.name}.{kind}.{name}", value)
                for name, value in zip(OUTPUTS, values, strict=True)
            }
            for kind, values in outputs.items()
        }
        found["eager_fp16_error"][shape.name] = round(
            relative_error(outputs["eager_fp16"][0].float(), outputs["fp32"][0]), 6
        )
        batches = list(dict.fromkeys((shape.batch, 1)))
        runs.append({"name": shape.name, "batches": batches, "inputs": files, "references": references})
    made = zip(case.config.sides, MAX_BATCH, strict=True)
    profiles = [profile(case.half.weights, side, case.config.halo, batch) for side, batch in made]
    job = {"onnx": str(folder / "tower.onnx"), "precision": "fp16", "profiles": profiles, "runs": runs}
    return listed, job, found


def save(folder: Path, name: str, value: Tensor) -> str:
    """Write an array; returns its path."""
    np.save(folder / f"{name}.npy", value.detach().cpu().numpy())
    return str(folder / f"{name}.npy")
