"""Pixels, margins, allocations and the evidence loss of training, by hand and against the engine's."""

from __future__ import annotations

import math

import pytest
import torch

from arrcoc.demo.placards import evidence, sample
from arrcoc.demo.training import levels
from arrcoc.demo.training.allocations import draw_allocation
from arrcoc.demo.training.text import Watch, _missed
from arrcoc.image import area_resample


@pytest.mark.parametrize(("q", "p"), [(4, 1), (4, 2), (4, 3), (4, 4), (8, 6), (20, 14)])
def test_levels_equal_the_engines_resampling(q: int, p: int) -> None:
    images = torch.randint(0, 256, (2, 3, 2 * q, 3 * q), dtype=torch.uint8)
    assert torch.equal(levels.level(images, q, p), area_resample(images, q, p))


def test_cut_with_margin_repeats_the_edge() -> None:
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(1, 3, 4, 4).contiguous()
    tiles = levels.cut(image, 2, 1, torch.tensor([[0, 3]]), columns=2)
    # Tile 0 begins at (0, 0): row and column -1 repeat row and column 0; its margin shows the neighbours.
    assert tiles[0, 0].tolist() == [[0, 0, 1, 2], [0, 0, 1, 2], [4, 4, 5, 6], [8, 8, 9, 10]]
    assert tiles[1, 0].tolist() == [[5, 6, 7, 7], [9, 10, 11, 11], [13, 14, 15, 15], [13, 14, 15, 15]]


def test_cut_without_margin_is_a_slice() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    tiles = levels.cut(images, 4, 0, torch.tensor([[1], [2]]), columns=2)
    assert torch.equal(tiles[0], images[0, :, :4, 4:])
    assert torch.equal(tiles[1], images[1, :, 4:, :4])


def test_overview_is_the_mean_of_the_background() -> None:
    background = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    background[..., ::2] = 3  # pairs of 3 and 0: the mean 1.5 rounds to even
    assert levels.overview(background, 1, 32) is background
    assert levels.overview(background, 2, 32).shape == (1, 3, 64, 64)
    assert levels.overview(background, 2, 32).unique().tolist() == [2]
    assert levels.overview(background, 3, 32).shape == (1, 3, 64, 64), "ceil(4 / 3) tokens"


@pytest.mark.parametrize("mode", ["refine", "replace", "crops", "uniform", "high", "glimpse", "whole"])
def test_allocations_have_equal_counts_in_every_row(mode: str) -> None:
    targets = torch.zeros(8, 4, 4, dtype=torch.bool)
    targets[:, 1, 2] = True
    for seed in range(20):
        lod = draw_allocation(targets, mode, torch.Generator().manual_seed(seed))
        counts = torch.stack([(lod == level).sum(1) for level in range(4)])
        assert (counts == counts[:, :1]).all()


def test_targets_mostly_get_the_highest_lod_that_is_given() -> None:
    targets = torch.zeros(400, 8, 8, dtype=torch.bool)
    targets[:, 3, 3] = True
    hits = []
    for seed in range(30):
        lod = draw_allocation(targets, "refine", torch.Generator().manual_seed(seed))
        hits.append((lod[:, 27] == lod.max()).float().mean())
    assert 0.7 < torch.stack(hits).mean() < 0.95, "some rows are misled on purpose"


def test_evidence_loss_by_hand() -> None:
    # Four tokens of 32 px in a row and one of text; one sign of 20 px about x = 48 covers the second only.
    spot = torch.tensor([[[16.0, 16.0, 16.0, 16.0, 0.0], [16.0, 48.0, 80.0, 112.0, 0.0]]])
    reach = torch.tensor([[16.0, 16.0, 16.0, 16.0, -1.0]])
    boxes = torch.zeros(1, 5, 4)
    boxes[0, 0] = torch.tensor([48.0, 16.0, 10.0, 10.0])
    shares = torch.tensor([[0.5, 0.25, 0.15, 0.1, 0.0]])
    watch = Watch(torch.tensor([4]), spot, reach, boxes)
    assert float(_missed(shares, watch)) == pytest.approx(-math.log(0.25), abs=1e-4)
    # A second sign under the fourth token: the mean of both.
    boxes[0, 1] = torch.tensor([112.0, 16.0, 10.0, 10.0])
    wanted = (-math.log(0.25) - math.log(0.1)) / 2
    assert float(_missed(shares, watch)) == pytest.approx(wanted, abs=1e-4)
    # None at all: no loss, and no division by zero.
    assert float(_missed(shares, Watch(watch.last, spot, reach, torch.zeros(1, 5, 4)))) == 0.0


def test_evidence_is_what_the_answer_is_read_off() -> None:
    for index in range(40):
        example = sample(5, index, "train", 1024)
        boxes = evidence(example)
        if example.family == "find":
            assert len(boxes) == 1 < len(example.targets)
        elif example.family == "count":
            assert len(boxes) == int(example.answer)
        elif example.family == "exists":
            assert len(boxes) == (example.answer == "yes")
        elif example.family == "compare":
            assert len(boxes) == 2
        else:
            assert boxes == example.targets
