"""The benchmark's JSON is complete and consistent, and tables of README and docs say what results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def common(scripts: None) -> ModuleType:
    import common

    return common


@pytest.fixture(scope="module")
def tables(scripts: None) -> ModuleType:
    import tables

    return tables


@pytest.fixture(scope="module")
def result(scripts: None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import stages

    out = tmp_path_factory.mktemp("results") / "stages.json"
    stages.main(["--quick", "--model", str(tiny_checkpoint), "--device", "cpu", "--out", str(out)])
    made: dict[str, Any] = json.loads(out.read_text())
    return made


def test_result_says_how_it_was_made(result: dict[str, Any]) -> None:
    assert result["command"].startswith("python benchmarks/stages.py --quick")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "transformers"} <= set(result["versions"])
    assert result["device"].startswith("cpu")
    assert (result["dtype"], result["repeats"]) == ("float32", 1)
    assert {"commit", "uncommitted_changes"} <= set(result)


def test_tokens_and_stages(result: dict[str, Any]) -> None:
    # 256 px are 2 x 2 tiles of 128 px: 8 * 8 = 64 tokens of 32 px, half of them are 32.
    (case,) = result["cases"]
    assert case["stock"]["tokens"] == 64
    assert 4 < case["arrcoc"]["tokens"] <= 32
    assert case["stock"]["new_tokens"] == max(1, case["arrcoc"]["new_tokens"])
    assert list(case["stock"]["stages_ms"]) == ["preprocess", "vision", "prefill", "generate"]
    assert list(case["arrcoc"]["stages_ms"])[-2:] == ["prefill", "generate"]
    for name in ("stock", "arrcoc", "arrcoc_next_question"):
        run = case[name]
        # With one repeat the medians are that run: its stages fit into its wall time.
        assert run["wall_ms_runs"] == [run["wall_ms"]]
        assert 0 < sum(run["stages_ms"].values()) <= run["wall_ms"] + 0.1
        assert run["first_token_ms"] == pytest.approx(run["wall_ms"] - run["stages_ms"]["generate"], abs=0.01)


def test_ratios_are_stock_over_arrcoc(result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    for name, ratio in case["stock_over"].items():
        assert ratio["tokens"] == pytest.approx(case["stock"]["tokens"] / case[name]["tokens"], abs=1e-3)
        assert ratio["wall"] == pytest.approx(
            case["stock"]["wall_ms"] / case[name]["wall_ms"], rel=0.01, abs=1e-3
        )


def test_every_first_question_finds_an_empty_cache(result: dict[str, Any]) -> None:
    """Although the warm-up has filled it; the next question finds what the first one left."""
    (case,) = result["cases"]
    assert case["arrcoc"]["tiles_from_cache"] == 0
    assert case["arrcoc_next_question"]["tiles_from_cache"] > 0


def test_medians_by_hand(common: ModuleType) -> None:
    runs = [{"a": 1.0, "b": 5.0}, {"a": 9.0}, {"a": 2.0, "b": 7.0}]
    assert common.medians(runs) == {"a": 2.0, "b": 5.0}  # 1 2 9, and 0 5 7


def test_peak_memory_sees_an_allocation(common: ModuleType) -> None:
    with common.measured(torch.device("cpu")) as usage:
        torch.ones(32, 1024, 1024).sum()  # 128 MiB of fp32
    if usage.peak_bytes is None:
        pytest.skip("this system cannot reset the peak of resident memory")
    assert 100 << 20 < usage.peak_bytes < 400 << 20


def test_result_is_written_whole_or_not_at_all(common: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "old.json"
    target.write_text("{}")
    with pytest.raises(TypeError):
        common.write_result(target, {"bad": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert target.read_text() == "{}"


def test_outside_a_checkout_there_is_no_commit(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("ARRCOC_COMMIT", raising=False)
    assert common.revision() == (None, None)
    monkeypatch.setenv("ARRCOC_COMMIT", "abc")
    assert common.revision() == ("abc", False)


def test_the_command_names_no_folder_of_the_machine(common: ModuleType) -> None:
    told = common.facts("benchmarks/stages.py", ["--out", "/somewhere/else/x.json"], torch.device("cpu"))
    assert told["command"] == "python benchmarks/stages.py --out x.json"


def test_table_holds_the_figures_of_the_result(tables: ModuleType, result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    ratio = case["stock_over"]["arrcoc"]
    row = tables.ratios(result).splitlines()[2]
    assert row.startswith(
        f"| 256 x 256 | 0.5 | 64 | {case['arrcoc']['tokens']} | {ratio['first_token']:.2f} x |"
    )
    assert result["command"] in tables.ratios(result)


def test_table_shows_how_far_runs_lay_apart(tables: ModuleType, result: dict[str, Any]) -> None:
    noisy = json.loads(json.dumps(result))
    noisy["cases"][0]["stock"]["wall_ms_runs"] = [300.0, 200.0, 700.0]  # 700 / 200
    assert "at most 3.5 x" in tables.ratios(noisy)
    assert "at most 1.0 x" in tables.ratios(result)


def test_shares_add_up(tables: ModuleType, result: dict[str, Any]) -> None:
    row = tables.shares(result).splitlines()[2]
    assert sum(int(part) for part in re.findall(r"(\d+)%", row)) == pytest.approx(100, abs=4)  # 8 roundings


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/architecture.md",
        "docs/decisions.md",
        "docs/engines.md",
        "docs/relevance.md",
        "docs/speed.md",
    ],
)
def test_tables_on_pages_are_what_the_results_say(tables: ModuleType, name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert tables.regenerated(page) == page, "run: python benchmarks/tables.py"


def test_pages_hold_marked_tables(tables: ModuleType) -> None:
    """So that the test above compares something, and a changed figure or a misspelt name is seen."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- ((?:results|configs):\S+) -->", readme) == [
        "results:accuracy",
        "results:accuracy-times",
        "results:accuracy-families",
        "results:accuracy-pictures",
        "configs:presets",
        "results:ttft-8b",
        "results:lod-engines",
        "results:stages",
    ]
    figure = re.search(r"\d+\.\d\d x", readme)
    assert figure is not None
    changed = readme.replace(figure[0], "99.99 x", 1)
    assert tables.regenerated(changed) == readme
    with pytest.raises(KeyError):
        tables.regenerated("<!-- results:stagse -->\n<!-- /results:stagse -->")


def test_results_name_no_folder_of_a_machine() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")), path.name
