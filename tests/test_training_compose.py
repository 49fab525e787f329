"""Composed batches: the records' answers, what lies where, purity, and the device's half against drawing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_placards import _answer_from_text
from test_placards import easy_vqa as easy_vqa
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from arrcoc import Engine
from arrcoc.demo.placards import COLOURS, FAMILIES, NO_GLYPH, drawing, glyph_labels, pictures, target_tiles
from arrcoc.demo.placards.records import intersects
from arrcoc.demo.placards.scene import Shadow
from arrcoc.demo.placards.vocabulary import fonts, neighbours, split_of
from arrcoc.demo.training import bank, compose, places, sketch
from arrcoc.demo.training.bank import Index, Pixels
from arrcoc.demo.training.batches import IGNORE, BatchDataset, Prompts, draw_step
from arrcoc.demo.training.feed import Feed
from arrcoc.demo.training.places import Part
from arrcoc.demo.training.recipe import BankSize, Phase, Recipe
from arrcoc.errors import ConfigError

SIZE = BankSize(signs=1536, strays=24, pictures=64, backgrounds=3, side=512, refresh=2, parts=2)
RECIPE = Recipe(
    steps=8, source="composed", bank=SIZE, phases=(Phase(1.0, {256: 1.0}, {"whole": 1.0}, batch=3),)
)


@pytest.fixture(scope="module")
def built() -> tuple[Index, Pixels]:
    return bank.build(SIZE, 3, 0)


@pytest.fixture(scope="module")
def prompts(tiny_checkpoint: Path) -> Prompts:
    return Prompts(Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")._qwen)


def scenes(index: Index, canvas: int, count: int, families: list[str]) -> list[sketch.Scene]:
    return [sketch.draw_scene(5, number, canvas, families, index) for number in range(count)]


@pytest.mark.parametrize("canvas", [256, 512, 1024])
def test_answers_follow_from_the_question_and_the_record(built: tuple[Index, Pixels], canvas: int) -> None:
    names = {path.name for path in fonts("train")}
    drawn = scenes(built[0], canvas, 60, list(FAMILIES))
    assert {scene.example.family for scene in drawn} == set(FAMILIES)
    for scene in drawn:
        example = scene.example
        assert example.answer == _answer_from_text(example), example.question
        assert all(split_of(p.code) == "train" and p.font in names for p in example.placards)
        for p in example.placards:
            assert 0 <= p.box[0] <= p.code_box[0] < p.code_box[2] <= p.box[2] <= canvas
            assert 0 <= p.box[1] <= p.code_box[1] < p.code_box[3] <= p.box[3] <= canvas
        for below, above in combinations(example.placards, 2):
            assert not intersects(below.code_box, above.box)
        first, _ = built[0].texel("strays", 0)
        for part in scene.parts:
            if part.stride != bank.STRAY_SIDE:
                continue
            kind = built[0].strays[(part.texel - first) // bank.STRAY_SIDE**2].kind
            assert not any(intersects(part.box, p.box) for p in example.placards)
            asked = example.ask.kinds
            assert kind is None or not any(k.matches(str(kind.colour), str(kind.shape)) for k in asked)
        hit = {glyph for p in example.placards for glyph in p.code}
        assert len({label for label in glyph_labels(example, 4).ravel() if label != NO_GLYPH}) == len(hit)
        assert target_tiles(example, 128).any()


def test_equal_and_near_codes_come_from_quads(built: tuple[Index, Pixels]) -> None:
    signs = built[0].signs
    for start in range(0, len(signs), bank.QUAD):
        a, b, c, d = (sign.spec for sign in signs[start : start + bank.QUAD])
        assert a.code == b.code
        assert c.code == d.code
        assert c.code in neighbours(a.code)
        assert len({(s.colour, s.shape) for s in (a, b, c, d)}) == bank.QUAD


def test_compared_kinds_give_nothing_away(built: tuple[Index, Pixels]) -> None:
    """Equal answers, and pairs that share a colour as often for yes as for no."""
    drawn = [s.example for s in scenes(built[0], 512, 600, ["compare"])]
    same = [e for e in drawn if e.ask.form == "compare.same"]
    assert 240 < len(same) < 360
    counted = Counter(e.answer for e in same)
    # 150 each, standard deviation 9.
    assert min(counted.values()) > 105
    share = {
        answer: np.mean([e.ask.kinds[0].colour == e.ask.kinds[1].colour for e in same if e.answer == answer])
        for answer in ("yes", "no")
    }
    assert abs(share["yes"] - share["no"]) < 0.15


def painted(canvas: np.ndarray, parts: list[Part], shadows: list[Shadow], pixels: Pixels) -> np.ndarray:
    """A canvas uint8 [S, S, 3] after the device's half has pasted and shaded."""
    side = canvas.shape[0]
    laid = places.pack([(0, 0, 0, 8, 0)], [np.zeros((3, 2), np.float32)], [parts], [shadows], side)
    images = torch.from_numpy(canvas).permute(2, 0, 1)[None].contiguous()
    for span in laid.pasted:
        compose._paste(images, laid.parts, laid.drops, span, pixels.texels)
    for span in laid.shaded:
        compose._shade(images, laid.shades, laid.ellipses, span)
    return images[0].permute(1, 2, 0).numpy().astype(int)


def test_pasted_sprites_look_as_they_were_drawn(built: tuple[Index, Pixels]) -> None:
    """Signs, a distractor, and a sign on top of another, against `drawing.paste` one after the other."""
    index, pixels = built
    canvas = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected, parts = canvas.copy(), []
    laid = [
        ("signs", 8, 3, 5, 0),
        ("signs", 33, 144, 3, 0),
        ("signs", 17, 30, 12, 1),
        ("strays", 7, 0, 0, 0),
    ]
    for store, place, x, y, level in laid:
        slot = bank.Slot(store, 3, place // bank.QUAD if store == "signs" else place, 0)
        slot = slot._replace(version=bank.version(slot.place, 0, SIZE.parts))
        made = bank.draw(SIZE.side, None, slot)
        sprite = made.sprite if isinstance(made, bank.Stray) else made.signs[place % bank.QUAD].sprite
        height, width = sprite.alpha.shape
        x, y = (x, y) if store == "signs" else (256 - width, 256 - height)
        if store == "strays":
            assert height < 100
            assert width < 100
        shadow = 0.35 if store == "signs" else 0.2
        drawing.paste(expected, sprite, x, y, shadow)
        parts.append(Part(*index.texel(store, place), (x, y, x + width, y + height), shadow, level))
    off = np.abs(painted(canvas, parts[::-1], [], pixels) - expected)
    # Coverage in steps of 1/255 instead of floats.
    assert off.max() <= 3
    assert off.mean() < 0.05


def test_shadows_are_those_of_the_drawn_canvases(built: tuple[Index, Pixels]) -> None:
    canvas = np.full((256, 256, 3), 200, np.uint8)
    axes = np.array([[0.8, 0.6], [-0.6, 0.8]]) / [[90.0], [30.0]]
    cast = [
        Shadow((x - 90, y - 90, x + 90, y + 90), turn) for x, y, turn in ((120, 60, axes), (250, 250, axes.T))
    ]
    expected = canvas.copy()
    for shadow in cast:
        drawing.shade(expected, shadow.region, shadow.axes)
    found = painted(canvas, [], cast, built[1])
    assert np.abs(found - expected).max() <= 1
    # 200 * (1 - 0.38) = 124 in the middle.
    assert abs(found[60, 120, 0] - 124) <= 1


def test_many_sprites_go_in_spans_of_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_MOST_PIXELS", 100)
    # Levels 0, 0, 0, 1 of 60, 40, 1 and 300 pixels: the first two fill a span, the last exceeds one alone.
    spans, before = places._spans([(0, 60), (0, 40), (0, 1), (1, 300)])
    assert spans == ((0, 2, 100), (2, 3, 1), (3, 4, 300))
    assert before == [0, 60, 0, 0]


@pytest.mark.parametrize("flip", [0, 1])
def test_backgrounds_are_resized_crops(flip: int) -> None:
    """Against `interpolate` of the crop; another canvas of the batch has a larger crop."""
    rng = np.random.default_rng(1)
    scenes = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2)]
    sources = torch.stack([bank._opaque(scene) for scene in scenes])
    crops = torch.tensor([[1, 20, 31, 100, flip], [0, 3, 0, 180, 0]], dtype=torch.int32)
    grades = torch.tensor([[[0.9, 4.0], [1.0, 0.0], [1.1, -20.0]]]).expand(2, 3, 2)
    images = torch.empty((2, 3, 128, 128), dtype=torch.uint8)
    compose._background(images, crops, grades, 180, sources)
    for image, (source, top, left, side, flipped) in zip(images, crops.tolist(), strict=True):
        crop = scenes[source][top : top + side, left : left + side]
        crop = torch.from_numpy(crop[:, ::-1].copy() if flipped else crop).permute(2, 0, 1).float()
        resized = torch.nn.functional.interpolate(crop[None], (128, 128), mode="bilinear")[0]
        graded = (resized * grades[0, :, :1, None] + grades[0, :, 1:, None]).clamp(0, 255).round()
        assert (graded - image.float()).abs().max() <= 1


def test_tables_arrive_as_they_left(built: tuple[Index, Pixels]) -> None:
    drawn = scenes(built[0], 512, 4, list(FAMILIES))
    laid = places.pack(
        [s.crop for s in drawn],
        [s.grade for s in drawn],
        [s.parts for s in drawn],
        [s.shadows for s in drawn],
        512,
    )
    moved = laid.to(torch.device("cpu"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(laid[:6], moved[:6], strict=True))
    assert laid[6:] == moved[6:]


def test_sprites_of_one_level_never_overlap(built: tuple[Index, Pixels]) -> None:
    """Or two threads of the device would write the same pixel; and what is drawn later lies on top."""
    tops = 0
    for scene in scenes(built[0], 512, 80, list(FAMILIES)):
        for below, above in combinations(scene.parts, 2):
            if intersects(below.box, above.box):
                assert above.level > below.level
                tops += 1
        assert not any(
            intersects(a, b) for a, b in combinations([places.shaded_box(s, 512) for s in scene.shadows], 2)
        )
    assert tops > 10


def test_signs_of_the_record_are_on_the_image(built: tuple[Index, Pixels], prompts: Prompts) -> None:
    """The median colour of a code's box is mostly the sign's paint."""
    recipe = replace(RECIPE, phases=(Phase(1.0, {512: 1.0}, {"whole": 1.0}, batch=6),))
    data = sketch.SketchDataset(recipe, prompts, range(2), 0, built[0])
    made = data[1]
    batch = compose.compose(made, built[1])
    assert batch.images.shape == (6, 3, 512, 512)
    first = draw_step(recipe, 1, 0).indices[0]
    near = []
    for row in range(6):
        example = sketch.draw_scene(recipe.seed, first + row, 512, recipe.often(FAMILIES), built[0]).example
        assert example.question == batch.questions[row]
        assert np.array_equal(glyph_labels(example), batch.glyphs[row].numpy())
        assert np.array_equal(target_tiles(example, 128), batch.targets[row].numpy())
        for p in example.placards:
            x0, y0, x1, y1 = p.code_box
            median = batch.images[row, :, y0:y1, x0:x1].flatten(1).float().median(1).values
            near.append(float((median - torch.tensor(COLOURS[p.colour]).float()).abs().max()))
    # A quarter of the signs lies partly in shadow, and a code may fill half of its box.
    assert np.mean(np.array(near) < 40) > 0.6


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_composing_neither_waits_for_the_device_nor_loops_over_canvases(
    built: tuple[Index, Pixels], prompts: Prompts
) -> None:
    """On CUDA `item`, `nonzero` and boolean indices wait; on the CPU they can be seen all the same."""
    recipe = replace(RECIPE, phases=(Phase(1.0, {128: 1.0}, {"whole": 1.0}, batch=96),))
    made = sketch.SketchDataset(recipe, prompts, range(1), 0, built[0])[0]
    assert (len(made.places.pasted), len(made.places.shaded)) == (1, 1)
    with Operations() as counted:
        compose.compose(made, built[1])
    assert not [n for n in counted.names if "scalar_dense" in n or "nonzero" in n or "item" in n]
    # Views included; a loop over 96 canvases would take a thousand.
    assert sum(counted.names.values()) < 400


@pytest.mark.usefixtures("easy_vqa")
def test_pictures_are_asked_about_where_the_bank_has_them() -> None:
    index, pixels = bank.build(SIZE, 3, 0)
    assert len(index.pictures) == SIZE.pictures
    for canvas in (256, 512):
        drawn = [sketch.draw_scene(5, number, canvas, ["picture"], index) for number in range(40)]
        for scene in drawn:
            example = scene.example
            assert example.picture is not None
            assert example.targets == (example.picture.box,)
            assert not any(intersects(example.picture.box, p.box) for p in example.placards)
            rows = [row for row in pictures.rows("train") if row.image_id == example.picture.image_id]
            assert any(row.question in example.question and row.answer == example.answer for row in rows)
        part = next(part for part in drawn[0].parts if part.stride == bank.PICTURE_SIDE)
        slot = (part.texel - index.texel("pictures", 0)[0]) // bank.PICTURE_SIDE**2
        made = bank.draw(SIZE.side, None, bank.Slot("pictures", 3, slot, bank.version(slot, 0, SIZE.parts)))
        assert isinstance(made, bank.Framed)
        canvas_before = np.zeros((canvas, canvas, 3), np.uint8)
        x0, y0, x1, y1 = part.box
        image = painted(canvas_before, [part], [], pixels)
        assert np.abs(image[y0:y1, x0:x1] - made.sprite.rgb).max() == 0
        assert (x1 - x0, y1 - y0) == made.sprite.rgb.shape[1::-1]


def test_a_bank_without_pictures_asks_other_questions(built: tuple[Index, Pixels], prompts: Prompts) -> None:
    bare = replace(built[0], asked=(), asked_small=())
    recipe = replace(RECIPE, phases=(Phase(1.0, {256: 1.0}, {"whole": 1.0}, pictures=1.0, batch=6),))
    assert "picture" not in sketch.SketchDataset(recipe, prompts, range(1), 0, bare)[0].batch.families


def test_a_bank_is_renewed_part_by_part() -> None:
    # Two parts: even slots turn over at odd generations, odd slots at even ones.
    assert [bank.version(0, g, 2) for g in range(5)] == [0, 1, 1, 2, 2]
    assert [bank.version(1, g, 2) for g in range(5)] == [0, 0, 1, 1, 2]
    small = BankSize(signs=16, strays=2, pictures=8, backgrounds=2, side=256, parts=2)
    first, second = (bank.build(small, 1, generation)[1] for generation in (0, 1))
    squares = [pixels.texels[: 16 * bank.SIGN_SIDE**2].view(16, -1) for pixels in (first, second)]
    same = [torch.equal(squares[0][i], squares[1][i]) for i in range(16)]
    assert same == [i // 4 % 2 == 1 for i in range(16)]
    index, pixels = bank.build(small, 1, 0)
    drawn = {slot: bank.draw(256, None, slot) for slot in bank.slots(small, 1, 1, renewed=True)}
    # Of 4 quads, 2 distractors and 2 backgrounds, half each.
    assert len(drawn) == 4 + len(index.pictures) // 2
    pixels.renew(small, drawn)
    assert torch.equal(pixels.texels, second.texels)
    assert torch.equal(pixels.backgrounds, second.backgrounds)
    renewed, whole = bank.index_of(small, drawn, index), bank.build(small, 1, 1)[0]
    assert [(s.spec, s.font) for s in renewed.signs] == [(s.spec, s.font) for s in whole.signs]
    assert renewed.by_kind == whole.by_kind
    assert [s.sprite.alpha.shape for s in renewed.strays] == [s.sprite.alpha.shape for s in whole.strays]
    with pytest.raises(ConfigError, match="multiple of 4"):
        bank.build(replace(small, signs=18), 1, 0)


def test_resumed_composed_batches_equal_uninterrupted_ones(prompts: Prompts) -> None:
    size = replace(SIZE, signs=256, strays=8, backgrounds=2, side=256)
    feed = Feed(replace(RECIPE, bank=size), prompts, 0, torch.device("cpu"), None, 0)
    whole = list(feed.batches(range(1, 4)))
    resumed = next(iter(feed.batches(range(3, 4))))
    assert torch.equal(whole[2].images, resumed.images)
    assert whole[2].questions == resumed.questions
    assert torch.equal(whole[2].tails, resumed.tails)
    assert not torch.equal(whole[0].images, resumed.images)


def test_both_sources_take_the_same_steps(built: tuple[Index, Pixels], prompts: Prompts) -> None:
    drawn = BatchDataset(replace(RECIPE, source="drawn"), prompts, range(4), 1)[2]
    composed = sketch.SketchDataset(RECIPE, prompts, range(4), 1, built[0])[2].batch
    assert (drawn.canvas, drawn.mode, drawn.plan_seed) == (composed.canvas, composed.mode, composed.plan_seed)
    assert len(drawn.families) == len(composed.families)


def test_prompts_are_those_of_the_chat_template(tiny_checkpoint: Path, prompts: Prompts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    for question in ("What is it?", "Is there a red star-shaped sign?", "Odd  spaces\nand lines"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tail, labels = prompts.tail(question, "K7A")
        asked = labels.count(IGNORE)
        # The template's tokens after the image, then the answer's, which alone are labelled.
        assert ids[-asked:] == tail[:asked]
        assert tokenizer.decode(ids[-asked - 1 : -asked]) == "<|image_pad|>"
        assert tail[asked:] == labels[asked:]
        assert tokenizer.decode(tail[asked:]) == "K7A<|im_end|>"


def test_workers_feed_what_one_process_feeds(prompts: Prompts) -> None:
    size = replace(SIZE, signs=256, strays=8, backgrounds=2, side=256)
    recipe = replace(RECIPE, bank=size)
    one, two = (Feed(recipe, prompts, 0, torch.device("cpu"), None, workers) for workers in (0, 2))
    for a, b in zip(one.batches(range(1, 3)), two.batches(range(1, 3)), strict=True):
        assert torch.equal(a.images, b.images)
        assert a.questions == b.questions
