"""The scorers judged, the tensions' worth, the decisions: figures by hand, answers asked once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from arrcoc.config import Config
from arrcoc.errors import ConfigError
from arrcoc.evaluation.methods import Lab
from arrcoc.evaluation.records import Row
from arrcoc.records import Scores

ROOT = Path(__file__).parent.parent
SMALL = ["--canvas", "256", "--device", "cpu", "--count", "2"]


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts find one another through the folder they lie in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import answers
        import decisions
        import judgements
        import relevance
        import summaries
        import tables
        import tensions

        yield SimpleNamespace(
            **{
                m.__name__: m
                for m in (answers, decisions, judgements, relevance, summaries, tables, tensions)
            }
        )


def table(*rows: list[float]) -> Any:
    return np.array(rows, dtype=np.float64)


# Where a map looks.


def test_figures_of_a_map_by_hand(scripts: Any) -> None:
    scores, hit = table([0.9, 0.5], [0.5, 0.1]), np.array([[True, True], [False, False]])
    # Pairs target > other: .9 > .5, .9 > .1, .5 = .5 (half), .5 > .1: 3.5 of 4.
    assert scripts.relevance.auc(scores, hit) == pytest.approx(3.5 / 4)
    assert scripts.relevance.recall_at(scores, hit, 1) == pytest.approx(1 / 2)
    # Of the two tiles at 0.5 one is the second highest, the target with probability 1/2: (1 + 0.5) / 2.
    assert scripts.relevance.recall_at(scores, hit, 2) == pytest.approx(1.5 / 2)
    assert scripts.relevance.recall_at(scores, hit, 9) == 1
    assert scripts.relevance.share_on(scores, hit) == pytest.approx(1.4 / 2.0)


def test_a_flat_map_is_chance(scripts: Any) -> None:
    hit = np.zeros((4, 4), bool)
    hit[0, :2] = True
    for scores in (np.ones((4, 4)), np.zeros((4, 4))):
        found = scripts.relevance.judged(scores, hit)
        assert found["auc"] == 0.5
        assert found["recall_at_4"] == pytest.approx(4 / 16)
        assert found["share"] == pytest.approx(2 / 16)


def test_auc_needs_targets_and_others(scripts: Any) -> None:
    assert scripts.relevance.auc(np.ones((2, 2)), np.ones((2, 2), bool)) is None
    rows = [("a", "read", {"auc": None}), ("a", "find", {"auc": 0.75})]
    found = scripts.relevance.averaged(rows)["a"]
    assert list(found) == ["all", "find", "read"]
    assert found["all"]["images"] == 2
    assert found["all"]["auc"]["mean"] == 0.75  # of the one that has it
    assert found["read"]["auc"] is None


def test_every_layer_is_probed_once(scripts: Any) -> None:
    from arrcoc.attention_probe import probe_layers

    for layers in (1, 4, 7, 28, 36):
        found = list(scripts.relevance.probes(Config(), layers).values())
        assert [probe_layers(depth, layers) for depth in found[:-1]] == [[n] for n in range(layers)]
        assert found[-1] == Config().probe_depth


def test_relevance_result(scripts: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "relevance.json"
    scripts.relevance.main(["--model", str(tiny_checkpoint), *SMALL, "--out", str(out)])
    result = json.loads(out.read_text())
    layers = [f"glimpse, layer {n}" for n in range(1, 5)]
    assert list(result["scorers"]) == [
        *("propositional", "perspectival", *layers, "glimpse", "balanced, glimpse", "chance")
    ]
    assert result["scorers"]["chance"]["all"]["auc"]["mean"] == 0.5
    assert str(tmp_path) not in out.read_text()
    for name in ("relevance_bars.png", "relevance_maps.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 1 << 20
    assert "| chance | 0.500 (0.500 to 0.500) |" in scripts.judgements.relevance_table(result)


# Variants.


def row(label: str, case: str, exact: float | None, family: str = "read", budget: float = 0.25) -> Row:
    given: dict[str, Any] = {"tokens": 10, "milliseconds": 1.0, "answer": "x", "anls": 0.0}
    if exact is None:
        given = dict.fromkeys(given)
    about: dict[str, Any] = {"full_tokens": 64, "question": "q", "answers": ("a",)}
    return Row(id=case, family=family, method=label, budget=budget, exact=exact, **about, **given)


def test_differences_are_paired(scripts: Any) -> None:
    rows = [row("a", "1", 1.0), row("a", "2", 0.0, "find"), row("b", "2", 1.0, "find"), row("b", "1", 1.0)]
    found = {cell["family"]: cell for cell in scripts.summaries.cells(rows, "b", "a")}
    assert found["all"]["exact"]["mean"] == 1.0
    assert found["all"]["over_reference"]["mean"] == 0.5  # 0 on case 1, +1 on case 2
    assert found["find"]["over_reference"]["mean"] == 1.0
    assert found["read"]["over_reference"]["mean"] == 0.0


def test_an_impossible_budget_has_no_figures(scripts: Any) -> None:
    rows = [row("a", "1", None), row("b", "1", 1.0)]
    (impossible, _) = scripts.summaries.cells(rows, "a", "b")
    assert (impossible["exact"], impossible["over_reference"], impossible["tokens"]) == (None, None, None)
    (cell, _) = scripts.summaries.cells(rows, "b", "a")
    assert cell["exact"]["mean"] == 1.0
    assert cell["over_reference"] is None


def test_equal_variants_are_one_configuration(scripts: Any) -> None:
    base, resolve, variant = Config(), scripts.decisions.resolve, scripts.decisions.Variant
    assert resolve(base, variant("x", {"layout": base.layout})).key == "as set"
    one = resolve(base, variant("x", {"gain": 0.0, "order": "tile"}))
    other = resolve(base, variant("y", {"order": "tile", "gain": 0.0, "lateral": base.lateral}))
    assert one.key == other.key == "gain 0.0, order tile"
    refused = resolve(base, variant("z", {"utility_exponent": 2.0}))  # utility per token would rise
    assert refused.config is None
    assert "utility per token" in refused.refused


def test_choices_begin_with_the_preset_and_are_all_usable(scripts: Any) -> None:
    from arrcoc import config as configs

    base = configs.load("demo")
    known = scripts.decisions.choices(base, 7, True)
    assert set(known) == set(scripts.tables.CHOICES)
    for choice in known.values():
        found = [scripts.decisions.resolve(base, variant) for variant in choice.variants]
        assert all(each.config for each in found), (choice.name, [each.refused for each in found])
        assert len({each.key for each in found}) == len(found), choice.name
        assert len({variant.label for variant in choice.variants}) == len(found)
    for name in ("layout", "glimpse", "order", "utility", "sides", "gain", "lateral", "confident", "flat"):
        assert scripts.decisions.resolve(base, known[name].variants[0]).key == "as set", name


def decide(scripts: Any, checkpoint: Path, folder: Path, *more: str) -> Any:
    out = folder / "decisions.json"
    common = ["--model", str(checkpoint), *SMALL, "--out", str(out), "--answers", str(folder / "answers")]
    scripts.decisions.main([*common, "--budgets", "0.5", "--choices", *more])
    return json.loads(out.read_text())


def test_decisions_ask_once_and_go_on(scripts: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = decide(scripts, tiny_checkpoint, tmp_path, "layout")
    log = tmp_path / "answers" / "answers.jsonl"
    kept = log.read_text().splitlines()
    assert len(kept) == 2 * 3  # 2 questions, 3 layouts
    log.write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20])  # killed while it wrote the last one
    second = decide(scripts, tiny_checkpoint, tmp_path, "layout", "order", "halo")
    now = log.read_text().splitlines()
    assert now[:5] == kept[:5]
    # Raster order and no halo are the layout as set, and not asked again.
    assert len(now) == 2 * (3 + 1 + 1)
    assert second["choices"][0] == first["choices"][0]
    page = scripts.judgements.decision_table(second, "layout")
    assert page.splitlines()[2].startswith("| layout refine | 0.5 | ")
    assert scripts.judgements.decision_table(second, "sides") == "Not measured yet.\n"


def test_unknown_choice(scripts: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout, glimpse"):
        decide(scripts, tiny_checkpoint, tmp_path, "layuot")


@pytest.mark.slow
def test_workers_give_the_same_answers(scripts: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    alone = decide(scripts, tiny_checkpoint, tmp_path / "alone", "layout")
    shared = decide(scripts, tiny_checkpoint, tmp_path / "shared", "layout", "--workers", "2")
    assert shared["choices"] == alone["choices"]
    folder = tmp_path / "shared" / "answers"
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "run.json"]


# Tensions.


def test_fixed_tensions_by_hand(scripts: Any) -> None:
    config = Config(lateral=0.0)
    query = torch.tensor([[1.0, 0.2], [0.2, 0.2]])
    blind = torch.full((2, 2), 0.6)
    scores = Scores(blind, blind, query)
    none = scripts.tensions.VARIANTS["none"](scores, config)
    # Equal shares of both, no contrast, nothing between neighbours: (1 + 0.6) / 2 and (0.2 + 0.6) / 2.
    assert none.tolist() == [pytest.approx([0.8, 0.4]), pytest.approx([0.4, 0.4])]
    assert torch.equal(scripts.tensions.VARIANTS["participatory map"](scores, config), query)
    flat = scripts.tensions.VARIANTS["query-free alone"](scores, Config(lateral=0.0, gain=0.0))
    assert torch.allclose(flat, blind)


def test_reference_is_what_the_engine_does(scripts: Any, tiny_checkpoint: Path) -> None:
    from arrcoc.evaluation.datasets import Placards

    lab = Lab.open(tiny_checkpoint, "demo", "cpu", "float32", 4, 0)
    cases = Placards(512, 2, 0)
    for case in (cases[0], cases[1]):
        picture = scripts.answers.picture_of(lab, case)
        seen = scripts.tensions.seen(lab, picture)
        relevance = scripts.tensions.VARIANTS[scripts.tensions.REFERENCE](seen.scores, lab.presets.base)
        assert torch.allclose(relevance, seen.relevance, atol=1e-6)
        answer = lab.engine.ask(picture.pixels, case.question, 0.5, max_new_tokens=4)
        found = scripts.tensions.asking(lab)(case)(scripts.tensions.REFERENCE, 0.5)
        assert answer.encoding is not None
        assert (found.answer, found.tokens) == (answer.text, answer.encoding.n_tokens)


def test_tensions_result(scripts: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tensions.json"
    more = ["--budgets", "0.5", "--out", str(out), "--answers", str(tmp_path / "answers")]
    scripts.tensions.main(["--model", str(tiny_checkpoint), *SMALL, *more])
    result = json.loads(out.read_text())
    assert [part["label"] for part in result["ablation"]] == list(scripts.tensions.VARIANTS)
    assert sum(len(rows) for rows in result["values"].values()) == result["tensions"]["all"]["questions"] == 2
    assert (tmp_path / "tensions_families.png").stat().st_size > 10_000
    assert "all (2)" in scripts.judgements.tension_table(result)
    assert "| participatory map | 0.5 |" in scripts.judgements.ablation_table(result)


def test_spread_by_hand(scripts: Any) -> None:
    found = scripts.tensions.described({"read": [[1.0, 0.0, 0.5]], "find": [[0.0, 0.0, -0.5]]})
    assert found["all"]["compress_particularize"]["mean"] == 0.5
    assert found["all"]["compress_particularize"]["deviation"] == pytest.approx(0.70711)  # sqrt(1/2)
    assert found["read"]["diversify_focus"]["mean"] == 0.5
    assert found["read"]["diversify_focus"]["deviation"] is None


def test_tables_wait_for_their_results(scripts: Any, tmp_path: Path) -> None:
    page = "<!-- results:tensions -->\nold\n<!-- /results:tensions -->\n"
    assert "Not measured yet." in scripts.tables.regenerated(page, tmp_path)
