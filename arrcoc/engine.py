"""The engine: image and question in, query-aware vision tokens or an answer out."""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from arrcoc import chat as chats
from arrcoc import config as configs
from arrcoc import prompting
from arrcoc.answer import Answer, AnswerStream, text_pieces
from arrcoc.cache import CacheStats, TileCache
from arrcoc.config import Config
from arrcoc.decode import Decoder, Sampling, TransformersDecoder
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.devices import device_name, resolve_device, resolve_dtype
from arrcoc.encoding import Encoding
from arrcoc.errors import ConfigError, DecodeError, EngineMismatchError
from arrcoc.image import ImageInput
from arrcoc.lod import BuiltEngines
from arrcoc.qwen import QwenVL, load
from arrcoc.records import Lod
from arrcoc.scorers import TEXTURE_HEAD_FILE, TextureHead
from arrcoc.timing import StageTimer
from arrcoc.viewer import Budget, Viewer

logger = logging.getLogger(__name__)


class Engine:
    """Answers questions about images with a Qwen-VL checkpoint.

    Make one with `Engine.from_pretrained`. An engine keeps no state of a request, so threads may share it.
    """

    def __init__(
        self,
        qwen: QwenVL,
        presets: configs.PresetChoice,
        notes: Sequence[str] = (),
        built: BuiltEngines | None = None,
    ) -> None:
        """Make an engine.

        Args:
            qwen: a loaded checkpoint.
            presets: which configuration serves which image.
            notes: what `describe` should note.
            built: LOD engines built ahead of time.
        """
        self._qwen, self._presets, self._notes = qwen, presets, list(notes)
        base = presets.base
        self._cache = TileCache(base.cache_bytes, base.cache_half_life, base.cache_location)
        self._decoder: Decoder = TransformersDecoder(qwen)
        self._head = _texture_head(qwen, base)
        self._viewer = Viewer(qwen, presets, self._cache, self._head, built)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        preset: str | Path = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        engines: str | Path | None = None,
        **overrides: Any,
    ) -> Engine:
        """Load a checkpoint and make an engine for it.

        Args:
            model: hub name or local folder of a Qwen3-VL checkpoint; None takes the bundled one.
            preset: `auto` (chosen for each image by its size; `demo` for the bundled checkpoint, which has
                seen no other tiles), a preset's name, or a YAML file.
            device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
            dtype: `auto` (bfloat16 on CUDA, else float32), `float32`, `bfloat16` or `float16`.
            engines: folder that `arrcoc build` wrote; None encodes tiles with torch. With preset `auto` the
                presets that the build is not for are encoded with torch, which `describe` notes.
            overrides: fields of `arrcoc.Config` to replace in the preset.

        Raises:
            ModelError: the checkpoint cannot be loaded.
            ConfigError: unknown preset, device, dtype or field.
            EngineMismatchError: the engines were built from other weights, for another preset or device, by
                another version, or their files were changed.
            EngineBuildError: the Python package that runs the engines is not installed.
        """
        if model is None and str(preset) == "auto":
            preset = "demo"
        presets = configs.PresetChoice.make(preset, overrides)
        place = resolve_device(device)
        precision = resolve_dtype(dtype, place)
        notes = []
        if model is None:
            model, note = bundled_checkpoint()
            notes.append(note)
            logger.warning(note)
        qwen = load(model, place, precision)
        if engines is None:
            return cls(qwen, presets, notes)
        built = BuiltEngines.open(engines, qwen)
        return cls(qwen, presets, [*notes, *_unserved(built, presets)], built)

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
        (seen,) = self._viewer.see(chats.single(image, self._check(question)), budget, timer)
        return seen.timed(timer)

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
            budget: as for `encode`; an encoding made before must keep within it.
            max_new_tokens: most tokens to generate; None takes the configured number.
            temperature: 0 is greedy, above 0 samples.
            sampling: further fields of `arrcoc.Sampling` (top_p, top_k, seed).

        Raises:
            ImageError, QueryError, BudgetError, DecodeError: an argument is not usable.
            EngineMismatchError: the encoding was made by other vision weights or in another precision.
        """
        return self.stream(image, question, budget, max_new_tokens, temperature, **sampling).exhaust()

    def stream(
        self,
        image: ImageInput | Encoding,
        question: str,
        budget: Budget = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> AnswerStream:
        """`ask`, piece by piece: iterate for text; `.answer` holds the whole once it has ended.

        The image is encoded and the prompt run at once, so `ask`'s errors are raised here.
        """
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
        all images together: each gets the least it needs, and the rest in proportion to what it still
        lacks of full resolution. A share is of each image. An image may be an `Encoding` made before.

        Raises:
            ImageError, QueryError, BudgetError, DecodeError: an argument is not usable.
        """
        conversation = chats.parse(messages)
        self._check(conversation.question)
        for text in conversation.texts:
            chats.check_unicode(text)
            self._qwen.check_text(text)
        chosen = self._sampling(max_new_tokens, temperature, sampling)
        return self._stream(conversation, budget, chosen).exhaust()

    def cache_stats(self) -> CacheStats:
        """Counts of the tile cache."""
        return self._cache.stats()

    def evict_low_relevance(self, threshold: float) -> int:
        """Drop cached tiles whose decayed relevance score is below a threshold; returns how many."""
        return self._cache.evict_low_relevance(threshold)

    def describe(self) -> dict[str, Any]:
        """What runs where: model, presets, scorers, engines, decoder, cache, versions, notes. JSON-ready."""
        qwen, base = self._qwen, self._presets.base
        parallel = "three CUDA streams" if qwen.device.type == "cuda" else "in sequence"
        return {
            "model": {"name": qwen.name, "parameters": qwen.n_parameters, "fingerprint": qwen.fingerprint},
            "device": device_name(qwen.device),
            "dtype": str(qwen.dtype).removeprefix("torch."),
            "preset": self._presets.name,
            "sides": {name: list(c.sides) for name, c in self._presets.by_name.items()},
            "layout": base.layout.value,
            "glimpse": base.glimpse,
            "halo": base.halo,
            "overview_stride": base.overview_stride,
            "scorers": {"participatory": "texture" if self._head else "glimpse", "parallel": parallel},
            "lod_engines": self._viewer.backends(),
            "decoder": self._decoder.backend,
            "cache": _cache_facts(self._cache.stats()) | {"location": base.cache_location},
            "versions": {
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "python": platform.python_version(),
            },
            "notes": list(self._notes),
        }

    def _check(self, question: object) -> str:
        text = chats.check_question(question, self._presets.base.max_question_chars)
        self._qwen.check_text(text)
        return text

    def _sampling(self, max_new_tokens: int | None, temperature: float, more: dict[str, Any]) -> Sampling:
        known = sorted(field.name for field in dataclasses.fields(Sampling))
        for name in more:
            if name not in known:
                raise DecodeError(f"sampling argument {name!r}", ", ".join(known), "Correct the name")
        count = self._presets.base.max_new_tokens if max_new_tokens is None else max_new_tokens
        return Sampling(max_new_tokens=count, temperature=temperature, **more)

    def _stream(self, conversation: chats.Conversation, budget: Budget, sampling: Sampling) -> AnswerStream:
        timer = StageTimer(self._qwen.device)
        seen = self._viewer.see(conversation, budget, timer)
        with timer.stage("prefill"):
            prompt, head = prompting.build(self._qwen, conversation.messages, [s.encoding for s in seen])
            prefix = seen[0].prefix if len(seen) == 1 else None
            state = self._decoder.prefill(prompt, prefix if prefix and prefix.head == head else None)
        length, tokens = prompt.embeds.shape[1], list[int]()

        def pieces() -> Iterator[str]:
            with timer.stage("generate"):
                yield from text_pieces(self._decoder.generate(state, sampling), self._qwen.detokenize, tokens)

        def finish() -> Answer:
            reason: Literal["stop", "length"] = "length" if len(tokens) == sampling.max_new_tokens else "stop"
            made = tuple(s.timed(timer) for s in seen)
            text = self._qwen.detokenize(tokens)
            return Answer(text, made, timer.milliseconds(), length, len(tokens), reason)

        return AnswerStream(pieces(), finish)


def _unserved(built: BuiltEngines, presets: configs.PresetChoice) -> list[str]:
    """Notes on the presets that a build is not for; raises `EngineMismatchError` if it is for none."""
    others = [name for name, c in presets.by_name.items() if not built.serves(c.sides, c.halo)]
    if not others:
        return []
    if len(others) == len(presets.by_name):
        built.require(presets.base.sides, presets.base.halo)
    note = f"The engines in {built.folder} are not for preset {', '.join(others)}: torch encodes its tiles."
    logger.warning(note)
    return [note]


def _cache_facts(stats: CacheStats) -> dict[str, Any]:
    """Cache statistics with LODs by name."""
    by_lod = {
        name: {Lod(lod).name.lower(): count for lod, count in sorted(getattr(stats, name).items())}
        for name in ("hits_by_lod", "misses_by_lod")
    }
    return dataclasses.asdict(stats) | by_lod


def _texture_head(qwen: QwenVL, config: Config) -> TextureHead | None:
    path = Path(qwen.name) / TEXTURE_HEAD_FILE
    if config.participatory == "glimpse" or (config.participatory == "auto" and not path.is_file()):
        return None
    if not path.is_file():
        given = "participatory='texture' without a fitted head"
        remedy = "Fit one, or choose participatory='glimpse'"
        raise ConfigError(given, f"{TEXTURE_HEAD_FILE} beside the model", remedy)
    head = TextureHead.load(path, qwen.width, qwen.device)
    if not head.fits(qwen.embedding_probe):
        given = f"{path.name}, which was fitted to other embeddings than this checkpoint's"
        remedy = "Fit it anew, remove it, or choose participatory='glimpse'"
        raise EngineMismatchError(given, "a head fitted to this checkpoint", remedy)
    return head
