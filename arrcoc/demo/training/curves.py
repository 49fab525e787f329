"""Loss and share of right answers of a run, by mode, as a picture that is drawn anew at every save.

`python -m arrcoc.demo.training.curves FOLDER` draws it from the log of any run.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from arrcoc import plot
from arrcoc.demo.training.loop import LOG

logger = logging.getLogger(__name__)

CURVES = "curves.png"

Point = Mapping[str, Any]
"""A line of the log: step, seconds, mode, answer, right and more."""

_COLOURS = {
    "whole": "#000000",
    "smaller": "#8c8c8c",
    "high": "#0072b2",
    "refine": "#d55e00",
    "replace": "#e69f00",
    "uniform": "#56b4e9",
    "crops": "#009e73",
    "glimpse": "#cc79a7",
}
"""Of each mode; Okabe and Ito (2008) and a grey, told apart under colour blindness."""
_INK, _OTHER = "#222222", "#b0a000"
_SPANS = 30  # a curve is smoothed over about this part of its points
_POLL_S = 2.0


def read_log(path: Path) -> list[Point]:
    """The lines of a log as one run without detours; none where there is no log.

    A run that is killed goes on from its last save and logs some steps again: what was logged of them, and
    of later steps, before the kill is dropped, and so is a line that the kill tore.
    """
    points: list[Point] = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        while points and points[-1]["step"] >= point["step"]:
            points.pop()
        points.append(point)
    return points


def smooth(values: Sequence[float], span: float) -> NDArray[np.float64]:
    """Exponential moving average whose weights fall by e over `span` values, without a bias to its start.

    With decay d = exp(-1 / span), value i of the result is sum_j d**(i-j) x_j / sum_j d**(i-j), j <= i.
    Values that are not finite count for nothing.
    """
    decay = float(np.exp(-1.0 / span))
    total = weight = 0.0
    made = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        known = bool(np.isfinite(value))
        total, weight = decay * total + (value if known else 0.0), decay * weight + known
        made[place] = total / weight if weight else np.nan
    return made


def draw(points: Sequence[Point], title: str) -> Figure:
    """Loss (logarithmic) and share of right answers of every mode, over steps and over minutes."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=12)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = (("step", 1.0, "steps"), ("seconds", 60.0, "minutes"))
    rows = (("answer", "loss of the answer, nats a token"), ("right", "right answers, %"))
    for axes_row, (value, label) in zip(grid, rows, strict=True):
        for axes, (where, unit, _) in zip(axes_row, columns, strict=True):
            _lines(axes, points, where, unit, value, 100.0 if value == "right" else 1.0)
            _dress(axes)
        axes_row[0].set_ylabel(label, color=_INK)
    for axes, (_, _, label) in zip(grid[1], columns, strict=True):
        axes.set_xlabel(label, color=_INK)
    grid[1, 0].set_ylim(-2, 102)
    if points:
        grid[0, 0].set_yscale("log")
        grid[0, 1].legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _lines(axes: Axes, points: Sequence[Point], where: str, unit: float, value: str, factor: float) -> None:
    modes = {point["mode"] for point in points}
    for mode in [*(name for name in _COLOURS if name in modes), *sorted(modes - _COLOURS.keys())]:
        own = [point for point in points if point["mode"] == mode]
        x = [point[where] / unit for point in own]
        y = [factor * point[value] for point in own]
        colour = _COLOURS.get(mode, _OTHER)
        axes.plot(x, y, ".", color=colour, alpha=0.12, markersize=3, markeredgewidth=0)
        smoothed = smooth(y, max(3.0, len(y) / _SPANS))
        axes.plot(x, smoothed, color=colour, linewidth=1.8, label=mode, marker="o" if len(y) < 2 else "")


def _dress(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=_INK)


def write(folder: Path) -> Path:
    """Draw the log of a run to `folder / CURVES`, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written.
    """
    points = read_log(folder / LOG)
    reached = (
        f"{points[-1]['step']:,} steps in {points[-1]['seconds'] / 60:,.1f} min" if points else "no steps yet"
    )
    return plot.save(draw(points, f"Training of {folder.name}: {reached}, smoothed"), folder / CURVES)


@contextmanager
def redrawing(folder: Path, saved: Path, wanted: bool = True) -> Iterator[None]:
    """Draw the curves of a run whenever the body has replaced the file `saved`, and when it has ended.

    While the body is at work another process draws: drawing would hold up the training, and its locks must
    not be copied into the processes that the training forks.
    """
    if not wanted:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, saved, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        write(folder)


def _watch(folder: Path, saved: Path, ended: threading.Event) -> None:
    seen = _changed(saved)
    while not ended.wait(_POLL_S):
        now = _changed(saved)
        if now != seen:
            seen = now
            command = [sys.executable, "-m", "arrcoc.demo.training.curves", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                logger.warning("The curves could not be drawn: %s", done.stderr.strip().rpartition("\n")[2])


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


if __name__ == "__main__":
    write(Path(sys.argv[1]))
