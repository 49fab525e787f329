"""The device's half of a composed batch: backgrounds, sprites and shadows, as tensor operations.

The same as `placards.drawing` does with one canvas at a time, for all canvases of a batch at once. The pixels
of all boxes stand in one long list, so that the number of operations depends on how many signs lie on top of
one another, not on how many there are. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arrcoc.demo.training.bank import Pixels
from arrcoc.demo.training.batches import Batch
from arrcoc.demo.training.places import Span
from arrcoc.demo.training.sketch import Sketch

_SHADE = 0.38
_CANVAS_PIXELS = 1 << 24
"""Of the backgrounds made at once: temporaries take about 60 bytes for each."""


def compose(sketch: Sketch, pixels: Pixels) -> Batch:
    """Paint a sketch: a batch on the device of `pixels`, images uint8 [B, 3, S, S]."""
    device = pixels.texels.device
    batch, places = sketch.batch.to(device), sketch.places.to(device)
    side = batch.canvas
    images = torch.empty((len(batch.families), 3, side, side), dtype=torch.uint8, device=device)
    step = max(1, _CANVAS_PIXELS // side**2)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        _background(images[part], places.crops[part], places.grades[part], places.reach, pixels.backgrounds)
    for span in places.pasted:
        _paste(images, places.parts, places.drops, span, pixels.texels)
    for span in places.shaded:
        _shade(images, places.shades, places.ellipses, span)
    return replace(batch, images=images)


def _background(images: Tensor, crops: Tensor, grades: Tensor, reach: int, sources: Tensor) -> None:
    """Crop, flip, resize (bilinear, not antialiased: crops are at most 1.43 canvases wide) and grade."""
    side, device = images.shape[-1], images.device
    source, top, left, size, flip = (column[:, None] for column in crops.long().T)
    # Smaller crops go on as their last row and column, which is what the border of a picture repeats as.
    along = torch.minimum(torch.arange(reach, device=device), size - 1)
    texels = sources[source[:, None], (top + along)[:, :, None], (left + along)[:, None]]
    planes = _channels(texels)[:, :3].float()
    # Pixel j of the canvas has its centre at (j + 1/2) size / side px of the crop, and the crop's frame of
    # `reach` px spans -1 .. 1.
    place = (torch.arange(side, device=device) + 0.5) * (2 * size / (side * reach)) - 1
    across = torch.where(flip > 0, place.flip(1), place)
    grid = torch.stack((across[:, None].expand(-1, side, -1), place[:, :, None].expand(-1, -1, side)), -1)
    made = torch.nn.functional.grid_sample(
        planes, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    made *= grades[:, :, :1, None]
    made += grades[:, :, 1:, None] + 0.5
    images.copy_(made.clamp_(0, 255))


def _paste(images: Tensor, parts: Tensor, drops: Tensor, span: Span, texels: Tensor) -> None:
    """Blend sprites that do not overlap, each over a drop shadow two px below; as `drawing.paste`."""
    start, stop, _ = span
    rows, columns = parts[start:stop].long(), images.shape[-1]
    owner, down, right, target = _spread(rows, span, columns)
    first, stride = rows[owner, 6], rows[owner, 7]
    source = first + down * stride + right
    sprite = texels[source]
    # The drop shadow is the sprite itself, two px further; what would lie before its first row has none.
    inside = (down >= 2) & (right >= 2)
    drop = _coverage(texels[source - 2 * (stride + 1) * inside]) * inside * drops[start:stop][owner]
    canvas = images.view(-1)
    under = canvas[target].float()
    shaded = torch.floor(under * (1 - drop))
    rgb = _channels(sprite)[:3].float()
    blended = shaded + (rgb - shaded) * _coverage(sprite) + 0.5
    canvas[target] = blended.clamp_(0, 255).to(torch.uint8)


def _shade(images: Tensor, shades: Tensor, ellipses: Tensor, span: Span) -> None:
    """Darken soft ellipses that do not overlap; as `drawing.shade`."""
    start, stop, _ = span
    rows = shades[start:stop].long()
    owner, down, right, target = _spread(rows, span, images.shape[-1])
    middle_x, middle_y, *axes = ellipses[start:stop][owner].T
    dx, dy = rows[owner, 1] + right - middle_x, rows[owner, 2] + down - middle_y
    fall = (2.5 - 2.5 * torch.hypot(axes[0] * dx + axes[1] * dy, axes[2] * dx + axes[3] * dy)).clamp_(0, 1)
    factor = 1 - _SHADE * fall * fall * (3 - 2 * fall)
    canvas = images.view(-1)
    canvas[target] = (canvas[target].float() * factor).to(torch.uint8)


def _spread(rows: Tensor, span: Span, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pixels [n] of some boxes in one list: row of the box, place in it, and index [3, n] in the images.

    Args:
        rows: int64 [k, 6 or more]: example, x, y, width, height, pixels before.
        span: of these rows; its number of pixels is known, or the device would be asked for it.
        side: of a canvas, in px.
    """
    example, x, y, width, height, before = rows.T[:6]
    owner = torch.repeat_interleave(width * height, output_size=span[2])
    local = torch.arange(span[2], device=rows.device) - before[owner]
    down = torch.div(local, width[owner], rounding_mode="floor")
    right = local - down * width[owner]
    corner = example * (3 * side * side) + y * side + x
    planes = torch.arange(3, device=rows.device)[:, None] * (side * side)
    return owner, down, right, corner[owner] + down * side + right + planes


def _channels(texels: Tensor) -> Tensor:
    """Texels int32 [n] as bytes uint8 [4, n], or [B, h, w] as [B, 4, h, w]."""
    return texels[..., None].view(torch.uint8).movedim(-1, 0 if texels.dim() == 1 else 1)


def _coverage(texels: Tensor) -> Tensor:
    """Coverage in [0, 1], fp32."""
    return (texels >> 24 & 255).float() / 255
