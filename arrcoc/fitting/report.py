"""What a fit came to on held-out images: numbers, beside maps that need no fit, and the curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from arrcoc import scorers
from arrcoc.fitting.prepare import Sample
from arrcoc.records import Query
from arrcoc.scorers import Scorer, TextureHead

RECALL_AT = (1, 2, 4, 8)
"""Numbers of tiles k at which recall is reported."""
TOP_SHARE = 0.125
"""Share of a distilled row's tiles, the highest of the glimpse's map, that count as its targets."""

Metrics = dict[str, float | None]


def judge_scorers(
    fitted: TextureHead, untrained: TextureHead, samples: Sequence[Sample]
) -> dict[str, Metrics]:
    """Metrics of the fitted head, an untrained one and both query-free maps on the same samples."""
    judges: dict[str, Scorer] = {
        "fitted head": fitted,
        "untrained head": untrained,
        "propositional": scorers.propositional,
        "perspectival": scorers.perspectival,
    }
    device = next(fitted.parameters()).device
    return {name: _metrics(judge, samples, device) for name, judge in judges.items()}


def losing_to(held_out: dict[str, Metrics]) -> list[str]:
    """Scorers whose AUC the fitted head does not exceed; none where no AUC could be taken."""
    mine = held_out["fitted head"]["auc"]
    others = {name: metrics["auc"] for name, metrics in held_out.items() if name != "fitted head"}
    return [
        name for name, value in others.items() if mine is not None and value is not None and mine <= value
    ]


def _metrics(judge: Scorer, samples: Sequence[Sample], device: torch.device) -> Metrics:
    found: dict[str, list[float]] = {}
    for sample in samples:
        scores = _score(judge, sample, device)
        found.setdefault("bce", []).append(binary_cross_entropy(scores, sample.tiles))
        wanted = target_tiles(sample)
        if 0 < wanted.sum() < wanted.numel():
            found.setdefault("auc", []).append(auc(scores, wanted))
            for k in RECALL_AT:
                found.setdefault(f"recall@{k}", []).append(recall_at(scores, wanted, k))
    names = ("bce", "auc", *(f"recall@{k}" for k in RECALL_AT))
    return {name: math.fsum(found[name]) / len(found[name]) if name in found else None for name in names}


@torch.inference_mode()
def _score(judge: Callable[..., Tensor], sample: Sample, device: torch.device) -> Tensor:
    texture = sample.load_texture()
    moved = type(texture)(texture.maps.to(device), texture.grid, texture.cells)
    query = Query(sample.row.question, (), sample.embedding.to(device))
    return judge(moved, query).float().cpu()


def target_tiles(sample: Sample) -> Tensor:
    """Which tiles a sample asks for, bool [R, C]: those with a box in them, or the highest `TOP_SHARE`."""
    if sample.kind == "boxes":
        return sample.tiles > 0
    count = max(1, round(TOP_SHARE * sample.tiles.numel()))
    wanted = torch.zeros(sample.tiles.numel(), dtype=torch.bool)
    wanted[_descending(sample.tiles)[:count]] = True
    return wanted.view_as(sample.tiles)


def binary_cross_entropy(scores: Tensor, target: Tensor) -> float:
    """Mean over tiles of -t ln p - (1 - t) ln(1 - p), in nats; p is kept within [1e-6, 1 - 1e-6]."""
    p = scores.double().clamp(1e-6, 1 - 1e-6)
    t = target.double()
    return float(-(t * p.log() + (1 - t) * (1 - p).log()).mean())


def auc(scores: Tensor, wanted: Tensor) -> float:
    """Area under the ROC curve: the chance that a wanted tile scores above another, ties counting half.

    The Mann-Whitney form (Hanley & McNeil 1982). Needs both kinds of tiles.
    """
    hits, others = scores[wanted][:, None], scores[~wanted][None, :]
    return float((hits > others).double().mean() + (hits == others).double().mean() / 2)


def recall_at(scores: Tensor, wanted: Tensor, k: int) -> float:
    """Share of the wanted tiles among the k highest; of equal scores the first in raster order counts."""
    top = _descending(scores)[:k]
    return float(wanted.flatten()[top].sum() / wanted.sum())


def _descending(scores: Tensor) -> Tensor:
    return scores.flatten().argsort(descending=True, stable=True)


def draw(curve: Sequence[Mapping[str, float]], held_out: Mapping[str, Metrics], path: Path) -> None:
    """Losses over steps, and recall over tiles, as a picture."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [point["step"] for point in curve]
    left.plot(steps, [point["train"] for point in curve], label="training (cells and tiles)")
    left.plot(steps, [point["held_out"] for point in curve], label="held out (tiles)")
    left.set(xlabel="step", ylabel="binary cross-entropy, nats", yscale="log")
    left.legend(frameon=False)
    for name, metrics in held_out.items():
        values = [metrics[f"recall@{k}"] for k in RECALL_AT]
        right.plot(RECALL_AT, [math.nan if v is None else v for v in values], marker="o", label=name)
    right.set(xlabel="tiles looked at", ylabel="recall of target tiles, held out", ylim=(0, 1.02))
    right.legend(frameon=False)
    scratch = path.with_suffix(".partial.png")
    figure.savefig(scratch, dpi=120)
    scratch.replace(path)
