"""The demo: two questions about each bundled photograph, pictures of where the engine looked, one JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import arrcoc
from arrcoc import plot
from arrcoc.answer import Answer
from arrcoc.demo.contact import contact_sheet
from arrcoc.demo.images import DemoCase, demo_cases
from arrcoc.encoding import Encoding
from arrcoc.engine import Engine
from arrcoc.errors import ConfigError
from arrcoc.report import STAGE_GROUPS, answer_facts, engine_facts, grouped, write_json

__all__ = ["DemoResult", "closing_lines", "demo_cases", "make_engine", "run", "table"]

MAX_NEW_TOKENS = 32
OVERVIEW, FACTS = "overview.png", "demo.json"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One question about one photograph, its answer and the picture of where the engine looked."""

    case: DemoCase
    question: str
    answer: Answer
    picture: Path

    @property
    def encoding(self) -> Encoding:
        """The encoding that the answer was made from."""
        assert self.answer.encoding is not None, "an answer about an image"
        return self.answer.encoding


def make_engine(model: str | None, preset: str) -> Engine:
    """The demo's engine; raises what `Engine.from_pretrained` raises."""
    engine_log = logging.getLogger("arrcoc.engine")
    level = engine_log.level
    engine_log.setLevel(logging.ERROR)  # its note on the checkpoint is printed under the table instead
    try:
        return Engine.from_pretrained(model, preset)
    finally:
        engine_log.setLevel(level)


def run(
    engine: Engine,
    cases: Sequence[DemoCase],
    out: Path,
    budget: int | float | None,
    begin: Callable[[str], object] = lambda _: None,
) -> list[DemoResult]:
    """Ask every question, and write a picture for each, the contact sheet and the JSON file.

    Args:
        engine: answers the questions.
        cases: photographs with questions.
        out: folder to write to; made if it is not there.
        budget: as for `Engine.ask`.
        begin: called with the name of each step as it begins: one for each question, one for the rest.

    Raises:
        ConfigError: the folder cannot be written.
        BudgetError: the budget is outside what a photograph allows.
    """
    _make_folder(out)
    results = []
    for case in cases:
        for number, question in enumerate(case.questions, start=1):
            begin(f"{case.name}: {question}")
            answer = engine.ask(case.image, question, budget, max_new_tokens=MAX_NEW_TOKENS)
            results.append(DemoResult(case, question, answer, out / f"{case.name}-{number}.png"))
            results[-1].encoding.plot(results[-1].picture)
    begin("overview")
    grouped_by_name = groupby(results, key=lambda result: result.case.name)
    rows = [(name, [result.encoding for result in same]) for name, same in grouped_by_name]
    plot.save(contact_sheet(rows), out / OVERVIEW)
    write_json(facts(engine, results), out / FACTS)
    return results


def facts(engine: Engine, results: Sequence[DemoResult]) -> dict[str, Any]:
    """Everything the demo found, JSON-ready; file names are relative to the folder of the JSON file."""
    description = engine.describe()
    return {
        "arrcoc": arrcoc.__version__,
        "engine": engine_facts(description),
        "cache": description["cache"],
        "overview": OVERVIEW,
        "results": [_result_facts(result) for result in results],
    }


def table(results: Sequence[DemoResult]) -> Table:
    """Picture, question, tokens, milliseconds for each group of stages, answer."""
    made = Table(
        title="Tokens against full resolution, milliseconds per stage, answers", title_justify="left"
    )
    for name in ("picture", "question", "tokens"):
        made.add_column(name, ratio=3 if name == "question" else None)
    for name in (*STAGE_GROUPS, "total"):
        made.add_column(f"{name} ms", justify="right")
    made.add_column("said", ratio=3)
    for result in results:
        encoding, timings = result.encoding, result.answer.timings
        spent = f"{encoding.n_tokens:,} of {encoding.full_tokens:,} ({encoding.share:.0%})"
        times = [f"{ms:,.0f}" for ms in (*grouped(timings).values(), timings["total"])]
        # Text, not str: an answer may hold what rich takes for markup.
        made.add_row(result.case.name, result.question, spent, *times, Text(_printable(result.answer.text)))
    return made


def closing_lines(engine: Engine, out: Path) -> list[str]:
    """What the columns mean, what to know about the checkpoint, and where the files are."""
    stages = "; ".join(f"{group} = {', '.join(names)}" for group, names in STAGE_GROUPS.items())
    notes = [str(note) for note in engine.describe()["notes"]]
    written = f"Look at {out / OVERVIEW} first; one picture per question and {FACTS} lie beside it in {out}/"
    return [stages, *notes, written]


def _result_facts(result: DemoResult) -> dict[str, Any]:
    case = result.case
    about = {"picture": case.name, "source": case.source, "licence": case.licence}
    return about | answer_facts(result.answer) | {"files": [result.picture.name]}


def _printable(text: str, longest: int = 80) -> str:
    """One line without control characters, cut after `longest` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given = f"folder {out}: {error.strerror}"
        raise ConfigError(given, "a writable folder", "Name another one with --out") from error
