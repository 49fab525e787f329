"""What every benchmark shares: facts about the run, clocks, peak memory, and results written as JSON."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""
RESULTS = ROOT / "benchmarks" / "results"
"""Where results are kept."""

_PACKAGES = ("torch", "transformers", "kornia", "numpy", "pillow")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def facts(script: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What a result must carry to be read later: command, commit, versions, device, date (UTC)."""
    commit, dirty = revision()
    return {
        # Paths are of the machine it ran on: their last part says what they are.
        "command": " ".join(["python", script, *(Path(part).name or part for part in arguments)]),
        "commit": commit,
        "uncommitted_changes": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version()}
        | {name: found for name in _PACKAGES if (found := _version(name))},
        "device": device_name(device),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> tuple[str | None, bool | None]:
    """Commit of the checkout and whether it has changes; (None, None) outside a git checkout.

    `ARRCOC_COMMIT` names the commit where clean files came without the history they belong to.
    """
    exported = os.environ.get("ARRCOC_COMMIT")
    if exported:
        return exported, False
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def device_name(device: torch.device) -> str:
    """The device in words, for example `cpu (x86_64, 2 threads)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


@dataclass(slots=True)
class Usage:
    """What one run took, filled in when it ends.

    Attributes:
        milliseconds: wall time, with the device's queue empty at both ends.
        peak_bytes: memory at the peak above the level at the beginning: of the device's allocator on
            CUDA, of the process on Linux; None where neither can be read.
    """

    milliseconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Usage]:
    """Measure the body's wall time and peak memory."""
    usage = Usage()
    _wait(device)
    before = _reset_peak(device)
    start = perf_counter()
    yield usage
    _wait(device)
    usage.milliseconds = (perf_counter() - start) * 1e3
    usage.peak_bytes = None if before is None else max(0, _peak(device) - before)


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median of every key over runs, in the first run's order; a key that a run lacks counts as 0 there."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: round(statistics.median(run.get(name, 0.0) for run in runs), 3) for name in names}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1) + "\n")
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, one line for each row."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def progress(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(line + "\n")


def _git(*arguments: str) -> str:
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    return run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new peak; bytes in use now, or None where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _give_back()
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return None
    return _resident("VmRSS")


def _give_back() -> None:
    """Return freed memory to the system: what an earlier run left behind would hide what this one takes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    (line,) = (row for row in _STATUS.read_text().splitlines() if row.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
