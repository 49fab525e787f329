"""Static memory of one sequence in decoding, and the pool that such memory is leased from.

A captured step writes and reads fixed addresses, so a sequence needs keys and values of a fixed capacity,
and small buffers, that outlive it: a slot. Slots come in a few capacities and are used again and again.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arrcoc.decode.graphs import Captures
from arrcoc.errors import DecodeError
from arrcoc.text import TextWeights

MOST_SPLITS = 64
"""Most parts that the attention of a step divides the cache into."""
FIRST_ROOM = 4096
"""Most positions that are reserved at first for an answer; a longer one grows when it gets there."""
_LEAST_CAPACITY = 1024


def capacity_for(positions: int) -> int:
    """Capacity of the smallest slot for a sequence: 1024 positions doubled as often as needed."""
    return max(_LEAST_CAPACITY, 1 << (positions - 1).bit_length())


def no_room(nbytes: int, positions: int, device: torch.device) -> DecodeError:
    """The error for keys and values that do not fit into the device's memory."""
    free = f"{torch.cuda.mem_get_info(device)[0]:,} bytes, what is free" if device.type == "cuda" else "less"
    given = f"keys and values of {nbytes:,} bytes for {positions:,} positions"
    return DecodeError(given, free, "Lower max_new_tokens or the budget, or ask fewer questions at once")


class PrefillInputs(NamedTuple):
    """Static inputs of a prefill of m positions.

    Attributes:
        embeds: [1, m, D].
        positions: fp32 [3, m].
        planes: [L, m, D].
        last: int64 [1], the row whose logits are wanted.
    """

    embeds: Tensor
    positions: Tensor
    planes: Tensor
    last: Tensor


class Slot:
    """Buffers of one sequence: keys and values, the step's vectors, and its scalars, all on the device.

    Attributes:
        capacity: most positions.
        kv: [layers, 2, kv_heads, capacity, head_dim] rotated keys and values.
        x, qkv, mixed, mlp: fp32 vectors between kernels.
        cosine, sine: fp32 [head_dim / 2], rotation of the position in work.
        sums, parts, arrived: scratch of the attention.
        logits: fp32 [vocabulary] of the next token.
        best, best_at: largest logit and where it is, for blocks of the vocabulary.
        token: int64 [1], the newest token, not yet in the cache.
        history: int64 [capacity], tokens chosen so far; int64 [1] `step` is how many.
        length: int32 [1], positions in the cache.
        position: fp32 [1], M-RoPE position of `token`, the same on all three axes.
        temperature, top_p: fp32 [1]; top_k: int64 [1].
        generator: source of the sampling noise.
        seen: pinned int64 [capacity] on the host, where tokens arrive; `history` itself without CUDA.
        graphs: captured work by name, None where it cannot be captured; `pool`, their memory.
        captures: whether work is captured.
        used: end of the newest work on the slot, for whoever leases it next.
    """

    def __init__(self, weights: TextWeights, capacity: int, captures: Captures | None = None) -> None:
        """Args: weights of the decoder; capacity in positions; and if work is captured."""
        self.capacity = capacity
        table = weights.embedding
        device, heads, head_dim = table.device, weights.heads, weights.head_dim
        shape = (len(weights.layers), 2, weights.kv_heads, capacity, head_dim)
        # Zeros: what is never written is masked out of attention, but must be finite.
        self.kv = torch.zeros(shape, dtype=table.dtype, device=device)

        def vector(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.x = vector(table.shape[1])
        self.qkv = vector((heads + 2 * weights.kv_heads) * head_dim)
        self.mixed = vector(heads * head_dim)
        self.mlp = vector(weights.layers[0].down.columns)
        self.cosine, self.sine = vector(head_dim // 2), vector(head_dim // 2)
        self.sums, self.parts = vector(heads, MOST_SPLITS, head_dim), vector(heads, MOST_SPLITS, 2)
        self.arrived = vector(weights.kv_heads, dtype=torch.int32)
        self.logits = vector(weights.head.rows)
        self.best = vector(weights.head.rows)
        self.best_at = vector(weights.head.rows, dtype=torch.int32)
        self.token, self.step = vector(1, dtype=torch.int64), vector(1, dtype=torch.int64)
        self.history = vector(capacity, dtype=torch.int64)
        self.length = vector(1, dtype=torch.int32)
        self.position, self.temperature, self.top_p = vector(1), vector(1), vector(1)
        self.top_k = vector(1, dtype=torch.int64)
        self.generator = torch.Generator(device=device)
        on_gpu = device.type == "cuda"
        self.seen = torch.zeros(capacity, dtype=torch.int64, pin_memory=True) if on_gpu else self.history
        self.graphs: dict[str, Any] = {}
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.captures = Captures.on(device) if captures is None else captures
        self.used: torch.cuda.Event | None = None
        self._inputs: dict[int, PrefillInputs] = {}
        self._met: set[int] = set()

    def inputs(self, size: int, n_planes: int) -> PrefillInputs:
        """The static inputs of a prefill of `size` positions, made at first use."""
        if size not in self._inputs:
            kind, width = self.kv.new_zeros, len(self.x)
            self._inputs[size] = PrefillInputs(
                kind(1, size, width),
                self.x.new_zeros(3, size),
                kind(n_planes, size, width),
                torch.zeros_like(self.step),
            )
        return self._inputs[size]

    def met_before(self, size: int) -> bool:
        """Whether a prefill of this padded size was asked for before."""
        met = size in self._met
        self._met.add(size)
        return met

    def take_over(self, other: Slot) -> None:
        """Go on where another, smaller slot stands, in the middle of an answer."""
        self.kv[:, :, :, : other.capacity] = other.kv
        self.history[: other.capacity] = other.history
        for mine, given in zip(self.scalars, other.scalars, strict=True):
            mine.copy_(given)
        for name in ("temperature", "top_p", "top_k"):
            getattr(self, name).copy_(getattr(other, name))
        self.generator.set_state(other.generator.get_state())

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        """What a step changes besides keys, values and scratch."""
        return self.token, self.step, self.length, self.position

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, by far the most of a slot."""
        return self.kv.nbytes

    def mark_used(self) -> None:
        """Note that work on this slot was queued on the current stream."""
        if self.kv.device.type == "cuda":
            self.used = torch.cuda.current_stream(self.kv.device).record_event()


class SlotPool:
    """Slots waiting for their next sequence, within a byte bound; safe to share between threads.

    A lease never waits: where no slot of the capacity is idle, another is made. The bound is on what is kept
    when it comes back.
    """

    def __init__(self, weights: TextWeights, keep_bytes: int, captures: Captures | None = None) -> None:
        """Args: weights of the decoder; most bytes of idle slots; whether work is captured."""
        self._weights, self._keep_bytes = weights, keep_bytes
        self.captures = Captures.on(weights.embedding.device) if captures is None else captures
        self._idle: list[Slot] = []
        # Reentrant: a slot comes back by a finaliser, which may run anywhere, in these methods too.
        self._lock = threading.RLock()

    def lease(self, capacity: int) -> Slot:
        """A slot of exactly this capacity, in order with the current stream.

        Raises:
            DecodeError: there is too little memory for it.
        """
        with self._lock:
            found = next((slot for slot in reversed(self._idle) if slot.capacity == capacity), None)
            if found is not None:
                with suppress(ValueError):  # a finaliser that ran just now may have dropped it
                    self._idle.remove(found)
        if found is None:
            return self._make(capacity)
        if found.used is not None:
            torch.cuda.current_stream(found.kv.device).wait_event(found.used)
        return found

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for the next sequence; those idle for longest go where the bound is exceeded."""
        dropped = []
        with self._lock:
            assert slot not in self._idle, "a slot came back twice"
            self._idle.append(slot)
            while self._bytes() > self._keep_bytes:
                dropped.append(self._idle.pop(0))
        for old in dropped:
            if old.used is not None:
                old.used.synchronize()  # its memory may go to another stream at once

    def _make(self, capacity: int) -> Slot:
        try:
            return Slot(self._weights, capacity, self.captures)
        except torch.OutOfMemoryError:
            with self._lock:
                idle, self._idle = self._idle, []
        for old in idle:
            if old.used is not None:
                old.used.synchronize()
        del idle
        weights = self._weights
        try:
            return Slot(weights, capacity, self.captures)
        except torch.OutOfMemoryError as error:
            table, width = weights.embedding, weights.kv_heads * weights.head_dim
            size = 2 * len(weights.layers) * width * capacity * table.element_size()
            raise no_room(size, capacity, table.device) from error

    def idle_bytes(self) -> int:
        """Bytes of the slots that are kept idle."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(slot.nbytes for slot in self._idle)
