"""The demo's photographs, taken from scikit-image's wheel at run time, with two questions each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image


@dataclass(frozen=True, slots=True)
class DemoCase:
    """One photograph and what to ask about it.

    Attributes:
        name: a short name that is also a file stem.
        image: RGB, enlarged twofold: the photographs are small, and a tile is 128 pixels wide at the least.
        questions: two, about different places of the photograph.
        source: where the photograph is from.
        licence: its licence, and who gave it.
    """

    name: str
    image: Image.Image
    questions: tuple[str, str]
    source: str
    licence: str


def demo_cases() -> list[DemoCase]:
    """The bundled photographs, in a fixed order; reads them from disk, needs no network.

    Sources and licences are those that the docstrings of `skimage.data` state.
    """
    return [
        DemoCase(
            "astronaut",
            _enlarged(skimage.data.astronaut()),
            (
                "What shines in the black helmet at the bottom right?",
                "Which model stands in the top right corner?",
            ),
            "Eileen Collins; NASA Great Images database, https://flic.kr/p/r9qvLn",
            "public domain, no known copyright restrictions (NASA)",
        ),
        DemoCase(
            "cat",
            _enlarged(skimage.data.chelsea()),
            ("Which ear is at the top right?", "What colour are the whiskers at the bottom left?"),
            "Chelsea the cat; Stefan van der Walt",
            "CC0 by the photographer",
        ),
        DemoCase(
            "coffee",
            _enlarged(skimage.data.coffee()),
            ("What is in the white cup?", "What is behind the saucer at the top left?"),
            "Pikolo Espresso Bar; Rachel Michetti",
            "CC0 by the photographer",
        ),
        DemoCase(
            "rocket",
            _enlarged(skimage.data.rocket()),
            ("What is in the blue sky at the top?", "How many lamps shine at the bottom left?"),
            "Falcon 9 with DSCOVR at Cape Canaveral; SpaceX, "
            "https://www.flickr.com/photos/spacexphotos/16511594820",
            "public domain (SpaceX)",
        ),
    ]


def _enlarged(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """The picture at twice its size."""
    picture = Image.fromarray(pixels)
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS)
