"""The pages of a buffer: which are free. A page holds one token's planes, so a tile of m tokens takes m."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int64]


class PageStack:
    """Free pages of a growing buffer, last freed first, so that neighbours stay together."""

    def __init__(self) -> None:
        """Start with no pages."""
        self.count = self.free = 0
        self._stack: Pages = np.empty(0, np.int64)

    def grow(self, count: int) -> None:
        """Let there be `count` pages in all; the new ones are taken last, in ascending order."""
        assert count >= self.count, (count, self.count)
        fresh = np.arange(count - 1, self.count - 1, -1)
        room = np.empty(self.count - self.free, np.int64)
        self._stack = np.concatenate([fresh, self._stack[: self.free], room])
        self.free += count - self.count
        self.count = count

    def take(self, count: int) -> Pages:
        """Take `count` of the free pages."""
        assert 0 < count <= self.free, f"{count} of {self.free} free pages"
        self.free -= count
        return self._stack[self.free : self.free + count][::-1].copy()

    def give(self, pages: Pages) -> None:
        """Return pages."""
        assert self.free + len(pages) <= self.count, "more pages returned than taken"
        self._stack[self.free : self.free + len(pages)] = pages[::-1]
        self.free += len(pages)


def runs(pages: Pages, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Maximal runs of consecutive pages within chunks of `chunk`: (place in `pages`, first page, length)."""
    breaks = (np.diff(pages) != 1) | (pages[1:] % chunk == 0)
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pages)]
    for start, stop in pairwise(starts):
        yield start, int(pages[start]), stop - start
