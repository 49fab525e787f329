"""What an evaluation is made of: cases to answer, answers given, rows written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from arrcoc.image import ImageInput

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the source image, x1 and y1 exclusive."""
Budgets = Sequence[int | float]
"""Shares of full resolution in (0, 1], or whole numbers of tokens."""


@dataclass(frozen=True, slots=True)
class Case:
    """One question about one image.

    Attributes:
        id: unique within the data set.
        family: kind of question; results are also reported by it.
        image: anything that `arrcoc.image.decode` takes.
        question: what is asked.
        answers: every answer that counts as right.
        targets: boxes that must be seen in detail, None where the data set has no labels.
    """

    id: str
    family: str
    image: ImageInput
    question: str
    answers: tuple[str, ...]
    targets: tuple[Box, ...] | None = None


class Cases(Protocol):
    """A data set: cases in a fixed order, made when they are asked for."""

    @property
    def name(self) -> str:
        """For people, for example `placards` or a file's name."""
        ...

    @property
    def identity(self) -> dict[str, str | int | list[str]]:
        """All that the cases depend on, to tell two data sets apart when a run is resumed."""
        ...

    @property
    def has_targets(self) -> bool:
        """Whether every case has target boxes."""
        ...

    def __len__(self) -> int:
        """Number of cases."""
        ...

    def __getitem__(self, index: int) -> Case:
        """One case; the same for the same index in every process."""
        ...


class Given(NamedTuple):
    """What a method answered.

    Attributes:
        text: the answer.
        tokens: vision tokens that the decoder's last layer kept; for `fastv` those after pruning.
    """

    text: str
    tokens: int


class Row(BaseModel):
    """One line of the answers file.

    `tokens`, `answer` and `milliseconds` are None where the budget is below the method's least. `workers` is
    the number of processes that shared the device when the time was taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    family: str
    method: str
    budget: int | float
    full_tokens: int
    tokens: int | None
    milliseconds: float | None
    question: str
    answers: tuple[str, ...]
    answer: str | None
    exact: float | None
    anls: float | None
    workers: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        """What no two rows of a run share."""
        return self.id, self.method, budget_key(self.budget)


def budget_key(budget: int | float) -> str:
    """A budget as text that tells 1 (a token) from 1.0 (everything)."""
    return repr(budget)


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image with the case it belongs to.

    Attributes:
        case: the question.
        pixels: uint8 [3, h, w] on the CPU.
    """

    case: Case
    pixels: Tensor


def file_label(path: Path, line: int) -> str:
    """Where a row of a file stands, for messages."""
    return f"{path.name}:{line}"
