"""The demo's texture head: colours and places are named rightly, and a fitted head finds them."""

import pytest
import torch

from arrcoc import qwen, texture
from arrcoc.config import load
from arrcoc.demo import words
from arrcoc.demo.words import COLOURS, PLACES, colour_names, fit_words, place_masks
from arrcoc.image import frame
from arrcoc.scorers import TextureHead

# L*, a*, b* of textbook colours (sRGB primaries and web colours, rounded).
NAMED = {
    "red": (53.2, 80.1, 67.2),
    "orange": (74.9, 23.9, 78.9),
    "yellow": (97.1, -21.6, 94.5),
    "green": (46.2, -51.7, 49.9),
    "teal": (48.3, -28.8, -8.5),
    "blue": (32.3, 79.2, -107.9),
    "purple": (29.8, 58.9, -36.5),
    "pink": (83.6, 24.1, 3.3),
    "brown": (34.0, 15.0, 25.0),
    "black": (0.0, 0.0, 0.0),
    "gray": (53.6, 0.0, 0.0),
    "white": (100.0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", COLOURS)
def test_textbook_colours_have_their_names(name):
    lab = torch.tensor(NAMED[name]).view(3, 1, 1)
    assert COLOURS[int(colour_names(lab))] == name


def test_places_by_hand():
    # 3 x 3 cells at -2/3, 0, 2/3: the outer third is left or right, top or bottom, the centre alone middle.
    left, right, top, bottom, middle = place_masks(3, 3).int().tolist()
    assert left == [[1, 0, 0]] * 3
    assert right == [[0, 0, 1]] * 3
    assert top == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert bottom == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert middle == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert len(place_masks(3, 3)) == len(PLACES)


@pytest.fixture(scope="module")
def fitted(tiny_checkpoint, tmp_path_factory):
    checkpoint = qwen.load(tiny_checkpoint, torch.device("cpu"), torch.float32)
    shares = []
    path = fit_words(checkpoint, tmp_path_factory.mktemp("head"), steps=250, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    return checkpoint, TextureHead.load(path, checkpoint.width)


@pytest.mark.parametrize(
    ("question", "best"), [("What stands at the top left?", 0), ("Look at the bottom right corner.", 15)]
)
def test_a_short_fit_finds_places(fitted, question, best):
    checkpoint, head = fitted
    grey = torch.full((3, 512, 512), 128, dtype=torch.uint8)
    config = load("demo")
    maps = texture.extract(frame(grey, config, checkpoint.vision.token_px, torch.device("cpu")), config)
    scores = head(maps, checkpoint.query(question))
    assert int(scores.argmax()) == best
    assert scores.flatten()[best] > 2 * scores.flatten()[15 - best]


def test_the_fit_leaves_the_global_generator_alone(tiny_checkpoint, tmp_path):
    checkpoint = qwen.load(tiny_checkpoint, torch.device("cpu"), torch.float32)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    words.fit_words(checkpoint, tmp_path, steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_fits_the_same_head(tiny_checkpoint, tmp_path):
    checkpoint = qwen.load(tiny_checkpoint, torch.device("cpu"), torch.float32)
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
        fit_words(checkpoint, folder, steps=3)
    one, two = (
        TextureHead.load(folder / words.TEXTURE_HEAD_FILE, checkpoint.width) for folder in (first, second)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
