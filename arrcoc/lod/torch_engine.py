"""The eager torch backend: the stock tower's weights at one static shape."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from arrcoc.lod.bucketed import BucketedEngine
from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.qwen import QwenVL
from arrcoc.records import Features
from arrcoc.vision import patchify

_CPU_PATCHES = 2304
"""Most patches of one batch on the CPU: what layers of a larger one hand on does not stay in its caches."""


class TorchLodEngine(BucketedEngine):
    """Encodes tiles of one side with torch; see `LodEngine`."""

    def __init__(
        self, qwen: QwenVL, side: int, buckets: Sequence[int], halo: int = 0, reason: str = ""
    ) -> None:
        """Make an engine.

        Args:
            qwen: the checkpoint.
            side: tokens along a tile's edge.
            buckets: ascending batch sizes; a batch is cut by them but not padded, for nothing is compiled.
            halo: tokens of margin.
            reason: why it stands in for a faster engine, for `backend`.
        """
        if qwen.device.type == "cpu":
            patches = ((side + 2 * halo) * qwen.vision.merge) ** 2
            buckets = [b for b in buckets if b * patches <= _CPU_PATCHES] or buckets[:1]
        super().__init__(side, halo, buckets)
        name = f"torch eager {str(qwen.dtype).removeprefix('torch.')}"
        self.backend = f"{name} ({reason})" if reason else name
        self.fingerprint = engine_fingerprint(qwen, side, halo, name)
        self._weights, self._dtype = qwen.vision, qwen.dtype
        self._tower = StaticTower(qwen.vision)
        self._geometry = geometry(qwen.vision, side + 2 * halo, side + 2 * halo)

    def _encode_bucket(self, pixels: Tensor, size: int) -> Features:
        patches = patchify(pixels, self._weights, self._dtype)
        return self._cropped(self._tower.encode(patches, self._geometry), len(pixels))


def engine_fingerprint(qwen: QwenVL, side: int, halo: int, how: str) -> str:
    """Hex digest of the weights, the shape, what computes (`how`) and the kind of device."""
    identity = f"{qwen.fingerprint} side={side} halo={halo} {how} {qwen.device.type}"
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
