"""Examples as a pure function of seed and index, and a torch data set over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from arrcoc.demo.placards import layout, paraphrases, pictures, questions
from arrcoc.demo.placards.pictures import PictureQuestion
from arrcoc.demo.placards.records import Ask, Box, Example, Rng
from arrcoc.demo.placards.scene import Scene, render
from arrcoc.demo.placards.vocabulary import Split
from arrcoc.errors import ConfigError

PICTURE = "picture"
"""The family of easy-VQA's questions."""

_IDLE_PICTURE = 0.3
_LEAST_SIDE = {"where": 256, "compare": 256, PICTURE: 256}
_RANGES = ((1400, (6, 12)), (900, (4, 8)), (450, (3, 6)), (200, (1, 2)))

Canvas = int | tuple[int, int]


def families_for(canvas: Canvas) -> tuple[str, ...]:
    """Families that a canvas has room for, "picture" last; a 128-px canvas takes a single sign."""
    side = min(_size(canvas))
    return tuple(family for family in (*questions.FAMILIES, PICTURE) if side >= _LEAST_SIDE.get(family, 128))


def placard_range(canvas: Canvas) -> tuple[int, int]:
    """Default least and greatest number of placards: 1 at 128 px, 1-2 at 256, 3-6 at 512, 4-8 at 1024."""
    height, width = _size(canvas)
    return next((bounds for side, bounds in _RANGES if height * width >= side * side), (1, 1))


def sample(
    seed: int,
    index: int,
    split: Split,
    canvas: Canvas,
    families: Sequence[str] | None = None,
    *,
    placards: tuple[int, int] | None = None,
    photographs: Path | None = None,
) -> Example:
    """Draw one example: the same for the same arguments (and font and image files) in every process.

    Args:
        seed: of the whole data set, at least 0.
        index: of the example, at least 0.
        split: fonts, photographs, codes and wordings come from this split alone.
        canvas: side of the image in px, or (height, width): multiples of 128.
        families: drawn from with equal chance; by default `questions.FAMILIES` as far as the canvas has room.
            "picture" (easy-VQA) must be asked for; framed pictures then hang about in other questions too.
        placards: least and greatest number of placards; by default `placard_range`.
        photographs: folder of further photographs, split by file name.

    Raises:
        ConfigError: an argument outside these bounds, or "picture" without the package easy-vqa.
    """
    size = _size(canvas)
    _check_origin(seed, index, split)
    chosen = _checked_families(size, families)
    low, high = _checked_range(size, placards)
    if "compare" in chosen and high < 2:
        raise ConfigError(
            "one placard to compare", "two placards or more", "Raise placards, or leave compare out"
        )
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, int(split == "test"), *size]))
    family = chosen[rng.integers(len(chosen))]
    draft, row = _compose(rng, family, _number(rng, family, low, high), split)
    if row is None and PICTURE in chosen and min(size) > 256 and rng.random() < _IDLE_PICTURE:
        row = pictures.draw_question(rng, split)
    scene = render(rng, draft, split, size, row.image_id if row else None, photographs)
    text, answer, boxes = _asked(rng, draft.ask, scene, row, split, size)
    return Example(
        image=scene.image,
        question=text,
        answer=answer,
        family=family,
        targets=boxes,
        placards=scene.placards,
        ask=draft.ask,
        picture=scene.picture,
        seed=seed,
        index=index,
        split=split,
        background=scene.background,
    )


class PlacardDataset(Dataset[Example]):
    """Examples 0 .. length - 1 of a seed as a stateless map-style torch data set: any worker may draw any.

    Args:
        length: number of examples.
        canvases: canvas sizes, drawn with equal chance once for every `group` consecutive examples, so that
            an unshuffled batch of `group` shares one size.
        group: batch size.
        seed, split, families, placards, photographs: as for `sample`; families that a canvas has no room
            for are left out there.

    Raises:
        ConfigError: length or group below 1, or no canvas size.
    """

    def __init__(
        self,
        length: int,
        canvases: Sequence[Canvas],
        group: int = 1,
        seed: int = 0,
        split: Split = "train",
        families: Sequence[str] | None = None,
        placards: tuple[int, int] | None = None,
        photographs: Path | None = None,
    ) -> None:
        """Keep the arguments; nothing is drawn yet."""
        if length < 1 or group < 1 or not canvases:
            raise ConfigError(
                f"length {length}, group {group}, {len(canvases)} canvas sizes",
                "at least 1 of each",
                "Raise them",
            )
        self.length, self.canvases, self.group, self.seed = length, tuple(canvases), group, seed
        self.split, self.families, self.placards, self.photographs = split, families, placards, photographs

    def __len__(self) -> int:
        """Number of examples."""
        return self.length

    def canvas_of(self, index: int) -> Canvas:
        """Canvas size of an example."""
        rng = np.random.default_rng([self.seed, index // self.group])
        return self.canvases[rng.integers(len(self.canvases))]

    def __getitem__(self, index: int) -> Example:
        """Draw one example; IndexError outside 0 .. length - 1."""
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of {self.length}")
        canvas = self.canvas_of(index)
        families = self.families and [f for f in self.families if f in families_for(canvas)]
        return sample(
            self.seed,
            index,
            self.split,
            canvas,
            families,
            placards=self.placards,
            photographs=self.photographs,
        )


def _compose(
    rng: Rng, family: str, count: int, split: Split
) -> tuple[questions.Draft, PictureQuestion | None]:
    """A draft, and for a picture question its row; beside the picture hang the signs of a read question."""
    if family != PICTURE:
        return questions.compose(rng, family, count, split), None
    signs = questions.compose(rng, "read", count, split).specs
    return questions.Draft(Ask(PICTURE, PICTURE), signs), pictures.draw_question(rng, split)


def _number(rng: Rng, family: str, low: int, high: int) -> int:
    """How many signs: comparing needs two; beside a picture on a small canvas there is room for `low`."""
    if family == PICTURE and high <= 2:
        return low
    return int(rng.integers(max(low, 2) if family == "compare" else low, high + 1))


def _asked(
    rng: Rng, ask: Ask, scene: Scene, row: PictureQuestion | None, split: Split, size: tuple[int, int]
) -> tuple[str, str, tuple[Box, ...]]:
    """Wording, answer and target boxes."""
    if ask.family == PICTURE:
        assert row is not None
        assert scene.picture is not None
        return paraphrases.word(rng, ask, split, row.question), row.answer, (scene.picture.box,)
    boxes = tuple(placard.box for placard in questions.targets(ask, scene.placards))
    return paraphrases.word(rng, ask, split), questions.answer(ask, scene.placards, *size), boxes


def _size(canvas: Canvas) -> tuple[int, int]:
    height, width = (canvas, canvas) if isinstance(canvas, int) else canvas
    if min(height, width) < 128 or height % 128 or width % 128:
        raise ConfigError(
            f"a canvas of {height} x {width} px", "multiples of 128 px", "Choose 512, 1024 or 2048"
        )
    return height, width


def _check_origin(seed: int, index: int, split: str) -> None:
    if seed < 0 or index < 0:
        raise ConfigError(f"seed {seed}, index {index}", "whole numbers from 0", "Count both from 0")
    if split not in ("train", "test"):
        raise ConfigError(f"split {split!r}", "train, test", "Choose one of these")


def _checked_families(size: tuple[int, int], families: Sequence[str] | None) -> tuple[str, ...]:
    possible = families_for(size)
    chosen = tuple(f for f in possible if f != PICTURE) if families is None else tuple(families)
    if not chosen or not set(chosen) <= set(possible):
        raise ConfigError(
            f"question families {list(chosen)} on a canvas of {size[0]} x {size[1]} px",
            ", ".join(possible),
            "Choose among these, or a larger canvas",
        )
    return chosen


def _checked_range(size: tuple[int, int], placards: tuple[int, int] | None) -> tuple[int, int]:
    low, high = placards or placard_range(size)
    most = layout.capacity(*size)
    if not 1 <= low <= high <= most:
        raise ConfigError(
            f"{low} to {high} placards on a canvas of {size[0]} x {size[1]} px",
            f"1 to {most} placards",
            "Choose fewer placards or a larger canvas",
        )
    return low, high
