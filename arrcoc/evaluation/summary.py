"""From rows to figures: accuracy, tokens and time of every method at every budget."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from arrcoc.evaluation.metrics import Estimate, bootstrap
from arrcoc.evaluation.records import Row, budget_key


class Cell(NamedTuple):
    """One method at one budget, over some cases.

    Attributes:
        method, budget: which.
        cases: how many.
        impossible: cases whose budget is below the method's least; with any, there are no figures.
        tokens: mean vision tokens.
        milliseconds: median time of an answer, from decoded pixels to text.
        exact: exact match with its interval.
        anls: ANLS with its interval.
    """

    method: str
    budget: int | float
    cases: int
    impossible: int
    tokens: float | None = None
    milliseconds: float | None = None
    exact: Estimate | None = None
    anls: Estimate | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        plain = self._asdict()
        for name in ("exact", "anls"):
            estimate = plain[name]
            plain[name] = None if estimate is None else estimate._asdict()
        return plain


def summarise(rows: Sequence[Row], seed: int = 0) -> list[Cell]:
    """One cell for each method and budget, in the order in which they first come."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, budget_key(row.budget)), []).append(row)
    return [_cell(group, seed) for group in groups.values()]


def by_family(rows: Sequence[Row], seed: int = 0) -> dict[str, list[Cell]]:
    """`summarise` for each family, by name."""
    families = sorted({row.family for row in rows})
    return {family: summarise([row for row in rows if row.family == family], seed) for family in families}


def _cell(rows: Sequence[Row], seed: int) -> Cell:
    first = rows[0]
    impossible = sum(row.answer is None for row in rows)
    cell = Cell(first.method, first.budget, len(rows), impossible)
    if impossible:
        return cell
    return cell._replace(
        tokens=statistics.fmean(row.tokens for row in rows if row.tokens is not None),
        milliseconds=statistics.median(row.milliseconds for row in rows if row.milliseconds is not None),
        exact=bootstrap([row.exact for row in rows if row.exact is not None], seed),
        anls=bootstrap([row.anls for row in rows if row.anls is not None], seed),
    )
