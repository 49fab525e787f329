"""Draw docs/two_questions.png: two questions light up two places in one photograph, through the real engine.

    python docs/make_pictures.py [--model FOLDER] [--image FILE --questions FIRST SECOND] [--budget 0.25]

Without `--image` it takes the astronaut of the demo, with the demo's two questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

import arrcoc
from arrcoc.demo.images import demo_cases

TARGET = Path(__file__).with_name("two_questions.png")


def lit(encoding: arrcoc.Encoding) -> NDArray[np.float64]:
    """The picture with every tile as bright as its LOD: background darkest; [h, w, 3] in [0, 1]."""
    picture = encoding.picture.permute(1, 2, 0).numpy() / 255
    height, width, _ = picture.shape
    rows, cols = encoding.lod.shape
    level = encoding.lod.numpy() / max(arrcoc.Lod)
    y, x = np.arange(height) * rows // height, np.arange(width) * cols // width
    grey = picture.mean(axis=2, keepdims=True)
    light = level[np.ix_(y, x)][..., None]
    shown: NDArray[np.float64] = light * picture + (1 - light) * 0.35 * grey
    return shown


def draw(encodings: Sequence[arrcoc.Encoding]) -> Figure:
    """One panel per question, side by side: question above, tokens below."""
    height, width = encodings[0].picture.shape[1:]
    figure = Figure(figsize=(5.6 * len(encodings), 5.6 * height / width + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, encoding in zip(np.ravel(figure.subplots(1, len(encodings))), encodings, strict=True):
        _panel(axes, encoding)
    return figure


def _panel(axes: Axes, encoding: arrcoc.Encoding) -> None:
    axes.imshow(lit(encoding))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(encoding.question, fontsize=13)
    share = f"{encoding.n_tokens:,} of {encoding.full_tokens:,} vision tokens ({encoding.share:.0%})"
    axes.set_xlabel(share, fontsize=11)


def main(arguments: Sequence[str]) -> None:
    """Encode, draw and write the picture."""
    options = _options(arguments)
    case = demo_cases()[0]
    image = Image.open(options.image) if options.image else case.image
    questions = options.questions or case.questions
    engine = arrcoc.Engine.from_pretrained(options.model)
    encodings = [engine.encode(image, question, budget=options.budget) for question in questions]
    draw(encodings).savefig(options.out, dpi=100)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a Qwen3-VL checkpoint (default: the bundled one)")
    parser.add_argument("--image", help="a photograph (default: the demo's astronaut)")
    parser.add_argument("--questions", nargs=2, help="two questions (default: the demo's)")
    parser.add_argument("--budget", type=float, default=0.25, help="share of full resolution")
    parser.add_argument("--out", default=str(TARGET))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
