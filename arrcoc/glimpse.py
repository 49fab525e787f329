"""The glimpse: the whole frame at LOD background, and the attention that a question pays to its parts.

The participatory scorer here needs no training. Glimpse and question run through the decoder's first
layers; where the question's rows look, divided by where a generic prompt's rows look, is what the question
adds (relative attention, arXiv 2502.17422). Tokens of outlying norm, which attract attention whatever is
asked (attention sinks, arXiv 2309.17453), are left out. The image precedes the text, so its keys and values
are computed once and serve both prompts, every question and the answer; the generic prompt runs along.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from arrcoc.attention_probe import attention_shares, probe_layers, relative, tile_shares
from arrcoc.config import Config
from arrcoc.glimpse_tail import Tails
from arrcoc.lod.joint import joint_tower
from arrcoc.lod.tower import StaticTower, geometry
from arrcoc.prefix_graph import FirstLooks, rendered
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Features, Frame, Grid, Query, Texture
from arrcoc.transfer import to_device
from arrcoc.vision import patchify

_LOG = logging.getLogger(__name__)


class JointGlimpse:
    """Encodes the whole frame as one ordinary image: the joint glimpse, and every coarser overview."""

    def __init__(self, qwen: QwenVL, fused: bool = False) -> None:
        """Args: the checkpoint; whether kernels of arrcoc's own may encode, where they can run."""
        self._weights, self._dtype = qwen.vision, qwen.dtype
        self._tower = StaticTower(qwen.vision)
        self._geometry = lru_cache(maxsize=32)(partial(geometry, qwen.vision))
        self._fused = joint_tower(qwen) if fused else None

    def encode(self, frame: Frame) -> Features:
        """Features of the frame at LOD background: `encode_pixels` of `frame.background`."""
        return self.encode_pixels(frame.background)

    def describe(self) -> str:
        """How images are encoded, in words."""
        fused = self._fused
        return "the stock weights" if fused is None else f"fused kernels, {fused.describe()}"

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Features:
        """Features of an image uint8 [3, h, w]: K = 1, one token per token_px square, raster order."""
        fused = self._fused
        if fused is not None:
            try:
                return fused.encode(pixels[None])
            except torch.OutOfMemoryError as error:  # another image, or another time, there may be enough
                _LOG.warning("a glimpse is encoded without fused kernels: %s", error)
            except Exception as error:  # whatever a kernel's compiler, its driver or CUDA raises
                self._fused = None
                _LOG.warning("glimpses are encoded without fused kernels: %s", error)
        edge = self._weights.token_px
        shape = self._geometry(pixels.shape[1] // edge, pixels.shape[2] // edge)
        return self._tower.encode(patchify(pixels[None], self._weights, self._dtype), shape)


class GlimpseScorer:
    """The training-free participatory scorer, for one image; see the module's docstring."""

    def __init__(
        self,
        qwen: QwenVL,
        glimpse: Features,
        where: Tensor,
        extent: float,
        grid: Grid,
        config: Config,
        prefix: Prefix | None = None,
        tails: Tails | None = None,
    ) -> None:
        """Make a scorer for one image.

        Args:
            qwen: the checkpoint.
            glimpse: K = 1, m = R*C*s0**2 tokens in raster order over the frame.
            where: fp32 [2, m], positions of the glimpse's tokens in the frame.
            extent: what the image adds to the text position after it.
            grid: the tile grid.
            config: probe layers, generic prompt, gain and sink ratio.
            prefix: what another scorer for the same image has computed, where there is one.
            tails: reads questions at static shapes; None reads each at its own.
        """
        self._qwen, self._glimpse, self._where = qwen, glimpse, where
        self._extent, self._grid, self._config = extent, grid, config
        self._layers = probe_layers(config.probe_depth, qwen.n_layers)
        self.prefix, self._tails = prefix, tails

    @torch.inference_mode()
    def __call__(self, texture: Texture, query: Query) -> Tensor:
        """Relative attention of the question to each tile.

        With a_q and a_g the shares of attention that a tile receives from the question's and the generic
        prompt's rows, averaged over rows, heads and probed layers: a_q**g / (a_q**g + a_g**g), g the gain.

        Returns:
            fp32 [R, C] in [0, 1]; 0.5 where the question looks just as anybody would.
        """
        del texture  # the glimpse stands in for it; both scorers share one signature
        return self.ask(query)

    @torch.inference_mode()
    def ask(self, query: Query) -> Tensor:
        """What calling does; no texture is needed."""
        prefix, tail = self.prepare(), self._prompt(query.text)[1]
        found = None if self._tails is None else self._tails.ask(prefix, self._grid, tail)
        if found is not None:
            return found
        asked = self._attention(prefix, tail)
        assert prefix.probe is not None, "prepared"
        there, anyhow = self._tile_shares(asked), self._tile_shares(prefix.probe.generic)
        return relative(there, anyhow, self._config.attention_gain)

    def prepare(self) -> Prefix:
        """All that does not depend on the question, computed at the first call."""
        if self.prefix is None or self.prefix.probe is None:
            self.prefix = self._run_prefix()
        return self.prefix

    def _prompt(self, question: str) -> tuple[list[int], list[int]]:
        return rendered(self._qwen, question)

    def _run_prefix(self) -> Prefix:
        """Head, glimpse and generic prompt in one pass: no row sees those after it."""
        looks = FirstLooks(self._qwen, self._config) if self._tails is None else self._tails.looks
        return looks.look(*looks.prompt, self._glimpse, self._where, self._extent)

    @torch.inference_mode()
    def _attention(self, prefix: Prefix, tail: Sequence[int]) -> Tensor:
        """Attention of a prompt's rows to the glimpse tokens, fp32 [m], a distribution without sinks."""
        assert prefix.probe is not None, "prepared"
        embeds, excluded = self._qwen.embed(tail), prefix.probe.excluded
        steps = torch.arange(len(tail)).float() + prefix.next_position
        positions = to_device(steps.expand(3, -1), embeds.device)
        cache = prefix.fork(prefix.length + len(tail), layers=self._layers[-1] + 1)
        seen: list[Tensor] = []

        def observe(layer: int, hidden: Tensor) -> None:
            if layer in self._layers:
                query = self._qwen.queries(layer, hidden, positions)
                seen.append(self._shares(cache.keys(layer), prefix, query, excluded[layer]))

        last = self._layers[-1]
        # The last probed layer judges by its input: it need not run.
        observe(last, self._qwen.run_layers(embeds[None], positions, cache, range(last), observe=observe))
        return torch.stack(seen).mean(0)

    def _shares(self, keys: Tensor, prefix: Prefix, query: Tensor, excluded: Tensor) -> Tensor:
        """Attention of a tail's rows in one layer; its row 0 ends the image and belongs to no prompt."""
        return attention_shares(query[:, 1:], keys[0, :, prefix.image], excluded)

    def _tile_shares(self, attention: Tensor) -> Tensor:
        return tile_shares(attention, self._grid, self._config.sides[0])
