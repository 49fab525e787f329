"""What the tensions do: how they move with the kind of question, and what each is worth in accuracy.

The scores of a question are measured once. Every variant makes its own relevance map of them and answers
through the same stages, so variants differ in nothing else.

    python benchmarks/tensions.py --model FOLDER [--count 120] [--budgets 0.0625 0.125 0.25] [--workers 1]

Writes the JSON, and beside it `tensions_families.png`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from answers import Asker, Job, Wanted, about, gather, open_lab, parser, picture_of, row
from common import facts, write_result
from summaries import ALL, cells, estimate, families
from tensions_picture import draw_families
from torch import Tensor

from arrcoc import opponent, plot
from arrcoc.config import Config
from arrcoc.console import counting
from arrcoc.encoding import Encoding
from arrcoc.evaluation import runner
from arrcoc.evaluation.datasets import Placards
from arrcoc.evaluation.methods import Lab
from arrcoc.evaluation.records import Case, Picture, Row
from arrcoc.records import Scores, Tensions

SCRIPT = "benchmarks/tensions.py"
BUDGETS = (0.0625, 0.125, 0.25)
REFERENCE = "all tensions"
"""What the others are compared with: relevance as the engine makes it."""

Balance = Callable[[Scores, Config], Tensor]
"""A relevance map [R, C] of the scores."""


def fixed(**neutral: float) -> Balance:
    """Opponent processing with some tensions fixed, the others as measured."""

    def balance(scores: Scores, config: Config) -> Tensor:
        measured = opponent.measure(scores.participatory, config)
        return opponent.balance(scores, config, measured._replace(**neutral)).map

    return balance


def participatory(scores: Scores, config: Config) -> Tensor:
    """The participatory map as it is: no opponent processing, no fallback, no query-free scorers."""
    return scores.participatory


VARIANTS: dict[str, Balance] = {
    REFERENCE: fixed(),
    # At 0 the exponent is 1, the question's share one half, and nothing acts between neighbours.
    "no compress-particularize": fixed(compress_particularize=0.0),
    "no explore-exploit": fixed(explore_exploit=0.0),
    "no diversify-focus": fixed(diversify_focus=0.0),
    "none": fixed(compress_particularize=0.0, explore_exploit=0.0, diversify_focus=0.0),
    "question alone": fixed(explore_exploit=1.0),
    "query-free alone": fixed(explore_exploit=-1.0),
    "participatory map": participatory,
}
"""Relevance maps under test, by label."""


def seen(lab: Lab, picture: Picture) -> Encoding:
    """The scores and tensions of a question, from the engine, at the least tokens that it allows."""
    least, _ = lab.pipeline(picture.pixels).token_range(picture.pixels)
    return lab.engine.encode(picture.pixels, picture.case.question, budget=least)


def asking(lab: Lab) -> Callable[[Case], Asker]:
    """Answers with the relevance map of each variant; the scores of a case are measured once."""

    def begin(case: Case) -> Asker:
        picture = picture_of(lab, case)
        config = lab.presets.choose(*picture.pixels.shape[1:])
        scores = seen(lab, picture).scores

        def ask(label: str, budget: float) -> Row:
            relevance = VARIANTS[label](scores, config).to(lab.qwen.device)
            return row(
                lab,
                picture,
                Wanted(label, budget),
                lambda tokens: lab.judged_answer(picture, tokens, lambda frame, texture: relevance),
            )

        return ask

    return begin


def measured(lab: Lab, cases: Placards) -> dict[str, list[list[float]]]:
    """The three tensions of every question, by family."""
    found: dict[str, list[list[float]]] = {}
    with counting(len(cases)) as begin:
        for index in range(len(cases)):
            begin(f"tensions of question {index}")
            case = cases[index]
            tensions = seen(lab, picture_of(lab, case)).tensions
            found.setdefault(case.family, []).append([round(float(value), 5) for value in tensions])
    return found


def described(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Mean with interval, standard deviation and quartiles of every tension, for all and by family."""
    made: dict[str, dict[str, Any]] = {}
    for family in families(values):
        rows = [row for name, part in values.items() if family in (ALL, name) for row in part]
        made[family] = {"questions": len(rows)}
        for column, tension in enumerate(Tensions._fields):
            made[family][tension] = _spread([row[column] for row in rows])
    return made


def _spread(values: Sequence[float]) -> dict[str, Any]:
    enough = len(values) > 1
    return {
        **estimate(values),
        "deviation": round(statistics.stdev(values), 5) if enough else None,
        "quartiles": [round(q, 5) for q in statistics.quantiles(values, method="inclusive")]
        if enough
        else None,
    }


def main(arguments: Sequence[str]) -> None:
    """Ask what is not yet answered, measure the tensions; write JSON and picture."""
    options = parser(__doc__, "tensions", 120, BUDGETS).parse_args(arguments)
    lab = open_lab(options)
    cases = Placards(options.canvas, options.count, options.seed)
    job = Job(
        cases,
        [Wanted(label, budget) for label in VARIANTS for budget in options.budgets],
        asking(lab),
        Path(options.answers),
        runner.identity(lab, cases) | {"script": SCRIPT},
    )
    rows = gather(job, options, SCRIPT, arguments)
    if options.part is not None:
        return
    values, out = measured(lab, cases), Path(options.out)
    result = {"benchmark": "tensions", **facts(SCRIPT, arguments, lab.qwen.device), **about(lab, options)}
    ablation = [{"label": label, "cells": cells(rows, label, REFERENCE)} for label in VARIANTS]
    write_result(
        out,
        result
        | {"budgets": options.budgets, "tensions": described(values), "values": values, "ablation": ablation},
    )
    plot.save(draw_families(values), out.with_name(f"{out.stem}_families.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
