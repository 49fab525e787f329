"""Keys and values of one sequence, growing in place, cut back at will, with a length of its own per layer.

transformers' caches hold every layer to one length and some keep state on the model; the glimpse is run
through the first layers only, then branched for two prompts and continued for the answer, so arrcoc keeps
its own. Attention layers need nothing of a cache but `update`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class KvCache:
    """Keys and values [1, kv_heads, length, head_dim] per layer; not shared between requests."""

    def __init__(self, n_layers: int, capacity: int) -> None:
        """Args: n_layers of the decoder; capacity in positions to reserve at first use of a layer."""
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self._lengths = [0] * n_layers
        self._capacity = capacity

    def length(self, layer: int) -> int:
        """Positions held by one layer."""
        return self._lengths[layer]

    def keys(self, layer: int) -> Tensor:
        """Rotated keys [1, kv_heads, length, head_dim] of one layer (a view)."""
        buffers = self._buffers[layer]
        assert buffers is not None, f"layer {layer} has no keys yet"
        return buffers[0][:, :, : self._lengths[layer]]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, m, head_dim] and return all keys and values of the layer (views).

        The signature is the one that transformers' attention calls.
        """
        start = self._lengths[layer_idx]
        stop = start + key.shape[2]
        keys, values = self._reserve(layer_idx, stop, key, value)
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        self._lengths[layer_idx] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; layers that hold fewer keep what they have."""
        self._lengths = [min(length, held) for held in self._lengths]

    def tensors(self) -> list[Tensor]:
        """All buffers, keys and values of every layer in use."""
        return [tensor for pair in self._buffers if pair is not None for tensor in pair]

    @property
    def nbytes(self) -> int:
        """Bytes reserved on the device."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def _reserve(self, layer: int, stop: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        buffers = self._buffers[layer]
        if buffers is not None and buffers[0].shape[2] >= stop:
            return buffers
        size = max(stop, self._capacity if buffers is None else 2 * buffers[0].shape[2])
        grown = tuple(
            _grow(t, None if buffers is None else buffers[i], size) for i, t in enumerate((key, value))
        )
        self._buffers[layer] = grown[0], grown[1]
        return grown[0], grown[1]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt's head and glimpse, run through the decoder's first layers.

    Attributes:
        head: token ids before the glimpse.
        cache: keys and values of layers below `depth`, `length` positions each.
        hidden: [1, length, D], input of layer `depth`.
        positions: fp32 [3, length].
        deepstack: [L, m, D], the glimpse's planes.
        depth: layers run so far.
        norms: for each probed layer, norm of its input at the glimpse tokens, fp32 [m].
        next_position: position of the text after the image.
    """

    head: tuple[int, ...]
    cache: KvCache
    hidden: Tensor
    positions: Tensor
    deepstack: Tensor
    depth: int
    norms: dict[int, Tensor]
    next_position: float

    @property
    def length(self) -> int:
        """Positions held."""
        return int(self.hidden.shape[1])

    @property
    def image(self) -> slice:
        """Columns of the glimpse tokens."""
        return slice(len(self.head), self.length)

    @property
    def vision(self) -> Tensor:
        """Columns of the glimpse tokens, int64 [m]."""
        return torch.arange(self.image.start, self.image.stop, device=self.hidden.device)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, for `record_stream`."""
        return [self.hidden, self.positions, self.deepstack, *self.norms.values(), *self.cache.tensors()]


def _grow(like: Tensor, old: Tensor | None, size: int) -> Tensor:
    batch, heads, _, width = like.shape
    grown = like.new_empty(batch, heads, size, width)
    if old is not None:
        grown[:, :, : old.shape[2]] = old
    return grown
