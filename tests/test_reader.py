"""The bundled checkpoint on a fixed set of held-out questions, and beside the stock model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.demo.placards import FAMILIES, sample
from arrcoc.evaluation.methods import METHODS, Lab
from arrcoc.evaluation.metrics import exact_match
from arrcoc.evaluation.records import Case, Picture

SEED, EACH = 2026, 10
FULL, EIGHTH = 1024, 128  # tokens of 1024 x 1024 px
WAYS = {"full": ("arrcoc", FULL), "arrcoc": ("arrcoc", EIGHTH), "downscaled": ("downscale", EIGHTH)}


class Answered(NamedTuple):
    family: str
    way: str
    right: float
    tokens: int


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a minute of arithmetic
    yield Lab.open(None, "demo", "cpu", "float32", 12, 0)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def answered(lab: Lab) -> list[Answered]:
    """Sixty cases of the test split, ten of each family, answered in three ways."""
    made = []
    for family in FAMILIES:
        for index in range(EACH):
            drawn = sample(SEED, index, "test", 1024, [family])
            pixels = torch.from_numpy(drawn.image).permute(2, 0, 1).contiguous()
            picture = Picture(Case(str(index), family, pixels, drawn.question, (drawn.answer,)), pixels)
            for way, (method, budget) in WAYS.items():
                given = METHODS[method](lab, picture, budget)
                made.append(Answered(family, way, exact_match(given.text, (drawn.answer,)), given.tokens))
    return made


def accuracy(answered: list[Answered], way: str, family: str | None = None) -> float:
    chosen = [a.right for a in answered if a.way == way and family in (None, a.family)]
    assert len(chosen) == (EACH if family else EACH * len(FAMILIES))
    return float(np.mean(chosen))


def test_the_budgets_are_kept(answered: list[Answered]) -> None:
    assert {a.tokens for a in answered if a.way == "full"} == {FULL}
    assert max(a.tokens for a in answered if a.way != "full") <= EIGHTH


# Measured on these sixty: full 52 right, arrcoc 42, downscaled 33. The floors lie five points below, and the
# gap, of which a third is left to other machines' rounding, is what the test is about.
@pytest.mark.parametrize(("way", "least"), [("full", 0.82), ("arrcoc", 0.65)])
def test_accuracy_stays(answered: list[Answered], way: str, least: float) -> None:
    assert accuracy(answered, way) >= least


def test_an_eighth_of_the_tokens_beats_downscaling_to_an_eighth(answered: list[Answered]) -> None:
    assert accuracy(answered, "arrcoc") >= accuracy(answered, "downscaled") + 0.10


def test_the_folder_is_small_and_whole() -> None:
    folder, note = bundled_checkpoint()
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "texture_head.safetensors"} <= files
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 32e6
    assert "knows nothing else" in note


def stock_text(folder: Path, image: Image.Image, question: str) -> str:
    """By transformers alone: its processor, chat template, model and generate."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return str(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("index", range(3))
def test_stock_transformers_reads_and_the_engine_says_the_same(lab: Lab, index: int) -> None:
    drawn = sample(SEED, index, "test", 512, ["read"])
    said = stock_text(bundled_checkpoint()[0], Image.fromarray(drawn.image), drawn.question)
    assert said == drawn.answer
    assert lab.engine.ask(drawn.image, drawn.question, 1.0, max_new_tokens=12).text == said
