"""The folder of an evaluation: answers, in parts while several processes work, and what they depend on."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from arrcoc.errors import ConfigError
from arrcoc.evaluation.records import Row, file_label
from arrcoc.report import write_json

ANSWERS = "answers.jsonl"
"""Every answer, one line each."""
IDENTITY = "run.json"
"""What the answers depend on; a run with another one is not resumed."""

Append = Callable[[Row], None]


class PartRow(BaseModel):
    """One line of a part file: a row, and the number of its case within the data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: int
    row: Row


def part_path(out: Path, process: int) -> Path:
    """Where one of several processes writes its answers."""
    return out / f"answers.part{process}.jsonl"


def prepare(out: Path, facts: Mapping[str, Any], resume: bool) -> Path:
    """The answers file of a run, ready to be appended to: of the same run, whole, and with all parts in it.

    Raises:
        ConfigError: the folder holds another run's answers, a damaged line, or cannot be written.
    """
    path, label = out / ANSWERS, out / IDENTITY
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            for old in (path, *_parts(out)):
                old.unlink(missing_ok=True)
        if path.exists() or _parts(out):
            _check_same(json.loads(label.read_text("utf-8")) if label.exists() else {}, facts)
            merge(out)
        else:
            write_json(facts, label)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{out.name}: {error}", "a writable folder", "Name another one") from None
    return path


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("answers.part*.jsonl"))


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    as_read = json.loads(json.dumps(now))
    differing = [name for name in as_read if before.get(name) != as_read[name]]
    if differing:
        given = f"a folder with answers of a run that differs in {', '.join(differing)}"
        raise ConfigError(given, "the same run, or a new folder", "Choose another --out, or --no-resume")


def merge(out: Path) -> None:
    """Move the rows of all part files to the end of the answers file, case by case; drop torn last lines.

    The answers file is replaced before the parts go, so a kill between the two leaves rows in both places;
    such rows are kept once.
    """
    path, parts = out / ANSWERS, _parts(out)
    if path.exists():
        _drop_torn_line(path)
    if not parts:
        return
    known = {row.key for row in read_rows(path)}
    made = [found for part in parts for found in _read_part(part) if found.row.key not in known]
    _extend(path, [found.row for found in sorted(made, key=lambda found: found.case)])
    for part in parts:
        part.unlink()


def _extend(path: Path, rows: Sequence[Row]) -> None:
    """Write a file anew with further rows at its end; it is replaced whole or not at all."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            file.write(path.read_bytes() if path.exists() else b"")
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _drop_torn_line(path: Path) -> None:
    """Cut off what stands after the last line break: the row that a kill interrupted."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _read_part(path: Path) -> list[PartRow]:
    """The rows of a part file, without a torn last line."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(PartRow.model_validate_json(line))
        except ValidationError:
            raise _damaged(path, number, "is not a row") from None
    return found


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
    with _appending_lines(path) as append:
        yield lambda row: append(_line(row))


@contextmanager
def appending_part(path: Path) -> Iterator[Callable[[int, Row], None]]:
    """The same for a part file: the function also takes the number of the row's case."""
    with _appending_lines(path) as append:
        yield lambda case, row: append(_line(PartRow(case=case, row=row)))


@contextmanager
def _appending_lines(path: Path) -> Iterator[Callable[[bytes], None]]:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(line: bytes) -> None:
        while line:
            line = line[os.write(handle, line) :]
        os.fsync(handle)

    try:
        yield append
    finally:
        os.close(handle)


def _line(row: BaseModel) -> bytes:
    return (row.model_dump_json() + "\n").encode()
