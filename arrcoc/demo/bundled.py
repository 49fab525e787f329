"""The checkpoint that an engine takes when none is named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NOTE = (
    "The bundled checkpoint is a 30-MB Qwen3-VL trained on drawn signs: it answers questions about these "
    "(read, find, count, exists, where, compare) and knows nothing else. Name a Qwen3-VL checkpoint for "
    "anything else."
)


def bundled_checkpoint() -> tuple[Path, str]:
    """Folder of the bundled checkpoint, which is part of the package, and one line on what it is good for."""
    return Path(str(resources.files("arrcoc"))) / "demo" / "reader", NOTE
