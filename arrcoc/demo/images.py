"""The demo's images: two canvases of 2048 x 2048 px from the test split, three questions about each.

Fonts, codes, photographs and wordings of the test split never occur in training. The canvases are chosen
by a rule: of each family in `CHOSEN`, with seed 0, the first index from 0 that has a photograph behind the
signs and at which the bundled checkpoint answers all three questions rightly at full resolution. So the
demo shows what fewer tokens cost, and not what the checkpoint cannot do at all; how often it is right
stands in the README's table. What it answers with fewer tokens plays no part in the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arrcoc.demo.placards import Ask, Example, Kind, sample
from arrcoc.demo.placards.paraphrases import word
from arrcoc.demo.placards.questions import answer, targets
from arrcoc.demo.placards.records import Box, Rng

CANVAS, SEED = 2048, 0
FURTHER = {"where": ("read", "exists"), "compare": ("find", "count")}
"""By family that a canvas was drawn for: further questions that its signs allow."""
CHOSEN = (("where", 1), ("compare", 4))
"""Family and index of each canvas; see the rule above."""


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """One question about a canvas.

    Attributes:
        family: of `arrcoc.demo.placards.FAMILIES`.
        text: the question.
        answer: the right answer.
        targets: boxes (x0, y0, x1, y1) in px of the signs that must be seen in detail.
    """

    family: str
    text: str
    answer: str
    targets: tuple[Box, ...]


@dataclass(frozen=True, slots=True, eq=False)
class DemoCase:
    """One canvas and what to ask about it.

    Attributes:
        name: a short name that is also a file stem.
        image: uint8 [h, w, 3], sRGB.
        questions: of different families.
        source: how to draw it again, and what lies behind the signs.
    """

    name: str
    image: NDArray[np.uint8]
    questions: tuple[DemoQuestion, ...]
    source: str


def demo_cases() -> list[DemoCase]:
    """The chosen canvases, in a fixed order; drawn from installed packages, needs no network."""
    return [demo_case(f"canvas-{number}", *chosen) for number, chosen in enumerate(CHOSEN, 1)]


def demo_case(name: str, family: str, index: int, canvas: int = CANVAS) -> DemoCase:
    """A canvas drawn for a family of `FURTHER`, with its own question and the further ones."""
    drawn = sample(SEED, index, "test", canvas, [family])
    first = DemoQuestion(family, drawn.question, drawn.answer, drawn.targets)
    rng = np.random.default_rng([SEED, index])
    more = tuple(further(rng, drawn, other) for other in FURTHER[family])
    source = f"sample({SEED}, {index}, 'test', {canvas}, ['{family}']) over {drawn.background}"
    return DemoCase(name, drawn.image, (first, *more), source)


def further(rng: Rng, drawn: Example, family: str) -> DemoQuestion:
    """Another question about the signs of an example; its answer follows from their record alone."""
    ask = _ask(rng, drawn, family)
    right = answer(ask, drawn.placards, *drawn.image.shape[:2])
    boxes = tuple(placard.box for placard in targets(ask, drawn.placards))
    return DemoQuestion(family, word(rng, ask, "test"), right, boxes)


def _ask(rng: Rng, drawn: Example, family: str) -> Ask:
    """A question of a family about signs that the example's own question does not name.

    On canvases of the families of `FURTHER` no two signs are alike in both colour and shape.
    """
    named = drawn.ask.kinds
    others = [p for p in drawn.placards if not any(kind.matches(p.colour, p.shape) for kind in named)]
    assert len(others) > 1, "canvases of 1024 px and above have four signs or more"
    one, other = (others[i] for i in rng.choice(len(others), 2, replace=False))
    if family == "find":
        return Ask("find", f"find.{rng.choice(['colour', 'shape'])}", code=one.code)
    # The colour of one sign with the shape of another: there may be such a sign, or only near misses.
    kinds = {
        "read": Kind(one.colour, one.shape),
        "exists": Kind(one.colour, other.shape),
        "count": Kind(one.colour, None),
    }
    return Ask(family, family, kinds=(kinds[family],))
