"""The drawn desktop session: repeatable, and changing as a desktop does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from arrcoc.demo.desktop import ACTIONS, HEIGHT, WIDTH, Screenshot, session
from arrcoc.errors import ConfigError

TILE = 128


@pytest.fixture(scope="module")
def shots() -> list[Screenshot]:
    """Enough of a session for everything to happen."""
    return list(session(40, 0))


def changed(a: np.ndarray, b: np.ndarray) -> int:
    """Tiles of 128 px in which two screenshots differ."""
    differs = (a != b).any(-1).reshape(HEIGHT // TILE, TILE, WIDTH // TILE, TILE)
    return int(differs.any((1, 3)).sum())


def test_a_session_is_a_function_of_its_seed() -> None:
    one, again, other = (list(session(3, seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, again, strict=True))
    assert [(s.action, s.question) for s in one] == [(s.action, s.question) for s in again]
    assert not np.array_equal(one[0].image, other[0].image)
    assert one[0].image.shape == (HEIGHT, WIDTH, 3)
    assert HEIGHT % TILE == WIDTH % TILE == 0, "whole tiles: frames need no resizing"


def test_little_changes_and_something_always_does(shots: list[Screenshot]) -> None:
    assert shots[0].action == "start"
    assert {s.action for s in shots[1:]} == set(ACTIONS)
    by_action: dict[str, list[int]] = {}
    for before, after in pairwise(shots):
        by_action.setdefault(after.action, []).append(changed(before.image, after.image))
    assert max(by_action["blink"]) <= 2
    assert max(by_action["type"]) <= 4
    assert min(by_action["scroll"]) >= 10
    counts = [count for found in by_action.values() for count in found]
    assert min(counts) >= 1
    assert np.mean(counts) < 0.2 * (HEIGHT // TILE) * (WIDTH // TILE)


def test_the_question_is_about_the_signs_shown(shots: list[Screenshot]) -> None:
    views = {s.question for s in shots}
    assert len(views) > 1
    for before, after in pairwise(shots):
        assert (before.question != after.question) <= (after.action == "picture")


@pytest.mark.parametrize(("frames", "seed"), [(0, 0), (3, -1)])
def test_arguments_are_checked(frames: int, seed: int) -> None:
    with pytest.raises(ConfigError, match="frames"):
        next(session(frames, seed))
