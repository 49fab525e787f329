"""The demo: questions about large canvases at a tenth of the tokens, at full resolution and downscaled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

import arrcoc
from arrcoc import config as configs
from arrcoc import plot, qwen
from arrcoc.answer import Answer
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.demo.contact import CROSS, TICK, Line, Panel, contact_sheet
from arrcoc.demo.images import DemoCase, DemoQuestion, demo_cases
from arrcoc.devices import resolve_device, resolve_dtype
from arrcoc.encoding import Encoding
from arrcoc.errors import ConfigError
from arrcoc.evaluation.methods import Lab, downscale
from arrcoc.evaluation.metrics import exact_match
from arrcoc.evaluation.records import Case, Picture
from arrcoc.report import answer_facts, engine_facts, write_json

__all__ = ["DemoResult", "Subject", "closing_lines", "demo_cases", "open_subject", "run", "table"]

BUDGET = 0.1
MAX_NEW_TOKENS = 16
OVERVIEW, FACTS = "overview.png", "demo.json"
WAYS = ("arrcoc", "full resolution", "downscaled")
"""How each question is asked, in the order of tables."""


class Subject(NamedTuple):
    """A checkpoint to show, and one line on what it is good for ("" for one that was named)."""

    lab: Lab
    note: str


class Said(NamedTuple):
    """One answer: what was said, whether it is the right answer, vision tokens, time in milliseconds."""

    text: str
    right: bool
    tokens: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One question about one canvas, its answers by `WAYS`, and the picture of where the engine looked."""

    case: DemoCase
    question: DemoQuestion
    answer: Answer
    said: dict[str, Said]
    picture: Path

    @property
    def encoding(self) -> Encoding:
        """The encoding that arrcoc's answer was made from."""
        assert self.answer.encoding is not None, "an answer about an image"
        return self.answer.encoding


def open_subject(model: str | None, preset: str) -> Subject:
    """Load a checkpoint, the bundled one if none is named; raises what `Engine.from_pretrained` raises.

    The bundled one was trained on the tiles of the preset `demo`, so `auto` means that one for it.
    """
    chosen = "demo" if model is None and preset == "auto" else preset
    presets = configs.PresetChoice.make(chosen, {})
    device = resolve_device("auto")
    source, note = bundled_checkpoint() if model is None else (model, "")
    checkpoint = qwen.load(source, device, resolve_dtype("auto", device))
    return Subject(Lab(checkpoint, presets, MAX_NEW_TOKENS, 0), note)


def run(
    subject: Subject,
    cases: Sequence[DemoCase],
    out: Path,
    budget: int | float | None,
    begin: Callable[[str], object] = lambda _: None,
) -> list[DemoResult]:
    """Ask every question in three ways, and write a picture for each, the contact sheet and the JSON file.

    Args:
        subject: the checkpoint.
        cases: canvases with questions.
        out: folder to write to; made if it is not there.
        budget: of arrcoc and of the downscaled image, as for `Engine.ask`; None for a tenth.
        begin: called with the name of each step as it begins: three for each question, one for the rest.

    Raises:
        ConfigError: the folder cannot be written.
        BudgetError: the budget is outside what a canvas allows.
    """
    _make_folder(out)
    share = BUDGET if budget is None else budget
    results = [result for case in cases for result in _ask(subject.lab, case, out, share, begin)]
    begin("pictures")
    for result in results:
        result.encoding.plot(result.picture)
    plot.save(sheet(results), out / OVERVIEW)
    write_json(facts(subject, results), out / FACTS)
    return results


def sheet(results: Sequence[DemoResult]) -> Figure:
    """The contact sheet of results, those of one canvas next to each other."""
    rows = groupby(results, key=lambda result: result.case.name)
    return contact_sheet([(name, [_panel(result) for result in same]) for name, same in rows])


def facts(subject: Subject, results: Sequence[DemoResult]) -> dict[str, Any]:
    """Everything the demo found, JSON-ready; file names are relative to the folder of the JSON file."""
    description = subject.lab.engine.describe()
    return {
        "arrcoc": arrcoc.__version__,
        "engine": engine_facts(description) | {"notes": [subject.note] if subject.note else []},
        "cache": description["cache"],
        "overview": OVERVIEW,
        "results": [_result_facts(result) for result in results],
    }


def table(results: Sequence[DemoResult]) -> Table:
    """Question, right answer, and for each way the answer, whether it is right, tokens, milliseconds."""
    made = Table(title="Answers, vision tokens, milliseconds", title_justify="left")
    made.add_column("question", ratio=3)
    made.add_column("right answer")
    for way in WAYS:
        made.add_column(way, ratio=2)
    for result in results:
        # Text, not str: an answer may hold what rich takes for markup.
        said = [_cell(result.said[way]) for way in WAYS]
        made.add_row(Text(result.question.text), Text(result.question.answer), *said)
    return made


def closing_lines(subject: Subject, results: Sequence[DemoResult], out: Path) -> list[str]:
    """How many answers are right, what to know about the checkpoint, and where the files are."""
    right = (f"{way} {sum(r.said[way].right for r in results)} of {len(results)}" for way in WAYS)
    written = f"Look at {out / OVERVIEW} first; one picture per question and {FACTS} lie beside it in {out}/"
    cached = "Times are of one run; later questions about a canvas find tiles of earlier ones in the cache."
    return [f"Right: {', '.join(right)}. {cached}", *filter(None, [subject.note]), written]


def _ask(
    lab: Lab, case: DemoCase, out: Path, budget: int | float, begin: Callable[[str], object]
) -> list[DemoResult]:
    """One way after the other, so that arrcoc finds no tiles in the cache that full resolution encoded."""
    pixels = torch.from_numpy(case.image).permute(2, 0, 1).contiguous()

    def asked(way: str, most: int | float) -> list[Answer]:
        answers = []
        for question in case.questions:
            begin(f"{way}: {question.text}")
            answers.append(lab.engine.ask(pixels, question.text, most, max_new_tokens=MAX_NEW_TOKENS))
        return answers

    answers = asked(WAYS[0], budget)
    # Every tile high: the stock path attends over all 16,384 patches of a canvas at once, which takes half a
    # minute on two cores.
    full = asked(WAYS[1], 1.0)
    results = []
    for question, answer, whole in zip(case.questions, answers, full, strict=True):
        begin(f"{WAYS[2]}: {question.text}")
        said = (_said(question, answer), _said(question, whole), _downscaled(lab, pixels, question, answer))
        picture = out / f"{case.name}-{question.family}.png"
        results.append(DemoResult(case, question, answer, dict(zip(WAYS, said, strict=True)), picture))
    return results


def _said(question: DemoQuestion, answer: Answer) -> Said:
    assert answer.encoding is not None, "an answer about an image"
    right = bool(exact_match(answer.text, [question.answer]))
    return Said(answer.text, right, answer.encoding.n_tokens, answer.timings["total"])


def _downscaled(lab: Lab, pixels: torch.Tensor, question: DemoQuestion, answer: Answer) -> Said:
    """The stock model's answer to the canvas at a size that takes no more tokens than arrcoc might."""
    assert answer.encoding is not None, "an answer about an image"
    case = Case(question.family, question.family, pixels, question.text, (question.answer,))
    started = time.perf_counter()
    given = downscale(lab, Picture(case, pixels), answer.encoding.budget)
    taken = 1e3 * (time.perf_counter() - started)
    return Said(given.text, bool(exact_match(given.text, [question.answer])), given.tokens, taken)


def _panel(result: DemoResult) -> Panel:
    question = result.question
    lines = [Line(way, _printable(said.text), said.right, said.tokens) for way, said in result.said.items()]
    return Panel(result.encoding, question.text, question.answer, question.targets, lines)


def _result_facts(result: DemoResult) -> dict[str, Any]:
    about = {
        "picture": result.case.name,
        "source": result.case.source,
        "family": result.question.family,
        "expected": result.question.answer,
    }
    said = {way: said._asdict() for way, said in result.said.items()}
    return about | answer_facts(result.answer) | {"said": said, "files": [result.picture.name]}


def _cell(said: Said) -> Text:
    mark, style = (TICK, "green") if said.right else (CROSS, "red")
    cell = Text(f"{mark} {_printable(said.text)}", style)
    return cell.append(f"  {said.tokens:,} tokens, {said.milliseconds:,.0f} ms", "default")


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
