from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from arrcoc import cli, report
from arrcoc.demo import run
from arrcoc.demo.bundled import UNTRAINED
from arrcoc.demo.contact import contact_sheet
from arrcoc.demo.images import DemoCase, demo_cases
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
    assert f"{first.encoding.n_tokens:,} of {first.encoding.full_tokens:,} (" in shown
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
    monkeypatch.setattr("arrcoc.engine.bundled_checkpoint", lambda: (tiny_checkpoint, UNTRAINED))
    lines = run.closing_lines(run.make_engine(None, "auto"), tmp_path)
    assert lines.count(UNTRAINED) == 1
    assert UNTRAINED not in caplog.text  # once, under the table
    named = run.closing_lines(run.make_engine(str(tiny_checkpoint), "auto"), tmp_path)
    assert not any("noise" in line for line in named)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine of `make demo` on a fresh machine: checkpoint and texture head are made anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield run.make_engine(None, "auto")


def test_the_bundled_checkpoint_scores_by_its_fitted_head(bundled: Engine) -> None:
    assert bundled.describe()["scorers"]["participatory"] == "texture"
    assert bundled.describe()["notes"] == [UNTRAINED]


@pytest.mark.parametrize("case", demo_cases(), ids=lambda case: case.name)
def test_two_questions_light_up_two_places(bundled: Engine, case: DemoCase) -> None:
    first, second = (bundled.encode(case.image, question, 0.25) for question in case.questions)
    # Half of the colour scale somewhere in the map, and other tiles in detail.
    assert float((first.relevance - second.relevance).abs().max()) > 0.5
    assert not torch.equal(first.lod, second.lod)


@pytest.mark.parametrize(
    ("question", "rows", "cols"),
    [
        ("What shines in the black helmet at the bottom right?", slice(5, 8), slice(4, 8)),
        ("Which model stands in the top right corner?", slice(0, 4), slice(5, 8)),
        ("Which flag hangs at the left?", slice(0, 8), slice(0, 2)),
    ],
)
def test_the_astronauts_most_relevant_tiles_lie_where_the_question_says(
    bundled: Engine, question: str, rows: slice, cols: slice
) -> None:
    scores = bundled.encode(demo_cases()[0].image, question, 0.25).scores.participatory
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[rows, cols] = True
    assert scores[inside].mean() > scores[~inside].mean() + 0.3


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
    assert str(out / "overview.png") in result.stdout
    assert result.stderr.splitlines()[0] == f"[1/3] cat: {demo_cases()[1].questions[0]}"
    assert (out / "overview.png").is_file()
    facts = json.loads((out / "demo.json").read_text())
    assert [result["question"] for result in facts["results"]] == list(demo_cases()[1].questions)
