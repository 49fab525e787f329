"""Times of torch for `tensorrt86.py`: eager and compiled, launched and as CUDA graphs."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tensorrt86_cases import Case, Shape

WINDOWS, WINDOW_MS = 9, 15.0
BEGIN = time.monotonic()

Run = Callable[[], Any]


def say(line: str) -> None:
    """One line on stdout, at once, with the seconds since the start."""
    sys.stdout.write(f"[{time.monotonic() - BEGIN:6.1f}] {line}\n")
    sys.stdout.flush()


class Compiled:
    """A tower under torch.compile, one graph for each shape."""

    def __init__(self, case: Case, listed: list[Shape]) -> None:
        torch._dynamo.config.recompile_limit = 64
        self.case, self.listed = case, listed
        self.run = torch.compile(case.half, dynamic=False)
        self.seconds: dict[str, float] = {}

    @torch.inference_mode()
    def warm_up(self, until: Callable[[], bool]) -> None:
        """Compile shape after shape, until told to stop."""
        for shape in reversed(self.listed):
            if until():
                return
            start = time.perf_counter()
            try:
                self.run(*shape.cut(shape.batch))
                torch.cuda.synchronize()
            except Exception:  # a benchmark goes on with what works
                say(traceback.format_exc()[-1500:])
                return
            self.seconds[shape.name] = round(time.perf_counter() - start, 1)
            say(f"compiled {self.case.name} {shape.name} in {self.seconds[shape.name]} s")


@torch.inference_mode()
def time_torch(case: Case, listed: list[Shape], compiled: Compiled) -> dict[str, Any]:
    """Milliseconds by shape and batch: eager and compiled, each launched and as a CUDA graph."""
    found: dict[str, Any] = {}
    for shape in listed:
        for batch in dict.fromkeys((shape.batch, 1)):
            inputs = shape.cut(batch)
            entry: dict[str, float | None] = {}
            runs: dict[str, Run] = {"eager": lambda inputs=inputs: case.half(*inputs)}
            if batch == shape.batch and shape.name in compiled.seconds:
                runs["compiled"] = lambda inputs=inputs: compiled.run(*inputs)
            for name, run in runs.items():
                entry[name] = median_ms(run)
                entry[f"{name} graph"] = attempt(lambda run=run: median_ms(captured(run)))
            found[f"{shape.name} x{batch}"] = entry
            say(f"torch {case.name} {shape.name} x{batch}: {entry}")
    return found


def attempt(work: Callable[[], float]) -> float | None:
    """A measurement, or None where it fails; says why."""
    try:
        return work()
    except Exception:  # a benchmark goes on with what works
        say(traceback.format_exc()[-800:])
        return None


def captured(run: Run) -> Run:
    """A run as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def matrix_peak(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a large square product in fp16: what the floor is reckoned with."""
    size = size if device.type == "cuda" else 64
    left, right = (torch.randn(size, size, device=device, dtype=torch.float16) for _ in range(2))
    return round(2 * size**3 / median_ms(lambda: left @ right) / 1e9, 1)


def median_ms(run: Run) -> float:
    """Milliseconds of one run, by CUDA events: median over windows of runs in a row, after a warm-up."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def window(count: int) -> float:
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    window(5)
    count = max(3, min(200, int(WINDOW_MS / max(window(5), 1e-3))))
    return round(statistics.median(window(count) for _ in range(WINDOWS)), 4)
