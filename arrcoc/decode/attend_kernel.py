# mypy: ignore-errors
# ruff: noqa: N803, N806  (Triton's compile-time constants are written in capitals)
"""The Triton kernel of a decode step's attention, for one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from arrcoc.decode.dependent import after_previous, at_once


@triton.jit
def _head_halves(x, gain, cos, sin, rows, inside, eps, HALF: tl.constexpr):
    """Heads at these rows of x [., 2 HALF], normalised and rotated: both halves, fp32 [rows, HALF]."""
    half = tl.arange(0, HALF)
    at = rows[:, None] * (2 * HALF) + half[None, :]
    low = tl.load(x + at, mask=inside[:, None], other=0.0)
    high = tl.load(x + at + HALF, mask=inside[:, None], other=0.0)
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
    inverse = (1.0 / tl.sqrt(mean + eps))[:, None]
    low = low * inverse * tl.load(gain + half).to(tl.float32)[None, :]
    high = high * inverse * tl.load(gain + HALF + half).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _load_kv(keys, values, cache, start, stop, HALF: tl.constexpr, BLOCK_T: tl.constexpr):
    """Both halves of keys, transposed [HALF, BLOCK_T], and values [BLOCK_T, 2 HALF] of some positions."""
    at = start + tl.arange(0, BLOCK_T)
    inside = at < stop
    half, whole = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    place = cache + at.to(tl.int64) * (2 * HALF)
    low = tl.load(keys + place[None, :] + half[:, None], mask=inside[None, :], other=0.0)
    high = tl.load(keys + place[None, :] + HALF + half[:, None], mask=inside[None, :], other=0.0)
    return low, high, tl.load(values + place[:, None] + whole[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _attend_tile(q_low, q_high, low, high, value, top, total, mixed, count, scale, BLOCK_T: tl.constexpr):
    """The running softmax over `count` more positions: its largest score, its sum, and values mixed by it."""
    scores = tl.dot(q_low, low, input_precision="ieee")
    scores += tl.dot(q_high, high, input_precision="ieee")
    scores = tl.where((tl.arange(0, BLOCK_T) < count)[None, :], scores * scale, -1.0e30)
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    rescale = tl.exp(top - higher)
    more = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total * rescale + tl.sum(weights, 1), mixed * rescale[:, None] + more


@triton.jit
def attend(
    qkv, q_gain, k_gain, cosine, sine, keys, values, length_at, sums, parts, arrived, y, scale, eps, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one new position over the cache and itself, whose key and value it also appends.

    Program (h, s) takes the s-th part of the cache of key-value head h for all query heads that share it;
    the last one to finish of a head joins its parts (split-K flash decoding).

    Args:
        qkv: fp32 [(HEADS + 2 KV_HEADS) * 2 HALF], not yet normalised or rotated.
        keys, values: [KV_HEADS, capacity, 2 HALF]; `length_at` points to the number of positions in them.
        sums: fp32 [HEADS, SPLITS, 2 HALF] and parts: fp32 [HEADS, SPLITS, 2], scratch.
        arrived: int32 [KV_HEADS], all 0, and 0 again afterwards.
        y: fp32 [HEADS * 2 HALF].
        ROWS: at least HEADS / KV_HEADS, and 16: what a matrix product takes.
        LANES: HEADS / KV_HEADS, rounded up to a power of two.
    """
    DIM: tl.constexpr = 2 * HALF
    GROUP: tl.constexpr = HEADS // KV_HEADS
    at_once(PDL)
    head, split = tl.program_id(0), tl.program_id(1)
    cache = head.to(tl.int64) * capacity * DIM
    # Length and cache were there before this step's first kernel let any other begin.
    length = tl.load(length_at)
    share = (length + SPLITS - 1) // SPLITS
    start = split * share
    stop = tl.minimum(start + share, length)
    low, high, value = _load_kv(keys, values, cache, start, stop, HALF, BLOCK_T)
    after_previous(PDL)
    half, whole = tl.arange(0, HALF), tl.arange(0, DIM)
    cos, sin = tl.load(cosine + half)[None, :], tl.load(sine + half)[None, :]
    row = tl.arange(0, ROWS)
    q_low, q_high = _head_halves(qkv, q_gain, cos, sin, head * GROUP + row, row < GROUP, eps, HALF)
    kind = keys.dtype.element_ty
    q_low, q_high = q_low.to(kind), q_high.to(kind)

    top = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    if split == 0:
        one = tl.arange(0, 1)
        k_low, k_high = _head_halves(qkv, k_gain, cos, sin, HEADS + head + one, one < 1, eps, HALF)
        k_low, k_high = k_low.to(kind), k_high.to(kind)
        new = tl.load(qkv + (HEADS + KV_HEADS + head) * DIM + whole).to(kind)
        there = cache + length.to(tl.int64) * DIM
        tl.store(keys + there + half[None, :], k_low)
        tl.store(keys + there + HALF + half[None, :], k_high)
        tl.store(values + there + whole, new)
        products = q_low.to(tl.float32) * k_low.to(tl.float32) + q_high.to(tl.float32) * k_high.to(tl.float32)
        top = tl.sum(products, 1) * scale
        total += 1.0
        mixed += new.to(tl.float32)[None, :]

    # Where a part is empty, what comes of it has the score -1e30, and no weight when parts are joined.
    top, total, mixed = _attend_tile(
        q_low, q_high, low, high, value, top, total, mixed, stop - start, scale, BLOCK_T
    )
    for begin_at in range(start + BLOCK_T, stop, BLOCK_T):
        low, high, value = _load_kv(keys, values, cache, begin_at, stop, HALF, BLOCK_T)
        top, total, mixed = _attend_tile(
            q_low, q_high, low, high, value, top, total, mixed, stop - begin_at, scale, BLOCK_T
        )

    mine = (head * GROUP + row) * SPLITS + split
    tl.store(parts + mine * 2, top, mask=row < GROUP)
    tl.store(parts + mine * 2 + 1, total, mask=row < GROUP)
    tl.store(sums + mine[:, None] * DIM + whole[None, :], mixed, mask=(row < GROUP)[:, None])
    tl.debug_barrier()  # all of this program's stores, before the counter tells of them
    if tl.atomic_add(arrived + head, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived + head, 0)
        lane = tl.arange(0, LANES)  # the heads of this group, up to a power of two
        part = (head * GROUP + lane)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
        there = (lane < GROUP)[:, None]
        tops = tl.load(parts + part * 2, mask=there, other=0.0, cache_modifier=".cg")
        totals = tl.load(parts + part * 2 + 1, mask=there, other=1.0, cache_modifier=".cg")
        where = part[:, :, None] * DIM + whole[None, None, :]
        each = tl.load(sums + where, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        factor = tl.exp(tops - tl.max(tops, 1)[:, None])
        joined = tl.sum(each * factor[:, :, None], 1) / tl.sum(totals * factor, 1)[:, None]
        tl.store(y + (head * GROUP + lane)[:, None] * DIM + whole[None, :], joined, mask=there)
