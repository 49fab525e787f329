"""Decoding with transformers' own layers, in process, with position bookkeeping of its own.

The stock model keeps `rope_deltas` on the module, which two requests at once would overwrite; here all that
a request needs is in its `DecodeState`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arrcoc.decode.protocol import Sampling
from arrcoc.errors import DecodeError
from arrcoc.kv import KvCache, Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt


@dataclass(slots=True)
class DecodeState:
    """One request in flight.

    Attributes:
        cache: keys and values of all layers.
        logits: fp32 [vocabulary] of the next token.
        next_position: M-RoPE position of the next token, the same on all three axes.
        length: positions in the cache.
    """

    cache: KvCache
    logits: Tensor
    next_position: float
    length: int


class TransformersDecoder:
    """See `Decoder`."""

    def __init__(self, qwen: QwenVL) -> None:
        """Args: the checkpoint."""
        self._qwen = qwen
        self.backend = f"transformers sdpa {str(qwen.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, prefix: Prefix | None = None) -> DecodeState:
        """Run a prompt through all layers.

        Args:
            prompt: embeddings, positions and DeepStack planes.
            prefix: the first columns of the same prompt, already through the first layers. It is
                completed and consumed: its cache becomes the request's.

        Raises:
            DecodeError: the prompt is longer than the checkpoint's context.
        """
        length = prompt.embeds.shape[1]
        if length > self._qwen.max_positions:
            raise DecodeError(
                f"a prompt of {length:,} tokens",
                f"at most {self._qwen.max_positions:,}, the checkpoint's context",
                "Lower the budget or shorten the text",
            )
        if prefix is None:
            cache = KvCache(self._qwen.n_layers, capacity=length + 64)
            done, planes_done = 0, 0
        else:
            cache, done = prefix.cache, prefix.length
            planes_done = self._complete(prefix)
        hidden = self._qwen.run_layers(
            prompt.embeds[:, done:],
            prompt.positions[:, done:],
            cache,
            range(self._qwen.n_layers),
            vision=prompt.vision[done:].nonzero()[:, 0],
            deepstack=prompt.deepstack[:, planes_done:],
        )
        logits = self._qwen.logits(hidden[:, -1:])[0, 0]
        return DecodeState(cache, logits, prompt.next_position, length)

    def _complete(self, prefix: Prefix) -> int:
        """Run a prefix through the layers it has not seen; returns its number of vision tokens."""
        rest = range(prefix.depth, self._qwen.n_layers)
        if len(rest):
            self._qwen.run_layers(
                prefix.hidden,
                prefix.positions,
                prefix.cache,
                rest,
                vision=prefix.vision,
                deepstack=prefix.deepstack,
            )
        return prefix.deepstack.shape[1]

    @torch.inference_mode()
    def step(self, state: DecodeState, token: int) -> Tensor:
        """Append one token; fp32 logits [vocabulary] of the next."""
        position = torch.full((3, 1), state.next_position, device=self._qwen.device)
        embeds = self._qwen.embed([token])[None]
        hidden = self._qwen.run_layers(embeds, position, state.cache, range(self._qwen.n_layers))
        state.next_position += 1
        state.length += 1
        state.logits = self._qwen.logits(hidden)[0, 0]
        return state.logits

    def generate(self, state: DecodeState, sampling: Sampling) -> Iterator[int]:
        """Token ids, one by one, until a stop token (not included) or `max_new_tokens`."""
        generator = _generator(state.logits.device, sampling)
        for count in range(sampling.max_new_tokens):
            token = choose(state.logits, sampling, generator)
            if token in self._qwen.stop_ids:
                return
            yield token
            if count + 1 < sampling.max_new_tokens:
                self.step(state, token)


def _generator(device: torch.device, sampling: Sampling) -> torch.Generator | None:
    if sampling.temperature == 0:
        return None
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """The next token id from fp32 logits [vocabulary]: likeliest, or sampled after top-k, then top-p."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits / sampling.temperature
    if sampling.top_k:
        kth = scaled.topk(min(sampling.top_k, scaled.numel())).values[-1]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if those before it have not yet reached top_p, so the likeliest always stays.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.index_fill(0, order[dropped], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
