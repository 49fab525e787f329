"""JPEG files: which go to nvJPEG, what happens to the others, and on a GPU how far its pixels are."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from arrcoc import devices, jpeg, pixels
from arrcoc.errors import ConfigError, ImageError

CPU, LIMIT = torch.device("cpu"), 10_000_000


def file(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


@pytest.fixture(scope="module")
def small(photo: Image.Image) -> Image.Image:
    return photo.crop((100, 0, 300, 150))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 100, "subsampling": 0},
        {"subsampling": 2, "optimize": True},
        {"restart_marker_rows": 1},
        {"comment": b"\xff\xda in a comment"},
        {"exif": turned(6)},
    ],
)
def test_plain_files(small: Image.Image, options: dict[str, Any]) -> None:
    data = file(small, **options)
    assert jpeg.is_plain(data)
    assert jpeg.is_plain(data + b"after the end")
    grey = {name: value for name, value in options.items() if name != "subsampling"}
    assert jpeg.is_plain(file(small.convert("L"), **grey))
    # Cut anywhere, it is not.
    for length in [0, 1, 3, 20, len(data) // 4, len(data) // 2, len(data) - 2, len(data) - 1]:
        assert not jpeg.is_plain(data[:length]), length


def test_files_for_the_cpu(small: Image.Image) -> None:
    assert not jpeg.is_plain(file(small, progressive=True))
    assert not jpeg.is_plain(file(small.convert("CMYK")))
    assert not jpeg.is_plain(file(small, keep_rgb=True))
    # Grey with factors above 1: nvJPEG decodes it to other pixels.
    assert not jpeg.is_plain(file(small.convert("L"), subsampling=1))
    assert not jpeg.is_plain(file(small, "PNG"))
    data = file(small)
    begin = jpeg._scan(data)
    assert begin is not None
    middle = begin + 500
    # A marker inside the scan, as a second scan or a lost end would leave.
    assert not jpeg.is_plain(data[:middle] + b"\xff\xda" + data[middle:])
    # Two frame headers.
    frame = data.index(b"\xff\xc0")
    length = 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    assert not jpeg.is_plain(data[:frame] + data[frame : frame + length] + data[frame:])
    # Twelve bits, and a scan of one component out of three.
    assert not jpeg.is_plain(data[: frame + 4] + b"\x0c" + data[frame + 5 :])
    scan = data.index(b"\xff\xda", frame)
    assert not jpeg.is_plain(data[: scan + 4] + b"\x01" + data[scan + 5 :])
    # A thumbnail's end before the scan is not the image's.
    thumbnail = small.resize((40, 30))
    assert not jpeg.is_plain(file(small, exif=b"Exif\0\0" + file(thumbnail))[:-2])


def test_noise_is_never_plain_and_never_an_error() -> None:
    random = np.random.default_rng(0)
    heads = [b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00\x11\x08", b"\xff\xd8\xff\xda\x00\x02"]
    for round_ in range(400):
        data = heads[round_ % 4] + random.bytes(int(random.integers(0, 300)))
        assert not jpeg.is_plain(data)


def test_the_cpu_is_described_and_the_gpu_cannot_be_forced_on_it() -> None:
    assert not jpeg.chosen("auto", CPU)
    assert not jpeg.chosen("cpu", CPU)
    assert jpeg.describe("auto", CPU) == jpeg.describe("cpu", CPU) == "Pillow"
    with pytest.raises(ConfigError, match=r"jpeg='gpu', but the device is cpu.*Install"):
        jpeg.chosen("gpu", CPU)


def refuse(device: torch.device) -> jpeg.Backend:
    raise RuntimeError("operator torchvision::nms does not exist\nfurther lines")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Ways to nvJPEG to replace; both refuse."""
    for name in ("_by_library", "_by_torchvision"):
        monkeypatch.setattr(jpeg, name, refuse)
    jpeg.backend.cache_clear()
    yield monkeypatch
    jpeg.backend.cache_clear()


def test_no_way_to_nvjpeg_is_noted_once(ways: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda:7")
    with caplog.at_level(logging.WARNING):
        assert not jpeg.chosen("auto", device)
        assert not jpeg.chosen("auto", device)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nms does not exist)" in jpeg.describe("auto", device)
    assert jpeg.describe("cpu", device) == "Pillow"
    with pytest.raises(ConfigError, match="nms"):
        jpeg.chosen("gpu", device)


def one_colour(level: int) -> Callable[[bytes, int, int], Tensor]:
    """A decoder that always gives the colour of the file that ways are tried with, `level` off in green."""
    colour = torch.tensor([200, 100 + level, 50], dtype=torch.uint8)[:, None, None]
    return lambda data, height, width: colour.expand(3, height, width)


def test_the_first_way_that_works_is_taken(
    ways: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda:7")
    ways.setattr(jpeg, "_by_torchvision", lambda _: jpeg.Backend("second", one_colour(2)))
    with caplog.at_level(logging.WARNING):
        assert jpeg.describe("auto", device) == "second"
        assert jpeg.chosen("gpu", device)
    (record,) = caplog.records
    assert "second" in record.getMessage()
    assert "nms" in record.getMessage()
    jpeg.backend.cache_clear()
    ways.setattr(jpeg, "_by_library", lambda _: jpeg.Backend("first", one_colour(0)))
    assert jpeg.describe("auto", device) == "first"
    jpeg.backend.cache_clear()
    ways.setattr(jpeg, "_by_library", lambda _: jpeg.Backend("wrong", one_colour(9)))
    assert jpeg.describe("auto", device) == "second"


class Decoder:
    """Stands in for nvJPEG: takes what Pillow makes of the file, and marks that it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.error: Exception | None = None
        monkeypatch.setattr(jpeg, "_decode", self)

    def __call__(self, data: bytes, height: int, width: int, device: torch.device) -> Tensor:
        self.asked += 1
        if self.error is not None:
            raise self.error
        with Image.open(io.BytesIO(data)) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    return Decoder(monkeypatch)


def both(source: Any, limit: int = LIMIT) -> tuple[Tensor, Tensor]:
    return pixels.decode(source, limit, CPU, nvjpeg=True), pixels.decode(source, limit)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_to_its_pixels(
    small: Image.Image, decoder: Decoder, orientation: int, tmp_path: Path
) -> None:
    data = file(small, exif=turned(orientation))
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg"):
        ours, theirs = both(source)
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    assert decoder.asked == 2


def test_other_files_go_to_pillow(small: Image.Image, decoder: Decoder) -> None:
    for data in (file(small, progressive=True), file(small.convert("CMYK")), file(small, "PNG")):
        ours, theirs = both(data)
        assert torch.equal(ours, theirs)
    assert decoder.asked == 0
    ours, theirs = both(file(small.convert("L")))
    assert torch.equal(ours, theirs)
    assert decoder.asked == 1


def test_a_refused_file_goes_to_pillow(small: Image.Image, decoder: Decoder) -> None:
    decoder.error = RuntimeError("nvjpeg says no")
    ours, theirs = both(file(small))
    assert torch.equal(ours, theirs)
    assert decoder.asked == 1


def test_a_result_of_another_size_is_not_taken(
    small: Image.Image, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jpeg, "_decode", lambda *_: torch.zeros(3, 8, 8, dtype=torch.uint8))
    ours, theirs = both(file(small))
    assert torch.equal(ours, theirs)


def test_limits_and_damage_are_refused_before_it_is_asked(small: Image.Image, decoder: Decoder) -> None:
    data = file(small)
    with pytest.raises(ImageError, match="at most 29999 pixels"):
        pixels.decode(data, 29_999, CPU, nvjpeg=True)
    with pytest.raises(ImageError, match="200:1"):
        pixels.decode(file(small.resize((402, 2))), LIMIT, CPU, nvjpeg=True)
    with pytest.raises(ImageError, match="damaged or cut short"):
        pixels.decode(data[: len(data) // 2], LIMIT, CPU, nvjpeg=True)
    assert decoder.asked == 0


def test_upload_leaves_the_cpu_alone() -> None:
    there = torch.arange(3)
    assert devices.upload(there, CPU) is there


@pytest.mark.gpu
def test_upload_copies_before_it_returns() -> None:
    there = torch.arange(1 << 20)
    here = devices.upload(there, torch.device("cuda"))
    there.zero_()
    assert torch.equal(here.cpu(), torch.arange(1 << 20))


needs_nvjpeg = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(jpeg.unusable(torch.device("cuda"))), reason="needs nvJPEG"
)


@pytest.mark.gpu
@needs_nvjpeg
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {}, {"restart_marker_rows": 1}])
def test_nvjpeg_is_near_pillow(photo: Image.Image, options: dict[str, Any], orientation: int) -> None:
    for image in (photo, photo.crop((0, 0, 333, 251)), photo.convert("L")):
        data = file(image, quality=90, exif=turned(orientation), **options)
        ours = pixels.decode(data, LIMIT, torch.device("cuda"), nvjpeg=True).cpu().int()
        off = (ours - pixels.decode(data, LIMIT).int()).abs()
        assert off.max() <= 2, (image.mode, image.size)
        assert off.float().mean() <= 0.05


@pytest.mark.gpu
@needs_nvjpeg
def test_threads_decode_side_by_side(photo: Image.Image) -> None:
    cuda = torch.device("cuda")
    files = [file(photo.crop((0, 0, 300 + 16 * i, 200)), quality=90) for i in range(4)]
    expected = [pixels.decode(data, LIMIT).int() for data in files]
    worst = [0] * 4

    def work(place: int) -> None:
        for round_ in range(20):
            which = (place + round_) % 4
            ours = pixels.decode(files[which], LIMIT, cuda, nvjpeg=True).cpu().int()
            worst[place] = max(worst[place], int((ours - expected[which]).abs().max()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised
    assert max(worst) <= 2


@pytest.mark.gpu
@needs_nvjpeg
def test_torchvision_is_the_second_way(photo: Image.Image) -> None:
    second, data = jpeg._by_torchvision(torch.device("cuda")), file(photo, quality=90)
    jpeg._try(second)
    off = second.decode(data, photo.height, photo.width).cpu().int() - pixels.decode(data, LIMIT).int()
    # It repeats colour samples where libjpeg-turbo interpolates them, which shows at coloured edges.
    assert off.abs().float().mean() <= 1.5


@pytest.mark.gpu
@needs_nvjpeg
def test_nvjpeg_and_damage(photo: Image.Image) -> None:
    cuda, data = torch.device("cuda"), file(photo)
    with pytest.raises(ImageError, match="damaged or cut short"):
        pixels.decode(data[: len(data) * 2 // 3], LIMIT, cuda, nvjpeg=True)
    for height, width in [(1, 1), (1, 40), (7, 9), (17, 33)]:
        tiny = photo.resize((width, height))
        ours, theirs = (pixels.decode(file(tiny), LIMIT, cuda, nvjpeg=n).cpu() for n in (True, False))
        assert ours.shape == theirs.shape == (3, height, width)


@pytest.mark.gpu
def test_other_images_arrive_whole(photo: Image.Image) -> None:
    cuda = torch.device("cuda")
    for source in (file(photo, "PNG"), np.asarray(photo), photo.convert("RGBA")):
        assert torch.equal(pixels.decode(source, LIMIT, cuda).cpu(), pixels.decode(source, LIMIT))
