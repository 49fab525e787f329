"""What every LOD engine does around its graph: batches are cut into buckets, padded, and margins dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from arrcoc.records import Features


class BucketedEngine(ABC):
    """An engine that runs at a few batch sizes only; see `LodEngine`."""

    def __init__(self, side: int, halo: int, buckets: Sequence[int]) -> None:
        """Args: tokens along a tile's edge, tokens of margin, ascending batch sizes."""
        self.side, self.halo, self.buckets = side, halo, tuple(buckets)

    @property
    def apart(self) -> int:
        """See `LodEngine.apart`."""
        return 0

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Features:
        """See `LodEngine.encode`."""
        return self._encode_at(pixels, self.buckets)

    def encode_ahead(self, pixels: Tensor) -> Features:
        """See `LodEngine.encode_ahead`."""
        return self.encode(pixels)

    def _encode_at(self, pixels: Tensor, buckets: Sequence[int]) -> Features:
        cuts = batches(len(pixels), buckets)
        parts = [self._encode_bucket(pixels[start:stop], size) for start, stop, size in cuts]
        if len(parts) == 1:
            return parts[0]
        return Features(torch.cat([p.tokens for p in parts]), torch.cat([p.deepstack for p in parts], dim=1))

    @abstractmethod
    def _encode_bucket(self, pixels: Tensor, size: int) -> Features:
        """Encode at most `size` tiles at batch size `size`; the features are the caller's own."""

    def _cropped(self, features: Features, count: int) -> Features:
        """The first `count` tiles without their margins."""
        tokens, planes = features.tokens[:count], features.deepstack[:, :count]
        return Features(inner(tokens, self.side, self.halo), inner(planes, self.side, self.halo))


def padded(pixels: Tensor, size: int) -> Tensor:
    """Tiles [k, ...], k <= size, as [size, ...]: black ones follow."""
    missing = size - len(pixels)
    return torch.cat((pixels, pixels.new_zeros(missing, *pixels.shape[1:]))) if missing else pixels


def inner(tokens: Tensor, side: int, halo: int) -> Tensor:
    """Drop the margin of squares of tokens: [..., (side + 2*halo)**2, D] to [..., side**2, D]."""
    if halo == 0:
        return tokens
    edge = side + 2 * halo
    square = tokens.view(*tokens.shape[:-2], edge, edge, tokens.shape[-1])
    return square[..., halo : halo + side, halo : halo + side, :].flatten(-3, -2)


def batches(count: int, buckets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut `count` items into (start, stop, bucket).

    Padding costs arithmetic and a further batch costs launches: the smallest bucket that holds what is left
    is taken if at least three quarters of it are used, else the largest one that can be filled.
    """
    start = 0
    while start < count:
        left = count - start
        fitting = next((bucket for bucket in buckets if bucket >= left), buckets[-1])
        filled = max((bucket for bucket in buckets if bucket <= left), default=fitting)
        size = fitting if 4 * left >= 3 * fitting else filled
        stop = start + min(left, size)
        yield start, stop, size
        start = stop
