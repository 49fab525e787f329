# mypy: ignore-errors
# ruff: noqa: N803  (Triton's compile-time constants are written in capitals)
"""When kernels of a decode step wait for one another: programmatic dependent launch."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def at_once(PDL: tl.constexpr):
    """Where PDL is 2, let the kernel after this one begin to fetch its weights once all of this one runs.

    All of them wait, and a kernel has not ended before its wait has: so whoever waits for the kernel before
    waits for all those before it.
    """
    if PDL == 2:
        gdc_launch_dependents()


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait for the kernel before, and where PDL is 1, let the one after begin to fetch its weights."""
    if PDL > 0:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
