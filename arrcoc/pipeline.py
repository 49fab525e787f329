"""The way of one image and one question through the stages, up to its vision tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arrcoc import allocation, image, scorers, sequence
from arrcoc.cache import TileCache
from arrcoc.config import Config
from arrcoc.encoder import TileEncoder
from arrcoc.encoding import Encoding, thumbnail
from arrcoc.errors import BudgetError
from arrcoc.judging import Judge, Judging
from arrcoc.lod import BuiltEngines, LodEngine
from arrcoc.prefetch import TilePrefetcher, likely_next
from arrcoc.prefix_store import PrefixStore
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import (
    Features,
    Frame,
    Grid,
    Lod,
    Plan,
    Query,
    Scores,
    Tiles,
    VisionSequence,
)
from arrcoc.scene import Overviews, Scene
from arrcoc.timing import StageTimer
from arrcoc.transfer import Arrival


@dataclass(frozen=True, slots=True)
class Look:
    """An encoding, with what the decoder can reuse of the work done for it.

    Attributes:
        encoding: its timings are not filled in yet.
        prefix: the prompt up to and with the overview, where it was run apart.
    """

    encoding: Encoding
    prefix: Prefix | None


class Pipeline:
    """All stages for one configuration; shares the checkpoint, the cache and the engines with others."""

    def __init__(
        self,
        qwen: QwenVL,
        config: Config,
        engines: Mapping[Lod, LodEngine],
        cache: TileCache,
        head: scorers.TextureHead | None,
        prefixes: PrefixStore | None = None,
        built: BuiltEngines | None = None,
        ahead: TilePrefetcher | None = None,
    ) -> None:
        """Make a pipeline.

        Args:
            qwen: the checkpoint.
            config: everything that can be set.
            engines: an engine for each LOD.
            cache: the tile cache.
            head: the learned texture head; None scores by the glimpse.
            prefixes: where beginnings of prompts are kept; None keeps none.
            built: a build that may hold what measures and scores frames.
            ahead: encodes tiles of opened images ahead; None encodes none.
        """
        self._ahead = ahead
        self._qwen, self._config, self._head = qwen, config, head
        assert all(engine.halo == config.halo for engine in engines.values()), "engines of another halo"
        self._encoder = TileEncoder(engines, cache, image.tile_pixels, image.hash_tiles, qwen.vision.token_px)
        kept = PrefixStore(0, config.cache_half_life) if prefixes is None else prefixes
        self._overviews = Overviews(qwen, config, self._encoder, kept)
        self._judging = Judging(qwen, config, head, self._overviews, built)

    def look(
        self,
        pixels: Tensor,
        query: Query,
        budget: int | float | None,
        timer: StageTimer,
        judge: Judge | None = None,
    ) -> Look:
        """Encode an image uint8 [3, h, w] for a question: `open`, then `look_at`."""
        return self.look_at(self.open(pixels, timer), query, budget, timer, judge)

    @torch.inference_mode()
    def open(self, pixels: Tensor, timer: StageTimer, *, kept: bool = False) -> Scene:
        """Bring an image onto the device as a frame of tiles.

        Args:
            pixels: uint8 [3, h, w].
            timer: receives one stage per step.
            kept: whether several questions will be asked about it.

        Raises:
            ImageError: the image is outside the limits.
        """
        with timer.stage("frame"):
            frame = image.frame(pixels, self._config, self._qwen.vision.token_px, self._qwen.device)
            scene = self._overviews.open(frame, kept=kept, scored=self._head is None)
            scene.picture = Arrival(thumbnail(frame.pixels))
            return scene

    @torch.inference_mode()
    def prepare(self, scene: Scene, budget: int | float | None, timer: StageTimer) -> None:
        """Compute what all questions with this budget have in common.

        Raises:
            BudgetError: the budget is outside what the image allows.
        """
        config, grid = self._config, scene.frame.grid
        tokens = allocation.resolve_budget(budget, grid, config)
        prefix = self._judging.prepare(scene, tokens, timer)
        with timer.stage("prefix"):
            stride = allocation.overview_stride(grid, config, tokens)
            answering = self._overviews.answering(scene, stride, prefix)
            if answering is not None:
                answering.complete(self._qwen)
        self._overviews.remember(scene, [(1, prefix), (stride, answering)], 0.0)

    @torch.inference_mode()
    def look_at(
        self,
        scene: Scene,
        query: Query,
        budget: int | float | None,
        timer: StageTimer,
        judge: Judge | None = None,
    ) -> Look:
        """Encode an opened image for a question.

        Args:
            scene: the image.
            query: the question.
            budget: tokens, a share of full resolution, or None for the configured one.
            timer: receives one stage per step.
            judge: stands in for scorers and opponent processing; the encoding's scores then all hold its
                map, and its tensions are 0.

        Raises:
            BudgetError: the budget is outside what the image allows.
        """
        config, frame = self._config, scene.frame
        tokens = allocation.resolve_budget(budget, frame.grid, config)
        if judge is None:
            glimpse, prefix, judged = self._judging.judge(scene, query, tokens, timer)
        else:
            glimpse, prefix, judged = self._judging.judge_by(judge, scene, tokens, timer)
        with timer.stage("allocate"):
            plan = allocation.plan(judged.relevance, frame.grid, config, tokens)
        with timer.stage("encode"):
            answering = self._overviews.answering(scene, plan.overview_stride, prefix)
            overview = self._overviews.kept(scene, plan.overview_stride, answering)
            tiles = self._encode(frame, plan, glimpse)
        with timer.stage("assemble"):
            laid_out = sequence.assemble(frame.grid, plan, overview, tiles, config.order)
        used = [(1, prefix), (plan.overview_stride, answering)]
        self._overviews.remember(scene, used, float(plan.relevance.sum()))
        if self._ahead is not None and self._ahead.enabled and scene.kept:
            wanted = likely_next(plan, config.prefetch_tiles)
            self._ahead.submit(partial(self._encoder.prefetch, frame, wanted, plan.relevance))
        return Look(self._record(scene, query, judged.scores, plan, laid_out), answering)

    def describe_plan_stage(self) -> str:
        """How frames are measured and judged, in words."""
        return f"{self._judging.describe()}; glimpses: {self._overviews.describe()}"

    def token_range(self, pixels: Tensor) -> tuple[int, int]:
        """The least and the most tokens that an image uint8 [3, h, w] can be encoded to."""
        config = self._config
        tile = config.sides[3] * self._qwen.vision.token_px
        height, width = pixels.shape[1:]
        grid, _ = image.choose_grid(height, width, tile, config.max_tiles, config.max_distortion)
        return self.token_range_of(grid)

    def token_range_of(self, grid: Grid) -> tuple[int, int]:
        """The least and the most tokens that a frame of this grid can be encoded to."""
        return allocation.least_tokens(grid, self._config), allocation.full_tokens(grid, self._config)

    def _encode(self, frame: Frame, plan: Plan, glimpse: Features | None) -> list[Tiles]:
        """The tiles above LOD background through the engines; the others out of the glimpse."""
        levels = plan.lod.flatten()
        wanted = {lod: (levels == lod).nonzero()[:, 0] for lod in (Lod.LOW, Lod.MEDIUM, Lod.HIGH)}
        tiles = self._encoder.encode(frame, wanted, plan.relevance)
        if plan.overview_stride or not bool((levels == Lod.BACKGROUND).any()):
            return tiles
        assert glimpse is not None, "background tiles are cut out of the glimpse"
        return [sequence.background_tiles(frame.grid, plan, glimpse), *tiles]

    def _record(
        self, scene: Scene, query: Query, scores: Scores, plan: Plan, laid_out: VisionSequence
    ) -> Encoding:
        frame = scene.frame
        assert scene.picture is not None, "opened"
        return Encoding(
            tokens=laid_out.tokens,
            deepstack=laid_out.deepstack,
            positions=laid_out.positions,
            segments=laid_out.segments,
            lod=plan.lod,
            relevance=plan.relevance,
            scores=scores,
            tensions=plan.tensions,
            sides=plan.sides,
            layout=plan.layout,
            overview_stride=plan.overview_stride,
            question=query.text,
            budget=plan.budget,
            full_tokens=plan.full_tokens,
            source_size=frame.source,
            frame_size=(frame.grid.height, frame.grid.width),
            distortion=frame.distortion,
            picture=scene.picture.get(),
            fingerprint=self._qwen.fingerprint,
            timings={},
        )


def divide_budget(budget: int, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Divide tokens among images: to each its least, then of the rest in proportion to what it still lacks.

    Image i gets low_i + floor(spare * (high_i - low_i) / room) with spare = budget - sum(low) and
    room = sum(high) - sum(low), so never less than low_i, more than high_i, or more than `budget` in all.

    Args:
        budget: tokens for all images together.
        ranges: the least and the most tokens of each image.

    Raises:
        BudgetError: below the sum of the least or above the sum of the most.
    """
    least, most = sum(low for low, _ in ranges), sum(high for _, high in ranges)
    if not least <= budget <= most:
        given = f"budget {budget:,} for {len(ranges)} images together"
        raise BudgetError(given, f"{least:,} to {most:,} tokens", "Choose a budget within these limits")
    spare, room = budget - least, max(most - least, 1)
    return [low + spare * (high - low) // room for low, high in ranges]
