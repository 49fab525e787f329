"""Decoding one sequence at the speed at which its weights are read.

Keys and values lie in a leased slot of static size; a decode step, from the token's embedding to the next
token, is one CUDA graph. The device chooses tokens and goes on without the host, which reads them a step or
two later and stops when it sees a stop token: what the device has done beyond it is forgotten.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from arrcoc.decode import prefilling, selection
from arrcoc.decode.graphs import run_captured
from arrcoc.decode.launch import KernelStep
from arrcoc.decode.layers_step import LayersStep
from arrcoc.decode.protocol import Sampling
from arrcoc.decode.slots import FIRST_ROOM, Slot, SlotPool, capacity_for
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt

_AHEAD = 2
"""Steps queued on the device beyond the newest token that the host has read."""


class Step(Protocol):
    """One decode step on a slot."""

    @property
    def name(self) -> str:
        """What runs, for people."""
        ...

    def compile(self, slot: Slot) -> None:
        """Get ready for the first step."""
        ...

    def logits(self, slot: Slot) -> None:
        """From `slot.token` to `slot.logits`."""
        ...


@dataclass  # without slots: it is referred to weakly
class GraphedState:
    """One request in flight; its slot goes back to the pool when it is dropped.

    Attributes:
        slot: its keys and values.
        logits: fp32 [vocabulary] of the next token, after `prefill` and `step`.
        next_position: M-RoPE position of the next token, the same on all three axes.
        length: positions in the cache.
        text_ids: ids of the prompt's text.
    """

    slot: Slot
    logits: Tensor
    next_position: float
    length: int
    text_ids: tuple[int, ...] = ()
    _lease: weakref.finalize | None = field(default=None, repr=False)  # type: ignore[type-arg]


class GraphedDecoder:
    """See `Decoder`."""

    def __init__(
        self,
        qwen: QwenVL,
        keep_bytes: int = 4 << 30,
        room: int = 256,
        prefill_chunk: int | None = None,
        most_static: int | None = None,
        step: Step | None = None,
    ) -> None:
        """Make a decoder.

        Args:
            qwen: the checkpoint.
            keep_bytes: most bytes of slots that are kept between requests.
            room: tokens for which a slot should have room beyond the prompt; more make it grow.
            prefill_chunk: most positions of one pass of a prefill; None for all at once.
            most_static: up to so many new positions a prefill runs from a captured graph; 0 for never, None
                for as many as take longer to launch than to compute.
            step: how a step is computed; None runs transformers' layers.
        """
        self._qwen, self._room = qwen, room
        self._chunk = prefill_chunk
        self._most_static = prefilling.most_captured(qwen.text) if most_static is None else most_static
        self._step: Step = LayersStep(qwen) if step is None else step
        self._pool = SlotPool(qwen.text, keep_bytes)

    @property
    def backend(self) -> str:
        """See `Decoder`."""
        precision = str(self._qwen.dtype).removeprefix("torch.")
        return f"{self._step.name}, {self._pool.captures.describe()}, {precision}"

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, prefix: Prefix | None = None) -> GraphedState:
        """Run a prompt through all layers.

        Args:
            prompt: embeddings, positions and DeepStack planes.
            prefix: the first columns of the same prompt; it is completed and copied, not consumed.

        Raises:
            DecodeError: the prompt is longer than the checkpoint's context, or does not fit into memory.
        """
        prefilling.check_length(self._qwen, prompt)
        length = prompt.embeds.shape[1]
        slot = self._pool.lease(capacity_for(length + self._room))
        state = GraphedState(slot, slot.logits, prompt.next_position, length, prompt.text_ids)
        self._hold(state, slot)
        try:
            state.logits = prefilling.fill(self._qwen, slot, prompt, prefix, self._chunk, self._most_static)
        finally:  # where it failed half way too, the slot goes back with work queued on it
            slot.mark_used()
        return state

    @torch.inference_mode()
    def step(self, state: GraphedState, token: int) -> Tensor:
        """Append one token; fp32 logits [vocabulary] of the next."""
        slot = self._make_room(state, 1)
        slot.token.fill_(token)
        place(slot, state)
        self._run(slot, "greedy")
        state.next_position += 1
        state.length += 1
        state.logits = slot.logits.clone()
        slot.mark_used()
        return state.logits

    def generate(self, state: GraphedState, sampling: Sampling) -> Iterator[int]:
        """Token ids, one by one, until a stop token (not included) or `max_new_tokens`.

        Raises:
            DecodeError: keys and values no longer fit into memory.
        """
        most = sampling.max_new_tokens
        first_length, first_position = state.length, state.next_position
        run = self._start(state, sampling)
        ahead = _AHEAD if self._qwen.device.type == "cuda" else 0
        for count in range(most):
            run.queue(min(count + 1 + ahead, most))
            token = run.token()
            # As if stepped one by one: every token but the newest is in the cache.
            state.length, state.next_position = first_length + count, first_position + count
            if token in self._qwen.stop_ids:
                return
            yield token

    @torch.inference_mode()
    def _start(self, state: GraphedState, sampling: Sampling) -> _Run:
        slot = self._make_room(state, min(sampling.max_new_tokens, FIRST_ROOM))
        mode = selection.mode_of(sampling)
        selection.prepare(slot, sampling)
        place(slot, state)
        slot.logits.copy_(state.logits)
        selection.record(slot, selection.choose(slot, mode))
        return _Run(self, state, mode)

    def _run(self, slot: Slot, mode: selection.Mode) -> None:
        """One step, captured."""
        if mode not in slot.graphs:
            self._step.compile(slot)
        run_captured(slot, mode, lambda: self._work(slot, mode))

    def _work(self, slot: Slot, mode: selection.Mode) -> None:
        """From the newest token to the next: what a graph holds."""
        self._step.logits(slot)
        if mode == "greedy" and isinstance(self._step, KernelStep):
            self._step.finish(slot)
        else:
            selection.advance(slot, selection.choose(slot, mode))

    def _make_room(self, state: GraphedState, more: int) -> Slot:
        """The state's slot, or a larger one with the same contents if `more` tokens do not fit."""
        old = state.slot
        if state.length + more <= old.capacity:
            return old
        slot = self._pool.lease(capacity_for(state.length + more))
        slot.kv[:, :, :, : state.length] = old.kv[:, :, :, : state.length]
        self._move(state, slot)
        return slot

    def _grow(self, state: GraphedState) -> Slot:
        """A slot of twice the capacity that goes on where the state's stands, in the middle of an answer."""
        slot = self._pool.lease(2 * state.slot.capacity)
        slot.take_over(state.slot)
        self._move(state, slot)
        return slot

    def _move(self, state: GraphedState, slot: Slot) -> None:
        """Give the state's slot back and hold another."""
        state.logits = state.logits.clone()
        slot.mark_used()
        state.slot.mark_used()
        if state._lease is not None:
            state._lease()
        state.slot = slot
        self._hold(state, slot)

    def _hold(self, state: GraphedState, slot: Slot) -> None:
        state._lease = weakref.finalize(state, self._pool.give_back, slot)
        state._lease.atexit = False


class _Run:
    """Steps queued on a slot, and the tokens that they made, on their way to the host."""

    def __init__(self, decoder: GraphedDecoder, state: GraphedState, mode: selection.Mode) -> None:
        """The state's slot holds the first token."""
        self._decoder, self._state, self._mode = decoder, state, mode
        self._slot, self._before = state.slot, state.length
        self._arrivals: deque[torch.cuda.Event | None] = deque()
        self._landed: deque[int] = deque()
        self._queued = self._read = 0
        self._arrive()

    @torch.inference_mode()
    def queue(self, count: int) -> None:
        """Queue steps until `count` tokens are made or under way."""
        while self._queued < count:
            if self._before + self._queued >= self._slot.capacity:
                # The old slot, and its memory on the host, may be another request's at once.
                self._landed.extend([self._land() for _ in range(len(self._arrivals))])
                self._slot = self._decoder._grow(self._state)
            self._decoder._run(self._slot, self._mode)
            self._arrive()

    def token(self) -> int:
        """Wait for the next token."""
        return self._landed.popleft() if self._landed else self._land()

    def _land(self) -> int:
        arrived = self._arrivals.popleft()
        if arrived is not None:
            arrived.synchronize()
        self._read += 1
        return int(self._slot.seen[self._read - 1])

    def _arrive(self) -> None:
        slot, index = self._slot, self._queued
        self._queued += 1
        if slot.seen is not slot.history:
            slot.seen[index : index + 1].copy_(slot.history[index : index + 1], non_blocking=True)
            slot.mark_used()
        self._arrivals.append(slot.used)


def place(slot: Slot, state: GraphedState) -> None:
    """Set the slot's scalars to where a state stands."""
    slot.length.fill_(state.length)
    slot.position.fill_(state.next_position)
    slot.step.zero_()
