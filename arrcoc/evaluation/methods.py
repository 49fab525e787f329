"""The methods under test: each answers a question about an image within a number of vision tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from arrcoc import config as configs
from arrcoc import prompting, scorers
from arrcoc.cache import TileCache
from arrcoc.chat import single
from arrcoc.config import Config
from arrcoc.decode import Sampling, TransformersDecoder
from arrcoc.decode.transformers_decoder import DecodeState
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.devices import resolve_device, resolve_dtype
from arrcoc.engine import Engine
from arrcoc.errors import ConfigError
from arrcoc.evaluation import stock
from arrcoc.evaluation.records import Box, Cases, Given, Picture
from arrcoc.evaluation.rivals import fastv, visionzip
from arrcoc.judging import Judge
from arrcoc.lod import TorchLodEngine
from arrcoc.pipeline import Pipeline
from arrcoc.qwen import QwenVL, load
from arrcoc.records import Features, Frame, Lod, Query, Texture
from arrcoc.timing import StageTimer

ELSEWHERE = 0.05
"""Relevance that `oracle` gives to tiles without a target, so that spare tokens are spent there."""

T = TypeVar("T")

Method = Callable[[Picture, int], Given]
"""Answers within a number of tokens; `BudgetError` where the method cannot do with so few."""


class Lab:
    """One checkpoint with everything that the methods share.

    The tile cache is off: a method must not be faster for what another one encoded before it.

    Attributes:
        spared: milliseconds that the answers since it was last set to 0 did not take, because what they need
            had been made for an answer about the same picture; see `shared`.
    """

    def __init__(self, qwen: QwenVL, presets: configs.PresetChoice, max_new_tokens: int, seed: int) -> None:
        """Args: a checkpoint; which configuration serves which image; longest answer; seed of `random`."""
        self.qwen, self.presets, self.seed = qwen, presets, seed
        self.engine = Engine(qwen, presets)
        self.whole = stock.WholeImage(qwen)
        self._decoder = TransformersDecoder(qwen)
        self._sampling = Sampling(max_new_tokens=max_new_tokens)
        self._pipelines = {config: self._pipeline(config) for config in presets.by_name.values()}
        self._shared: dict[str, tuple[Picture, Any, float]] = {}
        self.spared = 0.0

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        preset: str,
        device: str,
        dtype: str,
        max_new_tokens: int,
        seed: int,
        **overrides: Any,
    ) -> Lab:
        """Load a checkpoint; arguments as for `Engine.from_pretrained`.

        Raises:
            ModelError, ConfigError: as `Engine.from_pretrained`.
        """
        chosen = "demo" if model is None and preset == "auto" else preset  # as the engine does
        presets = configs.PresetChoice.make(chosen, overrides | {"cache_bytes": 0})
        place = resolve_device(device)
        source = bundled_checkpoint()[0] if model is None else model
        return cls(load(source, place, resolve_dtype(dtype, place)), presets, max_new_tokens, seed)

    @property
    def texture_head(self) -> scorers.TextureHead | None:
        """The learned scorer that method `arrcoc` asks, if there is one."""
        return self.engine._head

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, in tokens."""
        return self._sampling.max_new_tokens

    def pipeline(self, pixels: Tensor) -> Pipeline:
        """The pipeline that serves an image uint8 [3, h, w]."""
        return self._pipelines[self.presets.choose(*pixels.shape[1:])]

    def full_tokens(self, pixels: Tensor) -> int:
        """Tokens of full resolution: what shares are shares of, for every method."""
        return self.pipeline(pixels).token_range(pixels)[1]

    def whole_answer(self, picture: Picture, most: int) -> Given:
        """The stock model's answer to an image of at most `most` tokens."""
        if most == self.full_tokens(picture.pixels):
            features, grid = self._full(picture)
        else:
            features, grid = self.whole.encode(picture.pixels, most)
        prompt = stock.prompt(self.qwen, stock.lay_out(features, grid), picture.case.question)
        return Given(self.generate(self._decoder.prefill(prompt)), grid.tokens)

    def judged_answer(self, picture: Picture, budget: int, judge: Judge) -> Given:
        """The answer of arrcoc's LOD pipeline with relevance from elsewhere."""
        case, timer = picture.case, StageTimer()
        look = self.pipeline(picture.pixels).look(
            picture.pixels, self.qwen.query(case.question), budget, timer, judge
        )
        messages = single(None, case.question).messages
        prompt, _ = prompting.build(self.qwen, messages, [look.encoding])
        return Given(self.generate(self._decoder.prefill(prompt)), look.encoding.n_tokens)

    def zipped_answer(self, picture: Picture, keep: int) -> Given:
        """VisionZip's answer: see `arrcoc.evaluation.rivals.visionzip`."""
        full = self.full_tokens(picture.pixels)
        looked = self.shared("zip", picture, lambda: visionzip.look(self.whole, picture.pixels, full))
        features, kept = visionzip.compress(looked, keep)
        prompt = stock.prompt(self.qwen, stock.lay_out(features, looked.grid, kept), picture.case.question)
        return Given(self.generate(self._decoder.prefill(prompt)), len(kept))

    def pruned_answer(self, picture: Picture, keep: int) -> Given:
        """FastV's answer: see `arrcoc.evaluation.rivals.fastv`."""
        features, grid = self._full(picture)
        prompt = stock.prompt(self.qwen, stock.lay_out(features, grid), picture.case.question)
        keep = min(keep, grid.tokens)
        return Given(self.generate(fastv.prefill(self.qwen, prompt, keep)), keep)

    def shared(self, what: str, picture: Picture, make: Callable[[], T]) -> T:
        """What several answers about one picture need alike, made once.

        The milliseconds that making it took are added to `spared` whenever it is taken again: an answer's
        time is that of an answer on its own.
        """
        found = self._shared.get(what)
        if found is not None and found[0] is picture:
            self.spared += found[2]
            made: T = found[1]
            return made
        self.synchronise()
        start = perf_counter()
        made = make()
        self.synchronise()
        self._shared[what] = picture, made, (perf_counter() - start) * 1e3
        return made

    def synchronise(self) -> None:
        """Wait until the device's queue is empty."""
        if self.qwen.device.type == "cuda":
            torch.cuda.synchronize(self.qwen.device)

    def _full(self, picture: Picture) -> tuple[Features, stock.TokenGrid]:
        """The whole picture at full resolution, as the stock model encodes it."""
        most = self.full_tokens(picture.pixels)
        return self.shared("full", picture, lambda: self.whole.encode(picture.pixels, most))

    def generate(self, state: DecodeState) -> str:
        """The greedy answer from a prompt that has been run."""
        return self.qwen.detokenize(list(self._decoder.generate(state, self._sampling)))

    def _pipeline(self, config: Config) -> Pipeline:
        engines = {
            lod: TorchLodEngine(self.qwen, config.sides[lod], config.buckets, config.halo) for lod in Lod
        }
        cache = TileCache(0, config.cache_half_life, config.cache_location)
        return Pipeline(self.qwen, config, engines, cache, None)


@dataclass(frozen=True, slots=True)
class LabChoice:
    """Which lab to open, in this process or another: the arguments of `Lab.open`."""

    model: str | Path | None
    preset: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = 16
    seed: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> Lab:
        """Load the checkpoint; raises what `Lab.open` raises."""
        chosen = self.model, self.preset, self.device, self.dtype
        return Lab.open(*chosen, self.max_new_tokens, self.seed, **self.overrides)


def arrcoc(lab: Lab, picture: Picture, budget: int) -> Given:
    """The engine itself."""
    most = lab.max_new_tokens
    answer = lab.engine.ask(picture.pixels, picture.case.question, budget, max_new_tokens=most)
    assert answer.encoding is not None, "an answer about an image"
    return Given(answer.text, answer.encoding.n_tokens)


def downscale(lab: Lab, picture: Picture, budget: int) -> Given:
    """The stock model's way: `max_pixels` set so that the image takes no more tokens."""
    return lab.whole_answer(picture, budget)


def random(lab: Lab, picture: Picture, budget: int) -> Given:
    """arrcoc with random relevance, uniform in [0, 1], the same for the same seed and case."""
    word = f"{lab.seed}:{picture.case.id}".encode()
    seed = int.from_bytes(hashlib.blake2b(word, digest_size=7).digest(), "little")

    def judge(frame: Frame, texture: Texture) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(frame.grid.rows, frame.grid.cols, generator=generator).to(texture.maps.device)

    return lab.judged_answer(picture, budget, judge)


def saliency(lab: Lab, picture: Picture, budget: int) -> Given:
    """arrcoc with the mean of the two scorers that never see the question as relevance."""
    blind = Query("", (), torch.zeros(0))  # neither scorer reads it

    def judge(frame: Frame, texture: Texture) -> Tensor:
        return (scorers.propositional(texture, blind) + scorers.perspectival(texture, blind)) / 2

    return lab.judged_answer(picture, budget, judge)


def oracle(lab: Lab, picture: Picture, budget: int) -> Given:
    """arrcoc with relevance from the labels: 1 for tiles that touch a target box."""
    assert picture.case.targets is not None, "only offered where there are labels"
    targets = picture.case.targets

    def judge(frame: Frame, texture: Texture) -> Tensor:
        return target_map(frame, targets).to(texture.maps.device)

    return lab.judged_answer(picture, budget, judge)


def target_map(frame: Frame, targets: tuple[Box, ...]) -> Tensor:
    """fp32 [R, C]: 1 for tiles that share area with a box in source pixels, `ELSEWHERE` for the others."""
    grid = frame.grid
    sy, sx = (shown / source for shown, source in zip(frame.content, frame.source, strict=True))
    hit = torch.full((grid.rows, grid.cols), ELSEWHERE)
    for x0, y0, x1, y1 in targets:
        rows = slice(int(y0 * sy // grid.tile), -int(-y1 * sy // grid.tile))
        hit[rows, int(x0 * sx // grid.tile) : -int(-x1 * sx // grid.tile)] = 1.0
    return hit


METHODS: dict[str, Callable[[Lab, Picture, int], Given]] = {
    "arrcoc": arrcoc,
    "downscale": downscale,
    "random": random,
    "saliency": saliency,
    "fastv": Lab.pruned_answer,
    "visionzip": Lab.zipped_answer,
    "oracle": oracle,
}
"""Every method by name, in the order of tables and legends."""


def check_methods(names: list[str], cases: Cases) -> None:
    """Raise `ConfigError` for unknown or repeated methods, or `oracle` without labels."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method {name!r}", ", ".join(METHODS), "Correct the name")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"methods {names}", "one or more, each once", "Correct the list")
    if "oracle" in names and not cases.has_targets:
        given = f"method 'oracle' with {cases.name}"
        raise ConfigError(given, "data sets with targets in every row", "Leave oracle out, or add targets")
