"""Images as the stock model sees them: one image, resized to whole tokens, at its integer positions."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arrcoc import sequence
from arrcoc.chat import single
from arrcoc.errors import BudgetError
from arrcoc.lod.tower import Geometry, StaticTower, geometry
from arrcoc.qwen import QwenVL
from arrcoc.records import Features, Grid, Prompt, Segment, VisionSequence
from arrcoc.vision import patchify


class TokenGrid(NamedTuple):
    """Merged tokens of an image, rows x cols."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.rows * self.cols


def token_grid(height: int, width: int, token_px: int, most: int) -> TokenGrid:
    """Token grid to which the stock processor's `smart_resize` brings an image, with max_pixels set.

    Each edge is rounded to whole tokens (halves to even); if that makes more than `most` tokens, both are
    scaled by sqrt(max_pixels / pixels), max_pixels = most * token_px**2, and rounded down, to at least one.

    Args:
        height, width: of the image, px.
        token_px: edge of a merged token, px.
        most: tokens allowed.

    Raises:
        BudgetError: an image so narrow that one token across is too many.
    """
    native = grid = TokenGrid(max(1, round(height / token_px)), max(1, round(width / token_px)))
    if grid.tokens > most:
        shrink = math.sqrt(height * width / (most * token_px**2))
        rows, cols = (max(1, math.floor(edge / shrink / token_px)) for edge in (height, width))
        grid = TokenGrid(rows, cols)
    if grid.tokens > most:
        given = f"budget {most} for an image of {height} x {width} px"
        # One token across: n tokens suffice where floor(sqrt(n * ratio of the edges)) <= n.
        ratio = max(height, width) / min(height, width)
        enough = next(n for n in itertools.count(most + 1) if math.isqrt(math.floor(n * ratio)) <= n)
        least = min(native.tokens, enough)
        raise BudgetError(given, f"at least {least} tokens", "Choose a larger budget")
    return grid


def resize(pixels: Tensor, grid: TokenGrid, token_px: int) -> Tensor:
    """uint8 [3, h, w] on the CPU to the grid's pixels, by the stock PIL processor's bicubic filter."""
    size = (grid.cols * token_px, grid.rows * token_px)
    if tuple(pixels.shape[1:]) == size[::-1]:
        return pixels
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC))).permute(2, 0, 1)


class WholeImage:
    """Encodes whole images with the stock tower's weights; shapes seen before cost no preparation."""

    def __init__(self, qwen: QwenVL) -> None:
        """Args: the checkpoint."""
        self._qwen, self.tower = qwen, StaticTower(qwen.vision)
        self.geometry = lru_cache(maxsize=32)(self._make_geometry)

    def patches(self, pixels: Tensor, most: int) -> tuple[Tensor, TokenGrid]:
        """Patches [1, N, 3 * 2 * patch**2] of an image resized to at most `most` tokens, and its grid."""
        weights = self._qwen.vision
        height, width = pixels.shape[1:]
        grid = token_grid(height, width, weights.token_px, most)
        shown = resize(pixels, grid, weights.token_px).to(self._qwen.device)
        return patchify(shown[None], weights, self._qwen.dtype), grid

    @torch.inference_mode()
    def encode(self, pixels: Tensor, most: int) -> tuple[Features, TokenGrid]:
        """Features (K = 1, raster order) of an image uint8 [3, h, w] resized to at most `most` tokens."""
        patches, grid = self.patches(pixels, most)
        return self.tower.encode(patches, self.geometry(grid)), grid

    def _make_geometry(self, grid: TokenGrid) -> Geometry:
        return geometry(self._qwen.vision, grid.rows, grid.cols)


def lay_out(features: Features, grid: TokenGrid, kept: Tensor | None = None) -> VisionSequence:
    """Tokens at the stock model's M-RoPE positions; what follows counts on from the whole image.

    Args:
        features: K = 1, of all the grid's tokens or of those kept.
        grid: of the whole image.
        kept: int64 [n], raster indices of the features' tokens; None for all.
    """
    where = sequence.glimpse_positions(Grid(grid.rows, grid.cols, 1), 1, 1)
    positions = torch.cat((torch.zeros_like(where[:1]), where)).to(features.tokens.device)
    if kept is not None:
        positions = positions[:, kept]
    tokens = features.tokens[0]
    whole = Segment(0, len(tokens), float(max(grid)), "")
    return VisionSequence(tokens, features.deepstack[:, 0], positions, (whole,))


@torch.inference_mode()
def prompt(qwen: QwenVL, image: VisionSequence, question: str) -> Prompt:
    """A chat of one turn: the image, then the question."""
    runs = [qwen.embed(run) for run in qwen.render(single(None, question).messages)]
    return sequence.prompt(runs, [image], [[]])
