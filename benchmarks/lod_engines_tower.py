"""What all sections of lod_engines.py work with: towers of random weights, engines, clocks and the floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from common import progress
from random_qwen import SIZES
from torch import Tensor
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from arrcoc import config as configs
from arrcoc.lod import LodEngine, TorchLodEngine
from arrcoc.lod.attention import fastest_blocks
from arrcoc.lod.fused_tower import FusedTower
from arrcoc.lod.graphed import GraphedLodEngine, Workspace
from arrcoc.qwen import vision_weights
from arrcoc.vision import VisionWeights

START = perf_counter()
TOKEN_PX = 32


@dataclass(frozen=True)
class Bench:
    """What the sections of one size share."""

    name: str
    visual: Any
    weights: VisionWeights
    towers: dict[str, FusedTower]
    workspace: Workspace
    repeats: int
    peak: float

    def engine(self, way: str, side: int, workspace: Workspace | None = None, alone: int = 0) -> LodEngine:
        """An engine of one side with the default buckets; see `GraphedLodEngine` for the rest."""
        buckets = configs.Config().buckets
        if way == "eager":
            stand_in: Any = SimpleNamespace(
                vision=self.weights, dtype=torch.bfloat16, fingerprint="", device=torch.device("cuda")
            )
            return TorchLodEngine(stand_in, side, buckets)
        blocks = fastest_blocks((side * self.weights.merge) ** 2, self.weights.head_dim)
        room = self.workspace if workspace is None else workspace
        return GraphedLodEngine(self.towers[way], room, side, 0, buckets, blocks, way, "", alone)

    def flops(self, side: int, tiles: int) -> int:
        """Of all matrix products for `tiles` tiles, a multiplication and an addition counted as two."""
        return tower_flops(self.weights, (side * self.weights.merge) ** 2, tiles)

    def floor_ms(self, flops: float) -> float:
        """Milliseconds at the measured peak."""
        return round(flops / self.peak * 1e3, 4)


def tower_flops(weights: VisionWeights, patches: int, tiles: int) -> int:
    """Of the matrix products of `tiles` images of `patches` patches; equal frames of a patch count once."""
    rows, width = tiles * patches, weights.hidden
    block: Any = weights.blocks[0]
    layers = [block.qkv, block.proj, block.mlp.linear_fc1, block.mlp.linear_fc2]
    per_row = sum(layer.weight.numel() for layer in layers) * len(weights.blocks)
    attention = 2 * rows * patches * width * len(weights.blocks)  # QK and PV, multiply-adds
    merged = rows // weights.merge**2
    mergers: list[Any] = [weights.merger, *weights.deepstack.values()]
    merging = sum(m.fc1.weight.numel() + m.fc2.weight.numel() for m in mergers) * merged
    embedding = rows * weights.patch_weight.numel() // 2
    return 2 * (rows * per_row + attention + merging + embedding)


def make_visual(name: str) -> Any:
    """A stock vision tower on the GPU: weights normal of 1 / sqrt(fan-in), biases of 0.1, norms about 1."""
    size = SIZES[name]
    vision = {
        "depth": size.vision_layers, "hidden_size": size.vision_width, "num_heads": 16,
        "intermediate_size": size.vision_mlp, "out_hidden_size": size.width,
        "deepstack_visual_indexes": list(size.deepstack),
    }  # fmt: skip
    config = Qwen3VLConfig(vision_config=vision).vision_config
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # so that what is computed in fp32 stays so
    try:
        with torch.device("cuda"):
            visual: Any = Qwen3VLVisionModel(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator("cuda").manual_seed(0)
    for module in visual.modules():
        for kind, tensor in module.named_parameters(recurse=False):
            fan = tensor[0].numel() if tensor.ndim > 1 else 100
            tensor.normal_(
                std=1.0 if isinstance(module, torch.nn.Embedding) else fan**-0.5, generator=generator
            )
            if kind == "weight" and tensor.ndim == 1:
                tensor.add_(1)
    return visual


def weights_of(visual: Any) -> VisionWeights:
    """A stock tower, taken apart."""
    stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    config = SimpleNamespace(vision_config=visual.config)
    return vision_weights(SimpleNamespace(model=SimpleNamespace(visual=visual), config=config), stats)


def tiles_of(side: int, count: int) -> Tensor:
    """Random tiles, uint8."""
    edge = side * TOKEN_PX
    return torch.randint(0, 256, (count, 3, edge, edge), dtype=torch.uint8, device="cuda")


def timed(run: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Median milliseconds of a call from an empty queue, by events: launches that lag behind count."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times), 4)


BURST, SUSTAINED = 10, 120
"""Products in a row: 15 ms at full clocks, and as long as the mix takes, when power limits the clocks."""


def matrix_peak(products: int = BURST) -> float:
    """Operations per second of bf16 products of random 8192 x 8192 matrices, queued back to back."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    return products * 2 * 8192**3 / (timed(run, 7 if products == BURST else 3) / 1e3)


def report(found: dict[str, Any], bench: Bench) -> None:
    """One line on stderr; shares of the peak where there is a floor."""
    floor = found.get("floor_ms")
    parts = [f"{key} {value}" for key, value in found.items() if not key.endswith("_ms")]
    for key, value in found.items():
        if key.endswith("_ms"):
            share = f" ({floor / value:.1%})" if floor and key != "floor_ms" else ""
            parts.append(f"{key[:-3]} {value:g}{share}")
    progress(f"  {bench.name}: {'  '.join(parts)} {clock()}")


def clock() -> str:
    """Seconds since the beginning."""
    return f"[{perf_counter() - START:.0f} s]"
