from __future__ import annotations

import hashlib
import socket
from typing import Any

import numpy as np
import pytest

from arrcoc.demo.images import demo_cases

# Twice the height and width that scikit-image documents.
SIZES = {"astronaut": (1024, 1024), "cat": (600, 902), "coffee": (800, 1200), "rocket": (854, 1280)}


def test_photographs_load_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the demo's photographs must come from the installed wheel")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    cases = demo_cases()
    assert {case.name: case.image.size[::-1] for case in cases} == SIZES
    assert {case.image.mode for case in cases} == {"RGB"}


def test_photographs_are_different_and_in_colour() -> None:
    pixels = [np.asarray(case.image) for case in demo_cases()]
    assert len({hashlib.sha256(p.tobytes()).digest() for p in pixels}) == len(SIZES)
    for p in pixels:
        assert np.ptp(p, axis=2).max() > 50  # channels differ
        assert p.std() > 20  # nothing is blank


def test_two_different_questions_each_with_source_and_licence() -> None:
    cases = demo_cases()
    questions = [question for case in cases for question in case.questions]
    assert len(set(questions)) == 2 * len(cases)
    assert all(question.endswith("?") for question in questions)
    for case in cases:
        assert case.source
        assert case.licence.startswith(("CC0", "public domain"))
