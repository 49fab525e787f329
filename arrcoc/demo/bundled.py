"""The checkpoint that an engine takes when none is named."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from arrcoc import qwen
from arrcoc.demo.checkpoint import demo_checkpoint
from arrcoc.demo.words import fit_words
from arrcoc.scorers import TEXTURE_HEAD_FILE

UNTRAINED = (
    "The bundled language model is untrained, so its answers are noise; the texture head beside it was "
    "fitted to colour and place words, and looks where these say. Name a Qwen3-VL checkpoint for answers."
)


def bundled_checkpoint() -> tuple[Path, str]:
    """Folder of the bundled checkpoint and one line on what it is good for.

    Both checkpoint and texture head are made on first use, in the user's cache folder, with a progress bar
    on stderr.

    Raises:
        ModelError: the cache folder cannot be written.
    """
    folder = demo_checkpoint()
    if not (folder / TEXTURE_HEAD_FILE).is_file():
        _fit(folder)
    return folder, UNTRAINED


def _fit(folder: Path) -> None:
    checkpoint = qwen.load(folder, torch.device("cpu"), torch.float32)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Fitting the demo's texture head (once)", total=1.0)
        fit_words(checkpoint, folder, progress=lambda share: bar.update(task, completed=share))
