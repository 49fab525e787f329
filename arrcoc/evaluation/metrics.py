"""How right an answer is, and how sure the mean of many is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

THRESHOLD = 0.5
"""ANLS: normalised distances from here on count as wrong (Biten et al. 2019, section 4)."""

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_APOSTROPHES = str.maketrans("", "", "'\N{RIGHT SINGLE QUOTATION MARK}")
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_")


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it (Antol et al. 2015, arXiv 1505.00468, and its code).

    Case is folded, punctuation dropped (a point between digits stays, a comma between digits and every
    apostrophe join what they part), number words up to ten become digits, articles are dropped.
    """
    text = _BETWEEN_DIGITS.sub("", answer.casefold().translate(_APOSTROPHES))
    words = _PUNCTUATION.sub(" ", text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1.0 where the normalised answer equals one of the normalised truths, else 0.0."""
    return float(normalise(answer) in {normalise(truth) for truth in truths})


def anls(answer: str, truths: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest truth (Biten et al. 2019, arXiv 1907.00490).

    max over truths of s(NL), NL = distance / longer length, s = 1 - NL where NL < 0.5, else 0. Case is
    folded and white space at the ends dropped. Averaged over questions it is ANLS.
    """
    return max(_similarity(answer.strip().casefold(), truth.strip().casefold()) for truth in truths)


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    distance = levenshtein(one, other) / longest if longest else 0.0
    return 1 - distance if distance < THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """Least number of characters inserted, deleted or replaced that turns one text into the other."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


class Estimate(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean and percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13) of at least one value.

    The same for the same values and seed.
    """
    assert values, "nothing to average"
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(resamples, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high))
