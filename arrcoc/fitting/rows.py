"""The questions of a fit: a JSONL file of images, questions and, where known, boxes of what they ask for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from arrcoc.digests import file_digest
from arrcoc.errors import ConfigError, ImageError, QueryError


def _upright(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)) or not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"box {list(box)} must be x0 < x1, y0 < y1 from 0 on, in source pixels")
    return box


Box = Annotated[tuple[float, float, float, float], AfterValidator(_upright)]
"""(x0, y0, x1, y1) in source pixels, x1 and y1 exclusive."""


class _Line(BaseModel):
    """A line of the file; other names than these are refused, or a misspelt `boxes` would go unseen."""

    model_config = ConfigDict(extra="forbid", strict=False)

    image: str = Field(min_length=1)
    question: str = Field(min_length=1)
    boxes: list[Box] | None = None
    # Of evaluation files, and not read here.
    id: Any = None
    answer: Any = None
    answers: Any = None
    family: Any = None


@dataclass(frozen=True, slots=True)
class Row:
    """A question about an image.

    Attributes:
        image: path of the image.
        question: what is asked.
        boxes: what the question asks for, in source pixels; empty if the image does not show it; None if
            nobody has said.
        where: file and line, for messages.
    """

    image: Path
    question: str
    boxes: tuple[tuple[float, float, float, float], ...] | None
    where: str


def read_rows(questions: Path, folder: Path) -> list[Row]:
    """Read a JSONL file of {"image": path in `folder`, "question": text, "boxes": [[x0, y0, x1, y1], ...]}.

    Boxes are in pixels of the image after its EXIF orientation, x1 and y1 exclusive, and may be left out.
    `id`, `answer`, `answers` and `family` are allowed and not read; empty lines are skipped.

    Raises:
        QueryError: the file cannot be read, is empty, or a line is not such a row; names file and line.
        ImageError: an image is not there.
    """
    try:
        text = questions.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{questions} cannot be read ({error})", "a JSONL file", "Check the path") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise QueryError(f"{questions} holds no rows", "one JSON object a line", "Write some questions")
    return [_row(line, folder, f"{questions.name}:{number}") for number, line in lines]


def _row(line: str, folder: Path, where: str) -> Row:
    try:
        parsed = _Line.model_validate_json(line)
    except ValidationError as error:
        raise _bad(error, where) from None
    if not parsed.question.strip():
        raise QueryError(f"{where}: an empty question", "some text", "Correct the line")
    path = folder / parsed.image
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ImageError(f"{where}: image {parsed.image!r} is not there", f"a file in {folder}", "Check it")
    return Row(path, parsed.question, None if parsed.boxes is None else tuple(parsed.boxes), where)


def _bad(error: ValidationError, where: str) -> QueryError:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    allowed = '{"image": path, "question": text, "boxes": [[x0, y0, x1, y1], ...] or left out}'
    return QueryError(f"{where}: {field + ': ' if field else ''}{reason}", allowed, "Correct the line")


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return file_digest(path, hashlib.sha256())


def held_out_images(hashes: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """Choose images to hold out: the share with the lowest SHA-256 of seed and content, at least one.

    The choice does not depend on the order of rows, and equal images are never on both sides.

    Raises:
        ConfigError: fewer than two different images.
    """
    images = sorted(set(hashes), key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    if len(images) < 2:
        raise ConfigError(f"{len(images)} different image(s)", "two or more", "Add images: some are held out")
    return frozenset(images[: min(max(1, round(share * len(images))), len(images) - 1)])
