"""Every kind of image a caller may hand over: the right pixels, or an ImageError that helps."""

import base64
import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor

from arrcoc import pixels
from arrcoc.errors import ImageError
from arrcoc.image import ImageInput, decode

LIMIT = 1_000_000

# 2 rows, 3 columns, six colours that JPEG-free formats keep exactly.
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
GREY, BLACK, WHITE = (90, 90, 90), (0, 0, 0), (255, 255, 255)
SAMPLE = np.array([[RED, GREEN, BLUE], [GREY, BLACK, WHITE]], dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height: int = 48, width: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], 2).astype(np.uint8)
    return Image.fromarray(rgb)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and then holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def as_rows(image: Tensor) -> list[list[tuple[int, ...]]]:
    return [[tuple(cell) for cell in row] for row in image.permute(1, 2, 0).tolist()]


def error_of(source: ImageInput, limit: int = LIMIT) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(source, limit)
    assert all((caught.value.given, caught.value.allowed, caught.value.remedy))
    return caught.value


TRUNCATED = {kind: encoded(photo(), kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM")}


@pytest.mark.parametrize("kind", TRUNCATED)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files(kind: str, share: float) -> None:
    whole = TRUNCATED[kind]
    assert decode(whole, LIMIT).shape == (3, 48, 64)
    error = error_of(whole[: int(len(whole) * share)])
    assert "damaged or cut short" in error.given
    assert error.allowed == "a complete image file"
    assert error.__cause__ is not None


def test_truncated_progressive_jpeg() -> None:
    whole = encoded(photo(), "JPEG", progressive=True)
    assert "damaged" in error_of(whole[:-200]).given


@pytest.mark.parametrize("kind", TRUNCATED)
def test_pillow_may_not_be_lenient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    error_of(TRUNCATED[kind][: len(TRUNCATED[kind]) * 6 // 10])
    assert decode(TRUNCATED[kind], LIMIT).shape == (3, 48, 64)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF"])
def test_no_cut_is_silent(kind: str) -> None:
    data = encoded(photo(9, 12), kind)
    whole = decode(data, LIMIT)
    for length in range(len(data)):
        try:
            image = decode(data[:length], LIMIT)
        except ImageError:
            continue
        # Only a trailer was lost.
        assert torch.equal(image, whole)


GREY_SHAPE = (4, 5)
NAN, INF = float("nan"), float("inf")

BAD: list[tuple[str, ImageInput, str, str, str]] = [
    # name, source, and a part of given, allowed, remedy
    ("0 bytes", b"", "0 bytes", "complete", "again"),
    ("text", b"hello, this is no image", "not a known image format", "PNG, JPEG", "Convert"),
    ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a known", "PNG", "Convert"),
    ("JPEG 2000", encoded(photo(), "JPEG2000"), "not a known", "PNG", "Convert"),
    ("ICO", encoded(photo(), "ICO"), "not a known", "PNG", "Convert"),
    (
        "bomb",
        png_header(60_000, 60_000),
        "60000 x 60000",
        "1000000 pixels (max_source_pixels)",
        "max_source_pixels",
    ),
    ("just above the limit", png_header(1001, 1000), "1001 x 1000", "1000000", "max_source_pixels"),
    ("zero-sized file", png_header(0, 5), "damaged", "complete", "again"),
    ("1x20000 file", png_header(20_000, 1), "20000 x 1", "200:1", "Cut"),
    ("20000x1 array", np.zeros((20_000, 1), np.uint8), "1 x 20000", "200:1", "Cut"),
    ("201:1", np.zeros((402, 2), np.uint8), "2 x 402", "200:1", "Cut"),
    ("array above the limit", np.zeros((1001, 1000), np.uint8), "1000 x 1001", "1000000", "Scale"),
    ("PIL above the limit", Image.new("1", (1001, 1000)), "1001 x 1000", "1000000", "Scale"),
    ("zero-sized array", np.zeros((0, 5, 3), np.uint8), "5 x 0", "1 x 1", "empty"),
    ("zero-sized tensor", torch.zeros(3, 5, 0), "0 x 5", "1 x 1", "empty"),
    ("NaN tensor", torch.full((3, 4, 4), NAN), "nan", "[0, 1]", "Remove NaN"),
    ("one NaN", np.where(np.eye(4) > 0, NAN, 0.5), "nan", "[0, 1]", "Remove NaN"),
    ("infinity", np.where(np.eye(4) > 0, INF, 0.5), "inf", "[0, 1]", "infinity"),
    ("negative floats", torch.full((3, 4, 4), -0.1), "-0.1", "[0, 1]", "clamp"),
    ("floats to 255", torch.full((3, 4, 4), 255.0), "255", "[0, 1]", "Divide by 255"),
    ("int64 tensor", torch.zeros(3, 4, 4, dtype=torch.int64), "int64", "uint8", "to(torch.uint8)"),
    ("int8 array", np.zeros(GREY_SHAPE, np.int8), "int8", "uint8", "astype(np.uint8)"),
    ("int64 array", np.zeros(GREY_SHAPE, np.int64), "int64", "uint8", "astype(np.uint8)"),
    ("complex tensor", torch.zeros(3, 4, 4, dtype=torch.complex64), "complex64", "uint8", "to("),
    ("complex array", np.zeros(GREY_SHAPE, np.complex128), "complex128", "uint8", "astype"),
    ("object array", np.full(GREY_SHAPE, None), "object", "uint8", "astype"),
    ("string array", np.full(GREY_SHAPE, "a"), "str", "uint8", "astype"),
    ("tensor [H, W, 3]", torch.zeros(5, 6, 3), "[5, 6, 3]", "[1|3|4, H, W]", "permute(2, 0, 1)"),
    ("array [3, H, W]", np.zeros((3, 5, 6), np.uint8), "[3, 5, 6]", "[H, W, 1|3|4]", "transpose(1, 2, 0)"),
    ("2 channels", torch.zeros(2, 5, 6), "[2, 5, 6]", "[1|3|4, H, W]", "1, 3 or 4 channels"),
    ("5 channels", np.zeros((5, 6, 5), np.uint8), "[5, 6, 5]", "[H, W, 1|3|4]", "1, 3 or 4 channels"),
    ("rank 1", np.zeros(5, np.uint8), "[5]", "[H, W]", "one image"),
    ("rank 0", torch.tensor(0.5), "[]", "[H, W]", "one image"),
    ("batch", torch.zeros(1, 3, 5, 6), "[1, 3, 5, 6]", "[1|3|4, H, W]", "one image"),
    ("missing path", "no/such/picture.png", "no/such/picture.png' does not exist", "readable", "Check"),
    ("directory", Path(__file__).parent, "is a directory", "readable", "Check"),
    ("NUL in path", "a\0b.png", "a\\x00b.png", "readable", "Check"),
    ("endless path", "a" * 5000, "aaa...", "readable", "Check"),
    ("device file", Path(os.devnull), "is no file", "readable", "Check"),
    ("https URL", "https://example.com/cat.png", "example.com/cat.png", "local paths", "Download"),
    ("HTTP URL", "HTTP://example.com/cat.png", "example.com", "local paths", "Download"),
    ("s3 URL", "s3://bucket/cat.png", "s3://bucket", "local paths", "Download"),
    ("file URL with a host", "file://server/cat.png", "server", "without a host", "file:///"),
    ("missing file URL", "file:///no/such%20picture.png", "no/such picture.png", "readable", "Check"),
    ("data URL not base64", "data:image/png;base64,@@@@", "data URL", "data:image/", "Encode"),
    ("data URL not an image", "data:text/plain;base64,aGk=", "not an image", "data:image/", "Encode"),
    ("data URL cut short", "data:image/png;base64", "data URL", "data:image/", "Encode"),
    ("None", None, "NoneType", "a path, bytes", "Convert"),  # type: ignore[list-item]
    ("list", [[1, 2], [3, 4]], "list", "a path, bytes", "Convert"),  # type: ignore[list-item]
    ("I beyond 16 bits", Image.new("I", (2, 2), 70_000), "70000", "65535", "Scale"),
    ("negative I", Image.new("I", (2, 2), -1), "-1", "65535", "Scale"),
    ("F beyond 1", Image.new("F", (2, 2), 1.5), "1.5", "[0, 1]", "Divide by 255"),
]


@pytest.mark.parametrize(
    ("source", "given_", "allowed", "remedy"), [row[1:] for row in BAD], ids=[r[0] for r in BAD]
)
def test_refused(source: ImageInput, given_: str, allowed: str, remedy: str) -> None:
    error = error_of(source)
    assert given_ in error.given
    assert allowed in error.allowed
    assert remedy in error.remedy
    assert len(error.given) < 300


def test_codec_left_out_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(), "WEBP")
    factory, _ = Image.OPEN["WEBP"]
    monkeypatch.setitem(Image.OPEN, "WEBP", (factory, lambda prefix: "WEBP support not installed"))
    assert "not a known image format" in error_of(data).given


def test_closed_pil_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photo().save(path)
    with Image.open(path) as opened:
        pass
    assert "damaged" in error_of(opened).given


def test_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(image: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert "60000 x 60000" in error_of(png_header(60_000, 60_000)).given


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP"])
def test_our_limit_replaces_pillows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3072 pixels: 300 times Pillow's limit here, but within ours.
    data = encoded(photo(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(pixels, "_PIL_LIMIT", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data, LIMIT).shape == (3, 48, 64)
        error_of(data, limit=3071)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_one_pixel() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), RED)), LIMIT).tolist() == [[[255]], [[0]], [[0]]]


def test_longest_allowed() -> None:
    assert decode(np.zeros((400, 2), np.uint8), LIMIT).shape == (3, 400, 2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(
        decode(encoded(Image.fromarray(SAMPLE), kind, **options), LIMIT).permute(1, 2, 0), SAMPLE
    )


def test_every_way_in(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(SAMPLE))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    sources: list[ImageInput] = [
        path,
        str(path),
        path.as_uri(),
        path.as_uri().replace("file:///", "file://localhost/"),
        data,
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "DATA:image/png;charset=x;base64," + base64.encodebytes(data).decode(),
        Image.open(path),
        Image.fromarray(SAMPLE),
        SAMPLE,
        np.asfortranarray(SAMPLE),
        SAMPLE[::-1][::-1],
        SAMPLE.astype(np.float64) / 255,
        SAMPLE.astype(np.float32) / 255,
        SAMPLE.astype(">u2") * 257,
        torch.from_numpy(SAMPLE).permute(2, 0, 1),
        torch.from_numpy(SAMPLE).permute(2, 0, 1) / 255,
        (torch.from_numpy(SAMPLE).permute(2, 0, 1) / 255).requires_grad_(),
        (torch.from_numpy(SAMPLE).permute(2, 0, 1).int() * 257).to(torch.uint16),
    ]
    for source in sources:
        image = decode(source, LIMIT)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert not image.requires_grad
        assert np.array_equal(image.permute(1, 2, 0), SAMPLE)


@pytest.mark.parametrize(
    "source", [SAMPLE.copy(), torch.from_numpy(SAMPLE.copy()).permute(2, 0, 1).contiguous()]
)
def test_nothing_is_shared(source: Any) -> None:
    image = decode(source, LIMIT)
    source[:] = 7
    assert np.array_equal(image.permute(1, 2, 0), SAMPLE)


GREYS: list[tuple[str, ImageInput, list[int]]] = [
    # One row of samples and the grey levels that it must become.
    ("L", Image.fromarray(np.array([[0, 7, 255]], np.uint8)), [0, 7, 255]),
    ("1", Image.fromarray(np.array([[True, False, True]])), [255, 0, 255]),
    ("1-bit PNG", encoded(Image.fromarray(np.array([[True, False, True]]))), [255, 0, 255]),
    # round(v / 257): 128/257 = 0.498 -> 0, 129/257 = 0.502 -> 1, 32768/257 = 127.502 -> 128.
    ("I;16", Image.fromarray(np.array([[128, 129, 32768, 65535]], np.uint16)), [0, 1, 128, 255]),
    (
        "16-bit PNG",
        encoded(Image.fromarray(np.array([[128, 129, 32768, 65535]], np.uint16))),
        [0, 1, 128, 255],
    ),
    (
        "16-bit TIFF",
        encoded(Image.fromarray(np.array([[128, 129, 32768, 65535]], np.uint16)), "TIFF"),
        [0, 1, 128, 255],
    ),
    ("I;16B", Image.frombytes("I;16B", (2, 1), b"\x80\x00\xff\xff"), [128, 255]),
    ("I", Image.fromarray(np.array([[129, 32768, 65535]], np.int32)), [1, 128, 255]),
    ("16-bit PGM", b"P5 2 1 65535\n\x80\x00\xff\xff", [128, 255]),
    # 0.5 * 255 = 127.5, rounded to even: 128.
    ("F", Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), [0, 128, 255]),
    ("F TIFF", encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF"), [0, 128, 255]),
    ("bool array", np.array([[True, False]]), [255, 0]),
    ("bool tensor", torch.tensor([[[True, False]]]), [255, 0]),
    ("uint16 array", np.array([[128, 129, 65535]], np.uint16), [0, 1, 255]),
    ("array [H, W, 1]", np.array([[[3], [4]]], np.uint8), [3, 4]),
    ("half floats", torch.tensor([[0.0, 1.0]], dtype=torch.float16), [0, 255]),
    ("bfloat16", torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), [0, 255]),
    # Over white, (v*a + 255*(255-a)) / 255: (100*255)/255 = 100; (100*51 + 255*204)/255 = 224; white.
    ("LA", Image.fromarray(np.array([[[100, 255], [100, 51], [100, 0]]], np.uint8), "LA"), [100, 224, 255]),
    (
        "LA PNG",
        encoded(Image.fromarray(np.array([[[100, 255], [100, 51], [100, 0]]], np.uint8), "LA")),
        [100, 224, 255],
    ),
    ("La", Image.new("LA", (1, 1), (100, 51)).convert("La"), [224]),
    ("L with a clear grey", encoded(Image.fromarray(np.array([[0, 9]], np.uint8)), transparency=0), [255, 9]),
    (
        "16-bit PNG with a clear grey",
        encoded(Image.fromarray(np.array([[0, 257]], np.uint16)), transparency=0),
        [255, 1],
    ),
]


@pytest.mark.parametrize(("source", "levels"), [row[1:] for row in GREYS], ids=[row[0] for row in GREYS])
def test_grey(source: ImageInput, levels: list[int]) -> None:
    assert decode(source, LIMIT).tolist() == [[levels]] * 3


# Half-clear red over white: (255*128 + 255*127)/255 = 255; (0*128 + 255*127)/255 = 127.
RGBA = np.array([[(*RED, 255), (*RED, 128), (*BLUE, 0)]], dtype=np.uint8)
OVER_WHITE = [[RED, (255, 127, 127), WHITE]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_over_white(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert as_rows(decode(encoded(Image.fromarray(RGBA), kind, **options), LIMIT)) == OVER_WHITE
    assert as_rows(decode(RGBA, LIMIT)) == OVER_WHITE
    assert as_rows(decode(torch.from_numpy(RGBA).permute(2, 0, 1), LIMIT)) == OVER_WHITE


def test_other_colour_spaces() -> None:
    colour = (200, 30, 40)
    for mode in ("HSV", "YCbCr", "LAB", "RGBX"):
        there = Image.new("RGB", (1, 1), colour).convert(mode)
        assert (decode(there, LIMIT).flatten().int() - torch.tensor(colour)).abs().max() <= 3
    premultiplied = Image.new("RGBA", (1, 1), (100, 100, 100, 51)).convert("RGBa")
    assert as_rows(decode(premultiplied, LIMIT)) == [[(224, 224, 224)]]


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([*RED, *RED, *BLUE])
    return image


def test_palettes() -> None:
    assert as_rows(decode(encoded(palette()), LIMIT)) == [[RED, RED, BLUE]]
    assert as_rows(decode(palette(), LIMIT)) == [[RED, RED, BLUE]]
    assert as_rows(decode(encoded(palette(), transparency=bytes([255, 128, 0])), LIMIT)) == OVER_WHITE
    assert as_rows(decode(encoded(palette(), "GIF", transparency=2), LIMIT)) == [[RED, RED, WHITE]]
    with_alpha = Image.new("PA", (1, 1))
    with_alpha.putpalette([*BLACK])
    assert as_rows(decode(with_alpha, LIMIT)) == [[WHITE]]


def test_cmyk() -> None:
    # No ink is white, full cyan takes the red away, full black is black.
    inks = np.array([[(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)]], dtype=np.uint8)
    image = Image.fromarray(inks, "CMYK")
    expected = [[WHITE, (0, 255, 255), BLACK]]
    assert as_rows(decode(image, LIMIT)) == expected
    assert as_rows(decode(encoded(image, "TIFF"), LIMIT)) == expected
    # JPEG: Adobe stores inks inverted and says so in its marker; a flat patch survives compression.
    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    data = encoded(flat, "JPEG", quality=100)
    assert b"Adobe" in data
    centre = decode(data, LIMIT)[:, 8, 8].int()
    assert (centre - torch.tensor([0, 255, 255])).abs().max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    data = animated(kind) if kind != "TIFF" else encoded_pages()
    with caplog.at_level(logging.WARNING, "arrcoc"):
        image = decode(data, LIMIT)
    assert as_rows(image) == [[RED] * 8] * 8
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "only frame 1 is used" in caplog.text


def encoded_pages() -> bytes:
    pages = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    return encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])


def test_still_images_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "JPEG"):
        decode(encoded(photo(), kind), LIMIT)
    assert not caplog.records


R, G, B, Y, K, W = RED, GREEN, BLUE, GREY, BLACK, WHITE
# Stored rows are R G B / Y K W. EXIF: what the stored first row and first column show (CIPA DC-008).
ORIENTED = {
    1: [[R, G, B], [Y, K, W]],  # top, left
    2: [[B, G, R], [W, K, Y]],  # top, right: mirrored
    3: [[W, K, Y], [B, G, R]],  # bottom, right: half turn
    4: [[Y, K, W], [R, G, B]],  # bottom, left: upside down mirrored
    5: [[R, Y], [G, K], [B, W]],  # left, top: transposed
    6: [[Y, R], [K, G], [W, B]],  # right, top: quarter turn clockwise
    7: [[W, B], [K, G], [Y, R]],  # right, bottom: transposed across
    8: [[B, W], [G, K], [R, Y]],  # left, bottom: quarter turn anticlockwise
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(SAMPLE), kind, exif=exif, **options)
    image = decode(data, LIMIT)
    assert as_rows(image) == ORIENTED[orientation]
    assert image.is_contiguous()
    assert torch.equal(decode(Image.open(io.BytesIO(data)), LIMIT), image)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_of_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = encoded(photo(), "JPEG"), encoded(photo(), "JPEG", exif=exif)
    expected = torch.rot90(decode(plain, LIMIT), 2 if orientation == 3 else -1, (1, 2))
    assert torch.equal(decode(turned, LIMIT), expected)


def test_unknown_orientation_is_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    assert as_rows(decode(encoded(Image.fromarray(SAMPLE), exif=exif), LIMIT)) == ORIENTED[1]


def test_damaged_exif_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(Image.fromarray(SAMPLE), exif=b"Exif\0\0rubbish rubbish")
    assert as_rows(decode(data, LIMIT)) == ORIENTED[1]
    assert "EXIF" in caplog.text


def only_image_error(data: bytes) -> None:
    """Decoding gives pixels or an ImageError; anything else fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(data, 100_000)
        except ImageError:
            return
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert image.shape[1] * image.shape[2] <= 100_000


MAGIC = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"II*\0",
    b"BM",
    b"P6",
]
MAGIC += [b"\0\0\0\x1cftypavif", b"\xff\x4f\xff\x51", b"MM\0*", b"Pf"]


@given(st.sampled_from(MAGIC), st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes(magic: bytes, data: bytes) -> None:
    only_image_error(magic + data)


VICTIMS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(photo(12, 16)),
    "palette PNG": lambda: encoded(palette(), transparency=b"\xff\x80\0"),
    "APNG": lambda: animated("PNG"),
    "JPEG": lambda: encoded(photo(12, 16), "JPEG"),
    "JPEG with EXIF": lambda: encoded(
        photo(12, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0"
    ),
    "CMYK JPEG": lambda: encoded(photo(12, 16).convert("CMYK"), "JPEG"),
    "GIF": lambda: encoded(photo(12, 16), "GIF"),
    "animated GIF": lambda: animated("GIF"),
    "WebP": lambda: encoded(photo(12, 16), "WEBP"),
    "animated WebP": lambda: animated("WEBP"),
    "TIFF": lambda: encoded(photo(12, 16), "TIFF"),
    "deflated TIFF": lambda: encoded(photo(12, 16), "TIFF", compression="tiff_adobe_deflate"),
    "BMP": lambda: encoded(photo(12, 16), "BMP"),
    "AVIF": lambda: encoded(photo(12, 16), "AVIF"),
    "PGM": lambda: b"P5 2 1 65535\n\x80\x00\xff\xff",
}


@pytest.mark.parametrize("name", VICTIMS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_corrupted_files(name: str, data: st.DataObject) -> None:
    victim = bytearray(VICTIMS[name]())
    for _ in range(data.draw(st.integers(0, 6))):
        # Headers lie at the front: half of the damage goes there.
        end = data.draw(st.sampled_from([min(64, len(victim)), len(victim)]))
        victim[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    only_image_error(bytes(victim[: data.draw(st.integers(0, len(victim)))]))
