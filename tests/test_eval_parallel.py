"""Several processes answer what one would, in the same order, whatever ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from arrcoc import cli
from arrcoc.errors import ConfigError, ImageError
from arrcoc.evaluation import datasets, parallel, report, store
from arrcoc.evaluation.methods import LabChoice
from arrcoc.evaluation.records import Row

NAMES, BUDGETS = ("arrcoc", "random"), (0.5, 1.0)


class Dying(LabChoice):
    """Opening it ends the process."""

    def open(self) -> Any:
        os._exit(7)


def row(name: str, method: str = "arrcoc", **more: Any) -> Row:
    facts: dict[str, Any] = {
        **{"family": "read", "budget": 0.5, "full_tokens": 100, "tokens": 50, "milliseconds": 10.0},
        **{"question": "q", "answers": ("a",), "answer": "a", "exact": 1.0, "anls": 1.0},
    }
    return Row(id=name, method=method, **(facts | more))


def arguments(checkpoint: Path, out: Path, workers: int, count: int) -> list[str]:
    return [
        *("eval", "--canvas", "256", "--count", str(count), "--methods", ",".join(NAMES)),
        *("--budgets", ",".join(map(str, BUDGETS)), "--model", str(checkpoint), "--device", "cpu"),
        *("--max-new-tokens", "3", "--out", str(out), "--workers", str(workers)),
    ]


def call(*given: object) -> Result:
    return CliRunner().invoke(cli.app, [str(part) for part in given])


def keys(count: int = 3) -> list[tuple[str, str, float]]:
    return [(str(case), name, budget) for case in range(count) for name in NAMES for budget in BUDGETS]


def test_two_processes_go_on_and_answer_as_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(*arguments(tiny_checkpoint, one, 1, 4)).exit_code == 0
    assert call(*arguments(tiny_checkpoint, two, 1, 1)).exit_code == 0
    first = (two / store.ANSWERS).read_bytes()
    done = call(*arguments(tiny_checkpoint, two, 2, 4))
    assert done.exit_code == 0, done.output
    assert done.stderr.count("case ") == 4
    assert (two / store.ANSWERS).read_bytes().startswith(first)
    alone, shared = (store.read_rows(out / store.ANSWERS) for out in (one, two))
    assert timeless(shared) == timeless(alone)
    assert [(row.id, row.method, row.budget) for row in shared] == keys(4)
    assert [row.workers for row in shared] == [1] * 4 + [2] * 12
    assert all(row.milliseconds for row in shared)
    for out, workers in ((one, 1), (two, 2)):
        assert json.loads((out / report.RESULTS).read_text())["workers"] == workers
        assert ("not comparable" in (out / report.TABLE).read_text()) == (workers > 1)
        assert not list(out.glob("*part*"))


def timeless(rows: list[Row]) -> list[Row]:
    return [row.model_copy(update={"milliseconds": 0.0, "workers": 1}) for row in rows]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_parts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "arrcoc", *arguments(tiny_checkpoint, tmp_path, 2, 40)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    parts = [store.part_path(tmp_path, number) for number in range(2)]
    until = time.monotonic() + 90
    while not all(part.is_file() and part.read_bytes().count(b"\n") >= 2 for part in parts):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = sizes(parts)
    while time.monotonic() < until:  # the others notice, and end
        time.sleep(0.5)
        if sizes(parts) == before:
            break
        before = sizes(parts)
    kept = {line for part in parts for line in part.read_bytes().split(b"\n")[:-1]}
    assert not (tmp_path / store.ANSWERS).exists()
    assert len(kept) < 40 * 4
    with parts[1].open("ab") as file:
        file.write(b'{"case":4,"row":{"id":"to')
    done = call(*arguments(tiny_checkpoint, tmp_path, 1, 3))
    assert done.exit_code == 0, done.output
    rows = store.read_rows(tmp_path / store.ANSWERS)
    merged = [json.loads(line) for line in (tmp_path / store.ANSWERS).read_text().splitlines()]
    assert all(json.loads(line)["row"] in merged for line in kept)
    assert {(i, m, repr(b)) for i, m, b in keys()} <= {one.key for one in rows}
    assert not list(tmp_path.glob("*part*"))


def sizes(parts: list[Path]) -> list[int]:
    return [part.stat().st_size for part in parts]


def test_what_fails_in_a_process_is_told_and_the_rest_is_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (256, 256), "navy").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    lines = [{"image": name, "question": "What?", "answer": "x"} for name in ("good.png", "bad.png")]
    data = tmp_path / "my.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    choice = LabChoice(tiny_checkpoint, "demo", "cpu", "float32", 2, 0)
    store.prepare(out, {"run": 1}, True)
    cases = datasets.load(str(data), 0, 0, 0)
    with pytest.raises(ImageError):
        parallel.run(choice, cases, 2, ["downscale"], [0.5], out, 1, lambda _: None)
    store.prepare(out, {"run": 1}, True)
    assert [one.id for one in store.read_rows(out / store.ANSWERS)] == ["1"]
    assert not list(out.glob("*part*"))


def test_a_process_that_dies_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cases = datasets.load("placards", 256, 2, 0)
    with pytest.raises(RuntimeError, match="died, exit code 7"):
        parallel.run(Dying(tiny_checkpoint), cases, 2, ["downscale"], [0.5], tmp_path, 1, lambda _: None)


# Parts.


def write_part(out: Path, number: int, rows: list[tuple[int, Row]]) -> None:
    with store.appending_part(store.part_path(out, number)) as append:
        for case, one in rows:
            append(case, one)


def test_parts_come_after_the_answers_case_by_case(tmp_path: Path) -> None:
    with store.appending(tmp_path / store.ANSWERS) as append:
        append(row("z"))
    write_part(tmp_path, 0, [(0, row("c")), (0, row("c", "random")), (2, row("a"))])
    write_part(tmp_path, 1, [(1, row("b")), (3, row("d"))])
    store.merge(tmp_path)
    found = [(one.id, one.method) for one in store.read_rows(tmp_path / store.ANSWERS)]
    assert found == [("z", "arrcoc"), ("c", "arrcoc"), ("c", "random"), *((i, "arrcoc") for i in "bad")]
    assert [path.name for path in tmp_path.iterdir()] == [store.ANSWERS]


def test_a_merge_that_was_cut_off_repeats_no_row(tmp_path: Path) -> None:
    write_part(tmp_path, 0, [(0, row("a")), (1, row("b"))])
    kept = store.part_path(tmp_path, 0).read_bytes()
    store.merge(tmp_path)
    before = (tmp_path / store.ANSWERS).read_bytes()
    store.part_path(tmp_path, 0).write_bytes(kept)  # a kill after the answers were written
    store.merge(tmp_path)
    assert (tmp_path / store.ANSWERS).read_bytes() == before


def test_torn_lines_are_dropped_and_damaged_ones_named(tmp_path: Path) -> None:
    write_part(tmp_path, 3, [(0, row("a"))])
    part = store.part_path(tmp_path, 3)
    good = part.read_bytes()
    part.write_bytes(good + good[:-20])
    store.merge(tmp_path)
    assert [one.id for one in store.read_rows(tmp_path / store.ANSWERS)] == ["a"]
    part.write_bytes(good + b"{}\n")
    with pytest.raises(ConfigError, match=r"answers\.part3\.jsonl:2 "):
        store.merge(tmp_path)
    assert part.exists()


def test_beginning_anew_drops_parts_too(tmp_path: Path) -> None:
    store.prepare(tmp_path, {"seed": 0}, True)
    write_part(tmp_path, 0, [(0, row("a"))])
    with pytest.raises(ConfigError, match="differs in seed"):
        store.prepare(tmp_path, {"seed": 1}, True)
    assert store.read_rows(store.prepare(tmp_path, {"seed": 1}, False)) == []
    assert not list(tmp_path.glob("*part*"))


def test_rows_of_older_runs_are_those_of_one_process() -> None:
    line = json.loads(row("a").model_dump_json())
    del line["workers"]
    assert Row.model_validate(line).workers == 1
