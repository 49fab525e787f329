"""A question's rows through the decoder's first layers, and where they look, at static shapes.

The few rows of a question are hundreds of kernels of a few microseconds, so that on a GPU launching them
takes the time. Here rows are padded to a few sizes and everything lies at fixed addresses, so that a pass is
captured as a CUDA graph. No row sees those after it, and rows of padding weigh nothing in the mean: what a
pass gives does not depend on them.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arrcoc.attention_probe import attention_shares, probe_layers, relative, tile_shares
from arrcoc.capture import captured
from arrcoc.config import Config
from arrcoc.errors import first_line
from arrcoc.kv import KvCache
from arrcoc.prefix_graph import FirstLooks
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Grid
from arrcoc.transfer import to_device

_LOG = logging.getLogger(__name__)

ROWS = (32, 64, 128)
"""Rows that passes are padded to; longer questions have no static pass."""
KEEP_BYTES = 1 << 30
"""Most bytes of keys and values that passes of several shapes keep; one shape alone may exceed it."""
KEEP_SHAPES = 64
"""Most shapes, whose graphs take memory too."""


class Shape(NamedTuple):
    """All that the shapes and positions of a pass depend on.

    Attributes:
        grid: the tile grid.
        length: positions of the prefix.
        n_vision: tokens of the glimpse, the last of them.
        next_position: of the tail's first row.
    """

    grid: Grid
    length: int
    n_vision: int
    next_position: float


class Tails:
    """Static passes of one checkpoint and configuration, for the images met lately. Threads may share it."""

    def __init__(self, qwen: QwenVL, config: Config) -> None:
        """Prepare; nothing is allocated or captured yet.

        Args:
            qwen: the checkpoint.
            config: probe layers, gain, and the glimpse's side.
        """
        self._qwen, self._side, self._gain = qwen, config.sides[0], config.attention_gain
        self._layers = probe_layers(config.probe_depth, qwen.n_layers)
        self.looks = FirstLooks(qwen, config)
        self._lock = threading.Lock()
        self._passes: OrderedDict[Shape, TailPass] = OrderedDict()
        self.failure, self._captures = "", qwen.device.type == "cuda"
        # A pool whose graphs are all gone cannot be used again: the first one stays.
        self._first: torch.cuda.CUDAGraph | None = None
        if self._captures:
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def describe(self) -> str:
        """How questions and first looks are launched, in words."""
        return f"{self._describe()}; first looks: {self.looks.describe()}"

    def _describe(self) -> str:
        if not self._captures:
            return "not captured"
        if self.failure:
            return f"no CUDA graphs ({self.failure})"
        with self._lock:
            return f"CUDA graphs ({sum(p.n_graphs for p in self._passes.values())} captured)"

    @torch.inference_mode()
    def ask(self, prefix: Prefix, grid: Grid, tail: Sequence[int]) -> Tensor | None:
        """The relative attention of a prompt to each tile; see `GlimpseScorer`.

        Args:
            prefix: head and glimpse, with its probe.
            grid: the tile grid.
            tail: token ids after the image, of which the first ends it and belongs to no prompt.

        Returns:
            fp32 [R, C] in [0, 1]; None where the tail is longer than any static pass.
        """
        size = next((size for size in ROWS if size >= len(tail)), None)
        if size is None:
            return None
        with self._turn():
            made = self._pass(prefix, grid)
            made.load(prefix, tail)
            return self._run(made, size).clone()

    @torch.inference_mode()
    def prepare(self, prefix: Prefix, grid: Grid) -> None:
        """Capture the shortest pass over such a prefix, unless it is, so that its first question need not."""
        if not self._captures or self.failure:
            return
        with self._turn():
            made = self._pass(prefix, grid)
            if ROWS[0] not in made.graphs:
                made.load(prefix, (0, 0))
                for _ in range(2):
                    self._run(made, ROWS[0])

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Issue work on the static memory after that of other threads, on the caller's stream."""
        if not self._captures:
            with self._lock:
                yield
            return
        with self._lock, torch.cuda.device(self._qwen.device):
            stream = torch.cuda.current_stream(self._qwen.device)
            stream.wait_event(self._used)
            try:
                yield
            finally:
                self._used.record(stream)

    def _pass(self, prefix: Prefix, grid: Grid) -> TailPass:
        shape = Shape(grid, prefix.length, prefix.n_vision, prefix.next_position)
        if shape not in self._passes:
            self._passes[shape] = TailPass(self._qwen, prefix, shape, self._side, self._layers, self._gain)
        self._passes.move_to_end(shape)
        while len(self._passes) > 1 and (
            len(self._passes) > KEEP_SHAPES or sum(p.nbytes for p in self._passes.values()) > KEEP_BYTES
        ):
            if self._captures:
                self._used.synchronize()  # its memory may go to another stream at once
            self._passes.popitem(last=False)
        return self._passes[shape]

    def _run(self, made: TailPass, size: int) -> Tensor:
        """Captured when it is met for the second time, as only what has run before can be."""
        if self._captures and not self.failure and made.may_capture(size):
            try:
                made.graphs[size] = captured(partial(made.compute, size), self._qwen.device, self._pool)
                self._first = self._first or made.graphs[size][0]
            except torch.OutOfMemoryError:  # another time there may be enough
                made.forget(size)
                return made.compute(size)
            except RuntimeError as error:
                self.failure = first_line(error)
                _LOG.warning("questions are read without CUDA graphs: %s", self.failure)
        return made.run(size)


class TailPass:
    """Static memory for prefixes of one shape, and passes of several sizes over it."""

    def __init__(
        self, qwen: QwenVL, prefix: Prefix, shape: Shape, side: int, layers: list[int], gain: float
    ) -> None:
        """Allocate.

        Args:
            qwen: the checkpoint.
            prefix: one of this shape.
            shape: what it has in common with others.
            side: tokens of the glimpse along a tile's edge.
            layers: probed layers, ascending.
            gain: exponent of the relative attention.
        """
        self._qwen, self._shape, self._side = qwen, shape, side
        self._layers, self._gain = layers, gain
        keys, _ = prefix.layer(0)
        _, heads, length, width = keys.shape
        self._kv = keys.new_zeros(layers[-1] + 1, 2, heads, length + ROWS[-1], width)
        self._given = torch.zeros(ROWS[-1] + 1, dtype=torch.int64, device=keys.device)
        self._excluded = torch.zeros(len(layers), shape.n_vision, dtype=torch.bool, device=keys.device)
        self._generic = torch.zeros(shape.n_vision, device=keys.device)
        steps = torch.arange(ROWS[-1]).float() + shape.next_position
        self._positions = to_device(steps.expand(3, -1), keys.device)
        self._holds: weakref.ref[Prefix] | None = None
        self._ran: set[int] = set()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, by far the most."""
        return self._kv.nbytes

    @property
    def n_graphs(self) -> int:
        """Sizes that are captured."""
        return len(self.graphs)

    def may_capture(self, size: int) -> bool:
        """Whether a size has run but is not captured yet."""
        return size in self._ran and size not in self.graphs

    def forget(self, size: int) -> None:
        """Take a size as one that has not run."""
        self._ran.discard(size)

    def load(self, prefix: Prefix, tail: Sequence[int]) -> None:
        """Take over a prefix, unless it is there already, and a tail of at least two tokens."""
        if self._holds is None or self._holds() is not prefix:
            probe = prefix.probe
            assert probe is not None, "prepared"
            self._holds = None  # until all of it is there: any part may run out of memory
            prefix.load_into(self._kv)
            for row, layer in zip(self._excluded, self._layers, strict=True):
                row.copy_(probe.excluded[layer])
            self._generic.copy_(probe.generic)
            self._holds = weakref.ref(prefix)
        spare = [0] * (len(self._given) - 1 - len(tail))
        self._given.copy_(to_device(torch.tensor([*tail, *spare, len(tail)]), self._given.device))

    def run(self, size: int) -> Tensor:
        """fp32 [R, C], static where it comes from a graph."""
        if size in self.graphs:
            graph, found = self.graphs[size]
            graph.replay()
            return found
        self._ran.add(size)
        return self.compute(size)

    def compute(self, size: int) -> Tensor:
        """The pass itself over `size` rows: reads and writes static memory only."""
        positions, row = self._positions[:, :size], torch.arange(size, device=self._kv.device)
        asks = ((row > 0) & (row < self._given[-1])).float()
        rows = asks / asks.sum()
        length, last = self._shape.length, self._layers[-1]
        cache = KvCache.holding(self._kv[:, :, :, : length + size], length)
        image, seen = slice(length - self._shape.n_vision, length), list[Tensor]()

        def observe(layer: int, hidden: Tensor) -> None:
            if layer in self._layers:
                query = self._qwen.queries(layer, hidden, positions)
                excluded = self._excluded[self._layers.index(layer)]
                seen.append(attention_shares(query, self._kv[layer, 0, :, image], excluded, rows))

        embeds = self._qwen.embed_tensor(self._given[:size])[None]
        # The last probed layer judges by its input: it need not run.
        observe(last, self._qwen.run_layers(embeds, positions, cache, range(last), observe=observe))
        there, anyhow = torch.stack(seen).mean(0), self._generic
        grid, side = self._shape.grid, self._side
        return relative(tile_shares(there, grid, side), tile_shares(anyhow, grid, side), self._gain)
