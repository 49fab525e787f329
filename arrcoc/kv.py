"""Keys and values of one sequence, growing in place, cut back at will, with a length of its own per layer.

transformers' caches hold every layer to one length and some keep state on the model; the glimpse is run
through the first layers only, then branched for the question and continued for the answer, so arrcoc keeps
its own. Attention layers need nothing of a cache but `update`. All layers lie in one tensor: a beginning
that several requests share is copied into a request's cache by one kernel.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Room(NamedTuple):
    """Where the new positions of a layer go.

    Attributes:
        keys, values: [kv_heads, capacity, head_dim], the layer's whole buffers.
        past: positions before the new ones; int32 [1] where only the device knows.
    """

    keys: Tensor
    values: Tensor
    past: int | Tensor


class LayerCache(Protocol):
    """What attention layers, and whoever runs them, need of a cache."""

    def length(self, layer: int) -> int:
        """Positions held by one layer."""
        ...

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Add [1, kv_heads, m, head_dim] to a layer and return its keys and values."""
        ...


class RoomyCache(LayerCache, Protocol):
    """A cache of one sequence that kernels write into."""

    def room(self, layer: int, count: int, like: Tensor) -> Room:
        """Append `count` positions to a layer, which the caller writes; like [kv_heads, count, head_dim]."""
        ...


class KvCache:
    """Keys and values [1, kv_heads, length, head_dim] per layer; not shared between requests."""

    def __init__(self, n_layers: int, capacity: int, first: int = 0) -> None:
        """Make an empty cache for layers `first` to `n_layers` - 1.

        Args:
            n_layers: one past the last layer.
            capacity: positions to reserve for every layer at the first use of any.
            first: the first layer.
        """
        self._first = first
        self._lengths = [0] * n_layers
        self._capacity = capacity
        self._buffer: Tensor | None = None

    @classmethod
    def holding(cls, block: Tensor, length: int) -> KvCache:
        """A cache over a buffer [n_layers, 2, kv_heads, capacity, head_dim] whose first `length` are filled.

        The buffer becomes the cache's own.
        """
        made = cls(block.shape[0], block.shape[3])
        made._buffer, made._lengths = block, [length] * block.shape[0]
        return made

    def length(self, layer: int) -> int:
        """Positions held by one layer."""
        return self._lengths[layer]

    def keys(self, layer: int) -> Tensor:
        """Rotated keys [1, kv_heads, length, head_dim] of one layer (a view)."""
        return self._held(layer)[0][None]

    def values(self, layer: int) -> Tensor:
        """Values [1, kv_heads, length, head_dim] of one layer (a view)."""
        return self._held(layer)[1][None]

    def block(self, length: int) -> Tensor:
        """The first `length` positions of every layer, [layers, 2, kv_heads, length, head_dim] (a view)."""
        assert self._buffer is not None, "an empty cache"
        assert length <= min(self._lengths[self._first :]), (length, self._lengths)
        return self._buffer[:, :, :, :length]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, m, head_dim] and return all keys and values of the layer (views).

        The signature is the one that transformers' attention calls.
        """
        start = self._lengths[layer_idx]
        stop = start + key.shape[2]
        keys, values = self._reserve(stop, key)[layer_idx - self._first]
        keys[:, start:stop] = key[0]
        values[:, start:stop] = value[0]
        self._lengths[layer_idx] = stop
        return keys[None, :, :stop], values[None, :, :stop]

    def room(self, layer: int, count: int, like: Tensor) -> Room:
        """Append `count` positions to a layer, which the caller writes; like [kv_heads, count, head_dim]."""
        stop = self._lengths[layer] + count
        keys, values = self._reserve(stop, like[None])[layer - self._first]
        self._lengths[layer] = stop
        return Room(keys, values, stop - count)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; layers that hold fewer keep what they have."""
        self._lengths = [min(length, held) for held in self._lengths]

    @property
    def nbytes(self) -> int:
        """Bytes reserved on the device."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def _held(self, layer: int) -> Tensor:
        length = self._lengths[layer]
        assert self._buffer is not None, f"layer {layer} has no keys yet"
        assert length, f"layer {layer} has no keys yet"
        return self._buffer[layer - self._first, :, :, :length]

    def _reserve(self, stop: int, like: Tensor) -> Tensor:
        """The buffer [layers, 2, kv_heads, capacity, head_dim], grown if `stop` positions need it."""
        old = self._buffer
        if old is not None and old.shape[3] >= stop:
            return old
        batch, heads, _, width = like.shape
        assert batch == 1, "one sequence"
        size = max(stop, self._capacity if old is None else 2 * old.shape[3])
        self._buffer = like.new_empty(len(self._lengths) - self._first, 2, heads, size, width)
        if old is not None:
            self._buffer[:, :, :, : old.shape[3]] = old
        return self._buffer
