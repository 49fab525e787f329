"""Fused and captured LOD engines: which kind serves, shared memory, batches, float8's gate, and numerics.

Kernels run in Triton's interpreter, in a process of its own; what needs a GPU is marked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from arrcoc import Engine, image
from arrcoc.cache import TileCache
from arrcoc.config import load as load_config
from arrcoc.encoder import TileEncoder
from arrcoc.errors import EngineBuildError
from arrcoc.lod import TorchEngines, TorchLodEngine, torch_engines
from arrcoc.qwen import QwenVL, load
from arrcoc.records import Features, Lod
from arrcoc.vision import VisionWeights

pytest.importorskip("triton")

from arrcoc.lod import float8
from arrcoc.lod.fused_tower import FusedTower
from arrcoc.lod.fused_weights import Dense, Float8Dense
from arrcoc.lod.graphed import MOST_PATCHES, GraphedLodEngine, Workspace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint: Path) -> QwenVL:
    return load(tiny_checkpoint, CPU, torch.float32)


def tiles(count: int, edge: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(count)
    made = torch.randint(0, 256, (count, 3, edge, edge), dtype=torch.uint8, generator=generator)
    return made.to(device)


class MeanTower:
    """Stands in for the fused tower: each token is the mean of its tile, a plane its double."""

    weights = SimpleNamespace(merge=2, token_px=32)

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.running = 0

    def geometry(self, rows: int, cols: int) -> Any:
        return SimpleNamespace(count=rows * cols)

    def shapes(self, batch: int, shape: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
        images = (batch, shape.count, 1)
        return [(images, torch.float32), ((1, *images), torch.float32)]

    def forward(self, pixels: Tensor, shape: Any, blocks: Any, out: Features) -> Features:
        self.running += 1
        assert self.running == 1, "one run at a time"
        self.sizes.append(len(pixels))
        out.tokens.copy_(pixels.float().mean((1, 2, 3))[:, None, None].expand_as(out.tokens))
        out.deepstack.copy_(2 * out.tokens[None])
        self.running -= 1
        return out


def mean_engine(tower: Any, side: int = 1, halo: int = 0, buckets: Any = (1, 2, 4)) -> GraphedLodEngine:
    return GraphedLodEngine(tower, Workspace(CPU), side, halo, buckets, None, "test", "f")


@pytest.mark.parametrize(("side", "halo", "count"), [(1, 0, 1), (2, 0, 3), (1, 1, 7)])
def test_every_tile_gets_its_own_features(side: int, halo: int, count: int) -> None:
    engine, pixels = mean_engine(MeanTower(), side, halo), tiles(count, (side + 2 * halo) * 32)
    found = engine.encode(pixels)
    means = pixels.float().mean((1, 2, 3))[:, None, None].expand(count, side * side, 1)
    torch.testing.assert_close(found.tokens, means)
    torch.testing.assert_close(found.deepstack, 2 * means[None])


def test_features_are_the_callers_own() -> None:
    engine = mean_engine(MeanTower())
    first = engine.encode(tiles(4, 32))
    kept = first.tokens.clone(), first.deepstack.clone()
    engine.encode(255 - tiles(4, 32))
    assert torch.equal(first.tokens, kept[0])
    assert torch.equal(first.deepstack, kept[1])


def test_a_bucket_is_made_once_and_large_ones_are_left_out() -> None:
    tower = MeanTower()
    engine = mean_engine(tower)
    for _ in range(2):
        engine.encode(tiles(3, 32))
    assert tower.sizes == [4, 4, 4]  # to compile, then each call
    patches = 4 * 64**2
    assert mean_engine(tower, 64, 0, (1, 2, 4, 8)).buckets == (1, 2, 4)
    assert 4 * patches == MOST_PATCHES
    assert mean_engine(tower, 256, 0, (2, 4)).buckets == (2,), "one is always left"


def test_small_batches_run_in_memory_of_the_engines_own() -> None:
    """Side 1 has four patches a tile; larger batches take the shared memory."""
    tower, room = MeanTower(), Workspace(CPU)
    engine = GraphedLodEngine(tower, room, 1, 0, (1, 2, 4), None, "test", "f", 11)  # type: ignore[arg-type]
    assert engine.apart == 2
    small = engine.encode(tiles(2, 32))
    assert room._buffer.numel() == 0
    large = engine.encode(tiles(4, 32))
    assert room._buffer.numel() > 0
    for found, count in ((small, 2), (large, 4)):
        means = tiles(count, 32).float().mean((1, 2, 3))
        torch.testing.assert_close(found.tokens.flatten(), means)
    assert mean_engine(tower).apart == 0


def test_engines_with_memory_of_their_own_do_not_wait_for_one_another() -> None:
    """And those that share it do: a call on another thread gets through while one engine is in its turn."""
    room = Workspace(CPU)

    def made(alone: int) -> GraphedLodEngine:
        return GraphedLodEngine(MeanTower(), room, 1, 0, (1,), None, "test", "f", alone)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        with room.turn():
            assert len(pool.submit(made(4).encode, tiles(1, 32)).result(30).tokens) == 1
            waiting = pool.submit(made(0).encode, tiles(1, 32))
            assert not wait([waiting], 0.2).done
        assert len(waiting.result(30).tokens) == 1


@pytest.mark.parametrize(("streams", "apart"), [("one", 0), ("auto", 2), ("each", 4)])
def test_the_configuration_says_which_batches_overlap(
    streams: Any, apart: int, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side 1 has four patches a tile, of which `auto` here takes eleven."""
    monkeypatch.setattr("arrcoc.lod.graphed.ALONE_PATCHES", 11)
    monkeypatch.setattr(torch_engines, "_obstacle", lambda *_: "")
    monkeypatch.setattr(TorchEngines, "_arranged", lambda *_: (MeanTower(), Workspace(CPU)))
    options = {"lod_streams": streams, "sides": (1, 2, 3, 4), "buckets": (1, 2, 4)}
    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", halo=0, **options)
    (found,) = [made.apart for (side, *_), made in engine._viewer._lod_engines.items() if side == 1]
    assert found == apart


def test_what_is_encoded_ahead_makes_no_bucket() -> None:
    tower = MeanTower()
    engine = mean_engine(tower)
    engine.encode(tiles(1, 32))
    engine.encode(tiles(2, 32))
    tower.sizes.clear()
    found = engine.encode_ahead(tiles(4, 32))
    assert tower.sizes == [2, 2], "4 was not met before"
    assert torch.equal(found.tokens, engine.encode(tiles(4, 32)).tokens)


def test_threads_take_turns() -> None:
    engine = mean_engine(MeanTower())
    wrong: list[int] = []

    def run(value: int) -> None:
        pixels = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
        for _ in range(20):
            if not torch.equal(engine.encode(pixels).tokens.flatten(), torch.tensor([value, value]).float()):
                wrong.append(value)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))  # raises what a thread raised
    assert wrong == []


def test_workspace_hands_out_aligned_memory_again_and_again() -> None:
    room = Workspace(CPU)
    small = room.take([((3,), torch.uint8), ((5,), torch.float32)])
    assert [t.shape for t in small] == [(3,), (5,)]
    assert (small[1].data_ptr() - small[0].data_ptr()) % 256 == 0
    again = room.take([((2,), torch.uint8)])
    assert again[0].data_ptr() == small[0].data_ptr()
    large = room.take([((10_000,), torch.float32)])
    small[1].fill_(1)
    large[0].zero_()
    assert small[1].tolist() == [1] * 5, "an old buffer lives on"


def test_a_refused_capture_is_logged_once_and_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = Workspace(CPU)
    room.captures, room._pool = True, None

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("arrcoc.lod.graphed.captured", refuse)
    run = lambda: None  # noqa: E731
    assert room.capture(run) is run
    assert room.capture(run) is run
    assert [r.message for r in caplog.records] == [
        "LOD engines run without CUDA graphs: operation not permitted"
    ]
    engine = GraphedLodEngine(MeanTower(), room, 1, 0, (1,), None, "torch fused", "f")  # type: ignore[arg-type]
    assert engine.backend == "torch fused, no CUDA graphs: operation not permitted"


def test_too_little_memory_for_one_bucket_is_no_failure_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    room, errors = Workspace(CPU), [torch.OutOfMemoryError("out of memory"), RuntimeError()]
    room.captures, room._pool = True, None

    def refuse(*_: Any) -> Any:
        raise errors.pop(0)

    monkeypatch.setattr("arrcoc.lod.graphed.captured", refuse)
    run = lambda: None  # noqa: E731
    assert (room.capture(run), room.failure) == (run, "")
    assert (room.capture(run), room.failure) == (run, "RuntimeError"), "which says nothing more"
    assert errors == []


def test_the_cpu_is_served_eagerly(qwen: QwenVL) -> None:
    engines = TorchEngines(qwen)
    assert engines.reason == ""
    made, eager = engines.engine(1, (1, 2), 0), TorchLodEngine(qwen, 1, (1, 2))
    assert isinstance(made, TorchLodEngine)
    assert (made.backend, made.fingerprint) == ("torch eager float32", eager.fingerprint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "graphed"}, r"graphed LOD engines here \(device cpu\)\. Allowed: a CUDA device, Triton"),
        ({"precision": "float8"}, r"graphed LOD engines here \(device cpu\)"),
        ({"kind": "eager", "precision": "float8"}, r"with lod_engine='eager'\. Allowed: lod_engine 'auto'"),
    ],
)
def test_what_is_asked_for_by_name_is_refused_where_it_cannot_run(
    options: dict[str, Any], message: str, qwen: QwenVL
) -> None:
    with pytest.raises(EngineBuildError, match=message):
        TorchEngines(qwen, **options)


def test_the_engine_passes_its_configuration_on(tiny_checkpoint: Path) -> None:
    for options in ({"lod_engine": "graphed"}, {"lod_precision": "float8"}):
        with pytest.raises(EngineBuildError, match="device cpu"):
            Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", **options)


class BrokenTower(MeanTower):
    def forward(self, *_: Any) -> Features:
        raise ValueError("PassManager::run failed\nat line 3")


def test_kernels_that_do_not_compile_leave_eager_engines(
    qwen: QwenVL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_cuda: Any = SimpleNamespace(
        vision=qwen.vision, dtype=torch.float32, fingerprint="f", device=SimpleNamespace(type="cuda")
    )
    monkeypatch.setattr(torch_engines, "_obstacle", lambda *_: "")
    monkeypatch.setattr(TorchEngines, "_arranged", lambda *_: (BrokenTower(), Workspace(CPU)))
    plain_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **rest: plain_zeros(*shape, **rest))
    engines = TorchEngines(on_cuda)
    backends = [engines.engine(side, (1,), 0).backend for side in (1, 2)]
    assert backends == ["torch eager float32 (ValueError: PassManager::run failed)"] * 2
    assert len(caplog.records) == 1
    with pytest.raises(EngineBuildError, match="PassManager"):
        TorchEngines(on_cuda, kind="graphed").engine(1, (1,), 0)


def test_warming_up_runs_every_bucket_largest_first(tiny_checkpoint: Path) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", buckets=[1, 2])
    steps: list[tuple[str, int, int]] = []
    under_way: set[int] = set()

    def progress(*step: Any) -> None:
        steps.append(step)
        under_way.add(engine._ahead._requests)

    engine.warm_up(progress)
    assert under_way == {1}, "nothing is encoded ahead meanwhile"
    names = [f"side {side}, {size} tiles" for side in (1, 2, 3, 4) for size in (2, 1)]
    assert steps == [*((name, done, 8) for done, name in enumerate(names)), ("warm", 8, 8)]


# Float8.


def test_float8_without_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    layer = Dense(torch.zeros(16, 16), torch.zeros(16))
    with pytest.raises(EngineBuildError, match=r"pip install 'arrcoc\[quantized\]'"):
        float8.quantized(layer)


class Constant:
    """A tower that gives tokens of one value."""

    weights = SimpleNamespace(token_px=32)

    def __init__(self, value: float) -> None:
        self.value = value

    def geometry(self, rows: int, cols: int) -> None:
        return None

    def forward(self, *_: Any) -> Features:
        return Features(torch.full((2, 1, 4), self.value), torch.ones(1, 2, 1, 4))


def test_float8_is_refused_with_its_figure() -> None:
    def check(value: float, limit: float) -> float:
        return float8.check_error(Constant(value), Constant(1.0), tiles(2, 32), limit)  # type: ignore[arg-type]

    assert check(1.03, 0.05) == pytest.approx(0.03, abs=1e-4)
    with pytest.raises(
        EngineBuildError, match=r"relative error of 0\.0600 .*at most 0\.05 \(lod_error_limit\)"
    ):
        check(1.06, 0.05)
    with pytest.raises(EngineBuildError, match="nan"):
        check(float("nan"), 0.05)


def test_the_worst_plane_counts() -> None:
    ones, planes = torch.ones(1, 1, 4), torch.ones(2, 1, 1, 4)
    off = planes.clone()
    off[1] *= 1.5
    assert float8.relative_error(Features(ones, off), Features(ones, planes)) == pytest.approx(0.5)


def test_only_the_named_layers_are_quantised_each_output_with_its_scale() -> None:
    pytest.importorskip("torchao")
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 33)[:, None]
    layer = Dense(weight, torch.zeros(32))
    convert = float8.converter(("fc1", "fc2"), {("fc2", 3): 112.0})
    assert convert("qkv", 3, layer) is layer
    dynamic, fixed = convert("fc1", 3, layer), convert("fc2", 3, layer)
    assert isinstance(dynamic, Float8Dense)
    assert isinstance(fixed, Float8Dense)
    assert (dynamic.step, fixed.step) == (None, 1.0)  # four times 112 is e4m3's largest, 448
    for made in (dynamic, fixed):
        back = made.weight.float() * made.scale.view(-1, 1)
        assert ((back - weight).abs().amax(1) <= weight.abs().amax(1) / 16).all()  # half of 2**-3
    with pytest.raises(EngineBuildError, match=r"\(32, 12\) in float8"):
        float8.quantized(Dense(torch.zeros(32, 12), torch.zeros(32)))


def test_peaks_are_of_what_comes_in(qwen: QwenVL) -> None:
    found = float8.input_peaks(qwen.vision, tiles(2, 64))
    count = len(qwen.vision.blocks)
    assert set(found) == {(kind, number) for kind in ("proj", "fc2") for number in range(count)}
    assert all(peak > 0 for peak in found.values())
    block: Any = qwen.vision.blocks[0]
    assert not block.proj._forward_pre_hooks, "nothing is left behind"


def test_sample_tiles_are_a_photograph(qwen: QwenVL) -> None:
    made = float8.sample_tiles(qwen)
    assert (made.dtype, made.shape) == (torch.uint8, (16, 3, 128, 128))
    assert made.float().std() > 20


# Numerics, in the interpreter.


def few_blocks(weights: VisionWeights) -> VisionWeights:
    """The first two blocks, at unit scale: what is drawn with std 0.02 barely exercises attention."""
    generator = torch.Generator().manual_seed(0)
    kept = dataclasses.replace(weights, blocks=weights.blocks[:2], deepstack={0: weights.deepstack[0]})
    for block in kept.blocks:
        modules: Any = [block.norm1, block.norm2, block.qkv, block.proj, *block.mlp.children()]
        for parameter in (p for module in modules for p in module.parameters()):
            fan = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.data.normal_(std=fan**-0.5, generator=generator)
    return kept


def interpreted() -> None:
    """Print the largest relative error of each way to run the tower against the eager one."""
    from arrcoc.lod.attention import Blocks
    from arrcoc.lod.gemm import Config, scaled_linear
    from arrcoc.lod.kernels import quantize_rows
    from arrcoc.lod.tower import StaticTower, geometry
    from arrcoc.vision import patchify

    folder, side, found = sys.argv[1], 3, {}  # 36 patches: two whole blocks of keys, and one of four
    weights = few_blocks(load(folder, CPU, torch.float32).vision)
    pixels = tiles(1, side * 32)
    want = StaticTower(weights).encode(
        patchify(pixels, weights, torch.float32), geometry(weights, side, side)
    )
    for epilogue, blocks in ((True, Blocks(32, 16, 4, 1)), (False, None)):
        tower = FusedTower(weights, epilogue=epilogue)
        have = tower.forward(pixels, tower.geometry(side, side), blocks)
        found[f"tower {epilogue}"] = float8.relative_error(have, want)
    random = torch.Generator().manual_seed(1)
    x, w = torch.randn(20, 64, generator=random), torch.randn(48, 64, generator=random) / 8
    bias = torch.randn(48, generator=random)
    (q, scale), (wq, wscale) = quantize_rows(x), quantize_rows(w)
    exact = torch.nn.functional.gelu((q.float() * scale) @ (wq.float() * wscale).T + bias, approximate="tanh")
    cut = Config(16, 32, 32, 4, 1, 1)
    got = scaled_linear(q, scale, wq, wscale.T, bias, gelu=True, config=cut)
    found["product"] = float((got - exact).norm() / exact.norm())
    rough = scaled_linear(q, scale, wq, wscale.T, bias, gelu=True, step=0.02, config=cut)
    found["e4m3"] = float((rough.float() * 0.02 - exact).norm() / exact.norm())
    print(json.dumps(found))


def test_the_fused_tower_computes_what_the_eager_one_does(tiny_checkpoint: Path) -> None:
    """In fp32; a flipped sign of the rotary embedding is off by more than a hundredth."""
    code = "import sys; sys.path.insert(0, sys.argv[2]); import test_lod_engines as t; t.interpreted()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", code, str(tiny_checkpoint), str(Path(__file__).parent)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4
    assert errors.pop("e4m3") < 0.07  # the interpreter rounds towards zero
    assert max(errors.values()) < 2e-6, errors


# The benchmark.


def test_the_floor_counts_what_the_tower_multiplies(qwen: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from arrcoc.lod.tower import StaticTower, geometry
    from arrcoc.vision import patchify

    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import lod_engines_tower

    side, count, weights = 2, 3, qwen.vision
    patches = patchify(tiles(count, side * 32), weights, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        StaticTower(weights).encode(patches, geometry(weights, side, side))
    spared = 2 * patches[..., 0].numel() * weights.patch_weight.numel() // 2  # the second, equal frame
    found = lod_engines_tower.tower_flops(weights, (side * weights.merge) ** 2, count)
    assert found == counter.get_total_flops() - spared


def test_what_was_not_compiled_is_said_and_shares_are_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import lod_engines_picture

    times = {"floor_ms": 10.0, "eager_ms": 40.0, "fused_ms": 16.0, "float8_ms": 12.5}
    shape = {
        "peak_tflops": 780.0,
        "sustained_tflops": 650.0,
        "mix": {"cases": [times | {"tokens": n, "tiles": 2} for n in (400, 64)], "whole": times},
        "all_high": times | {"tokens": 400, "tiles": 9},
        "compiled": {"64": 20.0, "compile_s": {"64": 9.0}, "at_once": 1},
    }
    about = {"command": "c", "date": "d", "device": "g", "dtype": "bfloat16", "repeats": 7}
    result = about | {"versions": {"torch": "2"}, "shapes": {"8b": shape}}
    lines = lod_engines_picture.mix_table(result).splitlines()
    rest = "16.0 (62%) | 12.5 (80%) | 10.0 |"
    assert lines[2] == f"| 2 x 400 | 40.0 (25%) | not measured | {rest}"
    assert lines[3] == f"| 2 x 64 | 40.0 (25%) | 20.0 (50%) | {rest}"
    assert lines[4] == f"| the mix | 40.0 (25%) | not measured | {rest}", "a sum only of all of them"
    assert "75% fused and 96% in float8" in lines[-1]
    assert "processes of its own" in lines[-3]
    assert len(lod_engines_picture.draw(result).axes) == 3


COMPILED = """
import json, pathlib, sys
side, folder = sys.argv[2], pathlib.Path(sys.argv[5])
if side == "3":
    raise SystemExit("out of registers")
(folder / f"{side}.json").write_text(json.dumps({"compile_s": 2.5}))
sys.stdin.readline()
print("noise")
print(json.dumps({"ms": float(sys.argv[3])}))
"""


def test_compiled_shapes_are_timed_one_by_one_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import lod_engines_compiled

    (tmp_path / "child.py").write_text(COMPILED)
    monkeypatch.setattr(lod_engines_compiled, "__file__", str(tmp_path / "child.py"))
    compiling = lod_engines_compiled.Compiling("8b", ((2, 7), (3, 1), (4, 9)), 5)
    compiling.wait()
    found = compiling.times()
    compiling.close()
    assert (found["4"], found["16"], found["compile_s"]) == (7.0, 9.0, {"4": 2.5, "16": 2.5})
    assert found["failed"] == {"9": "out of registers"}


def test_overlap_compares_every_run_and_tables_say_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import lod_engines_overlap
    import lod_engines_picture

    times = iter([1.0] * 100)

    def timed(run: Callable[[], object], *_: int) -> float:
        run()
        return next(times)

    monkeypatch.setattr(lod_engines_overlap, "timed", timed)
    same, calls = Features(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 2)), iter(range(100))
    off = Features(torch.ones(1, 1, 2), same.deepstack)
    right = lod_engines_overlap._compared(lambda: [same], lambda: [same])
    assert (right["bit_equal"], right["one_over_each"]) == (True, 1.0)
    wrong = lod_engines_overlap._compared(lambda: [same], lambda: [off if next(calls) == 9 else same])
    assert not wrong["bit_equal"]
    case = right | {"case": "few tiles", "way": "fused", "tiles": {"16": 2}, "one_mib": 10, "each_mib": 1510}
    about = {"command": "c", "date": "d", "device": "g", "dtype": "bfloat16", "repeats": 7}
    peaks = {"peak_tflops": 780.0, "sustained_tflops": 650.0}
    whole = {"mix": {"whole": {"floor_ms": 1.0, "fused_ms": 2.0, "float8_ms": 2.0}}}
    result = about | {
        "versions": {"torch": "2"},
        "shapes": {"8b": peaks | whole | {"overlap": {"cases": [case]}}},
    }
    lines = lod_engines_picture.overlap_table(result).splitlines()
    assert lines[2] == "| Qwen3-VL-8B | 2 x 16 | fused | 1.00 | 1.00 | 1.00 | 1,500 MiB |"
    assert "is equal bit for bit" in lines[4]
    assert lod_engines_picture.overlap_table({"shapes": {"8b": {}}}) == "Not measured yet.\n"


@pytest.mark.parametrize(("count", "own"), [(64, True), (144, True), (256, False), (784, False)])
def test_attention_is_the_faster_one(count: int, own: bool) -> None:
    from arrcoc.lod.attention import fastest_blocks

    assert (fastest_blocks(count, 72) is not None) == own
    assert fastest_blocks(count, 256) is None


# On a GPU.


@pytest.fixture(scope="module")
def bundled() -> QwenVL:
    from arrcoc.demo.bundled import bundled_checkpoint

    return load(bundled_checkpoint()[0], torch.device("cuda"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "halo"), [(1, 0), (4, 0), (2, 1), (12, 0)])
def test_graphs_encode_what_eager_engines_do(side: int, halo: int, bundled: QwenVL) -> None:
    made = TorchEngines(bundled).engine(side, (1, 2, 4), halo)
    assert made.backend == "torch fused bfloat16, CUDA graphs"
    pixels = tiles(7, (side + 2 * halo) * 32, "cuda")
    want = TorchLodEngine(bundled, side, (1, 2, 4), halo)
    assert made.fingerprint != want.fingerprint
    first, again = made.encode(pixels), made.encode(pixels)
    assert float8.relative_error(first, want.encode(pixels)) < 0.02
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.deepstack, again.deepstack)
    part = made.encode(pixels[:3])  # in the same bucket as the first four, another tile behind them
    assert torch.equal(part.tokens, first.tokens[:3])


@pytest.mark.gpu
def test_float8_keeps_within_its_limit(bundled: QwenVL) -> None:
    pytest.importorskip("torchao")
    made = TorchEngines(bundled, precision="float8").engine(4, (1, 2, 4, 16), 0)
    assert made.backend == "torch fused float8, CUDA graphs"
    pixels = float8.sample_tiles(bundled)
    want = TorchEngines(bundled).engine(4, (16,), 0)
    assert 1e-3 < float8.relative_error(made.encode(pixels), want.encode(pixels)) < 0.05
    assert made.fingerprint != want.fingerprint
    with pytest.raises(EngineBuildError, match=r"at most 0\.0001"):
        TorchEngines(bundled, precision="float8", error_limit=1e-4)


@pytest.mark.gpu
def test_threads_on_streams_share_the_graphs(bundled: QwenVL) -> None:
    engines = TorchEngines(bundled)
    made = [engines.engine(side, (1, 2, 4), 0) for side in (1, 2, 3)]
    inputs = [tiles(3, engine.side * 32, "cuda") for engine in made]
    wants = [engine.encode(pixels).tokens for engine, pixels in zip(made, inputs, strict=True)]
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for turn in range(30):
                which = (number + turn) % 3
                if not torch.equal(made[which].encode(inputs[which]).tokens, wants[which]):
                    wrong.append(which)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))  # raises what a thread raised
    assert wrong == []


def tile_encoder(qwen: QwenVL, config: Any, streams: Any) -> TileEncoder:
    """Without a cache, so that every call encodes."""
    engines = TorchEngines(qwen, streams=streams)
    made = {lod: engines.engine(config.sides[lod], config.buckets, 0) for lod in Lod}
    assert (made[Lod.HIGH].apart > 0) == (streams == "each")
    return TileEncoder(made, TileCache(0, 100.0), image.tile_pixels, image.hash_tiles, 32)


@pytest.mark.gpu
def test_lods_on_streams_of_their_own_encode_the_same(bundled: QwenVL, photo: Image.Image) -> None:
    """Bit for bit, again and again, on several threads at once."""
    config = load_config("demo").updated({"halo": 0})
    pixels = image.decode(photo, 1 << 24)
    frame = image.frame(pixels, config, 32, torch.device("cuda"))
    order = torch.arange(frame.grid.count)
    wanted = {lod: order[int(lod) :: 4] for lod in Lod}
    relevance = torch.full((frame.grid.rows, frame.grid.cols), 0.5)
    want = tile_encoder(bundled, config, "one").encode(frame, wanted, relevance)
    each = tile_encoder(bundled, config, "each")

    def run(_: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            found = [tiles for _ in range(10) for tiles in each.encode(frame, wanted, relevance)]
            pairs = [(a.features, b.features) for a, b in zip(found, want * 10, strict=True)]
            same = [torch.equal(a.tokens, b.tokens) for a, b in pairs]
            return all(same) and all(torch.equal(a.deepstack, b.deepstack) for a, b in pairs)

    torch.cuda.synchronize()
    assert run(0)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(3)))


@pytest.mark.gpu
def test_graphs_outlive_engines(bundled: QwenVL) -> None:
    """The pool of a workspace whose engines were all collected is used again."""
    tower, room = FusedTower(bundled.vision), Workspace(torch.device("cuda"))
    for _ in range(3):
        engine = GraphedLodEngine(tower, room, 1, 0, (1,), None, "test", "f")
        engine.encode(tiles(1, 32, "cuda"))
        assert room.failure == ""
        del engine


@pytest.mark.gpu
def test_describe_and_warm_up_on_a_gpu() -> None:
    engine = Engine.from_pretrained(device="cuda", buckets=[1, 2])
    engine.warm_up()
    assert set(engine.describe()["lod_engines"].values()) == {"torch fused bfloat16, CUDA graphs"}
    eager = Engine.from_pretrained(device="cuda", lod_engine="eager")
    assert set(eager.describe()["lod_engines"].values()) == {"torch eager bfloat16"}
