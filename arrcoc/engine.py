"""The engine: image and question in, query-aware vision tokens or an answer out."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from arrcoc import chat as chats
from arrcoc import config as configs
from arrcoc.answer import Answer, AnswerStream
from arrcoc.answering import Answering
from arrcoc.cache import CacheStats, open_cache
from arrcoc.config import Config
from arrcoc.decode import BatchDecoder, Decoder, Sampling, make_decoder, quantize_text
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.description import describe
from arrcoc.devices import check_current, resolve_device, resolve_dtype
from arrcoc.encoding import Encoding
from arrcoc.errors import ConfigError, DecodeError, EngineMismatchError
from arrcoc.image import ImageInput
from arrcoc.lod import BuiltEngines
from arrcoc.prefetch import TilePrefetcher
from arrcoc.prefix_store import PrefixStats, PrefixStore
from arrcoc.qwen import QwenVL, load
from arrcoc.scorers import TEXTURE_HEAD_FILE, TextureHead
from arrcoc.session import Calls, Session
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
        self._cache = open_cache(base)
        quantize_text(qwen, base.decode_weights)
        self._decoder: Decoder = make_decoder(qwen, base)
        self._batch = BatchDecoder(qwen, base.prefill_chunk, base.decode_bytes, base.decoder != "eager")
        self._head = _texture_head(qwen, base)
        self._prefixes = PrefixStore(base.prefix_bytes, base.cache_half_life)
        on = base.prefetch == "on" or (base.prefetch == "auto" and qwen.device.type == "cuda")
        self._ahead = TilePrefetcher(qwen.device, enabled=on)
        # An engine that is dropped without being closed leaves no thread behind.
        weakref.finalize(self, self._ahead.stop).atexit = False
        self._viewer = Viewer(qwen, presets, self._cache, self._head, built, self._prefixes, self._ahead)
        self._answering = Answering(qwen, self._viewer, self._decoder, self._ahead)

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
            ConfigError: unknown preset, device, dtype or field, or a CUDA device that is not the current one.
            EngineMismatchError: the engines were built from other weights, for another preset or device, by
                another version, or their files were changed.
            EngineBuildError: the Python package that runs the engines is not installed.
        """
        if model is None and str(preset) == "auto":
            preset = "demo"
        presets = configs.PresetChoice.make(preset, overrides)
        place = resolve_device(device)
        check_current(place)
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
        return self._answering.encode(chats.single(image, self._check(question)), budget)

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
        chosen = self._sampling(max_new_tokens, temperature, sampling)
        return self._answering.stream(conversation, budget, chosen)

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
        return self._answering.stream(conversation, budget, chosen).exhaust()

    def open(self, image: ImageInput, budget: Budget = None, *, conversation: bool = False) -> Session:
        """Hold an image open for several questions; what they have in common is computed now, and once.

        Args:
            image: as for `encode`.
            budget: of questions that name none, as for `encode`.
            conversation: whether each question is a turn of one conversation, so that earlier questions and
                answers are part of the prompt; else they are independent of one another.

        Raises:
            ImageError, BudgetError: an argument is not usable.
        """
        timer = StageTimer(self._qwen.device)
        with self._ahead.request():
            view = self._viewer.open(image, budget, timer)

        def stream(chat: chats.Conversation, budget: Budget, count: int | None, *how: Any) -> AnswerStream:
            return self._answering.stream(chat, budget, self._sampling(count, *how))

        calls = Calls(self._check, self._answering.encode, stream)
        return Session(view, budget, calls, timer, conversation=conversation)

    def ask_batch(
        self,
        requests: Sequence[tuple[ImageInput | Encoding, str] | tuple[ImageInput | Encoding, str, Budget]],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer several questions at once: images one after the other, their answers side by side.

        Args:
            requests: (image, question) or (image, question, budget), as for `ask`; in any number and size.
            max_new_tokens: most tokens of each answer; None takes the configured number.
            temperature: 0 is greedy, and then each answer is what `ask` gives; above 0 samples.
            sampling: further fields of `arrcoc.Sampling`.

        Raises:
            ImageError, QueryError, BudgetError, DecodeError: an argument is not usable.
            EngineMismatchError: an encoding was made by other vision weights or in another precision.
        """
        chosen = self._sampling(max_new_tokens, temperature, sampling)
        asked = [(chats.single(image, self._check(q)), [*budget, None][0]) for image, q, *budget in requests]
        return self._answering.batch(asked, chosen, self._batch)

    def cache_stats(self) -> CacheStats:
        """Counts of the tile cache."""
        return self._cache.stats()

    def prefix_stats(self) -> PrefixStats:
        """Counts of the store of images' overviews: keys and values that questions and sessions share."""
        return self._prefixes.stats()

    def evict_low_relevance(self, threshold: float) -> int:
        """Drop cached tiles whose decayed relevance score is below a threshold; returns how many."""
        return self._cache.evict_low_relevance(threshold)

    def finish_prefetch(self, timeout: float | None = None) -> bool:
        """Wait until no tiles are being encoded ahead; False if that took longer than `timeout` seconds."""
        return self._ahead.flush(timeout)

    def close(self) -> None:
        """Finish what runs in the background, and write cached tiles to disk if there is a tier for them.

        Happens by itself when the interpreter ends. A closed engine still answers; no tile goes to disk then.
        """
        self._ahead.close()
        self._cache.close()

    def warm_up(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        """Compile the tile encoders' kernels and capture their graphs, before a request needs them.

        The graphs of the plan stage, of prompts and of decoding are captured by the first requests. Compiled
        kernels stay in Triton's cache on disk, so that later processes start warm.

        Args:
            progress: called with what is under way, how many steps are done, and of how many.
        """
        with self._ahead.request():
            self._viewer.warm_up(progress)

    def describe(self) -> dict[str, Any]:
        """What runs where: model, presets, scorers, engines, decoder, cache, versions, notes. JSON-ready."""
        return describe(
            self._qwen,
            self._presets,
            self._viewer,
            self._decoder.backend,
            self._cache.stats(),
            self._prefixes.stats(),
            [*self._notes, *self._batch.notes()],
        )

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
