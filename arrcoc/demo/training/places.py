"""Where the parts of a bank go on the canvases of a batch, as tables that reach the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arrcoc.demo.placards.records import Box
from arrcoc.demo.placards.scene import Shadow

_MOST_PIXELS = 1 << 22
"""Pasted at once: temporaries take about 130 bytes for each."""

Span = tuple[int, int, int]
"""Rows start .. stop - 1 of a table, and the pixels that their boxes hold together."""


class Part(NamedTuple):
    """A sprite on a canvas; sprites of one canvas and level do not overlap, and higher levels lie on top."""

    texel: int
    stride: int
    box: Box
    shadow: float
    level: int


class Places(NamedTuple):
    """Tables on one device; each box of `parts` and `shades` is followed by the pixels before it in its span.

    Attributes:
        crops: int32 [B, 5]: background, top, left, side of the crop, 1 if flipped.
        grades: fp32 [B, 3, 2]: factor and offset of each channel.
        parts: int32 [k, 8]: example, x, y, width, height, pixels before, first texel, texels in a row.
        drops: fp32 [k]: how dark the drop shadow is.
        shades: int32 [m, 6]: example, x, y, width, height, pixels before.
        ellipses: fp32 [m, 6]: centre x and y, axes row by row.
        pasted: spans of `parts`, one after the other.
        shaded: spans of `shades`.
        reach: greatest side of a crop.
    """

    crops: Tensor
    grades: Tensor
    parts: Tensor
    drops: Tensor
    shades: Tensor
    ellipses: Tensor
    pasted: tuple[Span, ...]
    shaded: tuple[Span, ...]
    reach: int

    def to(self, device: torch.device) -> Places:
        """The same tables on a device, in a single copy that nobody waits for."""
        tables = self[:6]
        flat = torch.cat([table.reshape(-1).view(torch.int32) for table in tables])
        flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
        pieces = torch.split_with_sizes(flat, [table.numel() for table in tables])
        moved = [p.view(t.dtype).view(t.shape) for p, t in zip(pieces, tables, strict=True)]
        crops, grades, parts, drops, shades, ellipses = moved
        return Places(crops, grades, parts, drops, shades, ellipses, self.pasted, self.shaded, self.reach)


def pack(
    crops: Sequence[tuple[int, int, int, int, int]],
    grades: Sequence[NDArray[np.float32]],
    parts: Sequence[Sequence[Part]],
    shadows: Sequence[Sequence[Shadow]],
    canvas: int,
) -> Places:
    """Tables of a batch from what lies on each of its canvases, `canvas` px a side."""
    laid = sorted(
        ((row, part) for row, own in enumerate(parts) for part in own), key=lambda laid: laid[1].level
    )
    pasted, before = _spans([(part.level, _area(part.box)) for _, part in laid])
    cast = [
        (row, box, shadow)
        for row, own in enumerate(shadows)
        for shadow in own
        if _area(box := shaded_box(shadow, canvas))
    ]
    # Shadows of a canvas never overlap (`scene.shadows`), and so all are of one level.
    shaded, ahead = _spans([(0, _area(box)) for _, box, _ in cast])
    return Places(
        crops=_ints(crops, 5),
        grades=torch.from_numpy(np.stack(grades)),
        parts=_ints(
            [
                (row, *_sized(part.box), first, part.texel, part.stride)
                for (row, part), first in zip(laid, before, strict=True)
            ],
            8,
        ),
        drops=torch.tensor([part.shadow for _, part in laid], dtype=torch.float32),
        shades=_ints(
            [(row, *_sized(box), first) for (row, box, _), first in zip(cast, ahead, strict=True)], 6
        ),
        ellipses=torch.tensor(
            [(*_middle(shadow.region), *shadow.axes.ravel()) for _, _, shadow in cast], dtype=torch.float32
        ).reshape(len(cast), 6),
        pasted=pasted,
        shaded=shaded,
        reach=max(crop[3] for crop in crops),
    )


def shaded_box(shadow: Shadow, canvas: int) -> Box:
    """The part of the canvas that a shadow's ellipse darkens; empty where it lies outside."""
    # Half-widths of the ellipse: the root of the diagonal of (axes^T axes)^-1.
    wide, tall = np.sqrt(np.diag(np.linalg.inv(shadow.axes.T @ shadow.axes))) + 1
    x, y = _middle(shadow.region)
    x0, y0 = max(0, shadow.region[0], int(x - wide)), max(0, shadow.region[1], int(y - tall))
    x1 = min(canvas, shadow.region[2], int(x + wide) + 1)
    y1 = min(canvas, shadow.region[3], int(y + tall) + 1)
    return x0, y0, max(x0, x1), max(y0, y1)


def _spans(laid: Sequence[tuple[int, int]]) -> tuple[tuple[Span, ...], list[int]]:
    """Spans of rows (level, pixels), each of one level and few pixels; and the pixels before each row."""
    spans: list[Span] = []
    before: list[int] = []
    for row, (level, area) in enumerate(laid):
        start, _, total = spans[-1] if spans else (0, 0, 0)
        if not spans or laid[start][0] != level or total + area > _MOST_PIXELS:
            start, total = row, 0
        else:
            spans.pop()
        before.append(total)
        spans.append((start, row + 1, total + area))
    return tuple(spans), before


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _sized(box: Box) -> tuple[int, int, int, int]:
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def _middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _ints(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width)
