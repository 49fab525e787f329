"""A fit from folder and questions to weights and report."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from arrcoc.config import PresetChoice
from arrcoc.devices import device_name, resolve_device, resolve_dtype
from arrcoc.errors import ConfigError
from arrcoc.fitting.prepare import Preparer, Sample
from arrcoc.fitting.report import Metrics, draw, judge_scorers, losing_to
from arrcoc.fitting.rows import held_out_images, read_rows
from arrcoc.fitting.settings import FitSettings
from arrcoc.fitting.start import regress_targets, untrained_head
from arrcoc.fitting.training import HeadTrainer
from arrcoc.qwen import QwenVL, load
from arrcoc.scorers import TEXTURE_HEAD_FILE

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], object]
"""Called with what is under way, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a fit made.

    Attributes:
        weights: file of the head.
        work: folder with `report.json`, `curves.png`, the checkpoint and the prepared rows.
        held_out: metrics by scorer on held-out images.
        report: what `report.json` holds.
    """

    weights: Path
    work: Path
    held_out: dict[str, Metrics]
    report: dict[str, Any]


def fit(
    folder: str | Path,
    questions: str | Path,
    model: str | Path,
    preset: str | Path = "auto",
    settings: FitSettings | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress = lambda what, done, total: None,
) -> FitResult:
    """Fit a texture head to a checkpoint's question embeddings, and save it beside the model.

    What is prepared, and a checkpoint of the head, lie in a folder beside the weights named after them (with
    `.fit` for a suffix). Called again after an interruption with the same arguments, a fit goes on from
    there and ends at the same weights (bit-equal on a CPU with the same number of threads, elsewhere up to
    the order of floating-point sums).

    Args:
        folder: of the images.
        questions: JSONL file, see `read_rows`.
        model: local folder of a Qwen3-VL checkpoint, or a hub name (then `out` must be given).
        preset: as for `Engine.from_pretrained`; use the same there.
        settings: of the fit.
        out: file of the weights; by default `texture_head.safetensors` in the model's folder, where
            `Engine.from_pretrained` takes it up.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: precision of the checkpoint, not of the head.
        progress: see `Progress`.

    Raises:
        ConfigError: preset, device, settings, `out`, or fewer than two different images.
        QueryError, ImageError: a row is not usable; names file and line.
        ModelError: the checkpoint cannot be loaded.
    """
    begun, chosen = time.monotonic(), settings or FitSettings()
    rows = read_rows(Path(questions), Path(folder))
    presets = PresetChoice.make(preset, {})
    weights = _weights_file(model, out)
    place = resolve_device(device)
    qwen = load(model, place, resolve_dtype(dtype, place))
    work = weights.with_suffix(".fit")
    preparer = Preparer(qwen, presets, work / "prepared", chosen.target)
    samples = preparer.prepare(rows, lambda done, total: progress("preparing", done, total))
    trainer, held = _trainer(samples, qwen, chosen, work)
    untrained = untrained_head(qwen.width, chosen.width, chosen.seed).to(place).eval()
    trainer.fit(lambda done, total, loss: progress(f"fitting, loss {loss:.4f}", done, total))
    held_out = judge_scorers(trainer.head, untrained, held)
    trainer.head.save(weights, qwen.fingerprint, qwen.embedding_probe)
    better = _called_out(held_out, weights)
    report = {
        **_origin(qwen, presets, questions),
        "settings": chosen.model_dump(),
        "rows": _counts(samples, held),
        "steps": trainer.history.step,
        "best_step": trainer.history.best_step,
        "seconds": time.monotonic() - begun,
        "held_out": held_out,
        "not_better_than": better,
        "curve": trainer.history.curve,
    }
    draw(trainer.history.curve, held_out, work / "curves.png")
    _write_text(work / "report.json", json.dumps(report, indent=2) + "\n")
    return FitResult(weights, work, held_out, report)


def _called_out(held_out: dict[str, Metrics], weights: Path) -> list[str]:
    """Scorers that find targets as well as the fitted head; warns if there are any."""
    better = losing_to(held_out)
    if better:
        logger.warning(
            "On held-out images the fitted head finds targets no better than: %s. Fit to more questions, or "
            "remove %s so that the engine does not use it.",
            ", ".join(better),
            weights,
        )
    return better


def _trainer(
    samples: Sequence[Sample], qwen: QwenVL, settings: FitSettings, work: Path
) -> tuple[HeadTrainer, list[Sample]]:
    """What fits the head, and the samples held out."""
    images = held_out_images([sample.image for sample in samples], settings.held_out, settings.seed)
    held = [sample for sample in samples if sample.image in images]
    train = [sample for sample in samples if sample.image not in images]
    head = untrained_head(qwen.width, settings.width, settings.seed)
    regress_targets(head, train)
    spec = _spec(samples, settings, qwen)
    return HeadTrainer(head.to(qwen.device), train, held, settings, work, spec), held


def _weights_file(model: str | Path, out: str | Path | None) -> Path:
    if out is None:
        folder = Path(model).expanduser()
        if not folder.is_dir() and str(model).count("/") == 1 and not str(model).startswith((".", "/", "~")):
            remedy = "Name a file with --out, or download the checkpoint and name its folder"
            raise ConfigError(f"model {str(model)!r} without a local folder", "a local folder", remedy)
        return folder / TEXTURE_HEAD_FILE
    file = Path(out)
    if file.is_dir() or file.suffix != ".safetensors" or not file.absolute().parent.is_dir():
        allowed = "a .safetensors file in a folder that exists"
        raise ConfigError(f"out {str(file)!r}", allowed, "Choose another file")
    return file


def _spec(samples: Sequence[Sample], settings: FitSettings, qwen: QwenVL) -> str:
    """Digest of everything the weights depend on."""
    digest = hashlib.sha256(settings.model_dump_json(exclude={"save_every"}).encode())
    digest.update(f"{qwen.fingerprint}{qwen.device.type}".encode())
    for sample in samples:
        facts = (sample.texture.name, sample.grid, sample.cells, sample.kind, sample.boxes)
        digest.update(repr(facts).encode())
        digest.update(sample.embedding.numpy().tobytes() + sample.tiles.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _counts(samples: Sequence[Sample], held: Sequence[Sample]) -> dict[str, int]:
    kinds = [sample.kind for sample in samples]
    return {"boxes": kinds.count("boxes"), "glimpse": kinds.count("glimpse"), "held_out": len(held)}


def _origin(qwen: QwenVL, presets: PresetChoice, questions: str | Path) -> dict[str, Any]:
    return {
        "model": {"name": qwen.name, "fingerprint": qwen.fingerprint},
        "preset": presets.name,
        "questions": Path(questions).name,
        "device": device_name(qwen.device),
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _write_text(path: Path, text: str) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
