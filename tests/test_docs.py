"""What README and docs point to is there, what they say of the code is true, and the notebook runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import arrcoc
from arrcoc import config as configs

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/decisions.md",
    "docs/engines.md",
    "docs/relevance.md",
    "engines/README.md",
)
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """As GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        if target.startswith("https://"):
            continue
        file, _, part = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page: str) -> None:
    for name in re.findall(r"`(tests/\w+\.py)`", text(page)):
        assert (ROOT / name).is_file(), name


def test_readme_lists_every_error() -> None:
    named = set(re.findall(r"^\| `(\w+Error)` \|", text("README.md"), re.MULTILINE))
    public = {name for name in arrcoc.__all__ if name.endswith("Error")}
    assert named == public - {"ArrcocError"}


def test_readme_lists_every_layout() -> None:
    named = re.findall(
        r"^\| `(\w+)`(?: \(default\))? \| (?:the overview|each tile)", text("README.md"), re.MULTILINE
    )
    assert set(named) == {layout.value for layout in arrcoc.Layout}
    assert f"`{arrcoc.Config().layout.value}` (default)" in text("README.md")


@pytest.mark.parametrize(
    ("height", "width", "name"),
    [(1024, 1024, "demo"), (1024, 1025, "photo"), (4096, 4096, "photo"), (4096, 4097, "gigapixel")],
)
def test_auto_chooses_as_readme_says(height: int, width: int, name: str) -> None:
    choice = configs.PresetChoice.make("auto", {})
    assert choice.choose(height, width) == configs.load(name)


def test_six_lines_of_code() -> None:
    block = re.search(r"```python\n(import arrcoc\n.*?)```", text("README.md"), re.DOTALL)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line]) <= 6
    called = {node.attr for node in ast.walk(ast.parse(block[1])) if isinstance(node, ast.Attribute)}
    public = dir(arrcoc) + dir(arrcoc.Engine) + dir(arrcoc.Encoding) + list(arrcoc.Answer.__slots__)
    assert called <= set(public)


def code_cells() -> list[str]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_notebook_holds_no_outputs_and_defines_nothing() -> None:
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for source in code_cells():
        assert not any(isinstance(node, defining) for node in ast.walk(ast.parse(source)))


def test_notebook_runs(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell in one namespace, with the tests' checkpoint in place of the bundled one."""
    make = arrcoc.Engine.from_pretrained
    monkeypatch.setattr(arrcoc.Engine, "from_pretrained", lambda: make(tiny_checkpoint))
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    names: dict[str, Any] = {}
    for source in code_cells():
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    assert names["second"].question == names["case"].questions[1].text
    assert names["again"].text == names["answers"][1].text
    assert names["stats"].hits > 0, "the notebook says that the second question found tiles in the cache"
    assert "of 1024 vision tokens" in capsys.readouterr().out


def test_architecture_names_the_stages_of_the_engine(tiny_checkpoint: Path) -> None:
    import torch

    engine = arrcoc.Engine.from_pretrained(tiny_checkpoint, preset="demo")
    answer = engine.ask(torch.zeros(3, 128, 128, dtype=torch.uint8), "What is it?", max_new_tokens=2)
    named = re.findall(r"^\| (\w+) \| `", text("docs/architecture.md"), re.MULTILINE)
    assert named == [stage for stage in answer.timings if stage != "total"]
