"""What every LOD engine offers, whatever runs it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from arrcoc.records import Features


class LodEngine(Protocol):
    """Encodes square tiles of one side."""

    @property
    def side(self) -> int:
        """Tokens along a tile's edge."""
        ...

    @property
    def halo(self) -> int:
        """Tokens of margin around the tile that are encoded with it and dropped afterwards."""
        ...

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes that it runs at, ascending; others are cut and padded to these."""
        ...

    @property
    def backend(self) -> str:
        """Backend and precision, for people, for example `torch eager float32`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the features depend on besides the pixels; part of every cache key."""
        ...

    @property
    def apart(self) -> int:
        """Most tiles of a call that shares no memory with other engines, and so may run beside theirs."""
        ...

    def encode(self, pixels: Tensor) -> Features:
        """Encode tiles, in batches of the engine's buckets.

        Args:
            pixels: uint8 [K, 3, e, e], e = (side + 2 * halo) * token_px, K >= 1, on the engine's device.

        Returns:
            tokens [K, side**2, D] and DeepStack planes [L, K, side**2, D], owned by the caller.
        """
        ...

    def encode_ahead(self, pixels: Tensor) -> Features:
        """`encode` on a thread of its own while anything may go on elsewhere: no CUDA graph is captured."""
        ...
