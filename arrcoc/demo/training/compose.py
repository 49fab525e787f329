"""The device's half of a composed batch: backgrounds, distractors, signs and shadows, as tensor operations.

The same as `placards.drawing` does with one canvas at a time, for all canvases of a batch at once: what is
drawn first on every canvas, then what is drawn second, and so on.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from arrcoc.demo.training.bank import Pixels
from arrcoc.demo.training.batches import Batch
from arrcoc.demo.training.sketch import Places, Sketch

_SIGN_SHADOW, _STRAY_SHADOW = 0.35, 0.2
_SHADE = 0.38


def compose(sketch: Sketch, pixels: Pixels) -> Batch:
    """Paint a sketch: a batch on the device of `pixels`, images uint8 [B, 3, S, S]."""
    device = pixels.signs.device
    batch = sketch.batch.to(device)
    side = batch.canvas
    images = torch.empty((len(batch.families), 3, side, side), dtype=torch.uint8, device=device)
    if sketch.drawn:
        images[list(sketch.drawn)] = batch.images
    _backgrounds(images, sketch.places, pixels.backgrounds)
    _paste(images, sketch.places.strays, pixels.strays, _STRAY_SHADOW)
    _paste(images, sketch.places.signs, pixels.signs, _SIGN_SHADOW)
    _shade(images, sketch.places.shadows)
    kept = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    return Batch(**(kept | {"images": images}))


def _backgrounds(images: Tensor, places: Places, sources: Tensor) -> None:
    """Crop, flip, resize and grade, one canvas at a time: crops differ in size."""
    grades = places.grades.to(images.device)
    for (example, source, top, left, side, flip), grade in zip(places.crops.tolist(), grades, strict=True):
        crop = sources[source, :, top : top + side, left : left + side].float()
        crop = (crop * grade[:, :1, None] + grade[:, 1:, None]).clamp(0, 255)
        crop = crop.flip(2) if flip else crop
        resized = torch.nn.functional.interpolate(
            crop[None], tuple(images.shape[2:]), mode="bilinear", antialias=side > images.shape[2]
        )
        images[example] = resized[0].round().to(torch.uint8)


def _paste(images: Tensor, places: Tensor, sprites: Tensor, shadow: float) -> None:
    """Blend sprites in at places [k, 5], each over a drop shadow two px below; as `drawing.paste`."""
    side, reach = images.shape[-1], torch.arange(sprites.shape[-1], device=images.device)
    for rows in _in_turn(places):
        example, _, sprite, x, y = (column[:, None, None] for column in rows.to(images.device).T)
        # Places beyond the canvas are those on its edge again: the same pixel is written twice alike.
        down, right = (
            torch.minimum(y + reach[:, None], torch.tensor(side - 1, device=images.device)),
            torch.minimum(x + reach, torch.tensor(side - 1, device=images.device)),
        )
        rgb, alpha = _looked_up(sprites, sprite, down - y, right - x)
        under = images[example, :, down, right].float()
        drop = _looked_up(sprites, sprite, (down - y - 2).clamp(min=0), (right - x - 2).clamp(min=0))[1]
        inside = ((down - y >= 2) & (right - x >= 2))[..., None]
        shaded = torch.floor(under * (1 - drop * inside * shadow))
        blended = shaded + (rgb - shaded) * alpha + 0.5
        images[example, :, down, right] = blended.floor().clamp(0, 255).to(torch.uint8)


def _looked_up(sprites: Tensor, sprite: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [k, h, w, 3] and coverage [k, h, w, 1] in [0, 1], fp32."""
    values = sprites[sprite, :, down, right].float()
    return values[..., :3], values[..., 3:] / 255


def _shade(images: Tensor, shadows: Tensor) -> None:
    """Darken soft ellipses; as `drawing.shade`."""
    side = images.shape[-1]
    for rows in _in_turn(shadows):
        example = rows[:, 0].long().to(images.device)[:, None, None]
        # Half-widths of an ellipse: the root of the diagonal of (axes^T axes)^-1.
        axes = rows[:, 4:].reshape(-1, 2, 2)
        half = torch.linalg.inv(axes.transpose(1, 2) @ axes).diagonal(dim1=1, dim2=2).sqrt().max()
        span = min(side, 2 * int(half) + 4)
        start = (rows[:, 2:4] - span / 2).round().long().clamp(0, side - span).to(images.device)
        window = torch.arange(span, device=images.device)
        right, down = start[:, :1, None] + window, start[:, 1:, None] + window[:, None]
        centre, turn = rows[:, 2:4].float().to(images.device), axes.float().to(images.device)
        dx, dy = right - centre[:, :1, None], down - centre[:, 1:, None]
        u, v = (turn[:, k, 0, None, None] * dx + turn[:, k, 1, None, None] * dy for k in (0, 1))
        fall = (2.5 - 2.5 * torch.hypot(u, v)).clamp(0, 1)
        factor = 1 - _SHADE * fall * fall * (3 - 2 * fall)
        part = images[example, :, down, right].float()
        images[example, :, down, right] = (part * factor[..., None]).floor().to(torch.uint8)


def _in_turn(places: Tensor) -> list[Tensor]:
    """Rows by their order within a canvas (column 1): no two of a group lie on one canvas."""
    last = int(places[:, 1].max()) if len(places) else -1
    return [places[places[:, 1] == order] for order in range(last + 1)]
