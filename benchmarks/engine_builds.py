"""What it takes to build full-size engines with TensorRT-RTX on a machine without a GPU.

A vision tower of Qwen3-VL-2B's shape with random weights, fp16, one plan with four profiles for three
architectures, by way of `arrcoc.lod.build`: seconds, bytes, and the process's peak memory. Every build has a
process of its own.

    python benchmarks/engine_builds.py [--presets photo gigapixel]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import RESULTS, facts, progress, write_result
from tensorrt86_cases import random_2b

from arrcoc import config as configs
from arrcoc.lod import build
from arrcoc.lod.recipe import Recipe

ARCHS = ("sm80", "sm89", "sm120")
MAX_BATCH = {"photo": (64, 16, 8, 4), "gigapixel": (64, 32, 8, 8)}
"""As in the recipes of engines/."""
CPU = torch.device("cpu")


def build_one(preset: str, out: Path) -> dict[str, Any]:
    """Build, and tell seconds, bytes and peak memory of this process."""
    tower, weights = random_2b(CPU)
    stand_in: Any = SimpleNamespace(
        vision=weights(tower), dtype=torch.float16, device=CPU, width=2048, fingerprint="random weights"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    recipe = Recipe(
        preset=preset,
        backend="tensorrt_rtx",
        arch=ARCHS,
        max_batch=MAX_BATCH.get(preset, (64, 16, 8, 4)),
        out=out,
    )
    begin = machine_seconds(), own_seconds()
    manifest = build.build(recipe, stand_in, _told)
    others = (machine_seconds() - begin[0]) - (own_seconds() - begin[1])
    merge, halo = weights(tower).merge, configs.load(preset).halo
    return {
        "sides": manifest.sides,
        "patches": [((side + 2 * halo) * merge) ** 2 for side in manifest.sides],
        "max_batch": recipe.max_batch,
        "archs": ARCHS,
        "precision": manifest.precision,
        "builder": manifest.builder,
        "opset": manifest.opset,
        "seconds": manifest.build_seconds,
        "others_cpu_share": round(others / manifest.build_seconds / (os.cpu_count() or 1), 3),
        "files": {name: file.bytes for name, file in manifest.files.items()},
        "weight_bytes": 2 * sum(p.numel() for p in tower.parameters()),
        "peak_bytes_before": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def machine_seconds() -> float:
    """Seconds that all cores together were busy since the machine started (proc(5), /proc/stat)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Seconds of CPU that this process took."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _told(what: str, done: int, total: int) -> None:
    if not total:
        progress(what)


def in_own_process(preset: str) -> dict[str, Any]:
    """`build_one`, in a fresh process and a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", preset, "--folder", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Build every preset in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["photo", "gigapixel"])
    parser.add_argument("--one", help="build this preset here and print what it took")
    parser.add_argument("--folder", type=Path, help="where to build --one")
    parser.add_argument("--out", type=Path, default=RESULTS / "engine_builds.json")
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(build_one(options.one, options.folder / "engines")) + "\n")
        return
    whole = facts("benchmarks/engine_builds.py", sys.argv[1:], CPU)
    for name in ("onnx", "onnxscript", "tensorrt-rtx-cu13"):
        whole["versions"][name] = importlib.metadata.version(name)
    whole["builds"] = {}
    for preset in options.presets:
        progress(f"preset {preset}")
        whole["builds"][preset] = in_own_process(preset)
        write_result(options.out, whole)


if __name__ == "__main__":
    main()
