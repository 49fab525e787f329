"""`manifest.json`: what a folder of LOD engines was built from and for, verified before it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from arrcoc.digests import file_digest
from arrcoc.errors import EngineMismatchError

MANIFEST_FILE = "manifest.json"

Backend = Literal["tensorrt", "tensorrt_rtx", "onnx", "torch"]
Precision = Literal["fp32", "fp16", "bf16", "fp8"]
_UNIDENTIFIED = {"fingerprint", "model", "preset", "build_seconds"}
"""Fields that features do not depend on: two builds that differ in these alone share cached tiles."""


class PlanFile(BaseModel):
    """One file of a build: its size in bytes and its SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class LodPlan(BaseModel):
    """What serves one LOD: a file (None for torch), its optimisation profile, and its largest batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    side: int
    file: str | None
    profile: int
    max_batch: int


class FrameGraph(BaseModel):
    """The file that measures and scores frames of one shape, at so many texture cells to a tile's edge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    height: int
    width: int
    cells: int
    file: str


class Accuracy(BaseModel):
    """Share of questions answered right, without and with fp8."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    questions: int
    plain: float
    fp8: float

    @property
    def loss(self) -> float:
        """How much of all questions fp8 costs; negative where it happens to help."""
        return self.plain - self.fp8


class Calibration(BaseModel):
    """How an fp8 build was calibrated, and what it costs.

    Attributes:
        tiles: of each LOD, those held out included.
        percentile: of the magnitudes in a batch that counts as the largest.
        error: by output, relative error of the encodings of tiles held out.
        max_error: the limit that was set.
        accuracy: what it costs in answers, where that was asked.
        max_accuracy_loss: the limit that was set on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tiles: tuple[int, ...]
    percentile: float
    error: dict[str, float]
    max_error: float
    accuracy: Accuracy | None = None
    max_accuracy_loss: float | None = None


class Manifest(BaseModel):
    """Facts about a build; `fingerprint` covers all that its features depend on.

    Attributes:
        format: version of this file's layout.
        backend: what runs the engines.
        builder: name and version of what built them.
        arrcoc: version that built them.
        model: name or folder of the checkpoint, for people; None for the bundled one.
        weights: fingerprint of the vision weights in `precision` (`QwenVL.fingerprint_in`).
        tower: the vision tower's dimensions.
        preset: name or file of the preset, for people.
        halo: tokens of margin.
        lods: background, low, medium, high.
        precision: of weights and activations; the rotary embedding is in fp32 always, and all but the block
            linears in fp16 where this is fp8.
        calibration: of an fp8 build.
        archs: compute capabilities built for, `current` for the one of the building machine.
        separate: whether each LOD has a plan of its own.
        arch: compute capability of the building machine, such as `sm90`; None without a GPU.
        opset: of the ONNX graph; None for torch.
        plan_stage: what measures and scores frames, by their shape.
        files: by name, everything that loading reads.
        build_seconds: from the loaded checkpoint to the written files.
        fingerprint: see `Manifest.identity`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    backend: Backend
    builder: str
    arrcoc: str
    model: str | None
    weights: str
    tower: dict[str, int]
    preset: str
    halo: int
    lods: tuple[LodPlan, LodPlan, LodPlan, LodPlan]
    precision: Precision
    calibration: Calibration | None = None
    archs: tuple[str, ...]
    separate: bool
    arch: str | None
    opset: int | None
    plan_stage: tuple[FrameGraph, ...] = ()
    files: dict[str, PlanFile]
    build_seconds: float
    fingerprint: str = ""

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens along a tile's edge at each LOD."""
        return tuple(lod.side for lod in self.lods)

    def identity(self) -> str:
        """Hex digest of every field but those for people alone, and so of the files' SHA-256 too."""
        # As builds before there were such fields.
        unused = {name for name in ("plan_stage", "calibration") if not getattr(self, name)}
        facts = self.model_dump(mode="json", exclude=_UNIDENTIFIED | unused)
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def sealed(self) -> Manifest:
        """A copy with its fingerprint filled in."""
        return self.model_copy(update={"fingerprint": self.identity()})

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")

    def rebuild(self, folder: Path) -> str:
        """The remedy of every mismatch: how to build these engines again."""
        given = {
            "--model": self.model,
            "--preset": self.preset,
            "--backend": self.backend,
            "--precision": self.precision,
            "--calibrate": "FOLDER" if self.calibration else None,
            "--arch": ",".join(self.archs),
            "--max-batch": ",".join(str(lod.max_batch) for lod in self.lods),
            "--plan-stage": ",".join(f"{g.height}x{g.width}" for g in self.plan_stage) or None,
            "--out": folder,
        }
        options = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        return f"Build again: arrcoc build {options}" + (" --separate" if self.separate else "")

    def mismatch(self, folder: Path, field: str, given: object, allowed: object) -> EngineMismatchError:
        """The error for one field that does not fit what is at hand."""
        return EngineMismatchError(
            f"{folder}: {field} of the engines is {_shown(given)}",
            f"{_shown(allowed)} here",
            self.rebuild(folder),
        )

    def verify_files(self, folder: Path) -> None:
        """Check every file's size and SHA-256.

        Raises:
            EngineMismatchError: a file is missing or changed.
        """
        for name, known in self.files.items():
            self._verify_size(folder, name, known)
            digest = file_digest(folder / name, hashlib.sha256())
            if digest != known.sha256:
                raise self.mismatch(folder, f"sha256 of {name}", known.sha256, digest)

    def read_file(self, folder: Path, name: str) -> bytes:
        """A file's bytes, verified: what is returned is what was hashed.

        Raises:
            EngineMismatchError: it is missing or changed.
        """
        known = self.files[name]
        self._verify_size(folder, name, known)
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != known.sha256:
            raise self.mismatch(folder, f"sha256 of {name}", known.sha256, digest)
        return data

    def _verify_size(self, folder: Path, name: str, known: PlanFile) -> None:
        path = folder / name
        if not path.is_file():
            raise EngineMismatchError(f"{path} is missing", "all files of the build", self.rebuild(folder))
        if path.stat().st_size != known.bytes:
            raise self.mismatch(folder, f"size of {name}", known.bytes, path.stat().st_size)


def record_files(folder: Path, names: Iterable[str]) -> dict[str, PlanFile]:
    """Sizes and SHA-256 of files in a folder."""
    found = {}
    for name in sorted(names):
        digest = file_digest(folder / name, hashlib.sha256())
        found[name] = PlanFile(bytes=(folder / name).stat().st_size, sha256=digest)
    return found


def read(folder: Path) -> Manifest:
    """Read a build's manifest and check it against its own fingerprint; no other file is touched.

    Raises:
        EngineMismatchError: missing, unreadable, of another format, or changed after the build.
    """
    path, remedy = folder / MANIFEST_FILE, "Name a folder that arrcoc build wrote, or build again with it"
    if not path.is_file():
        raise EngineMismatchError(f"{folder} has no {MANIFEST_FILE}", "a folder of built engines", remedy)
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        given = f"{path}: {field} ({first['msg']})"
        raise EngineMismatchError(given, "a manifest of format 1", remedy) from None
    except (ValueError, OSError) as error:
        given = f"{path}: {str(error).splitlines()[0]}"
        raise EngineMismatchError(given, "a manifest of format 1", remedy) from None
    if manifest.fingerprint != manifest.identity():
        raise manifest.mismatch(folder, "fingerprint", manifest.fingerprint, manifest.identity())
    for name in manifest.files:
        if Path(name).name != name:
            raise EngineMismatchError(f"{path}: file {name!r}", "names of files in the same folder", remedy)
    return manifest


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
