"""`arrcoc eval` behind its command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from arrcoc.errors import ConfigError
from arrcoc.evaluation import report
from arrcoc.evaluation.methods import Lab, check_methods
from arrcoc.evaluation.records import Cases
from arrcoc.evaluation.runner import Budgets, run
from arrcoc.evaluation.summary import Cell

Counting = Callable[[int], AbstractContextManager[Callable[[str], None]]]


def split(text: str) -> list[str]:
    """Items of a list written with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_budgets(budgets: Sequence[int | float]) -> None:
    """Raise `ConfigError` unless these are shares in (0, 1] or tokens from 1, each once."""
    for budget in budgets:
        usable = budget >= 1 if isinstance(budget, int) else 0 < budget <= 1
        if not usable:
            allowed = "shares in (0, 1] or whole numbers of tokens"
            raise ConfigError(f"budget {budget!r}", allowed, "Correct the list")
    if not budgets or len(set(map(repr, budgets))) < len(budgets):
        raise ConfigError(f"budgets {list(budgets)}", "one or more, each once", "Correct the list")


def evaluate(
    make_lab: Callable[[], Lab],
    cases: Cases,
    methods: list[str],
    budgets: Budgets,
    out: Path,
    limit: int | None,
    resume: bool,
    counting: Counting,
) -> list[Cell]:
    """Check the arguments, load the model, answer everything, write the report.

    Raises:
        ArrcocError: an argument, the model or an image is not usable.
    """
    check_methods(methods, cases)
    check_budgets(budgets)
    lab = make_lab()
    total = len(cases) if limit is None else min(limit, len(cases))
    with counting(total) as begin:
        rows = run(lab, cases, methods, budgets, out, limit, resume, begin)
    return report.write(lab, cases, rows, out, report.command_arguments())


def closing_lines(cells: Sequence[Cell], out: Path) -> list[str]:
    """The accuracy of every method at every budget in columns, and where the report lies."""
    rows = report.table(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    files = ", ".join(str(out / name) for name in (report.CURVE, report.TABLE, report.RESULTS))
    return [*lines, "", files]
