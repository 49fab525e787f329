"""Batch sizes, margins and families of the training recipe."""

from __future__ import annotations

from collections import Counter

import pytest

from arrcoc.demo.training.recipe import Phase, Recipe


def test_dearer_examples_come_in_smaller_batches() -> None:
    recipe, phase = Recipe(), Recipe().phases[-1]
    sizes = [recipe.batch(phase, canvas, "whole", 1) for canvas in (256, 512, 1024, 2048)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert recipe.batch(phase, 1024, "refine", 0) > recipe.batch(phase, 1024, "refine", 1)
    assert recipe.batch(phase, 1024, "glimpse", 0) >= recipe.batch(phase, 1024, "whole", 0)


def test_a_phase_may_fix_its_batch_and_the_scale_multiplies_it() -> None:
    phase = Phase(1.0, {128: 1.0}, {"whole": 1.0}, batch=10)
    assert Recipe().batch(phase, 128, "whole", 0) == 10
    assert Recipe(batch_scale=0.25).batch(phase, 128, "whole", 0) == 2, "rounded down, at least one"
    assert Recipe(batch_scale=0.01).batch(phase, 128, "whole", 0) == 1


def test_a_run_that_begins_late_skips_the_early_phases() -> None:
    recipe = Recipe(steps=100, begin=0.5)
    # 0.5 + 0.5 * 0 / 100 lies beyond the third phase's end at 0.34.
    assert recipe.phase(0) is recipe.phases[-1]
    assert Recipe(steps=100).phase(0) is recipe.phases[0]
    assert Recipe(steps=100).phase(17) is recipe.phases[1]


def test_margins_follow_from_the_seed_and_their_weights() -> None:
    recipe = Recipe(halo=0.8, strides={1: 3.0, 2: 1.0})
    drawn = [recipe.margins(seed) for seed in range(2000)]
    assert drawn == [recipe.margins(seed) for seed in range(2000)]
    halos, strides = Counter(h for h, _ in drawn), Counter(s for _, s in drawn)
    assert halos[1] / 2000 == pytest.approx(0.8, abs=0.04)
    assert strides[1] / 2000 == pytest.approx(0.75, abs=0.04)


def test_families_come_as_often_as_their_weight_says() -> None:
    assert Recipe(families={"read": 3}).often(["read", "count"]) == ["read", "read", "read", "count"]
