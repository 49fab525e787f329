"""Exact match, ANLS and the bootstrap, against cases computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrcoc.evaluation.metrics import anls, bootstrap, exact_match, levenshtein, normalise


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("The Red sign.", "red sign"),
        ("  K7Q!", "k7q"),
        ("two", "2"),
        ("a pair of 1,200", "pair of 1200"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("top-left", "top left"),
        ("it's", "its"),
        ("STRASSE", normalise("straße")),
    ],
)
def test_answers_are_compared_as_in_vqa(answer: str, wanted: str) -> None:
    assert normalise(answer) == wanted


def test_exact_match_takes_any_truth_and_nothing_near() -> None:
    assert exact_match("The diamond.", ["square", "diamond"]) == 1.0
    assert exact_match("diamonds", ["square", "diamond"]) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_levenshtein(one: str, other: str, distance: int) -> None:
    assert levenshtein(one, other) == levenshtein(other, one) == distance


@pytest.mark.parametrize(
    ("answer", "truths", "wanted"),
    [
        ("K7Q", ["k7q"], 1.0),
        ("K7O", ["k7q"], 2 / 3),  # one of three replaced: 1 - 1/3
        ("K8O", ["k7q"], 0.0),  # two of three: 2/3 is no longer below 1/2
        ("ab", ["ac"], 0.0),  # exactly 1/2 counts as wrong
        ("kitten", ["xxxxxx", "sitting"], 4 / 7),  # the nearer truth: 1 - 3/7
        ("", [""], 1.0),
    ],
)
def test_anls(answer: str, truths: list[str], wanted: float) -> None:
    assert anls(answer, truths) == pytest.approx(wanted)


def test_bootstrap_interval_is_that_of_the_binomial() -> None:
    # 400 coins, 300 heads: standard error sqrt(.75 * .25 / 400) = 0.02165, so 1.96 of them are 0.0424.
    found = bootstrap([1.0] * 300 + [0.0] * 100)
    assert found.mean == 0.75
    assert found.low == pytest.approx(0.75 - 0.0424, abs=0.006)
    assert found.high == pytest.approx(0.75 + 0.0424, abs=0.006)
    assert found == bootstrap([1.0] * 300 + [0.0] * 100)
    assert found != bootstrap([1.0] * 300 + [0.0] * 100, seed=1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_bootstrap_interval_holds_the_data(values: list[float]) -> None:
    found = bootstrap(values, resamples=20)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.mean == pytest.approx(float(np.mean(values)))
