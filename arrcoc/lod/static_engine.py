"""What engines built ahead of time share: buckets, geometry, the halo's crop; how they run is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from arrcoc.lod.bucketed import BucketedEngine, padded
from arrcoc.lod.tower import Geometry, geometry
from arrcoc.records import Features
from arrcoc.vision import VisionWeights, patchify

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}
"""Precision of a build's weights and inputs by name; an fp8 plan rounds them further itself."""


class Runner(Protocol):
    """Runs a graph of the static tower."""

    def __call__(self, patches: Tensor, shape: Geometry) -> Features:
        """Encode patches [B, N, P] in the build's precision; the features are the caller's own."""
        ...


class StaticLodEngine(BucketedEngine):
    """Encodes tiles of one side with a graph that was built ahead of time; see `LodEngine`."""

    def __init__(
        self,
        runner: Runner,
        weights: VisionWeights,
        side: int,
        halo: int,
        buckets: Sequence[int],
        precision: str,
        dtype: torch.dtype,
        backend: str,
        fingerprint: str,
    ) -> None:
        """Make an engine.

        Args:
            runner: what runs the graph.
            weights: of the checkpoint; only normalisation and positions are taken from them.
            side: tokens along a tile's edge.
            halo: tokens of margin.
            buckets: ascending batch sizes that the graph takes.
            precision: of the graph, `fp32`, `fp16` or `bf16`.
            dtype: of the features that are returned, the checkpoint's.
            backend: see `LodEngine`.
            fingerprint: see `LodEngine`.
        """
        super().__init__(side, halo, buckets)
        self.backend, self.fingerprint = backend, fingerprint
        self._runner, self._weights = runner, weights
        self._precision, self._dtype = DTYPES[precision], dtype
        made = geometry(weights, side + 2 * halo, side + 2 * halo)
        self._geometry = Geometry(made.positions.to(self._precision).contiguous(), made.cos, made.sin)

    def _encode_bucket(self, pixels: Tensor, size: int) -> Features:
        patches = patchify(padded(pixels, size), self._weights, self._precision)
        features = self._cropped(self._runner(patches.contiguous(), self._geometry), len(pixels))
        return Features(features.tokens.to(self._dtype), features.deepstack.to(self._dtype))


def capped(buckets: Sequence[int], most: int) -> tuple[int, ...]:
    """The buckets up to a build's largest batch, and that batch itself where larger ones were cut off."""
    kept = tuple(bucket for bucket in buckets if bucket <= most)
    return kept if len(kept) == len(buckets) else tuple(dict.fromkeys((*kept, most)))
