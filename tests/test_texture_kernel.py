"""The texture kernel against the torch formulation: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arrcoc import texture, texture_kernel
from arrcoc.config import Config
from arrcoc.records import Channel, Frame, Grid

pytest.importorskip("triton")

CASES = [(32, 8, 8, 2, 3), (40, 6, 16, 2, 2), (24, 7, 5, 1, 3), (10, 3, 4, 3, 1)]
"""Edge of a tile and of the background's tile in pixels, cells, rows and columns of tiles."""

INTERPRETED = """
import json, sys, torch
from arrcoc import texture_kernel
sys.path.insert(0, {folder!r})
from test_texture_kernel import CASES, frame_of, by_torch
worst = []
for tile, small, cells, rows, cols in CASES:
    frame = frame_of(tile, small, rows, cols)
    expected = by_torch(frame, cells)
    found = torch.full_like(expected, 9)
    where = texture_kernel.Addresses(torch.device("cpu"))
    where.point(frame.pixels, frame.background)
    texture_kernel.measure(where, (rows, cols), tile, small, cells, found)
    worst.append((found.float() - expected.float()).abs().amax(dim=(1, 2)).tolist())
print(json.dumps(worst))
"""


def frame_of(tile: int, small_tile: int, rows: int, cols: int) -> Frame:
    """Patches of noise, with hard edges."""
    random = torch.Generator().manual_seed(tile)
    pixels = torch.randint(0, 256, (3, rows * tile, cols * tile), generator=random).byte()
    pixels[:, 3 : rows * tile // 2] //= 5
    background = torch.randint(0, 256, (3, rows * small_tile, cols * small_tile), generator=random).byte()
    size = (rows * tile, cols * tile)
    hashes = torch.zeros(rows * cols, 4, dtype=torch.int64)
    return Frame(pixels, background, Grid(rows, cols, tile), hashes, size, size, 0.0, 1.0)


def by_torch(frame: Frame, cells: int) -> torch.Tensor:
    return texture.extract_with_torch(frame, cells)


def test_interpreted_kernel_measures_what_torch_does() -> None:
    # Triton reads the switch when its own functions are made, so this needs a process that begins with it.
    script = INTERPRETED.format(folder=str(Path(__file__).parent))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    for case, worst in zip(CASES, json.loads(made.stdout.splitlines()[-1]), strict=True):
        by_channel = dict(zip(Channel, worst, strict=True))
        # Half precision near 1 has steps of 1/1024.
        assert max(worst) <= 1e-3, (case, by_channel)
        assert sum(worst) <= 3e-3, (case, by_channel)


def test_stands_aside_without_cuda() -> None:
    assert not texture_kernel.usable(torch.zeros(3, 4, 4, dtype=torch.uint8))
    frame = frame_of(32, 8, 2, 3)
    assert torch.equal(texture.extract(frame, Config(cells=8)).maps, by_torch(frame, 8))


def test_stands_aside_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(texture_kernel.triton_support, "why_not", lambda: None)
    assert texture_kernel.usable(pixels)  # type: ignore[arg-type]
    monkeypatch.setattr(texture_kernel, "triton", None)
    assert not texture_kernel.usable(pixels)  # type: ignore[arg-type]


def test_an_address_needs_planes_that_lie_one_after_another() -> None:
    frame = frame_of(32, 8, 2, 3)
    where = texture_kernel.Addresses(torch.device("cpu"))
    where.point(frame.pixels, frame.background)
    assert where.table.tolist() == [frame.pixels.data_ptr(), frame.background.data_ptr()]
    with pytest.raises(AssertionError, match="one after another"):
        where.point(frame.pixels.transpose(1, 2), frame.background)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (256, 64, 16, 2, 3), (640, 128, 16, 1, 2), (128, 32, 16, 1, 1)])
def test_kernel_measures_what_torch_does_on_cuda(case: tuple[int, ...]) -> None:
    tile, small, cells, rows, cols = case
    frame = frame_of(tile, small, rows, cols)
    on_gpu = Frame(
        frame.pixels.cuda(), frame.background.cuda(), *(getattr(frame, n) for n in frame.__slots__[2:])
    )
    expected = by_torch(frame, cells).float()
    found = texture.extract(on_gpu, Config(cells=cells)).maps.cpu().float()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(by_torch(on_gpu, cells).cpu().float(), expected, atol=2e-3, rtol=0)
