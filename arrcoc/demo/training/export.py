"""Writes trained weights as a stock checkpoint folder, with the record of how they came about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arrcoc.errors import ModelError

WEIGHTS = "model.safetensors"
RECORD = "training.json"


def export(state: dict[str, Tensor], skeleton: Path, folder: Path, record: dict[str, Any]) -> Path:
    """Write the skeleton's files, the weights in bfloat16 and `training.json`; whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(skeleton, scratch, ignore=shutil.ignore_patterns(WEIGHTS, "arrcoc_checkpoint.json"))
    tensors = {name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
    (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of an exported folder into a model of the same shapes.

    Raises:
        ModelError: no weights in the folder, or other names or shapes than the model's.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{folder} without {WEIGHTS}", "an exported checkpoint folder", "Export one first")
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ModelError(
            f"weights of another model in {folder}: {str(error)[:200]}",
            "an export of the same skeleton",
            "Start from an export of this recipe, or without one",
        ) from None
