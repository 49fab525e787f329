"""First looks: by a graph the same as launched one by one, for every image of a shape."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arrcoc import Engine, prefix_graph, shape_graphs
from arrcoc.config import build, load
from arrcoc.glimpse import GlimpseScorer
from arrcoc.lod.joint import JointTower, joint_tower
from arrcoc.prefix_graph import FirstLooks
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Features, Grid

CONFIG = load("demo")
FLOAT8 = build(CONFIG.model_dump() | {"prefix_dtype": "float8"})
SHALLOW = build(CONFIG.model_dump() | {"probe_depth": (0.01,)})
"""Layer 0 alone is probed, so that DeepStack planes are added in the remaining layers too."""
WHERE = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 4, 8, 0, 4, 8]])


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint: Path) -> QwenVL:
    return Engine.from_pretrained(tiny_checkpoint, "demo", "cpu")._qwen


def features_of(qwen: QwenVL, seed: int, count: int = 6) -> Features:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(3, 1, count, qwen.width, generator=generator).to(qwen.device, qwen.dtype)
    return Features(made[0], made[1:])


def look(looks: FirstLooks, features: Features, where: Tensor = WHERE, extent: float = 12.0) -> Prefix:
    return looks.look(*looks.prompt, features, where, extent)


def held(prefix: Prefix) -> list[Tensor]:
    """All that a prefix keeps, on the CPU."""
    assert prefix.probe is not None
    keys = prefix.fork(prefix.length, layers=prefix.depth).block(prefix.length)
    found = [keys, prefix.positions, prefix._hidden, prefix.probe.generic, *prefix.probe.excluded.values()]
    return [tensor.cpu() for tensor in found if tensor is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Noted:
    """Stands for a graph: a replay computes anew into the same memory."""

    def __init__(self, run: Callable[[], tuple[Tensor, ...]]) -> None:
        self.run, self.found = run, run()

    def replay(self) -> None:
        for mine, new in zip(self.found, self.run(), strict=True):
            mine.copy_(new)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[FirstLooks], list[Noted]]:
    """Makes first looks pretend to capture; gives what they captured."""

    def pretend(looks: FirstLooks) -> list[Noted]:
        made: list[Noted] = []

        def capture(run: Callable[[], tuple[Tensor, ...]], *_: Any) -> Any:
            made.append(Noted(run))
            return made[-1], made[-1].found

        monkeypatch.setattr(shape_graphs, "captured", capture)
        for graphs in (looks._graphs, looks._rests):
            graphs.captures, graphs._pool, graphs._first = True, None, None
            graphs._turn = threading.Lock  # type: ignore[method-assign, assignment]
            graphs._used = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
        return made

    return pretend


@pytest.mark.parametrize("config", [CONFIG, FLOAT8], ids=["whole", "float8"])
def test_every_image_of_a_shape_gets_its_own_prefix(qwen, pretended, config) -> None:
    looks, images = FirstLooks(qwen, config), [features_of(qwen, seed) for seed in range(4)]
    expected = [held(look(FirstLooks(qwen, config), image)) for image in images]
    made = pretended(looks)
    prefixes = [look(looks, image) for image in images]
    assert len(made) == 1
    assert looks.describe().startswith("CUDA graphs (1 captured)")
    assert all(same(held(prefix), want) for prefix, want in zip(prefixes, expected, strict=True))
    assert all(prefix.features is image for prefix, image in zip(prefixes, images, strict=True))
    assert prefixes[3].nbytes > 0


def completed(prefix: Prefix, qwen: QwenVL) -> Tensor:
    """Keys and values of all layers, on the CPU."""
    prefix.complete(qwen)
    return prefix.fork(prefix.length).block(prefix.length).cpu()


@pytest.mark.parametrize("config", [CONFIG, FLOAT8, SHALLOW], ids=["whole", "float8", "shallow"])
def test_prefixes_are_completed_by_a_graph_too(qwen, pretended, config) -> None:
    looks, images = FirstLooks(qwen, config), [features_of(qwen, seed) for seed in range(4)]
    expected = [completed(look(FirstLooks(qwen, config), image), qwen) for image in images]
    made = pretended(looks)
    prefixes = [look(looks, image) for image in images]
    assert len(made) == 1
    for prefix in prefixes:
        prefix.complete(qwen)
    found = [completed(prefix, qwen) for prefix in prefixes]  # none has become another's
    assert len(made) == 2, "one graph for the remaining layers"
    assert all(torch.equal(have, want) for have, want in zip(found, expected, strict=True))
    completed(prefixes[0], qwen)
    assert len(made) == 2


def test_other_positions_extents_and_counts_are_other_shapes(qwen, pretended) -> None:
    looks = FirstLooks(qwen, CONFIG)
    made = pretended(looks)
    cases = [(6, WHERE, 12.0), (6, WHERE + 1, 12.0), (6, WHERE, 16.0), (4, WHERE[:, :4], 12.0)]
    for count, where, extent in cases * 2:
        image = features_of(qwen, 1, count)
        want = held(look(FirstLooks(qwen, CONFIG), image, where, extent))
        assert same(held(look(looks, image, where, extent)), want)
    assert len(made) == len(cases)


def test_a_large_glimpse_is_launched_directly(qwen, pretended, monkeypatch) -> None:
    monkeypatch.setattr(prefix_graph, "MOST_TOKENS", 5)
    looks = FirstLooks(qwen, CONFIG)
    made = pretended(looks)
    for _ in range(3):
        look(looks, features_of(qwen, 0)).complete(qwen)
    assert made == []


def test_in_float8_the_generic_prompt_meets_the_keys_that_questions_will_meet(qwen) -> None:
    """In layer 0, whose rows do not depend on what was narrowed before."""
    config = SHALLOW.updated({"prefix_dtype": "float8"})
    looks, image = FirstLooks(qwen, config), features_of(qwen, 3)
    prefix = look(looks, image)
    assert prefix.probe is not None
    scorer = GlimpseScorer(qwen, image, WHERE, 12.0, Grid(2, 3, 128), config, prefix)
    asked = scorer._attention(prefix, looks.prompt[1])
    torch.testing.assert_close(asked, prefix.probe.generic, atol=1e-6, rtol=1e-5)


class MeanTower:
    """Stands for the fused tower: an image's features are the mean of its pixels."""

    weights = SimpleNamespace(patch_bias=torch.zeros(1), token_px=32, merge=2, head_dim=64)

    def geometry(self, rows: int, cols: int) -> Any:
        return SimpleNamespace(start=torch.zeros(1), count=rows * cols)

    def forward(self, pixels: Tensor, shape: Any, blocks: Any) -> Features:
        tokens = pixels.float().mean().expand(1, shape.count, 2).clone()
        return Features(tokens, 2 * tokens[None])


def test_every_joint_glimpse_of_a_shape_gets_its_own_features(pretended) -> None:
    pytest.importorskip("triton")
    tower = JointTower(MeanTower())  # type: ignore[arg-type]
    made = pretended(SimpleNamespace(_graphs=tower._graphs, _rests=tower._graphs))
    values = (1, 2, 3, 4)
    found = [tower.encode(torch.full((1, 3, 64, 96), value, dtype=torch.uint8)) for value in values]
    assert len(made) == 1
    for value, features in zip(values, found, strict=True):
        assert torch.equal(features.tokens, torch.full((1, 6, 2), float(value)))
        assert torch.equal(features.deepstack, torch.full((1, 1, 6, 2), 2.0 * value))


# On a GPU.


@pytest.fixture(scope="module")
def on_gpu(tiny_checkpoint: Path) -> QwenVL:
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda", dtype="bfloat16")._qwen


@pytest.mark.gpu
@pytest.mark.parametrize("count", [6, 300])
@pytest.mark.parametrize("config", [CONFIG, FLOAT8], ids=["whole", "float8"])
def test_a_graph_gives_what_launching_gives_bit_for_bit(on_gpu, config, count) -> None:
    looks, images = FirstLooks(on_gpu, config), [features_of(on_gpu, seed, count) for seed in range(4)]
    where = torch.arange(count).float().expand(2, -1).contiguous()
    expected = [held(look(FirstLooks(on_gpu, config), image, where)) for image in images]
    whole = [completed(look(FirstLooks(on_gpu, config), image, where), on_gpu) for image in images]
    prefixes = [look(looks, image, where) for image in images]
    assert looks.describe().startswith("CUDA graphs (1 captured)")
    assert all(same(held(prefix), want) for prefix, want in zip(prefixes, expected, strict=True))
    for prefix, want in zip(prefixes, whole, strict=True):
        assert torch.equal(completed(prefix, on_gpu), want)
    captured = "CUDA graphs (1 captured)"
    assert looks.describe() == f"{captured}, the remaining layers: {captured}"


def on_streams(count: int, run: Callable[[int], None]) -> None:
    """Run in threads, each on a stream of its own; raises what a thread raised."""

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            run(number)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


@pytest.mark.gpu
def test_threads_on_streams_share_first_looks(on_gpu) -> None:
    looks, images = FirstLooks(on_gpu, CONFIG), [features_of(on_gpu, seed) for seed in range(3)]
    expected = [held(look(FirstLooks(on_gpu, CONFIG), image)) for image in images]
    whole = [completed(look(FirstLooks(on_gpu, CONFIG), image), on_gpu) for image in images]
    wrong: list[int] = []

    def run(number: int) -> None:
        for turn in range(30):
            which = (number + turn) % 3
            prefix = look(looks, images[which])
            if not same(held(prefix), expected[which]):
                wrong.append(which)
            if not torch.equal(completed(prefix, on_gpu), whole[which]):
                wrong.append(which)

    on_streams(3, run)
    assert wrong == []
    assert looks.describe().startswith("CUDA graphs (1 captured)")


@pytest.mark.gpu
def test_what_one_stream_made_another_reads_when_it_is_there(on_gpu) -> None:
    """Of prefixes that are dropped while work that reads them is still queued, too."""
    looks = FirstLooks(on_gpu, CONFIG)
    images = [features_of(on_gpu, seed, 6) for seed in range(2)]
    expected = [held(look(FirstLooks(on_gpu, CONFIG), image)) for image in images]
    maker, reader = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    found = []
    for turn in range(40):
        with torch.cuda.stream(maker):
            torch.cuda._sleep(200_000)
            prefix = look(looks, images[turn % 2])
        with torch.cuda.stream(reader):
            probe = prefix.probe
            assert probe is not None
            torch.cuda._sleep(200_000)
            found.append((probe.generic.clone(), prefix.features.tokens.clone()))
            del prefix, probe
    torch.cuda.synchronize()
    for turn, (generic, tokens) in enumerate(found):
        assert torch.equal(generic.cpu(), expected[turn % 2][3])
        assert torch.equal(tokens, images[turn % 2].tokens)


@pytest.fixture(scope="module")
def tower(on_gpu: QwenVL) -> JointTower:
    made = joint_tower(on_gpu)
    assert made is not None, "Triton is there where a GPU is"
    return made


def picture(seed: int, rows: int = 64, cols: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, rows, cols), dtype=torch.uint8, generator=generator).cuda()


@torch.inference_mode()
def launched(tower: JointTower, pixels: Tensor) -> tuple[Tensor, ...]:
    return tower._work(pixels).compute()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 96), (32, 32), (640, 512)])
def test_a_joint_glimpse_by_a_graph_is_the_same_bit_for_bit(tower, size) -> None:
    for seed in range(4):
        pixels = picture(seed, *size)
        want = launched(tower, pixels)
        have = tower.encode(pixels)
        assert torch.equal(have.tokens, want[0])
        assert torch.equal(have.deepstack, want[1])
    assert tower.describe().startswith("CUDA graphs (")


@pytest.mark.gpu
def test_threads_on_streams_share_joint_glimpses(on_gpu) -> None:
    tower = joint_tower(on_gpu)
    assert tower is not None
    pictures = [picture(seed) for seed in range(3)]
    expected = [launched(tower, pixels)[0] for pixels in pictures]
    wrong: list[int] = []

    def run(number: int) -> None:
        for turn in range(30):
            which = (number + turn) % 3
            if not torch.equal(tower.encode(pictures[which]).tokens, expected[which]):
                wrong.append(which)

    on_streams(3, run)
    assert wrong == []
    assert tower.describe() == "CUDA graphs (1 captured)"
