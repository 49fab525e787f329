"""Accuracy of variants by family, with intervals, beside a reference that answered the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from arrcoc.evaluation.metrics import Estimate, bootstrap
from arrcoc.evaluation.records import Row, budget_key

ALL = "all"
"""Stands for all families together."""


def families(names: Iterable[str]) -> list[str]:
    """`ALL`, then every family by name."""
    return [ALL, *sorted(set(names))]


@cache
def _estimate(values: tuple[float, ...]) -> Estimate:
    return bootstrap(values)


def estimate(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % bootstrap interval of at least one value, ready for JSON."""
    return {name: round(value, 5) for name, value in _estimate(tuple(values))._asdict().items()}


def cells(rows: Sequence[Row], label: str, reference: str) -> list[dict[str, Any]]:
    """One variant at every budget, for all questions and for each family.

    A cell holds the number of cases, mean tokens, exact match with its interval, and `over_reference`: the
    mean of the paired differences in exact match to the reference, with its interval. Where the budget is
    below the least of the variant, or of the reference, the figures that need it are None.
    """
    found = {(row.method, budget_key(row.budget), row.id): row for row in rows}
    mine = [row for row in rows if row.method == label]
    made = []
    for budget in dict.fromkeys(row.budget for row in mine):
        for family in families(row.family for row in mine):
            own = [row for row in mine if row.budget == budget and family in (ALL, row.family)]
            theirs = [found[reference, budget_key(budget), row.id] for row in own]
            made.append({"budget": budget, "family": family, **_cell(own, theirs)})
    return made


def _cell(own: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    exact = [row.exact for row in own if row.exact is not None]
    tokens = [row.tokens for row in own if row.tokens is not None]
    differences = [
        a.exact - b.exact
        for a, b in zip(own, theirs, strict=True)
        if a.exact is not None and b.exact is not None
    ]
    whole, paired = len(exact) == len(own), len(differences) == len(own)
    return {
        "cases": len(own),
        "tokens": round(sum(tokens) / len(tokens), 1) if whole else None,
        "exact": estimate(exact) if whole else None,
        "over_reference": estimate(differences) if paired else None,
    }
