"""A head to begin from: its projection already tells questions apart by what their targets look like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from arrcoc.fitting.prepare import Sample
from arrcoc.records import Channel
from arrcoc.scorers import TextureHead

_MOST = 2000  # samples that the regression reads; its system has as many unknowns
_RIDGE = 0.02


def untrained_head(query_dim: int, width: int, seed: int) -> TextureHead:
    """A head with torch's own initial weights; leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextureHead(query_dim, width)


def regress_targets(head: TextureHead, samples: Sequence[Sample]) -> None:
    """Start the projection at a ridge regression from questions to the look of what they ask for.

    Row c of the projection becomes the regression to the mean of texture channel c over the target (weighted
    by it) less its mean over the image, in standard deviations; rows beyond the 13 channels keep their random
    weights. Without it both factors of a product have to be found at once, which takes far more steps.

    Ridge regression (Hoerl & Kennard 1970) in its dual form, with X the layer-normalised embeddings and Y
    the looks, both centred, n of them: W = Xt (X Xt + 0.02 n I)**-1 Y. Changes `head` in place.
    """
    if head.width < len(Channel):
        return
    chosen = samples[:: -(-len(samples) // _MOST)]
    x = torch.stack([sample.embedding for sample in chosen])
    x = functional.layer_norm(x, x.shape[1:]).double()
    y = torch.stack([target_look(sample) for sample in chosen]).double()
    y = (y - y.mean(0)) / y.std(0, correction=0).clamp_min(1e-6)
    centre = x.mean(0)
    centred = x - centre
    gram = centred @ centred.T + _RIDGE * len(chosen) * torch.eye(len(chosen), dtype=torch.double)
    weight = (centred.T @ torch.linalg.solve(gram, y)).T * head.width**0.5
    with torch.no_grad():
        head.project.weight[: len(Channel)] = weight.float()
        head.project.bias[: len(Channel)] = (-weight @ centre).float()


def target_look(sample: Sample) -> Tensor:
    """Mean of each texture channel over the target less that over the image: fp32 [13], 0 for no target."""
    maps = sample.load_texture().maps.float()
    weight = sample.cell_target()
    if sample.kind == "glimpse":  # 0.5 is where the question looks as anybody would
        weight = (weight - 0.5).clamp_min(0)
    total = weight.sum()
    if total <= 0:
        return torch.zeros(len(maps))
    return (maps * weight).sum((1, 2)) / total - maps.mean((1, 2))
