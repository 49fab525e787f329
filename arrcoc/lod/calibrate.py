"""Calibrates a float8 tower on tiles, and measures what float8 costs on tiles held out from that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arrcoc.errors import EngineBuildError
from arrcoc.lod.float8_graph import quantized, with_linears
from arrcoc.lod.manifest import Accuracy
from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.vision import Block, Merger, VisionWeights, patchify

HELD_OUT = 4
"""One tile in so many is held out from calibration; the error is measured on these."""
_CHUNK_PATCHES = 4096
_SAMPLE = 1 << 20

Progress = Callable[[str, int, int], None]


class Watch(nn.Module):
    """A linear layer that notes how large its inputs are."""

    def __init__(self, linear: nn.Linear, percentile: float) -> None:
        """Args: the layer; which percentile of the inputs' magnitudes counts as their largest."""
        super().__init__()
        self.linear, self.percentile, self.largest = linear, percentile, 0.0

    def forward(self, values: Tensor) -> Tensor:
        """What the layer computes."""
        sizes = values.detach().abs().flatten()
        if self.percentile < 100:
            sample = sizes[:: max(1, len(sizes) // _SAMPLE)].float()
            rank = max(1, round(self.percentile / 100 * len(sample)))
            largest = float(sample.kthvalue(rank).values)
        else:
            largest = float(sizes.max())
        self.largest = max(self.largest, largest)
        return self.linear(values)  # type: ignore[no-any-return]


def converted(weights: VisionWeights, device: torch.device, dtype: torch.dtype) -> VisionWeights:
    """A copy of a tower's weights on another device, in another precision."""

    def moved(part: Any) -> Any:
        return part.to(device, dtype) if isinstance(part, nn.Module | Tensor) else part

    copied = copy.deepcopy(weights)
    return replace(
        copied,
        patch_weight=moved(copied.patch_weight),
        patch_bias=moved(copied.patch_bias),
        position_table=moved(copied.position_table),
        blocks=tuple(Block(*map(moved, block)) for block in copied.blocks),
        merger=Merger(*map(moved, copied.merger)),
        deepstack={number: Merger(*map(moved, merger)) for number, merger in copied.deepstack.items()},
    )


def calibrate(
    weights: VisionWeights,
    tiles: Sequence[Tensor],
    percentile: float = 100.0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Largest magnitude of every block layer's input, by layer, over the tiles that are not held out.

    Args:
        weights: the tower, in the precision to run it in.
        tiles: for each LOD, uint8 [K, 3, e, e].
        percentile: of the magnitudes in each batch that counts as the largest; 100 is the maximum.
        progress: told of LODs done.
    """
    watches: dict[str, Watch] = {}

    def watched(name: str, linear: nn.Linear) -> nn.Module:
        watches[name] = Watch(linear, percentile)
        return watches[name]

    tower = StaticTower(with_linears(weights, watched))
    for done, cut in enumerate(tiles):
        if progress is not None:
            progress("calibrating", done, len(tiles))
        places = torch.arange(len(cut))
        used = cut[places % HELD_OUT != HELD_OUT - 1] if len(cut) >= HELD_OUT else cut
        for _ in _encode(tower, used):
            pass
    return {name: watch.largest for name, watch in watches.items()}


def encoding_error(
    weights: VisionWeights, largest: Mapping[str, float], tiles: Sequence[Tensor]
) -> dict[str, float]:
    """Relative error of a float8 tower's encodings on the tiles held out, by output.

    The worst over LODs; of the DeepStack planes, the worst of them. Both towers compute in the weights'
    precision, so that the difference is float8's alone.
    """
    plain, coarse = StaticTower(weights), StaticTower(quantized(weights, largest))
    worst = {"tokens": 0.0, "deepstack": 0.0}
    for cut in tiles:
        held = cut[HELD_OUT - 1 :: HELD_OUT] if len(cut) >= HELD_OUT else cut
        expected, found = (list(_encode(tower, held)) for tower in (plain, coarse))
        for name, a, b in zip(_names(found), _parts(found), _parts(expected), strict=True):
            worst[name] = max(worst[name], _relative(a, b))
    return worst


def require_accuracy(errors: Mapping[str, float], limit: float) -> None:
    """Raise `EngineBuildError`, with the figure, where an error is above the limit."""
    for name, error in errors.items():
        if not error <= limit:
            given = f"float8 with a relative error of {error:.2%} in the {name} of tiles held out"
            remedy = "Calibrate on images more like yours, set --percentile, allow more, or build fp16"
            raise EngineBuildError(given, f"at most {limit:.2%} (--max-error)", remedy)


def require_answers(accuracy: Accuracy, limit: float) -> None:
    """Raise `EngineBuildError`, with the figures, where fp8 costs more answers than the limit."""
    if not accuracy.loss <= limit:
        asked = f"{accuracy.questions} questions of {accuracy.dataset}"
        given = f"float8 that answers {accuracy.fp8:.1%} of {asked} right, and {accuracy.plain:.1%} without"
        remedy = "Calibrate on images more like yours, set --percentile, allow more, or build fp16"
        raise EngineBuildError(given, f"at most {limit:.1%} fewer (--max-accuracy-loss)", remedy)


@torch.inference_mode()
def _encode(tower: StaticTower, tiles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Encodings of tiles, some at a time."""
    weights = tower.weights
    device, dtype = weights.patch_bias.device, weights.patch_bias.dtype
    edge = tiles.shape[-1] // weights.token_px
    shape = geometry(weights, edge, edge)
    for part in torch.split(tiles, max(1, _CHUNK_PATCHES // len(shape.positions))):
        yield tower(patchify(part.to(device), weights, dtype), *shape)


def _names(encodings: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
    """Which output each of `_parts` belongs to."""
    return ["tokens"] + ["deepstack"] * len(encodings[0][1])


def _parts(encodings: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """The tokens, and then each DeepStack plane, of all chunks."""
    planes = range(len(encodings[0][1]))
    return [[tokens for tokens, _ in encodings], *([deep[n] for _, deep in encodings] for n in planes)]


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected| over all parts, Frobenius norms in fp64; infinite for NaN."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    ratio = (error / size) ** 0.5
    return ratio if ratio == ratio else float("inf")
