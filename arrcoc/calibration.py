"""Tiles of the user's own images, as the LOD engines will meet them: what float8 plans are calibrated on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arrcoc import image, pixels
from arrcoc.config import Config
from arrcoc.errors import ConfigError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
MOST_TILES = 64
"""Tiles of each LOD, unless there are more images than that."""


def read_tiles(folder: Path, config: Config, token_px: int, most: int = MOST_TILES) -> list[Tensor]:
    """Cut tiles from every image of a folder, evenly spaced over each and equally many of each.

    Args:
        folder: of images; other files are passed over.
        config: its sides, halo and limits.
        token_px: pixels along a token's edge.
        most: tiles of each LOD in all; at least one of each image.

    Returns:
        For each LOD, uint8 [K, 3, e, e] with e of a tile and its halo, on the CPU; images by name.

    Raises:
        ConfigError: not a folder, or no images in it.
        ImageError: an image cannot be read.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        given = f"calibration on {folder}, which has no images"
        raise ConfigError(given, f"a folder with {', '.join(sorted(SUFFIXES))}", "Name one with your images")
    cuts: list[list[Tensor]] = [[] for _ in config.sides]
    cpu = torch.device("cpu")
    for path in files:
        frame = image.frame(pixels.decode(path, config.max_source_pixels), config, token_px, cpu)
        count = min(frame.grid.count, max(1, most // len(files)))
        chosen = torch.linspace(0, frame.grid.count - 1, count).round().long()
        for cut, side in zip(cuts, config.sides, strict=True):
            cut.append(image.tile_pixels(frame, side * token_px, chosen, config.halo * token_px))
    return [torch.cat(cut) for cut in cuts]
