"""Answers of several variants to the same questions: kept line by line, never asked twice.

A variant is whatever turns a picture and a budget into an answer. Its rows are those of `arrcoc eval`, with
the variant's label in place of the method, so the evaluation's metrics and summaries take them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from common import RESULTS, ROOT

from arrcoc import image
from arrcoc.console import counting, quiet_transformers
from arrcoc.errors import BudgetError
from arrcoc.evaluation import runner, store
from arrcoc.evaluation.datasets import Placards
from arrcoc.evaluation.methods import Lab
from arrcoc.evaluation.metrics import anls, exact_match
from arrcoc.evaluation.records import Case, Given, Picture, Row, budget_key

Asker = Callable[[str, float], Row]
"""Answers one case by a variant's label and a budget."""
Known = dict[tuple[str, str, str], Row]
Todo = Sequence[tuple[int, Sequence["Wanted"]]]
"""Cases by number, with the answers that they lack."""


class Wanted(NamedTuple):
    """A variant by its label, at a budget (share of full resolution)."""

    label: str
    budget: float


@dataclass(frozen=True, slots=True)
class Job:
    """Which questions are to be answered, how, and where the answers are kept.

    Attributes:
        cases: the questions.
        wanted: every variant and budget.
        asking: prepares one case: decodes its picture, and what its variants share.
        folder: of the answers.
        identity: all that an answer depends on besides case, label and budget.
    """

    cases: Placards
    wanted: Sequence[Wanted]
    asking: Callable[[Case], Asker]
    folder: Path
    identity: Mapping[str, Any]


def parser(
    description: str | None, name: str, count: int, budgets: Sequence[float]
) -> argparse.ArgumentParser:
    """The options that all scripts with variants share; `name` is that of the result and its answers."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add_model_options(made, name, count)
    made.add_argument(
        "--budgets", type=float, nargs="+", default=list(budgets), help="shares of full resolution"
    )
    made.add_argument("--max-new-tokens", type=int, default=8)
    made.add_argument("--answers", default=str(ROOT / "out" / name), help="folder of answers, to go on from")
    made.add_argument("--workers", type=int, default=1, help="processes that share the questions")
    made.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return made


def add_model_options(made: argparse.ArgumentParser, name: str, count: int) -> None:
    """Checkpoint, questions, device and result: options of every script here."""
    made.add_argument("--model", help="folder of a Qwen3-VL checkpoint (default: the bundled one)")
    made.add_argument("--count", type=int, default=count, help="questions")
    made.add_argument("--canvas", type=int, default=1024, help="side of the images, px")
    made.add_argument("--seed", type=int, default=0, help="of the questions")
    made.add_argument("--preset", default="demo")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--out", default=str(RESULTS / f"{name}.json"))


def open_lab(options: argparse.Namespace, **overrides: Any) -> Lab:
    """The checkpoint with the preset, its tile cache off."""
    quiet_transformers()
    most = getattr(options, "max_new_tokens", 1)
    return Lab.open(options.model, options.preset, options.device, options.dtype, most, 0, **overrides)


def about(lab: Lab, options: argparse.Namespace) -> dict[str, Any]:
    """Model, data and preset of a result."""
    told = lab.engine.describe()
    return {
        "model": {"name": Path(options.model).name if options.model else "bundled"}
        | {name: told["model"][name] for name in ("parameters", "fingerprint")},
        "dtype": told["dtype"],
        "preset": options.preset,
        "participatory": told["scorers"]["participatory"],
        "data": {"dataset": "placards", "canvas": options.canvas, "seed": options.seed, "split": "test"},
        "count": options.count,
    }


def picture_of(lab: Lab, case: Case) -> Picture:
    """The case with its image decoded."""
    return Picture(case, image.decode(case.image, lab.presets.base.max_source_pixels).cpu())


def row(lab: Lab, picture: Picture, wanted: Wanted, work: Callable[[int], Given]) -> Row:
    """One answer within a budget, timed; a row without one where the budget is below the variant's least.

    `work` takes the tokens allowed.
    """
    case, full, start = picture.case, lab.full_tokens(picture.pixels), perf_counter()
    try:
        given = work(runner.tokens(wanted.budget, full))
    except BudgetError:
        given = None
    return Row(
        id=case.id,
        family=case.family,
        method=wanted.label,
        budget=wanted.budget,
        full_tokens=full,
        tokens=given and given.tokens,
        milliseconds=None if given is None else (perf_counter() - start) * 1e3,
        question=case.question,
        answers=case.answers,
        answer=given and given.text,
        exact=given and exact_match(given.text, case.answers),
        anls=given and anls(given.text, case.answers),
    )


def gather(job: Job, options: argparse.Namespace, script: str, arguments: Sequence[str]) -> list[Row]:
    """The rows of all cases, variants and budgets, in this order; what the folder holds is not asked again.

    With several workers the script starts itself once for each, with `--part`. Such a process answers its
    share of the cases, writes to a file of its own and returns nothing.

    Raises:
        ConfigError: the folder holds answers of another run.
        SystemExit: a worker failed.
    """
    if options.part is not None:
        todo = _missing(job, _read(job.folder))[options.part :: options.workers]
        with store.appending_part(store.part_path(job.folder, options.part)) as append:
            _work(job, todo, append, lambda _: None)
        return []
    path = store.prepare(job.folder, job.identity, True)
    todo = _missing(job, _read(job.folder))
    with counting(len(todo)) as begin:
        if options.workers > 1 and todo:
            _share_out(job, options.workers, todo, begin, [sys.executable, str(ROOT / script), *arguments])
        else:
            with store.appending(path) as append_row:
                _work(job, todo, lambda _, found: append_row(found), begin)
    store.merge(job.folder)
    known = _read(job.folder)
    keys = ((str(i), w.label, budget_key(w.budget)) for i in range(len(job.cases)) for w in job.wanted)
    return [known[key] for key in keys]


def _read(folder: Path) -> Known:
    """Rows by key."""
    return {row.key: row for row in store.read_rows(folder / store.ANSWERS)}


def _missing(job: Job, known: Known) -> Todo:
    lacking = (
        (i, [w for w in job.wanted if (str(i), w.label, budget_key(w.budget)) not in known])
        for i in range(len(job.cases))
    )
    return [(i, wanted) for i, wanted in lacking if wanted]


def _work(job: Job, todo: Todo, append: Callable[[int, Row], None], begin: Callable[[str], None]) -> None:
    for index, wanted in todo:
        begin(f"question {index}")
        ask = job.asking(job.cases[index])
        for label, budget in wanted:
            append(index, ask(label, budget))


def _share_out(
    job: Job, workers: int, todo: Todo, begin: Callable[[str], None], command: Sequence[str]
) -> None:
    """Run the workers; how far they are is read off their files."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    running = [
        subprocess.Popen([*command, "--part", str(part)], env=os.environ | threads) for part in range(workers)
    ]
    files = [store.part_path(job.folder, part) for part in range(workers)]
    shown, rows = 0, sum(len(wanted) for _, wanted in todo)
    while any(process.poll() is None for process in running):
        time.sleep(0.5)
        done = sum(file.read_bytes().count(b"\n") for file in files if file.exists())
        while shown < done * len(todo) // rows:
            shown += 1
            begin(f"{shown} of {len(todo)} questions")
    failed = sum(process.returncode != 0 for process in running)
    if failed:
        raise SystemExit(f"{failed} of {workers} workers failed; the answers so far are kept")
