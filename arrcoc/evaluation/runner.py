"""Asks every method every question at every budget, and never the same one twice, whatever interrupts it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from arrcoc import image
from arrcoc.errors import BudgetError
from arrcoc.evaluation.methods import METHODS, Lab
from arrcoc.evaluation.metrics import anls, exact_match
from arrcoc.evaluation.records import Budgets, Case, Cases, Given, Picture, Row, budget_key
from arrcoc.evaluation.store import ANSWERS, Append, appending, prepare, read_rows

__all__ = [
    "ANSWERS",
    "answer",
    "appending",
    "identity",
    "pairs",
    "prepare",
    "read_rows",
    "rows_of",
    "run",
    "tokens",
]


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
            found += rows_of(lab, case, pairs(methods, budgets), known, append)
    return found


def pairs(methods: Sequence[str], budgets: Budgets) -> list[tuple[str, int | float]]:
    """Every method at every budget, in the order in which a case is asked."""
    return [(name, budget) for name in methods for budget in budgets]


def rows_of(
    lab: Lab,
    case: Case,
    wanted: Sequence[tuple[str, int | float]],
    known: Mapping[tuple[str, str, str], Row],
    append: Append,
) -> Iterator[Row]:
    """The rows of one case; its image is decoded only if one of them is new, and new ones are appended."""
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
    lab.synchronise()
    lab.spared = 0.0
    start = perf_counter()
    result = work()
    lab.synchronise()
    return result, (perf_counter() - start) * 1e3 + lab.spared


def identity(lab: Lab, cases: Cases) -> dict[str, Any]:
    """All that an answer depends on besides case, method and budget; names no folder."""
    presets = {name: config.model_dump(mode="json") for name, config in lab.presets.by_name.items()}
    return {
        "data": cases.identity,
        "model": Path(lab.qwen.name).name,
        "weights": weights_digest(lab.qwen.model),
        "texture_head": None if lab.texture_head is None else weights_digest(lab.texture_head),
        "dtype": str(lab.qwen.dtype).removeprefix("torch."),
        "device": lab.qwen.device.type,
        "seed": lab.seed,
        "max_new_tokens": lab.max_new_tokens,
        "presets": presets,
    }


def weights_digest(model: nn.Module) -> str:
    """Hex digest of names, shapes and bits of all weights; sums of integers, so the same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        words = tensor.detach().contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
        digest.update(
            f"{name}{tuple(tensor.shape)}{tensor.dtype}{int(words.sum(dtype=torch.int64))}".encode()
        )
    return digest.hexdigest()
