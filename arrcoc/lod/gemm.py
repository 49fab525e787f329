# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# ruff: noqa: N803, N806  (Triton's compile-time constants are written in capitals)
"""A float8 matrix product whose epilogue cuBLASLt does not offer: scales, bias, GELU, and float8 out.

Persistent programs over TMA: each works through output blocks, groups of which share weight blocks in the
cache. The tanh of the GELU is the GPU's own approximation (relative error 2**-11), as a precise one takes
as long as half of the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arrcoc.lod.kernels import FLOAT8


class Config(NamedTuple):
    """How a product is cut.

    Attributes:
        rows, cols: of a block of the result.
        depth: bytes of a row that are multiplied at once.
        warps: a program's warps.
        stages: blocks of factors on their way at once.
        share: programs on one multiprocessor, so that one's epilogue hides behind another's products.
    """

    rows: int = 128
    cols: int = 128
    depth: int = 128
    warps: int = 4
    stages: int = 3
    share: int = 2


FASTEST = Config()
"""The fastest of seven on an H200, at every number of rows that was tried (3,840 to 32,000)."""


def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, gelu: bool = False,
    step: float | None = None, config: Config = FASTEST,
) -> Tensor:  # fmt: skip
    """x @ weight.T + bias, [M, out], and the tanh GELU of it where asked.

    Args:
        x, weight: e4m3 [M, in] and [out, in], contiguous; a row takes whole multiples of 16 bytes.
        x_scale, scale: fp32 [M, 1] and [1, out].
        bias: [out].
        gelu: whether the tanh GELU follows.
        step: makes the result e4m3, divided by it (beyond 448 it saturates); None keeps the bias' dtype.
        config: how it is cut.
    """
    (rows, inner), (cols, _) = x.shape, weight.shape
    dtype = bias.dtype if step is None else FLOAT8
    out = torch.empty(rows, cols, dtype=dtype, device=x.device)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    _product[(min(programs * config.share, tiles),)](
        TensorDescriptor.from_tensor(x, [config.rows, config.depth]),
        TensorDescriptor.from_tensor(weight, [config.cols, config.depth]),
        TensorDescriptor.from_tensor(out, [config.rows, config.cols]),
        x_scale, scale, bias, 1.0 if step is None else 1 / step, rows, cols, inner,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GELU=gelu, NATIVE=x.is_cuda,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


@triton.jit
def _gelu(value, factor, NATIVE: tl.constexpr):
    """factor * value * (1 + tanh(u)) / 2, u = sqrt(2 / pi) * (value + 0.044715 value**3)."""
    u = value * (0.7978845608028654 + 0.035677408136300125 * value * value)
    if NATIVE:
        turned = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        turned = 2.0 * tl.sigmoid(2.0 * u) - 1.0
    half = value * (0.5 * factor)
    return half * turned + half


@triton.jit(do_not_specialize=["rows", "factor"])
def _product(
    x, weight, out, x_scale, scale, bias, factor, rows, cols, inner, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = 8
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        # Groups of GROUP row blocks share their weight blocks in the cache.
        group = tile // (GROUP * across)
        height = min(down - group * GROUP, GROUP)
        m = (group * GROUP + (tile % (GROUP * across)) % height) * ROWS
        n = ((tile % (GROUP * across)) // height) * COLS
        total = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(tl.cdiv(inner, DEPTH)):
            total = tl.dot(x.load([m, k * DEPTH]), weight.load([n, k * DEPTH]).T, total)
        row, col = m + tl.arange(0, ROWS), n + tl.arange(0, COLS)
        total = total * tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
        total = total * tl.load(scale + col, mask=col < cols, other=0.0)[None, :]
        total += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        done = _gelu(total, factor, NATIVE) if GELU else total * factor
        out.store([m, n], done.to(out.dtype))
