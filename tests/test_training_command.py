"""`arrcoc demo train`: from nothing to a checkpoint, through a kill, with curves and a record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from arrcoc import Engine, cli
from arrcoc.demo.training import command, curves, measure
from arrcoc.demo.training.command import Settings
from arrcoc.demo.training.loop import LOG, STATE
from arrcoc.demo.training.recipe import Phase, Recipe
from arrcoc.errors import ArrcocError, ConfigError, ModelError

SMALL = Recipe(steps=3, phases=(Phase(1.0, {128: 1.0}, {"whole": 1.0, "refine": 1.0}, batch=2),))

# The same in a process of its own: it logs and saves at every step, slowly enough to be killed.
SLOW = """
import sys, time
from pathlib import Path
from arrcoc.demo.training import command, curves, loop
from arrcoc.demo.training.recipe import Phase, Recipe
phases = (Phase(1.0, {128: 1.0}, {"whole": 1.0, "refine": 1.0}, batch=2),)
command.Recipe = lambda: Recipe(steps=500, phases=phases)
curves._POLL_S = 0.05
command.make_skeleton = lambda folder: Path(sys.argv[1])
class Run(loop.Run):
    __slots__ = ()
    def __init__(self, *given, **more):
        super().__init__(*given, save_every=0.0, **more)
command.Run = Run
from arrcoc.cli import app
app(sys.argv[2:])
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.setattr(command, "Recipe", lambda: SMALL)
    monkeypatch.setattr(command, "HELD_OUT", ((128, 2, 2),))
    monkeypatch.setattr(command, "make_skeleton", lambda folder: tiny_checkpoint)


def call(folder: Path, *more: object) -> Any:
    arguments = ["demo", "train", "--out", folder, "--workers", 0, *more]
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def point(step: int, mode: str = "whole", **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds": step / 2, "mode": mode, "answer": 1.0, "right": 0.5} | more


def write_log(folder: Path, points: list[dict[str, Any]]) -> None:
    (folder / LOG).write_text("".join(json.dumps(one) + "\n" for one in points))


# The command.


@pytest.mark.usefixtures("small")
def test_one_command_trains_measures_and_exports(tmp_path: Path) -> None:
    done = call(tmp_path / "run", "--seed", 5, "--measure", 1)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "run" / command.RECORD).read_text())
    assert (record["done"], record["steps"], record["seed"], record["device"]) == (True, 3, 5, "cpu")
    assert record["recipe"]["seed"] == 5
    assert record["seconds"] > 0
    assert {"commit", "date", "processes", "workers", "initial", "photographs"} <= record.keys()
    assert {"arrcoc", "python", "torch", "transformers", "numpy"} <= record["versions"].keys()
    assert set(record["held_out"]["128"]) == {"whole", "high", "refine", "replace", "crops"}
    with Image.open(tmp_path / "run" / curves.CURVES) as picture:
        assert min(picture.size) > 400
    folder = tmp_path / "run" / command.CHECKPOINT
    assert json.loads((folder / "training.json").read_text()) == record
    engine = Engine.from_pretrained(folder, "demo", "cpu", max_new_tokens=2)
    assert engine.ask(torch.zeros(3, 128, 128, dtype=torch.uint8), "What is it?").new_tokens <= 2
    assert "128 px, held-out questions" in done.output
    assert "3 steps in " in done.output


@pytest.mark.usefixtures("small")
def test_a_run_that_was_stopped_goes_on_and_keeps_its_seconds(tmp_path: Path) -> None:
    first = call(tmp_path, "--measure", 0, "--stop-after", 0)
    assert "stopped; the same command goes on" in first.output, first.output
    before = json.loads((tmp_path / command.RECORD).read_text())
    assert not before["done"]
    assert before["held_out"] == {}
    assert 0 < before["steps"] < 3
    second = call(tmp_path, "--measure", 0)
    assert second.exit_code == 0, second.output
    after = json.loads((tmp_path / command.RECORD).read_text())
    assert (after["done"], after["steps"]) == (True, 3)
    assert after["seconds"] > before["seconds"]


@pytest.mark.usefixtures("small")
def test_a_run_starts_from_an_exported_checkpoint(tmp_path: Path) -> None:
    assert call(tmp_path / "a", "--measure", 0, "--steps", 1).exit_code == 0
    exported = tmp_path / "a" / command.CHECKPOINT
    done = call(tmp_path / "b", "--measure", 0, "--steps", 1, "--initial", exported, "--begin", 0.5)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "b" / command.RECORD).read_text())
    assert (record["initial"], record["recipe"]["begin"]) == (command.CHECKPOINT, 0.5)
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
def test_a_killed_run_resumes_where_it_saved_and_drew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["demo", "train", "--out", str(tmp_path), "--workers", "0", "--measure", "0"]
    code = [sys.executable, "-c", SLOW, str(tiny_checkpoint), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(code, env=environment, **quiet)
    until = time.monotonic() + 90
    while not (tmp_path / curves.CURVES).is_file():  # drawn while it runs, after a save
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (tmp_path / command.RECORD).exists()
    with Image.open(tmp_path / curves.CURVES) as picture:
        picture.load()
    reached = torch.load(tmp_path / STATE, weights_only=True)["step"]
    resumed = subprocess.run([*code, "--steps", str(reached + 2)], env=environment, timeout=90, **quiet)
    assert resumed.returncode == 0
    record = json.loads((tmp_path / command.RECORD).read_text())
    assert (record["done"], record["steps"]) == (True, reached + 2)
    assert (tmp_path / command.CHECKPOINT / "model.safetensors").is_file()


@pytest.mark.slow
def test_torchrun_trains_what_the_command_line_says(tmp_path: Path) -> None:
    settings = Settings(tmp_path, steps=1, seed=3, workers=0, batch_scale=0.005, measure=0)
    command.launch(settings)
    record = json.loads((tmp_path / command.RECORD).read_text())
    assert (record["done"], record["steps"], record["seed"], record["processes"]) == (True, 1, 3, 1)
    assert record["recipe"]["batch_scale"] == 0.005
    assert (tmp_path / curves.CURVES).is_file()


def test_a_failed_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "launch_command", lambda _: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="exit code 3"):
        command.launch(Settings(tmp_path, devices=2))


def test_several_devices_are_started_with_all_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Settings(tmp_path, 7, 1, 4, 3, 9.5, tmp_path, None, 0.25, "composed", 0.5, 2)
    line = command.launch_command(given)
    assert line[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    seen: list[Settings] = []
    from arrcoc.demo.training import __main__ as entry

    monkeypatch.setattr(entry, "work", seen.append)
    monkeypatch.setattr(sys, "argv", ["training", *line[line.index("arrcoc.demo.training") + 1 :]])
    monkeypatch.setenv("WORLD_SIZE", "4")
    entry.main()
    assert seen == [given]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--devices", "0"], "--devices 0"),
        (["--devices", "99"], "99 devices"),
        (["--workers", "-1"], "--workers -1"),
        (["--stop-after", "-2"], "--stop-after -2"),
        (["--begin", "1"], "--begin 1"),
        (["--source", "scanned"], "--source scanned"),
        (["--batch-scale", "nan"], "--batch-scale nan"),
        (["--measure", "-1"], "--measure -1"),
        (["--photographs", "gone"], "gone: no such folder"),
        (["--initial", "gone"], "gone without model.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, more: list[str], message: str) -> None:
    done = call(tmp_path / "new", *more)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for settings, kind in (
        (Settings(tmp_path / "file" / "run"), ConfigError),
        (Settings(tmp_path, initial=tmp_path), ModelError),
    ):
        with pytest.raises(kind) as caught:
            command.check(settings)
        assert isinstance(caught.value, ArrcocError)


def test_the_demo_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("the demo was begun", "nothing", "Stop")

    monkeypatch.setattr("arrcoc.demo.run.open_subject", refuse)
    done = CliRunner().invoke(cli.app, ["demo", "--preset", "demo"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: the demo was begun. Allowed: nothing. Stop.\n"
    assert CliRunner().invoke(cli.app, ["demo", "paint"]).exit_code == 2


def test_held_out_batches_see_all_or_what_an_ideal_scorer_would_choose() -> None:
    targets = torch.zeros(2, 3, 4, dtype=torch.bool)
    targets[0, 1, 2] = targets[1, 0, 0] = targets[1, 2, 3] = True
    batch: Any = SimpleNamespace(mode="high", targets=targets, plan_seed=0)
    assert (measure._allocation(batch) == 3).all()
    batch.mode = "refine"
    chosen = measure._allocation(batch)
    # The second example has two targets: 2 + 2 tiles in each.
    assert (chosen == 3).sum(1).tolist() == [4, 4]
    assert (chosen[targets.flatten(1)] == 3).all()
    assert torch.equal(chosen, measure._allocation(batch))


# Curves.


def test_a_resumed_log_has_no_detours(tmp_path: Path) -> None:
    old = [point(50), point(100, right=0.1), point(150)]
    write_log(tmp_path, [*old, point(100, right=0.9), point(200)])
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 2')  # torn by a kill
    found = curves.read_log(tmp_path / LOG)
    assert [(one["step"], one["right"]) for one in found] == [(50, 0.5), (100, 0.9), (200, 0.5)]
    assert curves.read_log(tmp_path / "none") == []


def test_smoothing_by_hand() -> None:
    # span 1/ln 2: weights halve. 4; (2 + 0) / 1.5; a gap: (1 + 0) / 0.75; (0.5 + 8) / (0.375 + 1).
    found = curves.smooth([4.0, 0.0, float("nan"), 8.0], 1 / np.log(2))
    np.testing.assert_allclose(found, [4.0, 2 / 1.5, 1 / 0.75, 8.5 / 1.375])
    assert np.isnan(curves.smooth([float("nan")], 3.0)).all()


def test_every_mode_has_a_line_in_all_four_panels() -> None:
    points = [point(50 * i, mode, right=0.25) for i, mode in enumerate(["crops", "whole", "new", "whole"])]
    panels = curves.draw(points, "title").axes
    for axes in panels:
        drawn = {str(line.get_label()) for line in axes.lines if str(line.get_label())[0] != "_"}
        assert drawn == {"whole", "crops", "new"}
    wanted = [(False, 50.0), (True, 50 / 120), (False, 50.0), (True, 50 / 120)]
    for axes, (_, first) in zip(panels, wanted, strict=True):
        whole = next(line for line in axes.lines if line.get_label() == "whole")
        assert np.asarray(whole.get_xdata())[0] == pytest.approx(first)
    right = next(line for line in panels[2].lines if line.get_label() == "whole")
    assert np.asarray(right.get_ydata()).tolist() == pytest.approx([25.0, 25.0])


def test_curves_are_redrawn_at_a_save_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_POLL_S", 0.01)
    started: list[list[str]] = []

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    saved = tmp_path / "state"
    with curves.redrawing(tmp_path, saved):
        time.sleep(0.05)
        assert not started, "nothing was saved"
        saved.write_text("1")
        until = time.monotonic() + 5
        while not started and time.monotonic() < until:
            time.sleep(0.01)
        assert not (tmp_path / curves.CURVES).exists()
    assert started == [[sys.executable, "-m", "arrcoc.demo.training.curves", str(tmp_path)]]
    assert (tmp_path / curves.CURVES).is_file()
    assert not list(tmp_path.glob(".*"))
