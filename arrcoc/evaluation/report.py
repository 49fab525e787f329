"""What an evaluation leaves behind: a curve, tables in Markdown, and JSON with where it all came from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from arrcoc.devices import device_name
from arrcoc.errors import ConfigError
from arrcoc.evaluation.curve import draw
from arrcoc.evaluation.methods import Lab
from arrcoc.evaluation.records import Cases, Row, budget_key
from arrcoc.evaluation.summary import Cell, by_family, summarise
from arrcoc.plot import save
from arrcoc.provenance import commit, versions
from arrcoc.report import write_json

CURVE, TABLE, RESULTS = "curve.png", "results.md", "results.json"

_NOTES = (
    "Exact match in per cent with its bootstrap 95 % interval. All methods answer with the same checkpoint "
    "and at most the same vision tokens. Time is the median from decoded pixels to text, one answer at a "
    "time in a process, without a tile cache. fastv and visionzip encode the whole image first; fastv's "
    "tokens are those after layer 2, and its first two layers see all of them."
)
_SHARED = (
    " Up to {} processes shared the device: answers are those of one process, but times hold each other's "
    "waiting and are not comparable with those of another run."
)


def write(about: dict[str, Any], rows: Sequence[Row], out: Path) -> list[Cell]:
    """Write `CURVE`, `TABLE` and `RESULTS` to a folder.

    Args:
        about: what `provenance` says.
        rows: all answers, at least one.
        out: an existing folder.

    Returns:
        The cells of the whole data set.

    Raises:
        ConfigError: the folder cannot be written.
    """
    cells, families = summarise(rows), by_family(rows)
    about = about | {"cases": len({row.id for row in rows}), "workers": max(row.workers for row in rows)}
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
    title = f"{about['model']} on {about['data']['dataset']}, {about['cases']:,} questions"
    save(draw(cells, max(row.full_tokens for row in rows), title), out / CURVE)
    return cells


def provenance(lab: Lab, cases: Cases, arguments: Sequence[str]) -> dict[str, Any]:
    """Command, commit, versions, device and date of a run; of paths only the last part."""
    return {
        "command": " ".join(["arrcoc eval", *(_last_part(part) for part in arguments)]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "device": device_name(lab.qwen.device),
        "dtype": str(lab.qwen.dtype).removeprefix("torch."),
        "model": Path(lab.qwen.name).name,
        "parameters": lab.qwen.n_parameters,
        "data": cases.identity,
        "seed": lab.seed,
        "max_new_tokens": lab.max_new_tokens,
    }


def command_arguments() -> list[str]:
    """Arguments of this process after `eval`."""
    return sys.argv[sys.argv.index("eval") + 1 :] if "eval" in sys.argv else []


def _last_part(argument: str) -> str:
    """A path without the folders of the machine it ran on; anything else as it is."""
    return (Path(argument).name or argument) if os.sep in argument else argument


def markdown(cells: Sequence[Cell], families: dict[str, list[Cell]], about: dict[str, Any]) -> str:
    """Method by budget: accuracy, tokens and time; then accuracy by family."""
    shared = about["workers"] > 1
    notes = _NOTES + _SHARED.format(about["workers"]) if shared else _NOTES
    lines = [f"# {about['model']} on {about['data']['dataset']}", "", notes, ""]
    lines += _grid(cells, _accuracy)
    lines += ["Mean vision tokens:", "", *_grid(cells, _tokens)]
    median = "median, on a shared device: not comparable" if shared else "median"
    lines += [f"Milliseconds per answer ({median}):", "", *_grid(cells, _time)]
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
