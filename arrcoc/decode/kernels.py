# mypy: ignore-errors
# ruff: noqa: N803, N806  (Triton's compile-time constants are written in capitals)
"""Triton kernels of one decode step for one sequence, where every matrix product reads its weights once.

A step of a single sequence is bound by reading the weights, so what these kernels are about is keeping
loads in flight: the first weights of a kernel are fetched before it waits for the kernel before it
(programmatic dependent launch, `PDL`), and the next ones while the present ones are summed.

RMSNorm needs no pass of its own: W (x * gain) / rms(x) has the rms as a factor, which each program sums up
while it reads x. All sums are fp32. Vectors between kernels are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arrcoc.decode.dependent import after_previous, at_once


@triton.jit
def _load_tile(weight, rows, start, N, K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Weights [BLOCK_N, BLOCK_K] of these rows from column `start` on; nothing beyond column K."""
    columns = start + tl.arange(0, BLOCK_K)
    where = weight + rows[:, None].to(tl.int64) * K + columns[None, :]
    if EVEN:
        return tl.load(where, mask=start < K, other=0.0, eviction_policy="evict_first")
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    return tl.load(where, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_vector(x, gain, start, K: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """x, and x * gain where the product is normalised, fp32 [BLOCK_K] each."""
    columns = start + tl.arange(0, BLOCK_K)
    value = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
    scaled = value
    if NORM:
        scaled = value * tl.load(gain + columns, mask=columns < K, other=0.0).to(tl.float32)
    return value, scaled


@triton.jit
def _widened(tile):
    """A tile in fp32; of float8 e4m3 (no NaN), times 2**-120.

    The processor's own conversions of bytes run at an eighth of the rate of a sum. So an int8 is put into the
    low bits of 3 * 2**22, and a float8's exponent and mantissa where a float32 has them; both are exact.
    """
    kind: tl.constexpr = tile.dtype
    if kind == tl.int8:
        return (tile.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    elif kind == tl.float8e4nv:
        signed = tile.to(tl.int8, bitcast=True).to(tl.int32)
        return ((signed << 20) & -0x78100000).to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.float32)


@triton.jit
def _unit(kind: tl.constexpr):
    """What `_widened` divides by."""
    if kind == tl.float8e4nv:
        return 1.329227995784916e36  # 2**120
    else:
        return 1.0


@triton.jit
def _add_products(sums, tile, scaled, FOLD: tl.constexpr):
    """Add tile * scaled to sums, FOLD columns to one: those of one load of one thread, so in registers."""
    products = _widened(tile) * scaled[None, :]
    folded: tl.constexpr = (products.shape[0], products.shape[1] // FOLD, FOLD)
    return sums + tl.sum(tl.reshape(products, folded), 2)


@triton.jit
def _inverse_rms(squares, K: tl.constexpr, eps):
    return 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def _row_sums(
    weight, rows, N, x, gain, eps,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products fp32 [BLOCK_N] of rows of a weight [N, K] with x, normalised where NORM."""
    FOLD: tl.constexpr = 16 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    tile = _load_tile(weight, rows, 0, N, K, BLOCK_K, EVEN)
    after_previous(PDL)
    value, scaled = _load_vector(x, gain, 0, K, BLOCK_K, NORM)
    sums = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    if FOLD == 16 and K <= 8 * BLOCK_K:  # a loop would carry each byte in a register of its own
        for start in tl.static_range(BLOCK_K, K + BLOCK_K, BLOCK_K):
            following = _load_tile(weight, rows, start, N, K, BLOCK_K, EVEN)
            next_value, next_scaled = _load_vector(x, gain, start, K, BLOCK_K, NORM)
            squares += value * value
            sums = _add_products(sums, tile, scaled, FOLD)
            tile, value, scaled = following, next_value, next_scaled
    else:
        for start in range(BLOCK_K, K + BLOCK_K, BLOCK_K):
            following = _load_tile(weight, rows, start, N, K, BLOCK_K, EVEN)
            next_value, next_scaled = _load_vector(x, gain, start, K, BLOCK_K, NORM)
            squares += value * value
            sums = _add_products(sums, tile, scaled, FOLD)
            tile, value, scaled = following, next_value, next_scaled
    result = tl.sum(sums, 1) * _unit(weight.dtype.element_ty)
    if NORM:
        result = result * _inverse_rms(squares, K, eps)
    return result


@triton.jit
def product(
    w0, w1, w2, s0, s1, s2, x, gain, y, eps,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, K: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [N0 + N1 + N2] = the products of up to three weights [Ni, K] with x; ADD adds them to y.

    SCALED multiplies row i by its scale. Programs: the sum of ceil(Ni / BLOCK_N).
    """
    at_once(PDL)
    program = tl.program_id(0)
    first: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    second: tl.constexpr = first + (N1 + BLOCK_N - 1) // BLOCK_N
    weight, scale, N, block, offset = w0, s0, N0, program, 0
    if N1 > 0:
        if program >= second:
            weight, scale, N, block, offset = w2, s2, N2, program - second, N0 + N1
        elif program >= first:
            weight, scale, N, block, offset = w1, s1, N1, program - first, N0
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    result = _row_sums(weight, rows, N, x, gain, eps, K, NORM, BLOCK_N, BLOCK_K, EVEN, PDL)
    inside = rows < N
    if SCALED:
        result = result * tl.load(scale + rows, mask=inside, other=0.0)
    if ADD:
        result = result + tl.load(y + offset + rows, mask=inside, other=0.0)
    tl.store(y + offset + rows, result, mask=inside)


@triton.jit
def gated_product(
    gate, up, gate_scale, up_scale, x, gain, y, eps,
    N: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = silu(gate norm(x)) * (up norm(x)), weights [N, K] each."""
    at_once(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    FOLD: tl.constexpr = 16 // (gate.dtype.element_ty.primitive_bitwidth // 8)
    tile0 = _load_tile(gate, rows, 0, N, K, BLOCK_K, EVEN)
    tile1 = _load_tile(up, rows, 0, N, K, BLOCK_K, EVEN)
    after_previous(PDL)
    value, scaled = _load_vector(x, gain, 0, K, BLOCK_K, True)
    sums0 = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    sums1 = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    if FOLD == 16 and K <= 8 * BLOCK_K:  # a loop would carry each byte in a register of its own
        for start in tl.static_range(BLOCK_K, K + BLOCK_K, BLOCK_K):
            following0 = _load_tile(gate, rows, start, N, K, BLOCK_K, EVEN)
            following1 = _load_tile(up, rows, start, N, K, BLOCK_K, EVEN)
            next_value, next_scaled = _load_vector(x, gain, start, K, BLOCK_K, True)
            squares += value * value
            sums0 = _add_products(sums0, tile0, scaled, FOLD)
            sums1 = _add_products(sums1, tile1, scaled, FOLD)
            tile0, tile1, value, scaled = following0, following1, next_value, next_scaled
    else:
        for start in range(BLOCK_K, K + BLOCK_K, BLOCK_K):
            following0 = _load_tile(gate, rows, start, N, K, BLOCK_K, EVEN)
            following1 = _load_tile(up, rows, start, N, K, BLOCK_K, EVEN)
            next_value, next_scaled = _load_vector(x, gain, start, K, BLOCK_K, True)
            squares += value * value
            sums0 = _add_products(sums0, tile0, scaled, FOLD)
            sums1 = _add_products(sums1, tile1, scaled, FOLD)
            tile0, tile1, value, scaled = following0, following1, next_value, next_scaled
    inverse = _inverse_rms(squares, K, eps) * _unit(gate.dtype.element_ty)
    opened, passed = tl.sum(sums0, 1) * inverse, tl.sum(sums1, 1) * inverse
    inside = rows < N
    if SCALED:
        opened = opened * tl.load(gate_scale + rows, mask=inside, other=0.0)
        passed = passed * tl.load(up_scale + rows, mask=inside, other=0.0)
    tl.store(y + rows, opened * tl.sigmoid(opened) * passed, mask=inside)


@triton.jit
def vocabulary(
    weight, x, gain, logits, best, best_at, eps,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits fp32 [N] = weight [N, K] norm(x), and of every block of rows the largest and where it is."""
    at_once(PDL)
    block = tl.program_id(0)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    result = _row_sums(weight, rows, N, x, gain, eps, K, True, BLOCK_N, BLOCK_K, EVEN, PDL)
    inside = rows < N
    tl.store(logits + rows, result, mask=inside)
    result = tl.where(inside, result, float("-inf"))
    tl.store(best + block, tl.max(result, 0))
    tl.store(best_at + block, block * BLOCK_N + tl.argmax(result, 0))


@triton.jit
def begin(
    token, table, x, position, frequency, cosine, sine,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x fp32 [D] = the token's embedding; cos and sin [HALF] of its rotary angles position * frequency."""
    # What comes after reads the step's scalars before it waits: not before the last step has ended.
    LATE: tl.constexpr = 1 if PDL > 0 else 0
    after_previous(LATE)
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    row = table + tl.load(token) * D
    tl.store(x + at, tl.load(row + at, mask=at < D, other=0.0).to(tl.float32), mask=at < D)
    if block == 0:
        half = tl.arange(0, HALF)
        angle = tl.load(position) * tl.load(frequency + half)
        tl.store(cosine + half, tl.cos(angle))
        tl.store(sine + half, tl.sin(angle))


@triton.jit
def finish(
    best, best_at, token, history, step, length, position,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The likeliest token out of the blocks' best (the first of equals), written down; then one step on."""
    after_previous(PDL)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, BLOCKS, BLOCK):
        block = start + tl.arange(0, BLOCK)
        value = tl.load(best + block, mask=block < BLOCKS, other=float("-inf"))
        where = tl.load(best_at + block, mask=block < BLOCKS, other=0)
        better = value > top
        top = tl.where(better, value, top)
        at = tl.where(better, where, at)
    highest = tl.max(top, 0)
    chosen = tl.min(tl.where(top == highest, at, 2147483647), 0).to(tl.int64)
    now = tl.load(step)
    tl.store(token, chosen)
    tl.store(history + now, chosen)
    tl.store(step, now + 1)
    tl.store(length, tl.load(length) + 1)
    tl.store(position, tl.load(position) + 1.0)
