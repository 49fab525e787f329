"""Opponent processing: three tensions, measured from the score maps, make one relevance map of them.

The closed forms are this project's own; what each is for stands beside its formula. Everything stays on
the device: no value is read by the host and no shape depends on data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from arrcoc.config import Config
from arrcoc.errors import ConfigError
from arrcoc.records import Relevance, Scores, Tensions

_TINY = 1e-12


def balance(scores: Scores, config: Config, tensions: Tensions | None = None) -> Relevance:
    """Turn three score maps into one relevance map.

    With q the participatory map, b = (propositional + perspectival) / 2 and k = max(q) - median(q), where
    the median of an even number of tiles is the lower middle one:

    1. explore-exploit t_e sets the share of the question: w = (1 + t_e) / 2, m = w*q + (1 - w)*b.
    2. compress-particularize t_c sets the contrast about the strongest tile p = max(m), which keeps its
       value: m <- p * (m / p) ** g with g = (1 + gain) ** t_c.
    3. diversify-focus t_f acts between neighbours: m <- clip(m + lateral * t_f * (m - mean3x3(m)), 0, 1),
       where the mean takes only tiles inside the grid; positive sharpens a peak, negative spreads it.
    4. A flat q has no opinion: u = 1 - clip(k / flat_contrast, 0, 1), m <- (1 - u) * m + u / 2, so that
       k = 0 gives every tile 1/2, uniform detail.

    Args:
        scores: three fp32 maps [R, C] in [0, 1], R, C >= 1.
        config: `gain`, `lateral`, `confident_contrast` and `flat_contrast` are read.
        tensions: used in place of the measured ones (see `measure`). Floats, or 0-d tensors, which are
            clamped to [-1, 1] because checking them would wait for the device.

    Returns:
        fp32 map [R, C] in [0, 1] and the tensions as 0-d fp32 tensors on the same device.

    Raises:
        ConfigError: a tension given as a float lies outside [-1, 1].
    """
    query = scores.participatory
    assert query.ndim == 2, query.shape
    assert query.shape == scores.propositional.shape == scores.perspectival.shape
    used = measure(query, config) if tensions is None else _on_device(tensions, query)
    particularize, exploit, focus = (torch.as_tensor(tension) for tension in used)
    background = (scores.propositional + scores.perspectival) / 2
    mixed = torch.lerp(background, query, (1 + exploit) / 2)
    sharpened = _contrast_about_peak(mixed, (1 + config.gain) ** particularize)
    spread = (sharpened + config.lateral * focus * (sharpened - _mean3x3(sharpened))).clamp(0, 1)
    opinion = (_contrast(query) / config.flat_contrast).clamp(0, 1)
    return Relevance(map=torch.lerp(torch.full_like(spread, 0.5), spread, opinion), tensions=used)


def measure(query: Tensor, config: Config) -> Tensions:
    """The three tensions of a participatory map q, fp32 [R, C] in [0, 1], as 0-d tensors in [-1, 1].

    With N = R*C, excess e = relu(q - median(q)), k = max(q) - median(q):

    - explore_exploit = 2 * clip(k / confident_contrast, 0, 1) - 1: how confident q is.
    - compress_particularize = 2*c - 1 with c = (M - n) / (M - 1), n = (sum e)**2 / sum e**2 the number of
      tiles that share the excess (participation ratio, n = M where e = 0), M = max(2, floor(N / 2)) the
      most tiles that can exceed a median. One tile alone gives +1, half of the grid in equal parts -1,
      and a large map with exponentially distributed excess 0.
    - diversify_focus = 2 * clip((rho - a) / (1 - a), 0, 1) - 1 with rho the largest share of the excess
      within any 3x3 window (a where e = 0) and a the share of the grid's area that such a window covers.
      One peak gives +1, excess all over the grid -1. Taking the best window rather than that around the
      maximum makes it continuous, and indifferent to which of two equal maxima comes first. A grid of
      3x3 or less lies within one window, which tells nothing: 0.
    """
    excess = (query - query.median()).relu()
    total = excess.sum()
    return Tensions(
        compress_particularize=_concentration(excess, total),
        explore_exploit=2 * (_contrast(query) / config.confident_contrast).clamp(0, 1) - 1,
        diversify_focus=_locality(excess, total),
    )


def _contrast(query: Tensor) -> Tensor:
    """max - median, 0-d."""
    return query.amax() - query.median()


def _concentration(excess: Tensor, total: Tensor) -> Tensor:
    most = max(2, excess.numel() // 2)
    # Dividing by the peak first keeps the squares of tiny excesses from underflowing.
    share = excess / excess.amax().clamp_min(_TINY)
    sharing = share.sum().square() / share.square().sum().clamp_min(_TINY)
    sharing = torch.where(total > _TINY, sharing, torch.full_like(total, most))
    return (2 * (most - sharing) / (most - 1) - 1).clamp(-1, 1)


def _locality(excess: Tensor, total: Tensor) -> Tensor:
    rows, cols = excess.shape
    area = min(3, rows) * min(3, cols) / (rows * cols)
    if area == 1:
        return torch.zeros_like(total)
    largest = _sum3x3(excess).amax() / total.clamp_min(_TINY)
    return 2 * ((largest - area) / (1 - area)).clamp(0, 1) - 1


def _sum3x3(plane: Tensor) -> Tensor:
    """Sum over the 3x3 window around each element; outside counts as 0."""
    return functional.avg_pool2d(plane[None], 3, stride=1, padding=1)[0] * 9


def _mean3x3(plane: Tensor) -> Tensor:
    """Mean over that part of the 3x3 window around each element which lies inside."""
    return functional.avg_pool2d(plane[None], 3, stride=1, padding=1, count_include_pad=False)[0]


def _contrast_about_peak(plane: Tensor, exponent: Tensor) -> Tensor:
    peak = plane.amax().clamp_min(_TINY)
    return peak * (plane / peak).clamp(0, 1) ** exponent


def _on_device(tensions: Tensions, like: Tensor) -> Tensions:
    return Tensions(*(_tension(name, value, like) for name, value in tensions._asdict().items()))


def _tension(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=like.dtype).reshape(()).clamp(-1, 1)
    if math.isnan(value) or not -1 <= value <= 1:
        raise ConfigError(f"tension {name} = {value}", "numbers in [-1, 1]", "Correct this value")
    # Filling on the device, unlike copying a number to it, does not wait for it.
    return torch.full((), value, device=like.device, dtype=like.dtype)
