"""Framed pictures from easy-VQA (V. Zhou, 2019; MIT licence; optional package easy-vqa) and its questions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PilImage

from arrcoc.demo.placards.drawing import Sprite
from arrcoc.demo.placards.records import Rng
from arrcoc.demo.placards.vocabulary import Split
from arrcoc.errors import ConfigError

SIDE = 64
"""Width and height of an easy-VQA picture, in px."""

_GROUPS = (("yes",), ("no",), ("circle", "rectangle", "triangle"))
"""Answers drawn from with equal chance; all others, the colours, are the fourth group."""


class PictureQuestion(NamedTuple):
    """One row of easy-VQA."""

    question: str
    answer: str
    image_id: int


def available() -> bool:
    """Whether the package easy-vqa is installed."""
    return importlib.util.find_spec("easy_vqa") is not None


@cache
def rows(split: Split) -> tuple[PictureQuestion, ...]:
    """easy-VQA's own rows of a split: 38,575 for training on 4,000 pictures, 9,673 for testing on 1,000.

    Raises:
        ConfigError: the package is not installed.
    """
    text = (_folder() / split / "questions.json").read_text(encoding="utf-8")
    return tuple(PictureQuestion(*row) for row in json.loads(text))


def draw_question(rng: Rng, split: Split) -> PictureQuestion:
    """A row of the split: yes, no, a shape or a colour with equal chance."""
    group = _grouped(split)[rng.integers(len(_GROUPS) + 1)]
    return group[rng.integers(len(group))]


@cache
def pictured(split: Split) -> tuple[int, ...]:
    """Ids of the pictures that the rows of a split ask about, in ascending order."""
    return tuple(sorted({row.image_id for row in rows(split)}))


def balanced(split: Split, shown: Collection[int]) -> tuple[tuple[PictureQuestion, ...], ...]:
    """The rows about the pictures `shown`, in the groups of `draw_question` as far as they have any."""
    kept = (tuple(row for row in group if row.image_id in shown) for group in _grouped(split))
    return tuple(group for group in kept if group)


def framed(rng: Rng, image_id: int, split: Split, largest: float = 2.0) -> Sprite:
    """The picture, enlarged 1 to `largest` times, in a frame of 4 to 9 px."""
    side, edge = int(SIDE * rng.uniform(1.0, largest)), int(rng.integers(4, 10))
    picture = np.asarray(_picture(split, image_id).resize((side, side), PilImage.Resampling.BILINEAR))
    wood = np.array(_FRAMES[rng.integers(len(_FRAMES))]) + rng.uniform(-12, 12, 3)
    full = side + 2 * edge
    rgb = np.broadcast_to(np.clip(wood, 0, 255).astype(np.uint8), (full, full, 3)).copy()
    rgb[edge - 1 : full - edge + 1, edge - 1 : full - edge + 1] //= 2
    rgb[edge : full - edge, edge : full - edge] = picture
    return Sprite(rgb, np.ones((full, full), np.float32), (0, 0, full, full), np.zeros((0, 2), np.float32))


_FRAMES = ((120, 82, 48), (196, 164, 92), (40, 38, 36), (228, 224, 214), (90, 96, 104))


@cache
def _grouped(split: Split) -> tuple[tuple[PictureQuestion, ...], ...]:
    named = {word for group in _GROUPS for word in group}
    groups = [tuple(row for row in rows(split) if row.answer in group) for group in _GROUPS]
    return (*groups, tuple(row for row in rows(split) if row.answer not in named))


@lru_cache(maxsize=5000)
def _picture(split: Split, image_id: int) -> PilImage.Image:
    with PilImage.open(_folder() / split / "images" / f"{image_id}.png") as opened:
        return opened.convert("RGB")


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ConfigError(
            'the question family "picture" without the package easy-vqa',
            "the other families",
            "Install it with pip install easy-vqa --no-deps",
        )
    return Path(spec.origin).parent / "data"
