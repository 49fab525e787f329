"""Canvases to put signs on: crops of real photographs, and procedural textures."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage

from arrcoc.demo.placards.records import Image, Rng
from arrcoc.demo.placards.vocabulary import Split, package_folder, split_of
from arrcoc.errors import ConfigError, ImageError

_PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coins.png",
        "grass.png",
        "brick.png",
        "ihc.png",
        "moon.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "test": ("coffee.png", "gravel.png", "hubble_deep_field.jpg", "motorcycle_left.png"),
}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_LONGEST = 1280
"""Photographs are kept in memory at this length at most, in px: about 3 MB each."""

Plane = NDArray[np.uint8]


def background(rng: Rng, split: Split, height: int, width: int, folder: Path | None) -> tuple[Image, str]:
    """A canvas uint8 [height, width, 3] and the name of its photograph or texture, half of each.

    Raises:
        ConfigError: `folder` holds no photograph of this split.
        ImageError: a photograph cannot be read.
    """
    if rng.random() < 0.5:
        paths = photographs(split, folder)
        path = paths[rng.integers(len(paths))]
        return _from_photograph(rng, path, height, width), path.name
    name = list(TEXTURES)[rng.integers(len(TEXTURES))]
    plane = TEXTURES[name](rng, height, width)
    return _coloured(plane, _palette(rng)), name


@lru_cache(maxsize=8)
def photographs(split: Split, folder: Path | None = None) -> tuple[Path, ...]:
    """scikit-image's photographs of a split, and those in `folder` (not below) whose name hashes to it."""
    own = [package_folder("skimage") / "data" / name for name in _PHOTOGRAPHS[split]]
    if folder is None:
        return tuple(own)
    found = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in _SUFFIXES]
    more = [path for path in found if split_of(path.name) == split]
    if not more:
        raise ConfigError(
            f"{folder} with {len(found)} photographs, none of them for the {split} split",
            f"a folder of {', '.join(sorted(_SUFFIXES))} files",
            "Add photographs: one file in five, chosen by name, belongs to the test split",
        )
    return tuple(own + more)


@lru_cache(maxsize=256)
def _photograph(path: Path) -> Image:
    """Pixels uint8 [h, w, 3], at most `_LONGEST` px long: a crop is a slice, and nothing is decoded twice."""
    try:
        with PilImage.open(path) as opened:
            opened.draft("RGB", (_LONGEST, _LONGEST))
            photo = opened.convert("RGB")
    except OSError as error:
        raise ImageError(
            f"{path.name}: {error}", "a readable photograph", "Remove or replace the file"
        ) from None
    photo.thumbnail((_LONGEST, _LONGEST), PilImage.Resampling.BICUBIC, reducing_gap=2.0)
    return np.array(photo)


def preload(split: Split, folder: Path | None = None) -> int:
    """Decode the photographs of a split once, for worker processes forked later to share; returns how many.

    Raises:
        ConfigError: `folder` holds no photograph of this split.
        ImageError: a photograph cannot be read.
    """
    paths = photographs(split, folder)[: _photograph.cache_parameters()["maxsize"]]
    for path in paths:
        _photograph(path)
    return len(paths)


def _from_photograph(rng: Rng, path: Path, height: int, width: int) -> Image:
    """A random crop and zoom, flipped and graded; small photographs go on as their own mirror image."""
    photo = _photograph(path)
    longest = max(height / photo.shape[0], width / photo.shape[1])
    zoom = max(rng.uniform(0.7, 2.2), longest / 1.5)
    rows, columns = int(np.ceil(height / zoom)), int(np.ceil(width / zoom))
    top, left = int(rng.integers(photo.shape[0])), int(rng.integers(photo.shape[1]))
    crop = _mirrored(photo, top, left, rows, columns)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    graded = PilImage.fromarray(np.ascontiguousarray(crop)).point(_grading(rng))
    return _resized(np.array(graded), height, width)


def _resized(pixels: Image, height: int, width: int) -> Image:
    """Bilinear and antialiased; torch's uint8 kernel takes a fraction of PIL's time."""
    # With the batch axis first the strides say channels-last, which torch resizes several times faster.
    planes = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _mirrored(photo: Image, top: int, left: int, rows: int, columns: int) -> Image:
    """Crop [rows, columns] from the plane that a photograph and its mirror images tile."""
    for axis, start, count in ((0, top, rows), (1, left, columns)):
        size = photo.shape[axis]
        runs = _runs(min(start, max(0, size - count)), count, size)
        strips = [photo[run] if axis == 0 else photo[:, run] for run in runs]
        photo = strips[0] if len(strips) == 1 else np.concatenate(strips, axis)
    return photo


def _runs(first: int, count: int, size: int) -> list[slice]:
    """Slices of an axis of `size` that give `count` positions from `first` on, back and forth."""
    runs = []
    while count > 0:
        back, phase = divmod(first % (2 * size), size)
        length = min(count, size - phase)
        stop = size - 1 - phase - length
        runs.append(
            slice(size - 1 - phase, None if stop < 0 else stop, -1) if back else slice(phase, phase + length)
        )
        first, count = first + length, count - length
    return runs


def _grading(rng: Rng) -> list[int]:
    """Look-up table [3 x 256] of a random contrast, brightness and colour cast."""
    level = np.arange(256)
    contrast, brightness = rng.uniform(0.55, 1.05), rng.uniform(-25, 45)
    casts = rng.uniform(0.9, 1.1, 3)
    graded = ((level - 128) * contrast + 128 + brightness)[None] * casts[:, None]
    return [int(v) for v in np.clip(graded, 0, 255).ravel()]


def _octaves(rng: Rng, height: int, width: int, cells: int, count: int) -> Plane:
    """Value noise: `count` octaves, the coarsest of `cells` cells a side, each half as strong as the last."""
    size = width // 4, height // 4
    total = np.zeros(size[::-1], np.float32)
    for octave in range(count):
        grid = rng.integers(0, 256, (cells << octave, cells << octave), dtype=np.uint8)
        layer = PilImage.fromarray(grid).resize(size, PilImage.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) / 2**octave
    low, high = float(total.min()), float(total.max())
    return _enlarged(((total - low) * (255 / max(high - low, 1.0))).astype(np.uint8), height, width)


def _enlarged(plane: Plane, height: int, width: int) -> Plane:
    return _resized(plane[..., None], height, width)[..., 0]


def _clouds(rng: Rng, height: int, width: int) -> Plane:
    return _grained(rng, _octaves(rng, height, width, int(rng.integers(3, 9)), 5))


def _plaster(rng: Rng, height: int, width: int) -> Plane:
    return _grained(rng, _octaves(rng, height, width, int(rng.integers(24, 64)), 3))


def _marble(rng: Rng, height: int, width: int) -> Plane:
    """Veins: level lines of a slowly varying plane; uint8 wraps around on purpose."""
    slow = _octaves(rng, height, width, 4, 3)
    across = ((np.arange(width) * rng.uniform(0.2, 0.9)).astype(np.int64) % 256).astype(np.uint8)
    rings = slow * np.uint8(rng.integers(3, 7)) + across
    folded: Plane = np.minimum(rings, ~rings) << 1
    return folded


def _gradient(rng: Rng, height: int, width: int) -> Plane:
    slope = rng.uniform(-1, 1, 2)
    along = np.linspace(-1, 1, 64)
    plane = (slope[0] * along[:, None] + slope[1] * along[None]) / (np.abs(slope).sum() + 1e-9)
    return _grained(rng, _enlarged(((plane + 1) * 127).astype(np.uint8), height, width))


def _stripes(rng: Rng, height: int, width: int) -> Plane:
    """Upright, level or slanted at 45 degrees."""
    period, share = int(rng.integers(12, 120)), rng.uniform(0.3, 0.7)
    along = np.arange(height + width) % period < share * period
    line = along.astype(np.uint8) * np.uint8(rng.integers(60, 170)) + np.uint8(40)
    way = rng.integers(3)
    if way == 0:
        return _mottled(rng, np.broadcast_to(line[:width], (height, width)))
    if way == 1:
        return _mottled(rng, np.broadcast_to(line[:height, None], (height, width)))
    return _mottled(rng, np.lib.stride_tricks.sliding_window_view(line, width)[:height])


def _bricks(rng: Rng, height: int, width: int) -> Plane:
    tall, joint = int(rng.integers(18, 56)), int(rng.integers(2, 6))
    wide = int(tall * rng.uniform(1.6, 2.6))
    wall = np.full((height, width), 30, np.uint8)
    for row in range(-(-height // tall)):
        x = np.arange(width) + row % 2 * (wide // 2)
        course = rng.integers(90, 190, width // wide + 2, dtype=np.uint8)[x // wide]
        course[x % wide < joint] = 30
        wall[row * tall + joint : (row + 1) * tall] = course
    return _mottled(rng, wall)


def _checks(rng: Rng, height: int, width: int) -> Plane:
    side = int(rng.integers(16, 100))
    first, second = (rng.integers(40, 190, 2)).astype(np.uint8)
    pair = np.repeat(np.array([(first, second), (second, first)]), side, axis=0).repeat(side, axis=1)
    return _mottled(rng, _tiled(pair, height, width))


def _dots(rng: Rng, height: int, width: int) -> Plane:
    pitch = int(rng.integers(24, 90))
    axis = np.arange(pitch) - pitch / 2
    one = np.hypot(axis[:, None], axis[None]) < pitch * rng.uniform(0.2, 0.4)
    return _mottled(
        rng, _tiled(one.astype(np.uint8) * np.uint8(rng.integers(40, 150)) + np.uint8(50), height, width)
    )


def _mottled(rng: Rng, plane: Plane) -> Plane:
    """Uneven light: the pattern averaged with noise, three to one."""
    noise = _octaves(rng, plane.shape[0], plane.shape[1], 4, 4)
    mottled: Plane = plane - (plane >> 2) + (noise >> 2)
    return mottled


def _grained(rng: Rng, plane: Plane) -> Plane:
    """Fine grain of a few grey levels."""
    grain = rng.integers(0, 14, (256, 256), dtype=np.uint8)
    grained: Plane = plane - (plane >> 4) + _tiled(grain, plane.shape[0], plane.shape[1])
    return grained


def _tiled(tile: Plane, height: int, width: int) -> Plane:
    return np.tile(tile, (height // tile.shape[0] + 1, width // tile.shape[1] + 1))[:height, :width]


def _coloured(plane: Plane, palette: Image) -> Image:
    """Look every level up in a palette [256, 3]; PIL does it several times faster than indexing."""
    picture = PilImage.fromarray(plane).convert("L")
    picture.putpalette(palette.tobytes())
    return np.array(picture.convert("RGB"))


def _palette(rng: Rng) -> Image:
    """A smooth map [256, 3] between three muted colours."""
    stops = rng.uniform(40, 225, (3, 1)) + rng.uniform(-45, 45, (3, 3))
    level = np.linspace(0, 1, 256)
    channels = [np.interp(level, (0, 0.5, 1), stops[:, c]) for c in range(3)]
    return np.clip(np.stack(channels, 1), 0, 255).astype(np.uint8)


TEXTURES: dict[str, Callable[[Rng, int, int], Plane]] = {
    "clouds": _clouds,
    "plaster": _plaster,
    "marble": _marble,
    "gradient": _gradient,
    "stripes": _stripes,
    "bricks": _bricks,
    "checks": _checks,
    "dots": _dots,
}
"""Procedural textures: each gives a plane uint8 [height, width] that a palette colours."""
