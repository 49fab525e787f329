"""Grid, frame and pyramid slices."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arrcoc.config import Config, build
from arrcoc.image import (
    area_resample,
    choose_grid,
    frame,
    hash_tiles,
    overview_pixels,
    tile_pixels,
)
from arrcoc.records import Frame, Grid

CPU = torch.device("cpu")
CONFIG = build({"sides": (1, 2, 3, 4), "max_tiles": 16})
TOKEN_PX = 8  # tiles of 32 px, background of 8 px

sizes = st.integers(1, 6000)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def make_frame(height: int, width: int, config: Config = CONFIG) -> Frame:
    return frame(noise(3, height, width), config, TOKEN_PX, CPU)


# Cost of a grid as documented, written a second time, without numpy and without ties.
def cost(height: int, width: int, grid: Grid, limit: float) -> float:
    sy, sx = grid.height / height, grid.width / width
    change = max(sy / sx, sx / sy)
    if change <= 1 + limit:
        return abs(math.log(sy * sx)) + math.log(change)
    scale = min(sy, sx)
    return abs(math.log(scale * scale)) + math.log(sy * sx / (scale * scale))


@pytest.mark.parametrize(
    ("size", "tile", "max_tiles", "grid", "content"),
    [
        # Smaller than a tile: one tile. 40/64 is enlarged by 1.6 on both axes.
        ((40, 40), 64, 16, (1, 1), (64, 64)),
        ((1, 1), 64, 16, (1, 1), (64, 64)),
        # 3 x 4 tiles are there, and allowed: taken as they are.
        ((192, 256), 64, 12, (3, 4), (192, 256)),
        # The same image under 4 tiles. 2 x 2 would stretch (sy 2/3, sx 1/2: 33 %), so it is padded: scale
        # 1/2, area 1/4, content 96 x 128, cost ln 4 + ln 4/3 = 1.67; 1 x 2 has sy 1/3, scale 1/3, cost
        # ln 9 + ln 1.5 = 2.60. So 2 x 2.
        ((192, 256), 64, 4, (2, 2), (96, 128)),
        # 1080 x 1920 in 256-px tiles: 4 x 7 has sy 0.948, sx 0.933: stretched by 1.6 %, cost 0.138;
        # 4 x 8 would pad (12.5 %): scale 0.948, cost 0.107 + 0.118 = 0.224.
        ((1080, 1920), 256, 64, (4, 7), (1024, 1792)),
        # A long strip: 50 px are 0.78 of a tile; 1 x 10 stretches by 64/50 = 28 %: padded at scale 1.
        ((50, 640), 64, 16, (1, 10), (50, 640)),
        # 10 tiles of length under max_tiles 4: scale 256/640 = 0.4 gives 50 * 0.4 = 20 px of height.
        ((50, 640), 64, 4, (1, 4), (20, 256)),
    ],
)
def test_grid_examples(
    size: tuple[int, int], tile: int, max_tiles: int, grid: tuple[int, int], content: tuple[int, int]
) -> None:
    assert choose_grid(*size, tile, max_tiles, 0.1) == (Grid(*grid, tile), content)
    swapped = choose_grid(*size[::-1], tile, max_tiles, 0.1)
    assert swapped == (Grid(*grid[::-1], tile), content[::-1])


@given(
    sizes, sizes, st.sampled_from([32, 64, 256, 640]), st.integers(1, 300), st.sampled_from([0.01, 0.1, 0.3])
)
@settings(max_examples=150, deadline=None)
def test_grid_bounds(height: int, width: int, tile: int, max_tiles: int, limit: float) -> None:
    grid, (h, w) = choose_grid(height, width, tile, max_tiles, limit)
    assert 1 <= grid.count <= max_tiles
    assert 1 <= h <= grid.height
    assert 1 <= w <= grid.width
    assert h == grid.height or w == grid.width
    sy, sx = h / height, w / width
    if (h, w) == (grid.height, grid.width) and max(sy / sx, sx / sy) - 1 <= limit * (1 + 1e-9):
        return
    # Padded: one scale for both axes; the shorter side is within half a pixel of it, and at least 1.
    scale = min(grid.height / height, grid.width / width)
    assert abs(h - height * scale) <= 0.5 + 1e-6 or h == 1
    assert abs(w - width * scale) <= 0.5 + 1e-6 or w == 1
    short = min(h, w)
    if min(height, width) * scale >= 0.5:
        assert max(sy / sx, sx / sy) - 1 <= 1 / (2 * short - 1) + 1e-9


@given(sizes, sizes, st.sampled_from([64, 256]), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_grid_is_the_cheapest(height: int, width: int, tile: int, max_tiles: int) -> None:
    chosen, _ = choose_grid(height, width, tile, max_tiles, 0.1)
    every = [Grid(r, c, tile) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    least = min(cost(height, width, grid, 0.1) for grid in every)
    assert cost(height, width, chosen, 0.1) <= least + 1e-6


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([32, 224, 640]))
@settings(max_examples=60, deadline=None)
def test_whole_tiles_are_kept(rows: int, cols: int, tile: int) -> None:
    found = choose_grid(rows * tile, cols * tile, tile, rows * cols, 0.1)
    assert found == (Grid(rows, cols, tile), (rows * tile, cols * tile))


def test_grid_is_fast() -> None:
    choose_grid(3000, 4000, 64, 4096, 0.1)
    start = time.perf_counter()
    for height in range(3000, 3010):
        choose_grid(height, 4000, 64, 4096, 0.1)
    assert time.perf_counter() - start < 0.5


def test_frame_of_whole_tiles_is_the_image() -> None:
    pixels = noise(3, 64, 96)
    made = frame(pixels, CONFIG, TOKEN_PX, CPU)
    assert made.grid == Grid(2, 3, 32)
    assert torch.equal(made.pixels, pixels)
    assert (made.source, made.content, made.distortion, made.scale) == ((64, 96), (64, 96), 0.0, 1.0)
    assert made.background.shape == (3, 16, 24)
    assert made.hashes.shape == (6, 4)


def test_frame_reports_its_distortion() -> None:
    # 60 x 96 -> 64 x 96: sy = 16/15, sx = 1; distortion 1/15, scale sqrt(16/15).
    made = make_frame(60, 96)
    assert made.content == (64, 96)
    assert made.distortion == pytest.approx(1 / 15)
    assert made.scale == pytest.approx(math.sqrt(16 / 15))


def test_frame_pads_with_the_edge() -> None:
    # 20 x 96 is 0.625 tiles high: 1 x 3 tiles, unscaled, 12 rows of padding.
    pixels = noise(3, 20, 96)
    made = frame(pixels, CONFIG, TOKEN_PX, CPU)
    assert (made.grid, made.content, made.distortion) == (Grid(1, 3, 32), (20, 96), 0.0)
    assert torch.equal(made.pixels[:, :20], pixels)
    assert torch.equal(made.pixels[:, 20:], pixels[:, 19:20].expand(3, 12, 96))
    turned = frame(pixels.transpose(1, 2), CONFIG, TOKEN_PX, CPU)
    assert torch.equal(turned.pixels, made.pixels.transpose(1, 2))


def test_resize_keeps_flat_colours_and_clamps() -> None:
    flat = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None].expand(3, 70, 50).contiguous()
    made = frame(flat, CONFIG, TOKEN_PX, CPU)
    assert torch.equal(made.pixels, flat[:, :1, :1].expand_as(made.pixels))
    # Bicubic overshoots at a step: without the clamp 255 would wrap round to a small number.
    step = torch.zeros(3, 40, 40, dtype=torch.uint8)
    step[:, :, 20:] = 255
    made = frame(step, CONFIG, TOKEN_PX, CPU)
    assert made.content == (32, 32)
    assert made.pixels[:, :, :14].max() <= 60
    assert made.pixels[:, :, 18:].min() >= 195


def test_resize_is_antialiased() -> None:
    # Two white columns in four, at a quarter of the size: grey. Plain bicubic would look at the two
    # white columns around each new pixel's centre almost alone.
    stripes = torch.zeros(3, 512, 512, dtype=torch.uint8)
    stripes[:, :, 1::4] = 255
    stripes[:, :, 2::4] = 255
    made = frame(stripes, CONFIG, TOKEN_PX, CPU)
    assert made.content == (128, 128)
    inner = made.pixels[:, 8:-8, 8:-8].float()
    assert inner.std() < 4
    assert inner.mean() == pytest.approx(127.5, abs=3)


@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000), (1500, 1500)])
def test_steep_reduction(shape: tuple[int, int]) -> None:
    # A ramp along the longer axis stays a ramp: 3000 px to 32 px is 94:1, more than CUDA's filter can do,
    # and 40 px beside them become one, which torch's filter on the CPU gets wrong for a single column.
    axis = 1 if shape[0] >= shape[1] else 2
    ramp = torch.linspace(0, 255, max(shape)).round().to(torch.uint8)
    pixels = (ramp[:, None] if axis == 1 else ramp[None, :]).expand(3, *shape).contiguous()
    made = frame(pixels, build({"sides": (1, 2, 3, 4), "max_tiles": 1}), TOKEN_PX, CPU)
    assert made.content[axis - 1] == 32
    line = made.pixels[0].select(2 - axis, 0).float()
    expected = (torch.arange(32) + 0.5) / 32 * 255
    assert (line - expected)[2:-2].abs().max() <= 1.5


@pytest.mark.parametrize("side_px", [8, 16, 24, 32])
def test_tiles_are_slices_of_the_level(side_px: int) -> None:
    made = make_frame(64, 96)
    level = area_resample(made.pixels, 32, side_px)
    index = torch.tensor([4, 0, 5, 4])
    tiles = tile_pixels(made, side_px, index)
    assert tiles.shape == (4, 3, side_px, side_px)
    for tile, at in zip(tiles, index.tolist(), strict=True):
        row, col = divmod(at, 3)
        expected = level[:, row * side_px : (row + 1) * side_px, col * side_px : (col + 1) * side_px]
        assert torch.equal(tile, expected)


def test_background_is_the_lowest_level() -> None:
    made = make_frame(64, 96)
    tiles = tile_pixels(made, 8, torch.arange(6))
    assert torch.equal(made.background, tiles.view(2, 3, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 16, 24))


@pytest.mark.parametrize("side_px", [8, 16, 24, 32])
@pytest.mark.parametrize("margin", [1, 8, 20, 32])
def test_tiles_with_a_margin_are_slices_of_the_level_with_its_edge_repeated(
    side_px: int, margin: int
) -> None:
    made = make_frame(64, 96)
    level = area_resample(made.pixels, 32, side_px)
    padded = torch.nn.functional.pad(level[None].float(), [margin] * 4, mode="replicate")[0].to(torch.uint8)
    index, edge = torch.tensor([4, 0, 5, 2, 4]), side_px + 2 * margin
    tiles = tile_pixels(made, side_px, index, margin)
    assert tiles.shape == (5, 3, edge, edge)
    for tile, at in zip(tiles, index.tolist(), strict=True):
        top, left = (place * side_px for place in divmod(at, 3))
        assert torch.equal(tile, padded[:, top : top + edge, left : left + edge])


def test_a_frame_with_a_halo_has_no_hashes_of_bare_tiles() -> None:
    config = CONFIG.updated({"halo": 1})
    made = frame(noise(3, 128, 128), config, TOKEN_PX, CPU)
    assert made.hashes.shape == (0, 4)
    assert made.hashes.dtype == torch.int64


def background(height: int, width: int) -> Frame:
    """A frame of which only the background is looked at."""
    grid = Grid(1, 1, 32)
    empty = torch.empty(0)
    return Frame(empty, noise(3, height, width), grid, empty, (1, 1), (1, 1), 0.0, 1.0)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (8, 4), (8, 12)])
def test_an_overview_that_divides_is_a_mean_over_blocks(height: int, width: int) -> None:
    made = background(8, 12)
    found = overview_pixels(made, height, width)
    blocks = made.background.double().view(3, height, 8 // height, width, 12 // width)
    assert found.dtype == torch.uint8
    assert torch.equal(found, blocks.mean((2, 4)).round().to(torch.uint8))  # halves to even, as torch rounds


def triangle(old: int, new: int) -> Tensor:
    """Antialiased bilinear weights [new, old]: a triangle as wide as two pixels of the result, normalised."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    weights = (1 - ((torch.arange(old) + 0.5 - centres) / scale).abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (96, 32), (160, 64)])
def test_an_overview_that_does_not_divide_is_filtered(height: int, width: int) -> None:
    made = background(160, 96)
    expected = triangle(160, height) @ made.background.double() @ triangle(96, width).T
    found = overview_pixels(made, height, width)
    assert found.shape == (3, height, width)
    assert (found.double() - expected).abs().max() <= 0.501  # rounded


def test_no_tiles_asked() -> None:
    tiles = tile_pixels(make_frame(64, 96), 8, torch.empty(0, dtype=torch.int64))
    assert tiles.shape == (0, 3, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees() -> None:
    cuda = torch.device("cuda")
    pixels = noise(3, 128, 192)
    config = build({"sides": (1, 2, 3, 4), "max_tiles": 64})
    here, there = frame(pixels, config, TOKEN_PX, CPU), frame(pixels, config, TOKEN_PX, cuda)
    assert torch.equal(here.hashes, there.hashes.cpu())
    assert torch.equal(here.background, there.background.cpu())
    for side_px in (8, 16, 24, 32):
        index = torch.tensor([7, 1])
        assert torch.equal(tile_pixels(here, side_px, index), tile_pixels(there, side_px, index).cpu())
    margined = tile_pixels(here, 24, torch.tensor([1, 2]), 32)
    assert torch.equal(margined, tile_pixels(there, 24, torch.tensor([1, 2]), 32).cpu())
    assert torch.equal(hash_tiles(margined), hash_tiles(margined.to(cuda)).cpu())
    steep = build({"sides": (1, 2, 3, 4), "max_tiles": 1})
    assert frame(noise(3, 3000, 20), steep, TOKEN_PX, cuda).content == (32, 1)
    # Bicubic sums may be taken in another order there: at most one level apart.
    small, large = (
        frame(noise(3, 400, 600), CONFIG, TOKEN_PX, CPU),
        frame(noise(3, 400, 600), CONFIG, TOKEN_PX, cuda),
    )
    assert (small.pixels.int() - large.pixels.cpu().int()).abs().max() <= 1
