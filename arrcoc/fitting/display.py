"""How far a fit is, for people: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arrcoc.fitting.report import Metrics

_LINE_SECONDS = 10.0


@contextmanager
def showing() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr; yields what to call with the work's name, its part done and its total."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn()),
        *(MofNCompleteColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _lines(console: Console) -> Callable[[str, int, int], None]:
    last = -_LINE_SECONDS

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            console.print(f"{what} {done}/{total}", markup=False, highlight=False)

    return show


def metrics_table(held_out: Mapping[str, Metrics]) -> Table:
    """Metrics of each scorer on held-out images."""
    table = Table("held out", *next(iter(held_out.values())))
    for name, metrics in held_out.items():
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in metrics.values()))
    return table
