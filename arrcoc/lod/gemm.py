# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# ruff: noqa: N803, N806  (Triton's compile-time constants are written in capitals)
"""A matrix product whose epilogue cuBLASLt does not offer: scales, bias, GELU, and float8 out.

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
    """How a product is cut: rows, columns and bytes of depth of a block; warps; stages; output parts.

    `share` programs run on one multiprocessor, so that one's epilogue hides behind another's products.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    parts: int
    share: int = 1


CONFIGS = (
    Config(128, 256, 128, 8, 3, 2),
    Config(128, 256, 128, 8, 4, 2),
    Config(256, 128, 128, 8, 3, 2),
    Config(128, 128, 128, 8, 4, 1),
    Config(128, 128, 128, 4, 3, 1, 2),
    Config(128, 128, 128, 8, 3, 1, 2),
    Config(64, 256, 128, 4, 2, 1, 2),
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, config: Config = CONFIGS[0]
) -> Tensor:
    """x @ weight.T + bias, [M, out], and the tanh GELU of it where asked."""
    out = torch.empty(len(x), len(weight), dtype=bias.dtype, device=x.device)
    return _launch(x, None, weight, None, bias, out, gelu, 1.0, config)


def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *, gelu: bool = False,
    step: float | None = None, config: Config = CONFIGS[0],
) -> Tensor:  # fmt: skip
    """`linear` of e4m3 x [M, in] and weight [out, in].

    Args:
        x, weight: contiguous; a row takes whole multiples of 16 bytes.
        x_scale, scale: fp32 [M, 1] and [1, out].
        bias: [out].
        gelu: whether the tanh GELU follows.
        step: makes the result e4m3, divided by it (beyond 448 it saturates); None keeps the bias' dtype.
        config: how it is cut.
    """
    dtype = bias.dtype if step is None else FLOAT8
    out = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    return _launch(x, x_scale, weight, scale, bias, out, gelu, 1.0 if step is None else 1 / step, config)


def _launch(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor | None, bias: Tensor, out: Tensor,
    gelu: bool, factor: float, config: Config,
) -> Tensor:  # fmt: skip
    (rows, inner), (cols, _) = x.shape, weight.shape
    depth = config.depth // x.element_size()
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs *= config.share
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    _product[(min(programs, tiles),)](
        TensorDescriptor.from_tensor(x, [config.rows, depth]),
        TensorDescriptor.from_tensor(weight, [config.cols, depth]),
        TensorDescriptor.from_tensor(out, [config.rows, config.cols // config.parts]),
        bias, bias if x_scale is None else x_scale, bias if scale is None else scale, factor, rows, cols,
        inner, ROWS=config.rows, COLS=config.cols, DEPTH=depth, PARTS=config.parts, GELU=gelu,
        SCALED=scale is not None, NATIVE=x.is_cuda, num_warps=config.warps, num_stages=config.stages,
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


@triton.jit
def _finish(
    value, bias, x_scale, scale, factor, m, n, rows, cols, ROWS: tl.constexpr, SIZE: tl.constexpr,
    GELU: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scales, bias and GELU of one block of output."""
    col = n + tl.arange(0, SIZE)
    if SCALED:
        row = m + tl.arange(0, ROWS)
        value = value * tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
        value = value * tl.load(scale + col, mask=col < cols, other=0.0)[None, :]
    value += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    return _gelu(value, factor, NATIVE) if GELU else value * factor


@triton.jit(do_not_specialize=["rows", "factor"])
def _product(
    x, weight, out, bias, x_scale, scale, factor, rows, cols, inner, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = 8
    SIZE: tl.constexpr = COLS // PARTS
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
        if PARTS == 1:
            done = _finish(
                total, bias, x_scale, scale, factor, m, n, rows, cols, ROWS, SIZE, GELU, SCALED, NATIVE
            )
            out.store([m, n], done.to(out.dtype))
        else:  # the columns' halves one after the other: fewer registers at a time
            left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, SIZE)), (0, 2, 1)))
            for half in tl.static_range(2):
                value, place = left if half == 0 else right, n + half * SIZE
                done = _finish(
                    value, bias, x_scale, scale, factor, m, place, rows, cols, ROWS, SIZE, GELU,
                    SCALED, NATIVE,
                )  # fmt: skip
                out.store([m, place], done.to(out.dtype))
