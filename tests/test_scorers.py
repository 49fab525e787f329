"""Scorers: golden entropies, saliency on plain ground, the learned head."""

from __future__ import annotations

import math
from pathlib import Path

import kornia
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from arrcoc import scorers
from arrcoc.errors import ModelError
from arrcoc.records import Channel, Grid, Query, Texture

CELLS = 8
QUERY = Query(text="?", ids=(1,), embedding=torch.zeros(4))


def blank(rows: int, cols: int, cells: int = CELLS) -> Texture:
    """A plain mid-grey texture without gradients, detail or position."""
    maps = torch.zeros(len(Channel), rows * cells, cols * cells, dtype=torch.float16)
    return Texture(maps=maps, grid=Grid(rows, cols, 32), cells=cells)


def tile(texture: Texture, channel: Channel, row: int, col: int) -> Tensor:
    """A view of one tile of one channel, to write to."""
    n = texture.cells
    return texture.maps[channel.row, row * n : (row + 1) * n, col * n : (col + 1) * n]


def noisy(rows: int, cols: int, seed: int = 0) -> Texture:
    made = blank(rows, cols)
    random = torch.Generator().manual_seed(seed)
    made.maps.copy_(torch.rand(made.maps.shape, generator=random))
    return made


@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        ([1, 1], 1.0),
        ([5, 0, 0, 0], 0.0),
        ([1, 1, 1, 1, 1, 1, 1, 1], 3.0),
        ([2, 1, 1], 1.5),  # 1/2*1 + 2 * 1/4*2
        ([0, 0, 0], 0.0),
    ],
)
def test_entropy_bits(weights: list[float], bits: float) -> None:
    assert scorers.entropy_bits(torch.tensor([weights]).float()).tolist() == [bits]


def test_two_equally_likely_luminances_are_one_bit() -> None:
    made = blank(1, 2)
    tile(made, Channel.LIGHTNESS, 0, 1)[:, : CELLS // 2] = -0.5
    tile(made, Channel.LIGHTNESS, 0, 1)[:, CELLS // 2 :] = 0.5
    assert scorers.luminance_entropy(made).tolist() == [[0.0, 1.0]]


def test_luminance_within_one_bin_is_no_variety() -> None:
    # Bins are 1/8 wide: [0, 0.125) is one of them.
    made = blank(1, 1)
    tile(made, Channel.LIGHTNESS, 0, 0)[::2] = 0.12
    assert scorers.luminance_entropy(made).item() == 0


def test_extreme_luminances_fall_into_the_outer_bins() -> None:
    made = blank(1, 1)
    made.maps[Channel.LIGHTNESS.row, ::2] = -1
    made.maps[Channel.LIGHTNESS.row, 1::2] = 1
    assert scorers.luminance_entropy(made).item() == 1


def test_orientation_entropy_weighs_by_magnitude() -> None:
    made = blank(1, 1)
    # Half of the cells along x (0 degrees) at magnitude 0.25, half along y (90 degrees) at 0.75:
    # p = 1/4, 3/4: 1/4*2 + 3/4*log2(4/3) = 0.8113 bits. Unweighted it would be 1 bit.
    made.maps[Channel.SOBEL_X.row, :4] = 0.25
    made.maps[Channel.SOBEL_MAGNITUDE.row, :4] = 0.25
    made.maps[Channel.SOBEL_Y.row, 4:] = 0.75
    made.maps[Channel.SOBEL_MAGNITUDE.row, 4:] = 0.75
    assert scorers.orientation_entropy(made).item() == pytest.approx(0.8113, abs=1e-4)


def test_orientations_are_angles() -> None:
    # atan2(1, 1) = 45, atan2(1, 0.2) = 78.7, atan2(0.2, 1) = 11.3 degrees and 0 along x: four bins of
    # ten degrees (4, 7, 1, 0), a quarter of the magnitude each: 2 bits.
    made = blank(1, 1)
    made.maps[Channel.SOBEL_MAGNITUDE.row] = 0.5
    for rows, (x, y) in zip(range(0, 8, 2), [(1, 1), (0.2, 1), (1, 0.2), (1, 0)], strict=True):
        made.maps[Channel.SOBEL_X.row, rows : rows + 2] = x
        made.maps[Channel.SOBEL_Y.row, rows : rows + 2] = y
    assert scorers.orientation_entropy(made).item() == pytest.approx(2, abs=1e-6)


def test_propositional_by_hand() -> None:
    # Two luminances (1 of 4 bits), two orientations equally weighted (1 of log2 9 = 3.1699 bits),
    # detail 0.3 everywhere: 0.3 / (0.3 + 0.1) * (0.25 + 0.31546) / 2 = 0.21205.
    made = blank(1, 1)
    made.maps[Channel.LIGHTNESS.row, :4] = 0.5
    made.maps[Channel.SOBEL_X.row, :, :4] = 0.5
    made.maps[Channel.SOBEL_Y.row, :, 4:] = 0.5
    made.maps[Channel.SOBEL_MAGNITUDE.row] = 0.5
    made.maps[Channel.DETAIL.row] = 0.3
    assert scorers.propositional(made, QUERY).item() == pytest.approx(0.21205, abs=1e-3)


def test_propositional_needs_detail_and_grows_with_it() -> None:
    made = noisy(1, 3)
    for column, detail in enumerate((0.0, 0.05, 0.5)):
        made.maps[:, :, column * CELLS : (column + 1) * CELLS] = made.maps[:, :, :CELLS].clone()
        tile(made, Channel.DETAIL, 0, column).fill_(detail)
    scores = scorers.propositional(made, QUERY)[0].tolist()
    assert scores[0] == 0
    assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize("scorer", [scorers.propositional, scorers.perspectival])
@pytest.mark.parametrize("level", [-0.8, 0.0, 0.7])
def test_constant_image_scores_nothing(scorer: scorers.Scorer, level: float) -> None:
    made = blank(3, 4)
    made.maps[Channel.LIGHTNESS.row] = level
    made.maps[Channel.GREEN_RED.row] = level / 2
    assert scorer(made, QUERY).abs().max() < 1e-4


@pytest.mark.parametrize("at", [(0, 0), (0, 4), (1, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize("channel", [Channel.LIGHTNESS, Channel.GREEN_RED, Channel.BLUE_YELLOW])
def test_odd_tile_on_plain_ground_wins(channel: Channel, at: tuple[int, int]) -> None:
    made = blank(4, 5, cells=16)
    tile(made, channel, *at).fill_(0.6)
    scores = scorers.perspectival(made, QUERY)
    assert divmod(scores.argmax().item(), 5) == at
    assert scores.flatten().topk(2).values.diff().abs() > 0.02


def test_perspectival_by_top_decile() -> None:
    # One bright cell of 64: the top tenth are 6 cells, so it counts for a sixth, not for 1/64 (0.03).
    made = blank(1, 3)
    tile(made, Channel.LIGHTNESS, 0, 1)[4, 4] = 1.0
    lone = scorers.perspectival(made, QUERY)[0]
    assert lone[1] > 0.06
    assert lone[1] > lone[0]
    assert lone[1] > lone[2]


def test_perspectival_prefers_the_centre_weakly() -> None:
    made = blank(1, 2)
    for column in (0, 1):
        tile(made, Channel.LIGHTNESS, 0, column)[2:6, 2:6] = 1.0
    even = scorers.perspectival(made, QUERY)[0]
    torch.testing.assert_close(even[0], even[1])
    tile(made, Channel.ECCENTRICITY, 0, 0).fill_(1.0)
    shifted = scorers.perspectival(made, QUERY)[0]
    # At eccentricity 1 a cell loses a tenth of its score.
    assert (shifted[0] / even[0]).item() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("scorer", [scorers.propositional, scorers.perspectival])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (3, 2)])
def test_range_shape_and_determinism(scorer: scorers.Scorer, rows: int, cols: int) -> None:
    made = noisy(rows, cols)
    scores = scorer(made, QUERY)
    assert scores.shape == (rows, cols)
    assert scores.dtype == torch.float32
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert torch.equal(scores, scorer(made, QUERY))


@pytest.mark.parametrize("scorer", [scorers.propositional, scorers.perspectival])
def test_flipping_the_image_flips_the_scores(scorer: scorers.Scorer) -> None:
    made = noisy(3, 4)
    flipped = Texture(maps=made.maps.flip(-1), grid=made.grid, cells=made.cells)
    torch.testing.assert_close(scorer(flipped, QUERY), scorer(made, QUERY).flip(-1))


def test_propositional_of_a_tile_is_its_own() -> None:
    made, other = noisy(2, 2), noisy(2, 2, seed=1)
    for channel in Channel:
        tile(other, channel, 0, 1).copy_(tile(made, channel, 0, 1))
    assert scorers.propositional(made, QUERY)[0, 1] == scorers.propositional(other, QUERY)[0, 1]


@pytest.mark.parametrize(("height", "width"), [(40, 200), (7, 9), (130, 64)])
def test_blurs_are_kornias(height: int, width: int) -> None:
    maps = torch.rand(4, height, width, generator=torch.Generator().manual_seed(height))
    blurred = scorers._blurred(maps)
    assert sorted(blurred) == [1, 2, 4, 8, 16]
    for sigma, found in blurred.items():
        size = 2 * round(3 * sigma) + 1
        expected = kornia.filters.gaussian_blur2d(
            maps[None], (size, size), (sigma, sigma), border_type="replicate"
        )
        torch.testing.assert_close(found, expected[0], atol=1e-6, rtol=0)


# The learned head.

COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
EMBEDDINGS = torch.randn(4, 16, generator=torch.Generator().manual_seed(7)) * 0.02


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Textures of 2x2 tiles (4x4 cells), one of each colour; the colour asked for; the tile that has it."""
    random = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(4, generator=random) for _ in range(count)])
    asked = torch.randint(0, 4, (count,), generator=random)
    planes = COLOURS[order].transpose(1, 2).unflatten(2, (2, 2))
    maps = torch.randn(count, len(Channel), 8, 8, generator=random) * 0.1
    maps[:, :3] += planes.repeat_interleave(4, -1).repeat_interleave(4, -2)
    return maps.half(), asked, (order == asked[:, None]).float().argmax(dim=1)


@pytest.fixture(scope="module")
def fitted() -> scorers.TextureHead:
    torch.manual_seed(0)
    head = scorers.TextureHead(16, width=16)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(100):
        maps, asked, target = coloured(32, step)
        wanted = functional.one_hot(target, 4).float()
        logits = head.logits(maps, EMBEDDINGS[asked], 4).flatten(1)
        loss = functional.binary_cross_entropy_with_logits(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head


def test_head_learns_the_tile_of_the_asked_colour(fitted: scorers.TextureHead) -> None:
    maps, asked, target = coloured(128, seed=1000)
    with torch.no_grad():
        found = fitted.logits(maps, EMBEDDINGS[asked], 4).flatten(1).argmax(dim=1)
    assert (found == target).float().mean() == 1.0


def test_head_as_a_scorer(fitted: scorers.TextureHead) -> None:
    maps, _, _ = coloured(1, seed=5)
    made = Texture(maps=maps[0], grid=Grid(2, 2, 32), cells=4)
    scorer: scorers.Scorer = fitted
    winners = set()
    for embedding in EMBEDDINGS:
        scores = scorer(made, Query(text="?", ids=(1,), embedding=embedding))
        assert scores.shape == (2, 2)
        assert not scores.requires_grad
        torch.testing.assert_close(
            scores, fitted.logits(maps, embedding[None], 4)[0].sigmoid().detach(), rtol=0, atol=0
        )
        winners.add(scores.argmax().item())
    assert winners == {0, 1, 2, 3}


def test_head_ignores_batch_neighbours(fitted: scorers.TextureHead) -> None:
    maps, asked, _ = coloured(3, seed=9)
    together = fitted.logits(maps, EMBEDDINGS[asked], 4)
    alone = fitted.logits(maps[1:2], EMBEDDINGS[asked[1:2]], 4)
    torch.testing.assert_close(together[1:2], alone)


def test_head_saves_and_loads_bit_equal(fitted: scorers.TextureHead, tmp_path: Path) -> None:
    path = tmp_path / scorers.TEXTURE_HEAD_FILE
    fitted.save(path, fingerprint="abc")
    loaded = scorers.TextureHead.load(path, 16, torch.device("cpu"))
    assert loaded.fingerprint == "abc"
    assert loaded.width == 16
    assert [file.name for file in tmp_path.iterdir()] == [scorers.TEXTURE_HEAD_FILE]
    maps, asked, _ = coloured(4, seed=11)
    wanted = fitted.logits(maps, EMBEDDINGS[asked], 4)
    assert torch.equal(loaded.logits(maps, EMBEDDINGS[asked], 4), wanted)


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / scorers.TEXTURE_HEAD_FILE
    scorers.TextureHead(4, width=4).save(path, fingerprint="old")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(scorers, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        scorers.TextureHead(4, width=4).save(path, fingerprint="new")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "empty", "text", "other format", "lacks a weight"]
)
def test_damaged_head_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / scorers.TEXTURE_HEAD_FILE
    head = scorers.TextureHead(4, width=4)
    if damage == "other format":
        monkeypatch.setattr(scorers, "TEXTURE_HEAD_FORMAT", "arrcoc-texture-head-0")
    if damage == "lacks a weight":
        del head.project.bias
    head.save(path, fingerprint="abc")
    monkeypatch.undo()
    whole = path.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a model"}
    path.write_bytes(content.get(damage, whole))
    if damage == "missing":
        path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        scorers.TextureHead.load(path, 4, torch.device("cpu"))


def test_head_knows_the_embeddings_it_was_fitted_to(tmp_path: Path) -> None:
    path = tmp_path / scorers.TEXTURE_HEAD_FILE
    probe = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    scorers.TextureHead(4, width=4).save(path, "abc", probe)
    head = scorers.TextureHead.load(path, 4)
    assert head.probe is not None
    assert torch.equal(head.probe, probe)
    assert head.fits(probe.bfloat16().float())  # rounding to 8 bits is no other model
    assert not head.fits(1.02 * probe)
    scorers.TextureHead(4, width=4).save(path, "abc")
    assert not scorers.TextureHead.load(path, 4).fits(probe)


def test_head_for_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / scorers.TEXTURE_HEAD_FILE
    scorers.TextureHead(4, width=4).save(path, fingerprint="abc")
    with pytest.raises(ModelError, match=r"width 4\. Allowed: width 5"):
        scorers.TextureHead.load(path, 5, torch.device("cpu"))


def test_normalised_entropy_reaches_one() -> None:
    uniform = torch.ones(scorers.ORIENTATION_BINS)
    assert scorers.entropy_bits(uniform).item() == pytest.approx(math.log2(9), abs=1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
def test_an_exact_convolution_is_the_layers_own(dilation):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 5, 3, padding=dilation, dilation=dilation)
    maps = torch.randn(2, 3, 7, 9)
    assert torch.equal(scorers.exact_convolution(layer, maps), layer(maps))


@pytest.mark.gpu
def test_the_texture_head_is_not_rounded_to_tf32():
    torch.manual_seed(0)
    head = scorers.TextureHead(12).eval().requires_grad_(False)
    maps, query = torch.randn(13, 64, 64), Query("?", (1,), torch.randn(12))
    expected = head(Texture(maps, Grid(4, 4, 64), 16), query)
    moved = Query("?", (1,), query.embedding.cuda())
    with torch.inference_mode():
        found = head.cuda()(Texture(maps.cuda(), Grid(4, 4, 64), 16), moved)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-6, rtol=0)
