"""The way of one image and one question through the stages, up to its vision tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arrcoc import allocation, image, opponent, scorers, sequence, streams, texture
from arrcoc.cache import TileCache
from arrcoc.config import Config
from arrcoc.encoder import TileEncoder
from arrcoc.encoding import Encoding, thumbnail
from arrcoc.errors import BudgetError
from arrcoc.glimpse import GlimpseScorer, JointGlimpse
from arrcoc.kv import Prefix
from arrcoc.lod import LodEngine
from arrcoc.qwen import QwenVL
from arrcoc.records import (
    Features,
    Frame,
    Grid,
    Layout,
    Lod,
    Plan,
    Query,
    Relevance,
    Scores,
    Tensions,
    Texture,
    Tiles,
    VisionSequence,
)
from arrcoc.timing import StageTimer

Judge = Callable[[Frame, Texture], Tensor]
"""Relevance from elsewhere: a finite map fp32 [R, C] in [0, 1], on the texture's device."""


@dataclass(frozen=True, slots=True)
class Look:
    """An encoding, with what the decoder can reuse of the work done for it.

    Attributes:
        encoding: its timings are not filled in yet.
        prefix: the prompt up to the glimpse, where the scorer ran it and the plan's overview is the glimpse.
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
    ) -> None:
        """Make a pipeline.

        Args:
            qwen: the checkpoint.
            config: everything that can be set.
            engines: an engine for each LOD.
            cache: the tile cache.
            head: the learned texture head; None scores by the glimpse.
        """
        self._qwen, self._config, self._head = qwen, config, head
        self._joint = JointGlimpse(qwen)
        assert all(engine.halo == config.halo for engine in engines.values()), "engines of another halo"
        self._encoder = TileEncoder(engines, cache, image.tile_pixels, image.hash_tiles, qwen.vision.token_px)

    @torch.inference_mode()
    def look(
        self,
        pixels: Tensor,
        query: Query,
        budget: int | float | None,
        timer: StageTimer,
        judge: Judge | None = None,
    ) -> Look:
        """Encode an image for a question.

        Args:
            pixels: uint8 [3, h, w].
            query: the question.
            budget: tokens, a share of full resolution, or None for the configured one.
            timer: receives one stage per step.
            judge: stands in for scorers and opponent processing; the encoding's scores then all hold its
                map, and its tensions are 0.

        Raises:
            BudgetError: the budget is outside what the image allows.
            ImageError: the image is outside the limits.
        """
        config = self._config
        with timer.stage("frame"):
            frame = image.frame(pixels, config, self._qwen.vision.token_px, self._qwen.device)
        tokens = allocation.resolve_budget(budget, frame.grid, config)
        with timer.stage("texture"):
            maps = texture.extract(frame, config)
        with timer.stage("glimpse"):
            glimpse = self._glimpse(frame) if self._needs_glimpse(frame.grid, tokens, judge) else None
        with timer.stage("score"):
            if judge is None:
                scores, prefix = self._score(maps, query, glimpse)
            else:
                scores, prefix = Scores(*[judge(frame, maps)] * 3), None
        with timer.stage("balance"):
            if judge is None:
                relevance = opponent.balance(scores, config)
            else:
                relevance = Relevance(scores.participatory, Tensions(0.0, 0.0, 0.0))
        with timer.stage("allocate"):
            plan = allocation.plan(relevance, frame.grid, config, tokens)
        with timer.stage("encode"):
            overview = glimpse if plan.overview_stride == 1 else self._overview(frame, plan)
            tiles = self._encode(frame, plan, glimpse)
        with timer.stage("assemble"):
            laid_out = sequence.assemble(frame.grid, plan, overview, tiles, config.order)
        made = self._record(frame, query, scores, plan, laid_out)
        return Look(made, prefix if plan.overview_stride == 1 else None)

    def token_range(self, pixels: Tensor) -> tuple[int, int]:
        """The least and the most tokens that an image uint8 [3, h, w] can be encoded to."""
        config = self._config
        tile = config.sides[3] * self._qwen.vision.token_px
        height, width = pixels.shape[1:]
        grid, _ = image.choose_grid(height, width, tile, config.max_tiles, config.max_distortion)
        return allocation.least_tokens(grid, config), allocation.full_tokens(grid, config)

    def _needs_glimpse(self, grid: Grid, budget: int, judge: Judge | None) -> bool:
        """Whether a scorer looks at the glimpse, or the answer may take tokens from it."""
        if judge is None and self._head is None:
            return True
        config = self._config
        return config.layout is Layout.REPLACE or allocation.overview_stride(grid, config, budget) == 1

    def _overview(self, frame: Frame, plan: Plan) -> Features | None:
        """What a plan keeps of the whole frame besides tiles, where it is coarser than the glimpse."""
        if not plan.overview_stride:
            return None
        rows, cols = frame.grid.shape_in_tokens(plan.sides[0], plan.overview_stride)
        edge = self._qwen.vision.token_px
        return self._joint.encode_pixels(image.overview_pixels(frame, rows * edge, cols * edge))

    def _glimpse(self, frame: Frame) -> Features:
        if self._config.glimpse == "joint":
            return self._joint.encode(frame)
        everywhere = {Lod.BACKGROUND: torch.arange(frame.grid.count)}
        # No relevance is known yet; a tile earns its place in the cache when a plan uses it.
        (tiles,) = self._encoder.encode(frame, everywhere, torch.zeros(frame.grid.rows, frame.grid.cols))
        return sequence.join_tiles(tiles.features, frame.grid, tiles.side)

    def _score(self, maps: Texture, query: Query, glimpse: Features | None) -> tuple[Scores, Prefix | None]:
        """The three scorers side by side; with the glimpse scorer also the prefix it computed."""
        looking = self._head if self._head is not None else self._glimpse_scorer(glimpse, maps.grid)
        judges = (scorers.propositional, scorers.perspectival, looking)
        found = streams.parallel([partial(judge, maps, query) for judge in judges], self._qwen.device)
        prefix = looking.prefix if isinstance(looking, GlimpseScorer) else None
        if prefix is not None and self._qwen.device.type == "cuda":
            # The prefix was made on the scorer's stream and lives on for the decoder, on this one.
            for tensor in prefix.tensors():
                tensor.record_stream(torch.cuda.current_stream(self._qwen.device))
        return Scores(*found), prefix

    def _glimpse_scorer(self, glimpse: Features | None, grid: Grid) -> GlimpseScorer:
        assert glimpse is not None, "the glimpse scorer looks at the glimpse"
        sides = self._config.sides
        where = sequence.glimpse_positions(grid, sides[0], sides[3])
        return GlimpseScorer(self._qwen, glimpse, where, sequence.extent(grid, sides[3]), grid, self._config)

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
        self, frame: Frame, query: Query, scores: Scores, plan: Plan, laid_out: VisionSequence
    ) -> Encoding:
        maps = (scores.propositional, scores.perspectival, scores.participatory)
        return Encoding(
            tokens=laid_out.tokens,
            deepstack=laid_out.deepstack,
            positions=laid_out.positions,
            segments=laid_out.segments,
            lod=plan.lod,
            relevance=plan.relevance,
            scores=Scores(*(map_.cpu() for map_ in maps)),
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
            picture=thumbnail(frame.pixels).cpu(),
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
