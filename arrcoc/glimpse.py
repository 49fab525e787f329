"""The glimpse: the whole frame at LOD background, and the attention that a question pays to its parts.

The participatory scorer here needs no training. Glimpse and question run through the decoder's first
layers; where the question's rows look, divided by where a generic prompt's rows look, is what the question
adds (relative attention, arXiv 2502.17422). Tokens of outlying norm, which attract attention whatever is
asked (attention sinks, arXiv 2309.17453), are left out. The image precedes the text, so its keys and values
are computed once and serve both prompts and the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import reduce
from torch import Tensor

from arrcoc.config import Config
from arrcoc.kv import KvCache, Prefix
from arrcoc.lod.tower import Geometry, StaticTower, geometry
from arrcoc.qwen import QwenVL
from arrcoc.records import Features, Frame, Grid, Query, Texture
from arrcoc.vision import patchify


class JointGlimpse:
    """Encodes the whole frame as one ordinary image: the joint glimpse, and every coarser overview."""

    def __init__(self, qwen: QwenVL) -> None:
        """Args: the checkpoint."""
        self._weights, self._dtype = qwen.vision, qwen.dtype
        self._tower = StaticTower(qwen.vision)
        self._geometry = lru_cache(maxsize=32)(self._make_geometry)

    def encode(self, frame: Frame) -> Features:
        """Features of the frame at LOD background: `encode_pixels` of `frame.background`."""
        return self.encode_pixels(frame.background)

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Features:
        """Features of an image uint8 [3, h, w]: K = 1, one token per token_px square, raster order."""
        _, height, width = pixels.shape
        shape = self._geometry(height // self._weights.token_px, width // self._weights.token_px)
        return self._tower.encode(patchify(pixels[None], self._weights, self._dtype), shape)

    def _make_geometry(self, rows: int, cols: int) -> Geometry:
        return geometry(self._weights, rows, cols)


class GlimpseScorer:
    """The training-free participatory scorer, for one image; see the module's docstring."""

    def __init__(
        self, qwen: QwenVL, glimpse: Features, where: Tensor, extent: float, grid: Grid, config: Config
    ) -> None:
        """Make a scorer for one image.

        Args:
            qwen: the checkpoint.
            glimpse: K = 1, m = R*C*s0**2 tokens in raster order over the frame.
            where: fp32 [2, m], positions of the glimpse's tokens in the frame.
            extent: what the image adds to the text position after it.
            grid: the tile grid.
            config: probe layers, generic prompt, gain and sink ratio.
        """
        self._qwen, self._glimpse, self._where = qwen, glimpse, where
        self._extent, self._grid, self._config = extent, grid, config
        self._layers = probe_layers(config.probe_depth, qwen.n_layers)
        self.prefix: Prefix | None = None

    @torch.inference_mode()
    def __call__(self, texture: Texture, query: Query) -> Tensor:
        """Relative attention of the question to each tile.

        With a_q and a_g the shares of attention that a tile receives from the question's and the generic
        prompt's rows, averaged over rows, heads and probed layers: a_q**g / (a_q**g + a_g**g), g the gain.

        Returns:
            fp32 [R, C] in [0, 1]; 0.5 where the question looks just as anybody would.
        """
        del texture  # the glimpse stands in for it; both scorers share one signature
        head, tail = self._prompt(query.text)
        generic = self._prompt(self._config.generic_prompt)[1]
        if self.prefix is None:
            self.prefix = self._run_prefix(head)
        asked, anyhow = (self._tile_shares(a) for a in self._attention(self.prefix, [tail, generic]))
        return relative(asked, anyhow, self._config.attention_gain)

    def _prompt(self, question: str) -> tuple[list[int], list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        head, tail = self._qwen.render([{"role": "user", "content": content}])
        return head, tail

    def _run_prefix(self, head: Sequence[int]) -> Prefix:
        text = self._qwen.embed(head)
        tokens = self._glimpse.tokens[0]
        start = len(head)
        where = torch.cat((torch.zeros_like(self._where[:1]), self._where)) + start
        positions = torch.cat((torch.arange(start).float().expand(3, -1), where), dim=1).to(tokens.device)
        cache = KvCache(self._qwen.n_layers, capacity=start + 2 * len(tokens) + 256)
        norms: dict[int, Tensor] = {}

        def observe(layer: int, hidden: Tensor) -> None:
            if layer in self._layers:
                norms[layer] = hidden[0, start:].float().norm(dim=-1)

        depth, planes = self._layers[-1] + 1, self._glimpse.deepstack[:, 0]
        hidden = self._qwen.run_layers(
            torch.cat((text, tokens))[None],
            positions,
            cache,
            range(depth),
            vision=torch.arange(start, start + len(tokens), device=tokens.device),
            deepstack=planes,
            observe=observe,
        )
        return Prefix(tuple(head), cache, hidden, positions, planes, depth, norms, start + self._extent)

    def _attention(self, prefix: Prefix, tails: Sequence[Sequence[int]]) -> list[Tensor]:
        """Attention of each prompt's rows to the glimpse tokens, fp32 [m], a distribution without sinks.

        The prompts run side by side in one pass, none of them seeing another: a pass over so few rows
        takes as long as its kernel launches, however many rows there are.
        """
        lengths = [len(tail) for tail in tails]
        embeds = self._qwen.embed([token for tail in tails for token in tail])
        steps = torch.cat([torch.arange(length) for length in lengths]).float() + prefix.next_position
        positions = steps.expand(3, -1).to(embeds.device)
        seen: list[list[Tensor]] = [[] for _ in tails]

        def observe(layer: int, hidden: Tensor) -> None:
            if layer not in self._layers:
                return
            keys = prefix.cache.keys(layer)[0, :, prefix.image]
            excluded = sinks(prefix.norms[layer], self._config.sink_ratio)
            queries = torch.split(self._qwen.queries(layer, hidden, positions), lengths, dim=1)
            for shares, query in zip(seen, queries, strict=True):
                # Row 0 ends the image and belongs to no prompt.
                shares.append(attention_shares(query[:, 1:], keys, excluded))

        mask = branch_mask(prefix.length, lengths).to(embeds.device)
        depth = range(prefix.depth)
        self._qwen.run_layers(embeds[None], positions, prefix.cache, depth, mask=mask, observe=observe)
        prefix.cache.truncate(prefix.length)
        return [torch.stack(shares).mean(0) for shares in seen]

    def _tile_shares(self, attention: Tensor) -> Tensor:
        """Sum over each tile's glimpse tokens: [m] to [R, C]."""
        grid = self._grid
        side = self._config.sides[0]
        return reduce(attention, "(r i c j) -> r c", "sum", r=grid.rows, i=side, c=grid.cols, j=side)


def probe_layers(depth: Sequence[float], n_layers: int) -> list[int]:
    """Layer numbers at fractions of the depth, ascending, each once."""
    return sorted({min(int(fraction * n_layers), n_layers - 1) for fraction in depth})


def branch_mask(past: int, lengths: Sequence[int]) -> Tensor:
    """Mask [1, 1, n, past + n], True = attend, for branches of these lengths after `past` shared positions.

    Each row sees what is shared and the earlier rows of its own branch; n is the sum of the lengths.
    """
    causal = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
    own: Tensor = torch.block_diag(*causal)  # type: ignore[no-untyped-call]
    return torch.cat((own.new_ones(len(own), past), own), dim=1)[None, None]


def sinks(norms: Tensor, ratio: float) -> Tensor:
    """Which tokens are attention sinks, bool [m]: those whose norm exceeds `ratio` times the median."""
    return norms > ratio * norms.median()


def attention_shares(query: Tensor, keys: Tensor, excluded: Tensor) -> Tensor:
    """Mean attention of rows to image tokens, normalised over the tokens that are not excluded.

    Args:
        query: [heads, rows, head_dim], rotated.
        keys: [kv_heads, m, head_dim], rotated; query heads are grouped over them in order.
        excluded: bool [m].

    Returns:
        fp32 [m], sums to 1 (0 everywhere if all are excluded).
    """
    kv_heads, _, width = keys.shape
    grouped = query.float().reshape(kv_heads, -1, width)
    scores = grouped @ keys.float().transpose(1, 2) / width**0.5
    weights: Tensor = scores.masked_fill(excluded, float("-inf")).softmax(dim=-1)
    return weights.nan_to_num(0.0).mean(dim=(0, 1))


def relative(asked: Tensor, anyhow: Tensor, gain: float) -> Tensor:
    """asked**gain / (asked**gain + anyhow**gain), 0.5 where neither looks."""
    floor = torch.finfo(torch.float32).tiny
    return torch.sigmoid(gain * (asked.clamp_min(floor).log() - anyhow.clamp_min(floor).log()))
