"""`arrcoc eval` behind its command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from arrcoc.errors import ConfigError
from arrcoc.evaluation import parallel, report, runner, store
from arrcoc.evaluation.methods import LabChoice, check_methods
from arrcoc.evaluation.records import Budgets, Cases, Row
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


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be answered, and by how many.

    Attributes:
        cases: the data set.
        methods, budgets: as for `runner.run`.
        out: folder to write to.
        limit: most cases, from the first.
        resume: False begins anew.
        workers: processes that share the cases.
    """

    cases: Cases
    methods: list[str]
    budgets: Budgets
    out: Path
    limit: int | None = None
    resume: bool = True
    workers: int = 1

    @property
    def count(self) -> int:
        """Number of cases."""
        return len(self.cases) if self.limit is None else min(self.limit, len(self.cases))


def evaluate(
    choice: LabChoice,
    job: Job,
    counting: Counting,
    loading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Cell]:
    """Check the arguments, load the model, answer everything, write the report.

    Args:
        choice: the checkpoint and how it is run.
        job: what is to be answered.
        counting: makes a progress bar of a number of steps.
        loading: surrounds the loading of the model.

    Raises:
        ArrcocError: an argument, the model or an image is not usable.
        RuntimeError: one of several processes failed.
    """
    check_methods(job.methods, job.cases)
    check_budgets(job.budgets)
    with loading():
        lab = choice.open()
    about = report.provenance(lab, job.cases, report.command_arguments())
    if min(job.workers, job.count) == 1:
        with counting(job.count) as begin:
            rows = runner.run(lab, job.cases, job.methods, job.budgets, job.out, job.limit, job.resume, begin)
    else:
        store.prepare(job.out, runner.identity(lab, job.cases), job.resume)
        del lab  # its memory on the device is for the others
        rows = _shared(choice, job, counting)
    return report.write(about, rows, job.out)


def _shared(choice: LabChoice, job: Job, counting: Counting) -> list[Row]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    workers = min(job.workers, job.count)
    with counting(job.count) as begin:
        return parallel.run(choice, job.cases, job.count, job.methods, job.budgets, job.out, workers, begin)


def closing_lines(cells: Sequence[Cell], out: Path) -> list[str]:
    """The accuracy of every method at every budget in columns, and where the report lies."""
    rows = report.table(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    files = ", ".join(str(out / name) for name in (report.CURVE, report.TABLE, report.RESULTS))
    return [*lines, "", files]
