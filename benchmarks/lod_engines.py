"""LOD engines on a GPU: eager, compiled, fused in CUDA graphs, and float8, beside the floor.

Vision towers of published sizes with random weights of unit scale, made on the device; the floor is the
exact count of floating-point operations of the matrix products over the peak that products of 8192 x 8192
matrices of random data reach in the same run, in a short burst; what they reach for as long as the mix takes,
when power limits the clocks, is kept beside it. Times are of whole calls of an engine: from uint8 tiles to
features that the caller owns. torch.compile works in processes of its own while answers are counted, and
nothing is timed until all of that is done. The first size gets all sections, the others the mix, the photo
and the overlap, if they are likely to end within `--limit` seconds.

    python benchmarks/lod_engines.py [--shapes 8b 2b] [--sections mix small …] [--limit 180]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, facts, progress, write_result
from lod_engines_accuracy import bundled_accuracy, relative_errors
from lod_engines_compiled import Compiling
from lod_engines_overlap import overlap
from lod_engines_tower import (
    START,
    SUSTAINED,
    TOKEN_PX,
    Bench,
    clock,
    make_visual,
    matrix_peak,
    report,
    tiles_of,
    timed,
    weights_of,
)
from random_qwen import SIZES

from arrcoc import allocation, image
from arrcoc import config as configs
from arrcoc.lod import LodEngine, float8
from arrcoc.lod.fused_tower import FusedTower
from arrcoc.lod.graphed import Workspace
from arrcoc.records import Lod, Relevance, Tensions
from arrcoc.vision import patchify

MIX = ((20, 20), (14, 40), (8, 76), (4, 60))
"""Side and number of tiles: 20 x 400, 40 x 196, 76 x 64 and 60 x 16 tokens, a frame of 8960 x 8960."""
ALL_HIGH = (20, 196)
SMALL = ((4, 16), (6, 12), (8, 4))
PHOTO_PX = 3584
STOCK_PX = 3584
FRAME_PX = 8960
WAYS = ("eager", "fused", "float8")
_OTHER_SIZE = 30.0
"""Seconds that the sections of another size are expected to take."""


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


def photo_plan() -> tuple[dict[int, int], int]:
    """Preset photo at an eighth of the tokens: tiles by side that are encoded, and the plan's tokens.

    As the allocation deals them, with relevance as of a spot.
    """
    config = configs.load("photo")
    tile = config.sides[Lod.HIGH] * TOKEN_PX
    grid, _ = image.choose_grid(PHOTO_PX, PHOTO_PX, tile, config.max_tiles, config.max_distortion)
    y, x = torch.meshgrid(torch.linspace(-1, 1, grid.rows), torch.linspace(-1, 1, grid.cols), indexing="ij")
    relevance = Relevance(torch.exp(-4 * ((y - 0.2) ** 2 + (x + 0.3) ** 2)), Tensions(0.0, 0.0, 0.0))
    plan = allocation.plan(relevance, grid, config, allocation.resolve_budget(0.125, grid, config))
    counts = {side: int((plan.lod == lod).sum()) for lod, side in enumerate(config.sides)}
    if plan.overview_stride:  # the overview stands for tiles at background
        counts.pop(config.sides[Lod.BACKGROUND])
    return {side: count for side, count in counts.items() if count}, plan.tokens


def photo(bench: Bench) -> dict[str, Any]:
    """The tiles of `photo_plan`, one LOD after the other."""
    counts, plan_tokens = photo_plan()
    tokens = sum(side * side * count for side, count in counts.items())
    flops = sum(bench.flops(side, count) for side, count in counts.items())
    found: dict[str, Any] = {"image_px": PHOTO_PX, "tiles": {str(s * s): n for s, n in counts.items()}}
    found |= {"plan_tokens": plan_tokens, "tile_tokens": tokens, "floor_ms": bench.floor_ms(flops)}
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


def beside(bench: Bench) -> dict[str, Any]:
    """LODs on streams of their own; see `lod_engines_overlap`."""
    return overlap(bench, photo_plan()[0], dict(MIX))


SECTIONS = {"mix": mix, "small": small, "overlap": beside, "photo": photo, "stock": stock,
            "all_high": all_high, "stock_frame": stock_frame}  # fmt: skip
EVERY = ("accuracy", "compiled", *SECTIONS)
OTHERS = ("mix", "overlap", "photo")
"""Sections of sizes after the first."""


def prepared(name: str, repeats: int, meanwhile: Callable[[], None]) -> tuple[Bench, dict[str, Any]]:
    """A size's towers, and the peaks to hold them against, found when `meanwhile` is done."""
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
    meanwhile()
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


def measure_first(name: str, chosen: argparse.Namespace, result: dict[str, Any]) -> None:
    """All sections of the first size; torch.compile works while answers are counted."""
    compiling = Compiling(name, MIX, chosen.repeats) if "compiled" in chosen.sections else None

    def meanwhile() -> None:
        if "accuracy" in chosen.sections:
            attempt("accuracy", partial(bundled_accuracy, torch.device("cuda")), result)
        if compiling is not None:
            compiling.wait()

    try:
        bench, into = prepared(name, chosen.repeats, meanwhile)
        runs = {} if compiling is None else {"compiled": compiling.times}
        measure(bench, {"mix": partial(mix, bench)} | runs | sections(bench), chosen, result, into)
    finally:
        if compiling is not None:
            compiling.close()


def measure_other(name: str, chosen: argparse.Namespace, result: dict[str, Any]) -> None:
    """The sections of another size."""
    bench, into = prepared(name, chosen.repeats, lambda: None)
    runs = {section: run for section, run in sections(bench).items() if section in OTHERS}
    measure(bench, runs, chosen, result, into)


def sections(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Those of one size, but for what runs in processes of its own."""
    return {section: partial(run, bench) for section, run in SECTIONS.items()}


def measure(
    bench: Bench,
    runs: dict[str, Callable[[], dict[str, Any]]],
    chosen: argparse.Namespace,
    result: dict[str, Any],
    into: dict[str, Any],
) -> None:
    """Run the chosen sections of one size; the result is written after each."""
    result["shapes"][bench.name] = into
    for section, run in runs.items():
        if section in chosen.sections:
            attempt(section, run, into)
            write_result(chosen.out, result)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the result after each section."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SIZES), default=["8b", "2b"])
    parser.add_argument("--sections", nargs="+", choices=EVERY, default=list(EVERY))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for all that can be left out")
    parser.add_argument("--out", type=Path, default=RESULTS / "lod_engines.json")
    chosen = parser.parse_args(arguments)
    result = facts("benchmarks/lod_engines.py", arguments, torch.device("cuda"))
    result |= {"dtype": "bfloat16", "repeats": chosen.repeats, "shapes": {}}
    first, *others = chosen.shapes
    measure_first(first, chosen, result)
    for name in others:
        if perf_counter() - START + _OTHER_SIZE < chosen.limit:
            measure_other(name, chosen, result)
    peak = matrix_peak()
    progress(f"peak again {peak / 1e12:.1f} TFLOP/s {clock()}")
    result["peak_tflops_at_the_end"] = round(peak / 1e12, 2)
    write_result(chosen.out, result)


if __name__ == "__main__":
    main(sys.argv[1:])
