"""Squares cut on the CPU against indexing with clamped places."""

from __future__ import annotations

import pytest
import torch

from arrcoc.host_tiles import squares


@pytest.mark.parametrize("edge", [1, 3, 8, 20])
def test_squares_repeat_the_border(edge: int) -> None:
    images = torch.randint(
        0, 256, (4, 3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    corners = [(0, 0), (-edge + 1, 3), (8, 11), (2, -edge + 1)]
    found = squares(images, corners, edge)
    assert found.shape == (4, 3, edge, edge)
    for square, image, (top, left) in zip(found, images, corners, strict=True):
        rows = torch.arange(top, top + edge).clamp(0, 8)
        cols = torch.arange(left, left + edge).clamp(0, 11)
        assert torch.equal(square, image[:, rows][:, :, cols])


def test_one_image_may_serve_all_and_none_may_be_asked() -> None:
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    found = squares([image, image], [(0, 0), (2, 2)], 2)
    assert torch.equal(found, torch.stack([image[:, :2, :2], image[:, 2:, 2:]]))
    found.zero_()
    assert image.any(), "a copy"
    assert squares([image], [], 2).shape == (0, 3, 2, 2)
