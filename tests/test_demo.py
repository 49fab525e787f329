from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from arrcoc import cli, report
from arrcoc.demo import run
from arrcoc.demo.bundled import UNTRAINED
from arrcoc.demo.contact import contact_sheet
from arrcoc.demo.images import demo_cases
from arrcoc.engine import Engine
from arrcoc.errors import BudgetError, ConfigError


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def made(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[run.DemoResult], list[str]]]:
    steps: list[str] = []
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "MAX_NEW_TOKENS", 4)
        yield out, run.run(engine, demo_cases()[:2], out, 0.5, steps.append), steps


def test_one_picture_per_question_a_sheet_and_a_json(
    made: tuple[Path, list[run.DemoResult], list[str]],
) -> None:
    out, results, steps = made
    pictures = {"astronaut-1.png", "astronaut-2.png", "cat-1.png", "cat-2.png"}
    assert {path.name for path in out.iterdir()} == pictures | {"overview.png", "demo.json"}
    assert {result.picture.name for result in results} == pictures
    assert len({(out / name).read_bytes() for name in pictures}) == 4
    assert [step.split(":")[0] for step in steps] == ["astronaut", "astronaut", "cat", "cat", "overview"]


def test_json_holds_what_was_found(made: tuple[Path, list[run.DemoResult], list[str]]) -> None:
    out, results, _ = made
    facts = json.loads((out / "demo.json").read_text())
    assert {"torch", "transformers", "python"} <= facts["engine"]["versions"].keys()
    for entry, result in zip(facts["results"], results, strict=True):
        assert entry["question"] == result.question
        assert entry["answer"] == result.answer.text
        assert entry["tokens"] == result.encoding.n_tokens <= 0.5 * entry["full_tokens"]
        assert entry["share"] == entry["tokens"] / entry["full_tokens"]
        assert entry["lod"] == result.encoding.lod.tolist()
        assert entry["lod_counts"] == result.encoding.lod_counts
        assert all(-1 <= tension <= 1 for tension in entry["tensions"].values())
        assert entry["timings_ms"]["total"] > 0
        assert all((out / name).is_file() for name in entry["files"])
        assert entry["licence"]
    assert facts["cache"]["hits"] > 0  # the second question finds tiles of the first


def test_stage_groups_hold_every_stage(made: tuple[Path, list[run.DemoResult], list[str]]) -> None:
    timings = made[1][0].answer.timings
    stages = [stage for group in report.STAGE_GROUPS.values() for stage in group]
    assert sorted(stages) == sorted(timings.keys() - {"total"})
    assert sum(report.grouped(timings).values()) == pytest.approx(timings["total"], rel=0.2)


def test_grouped_adds_up() -> None:
    # look 1 + 2 = 3; judge 4; encode and answer did not run.
    times = {"decode": 1.0, "glimpse": 2.0, "score": 4.0, "total": 9.0}
    assert report.grouped(times) == {"look": 3.0, "judge": 4.0, "encode": 0.0, "answer": 0.0}


def test_table_shows_tokens_and_answers_as_they_are(
    made: tuple[Path, list[run.DemoResult], list[str]],
) -> None:
    first = made[1][0]
    answer = dataclasses.replace(first.answer, text="[bold]red\x1b[31m\nand " + "x" * 200)
    shown_to = io.StringIO()
    console = Console(width=400, file=shown_to)
    console.print(run.table([dataclasses.replace(first, answer=answer)]))
    shown = shown_to.getvalue()
    assert f"{first.encoding.n_tokens} of {first.encoding.full_tokens} (" in shown
    assert "[bold]red [31m and xxx" in shown
    assert "x…" in shown
    assert first.question in shown


def test_sheet_shows_each_questions_own_maps(made: tuple[Path, list[run.DemoResult], list[str]]) -> None:
    cat = [result.encoding for result in made[1] if result.case.name == "cat"]
    figure = contact_sheet([("cat", cat)])
    axes = {str(a.get_label()): a for a in figure.axes}
    assert list(axes) == ["cat", "cat 1 relevance", "cat 1 lod", "cat 2 relevance", "cat 2 lod"]
    for number, encoding in enumerate(cat, start=1):
        drawn = axes[f"cat {number} relevance"].get_images()[-1]
        np.testing.assert_array_equal(drawn.get_array(), encoding.relevance.numpy())
        assert drawn.get_clim() == (0, 1)  # one scale for all: nothing is stretched to look stronger
        drawn = axes[f"cat {number} lod"].get_images()[-1]
        np.testing.assert_array_equal(drawn.get_array(), encoding.lod.numpy())
        assert drawn.get_clim() == (0, 3)


def test_untrained_checkpoint_is_named_as_such(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("arrcoc.demo.run", "arrcoc.engine"):
        monkeypatch.setattr(f"{module}.bundled_checkpoint", lambda: (tiny_checkpoint, UNTRAINED))
    lines = run.closing_lines(run.make_engine(None, "auto"), tmp_path)
    assert lines.count(UNTRAINED) == 1
    assert any("attention_gain 8" in line for line in lines)
    assert UNTRAINED not in caplog.text  # once, under the table
    named = run.closing_lines(run.make_engine(str(tiny_checkpoint), "auto"), tmp_path)
    assert not any("noise" in line for line in named)


def test_two_questions_of_the_untrained_demo_differ_visibly(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("arrcoc.demo.run", "arrcoc.engine"):
        monkeypatch.setattr(f"{module}.bundled_checkpoint", lambda: (tiny_checkpoint, UNTRAINED))
    engine = run.make_engine(None, "auto")
    for case in demo_cases():
        first, second = (engine.encode(case.image, question) for question in case.questions)
        # A twentieth of the colour scale somewhere in the map.
        assert float((first.relevance - second.relevance).abs().max()) > 0.05, case.name


@pytest.mark.parametrize(("budget", "kind"), [(0, BudgetError), (10**9, BudgetError)])
def test_bad_budgets_are_the_engines_errors(
    budget: int, kind: type[Exception], engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(kind):
        run.run(engine, demo_cases()[:1], tmp_path, budget)


def test_folder_that_cannot_be_made(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Name another one with --out"):
        run.run(engine, demo_cases()[:1], tmp_path / "file" / "out", 0.5)


def test_demo_command(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(run, "demo_cases", lambda: demo_cases()[1:2])
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), "--model", str(tiny_checkpoint), "--budget", "0.5"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "What colour are the cat's eyes?" in " ".join(result.stdout.split())
    assert str(out / "overview.png") in result.stdout
    assert result.stderr.splitlines()[0] == "[1/3] cat: What colour are the cat's eyes?"
    assert (out / "overview.png").is_file()
