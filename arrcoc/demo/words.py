"""A texture head for the untrained checkpoint: knows colour and place words, fitted in seconds on a CPU.

An untrained language model answers noise, and where it looks is noise as well. The learned participatory
scorer needs no language model, only token embeddings, so the demo fits one: on mosaics of random colours,
with questions that name colours and places. It knows no objects, and no other words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import kornia
import numpy as np
import torch
from torch import Tensor, nn

from arrcoc import texture
from arrcoc.config import Config, load
from arrcoc.image import frame
from arrcoc.qwen import QwenVL
from arrcoc.records import Query
from arrcoc.scorers import TEXTURE_HEAD_FILE, TextureHead

COLOURS = (
    "black",
    "gray",
    "white",
    "red",
    "orange",
    "yellow",
    "green",
    "teal",
    "blue",
    "purple",
    "pink",
    "brown",
)
"""Colour names, in the order of the values of `colour_names`."""

PLACES = ("left", "right", "top", "bottom", "middle")
"""Place names, in the order of the planes of `place_masks`."""

_WORDINGS = (
    "What is the {} thing?",
    "Where is the {} one?",
    "What is written on the {} part?",
    "Who wears the {} coat?",
    "What stands at the {} of the picture?",
    "How many {} lamps are there?",
    "What colour is the {} side?",
    "Describe the {} area.",
    "Which {} object is it?",
    "Can you see the {} table?",
    "Look at the {} corner.",
)
STEPS = 1500
"""Optimiser steps of a full fit: about half a minute on two cores."""

_SIZE, _SCENES, _BATCH = 384, 96, 4
_QUESTIONS = 600  # to tell words apart by


class _Scene(NamedTuple):
    maps: Tensor
    """fp16 [13, H, W] texture."""
    facts: Tensor
    """bool [len(COLOURS) + len(PLACES), H, W], which cells show which colour and lie at which place."""


def fit_words(
    qwen: QwenVL,
    folder: Path,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[float], object] = lambda _: None,
) -> Path:
    """Fit a head to a checkpoint's token embeddings and save it beside the model; returns its path.

    Args:
        qwen: the checkpoint; only its embeddings are used.
        folder: the model's folder.
        seed: of mosaics, questions and weights.
        steps: of the optimiser.
        progress: called with the share of the work done, 0 to 1.
    """
    config = load("demo")
    rng = np.random.default_rng(seed)
    scenes = [_scene(rng, config, qwen.vision.token_px) for _ in range(_SCENES)]
    progress(0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = TextureHead(qwen.width, width=32)
    _tell_words_apart(head, qwen, rng)
    _train(head, scenes, qwen, rng, steps, progress)
    head.save(folder / TEXTURE_HEAD_FILE, qwen.fingerprint, qwen.embedding_probe)
    return folder / TEXTURE_HEAD_FILE


def colour_names(lab: Tensor) -> Tensor:
    """Index into `COLOURS` of each pixel of an L*a*b* image [3, h, w] (L* in 0..100): int64 [h, w].

    Grey below a chroma of 14, then by hue angle; dark orange is brown, light red is pink.
    """
    lightness, chroma = lab[0], torch.hypot(lab[1], lab[2])
    hue = torch.rad2deg(torch.atan2(lab[2], lab[1])) % 360
    # Upper ends of the hue ranges in degrees: red, orange, yellow, green, teal, blue, purple, pink, red.
    edges = torch.tensor([42.0, 75.0, 108.0, 165.0, 225.0, 312.0, 340.0, 350.0], device=lab.device)
    named = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 3], device=lab.device)[torch.bucketize(hue, edges)]
    warm = (named == 3) | (named == 4)
    named = torch.where(warm & (lightness < 45) & (chroma < 45) & (hue < 100), 11, named)
    named = torch.where((named == 3) & (lightness > 68), 10, named)
    grey = torch.bucketize(lightness, torch.tensor([25.0, 78.0], device=lab.device))
    return torch.where(chroma < 14, grey, named)


def place_masks(rows: int, cols: int) -> Tensor:
    """Which cells lie left, right, top, bottom and in the middle: bool [5, rows, cols]."""
    y = ((torch.arange(rows) + 0.5) / rows * 2 - 1)[:, None].expand(rows, cols)
    x = ((torch.arange(cols) + 0.5) / cols * 2 - 1)[None, :].expand(rows, cols)
    return torch.stack((x < -0.3, x > 0.3, y < -0.3, y > 0.3, (x.abs() < 0.55) & (y.abs() < 0.55)))


def _scene(rng: np.random.Generator, config: Config, token_px: int) -> _Scene:
    shown = frame(_mosaic(rng), config, token_px, torch.device("cpu"))
    maps = texture.extract(shown, config)
    height, width = maps.maps.shape[1:]
    rgb = nn.functional.adaptive_avg_pool2d(shown.pixels.float() / 255, (height, width))
    names = colour_names(kornia.color.rgb_to_lab(rgb[None])[0])
    shown_as = nn.functional.one_hot(names, len(COLOURS)).permute(2, 0, 1).bool()
    return _Scene(maps.maps, torch.cat((shown_as, place_masks(*names.shape))))


def _mosaic(rng: np.random.Generator) -> Tensor:
    """uint8 [3, s, s]: cells of a Voronoi diagram in random colours, shaded and with grain."""
    count = int(rng.integers(4, 28))
    sites = rng.random((count, 2)) * _SIZE
    colours = _random_colours(rng, count)
    grid = np.stack(np.meshgrid(np.arange(_SIZE), np.arange(_SIZE), indexing="ij"), -1)[::4, ::4]
    owner = ((grid[:, :, None] - sites) ** 2).sum(-1).argmin(-1).repeat(4, 0).repeat(4, 1)
    shade = 1 + 0.25 * (
        np.linspace(-1, 1, _SIZE)[:, None] * rng.uniform(-1, 1)
        + np.linspace(-1, 1, _SIZE) * rng.uniform(-1, 1)
    )
    grain = rng.normal(0, rng.uniform(0, 14), (_SIZE, _SIZE, 1))
    pixels = colours[owner] * shade[..., None] + grain
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _random_colours(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """sRGB [count, 3], even in hue, chroma and lightness, as far as they can be shown."""
    hue, chroma = (
        rng.uniform(0, 2 * math.pi, count),
        rng.choice([0.0, 1.0], count, p=[0.3, 0.7]) * rng.uniform(10, 95, count),
    )
    lab = np.stack((rng.uniform(8, 95, count), chroma * np.cos(hue), chroma * np.sin(hue)), -1)
    rgb = kornia.color.lab_to_rgb(torch.tensor(lab.T[None, :, :, None], dtype=torch.float32))[0, :, :, 0].T
    return np.asarray(rgb.double().numpy() * 255)


def _tell_words_apart(head: TextureHead, qwen: QwenVL, rng: np.random.Generator) -> None:
    """Start the question's projection at the ridge regression from embeddings to the words they hold.

    From there the convolution learns a map for each word in a few hundred steps; from a random start both
    factors of the product have to be found at once, which takes thousands.
    """
    facts = torch.ones(len(COLOURS) + len(PLACES), 1, 1, dtype=torch.bool)
    asked = [_draw_words(rng, facts) for _ in range(_QUESTIONS)]
    embeddings = torch.stack([qwen.query(_worded(rng, words)).embedding for words in asked])
    embeddings = nn.functional.layer_norm(embeddings, embeddings.shape[1:]).double()
    held = torch.zeros(len(asked), len(facts), dtype=torch.double)
    for row, words in enumerate(asked):
        held[row, words] = 1
    centre = embeddings.mean(0)
    centred = embeddings - centre
    gram = centred.T @ centred + _QUESTIONS * 0.02 * torch.eye(len(centre), dtype=torch.double)
    weight = torch.linalg.solve(gram, centred.T @ (held - held.mean(0))).T * head.width**0.5
    with torch.no_grad():
        head.project.weight[: len(facts)] = weight.float()
        head.project.bias[: len(facts)] = (held.mean(0) * head.width**0.5 - weight @ centre).float()


def _train(
    head: TextureHead,
    scenes: list[_Scene],
    qwen: QwenVL,
    rng: np.random.Generator,
    steps: int,
    progress: Callable[[float], object],
) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        chosen = [scenes[i] for i in rng.integers(len(scenes), size=_BATCH)]
        asked = [_ask(rng, scene, qwen) for scene in chosen]
        # Judged cell by cell: the maximum over a tile would pass on the gradient of one cell in 256.
        embeddings = torch.stack([query.embedding for query, _ in asked])
        logits = head.logits(torch.stack([scene.maps for scene in chosen]), embeddings, cells=1)
        wanted = torch.stack([cells for _, cells in asked]).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(0.1 + 0.9 * (step + 1) / steps)


def _ask(rng: np.random.Generator, scene: _Scene, qwen: QwenVL) -> tuple[Query, Tensor]:
    """A question that names a colour of the scene, a place, or both, and the cells bool [H, W] it means."""
    words = _draw_words(rng, scene.facts)
    return qwen.query(_worded(rng, words)), scene.facts[words].all(0)


def _draw_words(rng: np.random.Generator, facts: Tensor) -> list[int]:
    """Indices into `COLOURS` + `PLACES`: a colour (mostly one that is there), a place, or both."""
    kind = rng.choice(["colour", "place", "both"], p=[0.5, 0.3, 0.2])
    words = []
    if kind != "colour":
        # One place, or a side and an end of it such as top left.
        chosen = [rng.integers(len(PLACES))] if rng.random() < 0.5 else [2 + rng.integers(2), rng.integers(2)]
        words += [len(COLOURS) + int(place) for place in chosen]
    if kind != "place":
        present = facts[: len(COLOURS)].flatten(1).any(1).nonzero()[:, 0].numpy()
        words.append(int(rng.choice(present) if rng.random() < 0.9 else rng.integers(len(COLOURS))))
    return words


def _worded(rng: np.random.Generator, words: list[int]) -> str:
    named = " ".join((*COLOURS, *PLACES)[word] for word in words)
    return str(rng.choice(_WORDINGS)).format(named)
