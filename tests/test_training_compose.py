"""Composed batches: the records' answers, what lies where, purity, and the device's half against drawing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from test_placards import _answer_from_text
from transformers import AutoTokenizer

from arrcoc import Engine
from arrcoc.demo.placards import COLOURS, FAMILIES, NO_GLYPH, drawing, glyph_labels, target_tiles
from arrcoc.demo.placards.records import intersects
from arrcoc.demo.placards.vocabulary import fonts, neighbours, split_of
from arrcoc.demo.training import bank, compose, sketch
from arrcoc.demo.training.bank import Index, Pixels
from arrcoc.demo.training.batches import IGNORE, BatchDataset, Prompts
from arrcoc.demo.training.feed import Feed
from arrcoc.demo.training.recipe import BankSize, Phase, Recipe
from arrcoc.errors import ConfigError

SIZE = BankSize(signs=1536, strays=24, backgrounds=3, side=512, refresh=2, parts=2)
RECIPE = Recipe(steps=8, source="composed", bank=SIZE, phases=(Phase(1.0, {256: (1.0, 3)}, {"whole": 1.0}),))


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
        for place, x, y in scene.strays:
            (width, height), kind = built[0].strays[place]
            assert not any(intersects((x, y, x + width, y + height), p.box) for p in example.placards)
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


def test_a_pasted_sign_looks_as_it_was_drawn(built: tuple[Index, Pixels]) -> None:
    index, pixels = built
    canvas = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for place in range(0, 40, 8):
        key = (3, place // bank.QUAD, bank.version(place // bank.QUAD, 0, SIZE.parts))
        sprite = bank._quad(key)[place % bank.QUAD].sprite
        height, width = sprite.alpha.shape
        for x, y in ((3, 5), (128 - width, 128 - height)):
            expected = canvas.copy()
            drawing.paste(expected, sprite, x, y)
            images = torch.from_numpy(canvas).permute(2, 0, 1)[None].clone()
            compose._paste(images, torch.tensor([[0, 0, place, x, y]]), pixels.signs, 0.35)
            off = np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected)
            # Coverage in steps of 1/255 instead of floats; the drop shadow ends with the sprite's square.
            assert off[y : y + height, x : x + width].max() <= 3
            outside = off.copy()
            outside[y : y + height + 2, x : x + width + 2] = 0
            assert outside.max() == 0
    assert len(index.signs) == len(pixels.signs)


def test_shadows_are_those_of_the_drawn_canvases() -> None:
    canvas = np.full((256, 256, 3), 200, np.uint8)
    axes = np.array([[0.8, 0.6], [-0.6, 0.8]]) / [[90.0], [30.0]]
    expected = canvas.copy()
    drawing.shade(expected, (120 - 90, 60 - 90, 120 + 90, 60 + 90), axes)
    images = torch.from_numpy(canvas).permute(2, 0, 1)[None].clone()
    compose._shade(images, torch.tensor([[0, 0, 120.0, 60.0, *axes.ravel()]], dtype=torch.double))
    off = np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected)
    assert off.max() <= 1
    # 200 * (1 - 0.38) = 124 in the middle.
    assert abs(int(images[0, 0, 60, 120]) - 124) <= 1


def test_signs_of_the_record_are_on_the_image(built: tuple[Index, Pixels], prompts: Prompts) -> None:
    """The median colour of a code's box is mostly the sign's paint."""
    recipe = replace(RECIPE, phases=(Phase(1.0, {512: (1.0, 6)}, {"whole": 1.0}),))
    data = sketch.SketchDataset(recipe, prompts, range(2), 0, built[0])
    made = data[1]
    batch = compose.compose(made, built[1])
    assert batch.images.shape == (6, 3, 512, 512)
    first = (1 * 4096) * 2
    near = []
    for row in range(6):
        example = sketch.draw_scene(recipe.seed, first + row, 512, list(FAMILIES), built[0]).example
        assert example.question == batch.questions[row]
        assert np.array_equal(glyph_labels(example), batch.glyphs[row].numpy())
        assert np.array_equal(target_tiles(example, 128), batch.targets[row].numpy())
        for p in example.placards:
            x0, y0, x1, y1 = p.code_box
            median = batch.images[row, :, y0:y1, x0:x1].flatten(1).float().median(1).values
            near.append(float((median - torch.tensor(COLOURS[p.colour]).float()).abs().max()))
    # A quarter of the signs lies partly in shadow, and a code may fill half of its box.
    assert np.mean(np.array(near) < 40) > 0.6


def test_a_bank_is_renewed_part_by_part() -> None:
    # Two parts: even slots turn over at odd generations, odd slots at even ones.
    assert [bank.version(0, g, 2) for g in range(5)] == [0, 1, 1, 2, 2]
    assert [bank.version(1, g, 2) for g in range(5)] == [0, 0, 1, 1, 2]
    small = BankSize(signs=16, strays=2, backgrounds=2, side=256, parts=2)
    first, second = (bank.build(small, 1, generation)[1] for generation in (0, 1))
    same = [torch.equal(first.signs[i], second.signs[i]) for i in range(16)]
    assert same == [i // 4 % 2 == 1 for i in range(16)]
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
