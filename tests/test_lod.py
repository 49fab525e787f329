"""The static tower and the torch engine: shapes, order of patches, batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arrcoc import Engine
from arrcoc.lod import TorchLodEngine
from arrcoc.lod.bucketed import batches, inner
from arrcoc.lod.tower import geometry, merge_order, rotate
from arrcoc.vision import axial_rotary, interpolated_positions, patchify

BUCKETS = st.lists(st.integers(1, 64), min_size=1, max_size=6, unique=True).map(sorted)


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")._qwen


@given(st.integers(0, 300), BUCKETS)
def test_batches_cover_everything_once_and_fit_their_bucket(count, buckets):
    cut = list(batches(count, buckets))
    assert [i for start, stop, _ in cut for i in range(start, stop)] == list(range(count))
    assert all(size in buckets and 0 < stop - start <= size for start, stop, size in cut)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(0, 1, 1)]),
        (3, [(0, 3, 4)]),  # 3 of 4 are three quarters: padded
        (5, [(0, 4, 4), (4, 5, 1)]),  # 5 of 8 are too few
        (6, [(0, 6, 8)]),
        (20, [(0, 8, 8), (8, 16, 8), (16, 20, 4)]),
    ],
)
def test_batches(count, expected):
    assert list(batches(count, (1, 2, 4, 8))) == expected


def test_merge_order_keeps_a_tokens_patches_together():
    # 4 x 4 patches, 2 x 2 to a token: token 0 has patches 0 1 4 5, token 1 has 2 3 6 7.
    grid = torch.arange(16).view(4, 4)
    assert merge_order(grid, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_rotation_by_a_right_angle():
    # Halves (1, 2) and (3, 4): x cos - y sin = -3, -4; y cos + x sin = 1, 2.
    vector = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert rotate(vector, torch.zeros(1, 4), torch.ones(1, 4)).tolist() == [[[[-3, -4, 1, 2]]]]


def test_rotary_angles():
    # head_dim 8: two frequencies, 1 and 10000**-0.5 = 0.01, first for the row, then for the column.
    cos, sin = axial_rotary(torch.tensor([2]), torch.tensor([3]), 8)
    angle = torch.tensor([[2.0, 0.02, 3.0, 0.03] * 2])
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())


def test_positions_are_interpolated_with_aligned_corners():
    # A 3 x 3 table of 10 * row + col; two rows reach the corners 0 and 2, three columns 0, 1, 2.
    table = torch.tensor([[10.0 * r + c] for r in range(3) for c in range(3)])
    assert interpolated_positions(table, 2, 3)[..., 0].tolist() == [[0, 1, 2], [20, 21, 22]]
    # Four rows stand at 0, 2/3, 4/3, 2 of the table.
    rows = interpolated_positions(table, 4, 1)[:, 0, 0]
    torch.testing.assert_close(rows, torch.tensor([0, 20 / 3, 40 / 3, 20]))


def test_patchify_equals_the_stock_processor(qwen, photo):
    from parity import stock_inputs, turn

    from arrcoc import image

    picture = photo.crop((10, 20, 10 + 96, 20 + 64))
    pixels = image.decode(picture, 10**8)[None]
    ours = patchify(pixels, qwen.vision, torch.float32)[0]
    torch.testing.assert_close(ours, stock_inputs(qwen.model, turn("?", picture))["pixel_values"])


def test_patchify_wants_whole_tokens(qwen):
    with pytest.raises(AssertionError):
        patchify(torch.zeros(1, 3, 32, 33, dtype=torch.uint8), qwen.vision, torch.float32)


def test_geometry_of_an_oblong_image(qwen):
    made = geometry(qwen.vision, 2, 3)
    assert made.positions.shape == (24, qwen.vision.hidden)
    assert made.cos.shape == made.sin.shape == (24, qwen.vision.head_dim)
    # Patch 1 stands one column to the right of patch 0, patch 2 one row below.
    half = qwen.vision.head_dim // 4
    assert made.sin[0].abs().max() == 0
    torch.testing.assert_close(made.sin[1, half], torch.tensor(1.0).sin())
    torch.testing.assert_close(made.sin[2, 0], torch.tensor(1.0).sin())
    assert made.sin[1, 0] == made.sin[2, half] == 0


@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_engine_gives_every_tile_its_features(count, qwen):
    engine = TorchLodEngine(qwen, 2, (1, 2, 4))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    features = engine.encode(pixels)
    planes = len(qwen.vision.deepstack)
    assert features.tokens.shape == (count, 4, qwen.width)
    assert features.deepstack.shape == (planes, count, 4, qwen.width)
    for i in range(count):
        alone = engine.encode(pixels[i : i + 1])
        torch.testing.assert_close(features.tokens[i], alone.tokens[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.deepstack[:, i], alone.deepstack[:, 0], atol=1e-4, rtol=1e-4)


def test_inner_tokens():
    # 4 x 4 tokens numbered in raster order, a margin of one: 5 6 9 10.
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert inner(tokens, 2, 1)[0, :, 0].tolist() == [5, 6, 9, 10]
    assert inner(torch.stack([tokens, -tokens]), 2, 1)[1, 0, :, 0].tolist() == [-5, -6, -9, -10]
    assert inner(tokens, 4, 0) is tokens


@pytest.mark.parametrize(("side", "halo"), [(1, 1), (2, 1), (1, 2)])
def test_an_engine_with_a_halo_drops_the_margin_of_a_larger_one(side, halo, qwen):
    edge = side + 2 * halo
    pixels = torch.randint(0, 256, (3, 3, edge * 32, edge * 32), dtype=torch.uint8)
    engine = TorchLodEngine(qwen, side, (1, 2, 4), halo)
    assert (engine.side, engine.halo) == (side, halo)
    found, whole = engine.encode(pixels), TorchLodEngine(qwen, edge, (1, 2, 4)).encode(pixels)
    assert torch.equal(found.tokens, inner(whole.tokens, side, halo))
    assert torch.equal(found.deepstack, inner(whole.deepstack, side, halo))


def test_fingerprints_tell_sides_halos_weights_and_normalisation_apart(qwen):
    engines = [TorchLodEngine(qwen, side, (1,), halo) for side, halo in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert engines[0].fingerprint == engines[1].fingerprint
    assert len({engine.fingerprint for engine in engines}) == 3
    assert engines[0].backend == "torch eager float32"
    assert dataclasses.is_dataclass(qwen.vision)
