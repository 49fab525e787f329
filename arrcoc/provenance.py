"""Where a result came from: commit and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import arrcoc

_PACKAGES = ("torch", "transformers", "numpy")


def commit() -> str | None:
    """Commit of the checkout that the package runs from, `+changes` where files differ.

    Outside a checkout it is what ARRCOC_COMMIT says, or None.
    """
    folder = Path(arrcoc.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            [*command, "--dirty=+changes"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ARRCOC_COMMIT")
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of arrcoc, Python and the packages that results depend on most."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"arrcoc": arrcoc.__version__, "python": platform.python_version()} | packages
