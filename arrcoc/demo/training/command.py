"""`arrcoc demo train` behind its command line: checks, processes, curves while it runs, record at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from arrcoc.demo.training import curves, measure
from arrcoc.demo.training.export import WEIGHTS, export
from arrcoc.demo.training.loop import STATE, Run, Trainer, describe
from arrcoc.demo.training.recipe import Recipe
from arrcoc.demo.training.skeleton import make_skeleton
from arrcoc.errors import ConfigError, ModelError
from arrcoc.provenance import commit, versions
from arrcoc.report import write_json

logger = logging.getLogger("arrcoc.demo.training")

RECORD, CHECKPOINT, SKELETON = "record.json", "checkpoint", "skeleton"
SOURCES = ("drawn", "composed")
HELD_OUT = ((1024, 16, 24), (512, 6, 32), (2048, 6, 6))
"""Canvas side in px, batches and examples in a batch that the trained weights are measured on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    Attributes:
        folder: of the run; a run that is already there goes on.
        steps: optimiser steps, None for the recipe's.
        seed: of weights and questions.
        devices: GPUs of this machine.
        workers: processes that draw batches, for each device.
        stop_after: seconds after which the run saves itself and stops, None for never.
        photographs: folder of further photographs for backgrounds.
        initial: exported checkpoint folder to start from.
        begin: share of the curriculum to skip.
        source: "drawn" or "composed", None for the recipe's.
        batch_scale: factor of every batch size.
        measure: most held-out batches of a canvas size; 0 for none.
    """

    folder: Path
    steps: int | None = None
    seed: int = 0
    devices: int = 1
    workers: int = 2
    stop_after: float | None = None
    photographs: Path | None = None
    initial: Path | None = None
    begin: float = 0.0
    source: str | None = None
    batch_scale: float = 1.0
    measure: int = 16


def check(settings: Settings) -> None:
    """Refuse what cannot be trained with, before anything is written or started.

    Raises:
        ConfigError: a number out of range, a folder that is not there or cannot be written.
        ModelError: `initial` holds no weights.
    """
    found = torch.cuda.device_count()
    _check_numbers(settings)
    if settings.devices > max(1, found):
        given = f"{settings.devices} devices"
        raise ConfigError(given, f"1 to {max(1, found)} on this machine", "Lower --devices")
    if settings.photographs is not None and not settings.photographs.is_dir():
        given = f"photographs {settings.photographs}: no such folder"
        raise ConfigError(given, "a folder of photographs", "Check the path, or leave it out")
    if settings.initial is not None and not (settings.initial / WEIGHTS).is_file():
        given = f"{settings.initial} without {WEIGHTS}"
        raise ModelError(given, "an exported checkpoint folder", "Check the path, or start from nothing")
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given = f"folder {settings.folder}: {error.strerror}"
        raise ConfigError(given, "a writable folder", "Name another one with --out") from error


def _check_numbers(settings: Settings) -> None:
    limits: dict[str, tuple[bool, str]] = {
        "steps": (settings.steps is None or settings.steps >= 1, "1 or more"),
        "seed": (settings.seed >= 0, "0 or more"),
        "devices": (settings.devices >= 1, "1 or more"),
        "workers": (settings.workers >= 0, "0 or more"),
        "stop_after": (settings.stop_after is None or settings.stop_after >= 0, "0 seconds or more"),
        "begin": (0 <= settings.begin < 1, "from 0 to below 1"),
        "source": (settings.source is None or settings.source in SOURCES, " or ".join(SOURCES)),
        "batch_scale": (0 < settings.batch_scale < math.inf, "above 0"),
        "measure": (settings.measure >= 0, "0 or more"),
    }
    for name, (usable, allowed) in limits.items():
        if not usable:
            given = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise ConfigError(given, allowed, "Correct it")


def train(settings: Settings) -> dict[str, Any]:
    """Train in this process, or in one for each of several devices; returns the record of the run.

    Raises:
        ConfigError, ModelError: as `check`, or the folder holds something else.
        RuntimeError: a process of several failed.
    """
    check(settings)
    if settings.devices > 1:
        launch(settings)
    else:
        work(settings)
    record: dict[str, Any] = json.loads((settings.folder / RECORD).read_text("utf-8"))
    return record


def launch(settings: Settings) -> None:
    """Start torchrun with one process for each device, and wait for it.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.Popen(launch_command(settings))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached torchrun too, and it ends the others
        raise
    if code:
        raise RuntimeError(f"the processes of the training ended with exit code {code}")


def launch_command(settings: Settings) -> list[str]:
    """The command line that trains on several devices: torchrun, then `python -m arrcoc.demo.training`."""
    given = [
        f"--{field.name.replace('_', '-')}={getattr(settings, field.name)}"
        for field in fields(settings)[1:]
        if field.name != "devices" and getattr(settings, field.name) is not None
    ]
    runner = ["torch.distributed.run", "--standalone", f"--nproc-per-node={settings.devices}"]
    module = ["-m", "arrcoc.demo.training", str(settings.folder), "--quiet"]
    return [sys.executable, "-m", *runner, *module, *given]


def recipe(settings: Settings) -> Recipe:
    """The recipe with what the command line changes."""
    changed: dict[str, Any] = {
        **{"seed": settings.seed, "begin": settings.begin, "batch_scale": settings.batch_scale},
        **({} if settings.steps is None else {"steps": settings.steps}),
        **({} if settings.source is None else {"source": settings.source}),
    }
    return replace(Recipe(), **changed)


def work(settings: Settings) -> None:
    """Be the training process of one device; the first one draws curves, exports and writes the record."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches are drawn in forked processes
    first = int(os.environ.get("RANK", "0")) == 0
    skeleton = make_skeleton(settings.folder / SKELETON)
    run = Run(
        settings.folder,
        skeleton,
        settings.photographs,
        settings.workers,
        settings.stop_after,
        initial=settings.initial,
    )
    trainer = Trainer(recipe(settings), run)
    with curves.redrawing(settings.folder, settings.folder / STATE, first):
        done = trainer.fit()
    if first:
        _finish(trainer, settings, done)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _finish(trainer: Trainer, settings: Settings, done: bool) -> None:
    """Measure, export, and write the record, which says that all else is there."""
    trainer.model.eval()
    trainer.model.load_state_dict(trainer.averaged_state())
    record = _record(trainer, settings, done) | {"held_out": _held_out(trainer, settings)}
    export(trainer.averaged_state(), trainer.run.skeleton, settings.folder / CHECKPOINT, record)
    write_json(record, settings.folder / RECORD)


def _held_out(trainer: Trainer, settings: Settings) -> dict[str, measure.Accuracy]:
    found = {}
    for canvas, batches, size in HELD_OUT if settings.measure else ():
        found[str(canvas)] = measure.accuracy(
            trainer.loss,
            trainer.encoder,
            trainer.recipe,
            trainer.prompts,
            trainer.device,
            canvas,
            range(min(batches, settings.measure)),
            size,
            settings.workers,
        )
        logger.info("%d px, test split\n%s", canvas, measure.table(found[str(canvas)]))
    return found


def _record(trainer: Trainer, settings: Settings, done: bool) -> dict[str, Any]:
    # The trainer's own state knows the seconds of earlier sittings.
    state = torch.load(settings.folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    cuda = trainer.device.type == "cuda"
    return {
        "done": done,
        "steps": trainer.step,
        "seconds": state["seconds"],
        "seed": settings.seed,
        "device": torch.cuda.get_device_name(trainer.device) if cuda else "cpu",
        "processes": trainer.world,
        "workers": settings.workers,
        "initial": settings.initial and settings.initial.name,
        "photographs": settings.photographs and settings.photographs.name,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "recipe": describe(trainer.recipe),
    }


def closing_lines(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Held-out accuracy, how far the run came, and where the files are."""
    lines = []
    for canvas, found in record["held_out"].items():
        lines += [f"{canvas} px, held-out questions, share of right answers", measure.table(found), ""]
    state = "done" if record["done"] else "stopped; the same command goes on"
    lines.append(f"{record['steps']:,} steps in {record['seconds']:,.0f} s on {record['device']}: {state}")
    lines.append(", ".join(str(folder / name) for name in (CHECKPOINT, curves.CURVES, RECORD)))
    return lines
