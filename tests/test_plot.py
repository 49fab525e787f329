from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from arrcoc import plot
from arrcoc.errors import ConfigError
from arrcoc.records import Tensions

SIDES = (1, 2, 3, 4)
NAMES = ("propositional", "perspectival", "participatory")


def figure(rows: int = 2, cols: int = 3, **changes: Any) -> Figure:
    """The overview of a grid whose tiles are 32 px, with maps of a constant value of their own."""
    arguments: dict[str, Any] = {
        "picture": np.arange(rows * cols * 32 * 32 * 3, dtype=np.uint8).reshape(rows * 32, cols * 32, 3),
        "scores": {name: np.full((rows, cols), 0.1 * (i + 1)) for i, name in enumerate(NAMES)},
        "relevance": np.full((rows, cols), 0.5),
        "lod": np.zeros((rows, cols), dtype=np.int64),
        "sides": SIDES,
        "title": "What is it?",
        "tokens": rows * cols,
        "full_tokens": rows * cols * 16,
        "tensions": Tensions(0.25, -0.5, 0.0),
    }
    return plot.overview(**(arguments | changes))


def axes_by_label(drawn: Figure) -> dict[str, Any]:
    return {str(axes.get_label()): axes for axes in drawn.axes}


def drawn_map(axes: Any) -> AxesImage:
    image = axes.get_images()[-1]
    assert isinstance(image, AxesImage)
    return image


def test_panels_in_order() -> None:
    labels = [axes.get_label() for axes in figure().axes]
    assert labels == ["image", *NAMES, "relevance", "levels of detail", "legend", "scale", "tensions"]


def test_each_map_is_drawn_at_its_place_on_one_scale() -> None:
    rng = np.random.default_rng(0)
    maps = {name: rng.random((2, 3)) for name in NAMES}
    relevance, lod = rng.random((2, 3)), np.array([[0, 1, 2], [3, 0, 1]])
    panels = axes_by_label(figure(scores=maps, relevance=relevance, lod=lod))
    for name, values in {**maps, "relevance": relevance, "levels of detail": lod}.items():
        image = drawn_map(panels[name])
        np.testing.assert_array_equal(image.get_array(), values)
        assert image.get_extent() == [0, 96, 64, 0]  # left, right, bottom, top of 3 x 2 tiles of 32 px
        assert image.get_alpha() is not None
        assert len(panels[name].get_images()) == 2  # the map lies over the grey picture
    assert drawn_map(panels["relevance"]).get_clim() == (0, 1)


def test_lod_map_and_legend_share_their_colours() -> None:
    panels = axes_by_label(figure(lod=np.array([[0, 1, 2], [3, 3, 3]])))
    image = drawn_map(panels["levels of detail"])
    painted = [image.cmap(image.norm(level))[:3] for level in range(4)]
    swatches = [patch.get_facecolor()[:3] for patch in panels["legend"].get_legend().get_patches()]
    assert painted == swatches[::-1] == [to_rgb(colour) for colour in plot.LOD_COLOURS]


def test_lod_colours_rise_in_lightness() -> None:
    # Rec. 709 luma of the four colours: apart by at least a tenth, so they differ in grey and to any eye.
    luma = [float(np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722))) for c in plot.LOD_COLOURS]
    assert np.diff(luma).min() > 0.1


def test_legend_numbers() -> None:
    # Tiles: 2 background, 1 low, 0 medium, 3 high; a tile at side 1, 2, 3, 4 has 1, 4, 9, 16 tokens.
    # Tokens: 2*1 + 1*4 + 3*16 = 54 of 6*16 = 96, which is 56.25 %.
    lod = np.array([[0, 0, 1], [3, 3, 3]])
    legend = axes_by_label(figure(lod=lod, tokens=54, full_tokens=96))["legend"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "high: 3 tiles of 16 tokens",
        "medium: 0 tiles of 9 tokens",
        "low: 1 tile of 4 tokens",
        "background: 2 tiles of 1 token",
    ]
    assert legend.get_title().get_text() == "54 of 96 tokens: 56.2% of full resolution"


def test_total_line_groups_thousands() -> None:
    assert plot.total_line(1250, 12544) == "1,250 of 12,544 tokens: 10.0% of full resolution"


def test_captions_name_the_range_of_a_map() -> None:
    panels = axes_by_label(figure(relevance=np.array([[0.0, 0.2, 0.4], [0.6, 0.8, 0.999]])))
    assert panels["relevance"].get_title("left") == "relevance, 0.00 to 1.00"
    assert panels["perspectival"].get_title("left") == "perspectival, 0.20 to 0.20"


def test_tensions_point_to_the_word_they_favour() -> None:
    axes = axes_by_label(figure(tensions=Tensions(0.25, -0.5, 0.0)))["tensions"]
    bars = [bar for bar in axes.patches if bar.get_x() == 0]  # the grey tracks start at -1
    assert [bar.get_width() for bar in bars] == [0.25, -0.5, 0.0]
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
    places = {text.get_text(): text.get_position() for text in axes.texts}
    pairs = [("compress", "particularize"), ("explore", "exploit"), ("diversify", "focus")]
    for row, (left, right) in enumerate(pairs):
        assert places[left][1] == places[right][1] == row
        assert places[left][0] < -1 < 1 < places[right][0]
    assert {"+0.25", "-0.50", "+0.00"} <= places.keys()


@pytest.mark.parametrize(
    ("rows", "cols", "columns"), [(1, 1, 3), (1, 20, 1), (20, 1, 6), (2, 5, 2), (64, 64, 3)]
)
def test_any_grid_fits_its_figure(rows: int, cols: int, columns: int) -> None:
    drawn = figure(rows, cols)
    panels = drawn.axes[:6]
    assert len({round(axes.get_position(original=True).x0, 6) for axes in panels}) == columns
    boxes = [axes.get_position(original=True) for axes in drawn.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1 for box in boxes)
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlapping == []
    assert 3 < drawn.get_figheight() < 20


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("", ""),
        ("What  is\nit?", "What is it?"),
        ("word " * 10, "word word word word\nword word word word\nword word"),
        ("word " * 99, "word word word word\nword word word word\nword word word …"),
        ("x" * 25, "x" * 20 + "\n" + "x" * 5),
        # Twelve wide characters fill 24 columns: ten fit on a line of 20.
        ("猫" * 12, "猫" * 10 + "\n猫猫"),
    ],
)
def test_wrapped(title: str, expected: str) -> None:
    assert plot.wrapped(title, width=20) == expected


def test_long_title_makes_room_and_keeps_dollars() -> None:
    short, long = figure(title="Is it $5 or $6?"), figure(title="word " * 60)
    assert short.get_suptitle() == "Is it $5 or $6?"
    assert long.get_suptitle().count("\n") == 2
    assert long.get_figheight() > short.get_figheight()


@pytest.mark.parametrize(
    ("suffix", "head"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_save_writes_the_format_of_the_suffix(tmp_path: Path, suffix: str, head: bytes) -> None:
    path = plot.save(figure(), tmp_path / "new" / f"picture{suffix}")
    assert path.read_bytes().startswith(head)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no scratch file is left


def test_saved_png_shows_the_lod_colours_where_the_tiles_are(tmp_path: Path) -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    drawn = figure(2, 2, picture=grey, lod=np.array([[0, 3], [0, 0]]))
    pixels = np.asarray(Image.open(plot.save(drawn, tmp_path / "a.png")).convert("RGB")).astype(int)
    assert pixels.shape[1] == 13 * 120  # inches x dots per inch
    box = axes_by_label(drawn)["levels of detail"].get_position()

    def at(x: float, y: float) -> Any:
        column = (box.x0 + x * box.width) * pixels.shape[1]
        row = (1 - box.y1 + y * box.height) * pixels.shape[0]
        return pixels[int(row), int(column)]

    # The top right tile is yellow (red far above blue), the others dark blue (blue above red).
    assert at(0.75, 0.25)[0] - at(0.75, 0.25)[2] > 60
    for x, y in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.75)):
        assert at(x, y)[2] - at(x, y)[0] > 20


def test_unknown_suffix_and_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        plot.save(figure(), tmp_path / "picture.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable folder"):
        plot.save(figure(), tmp_path / "file" / "picture.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_question_is_not_read_as_mathematics(tmp_path: Path) -> None:
    assert plot.save(figure(title=r"What is $\nosuch{$?"), tmp_path / "a.png").is_file()


def test_question_in_a_script_without_font_is_saved(tmp_path: Path) -> None:
    assert plot.save(figure(title="𐎠𐎡𐎢?"), tmp_path / "a.png").is_file()


def test_pyplot_keeps_no_figure() -> None:
    figure()
    assert matplotlib.pyplot.get_fignums() == []
