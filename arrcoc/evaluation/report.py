"""What an evaluation leaves behind: a curve, tables in Markdown, and JSON with where it all came from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import arrcoc
from arrcoc.devices import device_name
from arrcoc.errors import ConfigError
from arrcoc.evaluation.curve import draw
from arrcoc.evaluation.methods import Lab
from arrcoc.evaluation.records import Cases, Row, budget_key
from arrcoc.evaluation.summary import Cell, by_family, summarise
from arrcoc.plot import save
from arrcoc.report import write_json

CURVE, TABLE, RESULTS = "curve.png", "results.md", "results.json"

_PACKAGES = ("torch", "transformers", "numpy")
_NOTES = (
    "Exact match in per cent with its bootstrap 95 % interval. All methods answer with the same checkpoint "
    "and at most the same vision tokens. Time is the median from decoded pixels to text, one answer at a "
    "time, without a tile cache. fastv and visionzip encode the whole image first; fastv's tokens are those "
    "after layer 2, and its first two layers see all of them."
)


def write(lab: Lab, cases: Cases, rows: Sequence[Row], out: Path, arguments: Sequence[str]) -> list[Cell]:
    """Write `CURVE`, `TABLE` and `RESULTS` to a folder.

    Args:
        lab: the checkpoint.
        cases: the data set.
        rows: all answers, at least one.
        out: an existing folder.
        arguments: of the command that made them.

    Returns:
        The cells of the whole data set.

    Raises:
        ConfigError: the folder cannot be written.
    """
    cells, families = summarise(rows), by_family(rows)
    about = provenance(lab, cases, len({row.id for row in rows}), arguments)
    write_json(
        about
        | {
            "cells": [cell.facts() for cell in cells],
            "families": {name: [cell.facts() for cell in part] for name, part in families.items()},
        },
        out / RESULTS,
    )
    try:
        (out / TABLE).write_text(markdown(cells, families, about), encoding="utf-8")
    except OSError as error:
        given = f"{out / TABLE} cannot be written ({error.strerror})"
        raise ConfigError(given, "a writable path", "Name another place") from error
    title = f"{about['model']} on {cases.name}, {about['cases']:,} questions"
    save(draw(cells, max(row.full_tokens for row in rows), title), out / CURVE)
    return cells


def provenance(lab: Lab, cases: Cases, count: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Command, commit, versions, device and date of a run; of paths only the last part."""
    packages = {name: version(name) for name in _PACKAGES}
    return {
        "command": " ".join(["arrcoc eval", *(_last_part(part) for part in arguments)]),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"arrcoc": arrcoc.__version__, "python": platform.python_version()} | packages,
        "device": device_name(lab.qwen.device),
        "dtype": str(lab.qwen.dtype).removeprefix("torch."),
        "model": Path(lab.qwen.name).name,
        "parameters": lab.qwen.n_parameters,
        "data": cases.identity,
        "cases": count,
        "seed": lab.seed,
        "max_new_tokens": lab.max_new_tokens,
    }


def commit() -> str | None:
    """Commit of the checkout that the package runs from, `+changes` where files differ.

    Outside a checkout it is what ARRCOC_COMMIT says, or None.
    """
    folder = Path(arrcoc.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            [*command, "--dirty=+changes"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ARRCOC_COMMIT")
    return done.stdout.strip()


def command_arguments() -> list[str]:
    """Arguments of this process after `eval`."""
    return sys.argv[sys.argv.index("eval") + 1 :] if "eval" in sys.argv else []


def _last_part(argument: str) -> str:
    """A path without the folders of the machine it ran on; anything else as it is."""
    return (Path(argument).name or argument) if os.sep in argument else argument


def markdown(cells: Sequence[Cell], families: dict[str, list[Cell]], about: dict[str, Any]) -> str:
    """Method by budget: accuracy, tokens and time; then accuracy by family."""
    lines = [f"# {about['model']} on {about['data']['dataset']}", "", _NOTES, ""]
    lines += _grid(cells, _accuracy)
    lines += ["Mean vision tokens:", "", *_grid(cells, _tokens)]
    lines += ["Milliseconds per answer (median):", "", *_grid(cells, _time)]
    lines += ["ANLS:", "", *_grid(cells, _anls)]
    for family, part in families.items():
        lines += [f"## {family} ({part[0].cases:,} questions)", "", *_grid(part, _accuracy)]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines.append(f"`{about['command']}`, {about['date']}, {about['device']}, {about['dtype']}, {versions}.")
    return "\n".join(lines) + "\n"


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """Head and rows of method by budget, accuracy in each cell."""
    return _matrix(cells, _accuracy)


def _matrix(cells: Sequence[Cell], show: Callable[[Cell], str]) -> list[list[str]]:
    budgets = list(dict.fromkeys(budget_key(cell.budget) for cell in cells))
    shown = {(cell.method, budget_key(cell.budget)): show(cell) for cell in cells}
    methods = dict.fromkeys(cell.method for cell in cells)
    return [["method", *budgets], *([m, *(shown.get((m, b), "") for b in budgets)] for m in methods)]


def _grid(cells: Sequence[Cell], show: Callable[[Cell], str]) -> list[str]:
    head, *body = _matrix(cells, show)
    rule = [":--", *("--:" for _ in head[1:])]
    return [*("| " + " | ".join(row) + " |" for row in (head, rule, *body)), ""]


def _accuracy(cell: Cell) -> str:
    if cell.exact is None:
        return _missing(cell)
    mean, low, high = (100 * value for value in cell.exact)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _anls(cell: Cell) -> str:
    return _missing(cell) if cell.anls is None else f"{cell.anls.mean:.3f}"


def _tokens(cell: Cell) -> str:
    return _missing(cell) if cell.tokens is None else f"{cell.tokens:,.0f}"


def _time(cell: Cell) -> str:
    return _missing(cell) if cell.milliseconds is None else f"{cell.milliseconds:,.0f}"


def _missing(cell: Cell) -> str:
    some = "" if cell.impossible == cell.cases else f" for {cell.impossible} of {cell.cases}"
    return f"not possible{some}"
