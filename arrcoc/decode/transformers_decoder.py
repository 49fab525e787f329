"""Decoding with transformers' own layers, in process, with position bookkeeping of its own.

The stock model keeps `rope_deltas` on the module, which two requests at once would overwrite; here all that
a request needs is in its `DecodeState`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arrcoc.decode import prefilling
from arrcoc.decode.protocol import Sampling
from arrcoc.kv import KvCache
from arrcoc.prefixes import Prefix
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

    def __init__(self, qwen: QwenVL, prefill_chunk: int | None = None) -> None:
        """Args: the checkpoint; most positions of one pass of a prefill, None for all at once."""
        self._qwen, self._chunk = qwen, prefill_chunk
        self.backend = f"transformers sdpa {str(qwen.dtype).removeprefix('torch.')}"

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, prefix: Prefix | None = None) -> DecodeState:
        """Run a prompt through all layers.

        Args:
            prompt: embeddings, positions and DeepStack planes.
            prefix: the first columns of the same prompt. Its missing layers are run, and its keys and
                values copied: it stays as it is for other requests.

        Raises:
            DecodeError: the prompt is longer than the checkpoint's context.
        """
        prefilling.check_length(self._qwen, prompt)
        length, done = prompt.embeds.shape[1], 0
        if prefix is None:
            cache = KvCache(self._qwen.n_layers, capacity=length + 64)
        else:
            prefix.complete(self._qwen)
            cache, done = prefix.fork(capacity=length + 64), prefix.length
        logits = prefilling.run(self._qwen, cache, prompt, done, self._chunk)
        return DecodeState(cache, logits, prompt.next_position, length)

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
        generator = new_generator(state.logits.device, sampling)
        for count in range(sampling.max_new_tokens):
            token = choose(state.logits, sampling, generator)
            if token in self._qwen.stop_ids:
                return
            yield token
            if count + 1 < sampling.max_new_tokens:
                self.step(state, token)


def new_generator(device: torch.device, sampling: Sampling) -> torch.Generator | None:
    """A seeded source of noise; None where decoding is greedy."""
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
