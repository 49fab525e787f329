"""Exact area resampling: by hand, against integration, on the CPU's fast path and as the Triton kernel."""

import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arrcoc import resample
from arrcoc.resample import area_resample


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_area_two_to_one() -> None:
    # (1+2+3+4)/4 = 2.5 -> 3 (half up); (10+20+30+41)/4 = 25.25 -> 25.
    pixels = torch.tensor([[[1, 2, 10, 20], [3, 4, 30, 41]]], dtype=torch.uint8)
    assert area_resample(pixels, 2, 1).tolist() == [[[3, 25]]]
    assert area_resample(pixels, 64, 32).tolist() == [[[3, 25]]]


def test_area_four_to_three() -> None:
    # Window i covers [4i/3, 4(i+1)/3): weights (3, 1), (2, 2), (1, 3) quarters.
    # Across 0 40 80 120: (0*3 + 40)/4 = 10, (40*2 + 80*2)/4 = 60, (80 + 120*3)/4 = 110.
    across = torch.tensor([0, 40, 80, 120], dtype=torch.uint8).expand(1, 4, 4).contiguous()
    assert area_resample(across, 4, 3).tolist() == [[[10, 60, 110]] * 3]
    assert area_resample(across.transpose(1, 2), 20, 15)[0].tolist() == [[10] * 3, [60] * 3, [110] * 3]
    # Both axes at once: only the first pixel is 160: 160 * 3/4 * 3/4 = 90 in the first window.
    corner = torch.zeros(1, 4, 4, dtype=torch.uint8)
    corner[0, 0, 0] = 160
    assert area_resample(corner, 4, 3).tolist() == [[[90, 0, 0], [0, 0, 0], [0, 0, 0]]]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_area_equals_exact_integration(q: int, p: int, n: int, m: int, seed: int) -> None:
    common = math.gcd(q, p)
    q, p = q // common, p // common
    pixels = noise(2, n * q, m * q, seed=seed)
    # Repeating every pixel p times and taking means of q x q blocks is the same integral.
    fine = np.kron(pixels.numpy().astype(np.int64), np.ones((1, p, p), np.int64))
    sums = fine.reshape(2, n * p, q, m * p, q).sum((2, 4))
    expected = np.floor(sums / q**2 + 0.5).astype(np.uint8)
    assert np.array_equal(area_resample(pixels, q, p).numpy(), expected)


def test_area_identity_and_range() -> None:
    pixels = noise(3, 8, 8)
    assert area_resample(pixels, 5, 5) is pixels
    white = torch.full((1, 1024, 1024), 255, dtype=torch.uint8)
    assert area_resample(white, 1024, 1).item() == 255


def test_area_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(3, 140, 70)
    whole = area_resample(pixels, 10, 7)
    monkeypatch.setattr(resample, "_CHUNK", 1)
    assert torch.equal(area_resample(pixels, 10, 7), whole)


@pytest.mark.parametrize("q", [4, 8, 16])
def test_means_over_blocks_equal_the_general_way(q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(2, 3 * q, 5 * q)
    pixels[0, :q], pixels[1, :q, :q] = 255, 0  # the largest sums, beside the smallest
    expected = resample._windows(pixels, q, 1).view(2, 3, 5)
    assert torch.equal(resample._means(pixels, q).view(2, 3, 5), expected)
    assert torch.equal(area_resample(pixels, 2 * q, 2), expected)
    assert torch.equal(area_resample(pixels.mT, q, 1), expected.mT)
    monkeypatch.setattr(resample, "_WORDS", 1)
    assert torch.equal(area_resample(pixels, q, 1), expected)


KERNEL = """
    import math, torch
    from arrcoc import area_kernel, config, image, resample
    noise = torch.Generator().manual_seed(0)
    for q, p in [(4, 1), (4, 3), (10, 7)]:
        planes = torch.randint(0, 256, (2, 2 * q, 3 * q), dtype=torch.uint8, generator=noise)
        expected = resample._windows(planes, q, p).view(2, 2 * p, 3 * p)
        assert torch.equal(area_kernel.resample(planes, q, p), expected), (q, p)
    white = torch.full((1, 16, 16), 255, dtype=torch.uint8)
    assert area_kernel.resample(white, 16, 1).item() == 255
    settings = config.build({"sides": (1, 2, 3, 4), "max_tiles": 16})
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=noise)
    frame = image.frame(pixels, settings, 8, torch.device("cpu"))
    index = torch.tensor([4, 0])
    for side, margin in [(8, 0), (16, 8), (24, 20), (32, 0)]:
        common = math.gcd(32, side)
        found = area_kernel.resample_tiles(pixels, index, 3, side, 32 // common, side // common, margin)
        assert torch.equal(found, image.tile_pixels(frame, side, index, margin)), (side, margin)
    assert area_kernel.resample_tiles(pixels, index[:0], 3, 8, 4, 1, 0).shape == (0, 3, 8, 8)
"""


def test_the_kernel_equals_torch() -> None:
    pytest.importorskip("triton")
    # Triton decides when it is imported whether it interprets kernels: so in a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = textwrap.dedent(KERNEL)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_kernel_equals_torch_on_cuda() -> None:
    for q, p in [(2, 1), (4, 1), (5, 1), (4, 3), (5, 2), (10, 7)]:
        pixels = noise(3, 7 * q, 33 * q)
        assert torch.equal(area_resample(pixels.cuda(), q, p).cpu(), area_resample(pixels, q, p)), (q, p)
