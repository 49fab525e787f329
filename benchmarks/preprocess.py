"""From the bytes of a JPEG file to tiles: arrcoc beside the stock Qwen3-VL image processor, in one run.

On the CPU (2 cores) stock's torchvision and PIL processors take turns with arrcoc on the same file. arrcoc's
time holds what stock does not do: the grid, LOD background and content hashes. On CUDA the stages are timed
one by one and together, nvJPEG is compared with Pillow, and launches and waits are counted.

    python benchmarks/preprocess.py [--device cpu|cuda] [--sizes 1024x1024 3584x3584] [--repeats 7]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, facts, progress, write_result
from jpegs import jpeg as jpeg_file
from PIL import Image

from arrcoc import config as configs
from arrcoc import image, jpeg
from arrcoc.config import Config
from arrcoc.records import Frame

TOKEN_PX = 32
SIZES = {"cpu": ["1024x1024", "1792x1792", "3584x3584", "2160x3840"]}
SIZES["cuda"] = [*SIZES["cpu"], "8960x8960"]


class Arrcoc:
    """arrcoc's way from bytes to tiles, for images of one size.

    Every tile is cut at LOD high, as stock's patches hold the whole image; a request cuts only those that its
    plan refines.
    """

    def __init__(self, data: bytes, size: tuple[int, int], device: torch.device) -> None:
        self.data, self.device = data, device
        self.config: Config = configs.PresetChoice.make("auto", {}).choose(*size)
        self.nvjpeg = jpeg.chosen("auto", device)

    def decode(self, nvjpeg: bool | None = None) -> torch.Tensor:
        """The decoded image on the device."""
        chosen = self.nvjpeg if nvjpeg is None else nvjpeg
        return image.decode(self.data, self.config.max_source_pixels, self.device, chosen)

    def frame(self, pixels: torch.Tensor) -> Frame:
        """Resized to whole tiles, with LOD background and hashes."""
        return image.frame(pixels, self.config, TOKEN_PX, self.device)

    def tiles(self, frame: Frame) -> torch.Tensor:
        """Every tile at LOD high, with its halo."""
        side, margin = self.config.sides[3] * TOKEN_PX, self.config.halo * TOKEN_PX
        return image.tile_pixels(frame, side, torch.arange(frame.grid.count), margin)

    def hashes(self, frame: Frame, tiles: torch.Tensor) -> list[list[int]]:
        """Content hashes on the host: the one copy back."""
        found = image.hash_tiles(tiles) if self.config.halo else frame.hashes
        return list(found.tolist())

    def run(self) -> torch.Tensor:
        """All of it."""
        frame = self.frame(self.decode())
        tiles = self.tiles(frame)
        self.hashes(frame, tiles)
        return tiles

    def stages(self, repeats: int) -> dict[str, float]:
        """Median milliseconds of every stage alone, and of all together."""
        pixels = self.decode()
        frame = self.frame(pixels)
        tiles = self.tiles(frame)
        timed = {
            "decode": lambda: self.decode(),
            "frame": lambda: self.frame(pixels),
            "tiles": lambda: self.tiles(frame),
            "hash_copy": lambda: self.hashes(frame, tiles),
            "total": lambda: self.run(),
        }
        return {name: median_ms(work, repeats, self.device) for name, work in timed.items()}


def median_ms(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median wall time of `work` with the device's queue empty at both ends, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = perf_counter()
        work()
        _wait(device)
        times.append((perf_counter() - start) * 1e3)
    return round(statistics.median(times[1:]), 3)


def beside_stock(case: Arrcoc, processors: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of arrcoc and of every stock processor, taking turns, and stock over arrcoc."""

    def stock(processor: Any) -> None:
        with Image.open(io.BytesIO(case.data)) as opened:
            processor(images=[opened.convert("RGB")], return_tensors="pt")

    work: dict[str, Callable[[], Any]] = {"arrcoc": case.run}
    work |= {name: (lambda p=p: stock(p)) for name, p in processors.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            start = perf_counter()
            run()
            times[name].append((perf_counter() - start) * 1e3)
    # Fastest as well: other work on the machine only ever adds.
    middle = {name: round(statistics.median(runs[1:]), 1) for name, runs in times.items()}
    best = {name: round(min(runs[1:]), 1) for name, runs in times.items()}
    ratios = {n: round(middle[n] / middle["arrcoc"], 2) for n in processors}
    return {"median_ms": middle, "fastest_ms": best, "stock_over_arrcoc": ratios}


def on_cuda(case: Arrcoc, repeats: int) -> dict[str, Any]:
    """Decoding by nvJPEG and by Pillow, how far they differ, launches and waits of the whole way."""
    made: dict[str, Any] = {"pillow_decode_ms": median_ms(lambda: case.decode(False), 2, case.device)}
    if case.nvjpeg:
        ours, theirs = case.decode(True).int(), case.decode(False).int()
        off = (ours - theirs).abs().flatten()
        part = off[:: max(1, len(off) // 4_000_000)].float()
        made["nvjpeg_levels_off"] = {
            "mean": round(float(off.float().mean()), 3),
            "p99": float(part.quantile(0.99)),
            "p999": float(part.quantile(0.999)),
            "most": int(off.max()),
        }
    return made | counted(case)


def counted(case: Arrcoc) -> dict[str, Any]:
    """Kernel launches, copies and host waits of one run, and its longest kernels, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    case.run()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        case.run()
        torch.cuda.synchronize()
    averages = found.key_averages()
    calls = {a.key: a.count for a in averages if a.key.startswith(("cudaLaunch", "cuLaunch", "cudaMemcpy"))}
    calls |= {a.key: a.count for a in averages if "Synchronize" in a.key}
    kernels = sorted(averages, key=lambda a: -a.self_device_time_total)[:10]
    times = {a.key[:60]: [round(a.self_device_time_total / 1e3, 3), a.count] for a in kernels}
    return {"calls": calls, "kernels_ms_and_count": {k: v for k, v in times.items() if v[0] > 0}}


def stock_processors() -> dict[str, Any]:
    """The stock image processors that this installation has; the first is what stock takes by default."""
    from transformers import AutoImageProcessor

    from arrcoc.demo.checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder) / "tiny")
        made = {}
        for backend in ("torchvision", "pil"):
            try:
                made[f"stock_{backend}"] = AutoImageProcessor.from_pretrained(path, backend=backend)
            except (ImportError, ValueError) as error:
                progress(f"stock's {backend} processor is not to be had: {error}")
    return made


def measure(size: str, device: torch.device, processors: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One image size."""
    height, width = map(int, size.split("x"))
    data = jpeg_file(height, width)
    case = Arrcoc(data, (height, width), device)
    made: dict[str, Any] = {"height": height, "width": width, "jpeg_bytes": len(data)}
    made |= {"sides": list(case.config.sides), "halo": case.config.halo}
    made["stages_ms"] = case.stages(repeats)
    progress(f"{size}, {len(data) / 1e6:.1f} MB: {made['stages_ms']}")
    further = on_cuda(case, repeats) if device.type == "cuda" else beside_stock(case, processors, repeats)
    for name, value in further.items():
        progress(f"    {name}: {value}")
    return made | further


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON."""
    options = _options(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    processors = stock_processors() if device.type == "cpu" else {}
    result: dict[str, Any] = {
        "benchmark": "preprocess",
        **facts("benchmarks/preprocess.py", arguments, device),
        "jpeg": jpeg.describe("auto", device),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": options.repeats,
        "cases": [],
    }
    progress(f"{result['device']}, JPEG by {result['jpeg']}")
    out = Path(options.out or RESULTS / f"preprocess{'_cuda' if device.type == 'cuda' else ''}.json")
    for size in options.sizes or SIZES[device.type]:
        try:
            with torch.inference_mode():
                result["cases"].append(measure(size, device, processors, options.repeats))
        except (RuntimeError, ValueError, AssertionError):
            progress(traceback.format_exc())
        write_result(out, result)  # after every case: an interrupted run keeps the earlier ones


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", help="heights and widths in pixels, for example 3584x3584")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs, after one warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--out")
    return parser.parse_args(arguments)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
