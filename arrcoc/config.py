"""One configuration record; presets and run configurations are YAML files with its fields as keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from arrcoc.errors import ConfigError
from arrcoc.records import Layout

Sides = tuple[int, int, int, int]


class Config(BaseModel):
    """Everything that can be set, with its default; unknown keys are refused.

    Sizes are in merged vision tokens (`sides`), pixels (`max_source_pixels`), tiles (`max_tiles`) or bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Geometry.
    sides: Sides = (2, 4, 6, 8)
    """Tokens along one edge of a tile at LOD background, low, medium, high; ascending."""
    max_tiles: int = Field(default=256, ge=1)
    """Most tiles of a frame; larger images are scaled down to fit."""
    max_distortion: float = Field(default=0.1, gt=0)
    """Largest relative change of the aspect ratio; beyond it the frame is padded instead."""
    max_source_pixels: int = Field(default=400_000_000, ge=1)
    """Largest source image, in pixels; larger ones are refused before they are decoded."""
    jpeg: Literal["auto", "cpu", "gpu"] = "auto"
    """What decodes JPEG files: Pillow on the CPU, or nvJPEG where they are plain; auto takes nvJPEG on CUDA
    where it works."""

    # Texture and scorers.
    cells: int = Field(default=16, ge=4)
    """Texture cells along one edge of a tile."""
    participatory: Literal["auto", "glimpse", "texture"] = "auto"
    """Which participatory scorer judges; auto takes the learned texture head where its weights lie
    beside the model."""
    glimpse: Literal["joint", "tiles"] = "joint"
    """Whether the glimpse is encoded as one ordinary image or tile by tile."""
    halo: int = Field(default=0, ge=0, le=4)
    """Tokens of margin that are encoded around every tile and dropped afterwards."""
    probe_depth: tuple[float, ...] = (0.4, 0.5, 0.6)
    """Decoder layers at which attention is probed, as fractions of the depth."""
    generic_prompt: str = "Write a general description of the image."
    """Prompt whose attention the question's attention is divided by."""
    attention_gain: float = Field(default=1.0, gt=0)
    """Exponent of the relative attention before it is squashed to [0, 1]."""
    sink_ratio: float = Field(default=4.0, gt=1)
    """Glimpse tokens whose hidden norm exceeds this multiple of the median are treated as sinks."""

    # Opponent processing (constants of the closed forms in `arrcoc.opponent`).
    flat_contrast: float = Field(default=0.02, gt=0)
    """Participatory contrast below which relevance falls back towards uniform."""
    confident_contrast: float = Field(default=0.25, gt=0)
    """Participatory contrast at which exploitation is complete."""
    gain: float = Field(default=1.5, ge=0)
    """Strength of compress-particularize: the relevance exponent spans [1/(1+gain), 1+gain]."""
    lateral: float = Field(default=0.5, ge=0)
    """Strength of diversify-focus."""

    # Allocation.
    mode: Literal["budget", "threshold"] = "budget"
    budget: int | float = 0.25
    """Default budget of a request: a share of full resolution (0..1] or a whole number of tokens."""
    thresholds: tuple[float, float, float] = (0.25, 0.5, 0.75)
    """Relevance at which a tile reaches LOD low, medium, high in threshold mode."""
    utility_exponent: float = Field(default=1.0, gt=0, le=2)
    """Utility of a LOD is (side / highest side) ** utility_exponent."""
    min_lod: int = Field(default=0, ge=0, le=3)
    """Least LOD of every tile."""
    max_lod: int = Field(default=3, ge=0, le=3)
    """Highest LOD of any tile."""
    lod_limits: tuple[int | None, int | None, int | None] = (None, None, None)
    """Most tiles at LOD low or above, medium or above, and high."""

    # Sequence.
    layout: Layout = Layout.REFINE
    overview_stride: Annotated[int, Field(ge=1, le=8)] | Literal["auto"] = "auto"
    """How much coarser than the glimpse, along each axis, the overview is that an answer keeps of the whole
    frame (`refine` and `crops`); auto takes the least of 1 to 4 that keeps within `overview_share`."""
    overview_share: float = Field(default=0.5, gt=0, le=1)
    """Most of a request's budget that the overview may take where `overview_stride` is auto."""
    order: Literal["raster", "tile"] = "raster"
    """Token order inside `replace` and inside the refined tiles of `refine`: by position, or tile by tile."""

    # Encoder and cache.
    lod_engine: Literal["auto", "eager", "graphed"] = "auto"
    """What runs torch's LOD engines: fused kernels in CUDA graphs, or the stock layers one by one; auto takes
    the first on CUDA with Triton, in bfloat16 or float16."""
    lod_precision: Literal["auto", "float8"] = "auto"
    """Whether torch's LOD engines compute in the model's precision, or in float8 (needs torchao)."""
    lod_error_limit: float = Field(default=0.05, gt=0)
    """Largest relative error of float8 encodings against the model's precision; above it they are refused."""
    lod_streams: Literal["auto", "one", "each"] = "auto"
    """Whether a request's LODs run one after another in one memory (`one`), or on a CUDA stream each with
    memory of its own (`each`); auto takes streams for small batches, where that is faster."""
    buckets: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 10, 12, 14, *range(16, 81, 4))
    """Batch sizes that a LOD engine runs at; smaller batches are padded up to one of them."""
    cache_bytes: int = Field(default=1 << 30, ge=0)
    """Bound of the tile cache's first tier, in bytes; 0 with no host tier switches the cache off."""
    cache_location: Literal["device", "host"] = "device"
    """Whether that tier is where the model is, or in host memory."""
    cache_host_bytes: int = Field(default=0, ge=0)
    """Bound of the tier in pinned host memory, which takes what the device has no room for; 0 for none."""
    cache_disk_bytes: int = Field(default=0, ge=0)
    """Bound of the tier on disk, which takes what memory has no room for; 0 for none."""
    cache_disk_path: str | None = None
    """Folder of the tier on disk, which processes may share; by default below the user's cache folder."""
    cache_disk_ttl: float = Field(default=7 * 86_400.0, gt=0)
    """Seconds after its writing that a tile stays on disk."""
    cache_half_life: float = Field(default=256.0, gt=0)
    """Uses of the cache after which a tile's relevance score has halved."""
    prefetch: Literal["auto", "on", "off"] = "auto"
    """Whether an opened image's likely next tiles are encoded while nobody waits; auto does so on CUDA."""
    prefetch_tiles: int = Field(default=32, ge=0)
    """Most tiles that are encoded ahead after one question."""
    prefix_bytes: int = Field(default=1 << 30, ge=0)
    """Bound of the keys and values kept of images' overviews, in bytes; 0 switches that off."""
    prefix_dtype: Literal["auto", "float8"] = "auto"
    """Whether those are kept as they are computed, or in float8 (e4m3), at half the bytes of bfloat16."""

    # Decoding.
    max_new_tokens: int = Field(default=256, ge=1)
    decoder: Literal["auto", "eager", "graphed"] = "auto"
    """Whether a decode step is launched operation by operation, or captured once with static memory; auto
    captures on CUDA."""
    decode_weights: Literal["bf16", "int8", "float8"] = "bf16"
    """Format of the matrices of the text decoder's layers: the model's own (`bf16`), or one byte each with a
    scale a row, by torchao."""
    decode_bytes: int = Field(default=4 << 30, ge=0)
    """Most bytes of keys and values that the captured decoder keeps between requests."""
    prefill_chunk: int | None = Field(default=None, ge=1)
    """Most positions that one pass of a prefill takes; None for a whole prompt at once."""
    speculative: str = "none"
    """What proposes tokens that greedy decoding then checks several at a time: `none`, `prompt_lookup`, or
    the folder of a small checkpoint with the same vocabulary. The tokens stay the same."""
    max_question_chars: int = Field(default=20_000, ge=1)
    """Longest question, in characters."""

    @field_validator("sides")
    @classmethod
    def _sides_ascend(cls, sides: Sides) -> Sides:
        if sides[0] < 1 or any(a >= b for a, b in pairwise(sides)):
            raise ValueError("sides must ascend from at least 1, for example [2, 4, 6, 8]")
        return sides

    @field_validator("probe_depth")
    @classmethod
    def _probes_inside(cls, depth: tuple[float, ...]) -> tuple[float, ...]:
        if not depth or not all(0 < d <= 1 for d in depth):
            raise ValueError("probe_depth needs one or more fractions in (0, 1]")
        return depth

    @field_validator("thresholds")
    @classmethod
    def _thresholds_ascend(cls, cuts: tuple[float, float, float]) -> tuple[float, float, float]:
        if not 0 <= cuts[0] <= cuts[1] <= cuts[2] <= 1:
            raise ValueError("thresholds must ascend within [0, 1]")
        return cuts

    @field_validator("buckets")
    @classmethod
    def _buckets_ascend(cls, buckets: tuple[int, ...]) -> tuple[int, ...]:
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in pairwise(buckets)):
            raise ValueError("buckets must ascend from at least 1")
        return buckets

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.min_lod > self.max_lod:
            raise ValueError("min_lod must not exceed max_lod")
        gains = [u / c for u, c in zip(self.utility_steps, self.step_costs, strict=True)]
        if any(a < b - 1e-12 for a, b in pairwise(gains)):
            raise ValueError(
                "utility per token must not rise with LOD: choose other sides or utility_exponent"
            )
        return self

    @property
    def utilities(self) -> tuple[float, ...]:
        """Utility of each LOD, (side / S) ** utility_exponent."""
        return tuple((s / self.sides[3]) ** self.utility_exponent for s in self.sides)

    @property
    def utility_steps(self) -> tuple[float, ...]:
        """Utility gained by each step up in LOD."""
        return tuple(b - a for a, b in pairwise(self.utilities))

    @property
    def lod_costs(self) -> tuple[int, ...]:
        """Tokens that a tile adds at each LOD; in `refine` and `crops` the overview pays for background."""
        squares = tuple(s * s for s in self.sides)
        return squares if self.layout is Layout.REPLACE else (0, *squares[1:])

    @property
    def step_costs(self) -> tuple[int, ...]:
        """Tokens added by each step up in LOD."""
        return tuple(b - a for a, b in pairwise(self.lod_costs))

    def updated(self, overrides: Mapping[str, Any]) -> Config:
        """A copy with some fields replaced; raises `ConfigError` for unknown or invalid ones."""
        return build(self.model_dump() | dict(overrides)) if overrides else self


def build(values: Mapping[str, Any]) -> Config:
    """Make a `Config` from a mapping; raises `ConfigError` naming the nearest valid key."""
    for key in values:
        if key not in Config.model_fields:
            near = difflib.get_close_matches(str(key), Config.model_fields, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key {key!r}", "the fields of arrcoc.Config", f"Did you mean {near!r}")
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise _readable(error, values) from None


def _readable(error: ValidationError, values: Mapping[str, Any]) -> ConfigError:
    """The first invalid field of a validation error, in this package's words."""
    first, *rest = error.errors(include_url=False)
    if not first["loc"]:  # a check between fields: show the fields that its message names
        allowed = _reason(first["msg"])
        names = [name for name in Config.model_fields if re.search(rf"\b{name}\b", allowed)]
        shown = {name: values.get(name, Config.model_fields[name].default) for name in names}
        return ConfigError(
            ", ".join(f"{k} = {v!r}" for k, v in shown.items()), allowed, "Correct these values"
        )
    name, *inner = first["loc"]
    if first["type"] == "missing":
        missing = f"one value more: item {inner[-1]} is missing"
        return ConfigError(f"{name} = {first['input']!r}", missing, "Correct this value")
    field = f"{name}" + "".join(f"[{part}]" for part in inner if isinstance(part, int))
    # Every branch of a union fails with an error of its own.
    reasons = [
        _reason(e["msg"]) for e in (first, *rest) if e["loc"][:1] == (name,) and e["input"] is first["input"]
    ]
    allowed = " or ".join(dict.fromkeys(reasons))
    return ConfigError(f"{field} = {first['input']!r}", allowed, "Correct this value")


def _reason(message: str) -> str:
    """A pydantic message as a clause that can follow "Allowed:"."""
    clause = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return re.sub(r", (unable to|got a) .*$", "", clause)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in _preset_folder().glob("*.yaml"))


def load(preset: str | Path) -> Config:
    """Load a preset by name, or any YAML file by path.

    Raises:
        ConfigError: no such preset or file, not a YAML mapping, unknown or invalid keys.
    """
    path = Path(preset)
    if path.suffix not in {".yaml", ".yml"}:
        path = _preset_folder() / f"{preset}.yaml"
    if not path.is_file():
        names = ", ".join(["auto", *preset_names()])
        raise ConfigError(f"preset {str(preset)!r}", f"{names}, or a YAML file", "Choose one of these")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path.name}: {reason}", "a YAML mapping", "Correct the file") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path.name} holds a {type(values).__name__}", "a YAML mapping", "Write key: value lines"
        )
    return build(values)


_AUTO = (("demo", 1024**2), ("photo", 4096**2), ("gigapixel", None))
"""Presets that `auto` chooses from, each with the largest image it serves, in pixels.

The coarsest tiles that still give an image sixteen or more of them, without scaling it down.
"""


@dataclass(frozen=True)
class PresetChoice:
    """Which configuration serves an image.

    Attributes:
        name: what was asked for.
        by_name: the configurations in question, smallest images first.
    """

    name: str
    by_name: dict[str, Config]

    @classmethod
    def make(cls, preset: str | Path, overrides: Mapping[str, Any]) -> PresetChoice:
        """From `auto`, a preset's name or a YAML file, with overrides applied to each.

        Raises:
            ConfigError: as `load` and `build`.
        """
        names = [name for name, _ in _AUTO] if str(preset) == "auto" else [str(preset)]
        return cls(str(preset), {name: load(name).updated(overrides) for name in names})

    @property
    def base(self) -> Config:
        """The first of them: for settings that do not depend on the image."""
        return next(iter(self.by_name.values()))

    def choose(self, height: int, width: int) -> Config:
        """The configuration for an image of this size."""
        if len(self.by_name) == 1:
            return self.base
        fitting = next(name for name, most in _AUTO if most is None or height * width <= most)
        return self.by_name[fitting]


def _preset_folder() -> Path:
    """The packaged presets; in a source checkout they lie beside the package."""
    packaged = Path(str(resources.files("arrcoc"))) / "configs"
    return packaged if packaged.is_dir() else packaged.parent.parent / "configs"
