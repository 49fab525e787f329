"""A run that is stopped and resumed ends where an uninterrupted one does, and what it exports loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arrcoc import Engine
from arrcoc.demo.training import measure
from arrcoc.demo.training.export import export, load_weights
from arrcoc.demo.training.loop import STATE, Run, Trainer
from arrcoc.demo.training.recipe import BankSize, Phase, Recipe
from arrcoc.errors import ModelError

MODES = ("whole", "smaller", "high", "refine", "replace", "uniform", "crops", "glimpse")
RECIPE = Recipe(steps=4, phases=(Phase(1.0, {256: 1.0}, dict.fromkeys(MODES, 1.0), batch=2),))


def run_in(folder: Path, skeleton: Path) -> Run:
    return Run(folder, skeleton, workers=0)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(RECIPE, run_in(tmp_path_factory.mktemp("whole"), tiny_checkpoint))
    assert trainer.fit()
    return trainer


def test_a_resumed_run_equals_an_uninterrupted_one(
    whole: Trainer, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Trainer(RECIPE, replace(run_in(tmp_path, tiny_checkpoint), stop_after=0.0))
    assert not first.fit()
    assert 0 < first.step < RECIPE.steps
    second = Trainer(RECIPE, run_in(tmp_path, tiny_checkpoint))
    assert second.fit()
    assert second.step == RECIPE.steps
    torch.testing.assert_close(second.adam.master, whole.adam.master, rtol=0, atol=1e-6)
    torch.testing.assert_close(second.adam.average, whole.adam.average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_moves_the_weights(mode: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=1, warmup=1, phases=(Phase(1.0, {256: 1.0}, {mode: 1.0}, batch=2),))
    trainer = Trainer(recipe, run_in(tmp_path, tiny_checkpoint))
    before = [parameter.detach().clone() for parameter in trainer.model.model.visual.parameters()]
    assert trainer.fit()
    moved = [
        not torch.equal(a, b) for a, b in zip(before, trainer.model.model.visual.parameters(), strict=True)
    ]
    assert all(moved), "some vision weights got no gradient"


def test_the_state_appears_whole_and_is_read_back(whole: Trainer) -> None:
    state = torch.load(whole.run.folder / STATE, weights_only=True)
    assert state["step"] == RECIPE.steps
    assert not list(whole.run.folder.glob("*.partial"))


def test_what_is_exported_answers(whole: Trainer, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = export(whole.averaged_state(), tiny_checkpoint, tmp_path / "out", {"steps": whole.step})
    assert json.loads((folder / "training.json").read_text()) == {"steps": RECIPE.steps}
    engine = Engine.from_pretrained(folder, "demo", "cpu", max_new_tokens=2)
    stored = engine._qwen.model.lm_head.weight
    torch.testing.assert_close(
        stored, whole.averaged_state()["lm_head.weight"].bfloat16().float(), rtol=0, atol=0
    )
    assert engine.ask(torch.zeros(3, 128, 128, dtype=torch.uint8), "What is it?").new_tokens <= 2


def test_a_run_starts_from_exported_weights(whole: Trainer, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = export(whole.averaged_state(), tiny_checkpoint, tmp_path / "out", {})
    run = replace(run_in(tmp_path / "next", tiny_checkpoint), initial=folder)
    started = Trainer(RECIPE, run)
    fresh = Trainer(RECIPE, replace(run, initial=None))
    wanted = {name: tensor.bfloat16().float() for name, tensor in whole.averaged_state().items()}
    for name, tensor in started.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)
    assert any(not torch.equal(t, wanted[name]) for name, t in fresh.model.state_dict().items())
    # The moving average starts there too, and the optimiser has seen nothing.
    assert torch.equal(started.adam.average, started.adam.master)
    assert not started.adam.optimizer.state
    assert started.step == 0


def test_weights_that_do_not_fit_are_refused(whole: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_weights(whole.model, tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="another model"):
        load_weights(whole.model, tmp_path)


def test_composed_canvases_train(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bank = BankSize(signs=256, strays=4, backgrounds=2, side=256, refresh=1)
    trainer = Trainer(
        replace(RECIPE, steps=2, source="composed", bank=bank), run_in(tmp_path, tiny_checkpoint)
    )
    assert trainer.fit()
    assert trainer.step == 2


def test_accuracy_counts_right_answers(whole: Trainer) -> None:
    found = measure.accuracy(
        whole.loss, whole.encoder, RECIPE, whole.prompts, whole.device, 256, range(1), 3, workers=0
    )
    assert set(found) == set(measure.MODES)
    assert all(0.0 <= share <= 1.0 for by in found.values() for share in by.values())
    assert measure.table(found).count("\n") == len(measure.MODES)


def test_learning_rate_by_hand() -> None:
    recipe = Recipe(steps=300, warmup=100, learning_rate=1.0, final_rate=0.1)
    # Half of the warm-up; its end; half of the cosine: 0.1 + 0.9 * 0.5; the last step.
    assert recipe.rate(49) == pytest.approx(0.5)
    assert recipe.rate(100) == pytest.approx(1.0)
    assert recipe.rate(200) == pytest.approx(0.55)
    assert recipe.rate(300) == pytest.approx(0.1)
