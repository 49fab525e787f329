"""Where things go: random places in which signs may cover one another's edges, but never a code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from arrcoc.demo.placards.records import Box, Rng, intersects, shifted

CORNERS = ("top left", "top right", "bottom left", "bottom right")

_CLEAR = 0.12
"""Half-width of the ambiguous band about the middle of the canvas, as a share of its side."""
_GAP = 4
_ATTACH = 0.2
_COVER = 0.25
_TRIES = 60
_RESTARTS = 400


class Footprint(NamedTuple):
    """What a sign takes up: size in px, the part that must stay visible, and the corner it must lie in."""

    width: int
    height: int
    keep: Box
    corner: str | None = None


def corner_of(box: Box, height: int, width: int) -> str | None:
    """The corner of the canvas in which a box's centre lies, or None near the middle lines."""
    x, y = (box[0] + box[2]) / 2 / width - 0.5, (box[1] + box[3]) / 2 / height - 0.5
    if min(abs(x), abs(y)) < _CLEAR:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def capacity(height: int, width: int) -> int:
    """Most signs that a canvas takes: half as many as it has 128-px squares, at least one."""
    return max(1, (height // 128) * (width // 128) // 2)


def place(rng: Rng, footprints: Sequence[Footprint], height: int, width: int) -> list[Box]:
    """Boxes for all footprints, in their order (later ones lie on top).

    Two boxes are at least 4 px apart, or the later one covers at most a quarter of the earlier one's box and
    nothing of its `keep`.
    """
    for _ in range(_RESTARTS):
        boxes = _attempt(rng, footprints, height, width)
        if boxes is not None:
            return boxes
    raise AssertionError(f"{len(footprints)} signs do not fit on {width} x {height} px")


def free_box(rng: Rng, size: tuple[int, int], taken: Sequence[Box], height: int, width: int) -> Box | None:
    """A place for (width, height) px that stays clear of every taken box, or None after eight tries."""
    if size[0] > width or size[1] > height:
        return None
    for _ in range(8):
        box = _anywhere(rng, Footprint(*size, (0, 0, 0, 0)), height, width)
        if not any(intersects(box, other, _GAP) for other in taken):
            return box
    return None


def _attempt(rng: Rng, footprints: Sequence[Footprint], height: int, width: int) -> list[Box] | None:
    boxes: list[Box] = []
    keeps: list[Box] = []
    hosts: set[int] = set()
    for foot in footprints:
        for _ in range(_TRIES):
            host = None
            if boxes and foot.corner is None and rng.random() < _ATTACH:
                host = int(rng.integers(len(boxes)))
            box = _anywhere(rng, foot, height, width) if host is None else _beside(rng, foot, boxes[host])
            if host in hosts or not _legal(box, foot, host, boxes, keeps, height, width):
                continue
            boxes.append(box)
            keeps.append(shifted(foot.keep, box[0], box[1]))
            hosts |= set() if host is None else {host}
            break
        else:
            return None
    return boxes


def _anywhere(rng: Rng, foot: Footprint, height: int, width: int) -> Box:
    x = int(rng.integers(0, width - foot.width + 1))
    y = int(rng.integers(0, height - foot.height + 1))
    return x, y, x + foot.width, y + foot.height


def _beside(rng: Rng, foot: Footprint, host: Box) -> Box:
    """A place that overlaps one side of the host by 5 to 16 px."""
    depth = int(rng.integers(5, 17))
    x = int(rng.integers(host[0] - foot.width // 2, host[2] - foot.width // 2 + 1))
    y = int(rng.integers(host[1] - foot.height // 2, host[3] - foot.height // 2 + 1))
    side = rng.integers(4)
    if side < 2:
        x = host[0] - foot.width + depth if side == 0 else host[2] - depth
    else:
        y = host[1] - foot.height + depth if side == 2 else host[3] - depth
    return x, y, x + foot.width, y + foot.height


def _legal(
    box: Box, foot: Footprint, host: int | None, boxes: list[Box], keeps: list[Box], height: int, width: int
) -> bool:
    if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
        return False
    if foot.corner is not None and corner_of(box, height, width) != foot.corner:
        return False
    if host is not None and (
        intersects(box, keeps[host], 2) or not 0 < covered_share(box, boxes[host]) <= _COVER
    ):
        return False
    return not any(intersects(box, other, _GAP) for j, other in enumerate(boxes) if j != host)


def covered_share(top: Box, bottom: Box) -> float:
    """Share of the bottom box that the top box covers."""
    width = min(top[2], bottom[2]) - max(top[0], bottom[0])
    height = min(top[3], bottom[3]) - max(top[1], bottom[1])
    area = (bottom[2] - bottom[0]) * (bottom[3] - bottom[1])
    return max(0, width) * max(0, height) / area
