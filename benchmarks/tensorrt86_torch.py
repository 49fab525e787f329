"""arrcoc's engines of TensorRT 8.6 on this GPU, beside torch: built, loaded, compared, asked, timed.

Python 3.10 is the newest that TensorRT 8.6.0 and torch share; `tensorrt86_torch.sh` prepares it. For the
bundled checkpoint (`arrcoc build`, preset demo) and for one of 2B's shapes with random weights of unit scale
(preset photo), one plan of four profiles is built in a process of its own. What needs no quiet GPU goes on
meanwhile: errors of every output, answers, threads. Nothing is timed until no build runs. Results are written
after every piece.

    benchmarks/tensorrt86_torch.sh BUNDLE BUNDLE310 [--cases bundled 2b] [--limit 420] [--out FILE]
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, facts, write_result
from tensorrt86_checks import answers, compare, streams, threads
from tensorrt86_engines import WAYS, Case, load, recipe
from tensorrt86_timing import BEGIN, Run, attempt, captured, matrix_peak, median_ms, say

from arrcoc.lod import BuiltEngines
from arrcoc.lod import build as builds

DEVICE = torch.device("cuda")
SCRIPT = Path(__file__)
_RESERVED = {"bundled": 25.0, "2b": 45.0}
"""Seconds of the limit kept for timing each case."""


class Building:
    """A build of one plan in a process of its own, unless an earlier run did it."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self._work = name, options.work
        self.folder, self._log = options.work / name, options.work / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        if not self.done:
            say(f"{name}: building")
            with self._log.open("wb") as log:
                command = [sys.executable, *self._command(options.level)]
                self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    @property
    def done(self) -> bool:
        """Whether there are engines: a build appears as a whole."""
        return (self.folder / "manifest.json").is_file()

    def wait(self, deadline: float) -> bool:
        """Until it is done or the deadline, when it is killed. Whether there are engines."""
        process = self._process
        if process is None:
            return self.done
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            say(f"{self.name}: not built in time, killed")
            process.kill()
            process.wait()
        say(f"{self.name}: exit {process.returncode}; {_tail(self._log)}")
        self._process = None
        return self.done

    def _command(self, level: int) -> list[str]:
        if self.name != "bundled":
            return [str(SCRIPT), "--build", self.name, "--work", str(self._work), "--level", str(level)]
        fixed = "-m arrcoc build --backend tensorrt --arch current --preset demo --precision fp16 --debug"
        return [*fixed.split(), "--optimization-level", str(level), "--out", str(self.folder)]


class Runner:
    """The cases of one call and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.end = options, BEGIN + options.limit
        self.whole = facts("benchmarks/tensorrt86_torch.py", sys.argv[1:], DEVICE)
        self.whole["versions"] |= {"tensorrt": "8.6.0"}
        self.whole |= {"level": options.level, "cases": {name: {} for name in options.cases}}
        self.building = {name: Building(name, options) for name in options.cases}
        self.cases: dict[str, Case] = {}
        self.opened: dict[str, BuiltEngines] = {}

    def do(self, name: str, piece: str, work: Callable[[], Any]) -> None:
        """One piece of a case's results, kept whatever becomes of the next."""
        begin = time.monotonic()
        try:
            self.whole["cases"][name][piece] = work()
        except Exception as error:  # a benchmark goes on with what works
            say(traceback.format_exc())
            self.whole["cases"][name][f"{piece}_failed"] = f"{type(error).__name__}: {error}"[:400]
        say(f"{name}: {piece} took {time.monotonic() - begin:.1f} s")
        write_result(self.options.out, self.whole)

    def run(self) -> None:
        """Everything that needs no quiet GPU while plans are built, the times after that."""
        for name in self.options.cases:
            self.cases[name] = Case(name, DEVICE)
            fused = self.cases[name].engine("fused", self.cases[name].config.sides[0])
            say(f"{name}: checkpoint; fused engines are {fused.backend}")
            if not self.options.no_compile:
                self.do(name, "compile_seconds", lambda name=name: self.compile(name))
        reserved = sum(_RESERVED[name] for name in self.options.cases)
        for name in self.options.cases:
            if self.building[name].wait(self.end - reserved):
                self.check(name)
        self.whole["matrix_peak_tflops"] = attempt(lambda: matrix_peak(DEVICE))
        say(f"fp16 matrix products reach {self.whole['matrix_peak_tflops']} TFLOP/s")
        for name in self.opened:
            self.do(name, "times", lambda name=name: self.times(name, lambda run: run))
            self.do(name, "streams", lambda name=name: streams(self.cases[name], self.opened[name]))
        for name in self.opened:
            self.do(name, "graph_times", lambda name=name: self.times(name, captured))

    def compile(self, name: str) -> dict[str, float]:
        """Seconds that torch.compile takes for each LOD, while plans are built."""
        found, case = {}, self.cases[name]
        for shape in reversed(case.shapes):
            if shape.batch == 1 or time.monotonic() > self.end - 60:
                continue
            begin = time.monotonic()
            case.engine("compiled", shape.side).encode(shape.pixels)
            torch.cuda.synchronize()
            found[shape.name] = round(time.monotonic() - begin, 1)
            say(f"{name}: compiled {shape.name} in {found[shape.name]} s")
        return found

    def check(self, name: str) -> None:
        """Load a build with its verification; compare, ask, and run it from two threads."""
        case = self.cases[name]
        begin = time.perf_counter()
        try:
            opened = BuiltEngines.open(self.building[name].folder, case.qwen)
            verified = time.perf_counter() - begin
            made = [case.engine("plan", side, opened) for side in case.config.sides]
        except Exception as error:  # a benchmark goes on with what works
            say(traceback.format_exc())
            self.whole["cases"][name]["load_failed"] = str(error)[:600]
            return
        torch.cuda.synchronize()
        manifest, kept = opened.manifest, self.whole["cases"][name]
        kept["build_seconds"] = manifest.build_seconds
        kept["plan_mb"] = round(manifest.files["tower.plan"].bytes / 1e6, 1)
        kept["open_seconds"], kept["load_seconds"] = round(verified, 2), round(time.perf_counter() - begin, 2)
        kept["scratch_mb"] = round(opened._plans["tower.plan"][1].memory.numel() / 1e6, 1)
        kept["backend"] = made[0].backend
        say(f"{name}: {kept}")
        self.opened[name] = opened
        self.do(name, "gflop", lambda: {shape.name: case.gflop(shape) for shape in case.shapes})
        self.do(name, "errors", lambda: compare(case, opened))
        self.do(name, "threads", lambda: threads(case, opened))
        if name == "bundled":
            self.do(name, "answers", lambda: answers(self.building[name].folder))

    def times(self, name: str, wrap: Callable[[Run], Run]) -> dict[str, dict[str, float | None]]:
        """Milliseconds of whole calls, uint8 tiles to features, as they are or wrapped."""
        case, found = self.cases[name], {}
        compiled = self.whole["cases"][name].get("compile_seconds", {})
        ways = [way for way in WAYS if wrap is not captured or way != "fused"]  # which replays graphs already
        for shape in case.shapes:
            entry: dict[str, float | None] = {}
            for way in ways:
                if way == "compiled" and shape.name not in compiled:
                    continue
                run = partial(case.engine(way, shape.side, self.opened[name]).encode, shape.pixels)
                entry[way] = attempt(lambda run=run: median_ms(wrap(run)))
            found[shape.name] = entry
            say(f"{name} {shape.name}: {entry}")
        return found


def _tail(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-4:])[-900:]


def build(name: str, work: Path, level: int) -> None:
    """Build the plan of a checkpoint that is made here, on this GPU."""
    plans = logging.getLogger("arrcoc.lod.plan")
    plans.setLevel(logging.DEBUG)
    plans.addHandler(logging.StreamHandler())
    made = load(name, DEVICE)
    made.model.to("cpu")
    say(f"{name}: weights")
    manifest = builds.build(recipe(name, work / name, level), made, lambda what, done, total: say(what))
    say(f"{name}: {manifest.build_seconds} s")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["bundled", "2b"], choices=["bundled", "2b"])
    parser.add_argument("--level", type=int, default=0, help="optimisation level of the builds")
    parser.add_argument("--limit", type=float, default=420, help="seconds for all of it")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--work", type=Path, default=Path("/tmp/trt310_work"), help="folder to work in")
    parser.add_argument("--out", type=Path, default=RESULTS / "tensorrt86_torch.json")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    chosen.work.mkdir(parents=True, exist_ok=True)
    if chosen.build:
        build(chosen.build, chosen.work, chosen.level)
    else:
        Runner(chosen).run()
        say("end")
