"""Asks every method every question at every budget, and never the same one twice, whatever interrupts it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pydantic import ValidationError

from arrcoc import image
from arrcoc.errors import BudgetError, ConfigError
from arrcoc.evaluation.methods import METHODS, Lab
from arrcoc.evaluation.metrics import anls, exact_match
from arrcoc.evaluation.records import Case, Cases, Given, Picture, Row, budget_key, file_label
from arrcoc.report import write_json

ANSWERS = "answers.jsonl"
"""Every answer, one line each."""
IDENTITY = "run.json"
"""What the answers depend on; a run with another one is not resumed."""

Budgets = Sequence[int | float]
Append = Callable[[Row], None]


def run(
    lab: Lab,
    cases: Cases,
    methods: Sequence[str],
    budgets: Budgets,
    out: Path,
    limit: int | None = None,
    resume: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Answer all questions and write each answer at once to `out / ANSWERS`.

    Case by case, then method by method, then budget by budget, in the given order. What is already there is
    kept and not asked again, so that a run may be cut off at any moment, or given further methods, budgets
    or cases later.

    Args:
        lab: the checkpoint.
        cases: the data set.
        methods: names from `METHODS`.
        budgets: shares of full resolution in (0, 1], or whole numbers of tokens.
        out: folder to write to.
        limit: most cases, from the first.
        resume: False begins anew.
        progress: called with a case's name before it is asked.

    Returns:
        The rows of these cases, methods and budgets, in order.

    Raises:
        ConfigError: `out` holds answers of another run, or lines that are none.
        ImageError: an image cannot be read.
    """
    path = prepare(out, identity(lab, cases), resume)
    known = {row.key: row for row in read_rows(path)}
    found: list[Row] = []
    with appending(path) as append:
        for index in range(len(cases) if limit is None else min(limit, len(cases))):
            case = cases[index]
            progress(f"case {case.id}")
            wanted = [(name, budget) for name in methods for budget in budgets]
            for row in _rows(lab, case, wanted, known, append):
                found.append(row)
    return found


def _rows(
    lab: Lab,
    case: Case,
    wanted: Sequence[tuple[str, int | float]],
    known: Mapping[tuple[str, str, str], Row],
    append: Append,
) -> Iterator[Row]:
    """The rows of one case; its image is decoded only if one of them is new."""
    picture: Picture | None = None
    for name, budget in wanted:
        row = known.get((case.id, name, budget_key(budget)))
        if row is None:
            if picture is None:
                most = lab.presets.base.max_source_pixels
                picture = Picture(case, image.decode(case.image, most).cpu())
            row = answer(lab, picture, name, budget)
            append(row)
        yield row


def answer(lab: Lab, picture: Picture, name: str, budget: int | float) -> Row:
    """One answer, timed from decoded pixels to text; a row without one where the budget is too small."""
    case, full = picture.case, lab.full_tokens(picture.pixels)
    given, milliseconds = None, None
    allowed = tokens(budget, full)
    if allowed >= 1:
        try:
            given, milliseconds = _timed(lab, lambda: METHODS[name](lab, picture, allowed))
        except BudgetError:
            given = None
    assert given is None or given.tokens <= allowed, (name, given, allowed)
    return Row(
        id=case.id,
        family=case.family,
        method=name,
        budget=budget,
        full_tokens=full,
        tokens=given and given.tokens,
        milliseconds=milliseconds,
        question=case.question,
        answers=case.answers,
        answer=given and given.text,
        exact=given and exact_match(given.text, case.answers),
        anls=given and anls(given.text, case.answers),
    )


def tokens(budget: int | float, full: int) -> int:
    """Tokens that a budget allows on an image of `full` tokens: floor(share * full), or a number up to it."""
    return min(budget, full) if isinstance(budget, int) else math.floor(budget * full)


def _timed(lab: Lab, work: Callable[[], Given]) -> tuple[Given, float]:
    """A result and the milliseconds it took, with the device's queue empty at both ends."""
    _synchronise(lab)
    start = perf_counter()
    result = work()
    _synchronise(lab)
    return result, (perf_counter() - start) * 1e3


def _synchronise(lab: Lab) -> None:
    if lab.qwen.device.type == "cuda":
        torch.cuda.synchronize(lab.qwen.device)


def identity(lab: Lab, cases: Cases) -> dict[str, Any]:
    """All that an answer depends on besides case, method and budget; names no folder."""
    presets = {name: config.model_dump(mode="json") for name, config in lab.presets.by_name.items()}
    return {
        "data": cases.identity,
        "model": Path(lab.qwen.name).name,
        "weights": weights_digest(lab),
        "dtype": str(lab.qwen.dtype).removeprefix("torch."),
        "device": lab.qwen.device.type,
        "seed": lab.seed,
        "max_new_tokens": lab.max_new_tokens,
        "presets": presets,
    }


def weights_digest(lab: Lab) -> str:
    """Hex digest of names, shapes and bits of all weights; sums of integers, so the same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(lab.qwen.model.state_dict().items()):
        words = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
        digest.update(
            f"{name}{tuple(tensor.shape)}{tensor.dtype}{int(words.sum(dtype=torch.int64))}".encode()
        )
    return digest.hexdigest()


def prepare(out: Path, facts: Mapping[str, Any], resume: bool) -> Path:
    """The answers file of a run, ready to be appended to: of the same run, and without a torn last line.

    Raises:
        ConfigError: the folder holds another run's answers, or cannot be written.
    """
    path, label = out / ANSWERS, out / IDENTITY
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        if path.exists():
            _check_same(json.loads(label.read_text("utf-8")) if label.exists() else {}, facts)
            _drop_torn_line(path)
        else:
            write_json(facts, label)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{out.name}: {error}", "a writable folder", "Name another one") from None
    return path


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    as_read = json.loads(json.dumps(now))
    differing = [name for name in as_read if before.get(name) != as_read[name]]
    if differing:
        given = f"a folder with answers of a run that differs in {', '.join(differing)}"
        raise ConfigError(given, "the same run, or a new folder", "Choose another --out, or --no-resume")


def _drop_torn_line(path: Path) -> None:
    """Cut off what stands after the last line break: the row that a kill interrupted."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def read_rows(path: Path) -> list[Row]:
    """The rows of an answers file; none where there is no file.

    Raises:
        ConfigError: a line that is not a row, or a row for the second time.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = Row.model_validate_json(line)
        except ValidationError:
            raise _damaged(path, number, "is not a row") from None
        if row.key in rows:
            raise _damaged(path, number, "repeats a row")
        rows[row.key] = row
    return list(rows.values())


def _damaged(path: Path, line: int, what: str) -> ConfigError:
    return ConfigError(f"{file_label(path, line)} {what}", "lines written by arrcoc eval", "Use --no-resume")


@contextmanager
def appending(path: Path) -> Iterator[Append]:
    """A function that appends a row in one write and waits until it is on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(row: Row) -> None:
        line = (row.model_dump_json() + "\n").encode()
        while line:
            line = line[os.write(handle, line) :]
        os.fsync(handle)

    try:
        yield append
    finally:
        os.close(handle)
