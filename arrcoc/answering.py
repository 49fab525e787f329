"""From a conversation to an encoding, a stream of text, or several answers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

from arrcoc import prompting
from arrcoc.answer import Answer, AnswerStream, text_pieces
from arrcoc.chat import Conversation
from arrcoc.decode import BatchDecoder, Decoder, Sampling
from arrcoc.encoding import Encoding
from arrcoc.prefetch import TilePrefetcher
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt
from arrcoc.timing import StageTimer
from arrcoc.viewer import Budget, Seen, Viewer


class Ready(NamedTuple):
    """A request whose prompt can be run.

    Attributes:
        seen: its images.
        prompt: what the decoder runs.
        prefix: the prompt's beginning, where it was computed before.
        timer: its stages so far.
    """

    seen: Sequence[Seen]
    prompt: Prompt
    prefix: Prefix | None
    timer: StageTimer


class Answering:
    """Viewer, prompt and decoder in their order; keeps no state of a request."""

    def __init__(self, qwen: QwenVL, viewer: Viewer, decoder: Decoder, ahead: TilePrefetcher) -> None:
        """Share the engine's parts.

        Args:
            qwen: the checkpoint.
            viewer: encodes images.
            decoder: answers one request.
            ahead: encodes tiles ahead while no request runs.
        """
        self._qwen, self._viewer, self._decoder, self._ahead = qwen, viewer, decoder, ahead

    def encode(self, conversation: Conversation, budget: Budget) -> Encoding:
        """Encode a conversation's one image."""
        timer = StageTimer(self._qwen.device)
        with self._ahead.request():
            (seen,) = self._viewer.see(conversation, budget, timer)
        return seen.timed(timer)

    def stream(self, conversation: Conversation, budget: Budget, sampling: Sampling) -> AnswerStream:
        """Encode the images and run the prompt; the answer comes as the stream is read."""
        with self._ahead.request():
            ready = self._prepare(conversation, budget)
            with ready.timer.stage("prefill"):
                state = self._decoder.prefill(ready.prompt, ready.prefix)
        tokens = list[int]()

        def pieces() -> Iterator[str]:
            with self._ahead.request(), ready.timer.stage("generate"):
                yield from text_pieces(self._decoder.generate(state, sampling), self._qwen.detokenize, tokens)

        return AnswerStream(pieces(), lambda: self._answer(ready, tokens, sampling))

    def batch(
        self, asked: Sequence[tuple[Conversation, Budget]], sampling: Sampling, decoder: BatchDecoder
    ) -> list[Answer]:
        """Encode images one after the other, and answer side by side."""
        with self._ahead.request():
            ready = [self._prepare(conversation, budget) for conversation, budget in asked]
            with ExitStack() as running:
                for one in ready:
                    running.enter_context(one.timer.stage("generate"))
                made = decoder.generate([r.prompt for r in ready], [r.prefix for r in ready], sampling)
        return [self._answer(one, tokens, sampling) for one, tokens in zip(ready, made, strict=True)]

    def _prepare(self, conversation: Conversation, budget: Budget) -> Ready:
        """Encode a conversation's images and lay out its prompt."""
        timer = StageTimer(self._qwen.device)
        seen = self._viewer.see(conversation, budget, timer)
        with timer.stage("prefill"):
            prompt, head = prompting.build(self._qwen, conversation.messages, [s.encoding for s in seen])
        prefix = seen[0].prefix if seen else None
        return Ready(seen, prompt, prefix if prefix and prefix.head == head else None, timer)

    def _answer(self, ready: Ready, tokens: list[int], sampling: Sampling) -> Answer:
        reason: Literal["stop", "length"] = "length" if len(tokens) == sampling.max_new_tokens else "stop"
        made = tuple(s.timed(ready.timer) for s in ready.seen)
        length, text = ready.prompt.embeds.shape[1], self._qwen.detokenize(tokens)
        return Answer(text, made, ready.timer.milliseconds(), length, len(tokens), reason)
