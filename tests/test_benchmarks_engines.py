"""Tables of full-size builds and of TensorRT 8.6: what is quoted, and what is not."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

ABOUT = {
    "command": "python benchmarks/x.py",
    "date": "2026-01-02",
    "device": "NVIDIA H200",
    "versions": {"torch": "2.11.0", "tensorrt": "8.6.0"},
}
ERRORS = {"fp32": {"tokens": 0.004, "planes": [0.001, 0.006]}, "rotation_flipped_tokens": 0.5}
LINES = [
    {"kind": "built", "build_seconds": 61.2, "plan_mb": 20.4},
    {"kind": "loaded", "contexts_apart_mb": 40.0, "contexts_shared_mb": 11.0},
    {"kind": "run", "name": "side2", "batch": 16, "ms": 1.5, **ERRORS},
    {"kind": "graph", "name": "side2", "batch": 16, "ms": 1.25},
    {"kind": "run", "name": "side2", "batch": 1, "ms": 0.75, **ERRORS},
    {"kind": "graph", "name": "side2", "batch": 1, "ms": None, "refused": "x"},
    {"kind": "done"},
]
TIMES = ABOUT | {
    "matrix_peak_tflops": 500.0,
    "cases": {
        "2b": {
            "gflop": {"side2": 400.0},
            "eager_fp16_error": {"side2": 0.0014},
            "plans": {"2b:1": [{"kind": "killed while building"}], "2b:0": LINES},
            "torch": {"ms": {"side2 x16": {"eager": 3.0, "eager graph": 2.0, "compiled": 2.5}}},
        }
    },
}
BUILDS = ABOUT | {
    "builds": {
        "photo": {
            "sides": [2, 4],
            "max_batch": [64, 16],
            "archs": ["sm80", "sm89"],
            "builder": "tensorrt_rtx 1.7",
            "opset": 18,
            "seconds": 99.6,
            "others_cpu_share": 0.02,
            "files": {"tower.plan": 862_400_000},
            "weight_bytes": 813_900_000,
            "peak_bytes": 5 << 30,
        }
    }
}


@pytest.fixture(scope="module")
def tables() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import engine_tables

        yield engine_tables


def test_times_are_of_the_plan_that_ran(tables: Any) -> None:
    lines = tables.tensorrt86_times(TIMES, "2b").splitlines()
    assert lines[2].split(" | ") == [
        *("| side 2", "16", "1.50 ms", "1.25 ms", "3.00 ms", "2.00 ms", "2.50 ms", "", "0.80 ms |")
    ]
    assert lines[3].split(" | ") == ["| side 2", "1", "0.75 ms", "", "", "", "", "", " |"]
    assert "level 0 built in 61 s, 20 MB, four contexts 40 MB apart, 11 MB over shared scratch" in lines[-1]
    assert tables.tensorrt86_times(TIMES, "bundled") == "Not measured yet.\n"


def test_errors_stand_beside_eager_and_the_turned_rotation(tables: Any) -> None:
    row = tables.tensorrt86_errors(TIMES).splitlines()[2]
    assert row == "| 2b | side 2 | 16 | 0.40% | 0.60% | 0.14% | 50.00% |"
    empty: Any = copy.deepcopy(TIMES)
    empty["cases"]["2b"]["plans"] = {"2b:1": []}
    assert tables.tensorrt86_errors(empty) == "Not measured yet.\n"


def test_seconds_are_quoted_of_a_quiet_machine_alone(tables: Any) -> None:
    row = tables.builds_table(BUILDS).splitlines()[2]
    assert row == "| `photo` | 2 / 4 | 64 / 16 | sm80, sm89 | 862 MB | 814 MB | 5.0 GiB | 100 s |"
    for share in ({"others_cpu_share": 0.4}, {}):
        busy: Any = copy.deepcopy(BUILDS)
        del busy["builds"]["photo"]["others_cpu_share"]
        busy["builds"]["photo"] |= share
        assert "100 s" not in tables.builds_table(busy)
        assert "other work ran beside it" in tables.builds_table(busy)


def test_other_work_is_told_from_ones_own(tables: Any) -> None:
    import engine_builds

    begin = engine_builds.machine_seconds(), engine_builds.own_seconds()
    total = 0
    while engine_builds.own_seconds() - begin[1] < 0.3:
        total += 1
    assert engine_builds.machine_seconds() - begin[0] > 0.2


PLACES = {"plan": {"tokens": 0.0005, "planes": [0.0004, 0.0006]}, "eager": {"tokens": 0.0007}}
PLACES |= {"fused": {"tokens": 0.0008}, "rotation turned": {"tokens": 0.41}}
TOGETHER: Any = ABOUT | {
    "level": 0,
    "matrix_peak_tflops": 500.0,
    "cases": {
        "bundled": {
            "build_seconds": 43.4,
            "plan_mb": 42.4,
            "scratch_mb": 128.8,
            "load_seconds": 1.26,
            "gflop": {"side 2 x16": 100.0},
            "errors": {"side 2 x16": PLACES},
            "threads": {"calls": 400, "different": 0},
            "answers": {
                "questions": 60,
                "full": {"changed": 1, "right": {"plan": 58, "eager": 59}},
                "eighth": {"changed": 0, "right": {"plan": 50, "eager": 50}},
            },
            "times": {"side 2 x16": {"plan": 0.75, "eager": 4.0, "compiled": None, "fused": 0.5}},
            "graph_times": {"side 2 x16": {"plan": 0.7, "eager": 0.6}},
            "streams": {"single": {"own scratch, side by side": 1.5}},
        },
        "2b": {},
    },
}


@pytest.fixture(scope="module")
def together(scripts: None) -> Any:
    import tensorrt86_tables

    return tensorrt86_tables


def test_whole_calls_stand_beside_torch_and_the_floor(together: Any) -> None:
    row = together.times_table(TOGETHER, "bundled").splitlines()[2]
    shown = ("0.75 ms", "4.00 ms", "", "0.50 ms", "0.70 ms", "0.60 ms", "", "0.20 ms")
    assert row == f"| side 2 | 16 | {' | '.join(shown)} |"
    assert together.times_table(TOGETHER, "2b") == "Not measured yet.\n"


def test_errors_of_engines_are_those_of_every_output(together: Any) -> None:
    row = together.errors_table(TOGETHER).splitlines()[2]
    assert row == "| bundled | side 2 | 16 | 0.05% | 0.06% | 0.07% | 0.08% | 41.00% |"
    assert together.errors_table(TOGETHER | {"cases": {"2b": {}}}) == "Not measured yet.\n"


def test_use_of_a_build_is_told(together: Any) -> None:
    lines = together.use_table(TOGETHER).splitlines()
    assert lines[0] == "|  | bundled |", "2b was not built"
    assert "| build | 43 s |" in lines
    assert "| two threads: calls with other features than one by one | 0 of 400 |" in lines
    assert (
        "| answers at budget full: other than eager torch's; right, plan and eager | 1 of 60; 58, 59 |"
        in lines
    )
    assert "| the four LODs, single batches: own scratch, side by side | 1.50 ms |" in lines
    assert not any("largest" in line for line in lines)


def test_a_build_is_waited_for_found_again_and_killed_at_the_deadline(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt86_torch

    write = "import pathlib; p = pathlib.Path('{}'); p.mkdir(); (p / 'manifest.json').write_text('')"

    def command(self: Any, level: int) -> list[str]:
        wait = "" if self.name == "2b" else "import time; time.sleep(60); "
        return ["-c", wait + write.format(self.folder)]

    monkeypatch.setattr(tensorrt86_torch.Building, "_command", command)
    options = SimpleNamespace(work=tmp_path, level=0)
    assert tensorrt86_torch.Building("2b", options).wait(time.monotonic() + 20)
    assert tensorrt86_torch.Building("2b", options).wait(time.monotonic()), "it is found again"
    begin = time.monotonic()
    assert not tensorrt86_torch.Building("bundled", options).wait(begin + 0.5)
    assert time.monotonic() - begin < 20, "killed"
