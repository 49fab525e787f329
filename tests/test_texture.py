"""Texture channels: golden values, small text, independence, strips."""

from __future__ import annotations

import kornia
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from torch import Tensor
from torch.nn import functional

from arrcoc import texture
from arrcoc.config import Config
from arrcoc.records import Channel, Frame, Grid, Texture


def make_frame(pixels: Tensor, tile: int, small_tile: int | None = None) -> Frame:
    """A frame of uint8 [3, H, W], cropped to whole tiles; background by area mean."""
    rows, cols = pixels.shape[1] // tile, pixels.shape[2] // tile
    pixels = pixels[:, : rows * tile, : cols * tile]
    small = small_tile or max(1, tile // 4)
    background = functional.interpolate(pixels[None].float(), size=(rows * small, cols * small), mode="area")
    return Frame(
        pixels=pixels,
        background=background[0].round().byte(),
        grid=Grid(rows, cols, tile),
        hashes=torch.zeros(rows * cols, 4, dtype=torch.int64),
        source=(rows * tile, cols * tile),
        content=(rows * tile, cols * tile),
        distortion=0.0,
        scale=1.0,
    )


def plain(red: int, green: int, blue: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].repeat(1, height, width)


def measure(pixels: Tensor, tile: int = 32, cells: int = 8) -> Texture:
    return texture.extract(make_frame(pixels, tile), Config(cells=cells))


def photograph(name: str) -> Tensor:
    return torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)


def test_shape_type_and_grid() -> None:
    made = measure(plain(1, 2, 3, height=64, width=96))
    assert made.maps.shape == (13, 2 * 8, 3 * 8)
    assert made.maps.dtype == torch.float16
    assert (made.grid, made.cells) == (Grid(2, 3, 32), 8)


# L*a*b* of sRGB primaries under D65, from the CIE 1976 definition: red 53.24, 80.09, 67.20;
# green 87.73, -86.18, 83.18; blue 32.30, 79.19, -107.86; white 100, 0, 0; black 0, 0, 0.
# Scaled: L/50 - 1, a/100, b/110.
@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((255, 0, 0), (1, -1, -1, 0.0648, 0.8009, 0.6109)),
        ((0, 255, 0), (-1, 1, -1, 0.7546, -0.8618, 0.7562)),
        ((0, 0, 255), (-1, -1, 1, -0.3540, 0.7919, -0.9805)),
        ((255, 255, 255), (1, 1, 1, 1, 0, 0)),
        ((0, 0, 0), (-1, -1, -1, -1, 0, 0)),
    ],
)
def test_colour_of_a_plain_image(rgb: tuple[int, int, int], expected: tuple[float, ...]) -> None:
    maps = measure(plain(*rgb)).maps.float()
    wanted = torch.tensor(expected, dtype=torch.float32)[:, None, None].expand(-1, 16, 16)
    torch.testing.assert_close(maps[:6], wanted, atol=2e-3, rtol=0)
    for channel in (Channel.SOBEL_X, Channel.SOBEL_Y, Channel.SOBEL_MAGNITUDE, Channel.DETAIL):
        assert maps[channel.row].abs().max() < 1e-3


def test_colour_is_an_area_mean() -> None:
    # A cell of 4x4 px with 4 white and 12 black pixels: mean 255/4, so 2/4 - 1 = -0.5.
    pixels = plain(0, 0, 0, 32, 32)
    pixels[:, :4, :1] = 255
    made = measure(pixels)
    assert made[Channel.RED][0, 0].item() == pytest.approx(-0.5, abs=1e-3)
    assert made[Channel.RED][0, 1].item() == -1


def test_step_edge() -> None:
    # Black left of column 16, white from it: Sobel/8 answers 1/2 in columns 15 and 16, times 2 is 1.
    # Cells are 4 px wide, so cell columns 3 and 4 each hold one such column of four: mean 1/4, peak 1.
    pixels = plain(0, 0, 0, 32, 32)
    pixels[:, :, 16:] = 255
    made = measure(pixels)
    expected = torch.tensor([0, 0, 0, 0.25, 0.25, 0, 0, 0]).expand(8, 8)
    torch.testing.assert_close(made[Channel.SOBEL_X], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(made[Channel.SOBEL_MAGNITUDE], (expected > 0).float(), atol=1e-3, rtol=0)
    assert made[Channel.SOBEL_Y].abs().max() < 1e-3


def test_sobel_y_answers_to_horizontal_edges() -> None:
    pixels = plain(0, 0, 0, 32, 32)
    pixels[:, 16:, :] = 255
    made = measure(pixels)
    assert made[Channel.SOBEL_Y][3, 0].item() == pytest.approx(0.25, abs=1e-3)
    assert made[Channel.SOBEL_X].abs().max() < 1e-3


def test_thin_line_does_not_cancel() -> None:
    # One white column on black has two opposite edges: the signed mean is 0, the absolute is not.
    pixels = plain(0, 0, 0, 32, 32)
    pixels[:, :, 17] = 255
    # Columns 16 and 18 answer 1/2 each, times 2, over the cell of columns 16..19: (1 + 1) / 4 = 1/2.
    assert measure(pixels)[Channel.SOBEL_X][0, 4].item() == pytest.approx(0.5, abs=1e-3)


def test_detail_is_the_rms_lost() -> None:
    # Columns black, white, black, …: the background (4x4 means) is uniform 127.5, rounded to 128.
    # Residuals are -128/255 and 127/255: RMS 0.5, times 2 is 1.
    pixels = plain(0, 0, 0)
    pixels[:, :, 1::2] = 255
    made = measure(pixels)
    torch.testing.assert_close(made[Channel.DETAIL], torch.ones(16, 16), atol=2e-3, rtol=0)


def test_detail_ignores_what_the_background_shows() -> None:
    ramp = torch.linspace(0, 255, 64).byte().expand(3, 64, 64)
    assert measure(ramp)[Channel.DETAIL].max() < 0.05


def test_place() -> None:
    # Two tiles wide, one high, 4 cells each: x centres (2i+1)/8 - 1, y centres (2i+1)/4 - 1.
    made = texture.extract(make_frame(plain(9, 9, 9, 32, 64), 32), Config(cells=4))
    assert made[Channel.X][0].tolist() == [-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875]
    assert made[Channel.Y][:, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    # Cell (0, 0) lies 0.75 and 2*0.875 = 1.75 half-heights off centre, the corner 1 and 2:
    # sqrt(0.5625 + 3.0625) / sqrt(5) = 0.85147.
    assert made[Channel.ECCENTRICITY][0, 0].item() == pytest.approx(0.85147, abs=1e-3)


@pytest.mark.parametrize("channel", [Channel.SOBEL_MAGNITUDE, Channel.DETAIL])
def test_four_pixel_text_stands_out(channel: Channel) -> None:
    canvas = Image.new("RGB", (2048, 2048), (128, 128, 128))
    glyphs = Image.new("L", (400, 40), 0)
    ImageDraw.Draw(glyphs).text((0, 0), "INVOICE 4711 TOTAL", fill=255, font=ImageFont.load_default(24))
    left, top, right, bottom = glyphs.getbbox() or (0, 0, 1, 1)
    line = glyphs.crop((left, top, right, bottom))
    line = line.resize((round(line.width * 4 / line.height), 4), Image.Resampling.LANCZOS)
    # The line crosses no border of a 16-px cell from above: rows 1030..1033, columns from 1030.
    canvas.paste((255, 255, 255), (1030, 1030), line)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    made = texture.extract(make_frame(pixels, 256), Config(cells=16))[channel]
    row, first, last = 1030 // 16, 1030 // 16, (1030 + line.width - 1) // 16
    on_text = made[row, first : last + 1]
    elsewhere = made.clone()
    elsewhere[row - 1 : row + 2, first - 1 : last + 2] = 0
    assert on_text.min() > 0.02
    assert on_text.max() > 0.1
    assert elsewhere.max() < 1e-3


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_no_channel_duplicates_another(name: str) -> None:
    maps = measure(photograph(name), tile=100, cells=16).maps.float().flatten(1)
    centred = maps - maps.mean(dim=1, keepdim=True)
    scaled = centred / centred.std(dim=1, keepdim=True)
    correlation = torch.corrcoef(maps) - torch.eye(13)
    assert correlation.abs().max() < 0.995
    assert torch.linalg.matrix_rank(scaled, rtol=1e-3) == 13


def test_stays_near_unit_scale() -> None:
    made = measure(photograph("astronaut"), tile=128, cells=16).maps
    assert made.isfinite().all()
    assert made.abs().max() < 1.1


def test_scale_does_not_depend_on_the_rest_of_the_image() -> None:
    quiet = photograph("chelsea")[:, :256, :256]
    loud = quiet.clone()
    loud[:, 192:, 192:] = torch.randint(
        0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)
    ).byte()
    alone, beside = measure(quiet, tile=64).maps, measure(loud, tile=64).maps
    assert torch.equal(alone[:, :16, :16], beside[:, :16, :16])


@pytest.mark.parametrize(("tile", "small_tile", "cells"), [(32, 8, 8), (40, 6, 16), (24, 7, 5)])
def test_strips_equal_the_whole(
    tile: int, small_tile: int, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = make_frame(photograph("coffee")[:, :200, :160], tile, small_tile)
    whole = texture.extract(frame, Config(cells=cells)).maps
    monkeypatch.setattr(texture, "STRIP_PIXELS", 1)
    torch.testing.assert_close(texture.extract(frame, Config(cells=cells)).maps, whole, atol=1e-3, rtol=1e-3)


def test_tile_not_divisible_by_cells() -> None:
    # 10 px in 4 cells: columns 0-2, 2-4, 5-7, 7-9. Pixel column 2 is white: cells 0 and 1 hold it, 1 of 3.
    pixels = plain(0, 0, 0, 10, 20)
    pixels[:, :, 2] = 255
    red = texture.extract(make_frame(pixels, 10), Config(cells=4))[Channel.RED]
    expected = torch.tensor([2 / 3 - 1, 2 / 3 - 1, -1, -1, -1, -1, -1, -1]).expand(4, 8)
    torch.testing.assert_close(red, expected, atol=1e-3, rtol=0)


def test_whole_pixel_cells_pool_like_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = make_frame(photograph("coffee"), 128)
    fast = texture.extract(frame, Config(cells=16)).maps
    monkeypatch.setattr(texture, "_blocks", lambda planes, size: None)
    torch.testing.assert_close(texture.extract(frame, Config(cells=16)).maps, fast, atol=1e-3, rtol=1e-3)


def test_colour_and_gradient_are_kornias() -> None:
    rgb = photograph("coffee")[:, :60, :70].float() / 255
    lab = kornia.color.rgb_to_lab(rgb)
    centre, scale = (torch.tensor(v)[:, None, None] for v in zip(*texture.LAB_CENTRE_SCALE, strict=True))
    torch.testing.assert_close(texture._lab(rgb), (lab - centre) / scale, atol=1e-6, rtol=0)
    gradient = kornia.filters.spatial_gradient(rgb[None, :1], mode="sobel", normalized=True)[0, 0]
    expected = 2 * gradient.abs().unflatten(2, (7, 10)).unflatten(1, (6, 10)).mean(dim=(2, 4))
    pooled = texture._pool_gradient(rgb[0], slice(0, 60), (6, 7))
    torch.testing.assert_close(pooled[:2], expected, atol=1e-6, rtol=0)
