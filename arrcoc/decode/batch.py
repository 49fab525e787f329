"""Several requests decoded side by side, each with its own length and positions.

Every request is prefilled on its own. Keys and values then lie side by side, all beginning at column 0; a
mask hides from each request what lies beyond its own length, so a request's tokens do not depend on its
neighbours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from arrcoc.decode import prefilling
from arrcoc.decode.graphs import Captures, run_captured
from arrcoc.decode.protocol import Sampling
from arrcoc.decode.slots import capacity_for, no_room
from arrcoc.decode.transformers_decoder import choose, new_generator
from arrcoc.kv import KvCache
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt

_FIRST_ROOM = 1024
"""Most positions that are reserved at first for the answers; longer ones grow when they get there."""


class BatchMemory:
    """Static memory of B sequences; what `run_captured` needs of a slot.

    Attributes:
        kv: [layers, 2, B, kv_heads, capacity, head_dim].
        tokens: int64 [B], the newest, not yet in the cache.
        lengths: int64 [B], positions in the cache.
        positions: fp32 [B], M-RoPE position of `tokens`.
        logits: fp32 [B, vocabulary] of the next tokens.
    """

    def __init__(self, qwen: QwenVL, rows: int, capacity: int, captures: Captures) -> None:
        """Args: the checkpoint; number of sequences; positions of each; whether steps are captured.

        Raises:
            DecodeError: there is too little memory.
        """
        weights = qwen.text
        device, table = qwen.device, weights.embedding
        shape = (qwen.n_layers, 2, rows, weights.kv_heads, capacity, weights.head_dim)
        try:
            self.kv = torch.zeros(shape, dtype=table.dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise no_room(math.prod(shape) * table.element_size(), rows * capacity, device) from error
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths, self.positions = torch.zeros_like(self.tokens), torch.zeros(rows, device=device)
        self.logits = torch.zeros(rows, weights.head.rows, device=device)
        self.generator = torch.Generator(device=device)
        self.graphs: dict[str, Any] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.captures = captures

    @property
    def capacity(self) -> int:
        """Most positions of a sequence."""
        return int(self.kv.shape[4])

    def take_over(self, other: BatchMemory) -> None:
        """Go on where other, smaller memory stands, in the middle of the answers."""
        self.kv[..., : other.capacity, :] = other.kv
        for mine, given in zip(self.scalars, other.scalars, strict=True):
            mine.copy_(given)

    def lend(self) -> None:
        """Have the current stream's work end before the memory goes elsewhere, wherever it was made."""
        if self.kv.is_cuda:
            stream = torch.cuda.current_stream(self.kv.device)
            for tensor in (self.kv, self.logits, *self.scalars):
                tensor.record_stream(stream)

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        """What a step changes besides keys and values."""
        return self.tokens, self.lengths, self.positions


class _RowsKv:
    """The batch's keys and values as a cache that takes one new position of every row."""

    def __init__(self, memory: BatchMemory) -> None:
        self._kv = memory.kv
        self._where = torch.arange(len(memory.lengths), device=memory.kv.device), memory.lengths

    def length(self, layer: int) -> int:
        """Positions that a layer's keys have: the capacity."""
        return int(self._kv.shape[4])

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, 1, head_dim] in place and return the layer's whole buffers."""
        rows, columns = self._where
        keys, values = self._kv[layer_idx]
        keys[rows, :, columns] = key[:, :, 0]
        values[rows, :, columns] = value[:, :, 0]
        return keys, values


class BatchDecoder:
    """Decodes prompts together; the same tokens as one by one."""

    def __init__(
        self,
        qwen: QwenVL,
        prefill_chunk: int | None = None,
        keep_bytes: int = 4 << 30,
        capture: bool = True,
    ) -> None:
        """Make a decoder.

        Args:
            qwen: the checkpoint.
            prefill_chunk: most positions of one pass of a prefill; None for all at once.
            keep_bytes: most bytes of keys and values that are kept between batches.
            capture: whether steps are captured where that can be done.
        """
        self._qwen, self._chunk, self._keep_bytes = qwen, prefill_chunk, keep_bytes
        self.capture, self.captures = capture, Captures(capture and qwen.device.type == "cuda")
        self._kept: list[BatchMemory] = []
        self._lock = threading.Lock()

    def notes(self) -> list[str]:
        """What is worth knowing of how batches run; nothing if all is well."""
        failure = self.captures.failure
        return [f"Batches are decoded without CUDA graphs: {failure}"] if failure else []

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Prefix | None], sampling: Sampling
    ) -> list[list[int]]:
        """Token ids of every prompt, each until a stop token (not included) or `max_new_tokens`.

        Args:
            prompts: of any lengths.
            prefixes: for each, its beginning where it was computed before.
            sampling: how tokens are chosen, by a generator of its own for each.

        Raises:
            DecodeError: a prompt is longer than the checkpoint's context, or memory is too small.
        """
        for prompt in prompts:
            prefilling.check_length(self._qwen, prompt)
        if not prompts:
            return []
        longest = max(p.embeds.shape[1] for p in prompts)
        room = min(sampling.max_new_tokens, _FIRST_ROOM)
        memory = self._take(len(prompts), capacity_for(longest + room))
        for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
            self._prefill(memory, row, prompt, prefix)
        made, memory = self._decode(memory, sampling, longest)
        if memory.kv.nbytes <= self._keep_bytes:
            with self._lock:
                self._kept = [memory]
        return made

    def _take(self, rows: int, capacity: int) -> BatchMemory:
        """The memory of the last batch if it has this shape and nobody has it, else another."""
        with self._lock:
            kept, self._kept = self._kept, []
        if kept and len(kept[0].tokens) == rows and kept[0].capacity == capacity:
            kept[0].lend()
            return kept[0]
        kept.clear()  # before more is asked for
        return BatchMemory(self._qwen, rows, capacity, self.captures)

    def _prefill(self, memory: BatchMemory, row: int, prompt: Prompt, prefix: Prefix | None) -> None:
        done, length = 0, prompt.embeds.shape[1]
        block = memory.kv[:, :, row]
        if prefix is not None:
            prefix.complete(self._qwen)
            prefix.load_into(block)
            done = prefix.length
        cache = KvCache.holding(block, done)
        memory.logits[row] = prefilling.run(self._qwen, cache, prompt, done, self._chunk)
        memory.lengths[row] = length
        memory.positions[row] = prompt.next_position

    def _decode(
        self, memory: BatchMemory, sampling: Sampling, longest: int
    ) -> tuple[list[list[int]], BatchMemory]:
        """The answers, and the memory that they ended in; `longest` is the longest prompt."""
        made: list[list[int]] = [[] for _ in memory.tokens]
        generators = [new_generator(memory.logits.device, sampling) for _ in made]
        going = set(range(len(made)))
        for step in count():
            chosen = self._choose(memory, sampling, generators)
            for row in sorted(going):
                if chosen[row] in self._qwen.stop_ids:
                    going.discard(row)
                    continue
                made[row].append(chosen[row])
                if len(made[row]) == sampling.max_new_tokens:
                    going.discard(row)
            if not going:
                break
            if longest + step + 1 >= memory.capacity:
                memory = self._grown(memory)
            memory.tokens.copy_(torch.tensor(chosen))
            run_captured(memory, "step", partial(self._step, memory))
        return made, memory

    def _grown(self, memory: BatchMemory) -> BatchMemory:
        """Memory of twice the capacity that goes on where this one stands."""
        larger = BatchMemory(self._qwen, len(memory.tokens), 2 * memory.capacity, self.captures)
        larger.take_over(memory)
        return larger

    def _choose(
        self, memory: BatchMemory, sampling: Sampling, generators: Sequence[torch.Generator | None]
    ) -> list[int]:
        if all(generator is None for generator in generators):
            return [int(token) for token in memory.logits.argmax(-1).tolist()]
        rows = zip(memory.logits, generators, strict=True)
        return [choose(logits, sampling, generator) for logits, generator in rows]

    def _step(self, memory: BatchMemory) -> None:
        """Run the newest tokens through the model, and move every row one position on.

        A row that has ended goes on, unseen.
        """
        columns = torch.arange(memory.capacity, device=memory.kv.device)
        mask = (columns[None] <= memory.lengths[:, None])[:, None, None]
        embeds = self._qwen.embed_tensor(memory.tokens)[:, None]
        hidden = self._qwen.run_layers(
            embeds,
            memory.positions[:, None].expand(3, -1, 1),
            _RowsKv(memory),
            range(self._qwen.n_layers),
            mask=mask,
        )
        memory.logits.copy_(self._qwen.logits(hidden)[:, 0])
        memory.lengths.add_(1).clamp_(max=memory.capacity - 1)
        memory.positions.add_(1)
