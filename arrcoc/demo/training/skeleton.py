"""The checkpoint folder that training starts from: config, chat template, tokenizer for its questions."""

from __future__ import annotations

from pathlib import Path

from arrcoc.demo.checkpoint import make_checkpoint
from arrcoc.demo.placards.paraphrases import FORMS
from arrcoc.demo.placards.vocabulary import ADJECTIVES, COLOURS, SHAPES

_ANSWERS = (
    "yes",
    "no",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "zero",
    "the first",
    "the second",
)
# Forms of easy-VQA's questions, which its package words from few templates.
_PICTURES = (
    "What shape is in the image? What color is the shape? Is there a shape in the picture? Does the image "
    "contain a shape? Is the shape blue? Which colour does the shape have? Is this a picture of a triangle? "
    "There is not a circle in the image. No red shape is present. Are there no yellow circles?"
)


def make_skeleton(folder: Path) -> Path:
    """Write the folder (see `make_checkpoint`); its weights are untrained."""
    return make_checkpoint(folder, size="reader", more_text=question_text())


def question_text() -> str:
    """Every training wording, with each of the words that fill its slots."""
    lines = [wording for form in FORMS.values() for wording in form.train]
    names = [
        f"the {colour} {shape}, the {colour} {ADJECTIVES[shape]} sign"
        for colour in COLOURS
        for shape in SHAPES
    ]
    plural = [
        f"{colour} signs, {ADJECTIVES[shape]} signs, {shape}s" for colour in COLOURS for shape in SHAPES
    ]
    return "\n".join(["", *lines, *names, *plural, *_ANSWERS, _PICTURES, ""])
