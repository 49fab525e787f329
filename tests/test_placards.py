"""The placard generator: purity, answers, geometry, split hygiene, balance, labels and errors."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.measure import label, regionprops
from torch.utils.data import DataLoader

from arrcoc.demo.placards import (
    ALPHABET,
    COLOURS,
    FAMILIES,
    NO_GLYPH,
    SHAPES,
    Ask,
    Example,
    Kind,
    Placard,
    PlacardDataset,
    backgrounds,
    contact_sheet,
    distractors,
    drawing,
    families_for,
    glyph_labels,
    layout,
    pictures,
    placard_range,
    questions,
    sample,
    shapes,
    split_of,
    target_tiles,
    vocabulary,
)
from arrcoc.demo.placards import fonts as lettering
from arrcoc.demo.placards.fonts import PLAIN, Hand
from arrcoc.demo.placards.layout import Footprint
from arrcoc.demo.placards.paraphrases import FORMS
from arrcoc.demo.placards.records import Box, Spec, intersects
from arrcoc.demo.placards.vocabulary import ADJECTIVES, Split, codes, fonts, neighbours
from arrcoc.errors import ConfigError, ImageError

EXAMPLES = 48
NOUNS = {
    **{adjective: shape for shape, adjective in ADJECTIVES.items()},
    **{shape: shape for shape in SHAPES},
}
WORD = re.compile(r"[A-Za-z-]+")


@pytest.fixture(scope="module", params=["train", "test"])
def examples(request: pytest.FixtureRequest) -> list[Example]:
    """The same examples for all tests that only read them."""
    return [sample(7, i, request.param, 512) for i in range(EXAMPLES)]


@pytest.fixture
def easy_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package easy_vqa with one green (train) and one red (test) picture and two questions about each."""
    root = tmp_path / "easy_vqa"
    for split, colour, paint in (("train", "green", (0, 200, 0)), ("test", "red", (200, 0, 0))):
        (root / "data" / split / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), paint).save(root / "data" / split / "images" / "3.png")
        rows: list[list[Any]] = [
            [f"is a {colour} shape present?", "yes", 3],
            ["what color is the shape?", colour, 3],
        ]
        rows += [["is no circle present?", "no", 3], ["what shape is present?", "circle", 3]]
        (root / "data" / split / "questions.json").write_text(json.dumps(rows))
    (root / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    _forget_pictures()
    yield
    _forget_pictures()


def _forget_pictures() -> None:
    for cached in (pictures.rows, pictures.pictured, pictures._grouped, pictures._picture, pictures._folder):
        cached.cache_clear()


def _same(a: Example, b: Example) -> bool:
    glyphs = all(np.array_equal(p.glyphs, q.glyphs) for p, q in zip(a.placards, b.placards, strict=True))
    facts = (a.question, a.answer, a.targets, a.ask) == (b.question, b.answer, b.targets, b.ask)
    return facts and glyphs and np.array_equal(a.image, b.image)


# Purity.


def test_an_example_depends_on_its_arguments_alone() -> None:
    first = sample(1, 5, "train", 256)
    for other in range(3):
        sample(2, other, "test", 384)
    assert _same(first, sample(1, 5, "train", 256))


@pytest.mark.parametrize(
    "change", [(2, 5, "train", 256), (1, 6, "train", 256), (1, 5, "test", 256), (1, 5, "train", 384)]
)
def test_every_argument_matters(change: tuple[int, int, Split, int]) -> None:
    first, other = sample(1, 5, "train", 256), sample(*change)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_splits_do_not_ask_the_same_things_in_the_same_order() -> None:
    train, test = ([sample(1, i, split, 128).family for i in range(16)] for split in ("train", "test"))
    assert train != test


@pytest.mark.parametrize(
    ("canvas", "shape"), [(128, (128, 128)), (256, (256, 256)), ((256, 640), (256, 640))]
)
def test_canvas_sizes_down_to_one_sign(canvas: int | tuple[int, int], shape: tuple[int, int]) -> None:
    low, high = placard_range(canvas)
    for index in range(12):
        example = sample(0, index, "train", canvas)
        assert example.image.shape == (*shape, 3)
        assert example.image.dtype == np.uint8
        assert low <= len(example.placards) <= high
        assert example.family in families_for(canvas)


# Answers.


def _kinds_in(question: str) -> list[Kind]:
    """Signs named in a question by colour and shape, read from its text alone."""
    nouns = "|".join(sorted(NOUNS, key=len, reverse=True))
    found = re.findall(rf"\b({'|'.join(COLOURS)}) ({nouns})\b", question)
    return [Kind(colour, NOUNS[noun]) for colour, noun in found]


def _answer_from_text(example: Example) -> str:
    """A second way to the answer: parse the question, look at the record."""
    text, signs, family = example.question, example.placards, example.family
    named = [[p for p in signs if (p.colour, p.shape) == kind] for kind in _kinds_in(text)]
    if family == "find":
        (sign,) = (p for p in signs if re.search(rf"\b{p.code}\b", text))
        return sign.colour if re.search("colou?r", text) else sign.shape
    if family == "count":
        words = WORD.findall(text)
        colours = [w for w in words if w in COLOURS]
        forms = [NOUNS[w.removesuffix("s")] for w in words if w.removesuffix("s") in NOUNS]
        return str(sum(p.colour in colours or p.shape in forms for p in signs))
    if family == "exists":
        return "yes" if named[0] else "no"
    if family == "read":
        return named[0][0].code
    if family == "where":
        x0, y0, x1, y1 = named[0][0].box
        height, width = example.image.shape[:2]
        return f"{'top' if y0 + y1 < height else 'bottom'} {'left' if x0 + x1 < width else 'right'}"
    pair = sorted(sign.code for (sign,) in named)
    return pair[0] if "first" in text else "yes" if pair[0] == pair[1] else "no"


def test_answers_follow_from_the_question_and_the_record(examples: list[Example]) -> None:
    assert {e.family for e in examples} == set(FAMILIES)
    for example in examples:
        assert example.answer == _answer_from_text(example), example.question
        assert len({len(p.code) for p in example.placards}) == 1


def _sign(colour: str, shape: str, code: str, box: Box = (0, 0, 60, 60)) -> Placard:
    return Placard(colour, shape, code, box, box, np.zeros((3, 2), np.float32), "font")


ROW = (
    _sign("red", "star", "K7A", (10, 10, 70, 70)),
    _sign("red", "circle", "K7A", (200, 10, 260, 70)),
    _sign("blue", "star", "A22", (200, 400, 260, 460)),
)


@pytest.mark.parametrize(
    ("ask", "answer", "targets"),
    [
        (Ask("read", "read", (Kind("blue", "star"),)), "A22", (2,)),
        (Ask("find", "find.colour", code="A22"), "blue", (0, 1, 2)),
        (Ask("find", "find.shape", code="A22"), "star", (0, 1, 2)),
        (Ask("count", "count", (Kind("red", None),)), "2", (0, 1)),
        (Ask("count", "count", (Kind(None, "star"),)), "2", (0, 2)),
        (Ask("count", "count", (Kind("green", None),)), "0", (0, 1, 2)),
        (Ask("exists", "exists", (Kind("red", "star"),)), "yes", (0,)),
        (Ask("exists", "exists", (Kind("blue", "circle"),)), "no", (1, 2)),
        (Ask("exists", "exists", (Kind("pink", "square"),)), "no", (0, 1, 2)),
        # Centre (230, 430) of a canvas of 512 x 512: x below the middle, y above it.
        (Ask("where", "where", (Kind("blue", "star"),)), None, (2,)),
        (Ask("where", "where", (Kind("red", "star"),)), "top left", (0,)),
        (Ask("compare", "compare.same", (Kind("red", "star"), Kind("red", "circle"))), "yes", (0, 1)),
        (Ask("compare", "compare.same", (Kind("red", "star"), Kind("blue", "star"))), "no", (0, 2)),
        (Ask("compare", "compare.first", (Kind("red", "star"), Kind("blue", "star"))), "A22", (0, 2)),
    ],
)
def test_golden_answers_and_targets(ask: Ask, answer: str | None, targets: tuple[int, ...]) -> None:
    if answer is None:
        # x = 230 / 512 - 0.5 = -0.05 lies within the ambiguous band of 0.12.
        with pytest.raises(AssertionError):
            questions.answer(ask, ROW, 512, 512)
    else:
        assert questions.answer(ask, ROW, 512, 512) == answer
    assert questions.targets(ask, ROW) == tuple(ROW[i] for i in targets)


# Balance, on drafts alone: nothing is drawn.


def _drafted(family: str, count: int = 6, drafts: int = 1200) -> list[tuple[Ask, str, list[Placard]]]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(drafts):
        ask, specs = questions.compose(rng, family, count, "train")
        spots = {
            "top left": (0, 0),
            "top right": (440, 0),
            "bottom left": (0, 440),
            "bottom right": (440, 440),
        }
        corners = [spots.get(str(s.corner), (0, 0)) for s in specs]
        signs = [
            _sign(s.colour, s.shape, s.code, (x, y, x + 60, y + 60))
            for s, (x, y) in zip(specs, corners, strict=True)
        ]
        assert len(signs) == count
        out.append((ask, questions.answer(ask, signs, 512, 512), signs))
    return out


@pytest.mark.parametrize(
    ("family", "classes"),
    [
        ("exists", ("yes", "no")),
        ("count", tuple("012345")),
        ("where", layout.CORNERS),
        ("find", (*COLOURS, *SHAPES)),
        ("read", None),
        ("compare", None),
    ],
)
def test_answers_are_balanced(family: str, classes: tuple[str, ...] | None) -> None:
    drafts = _drafted(family)
    if family == "compare":
        drafts = [d for d in drafts if d[0].form == "compare.same"]
        assert 500 < len(drafts) < 700
        classes = ("yes", "no")
    counted = Counter(answer for _, answer, _ in drafts)
    if classes is None:
        # 3-glyph codes: each first glyph about 1 / 24 of 1200 = 50 times, standard deviation 7.
        firsts = Counter(answer[0] for _, answer, _ in drafts)
        assert set(firsts) == set(ALPHABET)
        assert max(firsts.values()) < 85
        return
    assert set(counted) == set(classes)
    halves = (len(COLOURS), len(SHAPES)) if family == "find" else (len(classes),)
    for answer, times in counted.items():
        share = 1 / len(halves) / (halves[0] if family != "find" or answer in COLOURS else halves[1])
        expected = len(drafts) * share
        # Five standard deviations of a binomial count.
        assert abs(times - expected) < 5 * (expected * (1 - share)) ** 0.5, (answer, times, expected)


def test_no_answers_have_near_misses() -> None:
    negatives = [(ask.kinds[0], signs) for ask, answer, signs in _drafted("exists") if answer == "no"]
    assert all(any(p.colour == k.colour or p.shape == k.shape for p in signs) for k, signs in negatives)
    both = [
        any(p.colour == k.colour for p in signs) and any(p.shape == k.shape for p in signs)
        for k, signs in negatives
    ]
    assert np.mean(both) > 0.75


@pytest.mark.parametrize("family", ["read", "find", "where", "compare"])
def test_signs_that_a_question_relies_on_are_unique(family: str) -> None:
    for ask, _, signs in _drafted(family, drafts=300):
        assert len({(p.colour, p.shape) for p in signs}) == len(signs)
        if ask.form != "compare.same":
            assert len({p.code for p in signs}) == len(signs)


def test_alphabetical_order_turns_on_two_different_letters() -> None:
    for ask, answer, signs in _drafted("compare", drafts=300):
        if ask.form == "compare.first":
            pair = [p.code[0] for p in signs if any(k.matches(p.colour, p.shape) for k in ask.kinds)]
            assert len(set(pair)) == 2
            assert all(glyph.isalpha() for glyph in pair)
            assert answer[0] == min(pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_place_in_the_record_tells_nothing(family: str) -> None:
    """The sign that matters is drawn first, in the middle and last alike."""
    if family in ("count", "exists", "find"):
        places = [[p.code for p in s].index(a.code) for a, _, s in _drafted("find", 6, 600)]
    else:
        places = [
            next(i for i, p in enumerate(s) if a.kinds[0].matches(p.colour, p.shape))
            for a, _, s in _drafted(family, 6, 600)
        ]
    assert min(Counter(places)[i] for i in range(6)) > 60


def test_near_codes_occur_and_differ_in_one_glyph() -> None:
    assert "K7A" not in neighbours("K7A")
    for other in neighbours("K7A"):
        assert sum(a != b for a, b in zip("K7A", other, strict=True)) == 1
        assert split_of(other) == split_of("K7A")

    def has_near(ask: Ask, signs: list[Placard]) -> bool:
        return any(sum(a != b for a, b in zip(str(ask.code), p.code, strict=True)) == 1 for p in signs)

    assert np.mean([has_near(ask, signs) for ask, _, signs in _drafted("find", drafts=300)]) > 0.4


# Split hygiene.


def test_codes_fonts_photographs_and_wordings_are_disjoint() -> None:
    assert not set(codes("train")) & set(codes("test"))
    assert len(codes("train")) + len(codes("test")) == len(ALPHABET) ** 3
    # One in five: 24 ** 3 / 5 = 2765, standard deviation 47.
    assert 2500 < len(codes("test")) < 3030
    assert not set(fonts("train")) & set(fonts("test"))
    assert not set(backgrounds.photographs("train")) & set(backgrounds.photographs("test"))
    assert all(
        path.is_file()
        for split in ("train", "test")
        for path in (*fonts(split), *backgrounds.photographs(split))
    )
    for form in FORMS.values():
        assert not set(form.train) & set(form.test)
        assert len(set(form.train)) >= 6
        assert len(set(form.test)) >= 3


def test_examples_keep_to_their_split(examples: list[Example]) -> None:
    split = examples[0].split
    names = {path.name for path in fonts(split)}
    photographs = {path.name for path in backgrounds.photographs(split)}
    for example in examples:
        assert all(split_of(p.code) == split and p.font in names for p in example.placards)
        assert example.background in photographs | set(backgrounds.TEXTURES)
    assert any(e.background in photographs for e in examples)
    assert any(e.background in backgrounds.TEXTURES for e in examples)


def test_held_out_wordings_use_known_words_in_new_sentences() -> None:
    def words(texts: tuple[str, ...]) -> set[str]:
        return {w.lower() for text in texts for w in WORD.findall(re.sub(r"\{.*?\}", "", text))}

    known = words(tuple(text for form in FORMS.values() for text in form.train))
    for name, form in FORMS.items():
        assert words(form.test) <= known, (name, words(form.test) - known)


def test_articles() -> None:
    texts = [sample(0, i, "train", 128, ["exists"]).question for i in range(60)]
    assert any(" an orange " in text for text in texts)
    assert not any(re.search(r"\ba orange|\ban [^o]", text) for text in texts)


# Geometry.


def test_nothing_covers_a_code_and_all_lies_on_the_canvas(examples: list[Example]) -> None:
    height, width = examples[0].image.shape[:2]
    overlaps = 0
    for example in examples:
        for p in example.placards:
            assert 0 <= p.box[0] < p.box[2] <= width
            assert 0 <= p.box[1] < p.box[3] <= height
            assert p.box[0] <= p.code_box[0] < p.code_box[2] <= p.box[2]
            assert p.box[1] <= p.code_box[1] < p.code_box[3] <= p.box[3]
            assert (p.glyphs > p.code_box[:2]).all()
            assert (p.glyphs < p.code_box[2:]).all()
            assert 52 <= max(p.box[2] - p.box[0], p.box[3] - p.box[1]) <= 110
        for below, above in combinations(example.placards, 2):
            assert not intersects(below.code_box, above.box)
            overlaps += intersects(below.box, above.box)
    assert overlaps > 0


@pytest.mark.parametrize("hand", [PLAIN, Hand(0.3), Hand(-0.3, "bold", 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_glyph_centres_are_where_the_glyphs_are(shape: str, hand: Hand) -> None:
    """Letters of one piece: three connected regions of ink around the recorded centres, 12 to 22 px high."""
    rng = np.random.default_rng(3)
    for font in fonts("train")[:4]:
        sprite = drawing.sign(rng, Spec("yellow", shape, "XHN"), font, hand=hand)
        x0, y0, x1, y1 = sprite.code_box
        assert sprite.alpha[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() == 1
        # Black on yellow: half way between the two in red.
        ink = label(sprite.rgb[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1, 0] < 140)
        regions = sorted((r for r in regionprops(ink) if r.area > 12), key=lambda r: r.bbox[1])
        assert len(regions) == 3
        for region, (x, y) in zip(regions, sprite.glyphs, strict=True):
            top, left, bottom, right = region.bbox
            assert x0 - 1 + (left + right) / 2 == pytest.approx(x, abs=1.6)
            assert y0 - 1 + (top + bottom) / 2 == pytest.approx(y, abs=1.6)
            assert 10 <= bottom - top <= 26


def test_a_shear_leans_to_the_right() -> None:
    """The ink of an upright H's upper half lies right of its lower half's, by shear times half the height."""
    font = fonts("train")[0]
    found = []
    for shear in (-0.3, 0.0, 0.3):
        sprite = drawing.sign(
            np.random.default_rng(4), Spec("yellow", "square", "HHH"), font, hand=Hand(shear)
        )
        x0, y0, x1, y1 = sprite.code_box
        ink = np.maximum(0, 180 - sprite.rgb[y0:y1, x0:x1, 0].astype(float))
        upper, lower = np.array_split(ink, 2)
        across = np.arange(x1 - x0)
        means = [float((half.sum(0) * across).sum() / half.sum()) for half in (upper, lower)]
        found.append((means[0] - means[1]) / ((y1 - y0) / 2))
    # The sign's own tilt adds the same to all three.
    assert found[2] - found[1] == pytest.approx(0.3, abs=0.12)
    assert found[1] - found[0] == pytest.approx(0.3, abs=0.12)


def test_strokes_change_the_ink() -> None:
    mask = lettering.draw(fonts("train")[0], "R7K", 40, lettering.lettering(fonts("train")[0], "R7K", 0.2), 4)
    plain = np.asarray(mask, float)
    bold, thin, soft = (
        np.asarray(lettering.inked(mask, Hand(0.0, stroke, 1.0)), float)
        for stroke in ("bold", "thin", "soft")
    )
    assert (bold >= plain).all()
    assert (thin <= plain).all()
    assert bold.sum() > 1.1 * plain.sum() > 1.2 * thin.sum()
    assert soft.sum() == pytest.approx(plain.sum(), rel=0.05)
    assert np.abs(np.diff(soft)).max() < np.abs(np.diff(plain)).max()
    hands = [lettering.random_hand(np.random.default_rng(i)) for i in range(600)]
    assert all(abs(hand.shear) <= 0.3 for hand in hands)
    # A third of 600 is 200, standard deviation 12.
    assert 150 < sum(hand.stroke != "plain" for hand in hands) < 250
    assert {hand.stroke for hand in hands} == {"plain", "bold", "thin", "soft"}


def test_every_font_has_upright_glyphs_of_its_own() -> None:
    """No glyph is missing (all missing ones look alike), and digits stand on the line like capitals."""
    for font in (*fonts("train"), *fonts("test")):
        face = lettering.load(font, 100)
        assert len({bytes(face.getmask(glyph)) for glyph in ALPHABET}) == len(ALPHABET), font.name
        for glyph in ALPHABET:
            _, top, _, bottom = face.getbbox(glyph, anchor="ls")
            assert bottom <= 24, (font.name, glyph)
            assert 0.85 < -top / (100 * lettering.cap_height(font)) < 1.15, (font.name, glyph)


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="hashes are of Pillow 13.0.0's lettering")
@pytest.mark.parametrize(("index", "digest"), [(0, "c4551ffbf33ef928"), (1, "db8c796904dd25ae")])
def test_the_test_split_is_drawn_as_ever(index: int, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken before training signs were lettered by random hands; on a grey background, without torch."""

    def grey(rng: object, split: str, height: int, width: int, folder: object) -> tuple[np.ndarray, str]:
        return np.full((height, width, 3), 128, np.uint8), "grey"

    monkeypatch.setattr("arrcoc.demo.placards.scene.background", grey)
    image = sample(11, index, "test", 512).image
    assert hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() == digest


def test_training_signs_are_lettered_by_random_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Hand] = []
    sign = drawing.sign

    def spy(*args: Any) -> drawing.Sprite:
        drawn.append(args[-1])
        return sign(*args)

    monkeypatch.setattr(drawing, "sign", spy)
    sample(0, 0, "train", 1024)
    assert len(set(drawn)) == len(drawn) > 3
    drawn.clear()
    sample(0, 0, "test", 1024)
    assert set(drawn) == {PLAIN}


@pytest.mark.parametrize(
    ("shape", "aspect", "height"),
    [
        # A side of 0.92 less a margin of 0.05 on either end leaves 0.82.
        ("square", 1.0, 0.82),
        ("square", 4.0, 0.205),
        # The rectangle is 1.0 x 0.62: 0.9 wide or 0.52 high.
        ("rectangle", 1.0, 0.52),
        ("rectangle", 3.0, 0.3),
        # Corners of the diamond's inscribed box: (h + 0.1) / 2 + (h + 0.1) / 2 = 0.5.
        ("diamond", 1.0, 0.4),
        # Circle of radius 0.5: ((h + 0.1) / 2) * sqrt(2) = 0.5, so h = 0.607.
        ("circle", 1.0, 0.607),
    ],
)
def test_how_large_a_code_fits(shape: str, aspect: float, height: float) -> None:
    assert shapes.text_height(shape, aspect) == pytest.approx(height, abs=4e-3)


def test_ink_stands_out_from_every_paint() -> None:
    for paint in COLOURS.values():
        for tint in (0.0, 40.0):
            difference = drawing.ink_for(np.array(paint, float), tint) - paint
            assert abs(difference @ [0.299, 0.587, 0.114]) > 75


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(50, 105), st.integers(50, 105)), min_size=1, max_size=7),
)
def test_placement_keeps_its_promise(seed: int, sizes: list[tuple[int, int]]) -> None:
    feet = [Footprint(w, h, (w // 4, h // 4, 3 * w // 4, 3 * h // 4)) for w, h in sizes]
    boxes = layout.place(np.random.default_rng(seed), feet, 512, 640)
    assert [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes] == sizes
    for i, j in combinations(range(len(boxes)), 2):
        if intersects(boxes[i], boxes[j], 4):
            x, y = boxes[i][:2]
            a, b, c, d = feet[i].keep
            assert layout.covered_share(boxes[j], boxes[i]) <= 0.25
            assert not intersects(boxes[j], (x + a, y + b, x + c, y + d))


def test_a_sign_never_covers_more_than_a_quarter() -> None:
    """Without a code to keep clear of, the share alone decides: 16 of 50 px would be 0.32."""
    foot = Footprint(50, 50, (25, 25, 26, 26))
    shares = []
    for seed in range(150):
        below, above = layout.place(np.random.default_rng(seed), [foot, foot], 512, 512)
        shares.append(layout.covered_share(above, below))
    assert max(shares) <= 0.25
    assert np.mean([share > 0 for share in shares]) > 0.05


def test_placement_golden() -> None:
    # 10 x 20 px of a box of 40 x 50 px.
    assert layout.covered_share((30, 30, 90, 90), (0, 0, 40, 50)) == pytest.approx(200 / 2000)
    assert layout.corner_of((0, 400, 60, 460), 512, 512) == "bottom left"
    assert layout.corner_of((226, 400, 286, 460), 512, 512) is None
    foot = Footprint(60, 60, (0, 0, 60, 60), "bottom right")
    for seed in range(10):
        ((x0, y0, _, _),) = layout.place(np.random.default_rng(seed), [foot], 512, 512)
        # Centre at least 0.12 * 512 = 61.44 px beyond the middle, 256 - 30 of the box's corner.
        assert min(x0, y0) >= 226 + 61


def test_blank_signs_are_never_what_a_question_means() -> None:
    rng = np.random.default_rng(0)
    for kind in (Kind("red", None), Kind(None, "star"), Kind("red", "star")):
        ask = Ask("count", "count", (kind,))
        drawn = [distractors.blank_kind(rng, ask) for _ in range(300)]
        assert not any(kind.matches(str(c), str(s)) for c, s in drawn)
        assert len(set(drawn)) > 40


def test_distractors_stay_clear_of_signs() -> None:
    canvas = np.full((768, 768, 3), 120, np.uint8)
    taken = [(100, 100, 300, 300), (400, 420, 700, 500)]
    boxes = []
    for seed in range(6):
        boxes += distractors.scatter(
            np.random.default_rng(seed), canvas, taken, Ask("find", "find.shape", code="AAA"), fonts("train")
        )
    assert len(boxes) > 5
    assert all((canvas[y0:y1, x0:x1] == 120).all() for x0, y0, x1, y1 in taken)
    assert (canvas != 120).any()


# Labels.


def _example(targets: tuple[Box, ...], signs: tuple[Placard, ...] = ()) -> Example:
    image = np.zeros((256, 384, 3), np.uint8)
    return Example(image, "?", "!", "read", targets, signs, Ask("read", "read"), None, 0, 0, "train", "none")


def test_target_tiles_golden() -> None:
    # (120, 10)-(136, 128): columns 0 and 1, row 0 alone, for y1 = 128 is exclusive.
    hit = target_tiles(_example(((120, 10, 136, 128), (383, 255, 384, 256))), 128)
    assert hit.tolist() == [[True, True, False], [False, False, True]]
    # 100-px tiles: 3 rows and 4 columns, the last ones cut.
    assert target_tiles(_example(((383, 255, 384, 256),)), 100).nonzero() == (np.array([2]), np.array([3]))


def test_glyph_labels_golden() -> None:
    # Patches of 16 px (row, column): A at (20, 5) -> (0, 1), 5 px from its centre (24, 8); K at (31, 3) lies
    # there too, but 8.6 px from that centre; 7 at (47.9, 16) -> (1, 2).
    glyphs = np.array([(20, 5), (31, 3), (47.9, 16)], np.float32)
    sign = Placard("red", "star", "AK7", (0, 0, 60, 60), (0, 0, 60, 60), glyphs, "font")
    labels = glyph_labels(_example((), (sign,)))
    assert labels.shape == (16, 24)
    assert labels[0, 1] == ALPHABET.index("A")
    assert labels[1, 2] == ALPHABET.index("7")
    assert (labels != NO_GLYPH).sum() == 2


def test_labels_of_real_examples(examples: list[Example]) -> None:
    for example in examples[:12]:
        hit = target_tiles(example, 128)
        assert hit.shape == (4, 4)
        assert hit.any()
        for x0, y0, x1, y1 in example.targets:
            assert hit[(y0 + y1) // 256, (x0 + x1) // 256]
        seen = {ALPHABET[i] for i in glyph_labels(example, 4).ravel() if i != NO_GLYPH}
        assert seen == {glyph for p in example.placards for glyph in p.code}


# Pictures.


@pytest.mark.usefixtures("easy_vqa")
@pytest.mark.parametrize(("split", "channel"), [("train", 1), ("test", 0)])
def test_framed_pictures(split: Split, channel: int) -> None:
    rows = {(row.question, row.answer) for row in pictures.rows(split)}
    for index, canvas in enumerate((256, 512, 512, 512)):
        example = sample(0, index, split, canvas, ["picture"])
        assert example.picture is not None
        assert example.targets == (example.picture.box,)
        assert any(
            example.question.endswith(q) and q != example.question and a == example.answer for q, a in rows
        )
        x0, y0, x1, y1 = example.picture.box
        assert 72 <= x1 - x0 == y1 - y0 <= 146
        middle = example.image[(y0 + y1) // 2, (x0 + x1) // 2]
        assert middle.argmax() == channel
        assert not any(intersects(example.picture.box, p.box) for p in example.placards)


@pytest.mark.usefixtures("easy_vqa")
def test_picture_answers_are_balanced_and_pictures_hang_about() -> None:
    rng = np.random.default_rng(0)
    counted = Counter(pictures.draw_question(rng, "train").answer for _ in range(800))
    assert set(counted) == {"yes", "no", "circle", "green"}
    # 200 each, standard deviation 12.
    assert min(counted.values()) > 140
    beside = [sample(0, i, "train", 384, ["read", "picture"]) for i in range(16)]
    assert any(e.family == "read" and e.picture is not None for e in beside)


def test_pictures_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_pictures()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not pictures.available()
    with pytest.raises(ConfigError, match="pip install easy-vqa"):
        sample(0, 0, "train", 512, ["picture"])


# Photographs of the caller.


def test_a_folder_of_photographs_is_split_by_name(tmp_path: Path) -> None:
    for i in range(30):
        Image.new("RGB", (90, 60), (250, 5, 250)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no photograph")
    train, test = (set(backgrounds.photographs(split, tmp_path)) for split in ("train", "test"))
    own = {path for path in train | test if path.parent == tmp_path}
    assert len(own) == 30
    assert not train & test
    used = [sample(0, i, "train", 128, photographs=tmp_path).background for i in range(24)]
    names = {path.name for path in own & train}
    assert names & set(used)
    assert not set(used) & {path.name for path in own & test}


def test_folders_without_a_readable_photograph(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of them for the train split"):
        backgrounds.photographs("train", tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(b"not a photograph")
    broken = next(path for path in sorted(tmp_path.glob("*.jpg")) if split_of(path.name) == "train")
    with pytest.raises(ImageError, match=broken.name):
        backgrounds._photograph(broken)


@pytest.mark.parametrize("name", list(backgrounds.TEXTURES))
def test_textures_vary_and_fill_the_canvas(name: str) -> None:
    rng = np.random.default_rng(1)
    planes = [backgrounds.TEXTURES[name](rng, 256, 384) for _ in range(2)]
    assert all(plane.shape == (256, 384) and plane.dtype == np.uint8 for plane in planes)
    assert planes[0].std() > 4
    assert (planes[0] != planes[1]).mean() > 0.5


def test_small_photographs_go_on_as_mirror_images() -> None:
    photo = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    # Columns 0 1 | 1 0 | 0 1 of red values 0 and 3.
    assert backgrounds._mirrored(photo, 0, 0, 2, 6)[0, :, 0].tolist() == [0, 3, 3, 0, 0, 3]
    # Rows 1 | 1 0 | 0 of red values 0 and 6, from the second row on: more than the photo has.
    assert backgrounds._mirrored(photo, 1, 0, 4, 1)[:, 0, 0].tolist() == [0, 6, 6, 0]
    assert backgrounds._mirrored(photo, 1, 1, 1, 1)[0, 0].tolist() == [9, 10, 11]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 30))
def test_runs_go_back_and_forth(size: int, first: int, count: int) -> None:
    """Against the definition: position p of the mirrored axis is p, or 2 * size - 1 - p beyond the middle."""
    places = (np.arange(count) + first) % (2 * size)
    expected = np.where(places < size, places, 2 * size - 1 - places)
    drawn = np.concatenate([np.arange(size)[run] for run in backgrounds._runs(first, count, size)])
    assert drawn.tolist() == expected.tolist()


def test_photographs_are_decoded_once_and_kept_small(tmp_path: Path) -> None:
    for i in range(10):
        Image.new("RGB", (2000, 500), (i, 5, 250)).save(tmp_path / f"{i}.png")
    backgrounds._photograph.cache_clear()
    count = backgrounds.preload("train", tmp_path)
    assert count == len(backgrounds.photographs("train", tmp_path))
    for path in backgrounds.photographs("train", tmp_path):
        assert max(backgrounds._photograph(path).shape) <= 1280
    # Every photograph was decoded by `preload` and none since.
    assert backgrounds._photograph.cache_info().misses == count


# Data set.


def test_workers_draw_what_one_process_draws() -> None:
    data = PlacardDataset(12, (128, 256), group=3, seed=4)
    loader: DataLoader[Example] = DataLoader(data, batch_size=3, num_workers=2, collate_fn=list)
    drawn = [example for batch in loader for example in batch]
    assert [e.index for e in drawn] == list(range(12))
    assert all(_same(example, data[example.index]) for example in drawn)
    sides = [e.image.shape[0] for e in drawn]
    assert all(len(set(sides[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert set(sides) == {128, 256}


def test_the_data_set_leaves_out_families_without_room() -> None:
    data = PlacardDataset(40, (128, 256), families=("where", "read"))
    assert {data[i].family for i in range(40) if data.canvas_of(i) == 128} == {"read"}
    assert {data[i].family for i in range(40) if data.canvas_of(i) == 256} == {"read", "where"}
    with pytest.raises(IndexError):
        data[40]


# Errors and the contact sheet.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"canvas": 500}, "multiples of 128"),
        ({"canvas": (0, 128)}, "multiples of 128"),
        ({"seed": -1}, "whole numbers"),
        ({"index": -1}, "whole numbers"),
        ({"split": "dev"}, "train, test"),
        ({"families": ["guess"]}, "read, find"),
        ({"families": []}, "read, find"),
        ({"canvas": 128, "families": ["compare"]}, "larger canvas"),
        ({"placards": (0, 2)}, "1 to 8 placards"),
        ({"placards": (3, 2)}, "1 to 8 placards"),
        ({"placards": (3, 9)}, "1 to 8 placards"),
        ({"placards": (1, 1), "families": ["compare"]}, "two placards"),
    ],
)
def test_unusable_arguments(arguments: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"seed": 0, "index": 0, "split": "train", "canvas": 512}
    with pytest.raises(ConfigError, match=message):
        sample(**(usual | arguments))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        PlacardDataset(0, (128,))


def test_a_contact_sheet_shows_every_example() -> None:
    drawn = [sample(0, i, "train", c) for i, c in enumerate((256, 384, 128))]
    sheet = contact_sheet(drawn, columns=2, cell=200)
    # Two columns and two rows of 200 px, 54 px of caption, 8 px between: 2 * 208 + 8 and 2 * 262 + 8.
    assert sheet.size == (424, 532)
    pixels = np.asarray(sheet).astype(int)
    outline = (pixels[..., 0] > 200) & (pixels[..., 1] < 90) & (pixels[..., 2] > 170)
    cells = [outline[:254, :212], outline[:254, 212:], outline[254:, :212]]
    assert all(cell.any() for cell in cells)
    assert (pixels[470:, 220:] == 255).all()


def test_an_older_matplotlib_has_a_font_for_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 3.11 it lacks the italic Computer Modern."""
    folder = tmp_path / "mpl-data/fonts/ttf"
    folder.mkdir(parents=True)
    new = vocabulary.fonts("train")
    for path in new:
        if path.stem != "cmti10":
            (folder / path.name).touch()
    monkeypatch.setattr(vocabulary, "package_folder", lambda name: tmp_path)
    old = vocabulary.fonts.__wrapped__("train")
    assert len(old) == len(new)
    assert all(path.is_file() for path in old)
    assert [a.stem for a, b in zip(old, new, strict=True) if a.stem != b.stem] in (["STIXGeneralItalic"], [])
