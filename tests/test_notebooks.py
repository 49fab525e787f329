"""The notebooks on relevance and on accuracy per token run from top to bottom and define nothing."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import arrcoc
from arrcoc.evaluation.methods import Lab

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ("relevance.ipynb", "accuracy_per_token.ipynb")


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]
    return found


def run(name: str) -> dict[str, Any]:
    """Cell by cell in one namespace."""
    names: dict[str, Any] = {}
    for cell in cells(name):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def bundled(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' checkpoint in place of the bundled one."""
    make, opened = arrcoc.Engine.from_pretrained, Lab.open
    monkeypatch.setattr(arrcoc.Engine, "from_pretrained", lambda: make(tiny_checkpoint))
    monkeypatch.setattr(Lab, "open", lambda model, *rest, **more: opened(tiny_checkpoint, *rest, **more))
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_and_no_definitions(name: str) -> None:
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in cells(name):
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            assert not any(isinstance(node, defining) for node in ast.walk(tree))


def test_relevance_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("relevance.ipynb")
    told = capsys.readouterr().out
    first, second = names["encodings"][:2]
    assert first.question != second.question
    assert (first.scores.perspectival == second.scores.perspectival).all(), "it never sees the question"
    spent = [encoding.n_tokens for encoding in names["by_budget"].values()]
    assert spent == sorted(set(spent))
    assert spent[-1] == 1024, "the largest budget is full resolution"
    assert names["first"].code in told.splitlines()[-1], "the truth stands below the answers"


def test_accuracy_per_token_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("accuracy_per_token.ipynb")
    assert [case["image"] for case in names["lines"]] == ["0.png", "1.png", "2.png"]
    # The notebook's own folder: 3 questions by 2 methods at 2 budgets.
    assert len(names["rows"]) == 12
    assert {row.full_tokens for row in names["rows"]} == {1024}
    assert "questions.jsonl" in names["mine"].name
    assert capsys.readouterr().out.count("downscale") >= 2
