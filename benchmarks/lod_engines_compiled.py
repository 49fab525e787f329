"""torch.compile of the eager tower: default mode, static shapes, each in a process of its own.

All shapes compile at once; each process then waits, idle, until it is told to measure. So compiling costs
the benchmark the time of the slowest one, and no time is taken while anything compiles.

    python benchmarks/lod_engines_compiled.py SIZE SIDE TILES REPEATS FOLDER     one process, for Compiling
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from common import progress, write_result

_MOST_SECONDS = 150.0
"""Of all compilations together."""
_TO_MEASURE = 30.0


class Compiling:
    """Processes that compile, and wait when they have."""

    def __init__(self, name: str, shapes: Sequence[tuple[int, int]], repeats: int) -> None:
        """Start one for each (side, tiles) of a size; their compilers share the machine's cores."""
        self._folder = tempfile.TemporaryDirectory()
        self._begin, self._children = perf_counter(), dict[int, subprocess.Popen[str]]()
        threads = max(1, (os.cpu_count() or 1) // len(shapes))
        settings = {
            "TORCHINDUCTOR_CACHE_DIR": f"{self._folder.name}/inductor",
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        }
        for side, count in shapes:
            arguments = [name, str(side), str(count), str(repeats), self._folder.name]
            with open(self._file(side, "log"), "w", encoding="utf-8") as log:
                self._children[side] = subprocess.Popen(
                    [sys.executable, __file__, *arguments],
                    env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    text=True,
                )  # fmt: skip

    def wait(self) -> None:
        """Until each process has compiled or ended; what takes too long is ended."""
        for side, child in self._children.items():
            while not self._file(side, "json").exists() and child.poll() is None:
                if perf_counter() - self._begin > _MOST_SECONDS:
                    child.kill()
                    child.wait()
                sleep(0.05)
            state = "compiled" if child.poll() is None else f"failed: {self._last_line(side)}"
            progress(f"  {side * side} tokens {state} after {perf_counter() - self._begin:.0f} s")

    def times(self) -> dict[str, Any]:
        """Median milliseconds by tokens of a tile, one process after another, and how long each compiled."""
        found: dict[str, Any] = {"compile_s": {}, "at_once": len(self._children), "failed": {}}
        for side, child in self._children.items():
            tokens = str(side * side)
            try:
                out, _ = child.communicate("\n", _TO_MEASURE)
                found[tokens] = json.loads(out.splitlines()[-1])["ms"]
                found["compile_s"][tokens] = json.loads(self._file(side, "json").read_text())["compile_s"]
                progress(f"  compiled {tokens}: {found[tokens]} ms, {found['compile_s'][tokens]} s")
            except (subprocess.TimeoutExpired, OSError, IndexError, ValueError):
                found["failed"][tokens] = self._last_line(side)
                progress(f"  compiled {tokens} failed: {self._last_line(side)}")
        return found

    def close(self) -> None:
        """End what still runs."""
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.communicate()
        self._folder.cleanup()

    def _file(self, side: int, kind: str) -> Path:
        return Path(self._folder.name) / f"{side}.{kind}"

    def _last_line(self, side: int) -> str:
        lines = self._file(side, "log").read_text(encoding="utf-8").strip().splitlines()
        return lines[-1][:300] if lines else "ended"


@torch.inference_mode()
def main(name: str, side: int, count: int, repeats: int, folder: Path) -> None:
    """Compile one shape, say so by a file, and measure when a line comes in."""
    from lod_engines_tower import make_visual, tiles_of, timed, weights_of

    from arrcoc.lod.tower import StaticTower, geometry
    from arrcoc.vision import patchify

    weights = weights_of(make_visual(name))
    run: Any = torch.compile(StaticTower(weights), dynamic=False)
    shape, pixels = geometry(weights, side, side), tiles_of(side, count)
    begin = perf_counter()

    def call() -> object:
        return run(patchify(pixels, weights, torch.bfloat16), *shape)

    call()
    torch.cuda.synchronize()
    write_result(folder / f"{side}.json", {"compile_s": round(perf_counter() - begin, 1)})
    if sys.stdin.readline():
        sys.stdout.write(json.dumps({"ms": timed(call, repeats)}) + "\n")
        sys.stdout.flush()
        os._exit(0)  # inductor's own workers take seconds to end


if __name__ == "__main__":
    size, *numbers, place = sys.argv[1:]
    main(size, *map(int, numbers), Path(place))  # type: ignore[call-arg, arg-type, misc]
