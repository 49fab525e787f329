"""Dividing a budget, and the plan that fixes the token count before any tile is refined."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrcoc import allocation, image
from arrcoc.cache import TileCache
from arrcoc.encoder import TileEncoder
from arrcoc.engine import Engine
from arrcoc.errors import BudgetError
from arrcoc.glimpse import JointGlimpse
from arrcoc.judging import Judge
from arrcoc.lod import TorchLodEngine
from arrcoc.pipeline import Look, Pipeline, divide_budget
from arrcoc.records import Features, Frame, Lod, Plan, Texture
from arrcoc.scorers import TextureHead
from arrcoc.timing import StageTimer

RANGES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 400)), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("budget", "ranges", "expected"),
    [
        # least 10 + 20, spare 30, room 90 + 180: 10 + 30 * 90 // 270 = 20, 20 + 30 * 180 // 270 = 40
        (60, [(10, 100), (20, 200)], [20, 40]),
        # spare 1 of room 270 rounds down to nothing for both
        (31, [(10, 100), (20, 200)], [10, 20]),
        (300, [(10, 100), (20, 200)], [100, 200]),
        # an image of fixed size takes no part in the division
        (57, [(7, 7), (10, 110)], [7, 50]),
        (7, [(7, 7)], [7]),
    ],
)
def test_divided_by_hand(budget: int, ranges: list[tuple[int, int]], expected: list[int]) -> None:
    assert divide_budget(budget, ranges) == expected


@given(RANGES, st.floats(0, 1))
def test_division_keeps_every_bound(sizes: list[tuple[int, int]], share: float) -> None:
    ranges = [(low, low + more) for low, more in sizes]
    least, most = sum(low for low, _ in ranges), sum(high for _, high in ranges)
    budget = least + int(share * (most - least))
    parts = divide_budget(budget, ranges)
    assert sum(parts) <= budget
    assert sum(parts) > budget - len(ranges)  # rounding loses less than a token an image
    assert all(low <= part <= high for part, (low, high) in zip(parts, ranges, strict=True))


@pytest.mark.parametrize("budget", [-1, 0, 29, 301])
def test_a_budget_outside_the_sums_is_refused(budget: int) -> None:
    with pytest.raises(BudgetError, match="30 to 300 tokens"):
        divide_budget(budget, [(10, 100), (20, 200)])


SMALL = {"preset": "demo", "max_tiles": 12, "halo": 0}


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path) -> dict[str, Engine]:
    return {
        f"{layout}-{stride}": Engine.from_pretrained(
            tiny_checkpoint, layout=layout, overview_stride=stride, **SMALL
        )
        for layout, stride in (("replace", 1), ("refine", 1), ("refine", "auto"), ("crops", "auto"))
    }


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["replace-1", "refine-1", "refine-auto", "crops-auto"]),
    height=st.integers(3, 500),
    width=st.integers(3, 500),
    part=st.floats(0, 1),
    as_share=st.booleans(),
)
def test_budgets_are_never_exceeded(
    engines: dict[str, Engine], name: str, height: int, width: int, part: float, as_share: bool
) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    first = engines[name].encode(pixels, "Where?", budget=1.0)
    rows, cols = first.lod.shape
    # Side 1: a token for every tile, or as many for the glimpse, or the coarsest overview, 4 x 4 to a token.
    least = rows * cols if name.endswith("-1") else -(-rows // 4) * -(-cols // 4)
    tokens = least + int(part * (first.full_tokens - least))
    budget = tokens / first.full_tokens if as_share else tokens
    if as_share and int(budget * first.full_tokens) < least:
        return
    made = engines[name].encode(pixels, "Where?", budget=budget)
    assert least <= made.n_tokens <= made.budget <= tokens
    assert made.full_tokens == 16 * made.lod.numel()
    # Counted anew from the LOD map: side**2 a tile, an overview instead of background where there is one.
    squares, stride = torch.tensor([1, 4, 9, 16]), made.overview_stride
    counted = int(squares[made.lod].sum())
    if stride:
        counted += -(-rows // stride) * -(-cols // stride) - int((made.lod == 0).sum())
        assert made.overview_tokens == -(-rows // stride) * -(-cols // stride)
    assert (stride == 0) == (name == "replace-1" or made.n_tokens == made.full_tokens)
    assert made.n_tokens == counted
    assert made.tokens.shape == made.deepstack.shape[1:]
    assert made.positions.shape == (3, made.n_tokens)


def test_the_plan_fixes_the_count_before_a_tile_is_refined(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plans: list[Plan] = []
    real_plan, real_encode = allocation.plan, TileEncoder.encode

    def plan(*args: object) -> Plan:
        events.append("plan")
        plans.append(real_plan(*args))  # type: ignore[arg-type]
        return plans[-1]

    def encode(self: TileEncoder, *args: object) -> object:
        events.append("encode")
        return real_encode(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(allocation, "plan", plan)
    monkeypatch.setattr(TileEncoder, "encode", encode)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    made = engines["refine-1"].encode(pixels, "Where?", budget=0.5)
    assert events == ["plan", "encode"]
    assert made.n_tokens == plans[0].tokens <= plans[0].budget


# The overview.


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of what is encoded as one ordinary image, in order."""
    sizes: list[tuple[int, ...]] = []
    real = JointGlimpse.encode_pixels

    def encode_pixels(self: JointGlimpse, pixels: torch.Tensor) -> Features:
        sizes.append(tuple(pixels.shape[1:]))
        return real(self, pixels)

    monkeypatch.setattr(JointGlimpse, "encode_pixels", encode_pixels)
    return sizes


IMAGE = np.random.default_rng(5).integers(0, 256, (512, 384, 3), dtype=np.uint8)  # 4 x 3 tiles of `demo`
GLIMPSE = (4 * 32, 3 * 32)


def look(engine: Engine, budget: float, head: bool = False, judge: Judge | None = None) -> Look:
    config = engine._presets.base
    engines = {lod: TorchLodEngine(engine._qwen, config.sides[lod], config.buckets) for lod in Lod}
    weights = TextureHead(engine._qwen.width) if head else None
    pipeline = Pipeline(engine._qwen, config, engines, TileCache(1 << 20, 100.0, "device"), weights)
    query = engine._qwen.query("Where?")
    return pipeline.look(torch.from_numpy(IMAGE).permute(2, 0, 1), query, budget, StageTimer(), judge)


def even(frame: Frame, texture: Texture) -> torch.Tensor:
    return torch.full((frame.grid.rows, frame.grid.cols), 0.5)


@pytest.mark.parametrize(
    ("name", "budget", "scorer", "sizes", "stride"),
    [
        # The glimpse takes 12 tokens, the overview at stride 2 takes 2 * 2, at 3 2 * 1, and 1 at 4.
        ("refine-auto", 24, "glimpse", [GLIMPSE], 1),
        ("refine-auto", 23, "glimpse", [GLIMPSE, (64, 64)], 2),
        ("refine-auto", 23, "head", [(64, 64)], 2),
        ("refine-auto", 23, "judge", [(64, 64)], 2),
        ("refine-auto", 24, "head", [GLIMPSE], 1),
        ("crops-auto", 7, "head", [(64, 32)], 3),
        ("crops-auto", 3, "judge", [(32, 32)], 4),
        ("refine-auto", 192, "glimpse", [GLIMPSE], 0),
        ("refine-auto", 192, "head", [], 0),
        ("refine-1", 12, "head", [GLIMPSE], 1),
        ("replace-1", 40, "head", [GLIMPSE], 0),
    ],
)
def test_only_what_is_needed_of_the_whole_frame_is_encoded(
    engines: dict[str, Engine],
    watched: list[tuple[int, ...]],
    name: str,
    budget: int,
    scorer: str,
    sizes: list[tuple[int, ...]],
    stride: int,
) -> None:
    made = look(engines[name], budget, scorer == "head", even if scorer == "judge" else None)
    assert watched == sizes
    assert made.encoding.overview_stride == stride
    assert (made.prefix is not None) == (stride == 1 and scorer == "glimpse")


def test_the_overview_is_a_small_image_before_the_tiles(engines: dict[str, Engine]) -> None:
    """Stride 3 on 4 x 3 tokens: 2 x 1, so of 128 x 96 pixels every block of 2 x 3 becomes one."""
    engine = engines["refine-auto"]
    made = look(engine, 7).encoding
    assert made.overview_tokens == 2
    qwen, config = engine._qwen, engine._presets.base
    frame = image.frame(torch.from_numpy(IMAGE).permute(2, 0, 1), config, 32, qwen.device)
    small = torch.nn.functional.avg_pool2d(frame.background.float(), (2, 3)).round().to(torch.uint8)
    expected = JointGlimpse(qwen).encode_pixels(small)
    assert torch.equal(made.tokens[:2], expected.tokens[0])
    assert torch.equal(made.deepstack[:, :2], expected.deepstack[:, 0])
    # The frame is 16 x 12 tokens of LOD high: h = (i + 1/2) * 16/2 - 1/2, w = 1/2 * 12 - 1/2.
    assert made.positions[:, :2].tolist() == [[0, 0], [3.5, 11.5], [5.5, 5.5]]


def test_scores_do_not_depend_on_the_overview(engines: dict[str, Engine]) -> None:
    coarse, fine = (look(engines[name], 20).encoding for name in ("refine-auto", "refine-1"))
    assert (coarse.overview_stride, fine.overview_stride) == (2, 1)
    assert torch.equal(coarse.relevance, fine.relevance)
    assert int(coarse.lod.sum()) > int(fine.lod.sum())


@pytest.mark.parametrize("layout", ["refine", "crops"])
def test_an_answer_with_an_overview_from_an_image_and_from_its_encoding(
    tiny_checkpoint: Path, layout: str
) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, layout=layout, max_new_tokens=4, **SMALL)
    made = engine.encode(IMAGE, "Where?", budget=5)
    assert (made.overview_stride, made.n_tokens) == (3, 2)  # 3 more tokens refine nothing
    answer = engine.ask(IMAGE, "Where?", budget=5)
    again = engine.ask(made, "Where?", budget=5)
    assert answer.text == again.text
    assert answer.prompt_tokens == again.prompt_tokens
    both = engine.chat(
        [{"role": "user", "content": [{"image": made}, {"image": IMAGE}, {"text": "Where?"}]}], budget=9
    )
    assert [e.n_tokens <= n for e, n in zip(both.encodings, (2, 7), strict=True)] == [True, True]


def test_engines_must_have_the_halo_of_the_configuration(engines: dict[str, Engine]) -> None:
    engine = engines["refine-1"]
    made = {lod: TorchLodEngine(engine._qwen, 1 + lod, (1,), halo=1) for lod in Lod}
    with pytest.raises(AssertionError, match="another halo"):
        Pipeline(engine._qwen, engine._presets.base, made, TileCache(0, 1.0, "device"), None)
