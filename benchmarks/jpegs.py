"""JPEG files for benchmarks: photographs with a camera's grain, at any size, the same bytes every time."""

from __future__ import annotations

import io

import numpy as np
import skimage.data
from PIL import Image

_EDGE = 896  # pixels of one photograph in the mosaic
_GRAIN = 3.0  # standard deviation of the noise, in levels
_QUALITY = 90


def photographs(height: int, width: int, seed: int = 0) -> Image.Image:
    """A mosaic of four of scikit-image's photographs, enlarged, mirrored on to fill height x width pixels.

    Args:
        height, width: pixels.
        seed: of the grain, which also makes two mosaics differ in every tile.
    """
    sources = (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket())
    panes = [np.asarray(Image.fromarray(s).resize((_EDGE, _EDGE), Image.Resampling.BICUBIC)) for s in sources]
    base = np.block([[[panes[0]], [panes[1]]], [[panes[2]], [panes[3]]]])
    grain = np.random.default_rng(seed).normal(0, _GRAIN, base.shape).round().astype(np.int16)
    rows, cols = -(-height // len(base)), -(-width // len(base))
    panels = [[_panel(base, grain, row, col) for col in range(cols)] for row in range(rows)]
    whole = panels[0][0] if rows == cols == 1 else np.block([[[panel] for panel in row] for row in panels])
    return Image.fromarray(np.ascontiguousarray(whole[:height, :width]))


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    """`photographs` as a JPEG file: quality 90, 4:2:0, baseline."""
    return encoded(photographs(height, width, seed))


def encoded(image: Image.Image) -> bytes:
    """An image as a JPEG file: quality 90, 4:2:0, baseline."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _panel(base: np.ndarray, grain: np.ndarray, row: int, col: int) -> np.ndarray:
    """A copy of the mosaic, mirrored at odd places, with its grain shifted: no two copies share a tile."""
    turned = base[:: -1 if row % 2 else 1, :: -1 if col % 2 else 1]
    shifted = np.roll(grain, (37 * row, 53 * col), (0, 1))
    return (turned + shifted).clip(0, 255).astype(np.uint8)
