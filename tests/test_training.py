"""Training sees exactly what inference sees."""

import dataclasses

import pytest
import torch
from PIL import Image

from arrcoc import Engine, allocation, chat, prompting
from arrcoc.demo.placards import NO_GLYPH, sample
from arrcoc.demo.training.batches import Prompts, collate
from arrcoc.demo.training.forward import AnswerLoss
from arrcoc.demo.training.modes import BatchEncoder
from arrcoc.demo.training.recipe import Recipe
from arrcoc.records import Plan, Tensions

CANVAS = 512


@pytest.fixture(scope="module")
def parts(tiny_checkpoint, stock_model):
    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")
    qwen = engine._qwen
    prompts = Prompts(qwen)
    examples = [sample(3, index, "train", CANVAS, ["read"]) for index in range(2)]
    recipe = Recipe()
    head = torch.nn.Linear(qwen.vision.hidden, NO_GLYPH + 1)
    loss = AnswerLoss(stock_model, qwen, prompts, head)
    return engine, prompts, examples, recipe, loss, BatchEncoder(stock_model, recipe)


def answer_logits(loss, batch, encoded):
    """Logits of the last prompt token of every example, through the training path."""
    seen = {}
    original = loss._score
    loss._score = lambda hidden, tail, *rest: (
        seen.update(hidden=hidden, last=tail + batch.last) or original(hidden, tail, *rest)
    )
    with torch.no_grad():
        loss(batch, encoded)
    del loss._score
    return loss._lm_head[0](seen["hidden"][torch.arange(len(seen["last"])), seen["last"]])


def test_whole_images_train_as_the_stock_model_sees_them(parts, stock_model, tiny_checkpoint):
    from transformers import AutoProcessor

    _, prompts, examples, recipe, loss, encoder = parts
    batch = collate(examples, prompts, recipe.tile, CANVAS, "whole", 0)
    ours = answer_logits(loss, batch, encoder.encode(batch))
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    for row, example in enumerate(examples):
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}
        ]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.fromarray(example.image)], return_tensors="pt")
        with torch.no_grad():
            theirs = stock_model(**inputs).logits[0, -1]
        torch.testing.assert_close(ours[row], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "halo", "stride"),
    [("refine", 0, 1), ("crops", 0, 1), ("high", 0, 1), ("refine", 1, 2), ("crops", 1, 3), ("high", 1, 1)],
)
def test_tiles_train_as_the_engine_sees_them(parts, mode, halo, stride, monkeypatch):
    engine, prompts, examples, recipe, loss, encoder = parts
    layout = "crops" if mode == "crops" else "refine"
    engine = Engine.from_pretrained(
        engine._qwen.name, preset="demo", device="cpu", layout=layout, halo=halo, overview_stride=stride
    )
    batch = collate(examples, prompts, recipe.tile, CANVAS, mode, 0)
    lod = torch.zeros(2, 16, dtype=torch.long) if mode != "high" else torch.full((2, 16), 3)
    lod[:, [2, 7, 9]] = 3
    if mode != "high":
        lod[:, [0, 4]] = 1
        lod[:, 15] = 2
    ours = answer_logits(loss, batch, encoder.encode(batch, lod, halo=halo, stride=stride))
    plan = allocation.plan
    for row, example in enumerate(examples):

        def planned(relevance, grid, config, budget, row=row):
            made: Plan = plan(relevance, grid, config, budget)
            refined = sum(s * s * int((lod[row] == i).sum()) for i, s in enumerate(config.sides) if i)
            tokens = int(refined) + (-(-4 // stride)) ** 2
            return dataclasses.replace(
                made,
                lod=lod[row].view(4, 4),
                tokens=256 if mode == "high" else tokens,
                overview_stride=stride if mode != "high" else 0,
                tensions=Tensions(0.0, 0.0, 0.0),
            )

        monkeypatch.setattr("arrcoc.pipeline.allocation.plan", planned)
        encoding = engine.encode(example.image, example.question)
        prompt, _ = prompting.build(engine._qwen, chat.single(None, example.question).messages, [encoding])
        state = engine._decoder.prefill(prompt)
        torch.testing.assert_close(ours[row], state.logits, rtol=1e-3, atol=1e-3)


def test_a_batch_follows_from_seed_step_and_rank(parts):
    from arrcoc.demo.training.batches import BatchDataset
    from arrcoc.demo.training.recipe import Phase

    _, prompts, *_ = parts
    recipe = Recipe(steps=4, phases=(Phase(1.0, {128: 1.0}, {"whole": 1.0}, batch=2),))
    first = BatchDataset(recipe, prompts, range(0, 4), rank=0)[2]
    resumed = BatchDataset(recipe, prompts, range(2, 4), rank=0)[0]
    other = BatchDataset(recipe, prompts, range(2, 4), rank=1)[0]
    assert torch.equal(first.images, resumed.images)
    assert first.questions == resumed.questions
    assert not torch.equal(first.images, other.images)
