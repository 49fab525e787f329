"""The plan stage up to allocation: from an opened image and a question to its relevance map.

Texture, three scorers and opponent processing: as CUDA graphs where that can be had, by a built engine where
there is one for the frame's shape, stage by stage elsewhere. The host reads the result in one copy, and that
is the only time it waits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arrcoc import opponent, query_free, scorers, sequence, streams, texture
from arrcoc.config import Config
from arrcoc.glimpse import GlimpseScorer
from arrcoc.glimpse_tail import Tails
from arrcoc.lod import BuiltEngines
from arrcoc.plan_graph import Judged, PlanGraph, PlanGraphs, pack, unpack
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Features, Frame, Grid, Query, Relevance, Scores, Tensions, Texture
from arrcoc.scene import Overviews, Scene
from arrcoc.timing import StageTimer

_ANY = Query("", (), torch.empty(0))
"""Stands for the question where a scorer reads none."""

Judge = Callable[[Frame, Texture], Tensor]
"""Relevance from elsewhere: a finite map fp32 [R, C] in [0, 1], on the texture's device."""


class Looked(NamedTuple):
    """What was found by looking at an image for a question.

    Attributes:
        glimpse: where it was needed.
        prefix: the prompt up to the glimpse, where it is known by now.
        judged: scores and relevance on the CPU, tensions as floats.
    """

    glimpse: Features | None
    prefix: Prefix | None
    judged: Judged


class Judging:
    """The plan stage for one configuration, up to allocation; keeps no state of a request."""

    def __init__(
        self,
        qwen: QwenVL,
        config: Config,
        head: scorers.TextureHead | None,
        overviews: Overviews,
        built: BuiltEngines | None = None,
    ) -> None:
        """Share the pipeline's parts.

        Args:
            qwen: the checkpoint.
            config: everything that can be set.
            head: the learned texture head; None scores by the glimpse.
            overviews: makes the glimpse.
            built: a build that may hold what measures and scores frames.
        """
        self._qwen, self._config, self._head = qwen, config, head
        self._overviews, self._built = overviews, built
        on_gpu = qwen.device.type == "cuda"
        self._graphs = PlanGraphs(config, head, qwen.device) if on_gpu else None
        self._tails = Tails(qwen, config) if on_gpu and head is None else None

    def describe(self) -> str:
        """How frames are measured and judged, in words."""
        if self._graphs is None:
            return "stage by stage (no CUDA device)"
        asked = "" if self._tails is None else f"; questions: {self._tails.describe()}"
        return self._graphs.describe() + asked

    def prepare(self, scene: Scene, tokens: int, timer: StageTimer) -> Prefix | None:
        """Compute what all questions about an image have in common; the prompt up to the glimpse."""
        with timer.stage("texture"):
            maps = self._texture(scene)
        with timer.stage("glimpse"):
            glimpse, prefix = self._overviews.first_look(scene, tokens, scored=self._head is None)
        with timer.stage("score"):
            self._free(scene, maps)
            self._graph(scene, ahead=True)
            if self._head is None:
                prefix = self._glimpse_scorer(glimpse, prefix, scene.frame.grid).prepare()
            if self._tails is not None and prefix is not None:
                self._tails.prepare(prefix, scene.frame.grid)
        return prefix

    def judge(self, scene: Scene, query: Query, tokens: int, timer: StageTimer) -> Looked:
        """Score an image's tiles for a question and weigh the scores.

        Args:
            scene: the image.
            query: the question.
            tokens: budget.
            timer: receives one stage per step; by a CUDA graph they all are stage `score`.
        """
        graph = self._graph(scene)
        if graph is not None:
            return self._judge_at_once(graph, scene, query, tokens, timer)
        with timer.stage("texture"):
            maps = self._texture(scene)
        with timer.stage("glimpse"):
            glimpse, prefix = self._overviews.first_look(scene, tokens, scored=self._head is None)
        with timer.stage("score"):
            scores, prefix = self._score(scene, maps, query, glimpse, prefix)
        with timer.stage("balance"):
            judged = Judged(scores, opponent.balance(scores, self._config))
            return Looked(glimpse, prefix, unpack(pack(judged), scene.frame.grid))

    def judge_by(self, judge: Judge, scene: Scene, tokens: int, timer: StageTimer) -> Looked:
        """Take relevance from elsewhere: it stands for every score, and all tensions are 0."""
        with timer.stage("texture"):
            maps = self._texture(scene)
        with timer.stage("glimpse"):
            glimpse, prefix = self._overviews.first_look(scene, tokens, scored=False)
        with timer.stage("score"):
            found = judge(scene.frame, maps)
            judged = Judged(Scores(found, found, found), Relevance(found, Tensions(0.0, 0.0, 0.0)))
            return Looked(glimpse, prefix, unpack(pack(judged), scene.frame.grid))

    def _graph(self, scene: Scene, *, ahead: bool = False) -> PlanGraph | None:
        """A CUDA graph that takes a frame from its pixels to its relevance, where that is the way to go."""
        if self._graphs is None or self._built_stage(scene.frame):
            return None
        return self._graphs.find(scene.frame, ahead=ahead)

    def _judge_at_once(
        self, graph: PlanGraph, scene: Scene, query: Query, tokens: int, timer: StageTimer
    ) -> Looked:
        """`judge` by a CUDA graph."""
        with timer.stage("glimpse"):
            glimpse, prefix = self._overviews.first_look(scene, tokens, scored=self._head is None)
        with timer.stage("score"):
            if self._head is not None:
                return Looked(glimpse, prefix, graph.judge(scene.frame, query))
            looking = self._glimpse_scorer(glimpse, prefix, scene.frame.grid)
            if scene.free is not None:
                judged = graph.weigh(scene.free, looking.ask(query))
            else:
                judged = graph.judge(scene.frame, query, partial(looking.ask, query))
                self._take_over(looking.prefix, prefix)
            return Looked(glimpse, looking.prefix, judged)

    def _texture(self, scene: Scene) -> Texture:
        if scene.texture is None and (planes := self._built_stage(scene.frame)):
            scene.texture, scene.free = query_free.judged(planes, scene.frame, self._config.cells)
        elif scene.texture is None:
            scene.texture = texture.extract(scene.frame, self._config)
        return scene.texture

    def _built_stage(self, frame: Frame) -> query_free.Planes | None:
        """What `arrcoc build` made to measure and score frames of this shape."""
        if self._built is None:
            return None
        return self._built.plan_stage(frame.grid.height, frame.grid.width, self._config.cells)

    def _free(self, scene: Scene, maps: Texture) -> tuple[Tensor, Tensor]:
        """The two maps that need no question."""
        if scene.free is None:
            judges = (scorers.propositional, scorers.perspectival)
            found = streams.parallel([partial(judge, maps, _ANY) for judge in judges], self._qwen.device)
            scene.free = found[0], found[1]
        return scene.free

    def _score(
        self, scene: Scene, maps: Texture, query: Query, glimpse: Features | None, prefix: Prefix | None
    ) -> tuple[Scores, Prefix | None]:
        """The three scorers side by side; with the glimpse scorer also the prefix it looked at."""
        grid = scene.frame.grid
        looking = self._head if self._head is not None else self._glimpse_scorer(glimpse, prefix, grid)
        if scene.free is not None:
            found = [*scene.free, looking(maps, query)]
        else:
            judges = (scorers.propositional, scorers.perspectival, looking)
            found = streams.parallel([partial(judge, maps, query) for judge in judges], self._qwen.device)
            scene.free = found[0], found[1]
        made = looking.prefix if isinstance(looking, GlimpseScorer) else prefix
        self._take_over(made, prefix)
        return Scores(*found), made

    def _take_over(self, made: Prefix | None, before: Prefix | None) -> None:
        """A prefix that was made on the scorer's stream lives on for others, on this one."""
        if made is not None and made is not before and self._qwen.device.type == "cuda":
            made.record_stream(torch.cuda.current_stream(self._qwen.device))

    def _glimpse_scorer(self, glimpse: Features | None, prefix: Prefix | None, grid: Grid) -> GlimpseScorer:
        assert glimpse is not None, "the glimpse scorer looks at the glimpse"
        sides = self._config.sides
        where = sequence.glimpse_positions(grid, sides[0], sides[3])
        extent = sequence.extent(grid, sides[3])
        return GlimpseScorer(self._qwen, glimpse, where, extent, grid, self._config, prefix, self._tails)
