"""Beginnings of prompts that do not depend on the question, computed once and shared.

A prompt in layout `refine` or `crops` begins with text and the overview of the image; the first token that
depends on the question comes after them. So keys and values of that beginning serve the relevance scorer,
every question and every session on the same image. A `Prefix` is never written after it was made: a request
takes a copy of its keys and values (`fork`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from arrcoc.kv import KvCache
from arrcoc.prefix_run import rows, run_rest, run_rows
from arrcoc.records import Features
from arrcoc.transfer import to_device

if TYPE_CHECKING:
    from arrcoc.qwen import QwenVL

Rest = Callable[[Tensor], Tensor | None]
"""Runs the remaining layers over hidden rows as `run_rest` does; None where the prefix is to do it."""

_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = torch.finfo(_FLOAT8).max


class Probe(NamedTuple):
    """What the glimpse scorer keeps of an image, whatever is asked.

    Attributes:
        excluded: for each probed layer, which glimpse tokens are attention sinks, bool [m].
        generic: attention of the generic prompt's rows to the glimpse tokens, fp32 [m].
    """

    excluded: dict[int, Tensor]
    generic: Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """Keys and values of consecutive layers.

    Attributes:
        first: the first layer.
        block: [layers, 2, kv_heads, length, head_dim].
        scale: fp32 [layers, 2, kv_heads, 1, 1] that a block in float8 is multiplied by.
        ready: on CUDA, the end of the work that made it.
    """

    first: int
    block: Tensor
    scale: Tensor | None
    ready: torch.cuda.Event | None

    def read(self, layers: int) -> tuple[Tensor, Tensor | None]:
        """Block and scale of the first `layers` of its layers, for use on the current stream."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.block.device)
            stream.wait_event(self.ready)
            self.block.record_stream(stream)
            if self.scale is not None:
                self.scale.record_stream(stream)
        return self.block[:layers], None if self.scale is None else self.scale[:layers]

    @property
    def stop(self) -> int:
        """One past the last layer."""
        return self.first + self.block.shape[0]


class Prefix:
    """A prompt's head and overview, run through the decoder's first layers, or all of them.

    Attributes:
        head: token ids before the overview.
        positions: fp32 [3, length].
        next_position: position of the text after the image.
        length: positions held.
        nbytes: bytes on the device once all layers have run.
    """

    def __init__(
        self,
        head: Sequence[int],
        features: Features,
        positions: Tensor,
        next_position: float,
        hidden: Tensor,
        cache: KvCache,
        depth: int,
        n_layers: int,
        float8: bool = False,
        probe: Probe | None = None,
        rest: Rest | None = None,
    ) -> None:
        """Take over the beginning of a prompt that ran through the first layers.

        Args:
            head: token ids before the overview.
            features: the overview: K = 1, m tokens.
            positions: fp32 [3, length].
            next_position: position of the text after the image.
            hidden: [1, length, D], input of layer `depth`.
            cache: keys and values of the layers below `depth`, at least `length` positions.
            depth: layers run so far.
            n_layers: layers of the decoder.
            float8: whether keys and values are kept in float8 e4m3, with a scale for each head of each layer.
            probe: what the glimpse scorer keeps, if it has looked.
            rest: a faster way to run the remaining layers, if there is one.
        """
        self.head, self._features, self.positions = tuple(head), features, positions
        self.next_position, self._probe = next_position, probe
        self.length = int(positions.shape[1])
        self._hidden: Tensor | None = hidden
        self._rest = rest
        self._dtype, self._float8, self._n_layers = hidden.dtype, float8, n_layers
        self._lock = threading.Lock()
        self._parts = [self._part(0, cache.block(self.length))]
        kv = self._parts[0].block.untyped_storage().nbytes() * n_layers // max(depth, 1)
        self.nbytes = kv + hidden.nbytes + features.tokens.nbytes + features.deepstack.nbytes

    @property
    def features(self) -> Features:
        """The overview, for use on the current stream: K = 1, m tokens."""
        self._arrive(self._features.tokens, self._features.deepstack)
        return self._features

    @property
    def probe(self) -> Probe | None:
        """What the glimpse scorer keeps, for use on the current stream; None where it has not looked."""
        if self._probe is not None:
            self._arrive(self._probe.generic, *self._probe.excluded.values())
        return self._probe

    @property
    def depth(self) -> int:
        """Layers run so far."""
        return self._parts[-1].stop

    @property
    def image(self) -> slice:
        """Columns of the overview's tokens."""
        return slice(len(self.head), self.length)

    @property
    def n_vision(self) -> int:
        """Tokens of the overview."""
        return self.length - len(self.head)

    def complete(self, qwen: QwenVL) -> None:
        """Run the layers that have not run yet; threads that come meanwhile wait for it."""
        with self._lock:
            if self._hidden is None:
                return
            hidden, depth = self._hidden, self.depth
            if depth < self._n_layers:
                self._arrive(hidden, self.positions)
                planes = self.features.deepstack[:, 0]
                with torch.inference_mode():
                    block = None if self._rest is None else self._rest(hidden)
                    if block is None:
                        block = run_rest(qwen, hidden, planes, self.positions, self.image.start, depth)
                    self._parts = [*self._parts, self._part(depth, block)]
            self._hidden = self._rest = None

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [1, kv_heads, length, head_dim] of one layer; not to be written to."""
        part = next(part for part in self._parts if part.first <= number < part.stop)
        block, scale = part.read(number - part.first + 1)
        both = block[-1] if scale is None else widened(block[-1], scale[-1], self._dtype)
        return both[0][None], both[1][None]

    def load_into(self, buffer: Tensor) -> None:
        """Copy keys and values of the first layers.

        Args:
            buffer: [layers, 2, kv_heads, capacity, head_dim], capacity at least `length`; its positions
                from `length` on are left alone.
        """
        assert buffer.shape[0] <= self.depth, f"{buffer.shape[0]} layers of {self.depth}"
        for part in self._parts:
            target = buffer[part.first : part.stop, :, :, : self.length]
            if len(target):
                block, scale = part.read(len(target))
                target.copy_(block if scale is None else widened(block, scale, self._dtype))

    def fork(self, capacity: int, layers: int | None = None) -> KvCache:
        """A cache of one's own that begins with this prefix.

        Args:
            capacity: positions to reserve, at least `length`.
            layers: how many of the first layers; None for all, which must have run.
        """
        like, count = self._parts[0].block, self._n_layers if layers is None else layers
        shape = (count, 2, like.shape[2], max(capacity, self.length), like.shape[4])
        buffer = torch.empty(shape, dtype=self._dtype, device=like.device)
        self.load_into(buffer)
        return KvCache.holding(buffer, self.length)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Mark every tensor as used by a stream other than the one that it was made on."""
        held = [self.positions, self._features.tokens, self._features.deepstack]
        held += [] if self._hidden is None else [self._hidden]
        held += [t for part in self._parts for t in (part.block, part.scale) if t is not None]
        held += [] if self._probe is None else [self._probe.generic, *self._probe.excluded.values()]
        for tensor in held:
            tensor.record_stream(stream)

    def _arrive(self, *tensors: Tensor) -> None:
        """Have the current stream wait for what made this prefix, and mark tensors as used by it."""
        ready = self._parts[0].ready
        if ready is not None:
            stream = torch.cuda.current_stream(tensors[0].device)
            stream.wait_event(ready)
            for tensor in tensors:
                tensor.record_stream(stream)

    def _part(self, first: int, block: Tensor) -> _Part:
        scale, ready = None, None
        if self._float8:
            block, scale = narrowed(block)
        if block.device.type == "cuda":
            ready = torch.cuda.current_stream(block.device).record_event()
        return _Part(first, block, scale, ready)


@torch.inference_mode()
def start(
    qwen: QwenVL,
    head: Sequence[int],
    features: Features,
    where: Tensor,
    extent: float,
    depth: int,
    float8: bool = False,
) -> Prefix:
    """Run head and overview through the decoder's first layers.

    Args:
        qwen: the checkpoint.
        head: token ids before the overview.
        features: the overview: K = 1, m tokens.
        where: fp32 [2, m], positions of its tokens in the frame.
        extent: what the image adds to the text position after it.
        depth: layers to run.
        float8: as for `Prefix`.
    """
    begin, length = len(head), len(head) + features.tokens.shape[1]
    positions = to_device(rows(where, begin, extent), features.tokens.device)
    cache = KvCache(depth, capacity=length)
    hidden = run_rows(qwen, qwen.embed(head), features, positions, begin, cache, depth)
    return Prefix(head, features, positions, begin + extent, hidden, cache, depth, qwen.n_layers, float8)


def narrowed(block: Tensor) -> tuple[Tensor, Tensor]:
    """A block of keys and values [..., length, head_dim] in float8 e4m3, and the scale [..., 1, 1] of each.

    The largest magnitude of a head becomes the largest of the format, 448. A value is off by at most 1/16 of
    itself or, below 2**-6 of that range, by a fixed 2**-10.
    """
    scale = block.float().abs().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12) / _FLOAT8_MAX
    return (block.float() / scale).clamp_(-_FLOAT8_MAX, _FLOAT8_MAX).to(_FLOAT8), scale


def widened(block: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `narrowed` made, in another precision."""
    return (block.float() * scale).to(dtype)
