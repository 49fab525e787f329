"""Compiles the fused tower's Triton kernels into their cache, in processes side by side.

One after the other they take longer than what is measured. Processes must be forked before CUDA is in use,
and importing transformers' Qwen3-VL with torchao installed uses it: so this is a script of its own.

    python benchmarks/lod_engines_kernels.py WIDTH MLP     of a vision tower with 16 heads
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
from common import progress

from arrcoc.lod import kernels
from arrcoc.lod.attention import attend, fastest_blocks
from arrcoc.lod.gemm import scaled_linear
from arrcoc.vision import VisionWeights

ROWS = 256
_HEADS = 16
_MERGED = 4
_PROCESSES = 17
_MOST_SECONDS = 40.0


def main(width: int, mlp: int) -> None:
    """Compile all kernels, and return when they are compiled."""
    assert not torch.cuda.is_initialized(), "a forked process cannot use its parent's context"
    made, children = jobs(width, mlp), []
    processes = max(1, min(_PROCESSES, (os.cpu_count() or 1) - 2))
    for number in range(processes):
        child = os.fork()
        if child == 0:
            _work(made[number::processes])
        children.append(child)
    _wait_for(children)


def _work(share: Sequence[Callable[[], object]]) -> None:
    """Run jobs and end the process; what fails here fails, and is told, in the benchmark itself."""
    try:
        for job in share:
            job()
        torch.cuda.synchronize()
    except Exception as error:
        progress(f"compiling ahead: {type(error).__name__}: {error}"[:300])
    finally:
        os._exit(0)


def _wait_for(children: Sequence[int]) -> None:
    """Wait until the processes have ended; those that take longer are ended."""
    end = time.perf_counter() + _MOST_SECONDS
    for child in children:
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.perf_counter() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                break
            time.sleep(0.02)


def jobs(
    width: int, mlp: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> list[Callable[[], object]]:
    """One for each kernel as a tower of this size launches it; nothing is allocated before it is called."""
    joined = _MERGED * width

    def rows(columns: int) -> torch.Tensor:
        return torch.ones(ROWS, columns, device=device, dtype=dtype)

    def line(columns: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(columns, device=device, dtype=kind)

    def norm(columns: int, add: bool, float8: bool) -> object:
        x, more = rows(columns), rows(columns) if add else None
        rest = line(columns, torch.float32), line(columns), line(columns), 1e-6
        if float8:
            return kernels.layer_norm_float8(x, more, *rest)
        return kernels.layer_norm(x, *rest) if more is None else kernels.add_layer_norm(x, more, *rest)

    def angles(count: int) -> torch.Tensor:
        return torch.ones(count, width // _HEADS // 2, device=device)

    def attention(count: int, step: float | None) -> object:
        blocks = fastest_blocks(count, width // _HEADS)
        assert blocks is not None, count
        qkv = rows(3 * width)[:count].view(1, count, 3 * width)
        return attend(qkv, angles(count), angles(count), _HEADS, blocks, step)

    def rotation(parts: str) -> None:
        kernels.rotate_(rows(3 * width), angles(ROWS), angles(ROWS), _HEADS, parts)

    def product() -> object:
        x, w = (torch.ones(n, width, device=device).to(kernels.FLOAT8) for n in (ROWS, mlp))
        scales = angles(ROWS)[:, :1].contiguous(), torch.ones(1, mlp, device=device)
        return scaled_linear(x, scales[0], w, scales[1], line(mlp), gelu=True, step=0.5)

    def patches() -> object:
        stats = (0.5, 0.5, 0.5)
        weights = VisionWeights(None, line(width), None, (), None, {}, _HEADS, 16, 2, stats, stats)  # type: ignore[arg-type]
        pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
        return kernels.patches(pixels, weights, dtype)

    return [
        product,
        lambda: attention(64, None),
        lambda: attention(64, 0.5),
        lambda: attention(144, None),
        lambda: attention(144, 0.5),
        lambda: norm(width, False, False),
        lambda: norm(width, False, True),
        lambda: norm(width, True, True),
        lambda: norm(width, True, False),
        lambda: norm(joined, False, False),
        lambda: norm(joined, True, False),
        lambda: kernels.quantize_rows(rows(width), step=0.5, warps=2),
        lambda: kernels.quantize_rows(rows(joined)),
        lambda: kernels.quantize_rows(rows(joined), gelu="erf"),
        lambda: rotation("k"),
        lambda: rotation("qk"),
        patches,
    ]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
