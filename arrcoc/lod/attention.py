# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# ruff: noqa: N803, N806  (Triton's compile-time constants are written in capitals)
"""Attention inside tiles as one Triton kernel that rotates the queries as it loads them.

Online softmax over blocks of keys (Dao, arXiv 2307.08691, algorithm 1), forward only, unmasked. A head of 72
is one product of 64 and one of 8 padded to 16, where libraries pad it to 96 or 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from arrcoc.lod.kernels import FLOAT8, split_width

_LEAST = 16  # smallest edge of a tensor core's product
_MOST_PATCHES = 160  # of an image; cuDNN's attention is as fast at 144, and faster at 256 and above
_LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """How the kernel is cut.

    Attributes:
        queries, keys: rows of a block.
        warps: a program's warps.
        stages: key blocks on their way at once.
        registers: most registers a thread may have, so that more programs share a multiprocessor; None
            leaves that to ptxas.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, blocks: Blocks, step: float | None = None
) -> Tensor:
    """Softmax attention of B images of N patches each.

    Args:
        qkv: [B, N, 3 * heads * head_dim], contiguous: all queries, then keys, then values of a patch;
            keys have their rotary embedding already, queries do not.
        cos, sin: fp32 [N, head_dim / 2].
        heads: attention heads.
        blocks: see `Blocks`.
        step: makes the result e4m3, divided by it (beyond 448 it saturates); None keeps qkv's dtype.

    Returns:
        [B * N, heads * head_dim].
    """
    batch, count, width = qkv.shape
    assert qkv.is_contiguous()
    assert cos.shape[0] == count, (qkv.shape, cos.shape)
    dim = width // (3 * heads)
    dtype = qkv.dtype if step is None else FLOAT8
    out = torch.empty(batch * count, width // 3, dtype=dtype, device=qkv.device)
    factor = 1.0 if step is None else 1 / step
    head, tail = split_width(dim, _LEAST)
    grid = (triton.cdiv(count, blocks.queries), batch * heads)
    common = {
        "HEADS": heads, "DIM": dim, "HEAD": head, "TAIL": tail, "QUERIES": blocks.queries,
        "KEYS": blocks.keys, "EVEN": count % blocks.keys == 0, "num_warps": blocks.warps,
        "num_stages": blocks.stages, "maxnreg": blocks.registers,
    }  # fmt: skip
    scale = dim**-0.5 * _LOG2_E
    _attend[grid](qkv, cos, sin, out, count, scale, factor, **common)
    return out


def fastest_blocks(count: int, dim: int) -> Blocks | None:
    """How the kernel is best cut for images of `count` patches; None where a library's is as fast.

    As measured on an H200 (docs/engines.md); heads wider than 128 do not fit into its registers.
    """
    return Blocks(64, 64, 4, 1, 128) if dim <= 128 and count <= _MOST_PATCHES else None


@triton.jit
def _load(base, row, col, count, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """[rows, cols] of one head; what lies outside is 0."""
    valid = (row < count)[:, None] & (col < DIM)[None, :]
    return tl.load(base + row[:, None] * STRIDE + col[None, :], mask=valid, other=0.0)


@triton.jit
def _load_rotated(base, cos, sin, row, col, count, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """`_load` of any columns, rotated; the other half of each pair is read a second time."""
    HALF: tl.constexpr = DIM // 2
    valid = (row < count)[:, None] & (col < DIM)[None, :]
    mine = tl.load(base + row[:, None] * STRIDE + col[None, :], mask=valid, other=0.0)
    partner = (col + HALF) % DIM
    other = tl.load(base + row[:, None] * STRIDE + partner[None, :], mask=valid, other=0.0)
    angle = row[:, None] * HALF + (col % HALF)[None, :]
    turn_cos = tl.load(cos + angle, mask=valid, other=0.0)
    turn_sin = tl.load(sin + angle, mask=valid, other=0.0)
    turn_sin = tl.where((col < HALF)[None, :], -turn_sin, turn_sin)
    return (mine.to(tl.float32) * turn_cos + other.to(tl.float32) * turn_sin).to(mine.dtype)


@triton.jit
def _soften(score, most, total, key, count, scale, EVEN: tl.constexpr):
    """One step of the online softmax: (weights, new maximum, new total, factor of what was summed)."""
    if not EVEN:
        score = tl.where((key < count)[None, :], score, float("-inf"))
    top = tl.maximum(most, tl.max(score, 1) * scale)
    share = tl.math.exp2(score * scale - top[:, None])
    fade = tl.math.exp2(most - top)
    return share, top, total * fade + tl.sum(share, 1), fade


@triton.jit
def _added(sums, fade, new):
    """sums * fade + new, and not as the product's own accumulator: ptxas then serialises the products."""
    return tl.fma(sums, tl.broadcast_to(fade[:, None], sums.shape), new)


@triton.jit
def _store(out, value, row, col, count, STRIDE: tl.constexpr, DIM: tl.constexpr):
    valid = (row < count)[:, None] & (col < DIM)[None, :]
    tl.store(out + row[:, None] * STRIDE + col[None, :], value.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["count", "factor"])
def _attend(
    qkv, cos, sin, out, count, scale, factor, HEADS: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * DIM
    STRIDE: tl.constexpr = 3 * WIDTH
    image, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    base = qkv + image.to(tl.int64) * count * STRIDE + head * DIM
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    col, col2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    query = _load_rotated(base, cos, sin, row, col, count, STRIDE, DIM)
    sums = tl.zeros((QUERIES, HEAD), tl.float32)
    if TAIL > 0:
        query2 = _load_rotated(base, cos, sin, row, col2, count, STRIDE, DIM)
        sums2 = tl.zeros((QUERIES, TAIL), tl.float32)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, count, KEYS):
        key = start + tl.arange(0, KEYS)
        score = tl.dot(query, tl.trans(_load(base + WIDTH, key, col, count, STRIDE, DIM)))
        if TAIL > 0:
            score = tl.dot(query2, tl.trans(_load(base + WIDTH, key, col2, count, STRIDE, DIM)), score)
        share, most, total, fade = _soften(score, most, total, key, count, scale, EVEN)
        share = share.to(qkv.dtype.element_ty)
        value = _load(base + 2 * WIDTH, key, col, count, STRIDE, DIM)
        if TAIL > 0:
            value2 = _load(base + 2 * WIDTH, key, col2, count, STRIDE, DIM)
        sums = _added(sums, fade, tl.dot(share, value))
        if TAIL > 0:
            sums2 = _added(sums2, fade, tl.dot(share, value2))
    target = out + image.to(tl.int64) * count * WIDTH + head * DIM
    _store(target, sums * (factor / total)[:, None], row, col, count, WIDTH, DIM)
    if TAIL > 0:
        _store(target, sums2 * (factor / total)[:, None], row, col2, count, WIDTH, DIM)
