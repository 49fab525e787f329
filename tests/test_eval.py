"""A whole evaluation: answers that survive a kill, figures, files, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from typer.testing import CliRunner

from arrcoc import cli
from arrcoc.errors import ConfigError
from arrcoc.evaluation import datasets, report, runner
from arrcoc.evaluation.command import check_budgets
from arrcoc.evaluation.curve import draw
from arrcoc.evaluation.methods import METHODS, Lab
from arrcoc.evaluation.metrics import Estimate
from arrcoc.evaluation.records import Row
from arrcoc.evaluation.summary import Cell, by_family, summarise

BUDGETS = (0.04, 0.25, 1.0)
NAMES = ("arrcoc", "downscale")


@pytest.fixture(scope="module")
def lab(tiny_checkpoint: Path) -> Lab:
    return Lab.open(tiny_checkpoint, "demo", "cpu", "float32", 3, 0, layout="replace")


def cases(count: int = 2) -> Any:
    return datasets.load("placards", 512, count, 0)


def row(method: str = "arrcoc", budget: float = 0.5, **values: Any) -> Row:
    facts: dict[str, Any] = {
        **{"id": "1", "family": "read", "full_tokens": 100, "tokens": 50, "milliseconds": 10.0},
        **{"question": "q", "answers": ("a",), "answer": "a", "exact": 1.0, "anls": 1.0},
    }
    return Row(method=method, budget=budget, **(facts | values))


def timeless(rows: list[Row]) -> list[Row]:
    return [found.model_copy(update={"milliseconds": None}) for found in rows]


# Rows.


def test_a_run_answers_everything_once_in_order(lab: Lab, tmp_path: Path) -> None:
    names: list[str] = []
    rows = runner.run(lab, cases(), NAMES, BUDGETS, tmp_path, progress=names.append)
    assert names == ["case 0", "case 1"]
    keys = [(found.id, found.method, found.budget) for found in rows]
    assert keys == [(i, m, b) for i in "01" for m in NAMES for b in BUDGETS]
    assert runner.read_rows(tmp_path / runner.ANSWERS) == rows
    for found in rows:
        possible = (found.method, found.budget) != ("arrcoc", 0.04)
        assert (found.answer is not None) == (found.tokens is not None) == possible
        assert not possible or 0 < (found.tokens or 0) <= found.budget * found.full_tokens


def test_a_second_run_asks_nothing_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runner.run(lab, cases(), NAMES, BUDGETS[1:], tmp_path)
    monkeypatch.setattr(runner, "answer", lambda *_: pytest.fail("asked again"))
    assert runner.run(lab, cases(), NAMES, BUDGETS[1:], tmp_path) == first
    assert runner.run(lab, cases(), NAMES[:1], BUDGETS[1:2], tmp_path, limit=1) == first[:1]


def test_further_methods_budgets_and_cases_are_added(lab: Lab, tmp_path: Path) -> None:
    few = runner.run(lab, cases(1), NAMES[:1], BUDGETS[1:2], tmp_path)
    more = runner.run(lab, cases(2), NAMES, BUDGETS, tmp_path)
    assert more[1] == few[0]
    assert len(runner.read_rows(tmp_path / runner.ANSWERS)) == len(more) == 12


def test_a_torn_last_line_is_dropped_and_asked_again(lab: Lab, tmp_path: Path) -> None:
    whole = runner.run(lab, cases(), NAMES, BUDGETS, tmp_path)
    path = tmp_path / runner.ANSWERS
    path.write_bytes(path.read_bytes()[:-20])
    again = runner.run(lab, cases(), NAMES, BUDGETS, tmp_path)
    assert again[:-1] == whole[:-1]
    assert timeless(again) == timeless(whole)
    assert runner.read_rows(path) == again


@pytest.mark.parametrize("damage", [b"{}\n", b"\xff\n", None])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / runner.ANSWERS
    good = (row().model_dump_json() + "\n").encode()
    path.write_bytes(good + (good if damage is None else damage))
    with pytest.raises(ConfigError, match=r"answers\.jsonl:2 "):
        runner.read_rows(path)


def test_another_run_is_refused_unless_begun_anew(lab: Lab, tmp_path: Path) -> None:
    runner.run(lab, cases(1), NAMES[:1], BUDGETS[1:2], tmp_path)
    other = datasets.load("placards", 512, 1, 1)
    with pytest.raises(ConfigError, match="differs in data"):
        runner.run(lab, other, NAMES[:1], BUDGETS[1:2], tmp_path)
    rows = runner.run(lab, other, NAMES[:1], BUDGETS[1:2], tmp_path, resume=False)
    assert runner.read_rows(tmp_path / runner.ANSWERS) == rows


def test_budgets_of_rows_tell_tokens_from_shares() -> None:
    for budget in (1, 1.0):
        again = Row.model_validate_json(row(budget=budget).model_dump_json())
        assert type(again.budget) is type(budget)
    assert row(budget=1).key != row(budget=1.0).key


@pytest.mark.parametrize(("budget", "wanted"), [(0.125, 12), (1.0, 100), (7, 7), (300, 100), (0.001, 0)])
def test_tokens_of_a_budget(budget: int | float, wanted: int) -> None:
    assert runner.tokens(budget, 100) == wanted


@pytest.mark.parametrize("budgets", [[0], [0.0], [1.5], [-1], [float("nan")], [], [0.5, 0.5]])
def test_budgets_that_are_none(budgets: list[int | float]) -> None:
    with pytest.raises(ConfigError):
        check_budgets(budgets)
    check_budgets([1, 1.0, 0.25])


@pytest.mark.slow
def test_a_killed_run_loses_and_repeats_no_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "arrcoc", "eval", "--dataset", "placards", "--canvas", "512"),
        *("--count", "2", "--methods", "arrcoc,downscale,fastv", "--budgets", "0.25,0.5,1.0"),
        *("--model", str(tiny_checkpoint), "--out", str(out), "--max-new-tokens", "3", "--device", "cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    path = out / runner.ANSWERS
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(30) == -signal.SIGKILL, "it ended before it could be killed"
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    with path.open("ab") as file:
        file.write(b'{"id":"torn')
    done = CliRunner().invoke(cli.app, command[3:])
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(kept)
    keys = [(found.id, found.method, found.budget) for found in runner.read_rows(path)]
    names = ("arrcoc", "downscale", "fastv")
    assert keys == [(i, m, b) for i in "01" for m in names for b in (0.25, 0.5, 1.0)]


# Figures.


def test_a_cell_holds_means_and_the_median_time() -> None:
    rows = [row(id=str(i), exact=float(i < 3), tokens=10 + i, milliseconds=float(10**i)) for i in range(5)]
    (cell,) = summarise(rows)
    assert cell.exact is not None
    assert (cell.exact.mean, cell.tokens, cell.milliseconds, cell.cases) == (0.6, 12, 100.0, 5)
    assert cell.exact.low < 0.6 < cell.exact.high


def test_one_impossible_case_takes_the_cells_figures() -> None:
    none: dict[str, Any] = {"tokens": None, "milliseconds": None, "answer": None, "exact": None, "anls": None}
    cells = summarise([row(id="1"), row(id="2", **none), row("fastv", id="2", **none)])
    assert [(cell.impossible, cell.exact) for cell in cells] == [(1, None), (1, None)]
    texts = report.table(cells)
    assert texts[1:] == [["arrcoc", "not possible for 1 of 2"], ["fastv", "not possible"]]


def test_families_are_apart() -> None:
    rows = [row(), row(id="2", family="count", exact=0.0)]
    found = {name: cells[0].exact.mean for name, cells in by_family(rows).items() if cells[0].exact}
    assert found == {"count": 0.0, "read": 1.0}


def test_the_curve_shows_every_method_and_its_band() -> None:
    cells = [
        Cell(name, share, 9, 0, 100 * share, 1.0, Estimate(0.5 + n / 20, 0.4, 0.9), Estimate(0, 0, 0))
        for n, name in enumerate(METHODS)
        for share in (0.125, 0.5, 1.0)
    ]
    (axes,) = draw([*cells, Cell("arrcoc", 0.01, 9, 9)], 100, "title").axes
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert list(drawn) == list(METHODS)
    assert drawn["downscale"] == pytest.approx([55.0] * 3)
    assert len(axes.collections) == len({to_hex(line.get_color()) for line in axes.lines}) == len(METHODS)


# The command.


def test_the_command_writes_its_report(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (512, 300), "navy").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": q, "answer": "x", "family": "f"} for q in ("What?", "Where?")]
    data = tmp_path / "my.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    arguments = [
        *("eval", "--dataset", str(data), "--methods", "arrcoc,random,saliency,visionzip"),
        *("--budgets", "4,25%,1.0", "--model", str(tiny_checkpoint), "--out", str(out), "--limit", "1"),
        *("--max-new-tokens", "2", "--device", "cpu", "--layout", "replace"),
    ]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((out / report.RESULTS).read_text())
    assert {"command", "commit", "versions", "device", "date", "dtype", "seed"} <= found.keys()
    assert found["cases"] == 1
    assert str(tmp_path) not in (out / report.RESULTS).read_text()
    table = (out / report.TABLE).read_text()
    assert "| arrcoc | not possible | " in table
    assert "## f (1 questions)" in table
    with Image.open(out / report.CURVE) as curve:
        assert min(curve.size) > 400
    assert "visionzip" in done.output


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--methods", "clip"], 1, "clip"),
        (["--dataset", "gone.jsonl"], 1, "gone.jsonl"),
        (["--budgets", "2.5"], 1, "2.5"),
        (["--budgets", "half"], 2, "half"),
    ],
)
def test_misuse_is_one_line(tmp_path: Path, more: list[str], code: int, message: str) -> None:
    done = CliRunner().invoke(cli.app, ["eval", "--out", str(tmp_path / "o"), "--canvas", "256", *more])
    assert done.exit_code == code
    assert message in done.output


def test_methods_of_the_command_line_are_all_but_the_oracle() -> None:
    assert set(cli.METHODS.split(",")) | {"oracle"} == set(METHODS)
