"""Float8 plans: the same numbers in torch and ONNX, what calibration sees, and the gate on what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from arrcoc import ConfigError, EngineBuildError, calibration, cli, qwen
from arrcoc import config as configs
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.evaluation import datasets, float8_loss
from arrcoc.lod import TorchLodEngine, build, calibrate, manifest
from arrcoc.lod.export import FLOAT8_OPSET, compare, export
from arrcoc.lod.float8_graph import LARGEST, Float8Linear, quantized, rounded, scale_for
from arrcoc.lod.recipe import Recipe, check
from arrcoc.lod.tower import StaticTower

onnx = pytest.importorskip("onnx", reason="needs arrcoc's extra onnx")
pytest.importorskip("onnxruntime", reason="needs arrcoc's extra onnx")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half(tiny_checkpoint: Path) -> qwen.QwenVL:
    return qwen.load(tiny_checkpoint, CPU, torch.float16)


@pytest.fixture(scope="module")
def single(tiny_checkpoint: Path) -> qwen.QwenVL:
    return qwen.load(tiny_checkpoint, CPU, torch.float32)


@pytest.fixture(scope="module")
def folder(photo: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and a file that is none."""
    made = tmp_path_factory.mktemp("images")
    photo.resize((256, 256)).save(made / "b.png")
    photo.resize((384, 256)).save(made / "a.JPG", format="JPEG")
    (made / "notes.txt").write_text("no image")
    return made


@pytest.fixture(scope="module")
def tiles(folder: Path) -> list[torch.Tensor]:
    return calibration.read_tiles(folder, configs.load("demo"), 32, most=16)


def recipe(out: Path, folder: Path, **changes: Any) -> Recipe:
    values = {"preset": "demo", "backend": "tensorrt_rtx", "precision": "fp8", "arch": ("sm89", "sm120")}
    values |= {"out": out, "calibrate": folder, "max_batch": (2, 2, 2, 2)}
    return Recipe.make(values | changes)


def test_rounding_is_that_of_e4m3() -> None:
    """Three bits of mantissa, ties to even, the end of the range at 448 times the scale."""
    scale = torch.tensor(2.0)
    values = torch.tensor([0.0, 2.0, 2.1, 2.125, 2.375, -33.0, 900.0, -5000.0])
    expected = torch.tensor([0.0, 2.0, 2.0, 2.0, 2.5, -32.0, 896.0, -896.0])
    assert torch.equal(rounded(values, scale), expected)
    assert scale_for(torch.tensor(LARGEST * 2)) == 2
    assert scale_for(torch.tensor(0.0)) > 0


def test_linear_layer_is_near_its_original() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    values = torch.randn(50, 64, generator=generator)
    coarse = Float8Linear(linear, float(values.abs().max()))
    assert coarse.weight.dtype == torch.float8_e4m3fn
    error = (coarse(values) - linear(values)).norm() / linear(values).norm()
    # Two operands, each off by at most 1 part in 16 and by 2.6 % in quadratic mean.
    assert 0.01 < error < 0.06
    assert (Float8Linear(linear, 0.1)(values) - linear(values)).norm() > 5 * error, (
        "larger inputs are cut off"
    )


def test_tiles_are_those_of_the_preset(tiles: list[torch.Tensor], folder: Path) -> None:
    """Halo 1: sides 1 to 4 with a token around; 2 x 2 and 2 x 3 tiles of 128 px, images by name."""
    assert [tuple(cut.shape) for cut in tiles] == [(10, 3, 32 * s, 32 * s) for s in (3, 4, 5, 6)]
    assert [len(cut) for cut in calibration.read_tiles(folder, configs.load("demo"), 32, most=4)] == [4] * 4
    with Image.open(folder / "b.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # The last image's first tile, whose halo is cut off here.
    assert torch.equal(tiles[3][6][:, 32:160, 32:160], pixels[:, :128, :128])


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no images"):
        calibration.read_tiles(tmp_path, configs.load("demo"), 32)


def test_calibration_sees_the_largest_inputs(single: qwen.QwenVL, tiles: list[torch.Tensor]) -> None:
    largest = calibrate.calibrate(single.vision, tiles)
    blocks = len(single.vision.blocks)
    names = ("qkv", "proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert set(largest) == {f"{number}.{name}" for number in range(blocks) for name in names}
    assert all(value > 0 for value in largest.values())
    cut = calibrate.calibrate(single.vision, tiles, percentile=99.0)
    assert all(cut[name] < largest[name] for name in largest)
    # By hand, for the first layer: the norm of the embedded patches of the tiles that are not held out.
    tower, seen = StaticTower(single.vision), []
    hook = single.vision.blocks[0].qkv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for place, tile in enumerate(tiles[3]):
        if place % 4 != 3:
            list(calibrate._encode(tower, tile[None]))
    hook.remove()
    assert max(float(value.abs().max()) for value in seen) <= largest["0.qkv"] + 1e-6
    assert calibrate.calibrate(single.vision, tiles[3:])["0.qkv"] == pytest.approx(
        max(float(value.abs().max()) for value in seen), rel=1e-5
    )


def test_error_is_measured_on_what_was_held_out(single: qwen.QwenVL, tiles: list[torch.Tensor]) -> None:
    largest = calibrate.calibrate(single.vision, tiles)
    error = calibrate.encoding_error(single.vision, largest, tiles)
    assert set(error) == {"tokens", "deepstack"}
    assert all(0.005 < value < 0.3 for value in error.values())
    spoilt = [cut.clone() for cut in tiles]
    for cut in spoilt:
        cut[torch.arange(len(cut)) % 4 != 3] = 0
    assert calibrate.encoding_error(single.vision, largest, spoilt) == error
    far = calibrate.encoding_error(
        single.vision, {name: value / 50 for name, value in largest.items()}, tiles
    )
    assert far["tokens"] > 2 * error["tokens"]


def test_onnx_computes_what_torch_emulates(
    single: qwen.QwenVL, tiles: list[torch.Tensor], tmp_path: Path
) -> None:
    """In fp32, where both round alike: in fp16, an input near a tie may fall to either side."""
    largest = calibrate.calibrate(single.vision, tiles)
    path = tmp_path / "tower.onnx"
    coarse = StaticTower(quantized(single.vision, largest))
    export(coarse, path, FLOAT8_OPSET)
    graph = onnx.load(path, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    layers = 4 * len(single.vision.blocks)
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (layers, 2 * layers)
    stored = [
        i for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(i.dims) == 2
    ]
    assert len(stored) == layers
    against_emulation = compare(path, coarse, 2)
    against_plain = compare(path, StaticTower(single.vision), 2)
    assert max(against_emulation.values()) < 2e-3
    assert min(against_plain.values()) > 0.01


def test_plan_is_built_and_the_gate_refuses(
    half: qwen.QwenVL, folder: Path, tiles: list[torch.Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs arrcoc's extra tensorrt-rtx")
    with pytest.raises(
        EngineBuildError, match=r"relative error of \d+\.\d\d% in the .* of tiles held out.*at most 0\.01%"
    ):
        build.build(recipe(tmp_path / "no", folder, max_error=1e-4), half, tiles=tiles)
    assert list(tmp_path.iterdir()) == [], "nothing is left of a refused build"
    made = build.build(recipe(tmp_path / "yes", folder, max_error=0.5), half, tiles=tiles)
    assert manifest.read(tmp_path / "yes") == made
    assert (made.precision, made.opset, made.archs) == ("fp8", FLOAT8_OPSET, ("sm89", "sm120"))
    assert made.calibration is not None
    assert made.calibration.tiles == (10, 10, 10, 10)
    assert 0 < made.calibration.error["tokens"] < 0.5
    assert "--precision fp8 --calibrate FOLDER" in made.rebuild(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arch": ("sm80", "sm89")}, "precision fp8 for sm80, which has no float8"),
        ({"calibrate": None}, "precision fp8 without images to calibrate on"),
        ({"backend": "onnx", "arch": ("current",)}, "precision fp8 with backend onnx"),
        ({"precision": "fp16"}, "calibrate with precision fp16"),
        (
            {"precision": "fp16", "calibrate": None, "max_accuracy_loss": 0.1},
            "max_accuracy_loss with precision fp16",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    changes: dict[str, Any], named: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineBuildError, match=named):
        check(recipe(tmp_path / "x", folder, **changes))


def test_versions_without_strong_typing_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs arrcoc's extra tensorrt-rtx")
    monkeypatch.setattr(build, "strongly_typed", lambda trt: False)
    with pytest.raises(EngineBuildError, match=r"precision fp8 with tensorrt_rtx .*strong typing"):
        build._opset(recipe(tmp_path / "x", folder))


def test_command_calibrates(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs arrcoc's extra tensorrt-rtx")
    options = ["--preset", "demo", "--backend", "tensorrt_rtx", "--precision", "fp8", "--arch", "sm89"]
    paths = ["--model", str(tiny_checkpoint), "--calibrate", str(folder), "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(cli.app, ["build", *options, *paths, "--max-error", "0.0001"])
    assert result.exit_code == 1
    assert "calibrating" in result.stderr
    assert "relative error of" in result.stderr


@pytest.fixture(scope="module")
def trained(tiles: list[torch.Tensor]) -> dict[str, float]:
    """Largest inputs of the bundled checkpoint's layers."""
    folder, _ = bundled_checkpoint()
    return calibrate.calibrate(qwen.load(folder, CPU, torch.float32).vision, [cut[:3] for cut in tiles])


def test_accuracy_is_that_of_answers(trained: dict[str, float]) -> None:
    """The trained checkpoint answers as well in float8, and badly where float8 cuts nearly everything off."""
    cases = datasets.load("placards", 512, 3, 0)
    done: list[tuple[str, int, int]] = []
    fair = float8_loss.measure(None, "demo", trained, cases, 3, lambda *told: done.append(told))
    assert (fair.dataset, fair.questions) == ("placards", 3)
    assert done == [("answering questions", index, 3) for index in range(3)]
    assert fair.plain >= 0.5, "the trained checkpoint reads placards"
    assert abs(fair.loss) <= 1 / 3
    spoilt = float8_loss.measure(
        None, "demo", {name: value / 300 for name, value in trained.items()}, cases, 3
    )
    assert (spoilt.plain, spoilt.questions) == (fair.plain, 3)
    assert spoilt.loss >= 1 / 3
    with pytest.raises(EngineBuildError, match=r"answers .*% of 3 questions of placards right.*at most"):
        calibrate.require_answers(spoilt, 0.1)
    calibrate.require_answers(spoilt, 1.0)


def test_emulated_engines_are_the_quantised_tower(single: qwen.QwenVL, tiles: list[torch.Tensor]) -> None:
    """The LOD engines alone compute in float8; the checkpoint and its glimpse stay what they are."""
    largest = calibrate.calibrate(single.vision, tiles)
    stand_in = float8_loss.EmulatedFloat8(single, largest, 1)
    engine = stand_in.engine(2, (2,))
    found = engine.encode(tiles[1][:2])
    expected = calibrate._encode(StaticTower(quantized(single.vision, largest)), tiles[1][:2])
    tokens = next(expected)[0].unflatten(1, (4, 4))[:, 1:3, 1:3].flatten(1, 2)
    assert torch.allclose(found.tokens, tokens, atol=1e-5)
    assert engine.fingerprint != TorchLodEngine(single, 2, (2,), 1).fingerprint
    assert isinstance(single.vision.blocks[0].qkv, torch.nn.Linear)


def answered(largest: Any, progress: Any) -> manifest.Accuracy:
    assert "0.qkv" in largest
    return manifest.Accuracy(dataset="mine.jsonl", questions=50, plain=0.8, fp8=0.74)


def test_build_is_refused_for_what_it_costs_in_answers(
    half: qwen.QwenVL, folder: Path, tiles: list[torch.Tensor], tmp_path: Path
) -> None:
    made = recipe(tmp_path / "no", folder, max_error=0.5, max_accuracy_loss=0.05, backend="tensorrt")
    with pytest.raises(EngineBuildError, match=r"74\.0% of 50 questions of mine\.jsonl right, and 80\.0%"):
        build._weights(made, half, tiles, answered, lambda *told: None)
    allowed = made.model_copy(update={"max_accuracy_loss": 0.07})
    _, calibration = build._weights(allowed, half, tiles, answered, lambda *told: None)
    assert calibration is not None
    assert calibration.accuracy is not None
    assert calibration.accuracy.loss == pytest.approx(0.06)
