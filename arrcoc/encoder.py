"""Encodes the tiles that a plan asks for: from the cache where known, else through the LOD engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from arrcoc.cache import TileCache, TileKey
from arrcoc.lod import LodEngine
from arrcoc.records import Features, Frame, Lod, Tiles

CutTiles = Callable[[Frame, int, Tensor], Tensor]


class TileEncoder:
    """Four LOD engines behind one relevance-tracked cache.

    A tile's features depend on its pixels, its side and the engine alone, so a cached tile may come from
    another question, another place or another image.
    """

    def __init__(
        self, engines: Mapping[Lod, LodEngine], cache: TileCache, cut: CutTiles, token_px: int
    ) -> None:
        """Args: an engine for each LOD; the cache; how tiles are cut from a frame; pixels per token."""
        self._engines, self._cache, self._cut, self._token_px = engines, cache, cut, token_px

    def encode(self, frame: Frame, wanted: Mapping[Lod, Tensor], relevance: Tensor) -> list[Tiles]:
        """Encode tiles.

        Args:
            frame: the image.
            wanted: for each LOD, int64 [K] raster indices on the CPU, ascending; LODs with none are left out.
            relevance: fp32 [R, C] on the CPU; what each use adds to a cached tile's score.

        Returns:
            One record per LOD asked for, in the order asked.
        """
        hashes = [tuple(row) for row in frame.hashes.tolist()]
        flat = relevance.flatten().tolist()
        return [
            self._encode_lod(frame, lod, index, hashes, flat) for lod, index in wanted.items() if len(index)
        ]

    def _encode_lod(
        self, frame: Frame, lod: Lod, index: Tensor, hashes: list[tuple[int, ...]], relevance: list[float]
    ) -> Tiles:
        engine = self._engines[lod]
        tiles = index.tolist()
        keys = [TileKey(hashes[tile], int(lod), engine.fingerprint) for tile in tiles]
        weights = [relevance[tile] for tile in tiles]
        found = self._cache.get(keys, weights, frame.pixels.device)
        missing: dict[TileKey, list[int]] = {}
        for place, hit in enumerate(found):
            if hit is None:
                missing.setdefault(keys[place], []).append(place)
        if missing:
            # Tiles with the same pixels, such as a page's blank ones, are encoded once.
            fresh = self._encode_missing(frame, engine, index[[places[0] for places in missing.values()]])
            for row, (key, places) in enumerate(missing.items()):
                made = Features(fresh.tokens[row : row + 1], fresh.deepstack[:, row : row + 1])
                self._cache.put(key, made, sum(weights[place] for place in places))
                for place in places:
                    found[place] = made
        return Tiles(lod, engine.side, index, _join([hit for hit in found if hit is not None]))

    def _encode_missing(self, frame: Frame, engine: LodEngine, index: Tensor) -> Features:
        pixels = self._cut(frame, engine.side * self._token_px, index)
        return engine.encode(pixels)


def _join(parts: list[Features]) -> Features:
    """One record of K tiles from K records of one."""
    return Features(torch.cat([p.tokens for p in parts]), torch.cat([p.deepstack for p in parts], dim=1))
