"""Sees the images of a request: decodes them, divides the budget, picks each one's configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from arrcoc import allocation, image, jpeg
from arrcoc import config as configs
from arrcoc.cache import TileCache
from arrcoc.chat import Conversation
from arrcoc.config import Config, PresetChoice
from arrcoc.encoding import Encoding
from arrcoc.errors import BudgetError, EngineMismatchError
from arrcoc.lod import BuiltEngines, LodEngine, TorchEngines
from arrcoc.pipeline import Pipeline, divide_budget
from arrcoc.prefetch import TilePrefetcher
from arrcoc.prefix_store import PrefixStore
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Grid, Layout, Lod
from arrcoc.scene import Scene
from arrcoc.scorers import TextureHead
from arrcoc.timing import StageTimer

Budget = int | float | None


@dataclass(frozen=True, slots=True)
class Seen:
    """One image of a request.

    Attributes:
        encoding: its timings are not filled in yet, unless it was made before.
        prefix: what the decoder may go on from.
        runs: which of the request's stages were spent on it; none for an encoding made before.
    """

    encoding: Encoding
    prefix: Prefix | None = None
    runs: tuple[slice, ...] = ()

    def timed(self, timer: StageTimer) -> Encoding:
        """The encoding with its timings; one made before keeps its own."""
        if not self.runs:
            return self.encoding
        return replace(self.encoding, timings=timer.milliseconds(*self.runs))


@dataclass(frozen=True, slots=True)
class View:
    """An image opened for several questions.

    Attributes:
        pipeline: the stages for its configuration.
        scene: the image, and what does not depend on a question.
    """

    pipeline: Pipeline
    scene: Scene


class Viewer:
    """One pipeline for each configuration of the presets; keeps no state of a request."""

    def __init__(
        self,
        qwen: QwenVL,
        presets: PresetChoice,
        cache: TileCache,
        head: TextureHead | None,
        built: BuiltEngines | None = None,
        prefixes: PrefixStore | None = None,
        ahead: TilePrefetcher | None = None,
    ) -> None:
        """Make the pipelines.

        Args:
            qwen: the checkpoint.
            presets: which configuration serves which image.
            cache: the tile cache.
            head: the learned texture head.
            built: LOD engines for the configurations that they serve; torch serves the others.
            prefixes: where beginnings of prompts are kept; None keeps none.
            ahead: encodes tiles of opened images ahead; None encodes none.
        """
        self._qwen, self._presets, self._cache, self._head = qwen, presets, cache, head
        self._built, self._prefixes, self._ahead = built, prefixes, ahead
        self._nvjpeg = jpeg.chosen(presets.base.jpeg, qwen.device)
        # All engines are made here, so that no request pays for them or for the weights' fingerprint.
        base = presets.base
        self._torch = TorchEngines(
            qwen, base.lod_engine, base.lod_precision, base.lod_error_limit, base.lod_streams
        )
        self._lod_engines: dict[tuple[int, tuple[int, ...], int], LodEngine] = {}
        self._pipelines = {config: self._make_pipeline(config) for config in presets.by_name.values()}

    @property
    def has_head(self) -> bool:
        """Whether a learned texture head scores, instead of the glimpse."""
        return self._head is not None

    def backends(self) -> dict[str, str]:
        """Backend of the LOD engine of each side; all of them where configurations differ in it."""
        found: dict[str, dict[str, None]] = {}
        for (side, *_), engine in sorted(self._lod_engines.items(), key=lambda item: item[0]):
            found.setdefault(str(side), {})[engine.backend] = None
        return {side: ", ".join(names) for side, names in found.items()}

    def plan_stage(self) -> dict[str, str]:
        """How frames are measured and judged, by preset."""
        return {
            name: self._pipelines[config].describe_plan_stage()
            for name, config in self._presets.by_name.items()
        }

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Run every LOD engine once at each of its batch sizes, largest first; see `Engine.warm_up`."""
        engines = list(self._lod_engines.values())
        total = sum(len(engine.buckets) for engine in engines)
        runs = ((engine, size) for engine in engines for size in sorted(engine.buckets, reverse=True))
        for done, (engine, size) in enumerate(runs):
            progress(f"side {engine.side}, {size} tiles", done, total)
            edge = (engine.side + 2 * engine.halo) * self._qwen.vision.token_px
            engine.encode(torch.zeros(size, 3, edge, edge, dtype=torch.uint8, device=self._qwen.device))
        progress("warm", total, total)

    def see(self, conversation: Conversation, budget: Budget, timer: StageTimer) -> list[Seen]:
        """Encode every image of a conversation for its question.

        Args:
            conversation: its images may be encodings made before, or opened.
            budget: a share of each image, or whole tokens for all images together.
            timer: receives the stages; the question's embedding counts to the first image.

        Raises:
            ImageError, QueryError, BudgetError, EngineMismatchError: an image or the budget is not usable.
        """
        sources = [self._own(s) if isinstance(s, Encoding) else s for s in conversation.images]
        decoded, runs, begin = [], list[tuple[slice, ...]](), 0
        for source in sources:
            known = isinstance(source, Encoding | View)
            decoded.append(source if known else self._decode(source, timer))
            runs.append((slice(begin, len(timer)),))
            begin = len(timer)
        fresh = [place for place, source in enumerate(sources) if not isinstance(source, Encoding)]
        if fresh:  # after the images: their way to the device goes on meanwhile
            with timer.stage("query"):
                query = self._qwen.query(conversation.question)
            runs[fresh[0]] += (slice(begin, len(timer)),)
        seen = []
        for item, decoding, part in zip(decoded, runs, self._divide(decoded, budget), strict=True):
            if isinstance(item, Encoding):
                seen.append(Seen(_within(item, part)))
            else:
                begin = len(timer)
                view = item if isinstance(item, View) else self._view(item, timer)
                look = view.pipeline.look_at(view.scene, query, part, timer)
                seen.append(Seen(look.encoding, look.prefix, (*decoding, slice(begin, len(timer)))))
        return seen

    def open(self, source: Any, budget: Budget, timer: StageTimer) -> View:
        """Open an image for several questions, and compute what those with this budget have in common.

        Raises:
            ImageError, BudgetError: the image or the budget is not usable.
        """
        view = self._view(self._decode(source, timer), timer, kept=True)
        view.pipeline.prepare(view.scene, budget, timer)
        return view

    def _view(self, pixels: Tensor, timer: StageTimer, *, kept: bool = False) -> View:
        pipeline = self._pipeline(pixels)
        return View(pipeline, pipeline.open(pixels, timer, kept=kept))

    def _decode(self, source: Any, timer: StageTimer) -> Tensor:
        with timer.stage("decode"):
            most = self._presets.base.max_source_pixels
            return image.decode(source, most, self._qwen.device, self._nvjpeg)

    def _divide(self, images: Sequence[Tensor | Encoding | View], budget: Budget) -> list[Budget]:
        """The budget of each image: a share holds for each, tokens are divided."""
        asked = self._presets.base.budget if budget is None else budget
        if len(images) < 2 or not isinstance(asked, Integral) or isinstance(asked, bool):
            return [budget] * len(images)
        return list(divide_budget(int(asked), [self._token_range(item) for item in images]))

    def _token_range(self, item: Tensor | Encoding | View) -> tuple[int, int]:
        if isinstance(item, Encoding):
            return item.n_tokens, item.n_tokens
        if isinstance(item, View):
            return item.pipeline.token_range_of(item.scene.frame.grid)
        return self._pipeline(item).token_range(item)

    def _own(self, encoding: Encoding) -> Encoding:
        """An encoding made before, on this engine's device, if it was made by these vision weights."""
        qwen = self._qwen
        if encoding.fingerprint != qwen.fingerprint:
            given = f"an encoding made by checkpoint {encoding.fingerprint[:12]}"
            raise EngineMismatchError(given, f"one made by {qwen.fingerprint[:12]}", "Encode the image again")
        moved = {
            name: getattr(encoding, name).to(qwen.device) for name in ("tokens", "deepstack", "positions")
        }
        return replace(encoding, **moved)

    def _pipeline(self, pixels: Tensor) -> Pipeline:
        return self._pipelines[self._presets.choose(*pixels.shape[1:])]

    def _make_pipeline(self, config: Config) -> Pipeline:
        if self._built is not None and self._built.serves(config.sides, config.halo):
            engines = {lod: self._built_engine(self._built, config, lod) for lod in Lod}
        else:
            engines = {lod: self._lod_engine(config.sides[lod], config.buckets, config.halo) for lod in Lod}
        shared = self._cache, self._head, self._prefixes, self._built, self._ahead
        return Pipeline(self._qwen, config, engines, *shared)

    def _built_engine(self, built: BuiltEngines, config: Config, lod: Lod) -> LodEngine:
        key = config.sides[lod], config.buckets, config.halo
        if key not in self._lod_engines:
            self._lod_engines[key] = built.engine(config.sides[lod], config.buckets, self._torch)
        return self._lod_engines[key]

    def _lod_engine(self, side: int, buckets: tuple[int, ...], halo: int) -> LodEngine:
        key = side, buckets, halo
        if key not in self._lod_engines:
            self._lod_engines[key] = self._torch.engine(side, buckets, halo)
        return self._lod_engines[key]


def _within(encoding: Encoding, budget: Budget) -> Encoding:
    """The encoding, if it keeps within the budget; None is no budget."""
    if budget is None:
        return encoding
    config = configs.build({"sides": encoding.sides, "layout": Layout.REPLACE})
    rows, cols = encoding.lod.shape
    least = encoding.overview_tokens or None
    allowed = allocation.resolve_budget(budget, Grid(rows, cols, 1), config, least)
    if encoding.n_tokens > allowed:
        given = f"an encoding of {encoding.n_tokens:,} tokens with budget {budget!r}"
        raise BudgetError(given, f"at most {allowed:,} tokens", "Encode the image again within this budget")
    return encoding
