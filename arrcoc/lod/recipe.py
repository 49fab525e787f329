"""Recipes of engine builds: what `arrcoc build` reads, and what it refuses before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arrcoc import config as configs
from arrcoc.config import Config
from arrcoc.errors import ConfigError, EngineBuildError
from arrcoc.lod.built import builder_name, compute_capability
from arrcoc.lod.export import require
from arrcoc.lod.manifest import MANIFEST_FILE, Backend
from arrcoc.lod.plan import PLAN_BACKENDS
from arrcoc.lod.plan_builder import CURRENT

PRESET = "photo"
_FIRST_FLOAT8 = 89
"""Compute capability 8.9 (Ada) is the first with float8 matrix products."""


class Recipe(BaseModel):
    """What to build; the keys of `engines/*.yaml` and the options of `arrcoc build`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    """Folder or hub name of a Qwen3-VL checkpoint; None is the bundled one."""
    preset: str = PRESET
    """A preset's name or a YAML file; it gives sides and halo."""
    backend: Backend
    precision: Literal["fp32", "fp16", "bf16", "fp8"] = "fp16"
    calibrate: Path | None = None
    """Folder of images like those to be asked about; fp8 is calibrated and judged on their tiles."""
    percentile: float = Field(default=100.0, gt=90, le=100)
    """Which percentile of a layer's inputs is the largest that fp8 holds; larger ones are cut off."""
    max_error: float = Field(default=0.1, gt=0)
    """Largest relative error of fp8 encodings on tiles held out from calibration."""
    max_accuracy_loss: float | None = Field(default=None, ge=0, le=1)
    """Largest share of questions that fp8 may cost; None asks none."""
    dataset: str = "placards"
    """Questions to judge fp8 by: placards, or a .jsonl or .parquet file as `arrcoc eval` takes."""
    questions: int = Field(default=200, ge=1)
    """Most questions to judge fp8 by."""
    arch: tuple[str, ...] = ("current",)
    """Compute capabilities to build for, such as sm89; current is that of the GPU at hand."""
    separate: bool = False
    """One plan for each LOD instead of one plan with four optimisation profiles."""
    workspace_gb: float | None = Field(default=None, gt=0)
    """Most GPU memory that one kernel may use besides tensors, in GiB."""
    timing_cache: Path | None = None
    """File of kernel timings, kept from build to build."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """How long the builder searches for fast kernels; None is the library's default, which is 3."""
    max_batch: tuple[int, int, int, int] = (64, 16, 8, 4)
    """Largest batch at LOD background, low, medium, high."""
    plan_stage: tuple[str, ...] = ()
    """Sizes HxW, in pixels, of images whose texture and query-free scores are built as engines too."""
    out: Path
    """Folder to write; an earlier build in it is replaced."""

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Height and width of every `plan_stage`; raises `EngineBuildError` for one that is no size."""
        sizes = []
        for text in self.plan_stage:
            height, _, width = text.partition("x")
            if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
                raise EngineBuildError(f"plan_stage {text!r}", "HxW in pixels, as 2160x3840", "Correct it")
            sizes.append((int(height), int(width)))
        return sizes

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Recipe:
        """From a mapping; raises `ConfigError` naming the first key that is unknown or invalid."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"][:1]))
            missing = first["type"] == "missing"
            given = f"a build without {name}" if missing else f"{name} = {first['input']!r} in a build"
            allowed = (
                f"the keys {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else None
            )
            allowed = allowed or ("a recipe or options that give it" if missing else _clause(first["msg"]))
            raise ConfigError(given, allowed, "Correct the recipe or the option") from None

    @classmethod
    def read(cls, path: Path, changes: Mapping[str, Any]) -> Recipe:
        """From a YAML file, some keys replaced; raises `ConfigError` for one that is not usable."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path}: {reason}", "a YAML recipe", "Check the file") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}, which is no mapping", "a YAML recipe", "Write key: value lines")
        return cls.make(values | dict(changes))


def check(recipe: Recipe) -> Config:
    """Refuse what cannot be built, before a checkpoint is loaded; returns the preset's configuration.

    Raises:
        EngineBuildError: precision, architecture, a missing package, or an output folder in use.
        ConfigError: no such preset.
    """
    _check_float8(recipe)
    if recipe.backend == "onnx" and recipe.precision == "bf16":
        given = "precision bf16 with backend onnx, whose CPU provider does not compute in it"
        raise EngineBuildError(given, "fp32 or fp16", "Choose one of these")
    if recipe.backend not in PLAN_BACKENDS and recipe.arch != ("current",):
        given = f"--arch {','.join(recipe.arch)} with backend {recipe.backend}"
        raise EngineBuildError(given, "current, since nothing in it depends on the GPU", "Leave it out")
    for name in ("separate", "workspace_gb", "optimization_level"):
        given = getattr(recipe, name)
        if recipe.backend not in PLAN_BACKENDS and given is not None and given is not False:
            raise EngineBuildError(
                f"{name} with backend {recipe.backend}", "a backend with plans", "Leave it out"
            )
    if recipe.timing_cache is not None and recipe.backend != "tensorrt":
        given = f"timing_cache with backend {recipe.backend}, which times nothing while it builds"
        raise EngineBuildError(given, "backend tensorrt", "Leave it out")
    if min(recipe.max_batch) < 1:
        raise EngineBuildError(f"max_batch {recipe.max_batch}", "1 and above", "Correct the sizes")
    if recipe.image_sizes and recipe.backend == "torch":
        given = "plan_stage with backend torch, which measures and scores without a build"
        raise EngineBuildError(given, "another backend", "Leave it out")
    if recipe.backend != "torch":
        require("onnx", "onnxscript", *(["onnxruntime"] if recipe.backend == "onnx" else []))
    builder_name(recipe.backend)
    out = recipe.out
    if out.exists() and not ((out / MANIFEST_FILE).is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise EngineBuildError(
            f"{out}, which holds something else", "a new folder or an earlier build", "Name one"
        )
    if recipe.preset == "auto":
        names = ", ".join(configs.preset_names())
        raise ConfigError("preset 'auto' for a build", f"{names}, or a YAML file", "Choose one of these")
    return configs.load(recipe.preset)


def _check_float8(recipe: Recipe) -> None:
    if recipe.precision != "fp8":
        for name in ("calibrate", "max_accuracy_loss"):
            if getattr(recipe, name) is not None:
                given = f"{name} with precision {recipe.precision}"
                raise EngineBuildError(given, "precision fp8", "Leave it out, or choose this")
        return
    if recipe.backend not in PLAN_BACKENDS:
        given = f"precision fp8 with backend {recipe.backend}"
        raise EngineBuildError(given, "a backend with plans", "Choose tensorrt or tensorrt_rtx")
    if recipe.calibrate is None:
        given = "precision fp8 without images to calibrate on"
        raise EngineBuildError(given, "a folder of images", "Name yours with --calibrate")
    here = compute_capability(torch.device("cuda")) if torch.cuda.is_available() else None
    for arch in (here or CURRENT if name == CURRENT else name for name in recipe.arch):
        if arch != CURRENT and not _has_float8(arch):
            given = f"precision fp8 for {arch}, which has no float8"
            raise EngineBuildError(given, "sm89 and above", "Leave it out, or build fp16 for it")


def _has_float8(arch: str) -> bool:
    number = arch.removeprefix("sm")
    return not number.isdigit() or int(number) >= _FIRST_FLOAT8


def _clause(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Input should be ")
