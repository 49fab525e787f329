"""Squares cut out of images on the CPU, by numpy: torch would wake its other threads for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from arrcoc.devices import host_bytes


def squares(images: Iterable[Tensor], corners: Sequence[tuple[int, int]], edge: int) -> Tensor:
    """One square of each image, which goes on beyond its border with its edge pixels repeated.

    Args:
        images: uint8 [3, h, w] each, on the CPU; at least as many as corners.
        corners: top and left of each square; squares overlap their images.
        edge: of the squares, in pixels.

    Returns:
        uint8 [K, 3, edge, edge].
    """
    out = host_bytes((len(corners), 3, edge, edge))
    for square, image, (top, left) in zip(out.numpy(), images, corners, strict=False):
        _copy(square, image.numpy(), top, left)
    return out


def _copy(square: npt.NDArray[np.uint8], image: npt.NDArray[np.uint8], top: int, left: int) -> None:
    edge = square.shape[1]
    corner = zip((top, left), image.shape[1:], strict=True)
    rows, cols = ((max(start, 0), min(start + edge, size)) for start, size in corner)
    down, right = (rows[0] - top, rows[1] - top), (cols[0] - left, cols[1] - left)
    square[:, slice(*down), slice(*right)] = image[:, slice(*rows), slice(*cols)]
    square[:, slice(*down), : right[0]] = square[:, slice(*down), right[0] : right[0] + 1]
    square[:, slice(*down), right[1] :] = square[:, slice(*down), right[1] - 1 : right[1]]
    square[:, : down[0]] = square[:, down[0] : down[0] + 1]
    square[:, down[1] :] = square[:, down[1] - 1 : down[1]]
