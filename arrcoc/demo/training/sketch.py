"""The host's half of a composed batch: questions, and which part of the bank goes where; no pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from arrcoc.demo.placards import PICTURE, Example, layout, paraphrases, placard_range, questions
from arrcoc.demo.placards.distractors import most
from arrcoc.demo.placards.drawing import Sprite
from arrcoc.demo.placards.layout import Footprint
from arrcoc.demo.placards.records import Ask, Box, Kind, Picture, Placard, Rng, Spec, intersects, shifted
from arrcoc.demo.placards.scene import Shadow, shadows
from arrcoc.demo.placards.vocabulary import neighbours
from arrcoc.demo.training.bank import Index, Question
from arrcoc.demo.training.batches import Batch, Prompts, StepDraw, collate, draw_step, step_families
from arrcoc.demo.training.places import Part, Places, pack
from arrcoc.demo.training.recipe import Recipe

_TRIES = 40
_TIGHT = 256
_TIGHT_SIGN = 84
"""Longest box of a sign, in px, on a canvas that is tight for two."""
_SIGN_SHADOW, _STRAY_SHADOW = 0.35, 0.2
"""How dark drop shadows are; as in `drawing.paste` and `distractors.scatter`."""


class Sketch(NamedTuple):
    """A batch without its images, and what they are composed of."""

    batch: Batch
    places: Places


class Scene(NamedTuple):
    """One canvas: the example, its image left blank, and the parts that make it up, in drawing order."""

    example: Example
    crop: tuple[int, int, int, int, int]
    grade: NDArray[np.float32]
    parts: list[Part]
    shadows: list[Shadow]


class SketchDataset(Dataset[Sketch]):
    """Item i is the sketch of step `steps[i]` for one rank."""

    def __init__(self, recipe: Recipe, prompts: Prompts, steps: range, rank: int, index: Index) -> None:
        """Args: recipe; how prompts are written; which steps; which process; the bank."""
        self.recipe, self.prompts, self.steps, self.rank, self.index = recipe, prompts, steps, rank, index

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __getitem__(self, item: int) -> Sketch:
        """The sketch of one step."""
        torch.set_num_threads(1)
        drawn = draw_step(self.recipe, self.steps[item], self.rank)
        scenes = [
            draw_scene(self.recipe.seed, number, drawn.canvas, self._families(drawn, number), self.index)
            for number in drawn.indices
        ]
        blank = torch.empty((0, 3, drawn.canvas, drawn.canvas), dtype=torch.uint8)
        examples = [scene.example for scene in scenes]
        batch = collate(
            examples, self.prompts, self.recipe.tile, drawn.canvas, drawn.mode, drawn.plan_seed, blank
        )
        places = pack(
            [scene.crop for scene in scenes],
            [scene.grade for scene in scenes],
            [scene.parts for scene in scenes],
            [scene.shadows for scene in scenes],
            drawn.canvas,
        )
        return Sketch(batch, places)

    def _families(self, drawn: StepDraw, number: int) -> list[str]:
        """A bank without pictures asks the other questions instead."""
        if not asked(self.index, drawn.canvas):
            drawn = drawn._replace(pictures=0.0)
        return step_families(drawn, number)


def asked(index: Index, canvas: int) -> tuple[tuple[Question, ...], ...]:
    """The bank's questions about pictures that have room on a canvas, in groups of equal chance."""
    return index.asked_small if canvas == _TIGHT else index.asked


def draw_scene(seed: int, number: int, canvas: int, families: list[str], index: Index) -> Scene:
    """Invent a canvas of the training split from the parts of a bank: a pure function of its arguments.

    Args:
        seed: of the run.
        number: of the example.
        canvas: side in px.
        families: drawn from with equal chance; "picture" only where `asked` has questions.
        index: of the bank.
    """
    rng = np.random.default_rng([seed, number, canvas, 4])
    family = families[rng.integers(len(families))]
    row, shown = _question(rng, asked(index, canvas)) if family == PICTURE else (None, None)
    ask, chosen, corners = _signs(rng, family, canvas, index)
    feet = [_foot(index.signs[place].sprite, corner) for place, corner in zip(chosen, corners, strict=True)]
    # As on drawn canvases the picture comes first, and no sign covers any of it.
    frame = [] if shown is None else [_foot(index.pictures[shown].sprite, None)]
    boxes = layout.place(rng, [*frame, *feet], canvas, canvas)
    own = boxes[len(frame) :]
    placards = tuple(_placard(index, place, box) for place, box in zip(chosen, own, strict=True))
    strays = _strays(rng, index, ask, boxes, canvas)
    picture = None if shown is None else Picture(index.pictures[shown].image_id, boxes[0])
    if row is None or picture is None:
        answer = questions.answer(ask, placards, canvas, canvas)
        targets = tuple(placard.box for placard in questions.targets(ask, placards))
    else:
        answer, targets = row.answer, (picture.box,)
    example = Example(
        image=np.broadcast_to(np.zeros((), np.uint8), (canvas, canvas, 3)),
        question=paraphrases.word(rng, ask, "train", row.question if row else ""),
        answer=answer,
        family=family,
        targets=targets,
        placards=placards,
        ask=ask,
        picture=picture,
        seed=seed,
        index=number,
        split="train",
        background="bank",
    )
    parts = _parts(index, strays, shown, chosen, boxes)
    return Scene(example, _crop(rng, index, canvas), _grade(rng), parts, shadows(rng, boxes))


def _question(rng: Rng, groups: tuple[tuple[Question, ...], ...]) -> Question:
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


def _signs(rng: Rng, family: str, canvas: int, index: Index) -> tuple[Ask, list[int], list[str | None]]:
    """As `cast`, with as many signs as `placards.sample` draws; beside a picture those of a read question."""
    low, high = placard_range(canvas)
    longest = _TIGHT_SIGN if canvas == _TIGHT else 1 << 10
    if family == PICTURE:
        count = low if high <= 2 else int(rng.integers(low, high + 1))
        _, chosen, corners = cast(rng, "read", count, index, longest)
        return Ask(PICTURE, PICTURE), chosen, corners
    count = int(rng.integers(max(low, 2) if family == "compare" else low, high + 1))
    return cast(rng, family, count, index, longest)


def _foot(sprite: Sprite, corner: str | None) -> Footprint:
    return Footprint(sprite.alpha.shape[1], sprite.alpha.shape[0], sprite.code_box, corner)


def _parts(
    index: Index, strays: list[tuple[int, Box]], shown: int | None, chosen: list[int], boxes: list[Box]
) -> list[Part]:
    """Distractors, which are clear of all else, then picture and signs above what they overlap."""
    parts = [Part(*index.texel("strays", place), box, _STRAY_SHADOW, 0) for place, box in strays]
    frame = [] if shown is None else [("pictures", shown)]
    levels: list[int] = []
    for (store, place), box in zip([*frame, *(("signs", place) for place in chosen)], boxes, strict=True):
        below = [level for level, other in zip(levels, boxes, strict=False) if intersects(box, other)]
        levels.append(max(below) + 1 if below else 0)
        parts.append(Part(*index.texel(store, place), box, _SIGN_SHADOW, levels[-1]))
    return parts


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


def _strays(rng: Rng, index: Index, ask: Ask, taken: list[Box], canvas: int) -> list[tuple[int, Box]]:
    """Distractors clear of all signs and of each other; no blank sign is of an asked kind."""
    found: list[tuple[int, Box]] = []
    for _ in range(int(rng.integers(0, most(canvas, canvas) + 1))):
        place = int(rng.integers(len(index.strays)))
        sprite, kind = index.strays[place]
        avoided = kind is not None and any(k.matches(str(kind.colour), str(kind.shape)) for k in ask.kinds)
        size = sprite.alpha.shape[1], sprite.alpha.shape[0]
        others = [*taken, *(box for _, box in found)]
        box = None if avoided else layout.free_box(rng, size, others, canvas, canvas)
        if box is not None:
            found.append((place, box))
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
