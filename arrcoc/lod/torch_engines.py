"""Torch LOD engines of one checkpoint: which kind serves here, and what all sides share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from arrcoc import triton_support
from arrcoc.errors import EngineBuildError, first_line
from arrcoc.lod.protocol import LodEngine
from arrcoc.lod.torch_engine import TorchLodEngine, engine_fingerprint
from arrcoc.qwen import QwenVL

if TYPE_CHECKING:
    from arrcoc.lod.fused_tower import FusedTower
    from arrcoc.lod.graphed import GraphedLodEngine, Workspace

logger = logging.getLogger(__name__)

_FLOAT8_CAPABILITY = (8, 9)
"""The first CUDA compute capability whose tensor cores take float8."""


class TorchEngines:
    """Makes the torch engine of any side: fused and captured where that can be had, else eager."""

    def __init__(
        self,
        qwen: QwenVL,
        kind: Literal["auto", "eager", "graphed"] = "auto",
        precision: Literal["auto", "float8"] = "auto",
        error_limit: float = 0.05,
        streams: Literal["auto", "one", "each"] = "auto",
    ) -> None:
        """Choose the kind, and arrange the weights for it.

        Args:
            qwen: the checkpoint.
            kind: auto takes graphed engines where they can run.
            precision: auto is the checkpoint's; float8 is of graphed engines alone.
            error_limit: largest relative error of float8 encodings against the checkpoint's precision.
            streams: see `lod_streams` in the configuration.

        Raises:
            EngineBuildError: what was asked for cannot run here, or float8 is too far off.
        """
        self._qwen, self._asked, self.reason = qwen, kind == "graphed" or precision == "float8", ""
        self._shared: tuple[FusedTower, Workspace] | None = None
        self._streams = streams
        self._name = f"torch fused {str(qwen.dtype).removeprefix('torch.')}"
        if kind == "eager" and precision == "float8":
            given = "lod_precision='float8' with lod_engine='eager'"
            raise EngineBuildError(given, "lod_engine 'auto' or 'graphed'", "Leave lod_engine out")
        obstacle = "" if kind == "eager" else _obstacle(qwen, precision)
        if obstacle:
            self._do_without(obstacle)
        elif kind != "eager":
            self._shared = self._arranged(precision, error_limit)

    def engine(self, side: int, buckets: Sequence[int], halo: int) -> LodEngine:
        """The engine of a side; see `TorchLodEngine` for the arguments.

        A graphed engine is tried on one tile, which compiles its kernels unless they lie in Triton's cache.

        Raises:
            EngineBuildError: graphed engines were asked for by name, and their kernels cannot run here.
        """
        if self._shared is not None:
            made = self._graphed(*self._shared, side, buckets, halo)
            edge = (side + 2 * halo) * self._qwen.vision.token_px
            try:
                made.encode(torch.zeros(1, 3, edge, edge, dtype=torch.uint8, device=self._qwen.device))
                return made
            except Exception as error:  # whatever a kernel's compiler, its driver or CUDA raises
                self._shared = None
                self._do_without(f"{type(error).__name__}: {first_line(error)}")
        return TorchLodEngine(self._qwen, side, buckets, halo, self.reason)

    def _graphed(
        self, tower: FusedTower, workspace: Workspace, side: int, buckets: Sequence[int], halo: int
    ) -> GraphedLodEngine:
        from arrcoc.lod.attention import fastest_blocks
        from arrcoc.lod.graphed import ALONE_PATCHES, MOST_PATCHES, GraphedLodEngine

        vision = self._qwen.vision
        alone = {"one": 0, "auto": ALONE_PATCHES, "each": MOST_PATCHES}[self._streams]
        blocks = fastest_blocks(((side + 2 * halo) * vision.merge) ** 2, vision.head_dim)
        identity = engine_fingerprint(self._qwen, side, halo, f"{self._name} {blocks}")
        return GraphedLodEngine(tower, workspace, side, halo, buckets, blocks, self._name, identity, alone)

    def _arranged(self, precision: str, error_limit: float) -> tuple[FusedTower, Workspace]:
        from arrcoc.lod import float8
        from arrcoc.lod.fused_tower import FusedTower
        from arrcoc.lod.graphed import Workspace

        tower = FusedTower(self._qwen.vision)
        if precision == "float8":
            vision, tiles = self._qwen.vision, float8.sample_tiles(self._qwen)
            peaks = float8.input_peaks(vision, tiles)
            fine, tower = tower, FusedTower(vision, float8.converter(peaks=peaks))
            float8.check_error(tower, fine, tiles, error_limit)
            self._name = "torch fused float8"
        return tower, Workspace(self._qwen.device)

    def _do_without(self, reason: str) -> None:
        """Go on with eager engines, or refuse where others were asked for by name."""
        if self._asked:
            raise EngineBuildError(
                f"graphed LOD engines here ({reason})",
                "a CUDA device, Triton, and bfloat16 or float16",
                "Choose lod_engine='auto' and lod_precision='auto'",
            )
        self.reason = reason if self._qwen.device.type == "cuda" else ""
        if self.reason:
            logger.warning("LOD engines run eagerly: %s", reason)


def _obstacle(qwen: QwenVL, precision: str) -> str:
    """Why fused kernels cannot run this checkpoint here, or nothing."""
    if qwen.device.type != "cuda":
        return f"device {qwen.device.type}"
    if qwen.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {str(qwen.dtype).removeprefix('torch.')}"
    if reason := triton_support.why_not():
        return reason
    if precision == "float8" and torch.cuda.get_device_capability(qwen.device) < _FLOAT8_CAPABILITY:
        return "float8 needs compute capability 8.9 or above"
    return ""
