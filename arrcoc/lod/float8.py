"""Float8 (e4m3) linear layers for the fused tower: quantised by torchao, one scale for each output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arrcoc.errors import EngineBuildError
from arrcoc.lod.fused_tower import FusedTower
from arrcoc.lod.fused_weights import AnyDense, Convert, Dense, Float8Dense
from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.qwen import QwenVL
from arrcoc.records import Features
from arrcoc.vision import VisionWeights, patchify

LAYERS = ("qkv", "proj", "fc1", "fc2", "merger")
"""Kinds of linear layers that can be quantised."""
_SAMPLE_SIDE = 4  # tokens along the edge of a sample tile
_LARGEST = 448.0  # of e4m3
_HEADROOM = 4.0  # inputs may be this much larger than those seen; it costs only the smallest ones precision


def converter(
    layers: Sequence[str] = LAYERS, peaks: Mapping[tuple[str, int], float] | None = None
) -> Convert:
    """What replaces the named kinds of layers.

    Args:
        layers: some of `LAYERS`.
        peaks: by kind and number of the block, the largest magnitude that a layer's inputs were seen to have
            (`input_peaks`); these layers take inputs of one scale, all others find one for each row.

    Raises:
        EngineBuildError: torchao is not installed.
    """

    def convert(kind: str, number: int, layer: Dense) -> AnyDense:
        if kind not in layers:
            return layer
        peak = (peaks or {}).get((kind, number))
        return quantized(layer, None if peak is None else _HEADROOM * max(peak, 1e-6) / _LARGEST)

    return convert


@torch.inference_mode()
def input_peaks(weights: VisionWeights, tiles: Tensor) -> dict[tuple[str, int], float]:
    """The largest magnitude of the inputs of every block's `proj` and `fc2`, on tiles uint8 [K, 3, e, e].

    Those come out of a kernel that would otherwise have to see whole rows before it could scale them.
    """
    peaks: dict[tuple[str, int], Tensor] = {}

    def watch(key: tuple[str, int], module: Any) -> Any:
        def note(_: Any, inputs: tuple[Tensor]) -> None:
            peaks[key] = inputs[0].abs().amax().float()

        return module.register_forward_pre_hook(note)

    handles = []
    for number, block in enumerate(weights.blocks):
        handles.append(watch(("proj", number), block.proj))
        handles.append(watch(("fc2", number), block.mlp.linear_fc2))
    side = tiles.shape[-1] // weights.token_px
    try:
        patches = patchify(tiles, weights, weights.patch_bias.dtype)
        StaticTower(weights).encode(patches, geometry(weights, side, side))
    finally:
        for handle in handles:
            handle.remove()
    return {key: float(peak) for key, peak in peaks.items()}


def quantized(layer: Dense, step: float | None = None) -> Float8Dense:
    """A layer with its weight in e4m3; in- and outputs must be multiples of 16.

    Args:
        layer: in another precision.
        step: the one scale of its inputs; None for one a row.

    Raises:
        EngineBuildError: torchao is not installed, or the layer's size cannot be had in float8.
    """
    if any(size % 16 for size in layer.weight.shape):
        given = f"a linear layer of {tuple(layer.weight.shape)} in float8"
        raise EngineBuildError(
            given, "in- and outputs that are multiples of 16", "Choose lod_precision='auto'"
        )
    try:
        from torchao.quantization import Float8Tensor, PerRow
    except ImportError:
        given = "precision float8 without torchao"
        remedy = "Run pip install 'arrcoc[quantized]', or choose lod_precision='auto'"
        raise EngineBuildError(given, "torchao installed", remedy) from None
    made = Float8Tensor.from_hp(layer.weight, granularity=PerRow())
    scale = made.scale.view(1, -1).float() * (1.0 if step is None else step)
    return Float8Dense(made.qdata, scale.contiguous(), layer.bias, step)


def relative_error(have: Features, want: Features) -> float:
    """The largest relative error, of the tokens or of a DeepStack plane: norm of difference over norm."""
    pairs = [(have.tokens, want.tokens), *zip(have.deepstack, want.deepstack, strict=True)]
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


@torch.inference_mode()
def check_error(tower: FusedTower, reference: FusedTower, tiles: Tensor, limit: float) -> float:
    """The relative error of a tower's encodings against another's, if it keeps within a limit.

    Args:
        tower: in float8.
        reference: of the same weights, in the checkpoint's precision.
        tiles: uint8 [K, 3, e, e].
        limit: the largest error allowed.

    Raises:
        EngineBuildError: it is larger, or not a number.
    """
    side = tiles.shape[-1] // tower.weights.token_px
    have, want = (t.forward(tiles, t.geometry(side, side), None) for t in (tower, reference))
    error = relative_error(have, want)
    if error <= limit:
        return error
    given = f"float8 encodings with a relative error of {error:.4f} against {str(want.tokens.dtype)[6:]}"
    remedy = "Choose lod_precision='auto', or raise lod_error_limit"
    raise EngineBuildError(given, f"at most {limit:g} (lod_error_limit)", remedy)


def sample_tiles(qwen: QwenVL) -> Tensor:
    """Tiles of a real photograph, uint8 [K, 3, e, e]: the astronaut of scikit-image (NASA, public domain)."""
    import skimage.data

    edge = _SAMPLE_SIDE * qwen.vision.token_px
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    tiles = photo.unfold(1, edge, edge).unfold(2, edge, edge).permute(1, 2, 0, 3, 4)
    return tiles.reshape(-1, 3, edge, edge).contiguous().to(qwen.device)
