"""Whether Triton's kernels can run on CUDA here: asked by everything that has a kernel and another way."""

from __future__ import annotations

import importlib
import subprocess
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """What keeps Triton's kernels from running on CUDA here; None where they can.

    Triton may be installed without the C compiler that it needs to reach the driver, as in slim containers.
    """
    try:
        triton: Any = importlib.import_module("triton")
        triton.runtime.driver.active.get_current_target()
    except ImportError as error:
        return f"Triton is not installed ({error})"
    except (RuntimeError, OSError, AttributeError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"Triton cannot be used ({reason})"
    return None
