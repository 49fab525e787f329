"""What an example teaches beside its answer: the tiles that matter, and the glyph in each patch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arrcoc.demo.placards.records import Box, Example
from arrcoc.demo.placards.vocabulary import ALPHABET

NO_GLYPH = len(ALPHABET)
"""Label of a patch without a glyph; others index `ALPHABET`."""


MOST_EVIDENCE = 5
"""Most boxes that `evidence` returns: no more signs are ever counted."""


def evidence(example: Example) -> tuple[Box, ...]:
    """Boxes that the answer is read off: fewer than `targets`, for a find only the sign that is found.

    Empty where there is nothing to point at: a count of none, a sign that does not exist.
    """
    if example.family == "picture":
        assert example.picture is not None
        return (example.picture.box,)
    ask = example.ask
    if ask.family == "find":
        return tuple(p.box for p in example.placards if p.code == ask.code)
    return tuple(
        p.box for p in example.placards if any(kind.matches(p.colour, p.shape) for kind in ask.kinds)
    )


def target_tiles(example: Example, tile: int) -> NDArray[np.bool_]:
    """Which tiles of `tile` px share a pixel with a target box: bool [ceil(H / tile), ceil(W / tile)]."""
    height, width = example.image.shape[:2]
    hit = np.zeros((-(-height // tile), -(-width // tile)), bool)
    for x0, y0, x1, y1 in example.targets:
        hit[y0 // tile : -(-y1 // tile), x0 // tile : -(-x1 // tile)] = True
    return hit


def glyph_labels(example: Example, patch: int = 16) -> NDArray[np.int64]:
    """For every patch [H / patch, W / patch] the glyph whose centre lies in it, or `NO_GLYPH`.

    Of two glyphs in one patch, the one nearer to the patch's centre counts.
    """
    height, width = example.image.shape[:2]
    labels = np.full((height // patch, width // patch), NO_GLYPH, np.int64)
    nearest = np.full(labels.shape, np.inf)
    for placard in example.placards:
        for glyph, (x, y) in zip(placard.code, placard.glyphs, strict=True):
            row, column = int(y // patch), int(x // patch)
            distance = np.hypot(x / patch - column - 0.5, y / patch - row - 0.5)
            if distance < nearest[row, column]:
                nearest[row, column], labels[row, column] = distance, ALPHABET.index(glyph)
    return labels
