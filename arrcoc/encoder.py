"""Encodes the tiles that a plan asks for: from the cache where known, else through the LOD engines."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from arrcoc.cache import Found, TileCache, TileKey, arrange, upload
from arrcoc.lod import LodEngine
from arrcoc.records import Features, Frame, Lod, Tiles
from arrcoc.streams import parallel

CutTiles = Callable[[Frame, int, Tensor, int], Tensor]
"""(frame, edge of a tile in pixels, raster indices [K], margin in pixels) to uint8 [K, 3, e, e]."""
HashTiles = Callable[[Tensor], Tensor]
"""uint8 [K, 3, e, e] to int64 [K, 4]."""
Content = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Order:
    """The tiles of one LOD: what the cache had, and where the others stand.

    Attributes:
        lod: of all of them.
        index: int64 [K], raster indices.
        relevance: of each.
        found: what the cache had.
        missing: places of the others by key; tiles with the same pixels have one.
        pixels: what the engine takes for each missing key; None where none is missing.
    """

    lod: Lod
    index: Tensor
    relevance: list[float]
    found: Found
    missing: dict[TileKey, list[int]]
    pixels: Tensor | None


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
        orders = [
            self._order(frame, lod, index, contents[lod], flat, windows.get(lod))
            for lod, index in asked.items()
        ]
        fresh = self._run(orders)
        return [self._filled(order, fresh.get(order.lod)) for order in orders]

    @torch.inference_mode()
    def prefetch(
        self,
        frame: Frame,
        wanted: Mapping[Lod, Tensor],
        relevance: Tensor,
        stopped: Callable[[], bool],
        at_once: int = 8,
    ) -> int:
        """Encode tiles that nobody has asked for yet into the cache, a few at a time.

        Args:
            frame: the image.
            wanted: as for `encode`.
            relevance: fp32 [R, C] on the CPU; a tile's first score is half of it, for nobody has used it.
            stopped: whether to stop, asked before every few tiles and before they are stored.
            at_once: how many tiles are encoded between.

        Returns:
            How many tiles were encoded and stored.
        """
        flat, made = relevance.flatten().tolist(), 0
        for lod, index in wanted.items():
            for part in torch.split(index, at_once) if len(index) else ():
                if stopped():
                    return made
                made += self._encode_ahead(frame, lod, part, flat, stopped)
        return made

    def _encode_ahead(
        self, frame: Frame, lod: Lod, index: Tensor, relevance: list[float], stopped: Callable[[], bool]
    ) -> int:
        engine = self._engines[lod]
        window = self._pixels(frame, lod, index) if self._halo else None
        contents = self._contents(frame, {lod: index}, {} if window is None else {lod: window})[lod]
        keys = [TileKey(content, int(lod), engine.fingerprint) for content in contents]
        places = _places(keys, range(len(keys)))
        missing = {key: places[key][0] for key in self._cache.missing(keys)}
        if not missing:
            return 0
        fresh = engine.encode_ahead(self._chosen(frame, lod, index, window, list(missing.values())))
        if fresh.tokens.is_cuda:
            # What is stored is then there already: a request that finds it waits for nothing.
            torch.cuda.current_stream(fresh.tokens.device).synchronize()
        if stopped():
            return 0
        gains = [relevance[int(index[place])] / 2 for place in missing.values()]
        return self._cache.put(list(missing), fresh, gains, ahead=True)

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

    def _order(
        self,
        frame: Frame,
        lod: Lod,
        index: Tensor,
        contents: list[Content],
        relevance: list[float],
        window: Tensor | None,
    ) -> _Order:
        """Look the tiles of one LOD up, and cut the others; `window` holds pixels that are cut already."""
        keys = [TileKey(content, int(lod), self._engines[lod].fingerprint) for content in contents]
        weights = [relevance[tile] for tile in index.tolist()]
        found = self._cache.get(keys, weights, frame.pixels.device)
        missing = _places(keys, set(range(len(keys))).difference(found.places))
        assert missing or found.features is not None, "every key is found or missing"
        # Tiles with the same pixels, such as a page's blank ones, are encoded once.
        first = [places[0] for places in missing.values()]
        pixels = self._chosen(frame, lod, index, window, first) if first else None
        return _Order(lod, index, weights, found, missing, pixels)

    def _run(self, orders: Sequence[_Order]) -> dict[Lod, Features]:
        """Encode what is missing: LODs in memory of their own side by side, then the others in turn."""
        given = {order.lod: order.pixels for order in orders if order.pixels is not None}
        apart = [lod for lod, pixels in given.items() if len(pixels) <= self._engines[lod].apart]
        made: dict[Lod, Features] = {}
        if len(apart) > 1:
            tasks = [partial(self._engines[lod].encode, given[lod]) for lod in apart]
            made = dict(zip(apart, parallel(tasks, given[apart[0]].device), strict=True))
        return made | {lod: self._engines[lod].encode(given[lod]) for lod in given if lod not in made}

    def _filled(self, order: _Order, fresh: Features | None) -> Tiles:
        """An order's tiles, known and fresh, in the order asked; the fresh ones are stored."""
        side, found, missing = self._engines[order.lod].side, order.found, order.missing
        if fresh is None:
            assert found.features is not None, "nothing is missing"
            return Tiles(order.lod, side, order.index, found.features)
        gains = [sum(order.relevance[place] for place in places) for places in missing.values()]
        self._cache.put(list(missing), fresh, gains)
        parts = [fresh] if found.features is None else [found.features, fresh]
        rows = {place: row for row, place in enumerate(found.places)}
        for row, places in enumerate(missing.values(), len(found.places)):
            rows |= dict.fromkeys(places, row)
        arranged = arrange(parts, [rows[place] for place in range(len(order.index))])
        return Tiles(order.lod, side, order.index, arranged)

    def _chosen(
        self, frame: Frame, lod: Lod, index: Tensor, window: Tensor | None, places: list[int]
    ) -> Tensor:
        """What the engine takes for the tiles at some places of `index`, cut already or not."""
        if window is None:
            return self._pixels(frame, lod, index[places])
        return window if len(places) == len(window) else window.index_select(0, upload(places, window.device))

    def _pixels(self, frame: Frame, lod: Lod, index: Tensor) -> Tensor:
        """What the engine of a LOD takes for the tiles with raster indices `index`."""
        side_px, margin = self._engines[lod].side * self._token_px, self._halo * self._token_px
        return self._cut(frame, side_px, index, margin)


def _places(keys: Sequence[TileKey], chosen: Container[int]) -> dict[TileKey, list[int]]:
    """Places of every key among the places chosen, in order of first appearance."""
    places: dict[TileKey, list[int]] = {}
    for place, key in enumerate(keys):
        if place in chosen:
            places.setdefault(key, []).append(place)
    return places
