"""Where the questions come from: placards, a JSONL file or a Parquet file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arrcoc.demo.placards import sample
from arrcoc.digests import file_digest
from arrcoc.errors import ConfigError, ImageError
from arrcoc.evaluation.records import Box, Case, Cases, file_label

PLACARDS = "placards"
_SUFFIXES = (".jsonl", ".parquet")
_DEFAULT_FAMILY = "all"


class Placards:
    """The test split of `arrcoc.demo.placards`; see `Cases`."""

    def __init__(self, canvas: int, count: int, seed: int, families: Sequence[str] | None = None) -> None:
        """Args: side of the images in px, number of cases, seed of the examples, question families.

        Raises:
            ConfigError: no cases, or a canvas, seed or families that placards refuses.
        """
        if count < 1:
            raise ConfigError(f"count {count}", "at least 1", "Raise it")
        self.name = PLACARDS
        self.identity: dict[str, str | int | list[str]] = {
            **{"dataset": PLACARDS, "canvas": canvas, "seed": seed},
            **({} if families is None else {"families": list(families)}),
        }
        self.has_targets = True
        self._canvas, self._count, self._seed, self._families = canvas, count, seed, families
        self[0]

    def __len__(self) -> int:
        """Number of cases."""
        return self._count

    def __getitem__(self, index: int) -> Case:
        """Case `index`, whatever the number of cases."""
        drawn = sample(self._seed, index, "test", self._canvas, self._families)
        return Case(str(index), drawn.family, drawn.image, drawn.question, (drawn.answer,), drawn.targets)


class FileCases:
    """The rows of a JSONL or Parquet file; see `Cases`."""

    def __init__(self, path: Path, cases: list[Case]) -> None:
        """Args: the file, its rows."""
        self.name = path.name
        self.identity: dict[str, str | int | list[str]] = {"dataset": path.name, "blake2b": _digest(path)}
        self.has_targets = all(case.targets is not None for case in cases)
        self._cases = cases

    def __len__(self) -> int:
        """Number of cases."""
        return len(self._cases)

    def __getitem__(self, index: int) -> Case:
        """Row `index` of the file."""
        return self._cases[index]


class _Fields(BaseModel):
    """A row as it stands in a file; further columns are ignored."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    image: bytes | str | Mapping[str, Any]
    question: str = Field(min_length=1)
    answer: str | None = None
    answers: list[str] | None = None
    id: str | None = None
    family: str | None = None
    targets: list[Box] | None = None

    @model_validator(mode="after")
    def _answered_once(self) -> _Fields:
        if (self.answer is None) == (self.answers is None) or self.answers == []:
            raise ValueError("give answer, or answers with at least one")
        return self


def load(dataset: str, canvas: int, count: int, seed: int, families: Sequence[str] | None = None) -> Cases:
    """A data set by name or path.

    Args:
        dataset: `placards`, or the path of a .jsonl or .parquet file.
        canvas, count, seed: of `placards`; a file has its own rows.
        families: of `placards`' questions, None for all but `picture`.

    Raises:
        ConfigError: no such data set, families of a file, or a row that is not valid, by file and line.
        ImageError: a row names an image that is not there, by file and line.
    """
    if dataset == PLACARDS:
        return Placards(canvas, count, seed, families)
    if families is not None:
        given = f"families {', '.join(families)} of {dataset}"
        raise ConfigError(given, f"families of {PLACARDS} alone", "Leave them out")
    path = Path(dataset)
    if path.suffix not in _SUFFIXES or not path.is_file():
        allowed = f"{PLACARDS}, or an existing {' or '.join(_SUFFIXES)} file"
        raise ConfigError(f"data set {dataset!r}", allowed, "Check the name")
    rows = _json_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    cases: dict[str, Case] = {}
    for line, values in rows:
        case = _case(path, line, values)
        if case.id in cases:
            given = f"{file_label(path, line)}: id {case.id!r} for the second time"
            raise ConfigError(given, "an id of its own for every row", "Correct the row, or leave out ids")
        cases[case.id] = case
    if not cases:
        raise ConfigError(f"{path.name} without a row", "at least one row", "Add questions")
    return FileCases(path, list(cases.values()))


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and content of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a JSON string may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: {error}", "a UTF-8 text file", "Correct the file") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _bad_row(path, number, error.msg) from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Row number, from 1, and content of every row."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        remedy = "Install it: pip install 'arrcoc[eval]'"
        raise ConfigError(f"{path.name} without pyarrow", "Parquet files need pyarrow", remedy) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ConfigError(f"{path.name}: {reason}", "a Parquet file", "Correct the file") from None
    yield from enumerate(rows, 1)


def _case(path: Path, line: int, values: Any) -> Case:
    try:
        row = _Fields.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        raise _bad_row(path, line, f"{field}: {message}" if field else message) from None
    answers = tuple(row.answers) if row.answers is not None else (row.answer or "",)
    return Case(
        id=str(line) if row.id is None else row.id,
        family=row.family or _DEFAULT_FAMILY,
        image=_image(path, line, row.image),
        question=row.question,
        answers=answers,
        targets=None if row.targets is None else tuple(row.targets),
    )


def _image(path: Path, line: int, value: bytes | str | Mapping[str, Any]) -> bytes | str:
    """Bytes as they are; a path, relative to the file, that exists. A mapping has either, as data sets do."""
    if isinstance(value, Mapping):
        found = value.get("bytes") or value.get("path")
        if not isinstance(found, bytes | str):
            raise _bad_row(path, line, "image: neither bytes nor path")
        value = found
    if isinstance(value, bytes):
        return value
    place = path.parent / value
    if not place.is_file():
        given = f"{file_label(path, line)}: image {value!r} does not exist"
        raise ImageError(given, "a path relative to the file", "Correct the row")
    return str(place)


def _bad_row(path: Path, line: int, reason: str) -> ConfigError:
    allowed = "image, question and answer or answers; optional id, family, targets"
    return ConfigError(f"{file_label(path, line)}: {reason}", allowed, "Correct the row")


def _digest(path: Path) -> str:
    return file_digest(path, hashlib.blake2b(digest_size=16))
