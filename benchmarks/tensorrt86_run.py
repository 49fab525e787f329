"""The Python 3.9 side of `tensorrt86.py`: builds the plan of one folder, runs every profile, times it.

    python3.9 benchmarks/tensorrt86_run.py FOLDER LIBCUDART

FOLDER holds `job.json` and what it names. Results go to stdout, a line of JSON each. After the plan is built
it waits for a line on stdin, so that nothing else is on the GPU while it measures.
"""

from __future__ import annotations

import ctypes
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arrcoc.lod import plan_builder
from arrcoc.lod.plan import Context, Plan

WINDOWS, WINDOW_MS = 9, 15.0
_TO_DEVICE, _TO_HOST = 1, 2


class Cuda:
    """The few calls of the CUDA runtime that are needed, through ctypes."""

    def __init__(self, library: str) -> None:
        self._lib = ctypes.CDLL(library)
        self("cudaSetDevice", 0)
        self("cudaFree", ctypes.c_void_p(0))

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call by name; raises RuntimeError with the CUDA error's number."""
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} gave CUDA error {status}")

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """A handle or address that a call writes to its first argument."""
        place = ctypes.c_void_p()
        self(name, ctypes.byref(place), *arguments)
        return place

    def memory(self, size: int) -> int:
        """Address of new device memory; it is never freed."""
        return int(self.made("cudaMalloc", ctypes.c_size_t(max(size, 1))).value or 0)

    def upload(self, array: Any) -> int:
        """Address of a copy on the device."""
        dense = np.ascontiguousarray(array)
        address = self.memory(dense.nbytes)
        source = dense.ctypes.data_as(ctypes.c_void_p)
        self("cudaMemcpy", ctypes.c_void_p(address), source, ctypes.c_size_t(dense.nbytes), _TO_DEVICE)
        return address

    def download(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """A copy on the host."""
        array = np.empty(shape, dtype)
        target = array.ctypes.data_as(ctypes.c_void_p)
        self("cudaMemcpy", target, ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes), _TO_HOST)
        return array

    def free_bytes(self) -> int:
        """Device memory that is free."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Until a stream is empty."""
        self("cudaStreamSynchronize", stream)

    def median_ms(self, run: Callable[[], None], stream: ctypes.c_void_p) -> float:
        """Milliseconds of one run, by CUDA events: median over windows of runs in a row, after a warm-up."""
        begin, end = self.made("cudaEventCreate"), self.made("cudaEventCreate")

        def window(count: int) -> float:
            self("cudaEventRecord", begin, stream)
            for _ in range(count):
                run()
            self("cudaEventRecord", end, stream)
            self("cudaEventSynchronize", end)
            elapsed = ctypes.c_float()
            self("cudaEventElapsedTime", ctypes.byref(elapsed), begin, end)
            return elapsed.value / count

        window(5)
        count = max(3, min(200, int(WINDOW_MS / max(window(5), 1e-3))))
        return round(statistics.median(window(count) for _ in range(WINDOWS)), 4)

    def graph(self, run: Callable[[], None], stream: ctypes.c_void_p) -> Callable[[], None]:
        """What a run puts on a stream, captured as a CUDA graph; calling the result replays it there."""
        self("cudaStreamBeginCapture", stream, 1)  # of this thread alone
        run()
        recorded = ctypes.c_void_p()
        self("cudaStreamEndCapture", stream, ctypes.byref(recorded))
        replayable = self.made("cudaGraphInstantiate", recorded, ctypes.c_ulonglong(0))
        return lambda: self("cudaGraphLaunch", replayable, stream)


def relative(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|, Frobenius norms in fp64; -1 where something is not finite."""
    if not np.isfinite(found).all():
        return -1.0
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide) / np.linalg.norm(wide))


def tell(kind: str, **facts: Any) -> None:
    """One line of results."""
    sys.stdout.write(json.dumps({"kind": kind, **facts}) + "\n")
    sys.stdout.flush()


def build(folder: Path, job: dict[str, Any]) -> bytes:
    """Build the plan, or take the one that a run before this built."""
    kept = folder / "tower.plan"
    if kept.is_file():
        tell("built", kept=True)
        return kept.read_bytes()
    pinned: list[int] = []
    pin = plan_builder.pin_types

    def counted(trt: Any, config: Any, network: Any, precision: str) -> int:
        pinned.append(pin(trt, config, network, precision) if job["pin"] else 0)
        return pinned[-1]

    plan_builder.pin_types = counted
    options = plan_builder.PlanOptions(job["precision"], level=job["level"])
    start = time.perf_counter()
    data = plan_builder.build("tensorrt", Path(job["onnx"]), job["profiles"], options)
    seconds = round(time.perf_counter() - start, 1)
    kept.write_bytes(data)
    tell("built", build_seconds=seconds, plan_mb=round(len(data) / 1e6, 1), pinned_layers=pinned[0])
    return data


def load(cuda: Cuda, data: bytes, stream: int) -> tuple[Plan, list[Context]]:
    """Deserialise; a context for each profile, all over one piece of scratch memory."""
    free, start = cuda.free_bytes(), time.perf_counter()
    plan = Plan("tensorrt", data)
    seconds, after = time.perf_counter() - start, cuda.free_bytes()
    own = [plan.context(profile, stream) for profile in range(plan.n_profiles)]
    cuda("cudaDeviceSynchronize")
    apart = after - cuda.free_bytes()
    del own
    before = cuda.free_bytes()
    scratch = cuda.memory(max(plan.scratch_bytes(profile) for profile in range(plan.n_profiles)))
    contexts = [plan.context(profile, stream, scratch) for profile in range(plan.n_profiles)]
    cuda("cudaDeviceSynchronize")
    tell(
        "loaded",
        load_seconds=round(seconds, 2),
        plan_mb_on_device=round((free - after) / 1e6, 1),
        contexts_apart_mb=round(apart / 1e6, 1),
        contexts_shared_mb=round((before - cuda.free_bytes()) / 1e6, 1),
        scratch_mb=round(plan.scratch_bytes(0) / 1e6, 1),
    )
    return plan, contexts


def inputs_of(run: dict[str, Any], batch: int) -> dict[str, Any]:
    """Arrays of one run, its patches cut to a batch."""
    arrays = {name: np.load(file) for name, file in run["inputs"].items()}
    arrays["patches"] = arrays["patches"][:batch]
    return arrays


class Bound:
    """One profile with its inputs on the device and room for its outputs."""

    def __init__(self, cuda: Cuda, plan: Plan, context: Context, arrays: dict[str, Any], stream: Any) -> None:
        self._cuda, self._plan, self._context, self._stream = cuda, plan, context, stream
        self._shapes = context.bind({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            assert plan.dtype(name) == array.dtype.name, (name, plan.dtype(name), array.dtype)
        self._addresses = {name: cuda.upload(array) for name, array in arrays.items()}
        for name, shape in self._shapes.items():
            size = int(np.prod(shape)) * np.dtype(plan.dtype(name)).itemsize
            self._addresses[name] = cuda.memory(size)

    def run(self) -> None:
        """Enqueue once."""
        self._context.enqueue(self._addresses, self._stream.value)

    def outputs(self) -> Iterator[tuple[str, Any]]:
        """Run once; each output's name and array."""
        self.run()
        self._cuda.wait(self._stream)
        for name, shape in self._shapes.items():
            yield name, self._cuda.download(self._addresses[name], shape, self._plan.dtype(name))


def errors(found: dict[str, Any], files: dict[str, str], batch: int) -> dict[str, Any]:
    """Relative error of the tokens and of every DeepStack plane."""
    tokens, planes = (np.load(files[name]) for name in ("tokens", "deepstack"))
    pairs = [(plane, planes[number, :batch]) for number, plane in enumerate(found["deepstack"])]
    return {
        "tokens": round(relative(found["tokens"], tokens[:batch]), 6),
        "planes": [round(relative(a, b), 6) for a, b in pairs],
    }


def run_one(cuda: Cuda, plan: Plan, context: Context, run: dict[str, Any], batch: int) -> None:
    """Compare and time one profile at one batch."""
    stream = cuda.made("cudaStreamCreate")
    arrays = inputs_of(run, batch)
    bound = Bound(cuda, plan, context, arrays, stream)
    found = dict(bound.outputs())
    facts = {name: errors(found, files, batch) for name, files in run["references"].items()}
    turned = dict(Bound(cuda, plan, context, {**arrays, "sin": -arrays["sin"]}, stream).outputs())
    wrong = errors(turned, run["references"]["fp32"], batch)
    facts["rotation_flipped_tokens"] = wrong["tokens"]
    bound = Bound(cuda, plan, context, arrays, stream)
    facts["ms"] = cuda.median_ms(bound.run, stream)
    tell("run", name=run["name"], batch=batch, **facts)
    try:
        replay = cuda.graph(bound.run, stream)
        tell("graph", name=run["name"], batch=batch, ms=cuda.median_ms(replay, stream))
    except RuntimeError as error:
        tell("graph", name=run["name"], batch=batch, ms=None, refused=str(error))


def main(folder: Path, library: str) -> None:
    """Build, wait, run all profiles."""
    logging.basicConfig(
        filename=str(folder / "tensorrt.log"), level=logging.DEBUG, format="%(relativeCreated)d %(message)s"
    )
    job = json.loads((folder / "job.json").read_text())
    cuda = Cuda(library)
    data = build(folder, job)
    sys.stdin.readline()
    stream = cuda.made("cudaStreamCreate")
    plan, contexts = load(cuda, data, int(stream.value or 0))
    for number, run in enumerate(job["runs"]):
        for batch in run["batches"]:
            run_one(cuda, plan, contexts[number], run, batch)
    tell("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
