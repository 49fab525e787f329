"""The demo's canvases: drawn from installed packages, with answers that follow from what was drawn."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest

from arrcoc.demo.images import CHOSEN, FURTHER, DemoCase, demo_case, demo_cases
from arrcoc.demo.placards import FAMILIES, sample


@pytest.fixture(scope="module")
def cases() -> list[DemoCase]:
    return demo_cases()


def test_canvases_are_drawn_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the demo's photographs must come from the installed wheels")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert [case.image.shape for case in demo_cases()] == [(2048, 2048, 3)] * len(CHOSEN)


def test_each_family_is_asked_once(cases: list[DemoCase]) -> None:
    asked = [question.family for case in cases for question in case.questions]
    assert sorted(asked) == sorted(FAMILIES)
    assert len({case.name for case in cases}) == len(cases)


def test_the_same_arguments_draw_the_same_case(cases: list[DemoCase]) -> None:
    again = demo_cases()
    for one, other in zip(cases, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.questions == other.questions


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("family", FURTHER)
def test_further_answers_follow_from_the_signs(family: str, index: int) -> None:
    case = demo_case("x", family, index, 1024)
    signs = sample(0, index, "test", 1024, [family]).placards
    for question in case.questions[1:]:
        named = [s for s in signs if s.box in question.targets]
        if question.family == "read":
            assert [s.code for s in named] == [question.answer]
            assert named[0].colour in question.text
        elif question.family == "exists":
            there = any(s.colour in question.text and _says(question.text, s.shape) for s in signs)
            assert (question.answer == "yes") == there
        elif question.family == "find":
            (found,) = (s for s in signs if s.code in question.text)
            assert question.answer in (found.colour, found.shape)
        else:
            counted = sum(s.colour in question.text for s in signs)
            assert question.answer == str(counted)


def _says(text: str, shape: str) -> bool:
    stem = {"circle": "round", "rectangle": "rectang", "triangle": "triang", "hexagon": "hexagon"}
    return shape in text or stem.get(shape, shape) in text
