"""Where Triton cannot run, everything that has a kernel must hear of it and take its other way."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arrcoc import area_kernel, texture_kernel, triton_support


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    for cached in (triton_support.why_not, area_kernel.runs_on):
        cached.cache_clear()
    yield
    for cached in (triton_support.why_not, area_kernel.runs_on):
        cached.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, get_current_target: Any) -> None:
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=get_current_target))
    module = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(importlib, "import_module", lambda name: module)


def without_compiler() -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify one.")


def test_a_missing_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, without_compiler)
    assert triton_support.why_not() == "Triton cannot be used (Failed to find C compiler.)"
    assert not area_kernel.runs_on(torch.device("cuda"))
    assert not texture_kernel.usable(SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]


def test_a_driver_that_answers_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda: "sm_90")
    assert triton_support.why_not() is None
    assert area_kernel.runs_on(torch.device("cuda"))
    assert not area_kernel.runs_on(torch.device("cpu"))


def test_no_triton_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert triton_support.why_not() == "Triton is not installed (No module named 'triton')"
