"""Outlines of the signs, and how large a code fits inside each."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

_MARGIN = 0.05
"""Room between code and outline for the rim, as a share of the sign's size."""

TEXT_CENTRE = {"triangle": 0.18, "star": 0.03}
"""Height of the code's centre below the sign's centre, as a share of its size; 0 for other shapes."""

SMALLEST = {"triangle": 72, "star": 76, "diamond": 68}
"""Least size in px where 56 would be too small for a code."""


@cache
def outline(shape: str) -> Points:
    """Vertices [V, 2] about the origin, y down, of a shape whose longer side is 1 or just below."""
    if shape == "square":
        return _box(0.92, 0.92)
    if shape == "rectangle":
        return _box(1.0, 0.62)
    if shape == "triangle":
        return np.array([(0.0, -0.46), (0.5, 0.44), (-0.5, 0.44)])
    if shape == "diamond":
        return _regular(4)
    if shape == "hexagon":
        return _regular(6)
    if shape == "star":
        return _star(5, inner=0.6)
    assert shape == "circle", shape
    return _regular(48)


def text_height(shape: str, aspect: float) -> float:
    """Largest height of a text box, `aspect` times as wide, in a sign of size 1 (bisection to 1/1000)."""
    return _text_height(shape, round(aspect, 1))


@cache
def _text_height(shape: str, aspect: float) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if _fits(shape, aspect * middle, middle) else (low, middle)
    return low


def _fits(shape: str, width: float, height: float) -> bool:
    along = np.linspace(-0.5, 0.5, 9)
    edges = [(x, y) for x in along for y in (-0.5, 0.5)] + [(x, y) for y in along for x in (-0.5, 0.5)]
    centre = np.array([0.0, TEXT_CENTRE.get(shape, 0.0)])
    rim = np.array(edges) * (width + 2 * _MARGIN, height + 2 * _MARGIN) + centre
    return bool(inside(rim, outline(shape)).all())


def inside(points: Points, polygon: Points) -> NDArray[np.bool_]:
    """Which points [N, 2] lie in the polygon [V, 2] (even-odd rule)."""
    start, end = polygon, np.roll(polygon, -1, axis=0)
    x, y = points[:, None, 0], points[:, None, 1]
    spans = (start[:, 1] > y) != (end[:, 1] > y)
    rise = np.where(start[:, 1] == end[:, 1], 1.0, end[:, 1] - start[:, 1])
    crossing = start[:, 0] + (y - start[:, 1]) / rise * (end[:, 0] - start[:, 0])
    inside_odd: NDArray[np.bool_] = (spans & (x < crossing)).sum(1) % 2 == 1
    return inside_odd


def rotation(degrees: float) -> Points:
    """Matrix [2, 2] that turns column vectors clockwise in image coordinates (y down)."""
    angle = np.deg2rad(degrees)
    return np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])


def _box(width: float, height: float) -> Points:
    return np.array([(-width, -height), (width, -height), (width, height), (-width, height)]) / 2


def _regular(corners: int) -> Points:
    angle = 2 * np.pi * np.arange(corners) / corners
    vertices: Points = 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return vertices


def _star(points: int, inner: float) -> Points:
    angle = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 0.52, 0.52 * inner)
    vertices: Points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return vertices
