"""LOD engines on a GPU: eager, compiled, fused in CUDA graphs, and float8, beside the floor.

Vision towers of published sizes with random weights of unit scale, made on the device; the floor is the
exact count of floating-point operations of the matrix products over the peak that products of 8192 x 8192
matrices of random data reach in the same run, in a short burst; what they reach for as long as the mix takes,
when power limits the clocks, is kept beside it. Times are of whole calls of an engine: from uint8 tiles to
features that the caller owns. The first size gets all sections, the others the mix and the photo, if there
is time: nothing that can be left out begins when it is not likely to end within `--limit` seconds.

    python benchmarks/lod_engines.py [--shapes 8b 2b] [--sections mix small …] [--limit 120]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from common import RESULTS, facts, progress, write_result
from lod_engines_accuracy import bundled_accuracy, relative_errors
from random_qwen import SIZES
from torch import Tensor
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from arrcoc import allocation, image
from arrcoc import config as configs
from arrcoc.lod import LodEngine, TorchLodEngine, float8
from arrcoc.lod.attention import fastest_blocks
from arrcoc.lod.fused_tower import FusedTower
from arrcoc.lod.graphed import GraphedLodEngine, Workspace
from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.qwen import vision_weights
from arrcoc.records import Lod, Relevance, Tensions
from arrcoc.vision import VisionWeights, patchify

START = perf_counter()
TOKEN_PX = 32
MIX = ((20, 20), (14, 40), (8, 76), (4, 60))
"""Side and number of tiles: 20 x 400, 40 x 196, 76 x 64 and 60 x 16 tokens, a frame of 8960 x 8960."""
ALL_HIGH = (20, 196)
SMALL = ((4, 16), (6, 12), (8, 4))
PHOTO_PX = 3584
STOCK_PX = 3584
FRAME_PX = 8960
WAYS = ("eager", "fused", "float8")
_COMPILATION, _OTHER_SIZE = 25.0, 15.0
"""Seconds that a first compilation, and the sections of another size, are expected to take."""


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

    def engine(self, way: str, side: int) -> LodEngine:
        """An engine of one side with the default buckets."""
        buckets = configs.Config().buckets
        if way == "eager":
            stand_in: Any = SimpleNamespace(
                vision=self.weights, dtype=torch.bfloat16, fingerprint="", device=torch.device("cuda")
            )
            return TorchLodEngine(stand_in, side, buckets)
        blocks = fastest_blocks((side * self.weights.merge) ** 2, self.weights.head_dim)
        return GraphedLodEngine(self.towers[way], self.workspace, side, 0, buckets, blocks, way, "")

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


# Sections; each takes the bench and returns what is kept of it.


def mix(bench: Bench) -> dict[str, Any]:
    """The four shapes of the mix, one by one and together, and all tiles at the highest LOD."""
    made = {way: {side: bench.engine(way, side) for side, _ in MIX} for way in WAYS}
    pixels = {side: tiles_of(side, count) for side, count in MIX}
    cases = []
    for side, count in MIX:
        flops = bench.flops(side, count)
        case: dict[str, Any] = {"tokens": side * side, "tiles": count, "tflop": round(flops / 1e12, 4)}
        case["floor_ms"] = bench.floor_ms(flops)
        for way in WAYS:
            case[f"{way}_ms"] = timed(partial(made[way][side].encode, pixels[side]), bench.repeats)
        want = made["eager"][side].encode(pixels[side])
        case["error_against_eager"] = {
            way: relative_errors(made[way][side].encode(pixels[side]), want) for way in WAYS[1:]
        }
        cases.append(case)
        report(case, bench)
    total: dict[str, Any] = {"floor_ms": round(sum(case["floor_ms"] for case in cases), 3)}
    for way in WAYS:

        def whole(way: str = way) -> None:
            for side, _ in MIX:
                made[way][side].encode(pixels[side])

        total[f"{way}_ms"] = timed(whole, bench.repeats, 1)
    report(total, bench)
    return {"cases": cases, "whole": total}


def all_high(bench: Bench) -> dict[str, Any]:
    """Every tile of the frame at the highest LOD."""
    side, count = ALL_HIGH
    found: dict[str, Any] = {"tokens": side * side, "tiles": count}
    found["floor_ms"] = bench.floor_ms(bench.flops(side, count))
    pixels = tiles_of(side, count)
    for way in WAYS:
        found[f"{way}_ms"] = timed(partial(bench.engine(way, side).encode, pixels), 3, 1)
    report(found, bench)
    return found


def small(bench: Bench) -> dict[str, Any]:
    """Few tiles, where launching kernels takes the time."""
    cases = []
    for side, count in SMALL:
        pixels = tiles_of(side, count)
        case: dict[str, Any] = {"tokens": side * side, "tiles": count}
        case["floor_ms"] = bench.floor_ms(bench.flops(side, count))
        for way in WAYS:
            case[f"{way}_ms"] = timed(partial(bench.engine(way, side).encode, pixels), 20, 5)
        case["eager_over_fused"] = round(case["eager_ms"] / case["fused_ms"], 3)
        cases.append(case)
        report(case, bench)
    return {"cases": cases}


def stock(bench: Bench) -> dict[str, Any]:
    """The stock tower on one image, and the engines on that image as tiles of preset photo, all at high."""
    grid = STOCK_PX // bench.weights.patch
    pixels = torch.randint(0, 256, (1, 3, STOCK_PX, STOCK_PX), dtype=torch.uint8, device="cuda")
    patches = patchify(pixels, bench.weights, torch.bfloat16)[0]
    shape = torch.tensor([[1, grid, grid]], device="cuda")
    found: dict[str, Any] = {"image_px": STOCK_PX, "tokens": len(patches) // bench.weights.merge**2}
    found["stock_ms"] = timed(lambda: bench.visual(patches, grid_thw=shape), 3, 1)
    side = configs.load("photo").sides[Lod.HIGH]
    tiles = tiles_of(side, (STOCK_PX // (side * TOKEN_PX)) ** 2)
    found["tiles"] = len(tiles)
    for way in WAYS:
        found[f"{way}_ms"] = timed(partial(bench.engine(way, side).encode, tiles), bench.repeats)
    report(found, bench)
    return found


def stock_frame(bench: Bench) -> dict[str, Any]:
    """One block of the stock tower on the mix's frame as one image, times the number of blocks."""
    rows, blocks = (FRAME_PX // bench.weights.patch) ** 2, len(bench.visual.blocks)
    hidden = torch.randn(rows, bench.weights.hidden, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(rows, bench.weights.head_dim, device="cuda")
    ends = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    arguments = {"cu_seqlens": ends, "max_seqlen": rows, "position_embeddings": (angles.cos(), angles.sin())}
    block = timed(lambda: bench.visual.blocks[0](hidden, **arguments), 1, 1)
    found = {"image_px": FRAME_PX, "tokens": rows // 4, "one_block_ms": block}
    found["estimate_ms"] = round(block * blocks, 1)
    report(found, bench)
    return found


def photo(bench: Bench) -> dict[str, Any]:
    """Preset photo at an eighth of the tokens: tiles as the allocation deals them, relevance as of a spot."""
    config = configs.load("photo")
    tile = config.sides[Lod.HIGH] * TOKEN_PX
    grid, _ = image.choose_grid(PHOTO_PX, PHOTO_PX, tile, config.max_tiles, config.max_distortion)
    y, x = torch.meshgrid(torch.linspace(-1, 1, grid.rows), torch.linspace(-1, 1, grid.cols), indexing="ij")
    relevance = Relevance(torch.exp(-4 * ((y - 0.2) ** 2 + (x + 0.3) ** 2)), Tensions(0.0, 0.0, 0.0))
    plan = allocation.plan(relevance, grid, config, allocation.resolve_budget(0.125, grid, config))
    counts = {side: int((plan.lod == lod).sum()) for lod, side in enumerate(config.sides)}
    if plan.overview_stride:  # the overview stands for tiles at background
        counts.pop(config.sides[Lod.BACKGROUND])
    counts = {side: count for side, count in counts.items() if count}
    tokens = sum(side * side * count for side, count in counts.items())
    flops = sum(bench.flops(side, count) for side, count in counts.items())
    found: dict[str, Any] = {"image_px": PHOTO_PX, "tiles": {str(s * s): n for s, n in counts.items()}}
    found |= {"plan_tokens": plan.tokens, "tile_tokens": tokens, "floor_ms": bench.floor_ms(flops)}
    pixels = {side: tiles_of(side, count) for side, count in counts.items()}
    for way in WAYS:
        engines = {side: bench.engine(way, side) for side in counts}

        def run(engines: dict[int, LodEngine] = engines) -> None:
            for side, tiles in pixels.items():
                engines[side].encode(tiles)

        found[f"{way}_ms"] = timed(run, bench.repeats, 3)
        found[f"{way}_tokens_per_second"] = round(tokens / found[f"{way}_ms"] * 1e3)
    report(found, bench)
    return found


def compiled(bench: Bench, limit: float) -> dict[str, Any]:
    """torch.compile of the eager tower, static shapes, default mode, while there is time."""
    tower, took = StaticTower(bench.weights), _COMPILATION
    found: dict[str, Any] = {"compile_s": {}}
    for side, count in (MIX[2], MIX[0], MIX[1], MIX[3]):
        if perf_counter() - START + took > limit:
            found["stopped"] = f"after {perf_counter() - START:.0f} s"
            break
        torch._dynamo.reset()
        run = torch.compile(tower, dynamic=False)
        shape, pixels = geometry(bench.weights, side, side), tiles_of(side, count)
        begin = perf_counter()

        def call(shape: Any = shape, pixels: Tensor = pixels, run: Any = run) -> None:
            run(patchify(pixels, bench.weights, torch.bfloat16), *shape)

        call()
        torch.cuda.synchronize()
        took = perf_counter() - begin
        found["compile_s"][str(side * side)] = round(took, 1)
        found[str(side * side)] = timed(call, bench.repeats)
        progress(f"  compiled {count} x {side * side}: {found[str(side * side)]} ms, {took:.1f} s {clock()}")
    return found


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


SECTIONS = {"mix": mix, "small": small, "stock": stock, "photo": photo, "all_high": all_high,
            "stock_frame": stock_frame}  # fmt: skip
"""By name, what matters most first."""
EVERY = (*SECTIONS, "accuracy", "compiled")
OTHERS = ("mix", "photo")
"""Sections of sizes after the first."""


def prepared(name: str, repeats: int) -> tuple[Bench, dict[str, Any]]:
    """A size's towers, and the peaks to hold them against."""
    script, size = Path(__file__).with_name("lod_engines_kernels.py"), SIZES[name]
    compiler = subprocess.Popen([sys.executable, script, str(size.vision_width), str(size.vision_mlp)])
    visual = make_visual(name)
    weights = weights_of(visual)
    peaks = float8.input_peaks(weights, tiles_of(8, 16))
    towers = {"fused": FusedTower(weights), "float8": FusedTower(weights, float8.converter(peaks=peaks))}
    torch.cuda.synchronize()
    progress(f"{name}: weights {clock()}")
    compiler.wait()
    progress(f"{name}: kernels {clock()}")
    peak, sustained = matrix_peak(), matrix_peak(SUSTAINED)
    progress(f"{name}: peak {peak / 1e12:.1f}, in a row {sustained / 1e12:.1f} TFLOP/s {clock()}")
    found = {"peak_tflops": round(peak / 1e12, 2), "sustained_tflops": round(sustained / 1e12, 2)}
    return Bench(name, visual, weights, towers, Workspace(torch.device("cuda")), repeats, peak), found


def attempt(section: str, run: Callable[[], dict[str, Any]], into: dict[str, Any]) -> None:
    """Run a section and keep what it found, or its error: the next one goes on."""
    progress(f"{section} {clock()}")
    try:
        with torch.inference_mode():
            into[section] = run()
    except Exception as error:
        traceback.print_exc()
        into[section] = {"failed": f"{type(error).__name__}: {error}"[:400]}


def measure(name: str, chosen: argparse.Namespace, result: dict[str, Any], others: bool) -> None:
    """The sections of one size, which is the first or one of the others; written after each."""
    bench, into = prepared(name, chosen.repeats)
    result["shapes"][name] = into
    runs = {section: partial(run, bench) for section, run in SECTIONS.items()}
    runs["accuracy"] = partial(bundled_accuracy, torch.device("cuda"))
    runs["compiled"] = partial(compiled, bench, chosen.limit)
    for section, run in runs.items():
        if section in (OTHERS if others else EVERY) and section in chosen.sections:
            attempt(section, run, result if section == "accuracy" else into)
            write_result(chosen.out, result)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the result after each section."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SIZES), default=["8b", "2b"])
    parser.add_argument("--sections", nargs="+", choices=EVERY, default=list(EVERY))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for all that can be left out")
    parser.add_argument("--out", type=Path, default=RESULTS / "lod_engines.json")
    chosen = parser.parse_args(arguments)
    result = facts("benchmarks/lod_engines.py", arguments, torch.device("cuda"))
    result |= {"dtype": "bfloat16", "repeats": chosen.repeats, "shapes": {}}
    for number, name in enumerate(chosen.shapes):
        if number == 0 or perf_counter() - START + _OTHER_SIZE < chosen.limit:
            measure(name, chosen, result, others=number > 0)
    peak = matrix_peak()
    progress(f"peak again {peak / 1e12:.1f} TFLOP/s {clock()}")
    result["peak_tflops_at_the_end"] = round(peak / 1e12, 2)
    write_result(chosen.out, result)


if __name__ == "__main__":
    main(sys.argv[1:])
