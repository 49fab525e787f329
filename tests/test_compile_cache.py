"""What Triton compiles for the LOD engines is kept on disk: a second process compiles nothing.

Kernels are compiled ahead of time for a named GPU, which needs none; running an engine needs one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from arrcoc.lod import attention, kernels

_TIMEOUT = 240


def watched() -> list[bool]:
    """For each kernel compiled in this process from now on, whether it came from the cache."""
    import triton

    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    return hits


def ahead(**changed: Any) -> list[str]:
    """Compile three kernels for compute capability 9.0; returns their keys."""
    import triton
    from triton.backends.compiler import GPUTarget

    jobs: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            kernels._norm,
            {"x": "*bf16", "y": "*bf16", "shift": "*fp32", "weight": "*bf16", "bias": "*bf16",
             "out": "*bf16", "scale": "*fp32", "count": "i32", "eps": "fp32"},
            {"WIDTH": 96, "HEAD": 64, "TAIL": 32, "ROWS": 4, "ADD": True, "FLOAT8": False},
        ),
        (
            attention._attend,
            {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "count": "i32", "scale": "fp32",
             "factor": "fp32"},
            {"HEADS": 2, "DIM": 72, "HEAD": 64, "TAIL": 16, "QUERIES": 64, "KEYS": 32, "EVEN": True},
        ),
        (
            kernels._quantize,
            {"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", "fixed": "fp32", "count": "i32"},
            {"WIDTH": 96, "HEAD": 64, "TAIL": 32, "ROWS": 4, "GELU": "tanh", "FIXED": True},
        ),
    ]  # fmt: skip
    target, found = GPUTarget("cuda", 90, 32), []
    for kernel, signature, constants in jobs:
        known = constants | {name: value for name, value in changed.items() if name in constants}
        types = signature | dict.fromkeys(known, "constexpr")
        source = triton.compiler.ASTSource(kernel, types, known)
        found.append(triton.compile(source, target=target).hash)
    return found


def engine() -> float:
    """Make and run a fused LOD engine of the bundled checkpoint; returns the seconds of that alone."""
    from arrcoc.demo.bundled import bundled_checkpoint
    from arrcoc.lod import TorchEngines
    from arrcoc.qwen import load

    device = torch.device("cuda")
    qwen = load(bundled_checkpoint()[0], device, torch.bfloat16)
    torch.cuda.synchronize()
    start = perf_counter()
    made = TorchEngines(qwen, kind="graphed").engine(2, (1, 4), 0)
    made.encode(torch.zeros(4, 3, 64, 64, dtype=torch.uint8, device=device))
    torch.cuda.synchronize()
    return perf_counter() - start


def child(code: str, folder: Path, seed: int) -> dict[str, Any]:
    """What a process of its own finds: `code` is an expression over this module, `t`."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_compile_cache as t; "
        f"hits = t.watched(); found = {code}; print(json.dumps(dict(hits=hits, found=found)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder, and when it was last written, in nanoseconds."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def test_a_second_process_takes_kernels_from_disk(tmp_path: Path) -> None:
    """Whatever order sets and hashes have in it; a kernel that is cut otherwise is another kernel."""
    first = child("t.ahead()", tmp_path, 1)
    kept = files(tmp_path)
    assert first["hits"] == [False] * 3
    assert sum(name.endswith(".cubin") for name in kept) == 3
    second = child("t.ahead()", tmp_path, 2)
    assert second == {"hits": [True] * 3, "found": first["found"]}
    assert files(tmp_path) == kept
    third = child("t.ahead(ROWS=8, QUERIES=32)", tmp_path, 3)
    assert third["hits"] == [False] * 3


@pytest.mark.gpu
def test_a_second_process_warms_up_from_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = child("t.engine()", tmp_path, 1)
    kept = files(tmp_path)
    assert first["hits"]
    assert not all(first["hits"])
    second = child("t.engine()", tmp_path, 2)
    with capsys.disabled():
        print(f"\nfirst process {first['found']:.2f} s, second {second['found']:.2f} s")
    assert second["hits"]
    assert all(second["hits"])
    assert files(tmp_path) == kept
    assert second["found"] < first["found"]
