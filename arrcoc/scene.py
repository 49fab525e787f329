"""What is known of one image whatever is asked about it, and the beginnings of prompts that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import torch
from torch import Tensor

from arrcoc import allocation, image, sequence
from arrcoc.config import Config
from arrcoc.encoder import TileEncoder
from arrcoc.glimpse import JointGlimpse
from arrcoc.prefix_store import PrefixKey, PrefixStore
from arrcoc.prefixes import Prefix, start
from arrcoc.qwen import QwenVL
from arrcoc.records import Features, Frame, Grid, Layout, Lod, Texture
from arrcoc.transfer import Arrival


@dataclass(slots=True)
class Scene:
    """One image, and what does not depend on the question; filled in as it is needed.

    Attributes:
        frame: the image on the device.
        kept: whether several questions will be asked, so that computing for later ones is worth it.
        content: digest of the frame at LOD background; None where no prefix is shared.
        texture: its texture maps.
        free: the propositional and the perspectival map, fp32 [R, C].
        overviews: features of the whole frame by stride, 1 for the glimpse.
        picture: the thumbnail of `Encoding.picture`, on its way.
    """

    frame: Frame
    kept: bool
    content: bytes | None
    texture: Texture | None = None
    free: tuple[Tensor, Tensor] | None = None
    overviews: dict[int, Features] = field(default_factory=dict)
    picture: Arrival | None = None


class Overviews:
    """Whole frames at LOD background and coarser, alone and as the beginning of a prompt."""

    def __init__(self, qwen: QwenVL, config: Config, encoder: TileEncoder, prefixes: PrefixStore) -> None:
        """Share the pipeline's parts.

        Args:
            qwen: the checkpoint.
            config: geometry, layout, glimpse and overview.
            encoder: encodes the glimpse where it is made of tiles.
            prefixes: where beginnings of prompts are kept.
        """
        self._qwen, self._config, self._encoder, self._prefixes = qwen, config, encoder, prefixes
        self._joint = JointGlimpse(qwen, fused=config.lod_engine != "eager")

    @cached_property
    def head(self) -> tuple[int, ...]:
        """Token ids before an image that begins the first user turn."""
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        return tuple(self._qwen.render([{"role": "user", "content": content}])[0])

    def describe(self) -> str:
        """How whole frames are encoded, in words."""
        return self._joint.describe()

    def open(self, frame: Frame, *, kept: bool, scored: bool) -> Scene:
        """A scene of a frame.

        Args:
            frame: the image.
            kept: whether several questions will be asked.
            scored: whether the scorer runs a prefix for every image.
        """
        answered = self._config.layout is not Layout.REPLACE
        wanted = scored or (answered and (kept or len(self._prefixes) > 0))
        shared = wanted and self._prefixes.max_bytes > 0
        if kept:  # every question looks its tiles up by them
            frame = replace(frame, hashes=frame.hashes.cpu())
        return Scene(frame, kept, digest(frame) if shared else None)

    def features(self, scene: Scene, stride: int, prefix: Prefix | None = None) -> Features:
        """The whole frame with one token for every `stride` of the glimpse along each axis.

        Args:
            scene: the image.
            stride: 1 for the glimpse.
            prefix: a prefix with this overview, which knows its features.
        """
        found = scene.overviews.get(stride)
        if found is None:
            found = self._encode(scene.frame, stride) if prefix is None else prefix.features
            scene.overviews[stride] = found
        return found

    def kept(self, scene: Scene, stride: int, prefix: Prefix | None) -> Features | None:
        """What a plan with this stride keeps of the whole frame; None for stride 0."""
        return self.features(scene, stride, prefix) if stride else None

    def first_look(self, scene: Scene, budget: int, *, scored: bool) -> tuple[Features | None, Prefix | None]:
        """The glimpse, where it is needed, and the prompt up to it, where it is known.

        Args:
            scene: the image.
            budget: tokens.
            scored: whether a scorer looks at it; else it is needed if the answer may take tokens from it.
        """
        config = self._config
        fine = allocation.overview_stride(scene.frame.grid, config, budget) == 1
        if not (scored or fine or config.layout is Layout.REPLACE):
            return None, None
        prefix = self.prefix(scene, 1)
        return self.features(scene, 1, prefix), prefix

    def prefix(self, scene: Scene, stride: int) -> Prefix | None:
        """The prefix with this overview, where it is known."""
        return None if scene.content is None else self._prefixes.get(self._key(scene.content, stride))

    def answering(self, scene: Scene, stride: int, scored: Prefix | None) -> Prefix | None:
        """The prefix that an answer goes on from; None where there is none and making it is not worth it.

        Args:
            scene: the image.
            stride: of the overview that the plan keeps; 0 for none.
            scored: what the scorer looked at, or a prefix that was found before: the glimpse's.
        """
        if not stride or self._config.layout is Layout.REPLACE:
            return None
        if stride == 1 and scored is not None:
            return scored
        found = self.prefix(scene, stride)
        if found is None and scene.kept and scene.content is not None:
            found = self._start(scene, stride)
        return found

    def remember(self, scene: Scene, used: Sequence[tuple[int, Prefix | None]], relevance: float) -> None:
        """Keep prefixes with the stride of their overviews, and count one use of each.

        Args:
            scene: the image.
            used: strides, and prefixes where there were any; those that stand here twice were used once.
            relevance: as for `PrefixStore.use`.
        """
        if scene.content is not None:
            for stride, prefix in {stride: found for stride, found in used if found is not None}.items():
                self._prefixes.use(self._key(scene.content, stride), prefix, relevance)

    def _key(self, content: bytes, stride: int) -> PrefixKey:
        return PrefixKey(content, self._config, stride, self.head)

    def _start(self, scene: Scene, stride: int) -> Prefix:
        """Run all layers over the head and an overview."""
        config, grid = self._config, scene.frame.grid
        return start(
            self._qwen,
            self.head,
            self.features(scene, stride),
            sequence.glimpse_positions(grid, config.sides[0], config.sides[3], stride),
            sequence.extent(grid, config.sides[3]),
            self._qwen.n_layers,
            float8=config.prefix_dtype == "float8",
        )

    def _encode(self, frame: Frame, stride: int) -> Features:
        if stride > 1:
            rows, cols = frame.grid.shape_in_tokens(self._config.sides[0], stride)
            edge = self._qwen.vision.token_px
            return self._joint.encode_pixels(image.overview_pixels(frame, rows * edge, cols * edge))
        if self._config.glimpse == "joint":
            return self._joint.encode(frame)
        everywhere = {Lod.BACKGROUND: torch.arange(frame.grid.count)}
        # No relevance is known yet; a tile earns its place in the cache when a plan uses it.
        (tiles,) = self._encoder.encode(frame, everywhere, torch.zeros(frame.grid.rows, frame.grid.cols))
        return sequence.join_tiles(tiles.features, frame.grid, tiles.side)


def digest(frame: Frame) -> bytes:
    """What tells an image's overviews from another's: the frame at LOD background, hashed tile by tile."""
    grid = frame.grid
    edge = frame.background.shape[1] // grid.rows
    hashes = image.tile_hashes(frame.background.contiguous(), Grid(grid.rows, grid.cols, edge))
    shape = f"{grid.rows} {grid.cols} {edge} ".encode()
    return blake2b(shape + hashes.cpu().numpy().tobytes(), digest_size=16).digest()
