"""What the command line shows to people: progress on stderr, tables on stdout, errors in one line.

Nothing here imports torch, so that `arrcoc --help` comes at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from arrcoc.errors import ArrcocError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERRUPTED = 128 + 2
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

_WIDE = 150  # columns of a table that goes to a file or a pipe


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Turn what goes wrong in the body into one line on stderr and exit code 1, or 130 after Ctrl-C.

    Args:
        debug: show the trace as well.
    """
    try:
        yield
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error_line(error)}", err=True)
        raise typer.Exit(1) from None


def error_line(error: Exception) -> str:
    """An error as one line; one that is not about the input also shows its type."""
    message = " ".join(str(error).split())
    if isinstance(error, ArrcocError):
        return message
    return f"{type(error).__name__}: {message} (--debug shows the trace)"


def quiet_transformers() -> None:
    """Switch off transformers' progress bars for this process: they would run into ours."""
    from transformers.utils import logging

    bars: Any = logging  # its functions have no type hints
    bars.disable_progress_bar()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something is under way, if that is a terminal; gone when it has ended."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield


@contextmanager
def counting(total: int) -> Iterator[Callable[[str], None]]:
    """Progress over `total` steps on stderr: a bar on a terminal, else a line for each step.

    Yields:
        What to call with a step's name when it begins.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        started = iter(range(1, total + 1))
        yield lambda name: typer.echo(f"[{next(started)}/{total}] {name}", err=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda name: progress.update(task, description=name, advance=1)


@contextmanager
def phases() -> Iterator[Callable[[str, int, int], None]]:
    """Progress whose steps are learned on the way, on stderr: a bar on a terminal, else lines.

    Yields:
        What to call with what is under way, and how many of how many steps are done; a bar of 0 steps runs
        on and on. Without a terminal only what has no count of steps is shown: one line each.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: None if total else typer.echo(what, err=True)
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        yield show


def stdout() -> Console:
    """Where tables go: as wide as the terminal, and wide enough to read when piped to a file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns, name and value; nested mappings are written as `outer.inner`."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in _flat(facts):
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name, "none" if value is None or value == {} else str(value)
