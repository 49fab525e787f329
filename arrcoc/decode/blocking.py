"""How the matrices of a decode step are divided among programs."""

from __future__ import annotations

from typing import NamedTuple

from arrcoc.text import Matrix, TextWeights


class Blocks(NamedTuple):
    """How a matrix is divided: rows and columns of one load, and warps of one program."""

    rows: int
    columns: int
    warps: int


class Blocking(NamedTuple):
    """Blocks of each product of a step; of the attention, positions of one load and parts of the cache.

    `early`: a kernel lets the one after it begin before it waits for the one before, so that several fetch
    their first weights at once.
    """

    qkv: Blocks = Blocks(16, 512, 4)
    out: Blocks = Blocks(8, 1024, 4)
    gated: Blocks = Blocks(4, 1024, 4)
    down: Blocks = Blocks(8, 1024, 4)
    head: Blocks = Blocks(8, 2048, 8)
    attend: Blocks = Blocks(32, 32, 4)
    early: bool = True


NARROW = Blocking(Blocks(4, 2048, 4), Blocks(4, 2048, 4), Blocks(2, 2048, 4), Blocks(4, 2048, 4))
"""For layers of bfloat16 that are at most `NARROW_COLUMNS` wide: a row is one load."""
NARROW_COLUMNS = 2048
BYTES = Blocking(Blocks(8, 2048, 4), Blocks(8, 2048, 4), Blocks(4, 2048, 4), Blocks(8, 2048, 4))
"""For layers of int8 or float8: loads of as many bytes as those of bfloat16."""


def blocking_for(weights: TextWeights) -> Blocking:
    """The blocks that `KernelStep` takes by itself: those fastest at Qwen3-VL's 2B and 8B on an H200.

    `benchmarks/decode.py`, section sweep, tries others.
    """
    if weights.layers[0].query.values.element_size() == 1:
        return BYTES
    return NARROW if weights.embedding.shape[1] <= NARROW_COLUMNS else Blocking()


def is_even(blocks: Blocks, matrices: tuple[Matrix, ...]) -> bool:
    """Whether the blocks divide every one of these matrices, which have equally many columns."""
    return matrices[0].columns % blocks.columns == 0 and all(m.rows % blocks.rows == 0 for m in matrices)
