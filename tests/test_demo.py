from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from arrcoc import cli, report
from arrcoc.demo import run
from arrcoc.demo.bundled import NOTE, bundled_checkpoint
from arrcoc.demo.contact import lit
from arrcoc.demo.images import demo_case
from arrcoc.engine import Engine
from arrcoc.errors import BudgetError, ConfigError

Made = tuple[Path, list[run.DemoResult], list[str]]

CASES = [demo_case("one", "where", 0, 512), demo_case("two", "compare", 0, 512)]
FILES = {f"{case.name}-{question.family}.png" for case in CASES for question in case.questions}


@pytest.fixture(scope="module")
def subject(tiny_checkpoint: Path) -> run.Subject:
    return run.open_subject(str(tiny_checkpoint), "demo")


@pytest.fixture(scope="module")
def made(subject: run.Subject, tmp_path_factory: pytest.TempPathFactory) -> Made:
    steps: list[str] = []
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    return out, run.run(subject, CASES, out, 0.5, steps.append), steps


def test_one_picture_per_question_a_sheet_and_a_json(made: Made) -> None:
    out, results, steps = made
    assert {path.name for path in out.iterdir()} == FILES | {"overview.png", "demo.json"}
    assert {result.picture.name for result in results} == FILES
    assert len({(out / name).read_bytes() for name in FILES}) == len(FILES) == 6
    one_case = [way for way in run.WAYS for _ in range(3)]
    assert [step.split(":")[0] for step in steps] == [*one_case, *one_case, "pictures"]


def test_json_holds_what_was_found(made: Made) -> None:
    out, results, _ = made
    facts = json.loads((out / "demo.json").read_text())
    assert {"torch", "transformers", "python"} <= facts["engine"]["versions"].keys()
    for entry, result in zip(facts["results"], results, strict=True):
        assert entry["question"] == result.question.text
        assert entry["expected"] == result.question.answer
        assert entry["answer"] == result.answer.text == entry["said"]["arrcoc"]["text"]
        assert entry["tokens"] == result.encoding.n_tokens <= 0.5 * entry["full_tokens"]
        assert entry["lod"] == result.encoding.lod.tolist()
        assert all(-1 <= tension <= 1 for tension in entry["tensions"].values())
        assert entry["timings_ms"]["total"] > 0
        assert all((out / name).is_file() for name in entry["files"])
    assert facts["cache"]["hits"] > 0  # a later question finds tiles of an earlier one


def test_every_way_keeps_to_its_tokens(made: Made) -> None:
    for result in made[1]:
        said = result.said
        assert said["full resolution"].tokens == result.encoding.full_tokens == 256  # 512 x 512 px
        assert said["arrcoc"].tokens <= 128
        assert said["downscaled"].tokens == 121  # 11 x 11 tokens are the largest square within 128
        assert all(one.milliseconds > 0 for one in said.values())


def test_an_answer_is_marked_by_what_was_said(made: Made) -> None:
    first = made[1][0]
    right = run._said(first.question, dataclasses.replace(first.answer, text=f" {first.question.answer}. "))
    wrong = run._said(first.question, dataclasses.replace(first.answer, text="elsewhere"))
    assert (right.right, wrong.right) == (True, False)
    both = {"arrcoc": right, "full resolution": wrong, "downscaled": wrong}
    shown = printed([dataclasses.replace(first, said=both)])
    assert f"\N{CHECK MARK} {first.question.answer}" in shown
    assert shown.count("\N{BALLOT X} elsewhere") == 2


def printed(results: list[run.DemoResult]) -> str:
    shown_to = io.StringIO()
    Console(width=400, file=shown_to).print(run.table(results))
    return shown_to.getvalue()


def test_table_shows_tokens_and_answers_as_they_are(made: Made) -> None:
    first = made[1][0]
    said = first.said["arrcoc"]._replace(text="[bold]red\x1b[31m\nand " + "x" * 200)
    shown = printed([dataclasses.replace(first, said=first.said | {"arrcoc": said})])
    assert f"{first.encoding.n_tokens:,} tokens" in shown
    assert "[bold]red [31m and xxx" in shown
    assert "x…" in shown
    assert first.question.text in shown


def test_stage_groups_hold_every_stage(made: Made) -> None:
    timings = made[1][0].answer.timings
    stages = [stage for group in report.STAGE_GROUPS.values() for stage in group]
    assert sorted(stages) == sorted(timings.keys() - {"total"})
    assert sum(report.grouped(timings).values()) == pytest.approx(timings["total"], rel=0.2)


def test_grouped_adds_up() -> None:
    # look 1 + 2 = 3; judge 4; encode and answer did not run.
    times = {"decode": 1.0, "glimpse": 2.0, "score": 4.0, "total": 9.0}
    assert report.grouped(times) == {"look": 3.0, "judge": 4.0, "encode": 0.0, "answer": 0.0}


def test_sheet_shows_each_questions_own_tiles_and_answers(made: Made) -> None:
    results = made[1][:3]
    figure = run.sheet(results)
    axes = {str(a.get_label()): a for a in figure.axes}
    assert list(axes) == ["one", "one 1", "one 1 words", "one 2", "one 2 words", "one 3", "one 3 words"]
    for number, result in enumerate(results, start=1):
        drawn = axes[f"one {number}"]
        np.testing.assert_allclose(drawn.get_images()[0].get_array(), lit(result.encoding), atol=0.01)
        assert len(drawn.patches) == len(result.question.targets)
        words = " ".join(text.get_text() for text in axes[f"one {number} words"].texts)
        assert result.question.text in words.replace("\n", " ")
        assert f"right answer: {result.question.answer}" in words
        assert all(f"{way}, {said.tokens:,} tokens" in words for way, said in result.said.items())


def test_a_tile_is_as_bright_as_its_lod(tiny_checkpoint: Path) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, "demo", halo=0)
    white = torch.full((3, 128, 256), 255, dtype=torch.uint8)
    encoding = engine.encode(white, "What is it?", budget=17)  # 1 x 2 tiles: glimpse of 2 tokens, 15 left
    bright = lit(encoding).mean(axis=2)
    shown = [float(bright[:, :128].mean()), float(bright[:, 128:].mean())]
    # LOD background shows 0.35 of grey, LOD high all of the picture, in between by thirds.
    levels = [lod / 3 + (1 - lod / 3) * 0.35 for lod in encoding.lod.flatten().tolist()]
    assert shown == pytest.approx(levels, abs=0.01)


def test_the_bundled_checkpoint_is_named_as_what_it_is(made: Made, tmp_path: Path) -> None:
    bundled = run.open_subject(None, "auto")
    assert Path(bundled.lab.qwen.name) == bundled_checkpoint()[0]
    assert bundled.lab.engine.describe()["preset"] == "demo"  # the tiles that it was trained on
    results = made[1]
    assert run.closing_lines(bundled, results, tmp_path).count(NOTE) == 1
    assert NOTE not in run.closing_lines(bundled._replace(note=""), results, tmp_path)


@pytest.mark.parametrize(("budget", "kind"), [(0, BudgetError), (10**9, BudgetError)])
def test_bad_budgets_are_the_engines_errors(
    budget: int, kind: type[Exception], subject: run.Subject, tmp_path: Path
) -> None:
    with pytest.raises(kind):
        run.run(subject, CASES[:1], tmp_path, budget)


def test_folder_that_cannot_be_made(subject: run.Subject, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Name another one with --out"):
        run.run(subject, CASES[:1], tmp_path / "file" / "out", 0.5)


def test_demo_command(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "demo_cases", lambda: CASES[1:])
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), "--model", str(tiny_checkpoint), "--preset", "demo"]
    result = CliRunner().invoke(cli.app, [*arguments, "--budget", "0.5"])
    assert result.exit_code == 0, result.output
    assert str(out / "overview.png") in result.stdout
    assert result.stderr.splitlines()[0] == f"[1/10] arrcoc: {CASES[1].questions[0].text}"
    assert (out / "overview.png").is_file()
    facts = json.loads((out / "demo.json").read_text())
    assert [one["question"] for one in facts["results"]] == [q.text for q in CASES[1].questions]
