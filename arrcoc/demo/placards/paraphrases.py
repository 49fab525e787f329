"""How questions are worded. Test sentences never occur in training, but all their words do.

Slots: {sign} "blue round sign" or "blue circle"; {a_sign} the same with its article; {other} a second sign;
{signs} "red signs", "round signs" or "circles"; {code}; {question} a question of easy-VQA.
"""

from __future__ import annotations

from dataclasses import dataclass

from arrcoc.demo.placards.records import Ask, Kind, Rng
from arrcoc.demo.placards.vocabulary import ADJECTIVES, Split


@dataclass(frozen=True, slots=True)
class Form:
    """Wordings of one form of question, by split."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    def of(self, split: Split) -> tuple[str, ...]:
        """The wordings of a split."""
        return self.train if split == "train" else self.test


FORMS: dict[str, Form] = {
    "read": Form(
        train=(
            "What is the code on the {sign}?",
            "Which code does the {sign} carry?",
            "Read the code on the {sign}.",
            "What does the {sign} say?",
            "Tell me what is written on the {sign}.",
            "Please read the {sign} for me.",
            "What are the three letters and digits on the {sign}?",
            "There is {a_sign} in this image. What is its code?",
        ),
        test=(
            "What code is written on the {sign}?",
            "Read for me what is written on the {sign}.",
            "Please tell me the three letters and digits on the {sign}.",
        ),
    ),
    "find.colour": Form(
        train=(
            "Which colour is the sign that says {code}?",
            "What is the colour of the sign with the code {code}?",
            "What color is the sign that carries {code}?",
            "Tell me the colour of the sign on which {code} is written.",
            "One sign says {code}. Which colour is it?",
            "Look for the code {code}. What is the color of its sign?",
            "Find the sign with {code} and name its colour.",
        ),
        test=(
            "What colour is the sign on which {code} is written?",
            "Find the code {code}. Which colour is its sign?",
            "Name the colour of the sign that carries the code {code}.",
        ),
    ),
    "find.shape": Form(
        train=(
            "Which shape is the sign that says {code}?",
            "What is the shape of the sign with the code {code}?",
            "What shape is the sign that carries {code}?",
            "Tell me the shape of the sign on which {code} is written.",
            "One sign says {code}. Which shape is it?",
            "Look for the code {code}. What is the shape of its sign?",
            "Find the sign with {code} and name its shape.",
        ),
        test=(
            "What shape is the sign on which {code} is written?",
            "Find the code {code}. Which shape is its sign?",
            "Name the shape of the sign that carries the code {code}.",
        ),
    ),
    "count": Form(
        train=(
            "How many {signs} are there?",
            "How many {signs} are in the image?",
            "Count the {signs}.",
            "What is the number of {signs} in this image?",
            "How many {signs} can you see?",
            "Tell me how many {signs} there are.",
            "Please count all the {signs} that you see.",
        ),
        test=(
            "Tell me the number of {signs} that you can see.",
            "Count all the {signs} in this image.",
            "How many {signs} do you see there?",
        ),
    ),
    "exists": Form(
        train=(
            "Is there {a_sign}?",
            "Is there {a_sign} in the image?",
            "Can you see {a_sign}?",
            "Does this image show {a_sign}?",
            "Is {a_sign} present in this image?",
            "Do you see {a_sign} anywhere? Answer yes or no.",
            "Look for {a_sign}. Is there one?",
        ),
        test=(
            "Is there {a_sign} anywhere in this image?",
            "Look for {a_sign}. Can you see one?",
            "Can you see {a_sign} in the image? Answer yes or no.",
        ),
    ),
    "where": Form(
        train=(
            "In which corner is the {sign}?",
            "Where is the {sign}?",
            "Which corner of the image is the {sign} in?",
            "In which part of the image do you see the {sign}?",
            "Where in the image can you see the {sign}?",
            "Find the {sign}. Which corner is it in?",
            "Tell me where the {sign} is.",
        ),
        test=(
            "In which corner of the image is the {sign}?",
            "Find the {sign} and tell me where it is.",
            "Where do you see the {sign} in the image?",
        ),
    ),
    "compare.same": Form(
        train=(
            "Do the {sign} and the {other} carry the same code?",
            "Is the code on the {sign} the same as on the {other}?",
            "Do the {sign} and the {other} say the same?",
            "Are the codes of the {sign} and the {other} equal?",
            "Compare the {sign} with the {other}. Do they carry the same code?",
            "Does the {sign} say the same as the {other}?",
            "Read the {sign} and the {other}. Are their codes the same?",
        ),
        test=(
            "Are the codes on the {sign} and on the {other} the same?",
            "Compare the {sign} with the {other}. Are their codes equal?",
            "Does the {sign} carry the same code as the {other}?",
        ),
    ),
    "compare.first": Form(
        train=(
            "Which of the two codes comes first in the alphabet, the one on the {sign} or on the {other}?",
            "Read the {sign} and the {other}. Which code comes first in the alphabet?",
            "Compare the codes on the {sign} and the {other}. Which is first in the alphabet?",
            "Which code is first in the alphabet, that of the {sign} or that of the {other}?",
            "Of the codes on the {sign} and the {other}, name the one that comes first in the alphabet.",
            "Look at the {sign} and the {other}. Tell me the code that comes first in the alphabet.",
        ),
        test=(
            "Which of the codes on the {sign} and the {other} comes first in the alphabet?",
            "Compare the {sign} and the {other}. Name the code that comes first in the alphabet.",
            "Read the two codes on the {sign} and the {other}. Which one is first in the alphabet?",
        ),
    ),
    "picture": Form(
        train=(
            "Look at the framed picture: {question}",
            "In the framed picture, {question}",
            "This is about the framed picture. {question}",
            "Find the picture in the frame: {question}",
            "The image that is meant is the framed one: {question}",
            "About the picture in the frame: {question}",
        ),
        test=(
            "Look at the picture in the frame: {question}",
            "The framed picture is meant. {question}",
            "This is about the image in the frame: {question}",
        ),
    ),
}  # fmt: skip


def word(rng: Rng, ask: Ask, split: Split, question: str = "") -> str:
    """Put a question into words; `question` is the wording that easy-VQA brings along."""
    wordings = FORMS[ask.form].of(split)
    wording = wordings[rng.integers(len(wordings))]
    kinds = (*ask.kinds, Kind(None, None), Kind(None, None))
    sign, other, signs = _one(rng, kinds[0]), _one(rng, kinds[1]), _many(rng, kinds[0])
    a_sign = f"{'an' if sign[:1] in 'aeiou' else 'a'} {sign}"
    return wording.format(
        sign=sign, a_sign=a_sign, other=other, signs=signs, code=ask.code, question=question
    )


def _one(rng: Rng, kind: Kind) -> str:
    if kind.colour is None or kind.shape is None:
        return ""
    noun = kind.shape if rng.random() < 0.4 else f"{ADJECTIVES[kind.shape]} sign"
    return f"{kind.colour} {noun}"


def _many(rng: Rng, kind: Kind) -> str:
    if kind.shape is None:
        return f"{kind.colour} signs"
    return f"{kind.shape}s" if rng.random() < 0.4 else f"{ADJECTIVES[kind.shape]} signs"
