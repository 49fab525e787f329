"""The checkpoint that an engine takes when none is named."""

from __future__ import annotations

from pathlib import Path

from arrcoc.demo.checkpoint import demo_checkpoint

UNTRAINED = "The bundled checkpoint is untrained: relevance and answers are noise. Name a Qwen3-VL checkpoint to use."


def bundled_checkpoint() -> tuple[Path, str]:
    """Folder of the bundled checkpoint and one line on what it is good for."""
    return demo_checkpoint(), UNTRAINED
