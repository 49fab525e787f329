"""Makes of rows what a fit reads: textures and targets, kept on disk so that nothing is computed twice."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arrcoc import allocation, image, texture
from arrcoc.config import PresetChoice
from arrcoc.engine import Engine
from arrcoc.errors import ArrcocError, ConfigError, ImageError, QueryError
from arrcoc.fitting.labels import cell_coverage, frame_boxes, spread, tile_hits
from arrcoc.fitting.rows import Row, content_hash
from arrcoc.fitting.settings import Target
from arrcoc.qwen import QwenVL
from arrcoc.records import Grid, Texture

_FORMAT = "1"  # Raise when a cached file would hold something else.

Shape = tuple[int, int, int]
"""Rows and columns of tiles, and cells along a tile's edge: samples that agree can be stacked."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row, ready to be fitted to.

    Attributes:
        row: where it comes from.
        image: content hash of its image.
        texture: file of the image's texture.
        grid: the image's tile grid.
        cells: cells along a tile's edge.
        embedding: fp32 [D] of the question, on the CPU.
        kind: what its target was made of.
        tiles: fp32 [R, C] in [0, 1], what the head should say.
        boxes: in frame pixels; none for a distilled row.
    """

    row: Row
    image: str
    texture: Path
    grid: Grid
    cells: int
    embedding: Tensor
    kind: Literal["boxes", "glimpse"]
    tiles: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]

    @property
    def shape(self) -> Shape:
        """What samples of one batch have in common."""
        return self.grid.rows, self.grid.cols, self.cells

    def cell_target(self) -> Tensor:
        """fp32 [R*cells, C*cells]: coverage by boxes; for a distilled row, each tile's value."""
        if self.kind == "glimpse":
            return spread(self.tiles, self.cells)
        return cell_coverage(self.boxes, self.grid, self.cells)

    def load_texture(self) -> Texture:
        """The image's texture, on the CPU."""
        return Texture(_read_tensor(self.texture, "maps"), self.grid, self.cells)


@dataclass
class Preparer:
    """Prepares rows for one checkpoint and preset.

    Attributes:
        qwen: the checkpoint.
        presets: which configuration serves which image.
        folder: of the files kept; made if needed.
        target: which rows are labels.
    """

    qwen: QwenVL
    presets: PresetChoice
    folder: Path
    target: Target
    _frames: dict[str, _Framed] = field(default_factory=dict, init=False)

    def prepare(self, rows: Sequence[Row], progress: Callable[[int, int], object]) -> list[Sample]:
        """Samples of all rows that the target allows, in their order.

        Args:
            rows: at least one.
            progress: called with rows done and rows in all.

        Raises:
            ConfigError: target boxes, and no row has any.
            ImageError, QueryError: an image, a question or a box is not usable; names file and line.
        """
        wanted = [row for row in rows if self.target != "boxes" or row.boxes is not None]
        if not wanted:
            raise ConfigError("target boxes without any boxes", "rows with boxes", "Try target glimpse")
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = []
        for done, row in enumerate(wanted):
            progress(done, len(wanted))
            samples.append(self._sample(row))
        progress(len(wanted), len(wanted))
        return samples

    def _sample(self, row: Row) -> Sample:
        try:
            embedding = self.qwen.query(row.question).embedding.cpu()
            name = content_hash(row.image)
            framed = self._frames.get(name) or self._frames.setdefault(name, self._framed(row.image, name))
        except (ImageError, QueryError) as error:
            raise type(error)(f"{row.where}: {error.given}", error.allowed, error.remedy) from None
        grid, cells = framed.grid, framed.cells
        if row.boxes is None or self.target == "glimpse":
            tiles = self._glimpse(row, name, framed)
            return Sample(row, name, framed.file, grid, cells, embedding, "glimpse", tiles, ())
        _check_inside(row, framed.source)
        boxes = tuple(frame_boxes(row.boxes, framed.source, framed.content))
        tiles = tile_hits(boxes, grid)
        return Sample(row, name, framed.file, grid, cells, embedding, "boxes", tiles, boxes)

    def _framed(self, path: Path, name: str) -> _Framed:
        """The texture file of an image, made if it is not there."""
        token_px, device = self.qwen.vision.token_px, self.qwen.device
        file = self.folder / f"texture-{_key(name, self._identity[0])}.safetensors"
        found = _Framed.read(file)
        if found is not None:
            return found
        pixels = image.decode(path, self.presets.base.max_source_pixels)
        config = self.presets.choose(*pixels.shape[1:])
        frame = image.frame(pixels, config, token_px, device)
        made = texture.extract(frame, config)
        framed = _Framed(file, frame.grid, made.cells, frame.source, frame.content)
        _write(file, {"maps": made.maps.cpu().contiguous()}, framed.metadata())
        return framed

    def _glimpse(self, row: Row, name: str, framed: _Framed) -> Tensor:
        """The glimpse scorer's map for a question, fp32 [R, C]."""
        file = self.folder / f"glimpse-{_key(name, row.question, *self._identity)}.safetensors"
        try:
            return _read_tensor(file, "tiles")
        except (OSError, SafetensorError):
            pass  # not made yet, or damaged: made anew
        config = self.presets.choose(*framed.source)
        try:
            # The least budget: what the plan would refine is of no interest here.
            least = allocation.least_tokens(framed.grid, config)
            tiles = self._engine.encode(row.image, row.question, least).scores.participatory
        except ArrcocError as error:
            raise type(error)(f"{row.where}: {error.given}", error.allowed, error.remedy) from None
        _write(file, {"tiles": tiles.float().contiguous()}, {})
        return tiles.float()

    @cached_property
    def _engine(self) -> Engine:
        looking = {"participatory": "glimpse"}
        by_name = {name: config.updated(looking) for name, config in self.presets.by_name.items()}
        return Engine(self.qwen, PresetChoice(self.presets.name, by_name))

    @cached_property
    def _identity(self) -> tuple[str, str]:
        """What textures depend on beside the image; and what glimpse maps depend on further."""
        configs = repr([config.model_dump() for config in self.presets.by_name.values()])
        return f"{configs}{self.qwen.vision.token_px}", f"{self.qwen.fingerprint}{_stamps(self.qwen.name)}"


@dataclass(frozen=True, slots=True)
class _Framed:
    """A texture file and the geometry of its frame."""

    file: Path
    grid: Grid
    cells: int
    source: tuple[int, int]
    content: tuple[int, int]

    def metadata(self) -> dict[str, str]:
        numbers = (self.grid.rows, self.grid.cols, self.grid.tile, self.cells, *self.source, *self.content)
        return {"geometry": " ".join(map(str, numbers))}

    @classmethod
    def read(cls, file: Path) -> _Framed | None:
        """What a file holds; None if it is not there or damaged."""
        try:
            with safe_open(file, framework="pt") as opened:
                rows, cols, tile, cells, *rest = map(int, opened.metadata()["geometry"].split())
        except (OSError, SafetensorError):
            return None
        return cls(file, Grid(rows, cols, tile), cells, (rest[0], rest[1]), (rest[2], rest[3]))


def _check_inside(row: Row, source: tuple[int, int]) -> None:
    for x0, y0, x1, y1 in row.boxes or ():
        # Up to a pixel beyond is forgiven: annotators round, and some count pixels from 1.
        if x0 >= source[1] or y0 >= source[0] or x1 > source[1] + 1 or y1 > source[0] + 1:
            given = f"{row.where}: box {[x0, y0, x1, y1]} leaves the image"
            raise QueryError(given, f"within {source[1]} x {source[0]} source pixels", "Correct the box")


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_FORMAT, *parts)).encode()).hexdigest()[:32]


def _stamps(name: str) -> str:
    """Names, sizes and times of a checkpoint's files: the fingerprint knows the vision tower alone."""
    files = sorted(Path(name).glob("model*.safetensors")) if Path(name).is_dir() else []
    return repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]) + name


def _read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor.clone()  # of its own: the file may be replaced while it is mapped


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def stack_batch(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps [B, 13, h, w], embeddings [B, D], cell targets [B, h, w], tile targets [B, R, C]; on `device`."""
    assert len({sample.shape for sample in samples}) == 1, "one grid in a batch"
    maps = torch.stack([sample.load_texture().maps for sample in samples]).float()
    embeddings = torch.stack([sample.embedding for sample in samples])
    cells = torch.stack([sample.cell_target() for sample in samples])
    tiles = torch.stack([sample.tiles for sample in samples])
    return maps.to(device), embeddings.to(device), cells.to(device), tiles.to(device)
