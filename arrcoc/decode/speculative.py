"""Speculative decoding: cheap guesses of the next tokens, several of which one pass of the model checks.

A pass over a few positions takes about as long as over one, for both read every weight once. Where guesses
agree with what the model itself finds likeliest they are kept; the first that does not is replaced by the
model's token. So greedy decoding gives the same tokens as without guesses (Leviathan et al., arXiv
2211.17192; prompt lookup: transformers' `prompt_lookup_num_tokens`). Sampled decoding does not guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from arrcoc.decode.graphed_decoder import GraphedDecoder, GraphedState, Step, place
from arrcoc.decode.graphs import run_captured
from arrcoc.decode.layers_step import run_static
from arrcoc.decode.protocol import Sampling
from arrcoc.decode.slots import Slot
from arrcoc.kv import KvCache
from arrcoc.qwen import QwenVL

_MOST = 8
"""Positions that a pass checks: the newest token and up to seven guesses."""
_ROWS = 16
"""Rows of that pass, the fewest that the kernels take; those beyond are not looked at."""

Propose = Callable[[Sequence[int], int], list[int]]
"""From the text so far and a number, up to so many guesses of what follows."""


class Proposer(Protocol):
    """What guesses."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def begin(self) -> Propose:
        """Guesses for one request, whose text only ever grows."""
        ...


class PromptLookup:
    """Guesses what followed the last place where the text's last few tokens stood before."""

    name = "prompt lookup"

    def __init__(self, longest: int = 3) -> None:
        """Args: most tokens that must match; fewer are tried where they do not."""
        self._longest = longest

    def begin(self) -> Propose:
        """See `Proposer`."""
        return self._propose

    def _propose(self, text: Sequence[int], count: int) -> list[int]:
        for size in range(min(self._longest, len(text) - 1), 0, -1):
            tail = list(text[-size:])
            for start in range(len(text) - size - 1, -1, -1):
                if list(text[start : start + size]) == tail:
                    return list(text[start + size : start + size + count])
        return []


class Draft:
    """Guesses by a small checkpoint that sees the text alone, without images."""

    def __init__(self, qwen: QwenVL) -> None:
        """Args: a checkpoint with the model's vocabulary."""
        self._qwen = qwen
        self.name = f"draft {qwen.name}"

    def begin(self) -> Propose:
        """See `Proposer`."""
        return _DraftRun(self._qwen).propose


class _DraftRun:
    def __init__(self, qwen: QwenVL) -> None:
        self._qwen, self._cache = qwen, KvCache(qwen.n_layers, capacity=512)
        self._held: list[int] = []

    @torch.inference_mode()
    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Greedy continuation of the text; what the cache holds beyond their common beginning is dropped."""
        common = 0
        while common < min(len(self._held), len(text) - 1) and self._held[common] == text[common]:
            common += 1
        self._cache.truncate(common)
        self._held, pending = list(text[:common]), list(text[common:])
        made: list[int] = []
        while len(made) < count:
            made.append(self._next(pending))
            pending = made[-1:]
        return made

    def _next(self, ids: list[int]) -> int:
        begin = len(self._held)
        positions = torch.arange(begin, begin + len(ids)).float().expand(3, -1)
        layers = range(self._qwen.n_layers)
        hidden = self._qwen.run_layers(self._qwen.embed(ids)[None], positions, self._cache, layers)
        self._held += ids
        return int(self._qwen.logits(hidden[:, -1:])[0, 0].argmax())


class SpeculativeDecoder(GraphedDecoder):
    """A `GraphedDecoder` that guesses where it decodes greedily."""

    def __init__(
        self,
        qwen: QwenVL,
        proposer: Proposer,
        keep_bytes: int = 4 << 30,
        room: int = 256,
        prefill_chunk: int | None = None,
        step: Step | None = None,
    ) -> None:
        """Args: as for `GraphedDecoder`; proposer makes the guesses; step is for sampled decoding."""
        super().__init__(qwen, keep_bytes, room, prefill_chunk, step=step)
        self._proposer = proposer

    @property
    def backend(self) -> str:
        """See `Decoder`."""
        return f"{super().backend}, {self._proposer.name}"

    def generate(self, state: GraphedState, sampling: Sampling) -> Iterator[int]:
        """Token ids, one by one, until a stop token (not included) or `max_new_tokens`."""
        if sampling.temperature > 0:
            yield from super().generate(state, sampling)
            return
        propose, text = self._proposer.begin(), list(state.text_ids)
        new, made = [int(state.logits.argmax())], 0
        while True:
            for token in new:
                if token in self._qwen.stop_ids:
                    return
                yield token
                made += 1
                text.append(token)
                if made == sampling.max_new_tokens:
                    return
            guesses = propose(text, min(_MOST, sampling.max_new_tokens - made) - 1)
            new = self._check(state, [new[-1], *guesses])

    @torch.inference_mode()
    def _check(self, state: GraphedState, rows: list[int]) -> list[int]:
        """The tokens that follow the newest one: guesses that hold, and one of the model's own.

        Args:
            state: moved on by the newest token and the guesses that hold.
            rows: the newest token, and up to seven guesses.
        """
        slot = self._make_room(state, _ROWS)
        likeliest = self._likeliest(slot, state, rows)
        kept = 0
        while kept < len(rows) - 1 and rows[kept + 1] == likeliest[kept]:
            kept += 1
        state.length += kept + 1
        state.next_position += kept + 1
        return likeliest[: kept + 1]

    def _likeliest(self, slot: Slot, state: GraphedState, rows: list[int]) -> list[int]:
        """The model's choice after each row."""
        padded = torch.tensor(rows + rows[-1:] * (_ROWS - len(rows)))
        place(slot, state)
        tokens, chosen = slot.history[:_ROWS], slot.history[_ROWS : 2 * _ROWS]
        tokens.copy_(padded)
        run_captured(slot, "check", lambda: _choose_rows(self._qwen, slot, tokens, chosen))
        slot.mark_used()
        return [int(token) for token in chosen.tolist()[: len(rows)]]


def _choose_rows(qwen: QwenVL, slot: Slot, tokens: Tensor, chosen: Tensor) -> None:
    steps = torch.arange(len(tokens), device=tokens.device)
    positions = (slot.position + steps).expand(3, -1)
    hidden = run_static(qwen, slot, qwen.embed_tensor(tokens)[None], positions)
    chosen.copy_(qwen.logits(hidden)[0].argmax(-1))
