"""Positions, layouts and prompts, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from arrcoc import sequence
from arrcoc.records import Features, Grid, Layout, Lod, Plan, Segment, Tensions, Tiles, VisionSequence

SIDES = (1, 2, 3, 4)
PAIR = Grid(rows=1, cols=2, tile=128)

# Token i of a tile of side s stands at (i + 1/2) * 4/s - 1/2:
#   s=1: 0.5 * 4 - 0.5           = 1.5
#   s=2: 0.5 * 2 - 0.5, 1.5*2-.5 = 0.5, 2.5
#   s=3: (0.5, 1.5, 2.5)*4/3-0.5 = 1/6, 1.5, 17/6
#   s=4: 0.5 - 0.5, ...          = 0, 1, 2, 3
OFFSETS = {1: [1.5], 2: [0.5, 2.5], 3: [1 / 6, 1.5, 17 / 6], 4: [0.0, 1.0, 2.0, 3.0]}


@pytest.mark.parametrize("side", OFFSETS)
def test_tile_positions(side):
    # Tiles 0 and 5 of a grid of 3 columns: (row 0, col 0) and (row 1, col 2), so +4 down and +8 right.
    found = sequence.tile_positions(torch.tensor([0, 5]), cols=3, side=side, high=4)
    rows = [offset for offset in OFFSETS[side] for _ in range(side)]
    cols = OFFSETS[side] * side
    expected = torch.tensor([[rows, [4 + r for r in rows]], [cols, [8 + c for c in cols]]])
    torch.testing.assert_close(found, expected)


def test_glimpse_positions_run_over_the_frame():
    # Side 2 of 4 on 1 x 2 tiles: rows 0.5, 2.5; columns 0.5, 2.5, 4.5, 6.5.
    found = sequence.glimpse_positions(PAIR, 2, 4)
    assert found[0].tolist() == [0.5] * 4 + [2.5] * 4
    assert found[1].tolist() == [0.5, 2.5, 4.5, 6.5] * 2


def test_glimpse_and_tiles_of_one_side_stand_at_the_same_places():
    grid = Grid(2, 3, 128)
    tiles = sequence.tile_positions(torch.arange(6), 3, 2, 4).flatten(1)
    glimpse = sequence.glimpse_positions(grid, 2, 4)
    assert sorted(zip(*tiles.tolist(), strict=True)) == sorted(zip(*glimpse.tolist(), strict=True))


def test_positions_of_a_coarser_overview():
    # 2 x 3 tiles of side 2: 4 x 6 tokens; at stride 4 that is 1 x 2. The frame is 8 x 12 tokens of LOD high,
    # so rows stand at 0.5 * 8 - 0.5 = 3.5, columns at (0.5, 1.5) * 6 - 0.5 = 2.5, 8.5.
    assert sequence.glimpse_positions(Grid(2, 3, 128), 2, 4, 4).tolist() == [[3.5, 3.5], [2.5, 8.5]]
    # 1 x 3 tiles of side 1 at stride 2: 1 x 2 tokens over 4 x 12.
    assert sequence.glimpse_positions(Grid(1, 3, 128), 1, 4, 2).tolist() == [[1.5, 1.5], [2.5, 8.5]]


@pytest.mark.parametrize(("grid", "side", "high"), [(Grid(5, 3, 96), 1, 3), (Grid(2, 7, 640), 4, 20)])
def test_positions_of_the_glimpse_are_those_of_its_tiles_to_the_bit(grid, side, high):
    tiles = sequence.tile_positions(torch.arange(grid.count), grid.cols, side, high)
    offsets = tiles.view(2, grid.rows, grid.cols, side, side).transpose(2, 3).reshape(2, -1)
    found = sequence.glimpse_positions(grid, side, high)
    torch.testing.assert_close(found, offsets)
    step = (torch.arange(grid.rows * side, dtype=torch.float32) + 0.5) * (high / side) - 0.5
    assert torch.equal(found[0].unique(), step)


# Layouts. A token's value names it: 100 * tile + its place in the tile; plane l adds 1000 * (l + 1).


def named(tiles: list[int], side: int) -> Features:
    values = torch.tensor([[100.0 * tile + i for i in range(side * side)] for tile in tiles])
    tokens = values[..., None].expand(-1, -1, 2)
    return Features(tokens, torch.stack([tokens + 1000, tokens + 2000]))


def part(lod: Lod, tiles: list[int]) -> Tiles:
    return Tiles(lod, SIDES[lod], torch.tensor(tiles), named(tiles, SIDES[lod]))


def glimpse(count: int) -> Features:
    """K = 1; values -1, -2, ... in raster order."""
    tokens = -(torch.arange(count) + 1.0).view(1, count, 1).expand(1, count, 2)
    return Features(tokens, torch.stack([tokens - 1000, tokens - 2000]))


def plan(lod: list[list[int]], layout: Layout, stride: int, tokens: int) -> Plan:
    levels = torch.tensor(lod)
    return Plan(
        levels,
        torch.ones(levels.shape),
        Tensions(0.0, 0.0, 0.0),
        SIDES,
        layout,
        stride,
        tokens,
        tokens,
        levels.numel() * 16,
    )


def values(laid_out: VisionSequence) -> list[int]:
    assert (laid_out.deepstack.shape[0], laid_out.tokens.shape[1]) == (2, 2)
    sign = laid_out.tokens.sign().where(laid_out.tokens != 0, torch.ones(()))
    torch.testing.assert_close(laid_out.deepstack[0], laid_out.tokens + 1000 * sign)
    torch.testing.assert_close(laid_out.deepstack[1], laid_out.tokens + 2000 * sign)
    return laid_out.tokens[:, 0].int().tolist()


def test_replace_in_raster_order():
    # Tile 0 at side 2: (0.5, 0.5) (0.5, 2.5) (2.5, 0.5) (2.5, 2.5); tile 1 at side 1: (1.5, 4 + 1.5).
    # By row, then column: tile 0's upper pair, tile 1, tile 0's lower pair.
    tiles = [part(Lod.BACKGROUND, [1]), part(Lod.LOW, [0])]
    made = sequence.assemble(PAIR, plan([[1, 0]], Layout.REPLACE, 0, 5), None, tiles, "raster")
    assert values(made) == [0, 1, 100, 2, 3]
    assert made.positions.tolist() == [[0] * 5, [0.5, 0.5, 1.5, 2.5, 2.5], [0.5, 2.5, 5.5, 0.5, 2.5]]
    assert made.segments == (Segment(0, 5, 8.0, ""),)  # the longer edge is 2 * 4 tokens


def test_replace_tile_by_tile():
    tiles = [part(Lod.BACKGROUND, [1]), part(Lod.LOW, [0])]
    made = sequence.assemble(PAIR, plan([[1, 0]], Layout.REPLACE, 0, 5), None, tiles, "tile")
    assert values(made) == [0, 1, 2, 3, 100]
    assert made.positions[2].tolist() == [0.5, 2.5, 0.5, 2.5, 5.5]


def test_replace_all_high_in_raster_order_interleaves_the_tiles_rows():
    made = sequence.assemble(
        PAIR, plan([[3, 3]], Layout.REPLACE, 0, 32), None, [part(Lod.HIGH, [0, 1])], "raster"
    )
    rows = [[4 * r + c for c in range(4)] + [100 + 4 * r + c for c in range(4)] for r in range(4)]
    assert values(made) == [value for row in rows for value in row]
    assert made.positions[1].tolist() == [float(h) for h in range(4) for _ in range(8)]
    assert made.positions[2].tolist() == [float(w) for _ in range(4) for w in range(8)]


def test_replace_wants_every_tile():
    with pytest.raises(AssertionError, match="exactly once"):
        sequence.replace(PAIR, plan([[1, 0]], Layout.REPLACE, 0, 5), [part(Lod.LOW, [0])], "raster")


@pytest.mark.parametrize(
    ("order", "refined"),
    # Tile 0 is medium, tile 1 low: rows 1/6 (0), 0.5 (1), 1.5 (0), 2.5 (1), 17/6 (0), tiles in brackets.
    [
        ("raster", [0, 1, 2, 100, 101, 3, 4, 5, 102, 103, 6, 7, 8]),
        ("tile", [0, 1, 2, 3, 4, 5, 6, 7, 8, 100, 101, 102, 103]),
    ],
)
def test_refine_puts_the_glimpse_first(order, refined):
    tiles = [part(Lod.LOW, [1]), part(Lod.MEDIUM, [0])]
    made = sequence.assemble(PAIR, plan([[2, 1]], Layout.REFINE, 1, 15), glimpse(2), tiles, order)
    assert values(made) == [-1, -2, *refined]
    assert made.positions[1:, :2].tolist() == [[1.5, 1.5], [1.5, 5.5]]
    assert made.segments == (Segment(0, 15, 8.0, ""),)


def test_refine_of_nothing_is_the_glimpse():
    made = sequence.assemble(PAIR, plan([[0, 0]], Layout.REFINE, 1, 2), glimpse(2), [], "raster")
    assert values(made) == [-1, -2]


def test_crops_are_images_of_their_own():
    tiles = [part(Lod.LOW, [1]), part(Lod.MEDIUM, [0])]
    made = sequence.assemble(PAIR, plan([[2, 1]], Layout.CROPS, 1, 15), glimpse(2), tiles, "raster")
    assert values(made) == [-1, -2, *range(9), 100, 101, 102, 103]
    assert made.segments == (
        Segment(0, 2, 8.0, ""),
        Segment(2, 11, 3.0, "Detail at [0, 0, 500, 1000]:"),
        Segment(11, 15, 2.0, "Detail at [500, 0, 1000, 1000]:"),
    )
    assert made.positions[1].tolist() == [1.5, 1.5, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 1, 1]
    assert made.positions[2].tolist() == [1.5, 5.5, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 0, 1]


@pytest.mark.parametrize("layout", [Layout.REFINE, Layout.CROPS])
def test_an_overview_coarser_than_the_glimpse_comes_first(layout):
    # One token for both tiles: at (0.5 * 4 - 0.5, 0.5 * 8 - 0.5).
    made = sequence.assemble(PAIR, plan([[0, 1]], layout, 2, 5), glimpse(1), [part(Lod.LOW, [1])], "raster")
    assert values(made) == [-1, 100, 101, 102, 103]
    assert made.positions[:, 0].tolist() == [0, 1.5, 3.5]
    assert made.segments[0] == Segment(0, 1 if layout is Layout.CROPS else 5, 8.0, "")


def test_assemble_holds_the_plan_to_its_token_count():
    with pytest.raises(AssertionError):
        sequence.assemble(PAIR, plan([[0, 0]], Layout.REFINE, 1, 3), glimpse(2), [], "raster")


@pytest.mark.parametrize(
    ("tile", "rows", "cols", "box"),
    # Thousandths: tile 5 of 2 x 3 is row 1, col 2: x from 2000/3, y from 1000/2.
    [(0, 1, 1, "0, 0, 1000, 1000"), (5, 2, 3, "667, 500, 1000, 1000"), (1, 3, 3, "333, 0, 667, 333")],
)
def test_captions(tile, rows, cols, box):
    assert sequence.caption(tile, rows, cols) == f"Detail at [{box}]:"


def test_background_tiles_are_cut_out_of_the_glimpse():
    # 1 x 2 tiles of side 2: the glimpse's rows are [-1 -2 | -3 -4] and [-5 -6 | -7 -8].
    levels = plan([[3, 0]], Layout.REPLACE, 0, 0)
    coarse = Plan(**{f: getattr(levels, f) for f in Plan.__slots__} | {"sides": (2, 3, 4, 5)})
    cut = sequence.background_tiles(PAIR, coarse, glimpse(8))
    assert (cut.lod, cut.side, cut.index.tolist()) == (Lod.BACKGROUND, 2, [1])
    assert cut.features.tokens[0, :, 0].tolist() == [-3, -4, -7, -8]
    assert cut.features.deepstack[1, 0, :, 0].tolist() == [-2003, -2004, -2007, -2008]


def test_joined_tiles_lie_in_raster_order_over_the_frame():
    joined = sequence.join_tiles(named([0, 1], 2), PAIR, 2)
    assert joined.tokens[0, :, 0].tolist() == [0, 1, 100, 101, 2, 3, 102, 103]
    assert joined.deepstack[1, 0, :, 0].tolist() == [2000, 2001, 2100, 2101, 2002, 2003, 2102, 2103]


# Prompts.


def pictures() -> list[VisionSequence]:
    """1 x 1 tile at side 1 (extent 4), and 1 x 2 tiles at side 1 (extent 8)."""
    one = plan([[0]], Layout.REFINE, 1, 1)
    two = plan([[0, 0]], Layout.REFINE, 1, 2)
    return [
        sequence.assemble(Grid(1, 1, 128), one, glimpse(1), [], "raster"),
        sequence.assemble(PAIR, two, glimpse(2), [], "raster"),
    ]


def test_positions_of_a_prompt_with_two_images():
    runs = [torch.full((count, 2), 7.0) for count in (2, 1, 3)]
    made = sequence.prompt(runs, pictures(), [[], []])
    # Text 0 1; image one at 2 + 1.5; it is 4 long, so text at 6; image two from 7, 8 long; text from 15.
    assert made.positions.tolist() == [
        [0, 1, 2, 6, 7, 7, 15, 16, 17],
        [0, 1, 3.5, 6, 8.5, 8.5, 15, 16, 17],
        [0, 1, 3.5, 6, 8.5, 12.5, 15, 16, 17],
    ]
    assert made.vision.tolist() == [False, False, True, False, True, True, False, False, False]
    assert made.embeds[0, :, 0].tolist() == [7, 7, -1, 7, -1, -2, 7, 7, 7]
    assert made.deepstack[0, :, 0].tolist() == [-1001, -1001, -1002]
    assert made.next_position == 18


def test_captions_stand_between_the_segments_of_a_prompt():
    crops = sequence.assemble(
        Grid(1, 1, 128), plan([[1]], Layout.CROPS, 1, 5), glimpse(1), [part(Lod.LOW, [0])], "raster"
    )
    made = sequence.prompt([torch.full((1, 2), 7.0)] * 2, [crops], [[torch.full((2, 2), 8.0)]])
    assert made.embeds[0, :, 0].tolist() == [7, -1, 8, 8, 0, 1, 2, 3, 7]
    # Text 0; glimpse 1 + 1.5, 4 long; caption 5 6; crop from 7, 2 long; text 9.
    assert made.positions[1].tolist() == [0, 2.5, 5, 6, 7, 7, 8, 8, 9]
    assert made.next_position == 10


def test_a_prompt_of_text_alone():
    made = sequence.prompt([torch.zeros(3, 2)], [], [])
    assert made.positions.tolist() == [[0, 1, 2]] * 3
    assert made.deepstack.numel() == 0
    assert not made.vision.any()


@pytest.mark.parametrize(("texts", "images", "captions"), [(2, 2, 2), (3, 2, 1), (4, 2, 2)])
def test_a_prompt_wants_a_run_of_text_around_every_image(texts, images, captions):
    with pytest.raises((AssertionError, ValueError)):
        sequence.prompt([torch.zeros(1, 2)] * texts, pictures()[:images], [[]] * captions)
