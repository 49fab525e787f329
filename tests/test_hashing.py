"""Content hashes of tiles: the formula by hand, what they tell apart, and equality on CUDA."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arrcoc import hashing
from arrcoc.hashing import LANES, hash_tiles, tile_hashes
from arrcoc.records import Grid

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def sums_by_hand(rows: list[bytes], level: int) -> list[bytes]:
    """Each row's 24 sums in Python's unbounded integers, as little-endian 32-bit words."""
    made = []
    for row in rows:
        factors = hashing._factors(level, len(row) + -len(row) % 8, CPU).tolist()
        signed = [byte - 256 if byte > 127 else byte for byte in row]
        sums = [sum(f * b for f, b in zip(lane, signed, strict=False)) for lane in factors]
        made.append(b"".join((total % 2**32).to_bytes(4, "little") for total in sums))
    return made


def hash_by_hand(tile: Tensor) -> list[int]:
    edge = tile.shape[-1]
    rows = sums_by_hand([row.numpy().tobytes() for row in tile.reshape(-1, edge)], 0)
    joined = math.gcd(len(rows), 16)
    groups = sums_by_hand([b"".join(rows[at : at + joined]) for at in range(0, len(rows), joined)], 1)
    (whole,) = sums_by_hand([b"".join(groups)], 2)
    words = [edge, *np.frombuffer(whole, "<u4").tolist()]
    multipliers = hashing._multipliers(CPU).numpy().view(np.uint64).tolist()
    totals = (m[0] + sum(a * b for a, b in zip(m[1:], words, strict=True)) for m in multipliers)
    return [total % 2**64 >> 32 for total in totals]


@pytest.mark.parametrize("tile", [3, 4, 28, 64])
def test_hash_formula(tile: int) -> None:
    pixels = noise(3, tile, 2 * tile)
    hashes = tile_hashes(pixels, Grid(1, 2, tile))
    assert hashes.dtype == torch.int64
    assert hashes.tolist() == [hash_by_hand(pixels[:, :, :tile]), hash_by_hand(pixels[:, :, tile:])]


def test_extreme_bytes_neither_saturate_nor_wrap_too_early() -> None:
    for value in (127, 128, 255):
        tile = torch.full((3, 256, 256), value, dtype=torch.uint8)
        assert tile_hashes(tile, Grid(1, 1, 256)).tolist() == [hash_by_hand(tile)]


def test_factors_are_uniform_independent_and_seven_bits() -> None:
    rows = torch.cat([hashing._factors(level, 4096, CPU) for level in range(3)])
    assert rows.shape == (3 * LANES, 4096)
    assert (rows.min(), rows.max()) == (-64, 63)
    counts = torch.bincount(rows.flatten().long() + 64, minlength=128).double()
    assert (counts / counts.mean() - 1).abs().max() < 0.12  # 2304 of each on average: 0.02 is one deviation
    correlation = torch.corrcoef(rows.double()).fill_diagonal_(0)
    assert correlation.abs().max() < 0.1  # 1 / sqrt(4096) = 0.016 is one deviation
    assert torch.equal(hashing._factors(1, 64, CPU), hashing._factors(1, 4096, CPU)[:, :64])


@pytest.mark.parametrize("tile", [4, 28])
def test_tiles_cut_before_hash_the_same(tile: int) -> None:
    pixels, grid = noise(3, 2 * tile, 3 * tile), Grid(2, 3, tile)
    tiles = pixels.view(3, 2, tile, 3, tile).permute(1, 3, 0, 2, 4).reshape(6, 3, tile, tile)
    assert torch.equal(hash_tiles(tiles), tile_hashes(pixels, grid))
    assert hash_tiles(tiles[:0]).shape == (0, 4)


def test_hash_is_fixed_for_ever() -> None:
    # Disk caches outlive a process: the streams behind the factors must not change.
    black, grey = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 99, dtype=torch.uint8)
    assert tile_hashes(black, Grid(1, 1, 4)).tolist() == [[3739902141, 1225893404, 3634707710, 354086128]]
    assert tile_hashes(grey, Grid(1, 1, 4)).tolist() == [[223040311, 3211711709, 57793641, 1101419269]]


def test_equal_tiles_hash_equal_anywhere() -> None:
    tile, other = noise(3, 32, 32), noise(3, 32, 32, seed=1)
    lone = tile_hashes(tile, Grid(1, 1, 32))[0]
    pixels = torch.cat([torch.cat([other, tile], 2), torch.cat([tile, other], 2)], 1)
    hashes = tile_hashes(pixels, Grid(2, 2, 32))
    assert torch.equal(hashes[1], lone)
    assert torch.equal(hashes[2], lone)
    assert torch.equal(hashes[0], hashes[3])
    assert not (hashes[0] == lone).any()


@given(st.integers(0, 3 * 16 * 16 - 1), st.integers(1, 255), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_hash_sees_every_byte(at: int, delta: int, seed: int) -> None:
    pixels = noise(3, 16, 16, seed=seed)
    changed = pixels.clone()
    changed.view(-1)[at] += delta
    grid = Grid(1, 1, 16)
    before, after = tile_hashes(pixels, grid), tile_hashes(changed, grid)
    # 32 bits each: all four words nearly always change, and none is left idle.
    assert (before != after).sum() >= 3


def test_hash_sees_order() -> None:
    pixels = noise(3, 16, 16)
    for first, second in [((0, 0), (9, 5)), ((0, 3), (0, 4)), ((1, 3), (2, 3))]:
        swapped = pixels.clone()
        one, other = ((slice(None), *place) for place in (first, second))
        swapped[one], swapped[other] = pixels[other], pixels[one]
        assert not (tile_hashes(pixels, Grid(1, 1, 16)) == tile_hashes(swapped, Grid(1, 1, 16))).any()
    mirrored = pixels.flip(0)  # channels, which share the first level's factors
    assert not (tile_hashes(pixels, Grid(1, 1, 16)) == tile_hashes(mirrored, Grid(1, 1, 16))).any()


def test_hash_tells_tile_sizes_apart() -> None:
    hashes = [tile_hashes(torch.zeros(3, t, t, dtype=torch.uint8), Grid(1, 1, t))[0] for t in (4, 8, 16)]
    assert len({tuple(h.tolist()) for h in hashes}) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("tile", "rows", "cols"), [(3, 1, 1), (28, 1, 2), (32, 4, 5), (256, 2, 3)])
def test_cuda_hashes_the_same(tile: int, rows: int, cols: int) -> None:
    pixels, grid = noise(3, rows * tile, cols * tile), Grid(rows, cols, tile)
    assert torch.equal(tile_hashes(pixels.cuda(), grid).cpu(), tile_hashes(pixels, grid))
