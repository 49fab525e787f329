"""Encodes the tiles that a plan asks for: from the cache where known, else through the LOD engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch
from torch import Tensor

from arrcoc.cache import TileCache, TileKey
from arrcoc.lod import LodEngine
from arrcoc.records import Features, Frame, Lod, Tiles

CutTiles = Callable[[Frame, int, Tensor, int], Tensor]
"""(frame, edge of a tile in pixels, raster indices [K], margin in pixels) to uint8 [K, 3, e, e]."""
HashTiles = Callable[[Tensor], Tensor]
"""uint8 [K, 3, e, e] to int64 [K, 4]."""
Content = tuple[int, int, int, int]


class TileEncoder:
    """Four LOD engines behind one relevance-tracked cache.

    A tile's features depend on its pixels (with those of its halo), its side and the engine alone, so a
    cached tile may come from another question, another place or another image.
    """

    def __init__(
        self,
        engines: Mapping[Lod, LodEngine],
        cache: TileCache,
        cut: CutTiles,
        hash_tiles: HashTiles,
        token_px: int,
    ) -> None:
        """Make an encoder.

        Args:
            engines: one for each LOD, all with the same halo.
            cache: the tile cache.
            cut: how tiles are cut from a frame.
            hash_tiles: how tiles with a halo are hashed.
            token_px: pixels per token.
        """
        (self._halo,) = {engine.halo for engine in engines.values()}
        self._engines, self._cache, self._token_px = engines, cache, token_px
        self._cut, self._hash_tiles = cut, hash_tiles

    def encode(self, frame: Frame, wanted: Mapping[Lod, Tensor], relevance: Tensor) -> list[Tiles]:
        """Encode tiles.

        Args:
            frame: the image.
            wanted: for each LOD, int64 [K] raster indices on the CPU, ascending; LODs with none are left out.
            relevance: fp32 [R, C] on the CPU; what each use adds to a cached tile's score.

        Returns:
            One record per LOD asked for, in the order asked.
        """
        flat = relevance.flatten().tolist()
        asked = {lod: index for lod, index in wanted.items() if len(index)}
        windows = {lod: self._pixels(frame, lod, index) for lod, index in asked.items()} if self._halo else {}
        contents = self._contents(frame, asked, windows)
        return [
            self._encode_lod(frame, lod, index, contents[lod], flat, windows.get(lod))
            for lod, index in asked.items()
        ]

    def _contents(
        self, frame: Frame, asked: Mapping[Lod, Tensor], windows: Mapping[Lod, Tensor]
    ) -> dict[Lod, list[Content]]:
        """Content hash of every tile asked for; one copy brings those of all LODs to the host.

        With a halo what the engine takes is hashed itself: a margin need not end where a neighbouring tile
        does. So then every tile asked for is cut, known or not.
        """
        if not windows:
            hashes = [(a, b, c, d) for a, b, c, d in frame.hashes.tolist()]
            assert self._halo or len(hashes) == frame.grid.count, "a frame made for engines with a halo"
            return {lod: [hashes[tile] for tile in index.tolist()] for lod, index in asked.items()}
        rows = torch.cat([self._hash_tiles(window) for window in windows.values()]).tolist()
        found = iter([(a, b, c, d) for a, b, c, d in rows])
        return {lod: list(islice(found, len(index))) for lod, index in asked.items()}

    def _encode_lod(
        self,
        frame: Frame,
        lod: Lod,
        index: Tensor,
        contents: list[Content],
        relevance: list[float],
        window: Tensor | None,
    ) -> Tiles:
        """Tiles of one LOD; `window` holds their pixels where they are cut already."""
        engine = self._engines[lod]
        keys = [TileKey(content, int(lod), engine.fingerprint) for content in contents]
        weights = [relevance[tile] for tile in index.tolist()]
        found = self._cache.get(keys, weights, frame.pixels.device)
        missing: dict[TileKey, list[int]] = {}
        for place, hit in enumerate(found):
            if hit is None:
                missing.setdefault(keys[place], []).append(place)
        if missing:
            # Tiles with the same pixels, such as a page's blank ones, are encoded once.
            first = [places[0] for places in missing.values()]
            pixels = self._pixels(frame, lod, index[first]) if window is None else window[first]
            fresh = engine.encode(pixels)
            for row, (key, places) in enumerate(missing.items()):
                made = Features(fresh.tokens[row : row + 1], fresh.deepstack[:, row : row + 1])
                self._cache.put(key, made, sum(weights[place] for place in places))
                for place in places:
                    found[place] = made
        return Tiles(lod, engine.side, index, _join([hit for hit in found if hit is not None]))

    def _pixels(self, frame: Frame, lod: Lod, index: Tensor) -> Tensor:
        """What the engine of a LOD takes for the tiles with raster indices `index`."""
        side_px, margin = self._engines[lod].side * self._token_px, self._halo * self._token_px
        return self._cut(frame, side_px, index, margin)


def _join(parts: list[Features]) -> Features:
    """One record of K tiles from K records of one."""
    return Features(torch.cat([p.tokens for p in parts]), torch.cat([p.deepstack for p in parts], dim=1))
