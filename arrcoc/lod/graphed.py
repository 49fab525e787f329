"""The fused torch backend: one CUDA graph for each batch bucket, in memory that all graphs share."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from arrcoc.capture import captured
from arrcoc.errors import first_line
from arrcoc.lod.attention import Blocks
from arrcoc.lod.bucketed import BucketedEngine
from arrcoc.lod.fused_tower import FusedGeometry, FusedTower
from arrcoc.records import Features

logger = logging.getLogger(__name__)

MOST_PATCHES = 1 << 16
"""Most patches of one batch: larger ones run no faster, and take memory in proportion."""
ALONE_PATCHES = 6144
"""Most patches of one batch that gets memory of its own where `lod_streams` is auto, so that LODs overlap.

On an H200 batches of up to 5,760 patches gained by it, whole frames of large ones did not
(`benchmarks/lod_engines.py`, section overlap).
"""
_ALIGNMENT = 256  # of tensors in one buffer, in bytes


class Workspace:
    """Device memory that the graphs of one checkpoint share, so that one of them runs at a time.

    Every run reads and writes the same memory, whatever stream it is on: runs wait for one another on the
    device, never on the host. On the CPU there are no graphs, and runs take turns by the lock alone.
    """

    def __init__(self, device: torch.device) -> None:
        """Args: where the graphs run."""
        self.device, self.failure = device, ""
        self._lock = threading.RLock()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.captures = device.type == "cuda"
        if self.captures:
            # A pool whose graphs are all gone cannot be used again: the first one stays.
            self._first: torch.cuda.CUDAGraph | None = None
            with torch.cuda.device(device):
                self._pool = torch.cuda.graph_pool_handle()
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Issue work on the shared memory after that of other threads, on the caller's stream."""
        if not self.captures:
            with self._lock:
                yield
            return
        with self._lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def take(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """Tensors side by side in the shared buffer, which every call hands out from its start.

        A buffer that is too small is replaced by a larger one; graphs that write to the old one keep it.
        """
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        if self._buffer.numel() < starts[-1]:
            size = max(starts[-1], 2 * self._buffer.numel())  # so that all old ones together are no larger
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        parts = zip(shapes, starts, sizes, strict=False)
        return [self._buffer[at : at + size].view(dtype).view(shape) for (shape, dtype), at, size in parts]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a graph; `run` itself where memory is short or CUDA refuses (`failure` says why).

        Call it in a `turn`, after `run` has run once, so that its kernels are compiled and loaded.
        """
        if not self.captures or self.failure:
            return run
        try:
            graph, _ = captured(run, self.device, self._pool)
        except torch.OutOfMemoryError as error:  # other buckets may be smaller
            logger.warning("a batch of a LOD engine runs without a CUDA graph: %s", error)
            return run
        except RuntimeError as error:
            self.failure = first_line(error)
            logger.warning("LOD engines run without CUDA graphs: %s", self.failure)
            return run
        self._first = self._first or graph
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One batch size: what is read, what is written, and what does it."""

    pixels: Tensor
    out: Features
    run: Callable[[], None]


class GraphedLodEngine(BucketedEngine):
    """Encodes tiles of one side with the fused tower; see `LodEngine`. Threads may share it.

    A bucket is captured when it is met for the first time, or by running it ahead of time. Small ones may
    have memory of the engine's own, and then run beside other engines; large ones fill a GPU alone.
    """

    def __init__(
        self,
        tower: FusedTower,
        workspace: Workspace,
        side: int,
        halo: int,
        buckets: Sequence[int],
        blocks: Blocks | None,
        name: str,
        fingerprint: str,
        alone: int = 0,
    ) -> None:
        """Make an engine; nothing is compiled or captured yet.

        Args:
            tower: of the checkpoint, shared by the engines of all sides.
            workspace: likewise.
            side: tokens along a tile's edge.
            halo: tokens of margin.
            buckets: ascending batch sizes; those of more than `MOST_PATCHES` are left out.
            blocks: how the attention kernel is cut; None for a library's attention.
            name: of the backend, for people.
            fingerprint: see `LodEngine`.
            alone: most patches of a batch that runs in memory of this engine's own.
        """
        edge = side + 2 * halo
        patches = (edge * tower.weights.merge) ** 2
        super().__init__(side, halo, [b for b in buckets if b * patches <= MOST_PATCHES] or buckets[:1])
        self.fingerprint, self._name = fingerprint, name
        self._tower, self._workspace, self._blocks = tower, workspace, blocks
        self._shape: FusedGeometry = tower.geometry(edge, edge)
        self._edge_px = edge * tower.weights.token_px
        self._apart = max((b for b in self.buckets if b * patches <= alone), default=0)
        self._own = Workspace(workspace.device) if self._apart else workspace
        self._made: dict[int, _Bucket] = {}

    @property
    def backend(self) -> str:
        """See `LodEngine`."""
        if not self._workspace.captures:
            return self._name
        failure = self._workspace.failure or self._own.failure
        return f"{self._name}, no CUDA graphs: {failure}" if failure else f"{self._name}, CUDA graphs"

    @property
    def apart(self) -> int:
        """See `LodEngine`: batches are never larger than the smallest bucket that holds all tiles."""
        return self._apart

    @torch.inference_mode()
    def encode_ahead(self, pixels: Tensor) -> Features:
        """See `LodEngine.encode_ahead`: cut into buckets that were met before, of which there must be one.

        A capture fails if any other thread waits for the whole device meanwhile.
        """
        met = sorted(self._made)
        assert met, "an engine is tried when it is made"
        return self._encode_at(pixels, met)

    def _encode_bucket(self, pixels: Tensor, size: int) -> Features:
        room = self._own if size <= self._apart else self._workspace
        with room.turn():
            if size not in self._made:
                self._made[size] = self._make(size, room)
            bucket = self._made[size]
            # What is left in the rows behind are other tiles; no tile's features depend on its neighbours'.
            bucket.pixels[: len(pixels)].copy_(pixels)
            bucket.run()
            found = self._cropped(bucket.out, len(pixels))
            return Features(found.tokens.clone(), found.deepstack.clone())

    def _make(self, size: int, room: Workspace) -> _Bucket:
        empty = self._tower.shapes(size, self._shape)
        edge = (size, 3, self._edge_px, self._edge_px)
        pixels, tokens, planes = room.take([(edge, torch.uint8), *empty])
        out = Features(tokens, planes)

        def run() -> None:
            self._tower.forward(pixels, self._shape, self._blocks, out)

        pixels.zero_()
        run()
        return _Bucket(pixels, out, room.capture(run))
