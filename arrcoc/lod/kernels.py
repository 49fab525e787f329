# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# ruff: noqa: N803, N806  (Triton's compile-time constants are written in capitals)
"""Triton kernels of the fused tower: patches, layer norm, GELU and rotary embedding, one pass each.

All of them read and write bf16 or fp16 and compute in fp32. Those that end in `_float8` write e4m3 with one
fp32 scale a row instead (value = quantised * scale), so that quantising costs no pass of its own. Rows are
cut into a block of the largest power of two and one for the rest: 1152 = 1024 + 128, without idle lanes.
Counts of rows are not specialised on: a batch of another size compiles nothing anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arrcoc.vision import VisionWeights

FLOAT8 = torch.float8_e4m3fn
"""What the float8 kernels write; its largest value is 448."""


def split_width(width: int, least: int = 1) -> tuple[int, int]:
    """`width` as the largest power of two in it and a power of two, 0 or >= `least`, that holds the rest."""
    head = max(1 << (width.bit_length() - 1), least)
    rest = max(width - head, 0)
    return head, 0 if rest == 0 else max(triton.next_power_of_2(rest), least)


def patches(pixels: Tensor, weights: VisionWeights, dtype: torch.dtype) -> Tensor:
    """What `vision.patchify` gives, with one of the two equal frames: [B * N, 3 * patch**2].

    Args:
        pixels: uint8 [B, 3, h, w], contiguous, h and w whole merged tokens.
        weights: give patch, merge, mean and std.
        dtype: of the result.
    """
    batch, _, height, width = pixels.shape
    patch = weights.patch
    count = batch * height * width // patch**2
    out = torch.empty(count, 3 * patch**2, dtype=dtype, device=pixels.device)
    mean, std = ([float(v) * 255 for v in stats] for stats in (weights.mean, weights.std))
    rows = 8
    _patches[(triton.cdiv(count, rows),)](
        pixels, out, count, height, width, *mean, *std,
        PATCH=patch, MERGE=weights.merge, CELLS=triton.next_power_of_2(patch**2), ROWS=rows,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "height", "width"])
def _patches(
    pixels, out, count, height, width, mean0, mean1, mean2, std0, std1, std2,
    PATCH: tl.constexpr, MERGE: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cell = tl.arange(0, CELLS)
    valid = (number < count)[:, None] & (cell < PATCH * PATCH)[None, :]
    # Merge order: token row, token column, then the patch's row and column inside its token.
    cols = width // (PATCH * MERGE)
    per_image = (height // PATCH) * (width // PATCH)
    image, inside = number // per_image, number % per_image
    token, part = inside // (MERGE * MERGE), inside % (MERGE * MERGE)
    row = (token // cols) * MERGE + part // MERGE
    col = (token % cols) * MERGE + part % MERGE
    y = row[:, None] * PATCH + (cell // PATCH)[None, :]
    x = col[:, None] * PATCH + (cell % PATCH)[None, :]
    for channel in tl.static_range(3):
        mean = mean0 if channel == 0 else (mean1 if channel == 1 else mean2)
        std = std0 if channel == 0 else (std1 if channel == 1 else std2)
        plane = (image * 3 + channel).to(tl.int64)[:, None] * height * width
        value = tl.load(pixels + plane + y * width + x, mask=valid, other=0).to(tl.float32)
        target = number.to(tl.int64)[:, None] * (3 * PATCH * PATCH) + channel * PATCH * PATCH + cell[None, :]
        tl.store(out + target, ((value - mean) / std).to(out.dtype.element_ty), mask=valid)


def layer_norm(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, *, rows: int = 4, warps: int = 4
) -> Tensor:
    """Layer norm of x + shift.

    Args:
        x: [M, W]; not changed.
        shift: fp32 [W], added to every row before it is normalised.
        weight, bias: [W].
        eps: added to the variance.
        rows: rows a program works on.
        warps: warps a program has.
    """
    out = torch.empty_like(x)
    _launch_norm(x, None, shift, weight, bias, eps, out, None, rows, warps)
    return out


def add_layer_norm(
    x: Tensor, y: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float,
    *, rows: int = 4, warps: int = 4,
) -> Tensor:  # fmt: skip
    """x += y + shift in place, and its layer norm; see `layer_norm`."""
    out = torch.empty_like(x)
    _launch_norm(x, y, shift, weight, bias, eps, out, None, rows, warps)
    return out


def layer_norm_float8(
    x: Tensor, y: Tensor | None, shift: Tensor, weight: Tensor, bias: Tensor, eps: float,
    *, rows: int = 4, warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layer_norm` (y None) or `add_layer_norm` as e4m3 [M, W] and fp32 scales [M, 1]."""
    out = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _launch_norm(x, y, shift, weight, bias, eps, out, scale, rows, warps)
    return out, scale


def _launch_norm(
    x: Tensor, y: Tensor | None, shift: Tensor, weight: Tensor, bias: Tensor, eps: float,
    out: Tensor, scale: Tensor | None, rows: int, warps: int,
) -> None:  # fmt: skip
    count, width = x.shape
    assert x.is_contiguous()
    assert shift.numel() == width, (x.shape, shift.shape)
    head, tail = split_width(width)
    _norm[(triton.cdiv(count, rows),)](
        x, x if y is None else y, shift, weight, bias, out, shift if scale is None else scale, count, eps,
        WIDTH=width, HEAD=head, TAIL=tail, ROWS=rows, ADD=y is not None, FLOAT8=scale is not None,
        num_warps=warps,
    )  # fmt: skip


@triton.jit
def _norm_part(
    x, y, shift, row, valid_row, start, WIDTH: tl.constexpr, SIZE: tl.constexpr, ADD: tl.constexpr
):
    """fp32 values of one block of columns; where something is added, it is written back."""
    col = start + tl.arange(0, SIZE)
    valid = valid_row[:, None] & (col < WIDTH)[None, :]
    place = row[:, None] * WIDTH + col[None, :]
    moved = tl.load(shift + col, mask=col < WIDTH, other=0.0)[None, :]
    value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32) + moved
    if ADD:
        value += tl.load(y + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(x + place, value.to(x.dtype.element_ty), mask=valid)
    return value


@triton.jit
def _scaled_part(value, weight, bias, start, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    col = start + tl.arange(0, SIZE)
    gain = tl.load(weight + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    offset = tl.load(bias + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    return value * gain[None, :] + offset[None, :]


@triton.jit
def _store_part(out, value, row, valid_row, start, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    col = start + tl.arange(0, SIZE)
    place = row[:, None] * WIDTH + col[None, :]
    valid = valid_row[:, None] & (col < WIDTH)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["count"])
def _norm(
    x, y, shift, weight, bias, out, scale, count, eps, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = number < count
    row = number.to(tl.int64)
    head = _norm_part(x, y, shift, row, ok, 0, WIDTH, HEAD, ADD)
    total = tl.sum(head, 1)
    if TAIL > 0:
        tail = _norm_part(x, y, shift, row, ok, HEAD, WIDTH, TAIL, ADD)
        total += tl.sum(tail, 1)
    mean = total / WIDTH
    head = tl.where((tl.arange(0, HEAD) < WIDTH)[None, :], head - mean[:, None], 0.0)
    squares = tl.sum(head * head, 1)
    if TAIL > 0:
        tail = tl.where((HEAD + tl.arange(0, TAIL) < WIDTH)[None, :], tail - mean[:, None], 0.0)
        squares += tl.sum(tail * tail, 1)
    spread = tl.rsqrt(squares / WIDTH + eps)[:, None]
    head = _scaled_part(head * spread, weight, bias, 0, WIDTH, HEAD)
    if TAIL > 0:
        tail = _scaled_part(tail * spread, weight, bias, HEAD, WIDTH, TAIL)
    if FLOAT8:
        most = tl.max(tl.abs(head), 1)
        if TAIL > 0:
            most = tl.maximum(most, tl.max(tl.abs(tail), 1))
        step = tl.maximum(most, 1e-12) / 448.0
        tl.store(scale + row, step, mask=ok)
        head = head / step[:, None]
        if TAIL > 0:
            tail = tail / step[:, None]
    _store_part(out, head, row, ok, 0, WIDTH, HEAD)
    if TAIL > 0:
        _store_part(out, tail, row, ok, HEAD, WIDTH, TAIL)


def quantize_rows(
    x: Tensor, *, gelu: str = "none", step: float | None = None, rows: int = 1, warps: int = 4
) -> tuple[Tensor, Tensor]:
    """Rows of x [M, W] as e4m3 [M, W] and fp32 scales [M, 1], after a GELU where one is named.

    Args:
        x: contiguous.
        gelu: `none`, `tanh` (Hendrycks and Gimpel, arXiv 1606.08415, section 2) or `erf`.
        step: the scale of all rows, beyond 448 of which they saturate; scales are then given as ones, as the
            weight's are taken to contain it. None finds each row its own.
        rows: rows a program works on.
        warps: warps a program has.
    """
    count, width = x.shape
    assert x.is_contiguous()
    out = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    head, tail = split_width(width)
    _quantize[(triton.cdiv(count, rows),)](
        x, out, scale, step or 0.0, count, WIDTH=width, HEAD=head, TAIL=tail, ROWS=rows, GELU=gelu,
        FIXED=step is not None, num_warps=warps,
    )  # fmt: skip
    return out, scale


@triton.jit
def _activated_part(x, row, valid_row, start, WIDTH: tl.constexpr, SIZE: tl.constexpr, GELU: tl.constexpr):
    col = start + tl.arange(0, SIZE)
    valid = valid_row[:, None] & (col < WIDTH)[None, :]
    value = tl.load(x + row[:, None] * WIDTH + col[None, :], mask=valid, other=0.0).to(tl.float32)
    if GELU == "tanh":
        # x * (1 + tanh(u)) / 2 = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x**3)
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    if GELU == "erf":
        value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    return value


@triton.jit(do_not_specialize=["count", "fixed"])
def _quantize(
    x, out, scale, fixed, count, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, GELU: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = number < count
    row = number.to(tl.int64)
    head = _activated_part(x, row, ok, 0, WIDTH, HEAD, GELU)
    most = tl.max(tl.abs(head), 1)
    if TAIL > 0:
        tail = _activated_part(x, row, ok, HEAD, WIDTH, TAIL, GELU)
        most = tl.maximum(most, tl.max(tl.abs(tail), 1))
    step = tl.maximum(most, 1e-12) / 448.0
    if FIXED:
        step = tl.zeros_like(step) + fixed
    tl.store(scale + row, step / fixed if FIXED else step, mask=ok)
    _store_part(out, head / step[:, None], row, ok, 0, WIDTH, HEAD)
    if TAIL > 0:
        _store_part(out, tail / step[:, None], row, ok, HEAD, WIDTH, TAIL)


def rotate_(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, parts: str = "qk", *, rows: int = 1, warps: int = 4
) -> None:
    """Apply RoPE in place to queries, keys or both.

    Args:
        qkv: [M, 3 * heads * head_dim], M = B * N rows in the order of B images of N patches.
        cos, sin: fp32 [N, head_dim / 2]; the second half of a head turns by the same angles.
        heads: attention heads.
        parts: `q`, `k` or `qk`.
        rows: rows a program works on.
        warps: warps a program has.
    """
    count, width = qkv.shape
    dim = width // (3 * heads)
    first, many = (heads if parts == "k" else 0), len(parts) * heads
    _rotate[(triton.cdiv(count, rows),)](
        qkv, cos, sin, count, len(cos), first * dim,
        WIDTH=width, DIM=dim, HEADS=many, HEADS_BLOCK=triton.next_power_of_2(many),
        HALF_BLOCK=triton.next_power_of_2(dim // 2), ROWS=rows, num_warps=warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "per_image", "first"])
def _rotate(
    qkv, cos, sin, count, per_image, first, WIDTH: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    flat = tl.arange(0, ROWS * HEADS_BLOCK)
    number = tl.program_id(0) * ROWS + flat // HEADS_BLOCK
    head = flat % HEADS_BLOCK
    pair = tl.arange(0, HALF_BLOCK)
    valid = ((number < count) & (head < HEADS))[:, None] & (pair < HALF)[None, :]
    angle = (number % per_image)[:, None] * HALF + pair[None, :]
    turn_cos = tl.load(cos + angle, mask=valid, other=0.0)
    turn_sin = tl.load(sin + angle, mask=valid, other=0.0)
    place = qkv + number.to(tl.int64)[:, None] * WIDTH + first + head[:, None] * DIM + pair[None, :]
    left = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    right = tl.load(place + HALF, mask=valid, other=0.0).to(tl.float32)
    tl.store(place, (left * turn_cos - right * turn_sin).to(qkv.dtype.element_ty), mask=valid)
    tl.store(place + HALF, (right * turn_cos + left * turn_sin).to(qkv.dtype.element_ty), mask=valid)
