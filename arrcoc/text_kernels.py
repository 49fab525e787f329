# ruff: noqa: N803 - names of compile-time constants
# mypy: ignore-errors
"""Triton kernels between the matrix products of a decoder layer, for many positions at once.

They compute in fp32 and round where the stock modules round: what a layer gives differs from theirs by the
order of sums alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + delta and its RMSNorm, both [m, D]; without delta the sum is x itself."""
    count, width = x.shape
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 2048 else 8
    _add_norm[(count,)](
        x, x if delta is None else delta, gain, total, normed, width, eps, delta is not None, block,
        num_warps=warps,
    )  # fmt: skip
    return total, normed


@triton.jit
def _add_norm(x, delta, gain, total, normed, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    unit = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    out = unit * tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(x.dtype.element_ty), mask=inside)


def rotate_into(
    qkv: Tensor,
    gains: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
) -> None:
    """RMSNorm over each head and the rotary embedding of queries, in place, and of keys, into a cache.

    Args:
        qkv: [m, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys and values of m rows.
        gains: [head_dim] for queries, for keys.
        cos, sin: [m, head_dim], contiguous, whose two halves are equal.
        eps: of the norms.
        keys, values: [kv_heads, capacity, head_dim], contiguous within a head; written after `past`.
        past: int32 [1], positions before the new ones.
    """
    count, head_dim = cos.shape
    kv_heads = keys.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    common = heads | kv_heads
    group = common & -common  # heads of one program: the largest power of two that divides both
    _rotate_into[(count, (heads + 2 * kv_heads) // group)](
        qkv, *gains, cos, sin, keys, values, past, heads, kv_heads, keys.stride(0), eps, group, head_dim // 2,
        num_warps=1 if group * head_dim <= 512 else 2,
    )  # fmt: skip


@triton.jit
def _rotate_into(
    qkv, query_gain, key_gain, cos, sin, keys, values, past, heads, kv_heads, stride, eps,
    GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUP
    head, lane = first + tl.arange(0, GROUP)[:, None], tl.arange(0, HALF)[None, :]
    at = qkv + (row * (heads + 2 * kv_heads) + head) * 2 * HALF + lane
    low, high = tl.load(at), tl.load(at + HALF)
    there = (tl.load(past) + row) * 2 * HALF + lane
    if first >= heads + kv_heads:
        to = values + (head - heads - kv_heads).to(tl.int64) * stride + there
        tl.store(to, low)
        tl.store(to + HALF, high)
    else:
        c = tl.load(cos + row * 2 * HALF + lane).to(tl.float32)
        s = tl.load(sin + row * 2 * HALF + lane).to(tl.float32)
        if first < heads:
            low, high = _turned(low, high, query_gain, c, s, eps, HALF)
            tl.store(at, low)
            tl.store(at + HALF, high)
        else:
            low, high = _turned(low, high, key_gain, c, s, eps, HALF)
            to = keys + (head - heads).to(tl.int64) * stride + there
            tl.store(to, low)
            tl.store(to + HALF, high)


@triton.jit
def _turned(low, high, gain, c, s, eps, HALF: tl.constexpr):
    """Halves of heads, normalised and rotated; rounded wherever the stock modules round."""
    kind: tl.constexpr = low.dtype
    lane = tl.arange(0, HALF)[None, :]
    low, high = low.to(tl.float32), high.to(tl.float32)
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
    low = (low * scale).to(kind).to(tl.float32) * tl.load(gain + lane).to(tl.float32)
    high = (high * scale).to(kind).to(tl.float32) * tl.load(gain + HALF + lane).to(tl.float32)
    low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
    new_low = (low * c).to(kind).to(tl.float32) - (high * s).to(kind).to(tl.float32)
    new_high = (high * c).to(kind).to(tl.float32) + (low * s).to(kind).to(tl.float32)
    return new_low.to(kind), new_high.to(kind)


class AttentionBlocks(NamedTuple):
    """Rows of one program, positions of one load, warps and loads in flight."""

    rows: int
    positions: int
    warps: int
    stages: int


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, past: Tensor, blocks: AttentionBlocks | None = None
) -> Tensor:
    """Causal attention of rows over a cache that already holds their own keys and values.

    Args:
        query: [m, heads, head_dim], rotated; the last axis contiguous.
        keys, values: [kv_heads, capacity, head_dim], contiguous within a head, heads grouped over them.
        past: int32 [1], positions before the first row; read on the device, so that a captured launch
            serves every length.
        blocks: how the work is divided; None takes what was measured to be fast on an H200.

    Returns:
        [m, heads * head_dim].
    """
    count, heads, width = query.shape
    rows, positions, warps, stages = blocks or _blocks(count, heads, query.element_size())
    mixed = query.new_empty(count, heads * width)
    _attend[(heads, triton.cdiv(count, rows))](
        query, keys, values, past, mixed, count, query.stride(0), query.stride(1), keys.stride(0),
        width**-0.5 * 1.4426950408889634,
        heads // keys.shape[0], width, rows, positions, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return mixed


def _blocks(count: int, heads: int, element_size: int) -> AttentionBlocks:
    if element_size > 2:
        return AttentionBlocks(32, 32, 4, 2)
    if count <= 64:
        return AttentionBlocks(16 if count <= 16 else 32 if count <= 32 else 64, 64, 4, 3)
    # Large blocks read keys and values less often; with few of them some processors would stay idle.
    return AttentionBlocks(128, 64, 8, 3) if count * heads >= 128 * 512 else AttentionBlocks(64, 64, 4, 2)


@triton.jit(do_not_specialize=["count"])
def _attend(
    query, keys, values, past_at, mixed, count, row_stride, head_stride, kv_stride, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # The last rows see most, so they begin first.
    head, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row, whole, step = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DIM), tl.arange(0, BLOCK_T)
    there = (row < count)[:, None]
    at = query + row[:, None].to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + whole[None, :]
    q = tl.load(at, mask=there, other=0.0)
    first = tl.load(past_at) + block * BLOCK_M
    limit = tl.minimum(first + BLOCK_M, first - block * BLOCK_M + count)
    base = (head // GROUP).to(tl.int64) * kv_stride
    at_keys = keys + base + step[None, :] * DIM + whole[:, None]
    at_values = values + base + step[:, None] * DIM + whole[None, :]
    top = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, DIM), tl.float32)
    common = (first + 1) // BLOCK_T * BLOCK_T  # up to here every row sees all
    for start in range(0, common, BLOCK_T):
        key = tl.load(at_keys + start * DIM)
        scores = tl.dot(q, key, input_precision="ieee") * scale
        value = tl.load(at_values + start * DIM)
        top, total, sums = _absorb(scores, value, top, total, sums)
    for start in range(common, limit, BLOCK_T):
        inside = start + step < limit
        key = tl.load(at_keys + start * DIM, mask=inside[None, :], other=0.0)
        scores = tl.dot(q, key, input_precision="ieee") * scale
        seen = (start + step)[None, :] <= (first + tl.arange(0, BLOCK_M))[:, None]
        value = tl.load(at_values + start * DIM, mask=inside[:, None], other=0.0)
        top, total, sums = _absorb(tl.where(seen, scores, -1.0e30), value, top, total, sums)
    out = mixed + (row[:, None].to(tl.int64) * tl.num_programs(0) + head) * DIM + whole[None, :]
    tl.store(out, (sums / total[:, None]).to(mixed.dtype.element_ty), mask=there)


@triton.jit
def _absorb(scores, value, top, total, sums):
    """The running softmax, to base 2, over some more positions."""
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    rescale = tl.exp2(top - higher)
    sums = tl.dot(weights.to(value.dtype), value, sums * rescale[:, None], input_precision="ieee")
    return higher, total * rescale + tl.sum(weights, 1), sums


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [m, n] of gate and up side by side [m, 2 * n], contiguous."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(count, width)
    _silu_mul[(count, triton.cdiv(width, 1024))](gate_up, out, width, 1024, num_warps=4)
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, gate_up + row * 2 * width + column
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    active = (g / (1.0 + tl.exp(-g))).to(kind).to(tl.float32)
    tl.store(out + row * width + column, (active * u).to(kind), mask=inside)
