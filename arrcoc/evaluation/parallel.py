"""Several processes that share the cases of one evaluation, each with a lab of its own on the same device."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from arrcoc.console import quiet_transformers
from arrcoc.errors import ArrcocError
from arrcoc.evaluation import store
from arrcoc.evaluation.methods import LabChoice
from arrcoc.evaluation.records import Budgets, Cases, Row, budget_key
from arrcoc.evaluation.runner import pairs, rows_of

_GRACE_S = 10.0  # for a process to end by itself before it is made to


@dataclass(frozen=True, slots=True)
class Share:
    """What one process is to do.

    Attributes:
        choice: the lab to open.
        cases: the data set.
        count: cases of all processes together, from the first.
        methods, budgets, out: as for `runner.run`.
        process: number of this process, from 0; it answers cases `process`, `process + workers`, …
        workers: number of processes.
        threads: of torch on the CPU.
    """

    choice: LabChoice
    cases: Cases
    count: int
    methods: tuple[str, ...]
    budgets: Budgets
    out: Path
    process: int
    workers: int
    threads: int


def run(
    choice: LabChoice,
    cases: Cases,
    count: int,
    methods: list[str],
    budgets: Budgets,
    out: Path,
    workers: int,
    progress: Callable[[str], None],
) -> list[Row]:
    """Answer as `runner.run` does, with `workers` processes.

    Each process appends to a file of its own. When all are done the files are merged into the answers file,
    in the order in which one process would have written them; where they were cut off,
    `store.prepare` does so before the next run.

    Args:
        choice: the lab that each process opens.
        cases: the data set.
        count: how many of them, from the first.
        methods, budgets: as for `runner.run`.
        out: folder that `store.prepare` has prepared for this run.
        workers: processes.
        progress: called with a case's name when it begins.

    Returns:
        The rows of these cases, methods and budgets, in order.

    Raises:
        ArrcocError: as `runner.run`; what the processes had answered is kept.
        RuntimeError: a process failed or died.
    """
    threads = max(1, torch.get_num_threads() // workers)
    shares = [
        Share(choice, cases, count, tuple(methods), budgets, out, process, workers, threads)
        for process in range(workers)
    ]
    names = _collect(shares, progress)
    store.merge(out)
    known = {row.key: row for row in store.read_rows(out / store.ANSWERS)}
    wanted = pairs(methods, budgets)
    return [known[names[case], name, budget_key(budget)] for case in range(count) for name, budget in wanted]


def _collect(shares: list[Share], progress: Callable[[str], None]) -> dict[int, str]:
    """Run all shares to their end; returns the name of each case."""
    names: dict[int, str] = {}
    running: dict[Connection, tuple[BaseProcess, int]] = {}
    try:
        for share in shares:
            running.update([_start(share)])
        while running:
            for end in wait(list(running)):
                assert isinstance(end, Connection)
                message = _receive(end, *running[end])
                if message is None:
                    running.pop(end)[0].join(_GRACE_S)
                else:
                    names[message[0]] = message[1]
                    progress(f"case {message[1]}")
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join(_GRACE_S)
    return names


def _start(share: Share) -> tuple[Connection, tuple[BaseProcess, int]]:
    # spawn: a fork would share the parent's CUDA context, and threads that do not exist in it.
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(share, sending), daemon=True)
    process.start()
    sending.close()  # so that the end of the process ends the pipe
    return receiving, (process, share.process)


def _receive(end: Connection, process: BaseProcess, number: int) -> tuple[int, str] | None:
    """Number and name of a case that begins, or None when the process has done its share."""
    try:
        message = end.recv()
    except EOFError:
        process.join(_GRACE_S)
        raise RuntimeError(f"process {number} of the evaluation died, exit code {process.exitcode}") from None
    if isinstance(message, Exception):
        raise message
    return message  # type: ignore[no-any-return]


def _work(share: Share, sending: Connection) -> None:
    """What a process does: its cases one after the other, each answer to its part file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    with closing(sending):
        try:
            _answer(share, sending)
            sending.send(None)
        except BrokenPipeError:
            return  # the parent is gone
        except ArrcocError as error:
            sending.send(error)
        except Exception as error:
            reason = f"process {share.process}: {type(error).__name__}: {error}"
            sending.send(RuntimeError(f"{reason}\n{traceback.format_exc()}"))


def _answer(share: Share, sending: Connection) -> None:
    torch.set_num_threads(share.threads)
    quiet_transformers()
    lab = share.choice.open()
    known = {row.key: row for row in store.read_rows(share.out / store.ANSWERS)}
    wanted = pairs(share.methods, share.budgets)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by another"
    with store.appending_part(store.part_path(share.out, share.process)) as append:
        for number in range(share.process, share.count, share.workers):
            case = share.cases[number]
            sending.send((number, case.id))

            def keep(row: Row, number: int = number) -> None:
                if not parent.is_alive():
                    raise BrokenPipeError  # a new run may be at work in this folder
                append(number, row.model_copy(update={"workers": share.workers}))

            for _ in rows_of(lab, case, wanted, known, keep):
                pass
