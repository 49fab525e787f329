"""What `Engine.encode` gives back: vision tokens for one image and one question, and how they came about."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arrcoc.devices import resolve_device
from arrcoc.errors import EncodingError
from arrcoc.records import Grid, Layout, Lod, Scores, Segment, Tensions, VisionSequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "arrcoc encoding 1"


@dataclass(frozen=True, slots=True)
class Encoding:
    """A query-aware encoding of one image.

    Attributes:
        tokens: [n, D] vision tokens in the model's precision.
        deepstack: [L, n, D] DeepStack planes.
        positions: fp32 [3, n] (t, h, w), relative to the position at which each segment starts.
        segments: runs of tokens that stand between vision_start and vision_end of their own.
        lod: int64 [R, C] on the CPU, values of `arrcoc.Lod`.
        relevance: fp32 [R, C] on the CPU, in [0, 1].
        scores: the three maps behind it, fp32 [R, C] on the CPU.
        tensions: the three opponent tensions.
        sides: tokens along a tile's edge for each LOD.
        layout: how the tokens are laid out.
        overview_stride: how much coarser than LOD background, along each axis, the overview is with which the
            tokens begin; 1 is the glimpse itself, 0 no overview.
        question: what was asked.
        budget: most tokens allowed.
        full_tokens: tokens of the whole frame at LOD high.
        source_size: height and width of the image in pixels.
        frame_size: height and width of the frame in pixels.
        distortion: relative change of the aspect ratio, 0 for none.
        picture: uint8 [3, h, w] on the CPU, the frame at no more than 1024 pixels a side, for plots.
        fingerprint: of the vision weights that made it.
        timings: milliseconds per stage of making it, `total` included.
    """

    tokens: Tensor
    deepstack: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    lod: Tensor
    relevance: Tensor
    scores: Scores
    tensions: Tensions
    sides: tuple[int, int, int, int]
    layout: Layout
    overview_stride: int
    question: str
    budget: int
    full_tokens: int
    source_size: tuple[int, int]
    frame_size: tuple[int, int]
    distortion: float
    picture: Tensor
    fingerprint: str
    timings: dict[str, float]

    @property
    def n_tokens(self) -> int:
        """Vision tokens in all."""
        return int(self.tokens.shape[0])

    @property
    def share(self) -> float:
        """Tokens as a share of full resolution."""
        return self.n_tokens / self.full_tokens

    @property
    def overview_tokens(self) -> int:
        """Vision tokens of the overview; the others are the tiles'."""
        if not self.overview_stride:
            return 0
        rows, cols = self.lod.shape
        grid = Grid(rows, cols, tile=self.sides[Lod.HIGH])
        return math.prod(grid.shape_in_tokens(self.sides[Lod.BACKGROUND], self.overview_stride))

    @property
    def lod_counts(self) -> dict[str, int]:
        """Number of tiles at each LOD."""
        return {lod.name.lower(): int((self.lod == lod).sum()) for lod in Lod}

    @property
    def sequence(self) -> VisionSequence:
        """The tokens as the prompt builder takes them."""
        return VisionSequence(self.tokens, self.deepstack, self.positions, self.segments)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the image, the scores, the relevance and the LODs; written to `path` if one is given."""
        from arrcoc import plot  # matplotlib is slow to import and most callers never draw

        figure = plot.overview(
            self.picture.permute(1, 2, 0).cpu().numpy(),
            {name: getattr(self.scores, name).numpy() for name in Scores.__slots__},
            self.relevance.numpy(),
            self.lod.numpy(),
            self.sides,
            title=self.question,
            tokens=self.n_tokens,
            full_tokens=self.full_tokens,
            tensions=self.tensions,
            overview_tokens=self.overview_tokens,
        )
        if path is not None:
            plot.save(figure, path)
        return figure

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; it appears whole or not at all.

        Raises:
            EncodingError: the file cannot be written.
        """
        target = Path(path)
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {f"scores.{name}": getattr(self.scores, name) for name in Scores.__slots__}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": _FORMAT, "record": json.dumps(self._facts())}
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            save_file(plain, scratch, metadata)
            os.replace(scratch, target)
        except (OSError, SafetensorError) as error:
            given = f"{target} cannot be written ({_first_line(error)})"
            raise EncodingError(given, "a writable path", "Name another one") from error
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Encoding:
        """Read what `save` wrote, bit for bit.

        Args:
            path: the file.
            device: where tokens, DeepStack planes and positions go, as for `Engine.from_pretrained`.

        Raises:
            EncodingError: not there, damaged, or not an encoding.
            ConfigError: no such device.
        """
        place = resolve_device(device)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise _unreadable(path, f"format {metadata.get('format')!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return cls._from_parts(tensors, json.loads(metadata["record"]), place)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _unreadable(path, _first_line(error)) from error

    @classmethod
    def _from_parts(
        cls, tensors: Mapping[str, Tensor], facts: dict[str, Any], device: torch.device
    ) -> Encoding:
        made = cls(
            tokens=tensors["tokens"].to(device),
            deepstack=tensors["deepstack"].to(device),
            positions=tensors["positions"].to(device),
            lod=tensors["lod"],
            relevance=tensors["relevance"],
            picture=tensors["picture"],
            scores=Scores(*(tensors[f"scores.{name}"] for name in Scores.__slots__)),
            segments=tuple(Segment(**segment) for segment in facts["segments"]),
            tensions=Tensions(*map(float, facts["tensions"])),
            sides=_ints(facts["sides"], 4),
            layout=Layout(facts["layout"]),
            overview_stride=int(facts.get("overview_stride", _stride_of_old(facts, tensors["lod"]))),
            question=str(facts["question"]),
            budget=int(facts["budget"]),
            full_tokens=int(facts["full_tokens"]),
            source_size=_ints(facts["source_size"], 2),
            frame_size=_ints(facts["frame_size"], 2),
            distortion=float(facts["distortion"]),
            fingerprint=str(facts["fingerprint"]),
            timings={str(stage): float(value) for stage, value in facts["timings"].items()},
        )
        made._check()
        return made

    def _check(self) -> None:
        """Raise ValueError unless the parts of a file fit together."""
        count, width = self.tokens.shape
        maps = (self.lod, self.relevance, *(getattr(self.scores, name) for name in Scores.__slots__))
        bounds = [0, *(segment.stop for segment in self.segments)]
        whole = (
            self.deepstack.shape[1:] == (count, width)
            and self.positions.shape == (3, count)
            and self.picture.shape[0] == 3
            and {m.shape for m in maps} == {self.lod.shape}
            and self.lod.dim() == 2
            and bounds[:-1] == [segment.start for segment in self.segments]
            and bounds[-1] == count
            and self.overview_stride >= 0
            and self.overview_tokens <= count
        )
        if not whole:
            raise ValueError("its parts do not fit together")

    def _facts(self) -> dict[str, Any]:
        """All that is not a tensor, as JSON."""
        named = {name: getattr(self, name) for name in _PLAIN}
        return named | {"layout": self.layout.value, "segments": [asdict(s) for s in self.segments]}


_TENSORS = ("tokens", "deepstack", "positions", "lod", "relevance", "picture")
_PLAIN = (
    *("question", "overview_stride", "budget", "full_tokens", "distortion", "fingerprint", "timings"),
    *("sides", "source_size", "frame_size", "tensions"),
)


def thumbnail(pixels: Tensor, longest: int = 1024) -> Tensor:
    """uint8 [3, h, w] no larger than `longest` pixels a side; strided first, so a huge frame costs little."""
    stride = max(1, max(pixels.shape[1:]) // (2 * longest))
    coarse = pixels[:, ::stride, ::stride]
    ratio = longest / max(coarse.shape[1:])
    if ratio >= 1:
        return coarse.clone()
    size = [max(1, round(edge * ratio)) for edge in coarse.shape[1:]]
    return torch.nn.functional.interpolate(coarse[None].float(), size, mode="area")[0].round().to(torch.uint8)


def _ints(values: Any, count: int) -> Any:
    """A tuple of `count` whole numbers; ValueError if there are more or fewer."""
    numbers = tuple(int(value) for value in values)
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers where {count} belong")
    return numbers


def _stride_of_old(facts: Mapping[str, Any], lod: Tensor) -> int:
    """Of a file from before there were coarser overviews: the glimpse, unless all is high or replaced."""
    whole = bool((lod == Lod.HIGH).all())
    return 0 if whole or facts["layout"] == Layout.REPLACE.value else 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _unreadable(path: str | Path, reason: str) -> EncodingError:
    given = f"{path} is not a readable encoding ({reason})"
    return EncodingError(given, "a file written by Encoding.save", "Encode again")
