"""Two buffers for the features of tiles: one to gather from on a device, one of pinned host memory.

Both are cut into pages of one token, so that tiles of every side share them without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arrcoc.cache.fences import Fences, Ready, await_all, upload
from arrcoc.cache.pages import Pages, PageStack, runs
from arrcoc.records import Features

_FIRST_BYTES = 64 << 20  # of a buffer on the device, which then doubles
_CHUNK_BYTES = 32 << 20  # of host memory, allocated at once


class Kind(NamedTuple):
    """What one token holds: 1 + L planes of D values."""

    planes: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, features: Features) -> Kind:
        """The kind of some features."""
        return cls(1 + features.deepstack.shape[0], features.tokens.shape[-1], features.tokens.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one token."""
        return self.planes * self.width * self.dtype.itemsize


def arrange(parts: Sequence[Features], order: Sequence[int]) -> Features:
    """Tiles of one side from several records, in the order of rows given, counted over all parts in turn."""
    tokens = parts[0].tokens if len(parts) == 1 else torch.cat([part.tokens for part in parts])
    planes = parts[0].deepstack if len(parts) == 1 else torch.cat([part.deepstack for part in parts], dim=1)
    if list(order) == list(range(len(tokens))):
        return Features(tokens, planes)
    rows = upload(order, tokens.device)
    return Features(tokens.index_select(0, rows), planes.index_select(1, rows))


class DeviceArena:
    """Tiles in one buffer of [planes * pages, D] rows: any number is read or written by a few launches.

    It starts small and doubles up to its bound. Callers must hold one lock over all calls; kernels are
    ordered across CUDA streams here.
    """

    def __init__(self, kind: Kind, device: torch.device, max_bytes: int) -> None:
        """Args: what a token holds, where, and the bound."""
        self.kind, self.device = kind, device
        self._max_pages = max_bytes // kind.page_bytes
        self._stack, self._fences = PageStack(), Fences(device)
        self._rows = torch.empty(0, kind.width, dtype=kind.dtype, device=device)
        self._grown: Ready | None = None

    @property
    def reserved(self) -> int:
        """Bytes of the buffer."""
        return self._rows.nbytes

    def take(self, count: int) -> Pages:
        """Pages for `count` tokens; the caller's bookkeeping keeps within the bound."""
        if count > self._stack.free:
            self._grow(count - self._stack.free)
        return self._stack.take(count)

    def give(self, pages: Pages) -> None:
        """Return pages; uses of them that are under way on any stream come first."""
        self._stack.give(pages)

    @torch.no_grad()
    def write(self, pages: Pages, features: Features) -> Ready | None:
        """Write K tiles, tokens [K, m, D] and planes [L, K, m, D], to K * m pages on the current stream."""
        self._fences.wait()
        where = upload(pages, self.device)
        planes = self._rows.view(self.kind.planes, -1, self.kind.width)
        planes[0].index_copy_(0, where, features.tokens.reshape(-1, self.kind.width))
        planes[1:].index_copy_(1, where, features.deepstack.flatten(1, 2))
        return self._fences.mark()

    @torch.no_grad()
    def read(self, pages: Sequence[Pages], ready: Sequence[Ready | None]) -> Features:
        """A copy of K tiles of equal side, on the current stream: tokens [K, m, D], planes [L, K, m, D]."""
        rows = self._row_numbers(np.concatenate(pages))
        made = self._gather(rows.ravel(), ready).view(self.kind.planes, len(pages), -1, self.kind.width)
        return Features(made[0], made[1:])

    @torch.no_grad()
    def read_flat(self, pages: Sequence[Pages], ready: Sequence[Ready | None]) -> list[Tensor]:
        """A copy of tiles of any side, each as [planes, m, D] and contiguous, on the current stream."""
        rows = np.concatenate([self._row_numbers(each).ravel() for each in pages])
        parts = torch.split(self._gather(rows, ready), [self.kind.planes * len(each) for each in pages])
        return [part.view(self.kind.planes, -1, self.kind.width) for part in parts]

    def _row_numbers(self, pages: Pages) -> NDArray[np.int64]:
        return np.arange(self.kind.planes)[:, None] * self._stack.count + pages

    def _gather(self, rows: NDArray[np.int64], ready: Sequence[Ready | None]) -> Tensor:
        await_all([*ready, self._grown], self.device)
        made = self._rows.index_select(0, upload(rows, self.device))
        self._fences.mark()
        return made

    def _grow(self, more: int) -> None:
        """Move to a buffer of twice the pages, or of `more` if that is more, within the bound."""
        old, kind = self._stack.count, self.kind
        assert old + more <= self._max_pages, f"{old + more} pages, bound {self._max_pages}"
        wanted = max(2 * old, old + more, _FIRST_BYTES // kind.page_bytes)
        count = min(wanted, self._max_pages)
        self._fences.wait()
        # Outside inference mode: such a tensor may be written to in every mode.
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.empty(kind.planes * count, kind.width, dtype=kind.dtype, device=self.device)
            if old:
                rows.view(kind.planes, count, -1)[:, :old] = self._rows.view(kind.planes, old, -1)
        self._fences.keep(self._rows)
        self._rows = rows
        self._grown = self._fences.mark()
        self._stack.grow(count)


class HostArena:
    """Tiles in chunks of host memory, pinned where they come from CUDA; pages may lie in several runs.

    Callers must hold one lock over all calls. Copies are ordered across CUDA streams here.
    """

    def __init__(self, kind: Kind, device: torch.device, max_bytes: int) -> None:
        """Args: what a token holds, the device that tiles come from and go to, and the bound."""
        self.kind, self.device = kind, device
        self._max_pages = max_bytes // kind.page_bytes
        self._chunk = max(1, min(_CHUNK_BYTES // kind.page_bytes, self._max_pages))
        self._stack, self._fences = PageStack(), Fences(device)
        self._chunks: list[Tensor] = []

    @property
    def reserved(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def take(self, count: int) -> Pages:
        """Pages for `count` tokens; the caller's bookkeeping keeps within the bound."""
        while count > self._stack.free:
            self._grow()
        return self._stack.take(count)

    def give(self, pages: Pages) -> None:
        """Return pages; copies of them that are under way on any stream come first."""
        self._stack.give(pages)

    @torch.no_grad()
    def write(self, pages: Sequence[Pages], tiles: Sequence[Tensor]) -> Ready | None:
        """Write tiles [planes, m, D], each contiguous and on the device, on the current stream."""
        self._fences.wait()
        for where, tile in zip(pages, tiles, strict=True):
            flat = tile.reshape(len(where), -1)
            for at, part, rows in self._parts(where):
                part.copy_(flat[at : at + rows], non_blocking=True)
        return self._fences.mark()

    @torch.no_grad()
    def read(self, pages: Sequence[Pages], ready: Sequence[Ready | None]) -> Features:
        """A copy on the device of K tiles of equal side: tokens [K, m, D], planes [L, K, m, D]."""
        await_all(ready, self.device)
        tiles = torch.stack([self._read_tile(where, self.device) for where in pages], dim=1)
        self._fences.mark()
        return Features(tiles[0], tiles[1:])

    @torch.no_grad()
    def read_to_host(self, pages: Pages) -> Tensor:
        """A copy of one tile [planes, m, D] in ordinary host memory; it must be there already."""
        return self._read_tile(pages, torch.device("cpu"))

    def _read_tile(self, pages: Pages, device: torch.device) -> Tensor:
        kind = self.kind
        flat = torch.empty(len(pages), kind.planes * kind.width, dtype=kind.dtype, device=device)
        for at, part, rows in self._parts(pages):
            flat[at : at + rows].copy_(part, non_blocking=True)
        return flat.view(kind.planes, -1, kind.width)

    def _parts(self, pages: Pages) -> list[tuple[int, Tensor, int]]:
        """For every run of pages: its place among them, its memory [rows, planes * D], and its rows."""
        parts = []
        for at, first, rows in runs(pages, self._chunk):
            start = first % self._chunk
            parts.append((at, self._chunks[first // self._chunk][start : start + rows], rows))
        return parts

    def _grow(self) -> None:
        count, kind = min(self._chunk, self._max_pages - self._stack.count), self.kind
        assert count > 0, f"more than {self._max_pages} pages"
        with torch.inference_mode(False):
            pinned = self.device.type == "cuda"
            made = torch.empty(count, kind.planes * kind.width, dtype=kind.dtype, pin_memory=pinned)
        self._chunks.append(made)
        self._stack.grow(self._stack.count + count)
