"""The host's half of a composed batch: questions, and which part of the bank goes where; no pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from arrcoc.demo.placards import PICTURE, Example, layout, paraphrases, placard_range, questions, sample
from arrcoc.demo.placards.distractors import most
from arrcoc.demo.placards.layout import Footprint
from arrcoc.demo.placards.records import Ask, Box, Kind, Placard, Rng, Spec, shifted
from arrcoc.demo.placards.scene import Shadow, shadows
from arrcoc.demo.placards.vocabulary import neighbours
from arrcoc.demo.training.bank import Index
from arrcoc.demo.training.batches import Batch, Prompts, StepDraw, collate, draw_step, step_families
from arrcoc.demo.training.recipe import Recipe

_TRIES = 40
_TIGHT = 256
_TIGHT_SIGN = 84
"""Longest box of a sign, in px, on a canvas that is tight for two."""


class Places(NamedTuple):
    """Where the parts of a bank go; the first column of every table is the example.

    Attributes:
        crops: int64 [n, 6]: example, background, top, left, side of the crop, 1 if flipped.
        grades: fp32 [n, 3, 2]: factor and offset of each channel.
        strays: int64 [k, 5]: example, order within it, sprite, x, y.
        signs: int64 [k, 5], likewise.
        shadows: fp64 [k, 8]: example, order, centre x and y, axes row by row.
    """

    crops: Tensor
    grades: Tensor
    strays: Tensor
    signs: Tensor
    shadows: Tensor


class Sketch(NamedTuple):
    """A batch without its composed images: `batch.images` holds those of the examples `drawn` alone."""

    batch: Batch
    drawn: tuple[int, ...]
    places: Places


class Scene(NamedTuple):
    """One canvas: the example, its image left blank, and the parts that make it up."""

    example: Example
    crop: tuple[int, int, int, int, int]
    grade: NDArray[np.float32]
    strays: list[tuple[int, int, int]]
    signs: list[tuple[int, int, int]]
    shadows: list[Shadow]


class SketchDataset(Dataset[Sketch]):
    """Item i is the sketch of step `start + i` for one rank; all steps belong to the bank of `index`."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: Prompts,
        steps: range,
        rank: int,
        index: Index,
        photographs: Path | None = None,
    ) -> None:
        """Args: recipe; how prompts are written; which steps; which process; the bank; more photographs."""
        self.recipe, self.prompts, self.steps, self.rank, self.index = recipe, prompts, steps, rank, index
        self.photographs = photographs

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __getitem__(self, item: int) -> Sketch:
        """The sketch of one step; pictures of easy-VQA are drawn, for the bank holds none."""
        torch.set_num_threads(1)
        drawn = draw_step(self.recipe, self.steps[item], self.rank)
        made = [self._one(index, drawn) for index in drawn.indices]
        examples = [one.example if isinstance(one, Scene) else one for one in made]
        whole = tuple(row for row, one in enumerate(made) if not isinstance(one, Scene))
        images = np.zeros((len(whole), drawn.canvas, drawn.canvas, 3), np.uint8)
        for place, row in enumerate(whole):
            images[place] = examples[row].image
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        batch = collate(
            examples, self.prompts, self.recipe.tile, drawn.canvas, drawn.mode, drawn.plan_seed, pixels
        )
        scenes = [(row, one) for row, one in enumerate(made) if isinstance(one, Scene)]
        return Sketch(batch, whole, _places(scenes))

    def _one(self, index: int, drawn: StepDraw) -> Scene | Example:
        families = step_families(drawn, index)
        if families == [PICTURE]:
            return sample(
                self.recipe.seed, index, "train", drawn.canvas, families, photographs=self.photographs
            )
        return draw_scene(self.recipe.seed, index, drawn.canvas, families, self.index)


def draw_scene(seed: int, number: int, canvas: int, families: list[str], index: Index) -> Scene:
    """Invent a canvas of the training split from the parts of a bank: a pure function of its arguments.

    Args:
        seed: of the run.
        number: of the example.
        canvas: side in px.
        families: drawn from with equal chance, "picture" excepted.
        index: of the bank.
    """
    rng = np.random.default_rng([seed, number, canvas, 4])
    family = families[rng.integers(len(families))]
    low, high = placard_range(canvas)
    count = int(rng.integers(max(low, 2) if family == "compare" else low, high + 1))
    ask, chosen, corners = cast(rng, family, count, index, _TIGHT_SIGN if canvas == _TIGHT else 1 << 10)
    sprites = [index.signs[place].sprite for place in chosen]
    feet = [
        Footprint(sprite.alpha.shape[1], sprite.alpha.shape[0], sprite.code_box, corner)
        for sprite, corner in zip(sprites, corners, strict=True)
    ]
    boxes = layout.place(rng, feet, canvas, canvas)
    placards = tuple(_placard(index, place, box) for place, box in zip(chosen, boxes, strict=True))
    strays = _strays(rng, index, ask, boxes, canvas)
    example = Example(
        image=np.broadcast_to(np.zeros((), np.uint8), (canvas, canvas, 3)),
        question=paraphrases.word(rng, ask, "train"),
        answer=questions.answer(ask, placards, canvas, canvas),
        family=family,
        targets=tuple(placard.box for placard in questions.targets(ask, placards)),
        placards=placards,
        ask=ask,
        picture=None,
        seed=seed,
        index=number,
        split="train",
        background="bank",
    )
    signs = [(place, box[0], box[1]) for place, box in zip(chosen, boxes, strict=True)]
    return Scene(example, _crop(rng, index, canvas), _grade(rng), strays, signs, shadows(rng, boxes))


def cast(
    rng: Rng, family: str, count: int, index: Index, longest: int
) -> tuple[Ask, list[int], list[str | None]]:
    """A question, the pre-drawn signs for it in drawing order, and the corner asked for each.

    Kinds come from `questions.compose`, codes from the bank; a pair that must carry equal or nearly equal
    codes is taken from one quad.
    """
    for _ in range(_TRIES):
        draft = questions.compose(rng, family, count, "train")
        # The same draft again and again: a form that is harder to fill must not become rarer.
        for _ in range(_TRIES):
            found = _chosen(rng, draft, index, longest)
            if found is not None:
                return found[0], found[1], [spec.corner for spec in draft.specs]
    raise AssertionError(f"a bank of {len(index.signs)} signs is too small for {count} of them")


def _chosen(rng: Rng, draft: questions.Draft, index: Index, longest: int) -> tuple[Ask, list[int]] | None:
    pair = _pair(draft.ask, draft.specs)
    places: dict[int, int] = {}
    if pair is not None:
        partners = _partners(rng, draft.specs, pair, index, longest)
        if partners is None:
            return None
        places = dict(zip(pair, partners, strict=True))
    for position, spec in enumerate(draft.specs):
        if position not in places:
            taken = {index.signs[place].spec.code for place in places.values()}
            place = _pick(rng, index, Kind(spec.colour, spec.shape), taken, longest)
            if place is None:
                return None
            places[position] = place
    chosen = [places[position] for position in range(len(draft.specs))]
    ask = _restated(draft, [index.signs[place].spec for place in chosen], pair)
    return None if ask is None else (ask, chosen)


def _restated(draft: questions.Draft, signs: list[Spec], pair: tuple[int, int] | None) -> Ask | None:
    """The question about the chosen signs; None where they no longer allow it."""
    ask = draft.ask
    if pair is not None and len({(sign.colour, sign.shape) for sign in signs}) < len(signs):
        return None
    if ask.family == "find":
        asked = next(i for i, spec in enumerate(draft.specs) if spec.code == ask.code)
        return Ask(ask.family, ask.form, code=signs[asked].code)
    if ask.form == "compare.same":
        assert pair is not None
        return Ask(ask.family, ask.form, tuple(Kind(signs[i].colour, signs[i].shape) for i in pair))
    if ask.form == "compare.first":
        firsts = [s.code[0] for s in signs if any(kind.matches(s.colour, s.shape) for kind in ask.kinds)]
        # Digits have no place in the alphabet, and equal letters would turn on the second glyph.
        return ask if len(set(firsts)) == 2 and all(glyph.isalpha() for glyph in firsts) else None
    return ask


def _pair(ask: Ask, specs: tuple[Spec, ...]) -> tuple[int, int] | None:
    """Positions of two signs whose codes are related: those compared for equality, or a find's near miss."""
    if ask.form == "compare.same":
        first, second = (
            next(i for i, s in enumerate(specs) if kind.matches(s.colour, s.shape)) for kind in ask.kinds
        )
        return first, second
    if ask.family == "find":
        asked = next(i for i, spec in enumerate(specs) if spec.code == ask.code)
        near = set(neighbours(specs[asked].code))
        return next(((asked, i) for i, spec in enumerate(specs) if spec.code in near), None)
    return None


def _partners(
    rng: Rng, specs: tuple[Spec, ...], pair: tuple[int, int], index: Index, longest: int
) -> tuple[int, int] | None:
    """Two signs of one quad; for unrelated codes the second gives way to another sign of its kind.

    So the pair's kinds are drawn alike whatever the answer is, and give nothing away.
    """
    first, codes = int(rng.integers(len(index.signs))), (specs[pair[0]].code, specs[pair[1]].code)
    sign = index.signs[first]
    # In a quad twins are 0 and 1, 2 and 3; 0 and 2 differ in one glyph, and so do 1 and 3.
    second = first ^ (1 if codes[0] == codes[1] else 2)
    if codes[0] != codes[1] and codes[1] not in neighbours(codes[0]):
        spec = index.signs[second].spec
        taken = {sign.spec.code, spec.code}
        other = _pick(rng, index, Kind(spec.colour, spec.shape), taken, longest)
        if other is None:
            return None
        second = other
    fits = all(max(index.signs[i].sprite.alpha.shape) <= longest for i in (first, second))
    return (first, second) if fits else None


def _pick(rng: Rng, index: Index, kind: Kind, taken: set[str], longest: int) -> int | None:
    """A sign of a kind whose code is not taken, or None after some tries."""
    places = index.by_kind.get(kind, ())
    for _ in range(_TRIES if places else 0):
        place = places[rng.integers(len(places))]
        sign = index.signs[place]
        if sign.spec.code not in taken and max(sign.sprite.alpha.shape) <= longest:
            return place
    return None


def _placard(index: Index, place: int, box: Box) -> Placard:
    spec, sprite, font = index.signs[place]
    code_box = shifted(sprite.code_box, box[0], box[1])
    return Placard(spec.colour, spec.shape, spec.code, box, code_box, sprite.glyphs + box[:2], font)


def _strays(rng: Rng, index: Index, ask: Ask, taken: list[Box], canvas: int) -> list[tuple[int, int, int]]:
    """Distractors clear of all signs and of each other; no blank sign is of an asked kind."""
    found: list[tuple[int, int, int]] = []
    boxes: list[Box] = []
    for _ in range(int(rng.integers(0, most(canvas, canvas) + 1))):
        place = int(rng.integers(len(index.strays)))
        size, kind = index.strays[place]
        asked = kind is not None and any(k.matches(str(kind.colour), str(kind.shape)) for k in ask.kinds)
        box = None if asked else layout.free_box(rng, size, [*taken, *boxes], canvas, canvas)
        if box is not None:
            found.append((place, box[0], box[1]))
            boxes.append(box)
    return found


def _crop(rng: Rng, index: Index, canvas: int) -> tuple[int, int, int, int, int]:
    """Background, top, left, side and flip: zoomed by 0.7 to 2.2, or as far as the background reaches."""
    side = min(index.side, round(canvas / rng.uniform(0.7, 2.2)))
    top, left = (int(v) for v in rng.integers(0, index.side - side + 1, 2))
    return int(rng.integers(index.backgrounds)), top, left, side, int(rng.integers(2))


def _grade(rng: Rng) -> NDArray[np.float32]:
    """Factor and offset [3, 2] of each channel: a random contrast, brightness and colour cast."""
    contrast, brightness, casts = rng.uniform(0.75, 1.1), rng.uniform(-20, 20), rng.uniform(0.9, 1.1, 3)
    offset = 128 * (1 - contrast) + brightness
    return np.stack([contrast * casts, offset * casts], 1).astype(np.float32)


def _places(scenes: list[tuple[int, Scene]]) -> Places:
    def table(rows: list[list[float]], width: int, kind: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=kind).reshape(len(rows), width)

    def pasted(name: str) -> Tensor:
        rows = [[row, i, *part] for row, scene in scenes for i, part in enumerate(getattr(scene, name))]
        return table(rows, 5, torch.long)

    cast_shadows = [
        [row, i, (s.region[0] + s.region[2]) / 2, (s.region[1] + s.region[3]) / 2, *s.axes.ravel()]
        for row, scene in scenes
        for i, s in enumerate(scene.shadows)
    ]
    return Places(
        crops=table([[row, *scene.crop] for row, scene in scenes], 6, torch.long),
        grades=torch.from_numpy(np.array([s.grade for _, s in scenes], np.float32).reshape(-1, 3, 2)),
        strays=pasted("strays"),
        signs=pasted("signs"),
        shadows=table(cast_shadows, 8, torch.double),
    )
