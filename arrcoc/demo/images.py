"""The demo's photographs, taken from scikit-image's wheel at run time, with two questions each."""

from __future__ import annotations

from dataclasses import dataclass

import skimage.data
from PIL import Image


@dataclass(frozen=True, slots=True)
class DemoCase:
    """One photograph and what to ask about it.

    Attributes:
        name: a short name that is also a file stem.
        image: RGB.
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
            Image.fromarray(skimage.data.astronaut()),
            ("What is written on her orange suit?", "Which model stands in the top right corner?"),
            "Eileen Collins; NASA Great Images database, https://flic.kr/p/r9qvLn",
            "public domain, no known copyright restrictions (NASA)",
        ),
        DemoCase(
            "cat",
            Image.fromarray(skimage.data.chelsea()),
            ("Which ear is at the top right?", "What colour are the whiskers at the bottom left?"),
            "Chelsea the cat; Stefan van der Walt",
            "CC0 by the photographer",
        ),
        DemoCase(
            "coffee",
            Image.fromarray(skimage.data.coffee()),
            ("What is in the white cup?", "What is behind the saucer at the top left?"),
            "Pikolo Espresso Bar; Rachel Michetti",
            "CC0 by the photographer",
        ),
        DemoCase(
            "rocket",
            Image.fromarray(skimage.data.rocket()),
            ("What is in the blue sky at the top?", "How many lamps shine at the bottom left?"),
            "Falcon 9 with DSCOVR at Cape Canaveral; SpaceX, "
            "https://www.flickr.com/photos/spacexphotos/16511594820",
            "public domain (SpaceX)",
        ),
    ]
