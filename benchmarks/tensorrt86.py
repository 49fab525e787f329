"""One plan of TensorRT 8.6 with four profiles, built and run on this GPU, beside torch on the same shapes.

For the bundled checkpoint (preset demo) and for a tower of 2B's shape with random weights of unit scale
(preset photo): exports the fp16 tower to ONNX opset 17, has `tensorrt86_run.py` build and run the plan under
Python 3.9 with arrcoc's own plan modules, and compares every output with torch in fp32. The next graph is
exported and torch is compiled while a plan is built; nothing else runs on the GPU while any is timed. Results
are written after every piece.

    benchmarks/tensorrt86.sh BUNDLE [--plans bundled:1 2b:1+0] [--limit 240] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, facts, write_result
from tensorrt86_cases import CASES, MAX_BATCH, prepare
from tensorrt86_child import Child
from tensorrt86_timing import BEGIN, Compiled, attempt, matrix_peak, say, time_torch


class Bench:
    """One case: its tower, its graph and its references, made once; then plans of it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.folder = name, options, options.work / name
        case = CASES[name](torch.device(options.device))
        listed, self.job, self.found = prepare(case, self.folder)
        self.case, self.listed, self.compiled = case, listed, Compiled(case, listed)
        self.torch: dict[str, Any] | None = None
        say(f"{name}: exported and referenced, {self.found}")

    def start(self, level: int, pin: bool, deadline: float) -> Child:
        """Start building a plan."""
        place = self.folder / (f"level{level}" + ("" if pin else ".free"))
        place.mkdir(exist_ok=True)
        (place / "job.json").write_text(json.dumps(self.job | {"level": level, "pin": pin}))
        say(f"{self.name}: building, level {level}, {'pinned' if pin else 'free'}")
        return Child(self.options.bundle, place, deadline - time.monotonic())

    def compile_beside(self, children: list[Child]) -> None:
        """Have torch compile, unless it has, for as long as a plan is being built."""
        if not (self.compiled.seconds or self.options.no_torch):
            self.compiled.warm_up(lambda: all(child.built.is_set() for child in children))

    def beside(self) -> dict[str, Any]:
        """Torch on the same shapes, measured once."""
        if self.torch is None and not self.options.no_torch:
            self.torch = time_torch(self.case, self.listed, self.compiled)
        return {"ms": self.torch, "compile_seconds": self.compiled.seconds}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, help="folder of TensorRT 8.6 and Python 3.9")
    parser.add_argument("--work", type=Path, default=Path("/tmp/trt86_work"), help="folder to work in")
    parser.add_argument(
        "--plans",
        nargs="+",
        metavar="CASE:LEVEL[+LEVEL][:free]",
        default=["bundled:1+0", "2b:1+0", "bundled:3"],
        help="what to build, at which level; further levels after + are built at the same time, and measured "
        "if those before could not be; free: the builder may choose the rotary's precision",
    )
    parser.add_argument("--limit", type=float, default=240, help="seconds for all of it")
    parser.add_argument("--measuring", type=float, default=30, help="seconds of them kept for what was built")
    parser.add_argument("--no-torch", action="store_true", help="leave the timing of torch out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "tensorrt86.json")
    return parser.parse_args()


def main() -> None:
    """Measure the cases in turn."""
    options = arguments()
    whole = facts("benchmarks/tensorrt86.py", sys.argv[1:], torch.device(options.device))
    whole["versions"] |= {"tensorrt": "8.6.0 under Python 3.9.2"}
    whole["max_batch"] = MAX_BATCH
    whole["cases"] = {}
    run = Runner(options, whole)
    for number, wanted in enumerate(options.plans):
        try:
            run.measure(number, wanted)
        except Exception:  # a benchmark goes on with what works
            say(traceback.format_exc())
    say("end")


class Runner:
    """The plans of one call, built one group after another, and the results so far."""

    def __init__(self, options: argparse.Namespace, whole: dict[str, Any]) -> None:
        self.options, self.whole, self.end = options, whole, BEGIN + options.limit
        whole["matrix_peak_tflops"] = attempt(lambda: matrix_peak(torch.device(options.device)))
        say(f"fp16 matrix products reach {whole['matrix_peak_tflops']} TFLOP/s")
        self._benches: dict[str, Bench] = {}

    def bench(self, name: str) -> Bench:
        """A case, exported at its first use."""
        return self._benches.get(name) or self._benches.setdefault(name, Bench(name, self.options))

    def measure(self, number: int, wanted: str) -> None:
        """Build the plans of one group at once, and measure the first that is built, then torch."""
        options = self.options
        name, levels, *free = wanted.split(":")
        # The first plan must not take all of the time.
        deadline = min(self.end, time.monotonic() + 0.55 * options.limit) if number == 0 else self.end
        if deadline - time.monotonic() < options.measuring:
            say(f"no time left for {wanted}")
            return
        bench = self.bench(name)
        entry = self.whole["cases"].setdefault(name, bench.found | {"plans": {}, "torch": None})
        children = {level: bench.start(int(level), not free, deadline) for level in levels.split("+")}
        self._prepare_next(number)
        bench.compile_beside(list(children.values()))
        for child in children.values():
            child.wait(deadline - options.measuring - time.monotonic())
        for level, child in children.items():
            if any(spare.measured for spare in children.values()):
                child.stop()
            else:
                child.go()
            entry["plans"][":".join([name, level, *free])] = child.lines
            write_result(options.out, self.whole)
        entry["torch"] = bench.beside()
        write_result(options.out, self.whole)

    def _prepare_next(self, number: int) -> None:
        """Export the next group's case, which asks nothing of the GPU that a build would notice."""
        following = self.options.plans[number + 1 : number + 2]
        try:
            for wanted in following:
                self.bench(wanted.partition(":")[0])
        except Exception:  # it is tried again in its turn
            say(traceback.format_exc())


if __name__ == "__main__":
    main()
