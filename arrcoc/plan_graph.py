"""The plan stage as CUDA graphs: texture, scorers and opponent processing, launched at once.

On a GPU these stages are a hundred and more kernels of a few microseconds, so that launching them takes the
time. A graph is captured for each shape of frame; what it reads and writes stays where it is, and the frame
itself is found by its address. The host reads one packed tensor, and that is the only time it waits.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arrcoc import opponent, scorers, streams, texture, texture_kernel
from arrcoc.capture import captured
from arrcoc.config import Config
from arrcoc.errors import first_line
from arrcoc.records import Frame, Grid, Query, Relevance, Scores, Tensions, Texture

_LOG = logging.getLogger(__name__)

SHAPES = 8
"""Shapes of frame whose graphs are kept; the one that was unused for longest goes first."""
_WARM_UP = 2

Shape = tuple[Grid, int]
"""A tile grid and the edge of a tile of the background in pixels: all that kernels' shapes depend on."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What the plan stage made of a frame and a question, before allocation.

    Attributes:
        scores: the three maps.
        relevance: the map and the tensions.
    """

    scores: Scores
    relevance: Relevance


def pack(judged: Judged) -> Tensor:
    """Scores, map and tensions in one tensor, fp32 [4*R*C + 3]; `unpack` takes it apart."""
    maps = (*_maps(judged.scores), judged.relevance.map)
    return torch.cat(
        [*(m.flatten() for m in maps), *(_as_row(t, maps[0]) for t in judged.relevance.tensions)]
    )


def unpack(packed: Tensor, grid: Grid) -> Judged:
    """What `pack` packed, on the CPU and with tensions as floats: the one copy from the device."""
    values = packed.cpu()
    assert values.shape == (4 * grid.count + 3,), (values.shape, grid)
    first, second, third, relevance = values[: 4 * grid.count].view(4, grid.rows, grid.cols)
    return Judged(Scores(first, second, third), Relevance(relevance, Tensions(*values[-3:].tolist())))


class PlanGraphs:
    """The graphs of one configuration on one CUDA device, for the shapes of frame that were met lately.

    A shape is captured when it is met for the second time, as a capture takes as long as some tens of runs.
    Threads may share an object.
    """

    def __init__(
        self, config: Config, head: scorers.TextureHead | None, device: torch.device, parallel: bool = True
    ) -> None:
        """Prepare; nothing is captured yet.

        Args:
            config: cells, and the constants of opponent processing.
            head: the learned texture head, if it judges.
            device: a CUDA device.
            parallel: whether the scorers are branches of the graph, instead of one after another.
        """
        self._make = partial(PlanGraph, config=config, head=head, device=device, parallel=parallel)
        self._lock = threading.Lock()
        self._shapes: OrderedDict[Shape, PlanGraph | None] = OrderedDict()
        self.failure = ""

    def describe(self) -> str:
        """How the plan stage runs, in words."""
        if self.failure or not texture_kernel.installed():
            return f"stage by stage ({self.failure or 'no triton'})"
        with self._lock:
            captured = sum(made is not None for made in self._shapes.values())
        return f"CUDA graphs ({captured} captured)"

    @torch.inference_mode()
    def find(self, frame: Frame, *, ahead: bool = False) -> PlanGraph | None:
        """The graph for a frame's shape, captured now where it is time to.

        Args:
            frame: the frame.
            ahead: whether more of this shape will surely follow, so that even the first is captured.

        Returns:
            None for the first frame of a shape, where there is no triton, and after a capture has failed.
        """
        if self.failure or not texture_kernel.usable(frame.pixels):
            return None
        shape = frame.grid, frame.background.shape[1] // frame.grid.rows
        with self._lock:
            made = self._shapes.get(shape)
            if made is None and (ahead or shape in self._shapes):
                made = self._captured(shape)
            self._shapes[shape] = made
            self._shapes.move_to_end(shape)
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        return made

    def _captured(self, shape: Shape) -> PlanGraph | None:
        try:
            return self._make(shape)
        except torch.OutOfMemoryError as error:  # another time there may be enough
            _LOG.warning("a plan stage runs without a CUDA graph: %s", first_line(error))
            return None
        except RuntimeError as error:
            self.failure = first_line(error)
            _LOG.warning("the plan stage runs without CUDA graphs: %s", self.failure)
            return None


class PlanGraph:
    """Texture, scorers and opponent processing of one shape of frame, and the memory that they share.

    With the learned texture head one graph holds all of it. Without, a first graph holds texture and the two
    scorers that need no question, a second one opponent processing; the participatory map comes from the
    caller, who makes it beside the first. Threads may share an object.
    """

    def __init__(
        self,
        shape: Shape,
        config: Config,
        head: scorers.TextureHead | None,
        device: torch.device,
        parallel: bool,
    ) -> None:
        """Capture; raises RuntimeError where CUDA refuses to.

        Args:
            shape: the shape of frame.
            config: cells, and the constants of opponent processing.
            head: the learned texture head, if it judges.
            device: a CUDA device.
            parallel: whether the scorers are branches of the graph.
        """
        self._shape, self._config, self._device, self._parallel = shape, config, device, parallel
        self._lock = threading.Lock()
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        grid, small_tile = shape
        self._where = texture_kernel.Addresses(device)
        # Warming up and capturing run on an empty frame; each run afterwards points to its own.
        edges = (grid.tile, small_tile)
        shapes = [(3, grid.rows * edge, grid.cols * edge) for edge in edges]
        blank = [torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes]
        self._where.point(*blank)
        self._embedding = torch.zeros(head.query_dim if head else 0, device=device)
        self._maps = torch.zeros(3, grid.rows, grid.cols, device=device)
        if head is None:
            self._first, self._free = _capture(self._judge_free, device)
            self._last, self._packed = _capture(self._judge_balance, device)
        else:
            self._first, self._packed = _capture(lambda: self._judge_all(head), device)
        torch.cuda.current_stream(device).synchronize()  # the blank frame may go now

    @torch.inference_mode()
    def judge(self, frame: Frame, query: Query, look: Callable[[], Tensor] | None = None) -> Judged:
        """Judge a frame, up to one copy to the host.

        Args:
            frame: of this shape.
            query: the question; its embedding is read where the head judges.
            look: makes the participatory map where no head does; runs beside the query-free graph.

        Returns:
            Maps on the CPU and tensions as floats.
        """
        assert (look is None) == bool(self._embedding.numel()), "either the head judges or the caller"
        if look is None:
            packed = self._in_turn(partial(self.run_all, frame, query))
        else:
            blind: Callable[[], Tensor] = partial(self._in_turn, partial(self.run_free, frame))
            free, asked = streams.parallel([blind, look], self._device)
            packed = self._in_turn(partial(self.run_balance, free, asked))
        return unpack(packed, frame.grid)

    @torch.inference_mode()
    def weigh(self, free: tuple[Tensor, Tensor], asked: Tensor) -> Judged:
        """Opponent processing alone, where no head judges, of maps fp32 [R, C] that are known."""
        assert not self._embedding.numel(), "the head's graph holds all stages"
        packed = self._in_turn(partial(self.run_balance, torch.stack(free), asked))
        return unpack(packed, self._shape[0])

    def _in_turn(self, run: Callable[[], Tensor]) -> Tensor:
        """Issue work on the shared memory after that of other threads, on the caller's stream."""
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._used)
            found = run()
            self._used.record(stream)
        return found

    def run_all(self, frame: Frame, query: Query) -> Tensor:
        """Texture, three scorers and opponent processing: packed."""
        pixels, background = frame.pixels.contiguous(), frame.background.contiguous()
        self._where.point(pixels, background)
        self._embedding.copy_(query.embedding)
        self._first.replay()
        return self._packed.clone()

    def run_free(self, frame: Frame) -> Tensor:
        """Texture and the two scorers that need no question: fp32 [2, R, C]."""
        pixels, background = frame.pixels.contiguous(), frame.background.contiguous()
        self._where.point(pixels, background)
        self._first.replay()
        return self._free.clone()

    def run_balance(self, free: Tensor, asked: Tensor) -> Tensor:
        """Opponent processing of three maps: packed."""
        self._maps[:2].copy_(free)
        self._maps[2].copy_(asked)
        self._last.replay()
        return self._packed.clone()

    def _texture(self) -> Texture:
        grid, small_tile = self._shape
        return texture.extract_at(self._where, grid, small_tile, self._config.cells)

    def _score(self, judges: list[scorers.Scorer], query: Query) -> list[Tensor]:
        maps = self._texture()
        tasks = [partial(judge, maps, query) for judge in judges]
        return streams.parallel(tasks, self._device) if self._parallel else [task() for task in tasks]

    def _judge_free(self) -> Tensor:
        query = Query("", (), torch.empty(0))
        return torch.stack(self._score([scorers.propositional, scorers.perspectival], query))

    def _judge_balance(self) -> Tensor:
        scores = Scores(*self._maps.unbind())
        return pack(Judged(scores, opponent.balance(scores, self._config)))

    def _judge_all(self, head: scorers.TextureHead) -> Tensor:
        query = Query("", (), self._embedding)
        scores = Scores(*self._score([scorers.propositional, scorers.perspectival, head], query))
        return pack(Judged(scores, opponent.balance(scores, self._config)))


def _capture(run: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture `run`, which reads and writes fixed memory only; returns the graph and its output."""
    caller = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(caller)
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(_WARM_UP):
            run()
    caller.wait_stream(side)
    return captured(run, device)


def _as_row(tension: Tensor | float, like: Tensor) -> Tensor:
    """fp32 [1]; filling on the device, unlike copying a number to it, does not wait for it."""
    return tension.reshape(1) if isinstance(tension, Tensor) else like.new_full((1,), tension)


def _maps(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    return scores.propositional, scores.perspectival, scores.participatory
