"""The engine: image and question in, query-aware vision tokens or an answer out."""

from __future__ import annotations

import dataclasses
import logging
import platform
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from arrcoc import chat as chats
from arrcoc import config as configs
from arrcoc import image, sequence
from arrcoc.answer import Answer, AnswerStream, text_pieces
from arrcoc.cache import CacheStats, TileCache
from arrcoc.config import Config
from arrcoc.decode import Decoder, Sampling, TransformersDecoder
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.encoding import Encoding
from arrcoc.errors import BudgetError, ConfigError, EngineMismatchError
from arrcoc.image import ImageInput
from arrcoc.kv import Prefix
from arrcoc.lod import LodEngine, TorchLodEngine
from arrcoc.pipeline import Look, Pipeline
from arrcoc.qwen import QwenVL, load
from arrcoc.records import Lod, Prompt
from arrcoc.scorers import TEXTURE_HEAD_FILE, TextureHead
from arrcoc.timing import StageTimer

logger = logging.getLogger(__name__)

Budget = int | float | None


class Engine:
    """Answers questions about images with a Qwen-VL checkpoint.

    Make one with `Engine.from_pretrained`. An engine keeps no state of a request, so threads may share it.
    """

    def __init__(self, qwen: QwenVL, presets: configs.PresetChoice, notes: Sequence[str] = ()) -> None:
        """Args: a loaded checkpoint; which configuration serves which image; what `describe` should note."""
        self._qwen, self._presets, self._notes = qwen, presets, list(notes)
        base = presets.base
        self._cache = TileCache(base.cache_bytes, base.cache_half_life, base.cache_location)
        self._decoder: Decoder = TransformersDecoder(qwen)
        self._head = _texture_head(qwen, base)
        self._lod_engines: dict[int, LodEngine] = {}
        self._pipelines: dict[Config, Pipeline] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        preset: str | Path = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **overrides: Any,
    ) -> Engine:
        """Load a checkpoint and make an engine for it.

        Args:
            model: hub name or local folder of a Qwen3-VL checkpoint; None takes the bundled one.
            preset: `auto` (chosen for each image by its size), a preset's name, or a YAML file.
            device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
            dtype: `auto` (bfloat16 on CUDA, else float32), `float32`, `bfloat16` or `float16`.
            overrides: fields of `arrcoc.Config` to replace in the preset.

        Raises:
            ModelError: the checkpoint cannot be loaded.
            ConfigError: unknown preset, device, dtype or field.
        """
        presets = configs.PresetChoice.make(preset, overrides)
        place = _device(device)
        notes = []
        if model is None:
            model, note = bundled_checkpoint()
            notes.append(note)
            logger.warning(note)
        return cls(load(model, place, _dtype(dtype, place)), presets, notes)

    def encode(self, image: ImageInput, question: str, budget: Budget = None) -> Encoding:
        """Encode an image for a question.

        Args:
            image: path, bytes, PIL image, numpy [h, w, c] or torch [c, h, w].
            question: what is asked.
            budget: most vision tokens: a share of full resolution in (0, 1], or a whole number of tokens.

        Raises:
            ImageError, QueryError, BudgetError: an argument is not usable.
        """
        timer = StageTimer(self._qwen.device)
        (encoding,), _ = self._look_all(chats.single(image, self._check(question)), budget, timer)
        return dataclasses.replace(encoding, timings=timer.milliseconds())

    def ask(
        self,
        image: ImageInput | Encoding,
        question: str,
        budget: Budget = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> Answer:
        """Answer a question about an image.

        Args:
            image: as for `encode`, or an `Encoding` made before (by an engine of the same checkpoint).
            question: what is asked.
            budget: as for `encode`.
            max_new_tokens: most tokens to generate; None takes the configured number.
            temperature: 0 is greedy, above 0 samples.
            sampling: further fields of `arrcoc.Sampling` (top_p, top_k, seed).

        Raises:
            ImageError, QueryError, BudgetError, DecodeError: an argument is not usable.
        """
        return _exhaust(self.stream(image, question, budget, max_new_tokens, temperature, **sampling))

    def stream(
        self,
        image: ImageInput | Encoding,
        question: str,
        budget: Budget = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> AnswerStream:
        """`ask`, piece by piece: iterate for text; `.answer` holds the whole once it has ended."""
        conversation = chats.single(image, self._check(question))
        return self._stream(conversation, budget, self._sampling(max_new_tokens, temperature, sampling))

    def chat(
        self,
        messages: Sequence[chats.Message],
        budget: Budget = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> Answer:
        """Answer the last turn of a chat in Qwen's format, with any number of images, or none.

        Relevance is judged by the text of the last user turn, for every image. A budget in tokens is for
        all images together, and is divided in proportion to their full resolution; a share is of each.

        Raises:
            ImageError, QueryError, BudgetError, DecodeError: an argument is not usable.
        """
        conversation = chats.parse(messages)
        self._check(conversation.question)
        for text in conversation.texts:
            self._qwen.check_text(text)
        return _exhaust(self._stream(conversation, budget, self._sampling(max_new_tokens, temperature, sampling)))

    def cache_stats(self) -> CacheStats:
        """Counts of the tile cache."""
        return self._cache.stats()

    def evict_low_relevance(self, threshold: float) -> int:
        """Drop cached tiles whose decayed relevance score is below a threshold; returns how many."""
        return self._cache.evict_low_relevance(threshold)

    def describe(self) -> dict[str, Any]:
        """What runs where: model, presets, scorers, engines, decoder, cache, versions, notes. JSON-ready."""
        qwen, base = self._qwen, self._presets.base
        return {
            "model": {"name": qwen.name, "parameters": qwen.n_parameters, "fingerprint": qwen.fingerprint},
            "device": _device_name(qwen.device),
            "dtype": str(qwen.dtype).removeprefix("torch."),
            "preset": self._presets.name,
            "sides": {name: list(c.sides) for name, c in self._presets.by_name.items()},
            "layout": base.layout.value,
            "glimpse": base.glimpse,
            "scorers": {"participatory": "glimpse" if self._head is None else "texture",
                        "parallel": "three CUDA streams" if qwen.device.type == "cuda" else "in sequence"},
            "lod_engines": {side: engine.backend for side, engine in sorted(self._lod_engines.items())},
            "decoder": self._decoder.backend,
            "cache": dataclasses.asdict(self._cache.stats()) | {"location": base.cache_location},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()},
            "notes": list(self._notes),
        }

    def _check(self, question: object) -> str:
        return chats.check_question(question, self._presets.base.max_question_chars)

    def _sampling(self, max_new_tokens: int | None, temperature: float, more: dict[str, Any]) -> Sampling:
        known = {field.name for field in dataclasses.fields(Sampling)}
        for name in more:
            if name not in known:
                raise ConfigError(f"sampling argument {name!r}", ", ".join(sorted(known)), "Correct the name")
        count = self._presets.base.max_new_tokens if max_new_tokens is None else max_new_tokens
        return Sampling(max_new_tokens=count, temperature=temperature, **more)

    def _look(self, pixels: Tensor, question: str, budget: Budget, timer: StageTimer) -> Look:
        with timer.stage("query"):
            query = self._qwen.query(question)
        return self._pipeline(pixels).look(pixels, query, budget, timer)

    def _look_all(
        self, conversation: chats.Conversation, budget: Budget, timer: StageTimer
    ) -> tuple[list[Encoding], Prefix | None]:
        """Every image's encoding; with one image also the prefix that the decoder may go on from."""
        sources = conversation.images
        if len(sources) == 1 and isinstance(sources[0], Encoding):
            return [self._own(sources[0])], None
        with timer.stage("decode"):
            images = [image.decode(source, self._presets.base.max_source_pixels) for source in sources]
        shares = zip(images, self._divide(images, budget), strict=True)
        looks = [self._look(pixels, conversation.question, share, timer) for pixels, share in shares]
        return [look.encoding for look in looks], looks[0].prefix if len(looks) == 1 else None

    def _divide(self, images: Sequence[Tensor], budget: Budget) -> list[Budget]:
        """A share holds for each image; tokens are divided in proportion to full resolution."""
        if len(images) < 2 or not isinstance(budget, int) or isinstance(budget, bool):
            return [budget] * len(images)
        full = [self._pipeline(pixels).full_tokens(pixels) for pixels in images]
        if budget > sum(full):
            raise BudgetError(f"a budget of {budget:,} tokens", f"at most {sum(full):,} for these images", "Lower it")
        return [budget * tokens // sum(full) for tokens in full]

    def _own(self, encoding: Encoding) -> Encoding:
        if encoding.fingerprint != self._qwen.fingerprint:
            given = f"an encoding made by checkpoint {encoding.fingerprint[:12]}"
            raise EngineMismatchError(given, f"one made by {self._qwen.fingerprint[:12]}", "Encode the image again")
        return encoding

    def _pipeline(self, pixels: Tensor) -> Pipeline:
        config = self._presets.choose(*pixels.shape[1:])
        with self._lock:
            if config not in self._pipelines:
                engines = {lod: self._lod_engine(config.sides[lod], config) for lod in Lod}
                self._pipelines[config] = Pipeline(self._qwen, config, engines, self._cache, self._head)
            return self._pipelines[config]

    def _lod_engine(self, side: int, config: Config) -> LodEngine:
        if side not in self._lod_engines:
            self._lod_engines[side] = TorchLodEngine(self._qwen, side, config.buckets)
        return self._lod_engines[side]

    def _stream(self, conversation: chats.Conversation, budget: Budget, sampling: Sampling) -> AnswerStream:
        timer = StageTimer(self._qwen.device)
        encodings, prefix = self._look_all(conversation, budget, timer)
        with timer.stage("prefill"):
            prompt, head = self._prompt(conversation, encodings)
            state = self._decoder.prefill(prompt, prefix if prefix and prefix.head == head else None)
        seen: list[int] = []

        def pieces() -> Iterator[str]:
            with timer.stage("generate"):
                yield from text_pieces(self._decoder.generate(state, sampling), self._qwen.detokenize, seen)

        def finish() -> Answer:
            timings = timer.milliseconds()
            made = tuple(dataclasses.replace(encoding, timings=timings) for encoding in encodings)
            reason: Literal["stop", "length"] = "length" if len(seen) == sampling.max_new_tokens else "stop"
            text = self._qwen.detokenize(seen)
            return Answer(text, made, timings, prompt.embeds.shape[1], len(seen), reason)

        return AnswerStream(pieces(), finish)

    @torch.inference_mode()
    def _prompt(self, conversation: chats.Conversation, encodings: Sequence[Encoding]) -> tuple[Prompt, tuple[int, ...]]:
        """The prompt, and the token ids that stand before its first image."""
        runs = self._qwen.render(conversation.messages)
        special = self._qwen.special
        captions = [
            [self._qwen.embed([special.vision_end, *self._qwen.tokenize(f"\n{s.caption}"), special.vision_start])
             for s in encoding.segments[1:]]
            for encoding in encodings
        ]
        images = [encoding.sequence for encoding in encodings]
        return sequence.prompt([self._qwen.embed(run) for run in runs], images, captions), tuple(runs[0])


def _exhaust(stream: AnswerStream) -> Answer:
    for _ in stream:
        pass
    assert stream.answer is not None
    return stream.answer


def _texture_head(qwen: QwenVL, config: Config) -> TextureHead | None:
    path = Path(qwen.name) / TEXTURE_HEAD_FILE
    if config.participatory == "glimpse" or (config.participatory == "auto" and not path.is_file()):
        return None
    if not path.is_file():
        remedy = "Fit one, or choose participatory='glimpse'"
        raise ConfigError("participatory='texture' without a fitted head", f"{TEXTURE_HEAD_FILE} beside the model", remedy)
    return TextureHead.load(path, qwen.width, qwen.device)


def _device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r}", "auto, cpu, cuda, cuda:N", "Choose one of these") from None
    found = torch.cuda.device_count()
    if place.type not in {"cpu", "cuda"} or (place.type == "cuda" and (place.index or 0) >= found):
        raise ConfigError(f"device {str(place)!r}", f"cpu, or one of the {found} CUDA devices here", "Choose one")
    return place


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if found not in {torch.float32, torch.bfloat16, torch.float16}:
        raise ConfigError(f"dtype {dtype!r}", "auto, float32, bfloat16, float16", "Choose one of these")
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
