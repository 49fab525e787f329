"""The torch backend: the stock tower's weights at one static shape, eager."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.qwen import QwenVL
from arrcoc.records import Features
from arrcoc.vision import patchify


class TorchLodEngine:
    """Encodes tiles of one side with torch; see `LodEngine`."""

    def __init__(self, qwen: QwenVL, side: int, buckets: Sequence[int], halo: int = 0) -> None:
        """Args: the checkpoint, tokens along a tile's edge, ascending batch sizes, tokens of margin."""
        self.side, self.halo = side, halo
        self.backend = f"torch eager {str(qwen.dtype).removeprefix('torch.')}"
        self._weights, self._dtype = qwen.vision, qwen.dtype
        self._tower = StaticTower(qwen.vision)
        self._geometry = geometry(qwen.vision, side + 2 * halo, side + 2 * halo)
        self._buckets = tuple(buckets)
        identity = f"{qwen.fingerprint} side={side} halo={halo} {self.backend} {qwen.device.type}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Features:
        """See `LodEngine.encode`."""
        parts = [
            self._encode_bucket(pixels[start:stop], size)
            for start, stop, size in batches(len(pixels), self._buckets)
        ]
        if len(parts) == 1:
            return parts[0]
        return Features(torch.cat([p.tokens for p in parts]), torch.cat([p.deepstack for p in parts], dim=1))

    def _encode_bucket(self, pixels: Tensor, size: int) -> Features:
        count = len(pixels)
        padded = (
            torch.cat((pixels, pixels.new_zeros(size - count, *pixels.shape[1:]))) if size > count else pixels
        )
        features = self._tower.encode(patchify(padded, self._weights, self._dtype), self._geometry)
        tokens, planes = features.tokens[:count], features.deepstack[:, :count]
        return Features(inner(tokens, self.side, self.halo), inner(planes, self.side, self.halo))


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
