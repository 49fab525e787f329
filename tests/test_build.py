"""`arrcoc build` and what loads its folders: the same answers as torch, and every stale part refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from arrcoc import ConfigError, Engine, EngineBuildError, EngineMismatchError, cli, qwen
from arrcoc.lod import BuiltEngines, TorchEngines, TorchLodEngine, build, manifest
from arrcoc.lod.built import ONNX_FILE
from arrcoc.lod.export import relative_error
from arrcoc.lod.recipe import Recipe, check
from arrcoc.lod.static_engine import StaticLodEngine, capped
from arrcoc.lod.tower import Geometry, StaticTower
from arrcoc.qwen import QwenVL
from arrcoc.records import Features

pytest.importorskip("onnxscript", reason="needs arrcoc's extra onnx")
pytest.importorskip("onnxruntime", reason="needs arrcoc's extra onnx")

ROOT = Path(__file__).parent.parent
QUESTION = "What is on her chest?"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> QwenVL:
    return qwen.load(tiny_checkpoint, CPU, torch.float32)


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX build of preset demo, made by the command; do not change it."""
    out = tmp_path_factory.mktemp("engines") / "onnx"
    recipe = ROOT / "engines" / "demo-onnx.yaml"
    result = CliRunner().invoke(
        cli.app, ["build", str(recipe), "--model", str(tiny_checkpoint), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "comparing with torch" in result.stderr
    assert result.stdout.startswith(f"{out}: torch ")
    assert [path.name for path in out.parent.iterdir()] == ["onnx"], "nothing is left of the work"
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the build, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def recipe(folder: Path, **changes: Any) -> Recipe:
    values = {"preset": "demo", "backend": "torch", "precision": "fp32", "out": folder}
    return Recipe.make(values | changes)


def test_answers_are_those_of_torch(tiny_checkpoint: Path, built: Path, photo: Image.Image) -> None:
    picture = photo.resize((384, 256))
    torch_engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")
    engine = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", engines=built)
    ours, theirs = (e.ask(picture, QUESTION, 0.5, max_new_tokens=8) for e in (engine, torch_engine))
    assert ours.text == theirs.text
    assert ours.encoding is not None
    assert theirs.encoding is not None
    torch.testing.assert_close(ours.encoding.tokens, theirs.encoding.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.encoding.deepstack, theirs.encoding.deepstack, atol=1e-4, rtol=1e-4)
    assert engine.cache_stats().misses > 0, "tiles went through the engines"
    backends = engine.describe()["lod_engines"]
    assert list(backends) == ["1", "2", "3", "4"]
    assert all(name.startswith("onnxruntime ") and name.endswith(" fp32") for name in backends.values())


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_tile_gets_its_features(count: int, checkpoint: QwenVL, built: Path) -> None:
    """Halo 1: tiles of 2 x 2 tokens are cut from 4 x 4; batches are padded to buckets 1, 2, 4."""
    engine = BuiltEngines.open(built, checkpoint).engine(2, (1, 2, 4))
    reference = TorchLodEngine(checkpoint, 2, (1, 2, 4), halo=1)
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 128, 128), dtype=torch.uint8, generator=generator)
    ours, theirs = engine.encode(pixels), reference.encode(pixels)
    torch.testing.assert_close(ours.tokens, theirs.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.deepstack, theirs.deepstack, atol=1e-4, rtol=1e-4)


def test_fingerprints_tell_sides_and_builds_apart(checkpoint: QwenVL, built: Path, copy: Path) -> None:
    other = manifest.read(copy).model_copy(update={"builder": "torch 0"}).sealed()
    other.write(copy)
    engines = [BuiltEngines.open(folder, checkpoint) for folder in (built, built, copy)]
    keys = [engine.engine(side, (1,)).fingerprint for engine in engines for side in (1, 2)]
    assert keys[:2] == keys[2:4]
    assert len({*keys}) == 4


def test_manifest_says_what_was_built(tiny_checkpoint: Path, checkpoint: QwenVL, built: Path) -> None:
    facts = json.loads((built / "manifest.json").read_text())
    assert facts["weights"] == checkpoint.fingerprint
    assert (facts["preset"], facts["halo"], facts["precision"]) == ("demo", 1, "fp32")
    assert [lod["side"] for lod in facts["lods"]] == [1, 2, 3, 4]
    assert set(facts["files"]) == {ONNX_FILE, f"{ONNX_FILE}.data"}
    assert facts["files"][ONNX_FILE]["bytes"] == (built / ONNX_FILE).stat().st_size
    assert facts["build_seconds"] > 0
    # A byte of a weight file, people's names and the time it took do or do not change the identity.
    made = manifest.read(built)
    assert made.model_copy(update={"build_seconds": 1.0, "model": "x"}).identity() == made.fingerprint
    changed = {ONNX_FILE: made.files[ONNX_FILE].model_copy(update={"sha256": "0" * 64})}
    assert made.model_copy(update={"files": changed}).identity() != made.fingerprint


@pytest.mark.parametrize("name", [ONNX_FILE, f"{ONNX_FILE}.data"])
def test_tampered_file_is_refused(name: str, checkpoint: QwenVL, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(EngineMismatchError, match=f"sha256 of {name}.*Build again: arrcoc build --model"):
        BuiltEngines.open(copy, checkpoint).engine(1, (1,))
    with pytest.raises(EngineMismatchError, match=f"sha256 of {name}"):
        manifest.read(copy).read_file(copy, name)


def test_truncated_and_missing_files_are_refused(checkpoint: QwenVL, copy: Path) -> None:
    (copy / ONNX_FILE).write_bytes((copy / ONNX_FILE).read_bytes()[:-1])
    with pytest.raises(EngineMismatchError, match=f"size of {ONNX_FILE}"):
        BuiltEngines.open(copy, checkpoint).engine(1, (1,))
    (copy / ONNX_FILE).unlink()
    with pytest.raises(EngineMismatchError, match=f"{ONNX_FILE} is missing"):
        BuiltEngines.open(copy, checkpoint).engine(1, (1,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": "0" * 32}, "fingerprint"),  # not sealed anew
        ({"precision": "int3"}, "precision"),
        ({"format": 2}, "format"),
        ({"extra": 1}, "extra"),
        (None, "manifest.json: Expecting"),
    ],
)
def test_edited_manifest_is_refused(
    change: dict[str, Any] | None, named: str, checkpoint: QwenVL, copy: Path
) -> None:
    path = copy / "manifest.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EngineMismatchError, match=named):
        BuiltEngines.open(copy, checkpoint)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": "0" * 32}, "weights of the engines is 0000"),
        ({"tower": {"patch": 14}}, r"tower\.patch of the engines is 14\. Allowed: 16"),
        ({"precision": "fp16"}, "weights"),
        ({"backend": "torch", "precision": "fp16"}, "precision of the engines is torch.float16"),
        ({"backend": "tensorrt_rtx"}, "tensorrt_rtx on device cpu. Allowed: a CUDA device"),
    ],
)
def test_engines_of_another_model_or_machine_are_refused(
    change: dict[str, Any], named: str, checkpoint: QwenVL, copy: Path
) -> None:
    manifest.read(copy).model_copy(update=change).sealed().write(copy)
    with pytest.raises(EngineMismatchError, match=named):
        BuiltEngines.open(copy, checkpoint)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"builder": "tensorrt_rtx 0.9"},
            "builder of the engines is tensorrt_rtx 0.9. Allowed: tensorrt_rtx 1.7",
        ),
        ({"archs": ("sm80", "sm89")}, "archs of the engines is sm80, sm89. Allowed: sm90 here"),
        ({"archs": ("current",), "arch": "sm89"}, "archs of the engines is sm89. Allowed: sm90 here"),
    ],
)
def test_plans_of_another_version_or_gpu_are_refused(
    change: dict[str, Any], named: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an H200 would see them: its capability is 9.0."""
    from types import SimpleNamespace

    from arrcoc.lod import built as loading

    monkeypatch.setattr(loading, "builder_name", lambda backend: "tensorrt_rtx 1.7")
    monkeypatch.setattr(loading, "compute_capability", lambda device: "sm90")
    right = {"backend": "tensorrt_rtx", "builder": "tensorrt_rtx 1.7", "archs": ("sm80", "sm90")}
    here: Any = SimpleNamespace(device=torch.device("cuda"))
    made = manifest.read(built).model_copy(update=right)
    loading._verify_machine(built, made, here)
    with pytest.raises(EngineMismatchError, match=named):
        loading._verify_machine(built, made.model_copy(update=change), here)


def test_presets_of_another_geometry(
    tiny_checkpoint: Path, built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        EngineMismatchError, match=r"sides of the engines is 1, 2, 3, 4\. Allowed: 2, 4, 6, 8"
    ):
        Engine.from_pretrained(tiny_checkpoint, preset="photo", device="cpu", engines=built)
    with pytest.raises(EngineMismatchError, match=r"halo of the engines is 1\. Allowed: 0"):
        Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", engines=built, halo=0)
    with caplog.at_level(logging.WARNING):
        engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", engines=built)
    told = engine.describe()
    (note,) = (note for note in told["notes"] if "engines" in note)
    assert "photo, gigapixel: torch encodes" in note
    assert note in caplog.text
    assert told["lod_engines"]["1"].startswith("onnxruntime")
    assert told["lod_engines"]["20"] == "torch eager float32"
    # Side 4 is high in demo, low in photo, background in gigapixel.
    assert "torch eager float32" in told["lod_engines"]["4"]
    assert "onnxruntime" in told["lod_engines"]["4"]


def test_torch_build_pins_model_and_preset(checkpoint: QwenVL, tmp_path: Path) -> None:
    made = build.build(recipe(tmp_path / "pinned"), checkpoint)
    assert made.files == {}
    engine = BuiltEngines.open(tmp_path / "pinned", checkpoint).engine(3, (1, 2, 16))
    assert (engine.side, engine.halo, engine.backend) == (3, 1, "torch eager float32")


def test_torch_build_runs_on_the_engines_that_the_configuration_makes(
    tiny_checkpoint: Path, checkpoint: QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build(recipe(tmp_path / "pinned"), checkpoint)
    asked = []

    class Noted(TorchEngines):
        def __init__(self, qwen: QwenVL, *options: Any) -> None:
            super().__init__(qwen, *options)
            asked.append(options)

    for module in ("arrcoc.viewer", "arrcoc.lod.built"):
        monkeypatch.setattr(f"{module}.TorchEngines", Noted)
    options = {"preset": "demo", "engines": tmp_path / "pinned", "lod_engine": "eager", "lod_streams": "one"}
    Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", **options)
    assert [(kind, streams) for kind, _, _, streams in asked] == [("eager", "one")]


def test_build_is_atomic(checkpoint: QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "engines"
    first = build.build(recipe(out), checkpoint)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "export", fail)
        with pytest.raises(KeyboardInterrupt):
            build.build(recipe(out, backend="onnx"), checkpoint)
    assert manifest.read(out) == first
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]
    second = build.build(recipe(out, max_batch=(8, 8, 8, 8)), checkpoint)
    assert manifest.read(out) == second != first
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_wrong_graph_is_refused(checkpoint: QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "export", lambda *_: None)
    monkeypatch.setattr(build, "compare", lambda *_: {"tokens": 1e-7, "deepstack": float("nan")})
    with pytest.raises(EngineBuildError, match="deepstack differ from torch by nan"):
        build.build(recipe(tmp_path / "out", backend="onnx"), checkpoint)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "fp8"}, "precision fp8 with backend torch"),
        ({"backend": "onnx", "precision": "bf16"}, "bf16 with backend onnx"),
        ({"backend": "onnx", "arch": ("sm89",)}, "--arch sm89 with backend onnx"),
        ({"max_batch": (1, 1, 0, 1)}, "max_batch"),
        ({"separate": True}, "separate with backend torch"),
        ({"workspace_gb": 1.0}, "workspace_gb with backend torch"),
        ({"optimization_level": 0}, "optimization_level with backend torch"),
        ({"timing_cache": Path("t"), "backend": "tensorrt_rtx"}, "timing_cache with backend tensorrt_rtx"),
        ({"out": ROOT / "tests"}, "holds something else"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=named):
        check(recipe(tmp_path / "out", **change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "cuda"}, "backend = 'cuda'"),
        ({"max_batch": (1, 2)}, "max_batch"),
        ({"presett": "demo"}, "presett.*the keys model, preset"),
        ({"workspace_gb": 0}, "workspace_gb = 0"),
        ({"optimization_level": 6}, "optimization_level = 6"),
        ({"preset": "auto"}, "preset 'auto' for a build. Allowed: demo, gigapixel, photo"),
        ({"preset": "grand"}, "preset 'grand'"),
    ],
)
def test_unusable_recipes_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        check(recipe(tmp_path / "out", **change))


def test_recipes_of_the_repository_are_usable() -> None:
    recipes = sorted((ROOT / "engines").glob("*.yaml"))
    assert len(recipes) >= 4
    for path in recipes:
        made = Recipe.read(path, {})
        assert made.out.parts[0] == "engines"
        assert len(made.out.parts) == 3, "git ignores built plans in subfolders"
    assert Recipe.read(recipes[0], {"precision": "fp16"}).precision == "fp16"


def test_command_line_refuses_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["build", "--backend", "onnx"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: a build without out.")
    result = CliRunner().invoke(cli.app, ["build", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert "a YAML recipe" in result.stderr


def test_static_engine_pads_to_buckets_and_returns_the_checkpoints_precision(checkpoint: QwenVL) -> None:
    """A runner in fp16 below a checkpoint in fp32: batches of 4 and 1, features in fp32."""
    tower = StaticTower(qwen.load(checkpoint.name, CPU, torch.float16).vision)
    shapes = []

    def runner(patches: torch.Tensor, shape: Geometry) -> Features:
        assert patches.is_contiguous()
        assert (patches.dtype, shape.positions.dtype) == (torch.float16, torch.float16)
        assert (shape.cos.dtype, shape.sin.dtype) == (torch.float32, torch.float32)
        shapes.append(tuple(patches.shape))
        return tower.encode(patches, shape)

    weights = checkpoint.vision
    engine = StaticLodEngine(runner, weights, 1, 1, (1, 4), "fp16", torch.float32, "test fp16", "f")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 96, 96), dtype=torch.uint8, generator=generator)
    found, expected = engine.encode(pixels), TorchLodEngine(checkpoint, 1, (1, 4), 1).encode(pixels)
    assert shapes == [(4, 36, 1536), (1, 36, 1536)]  # 3 x 3 tokens with the halo, 4 patches each
    assert found.tokens.dtype == found.deepstack.dtype == torch.float32
    assert relative_error(found.tokens, expected.tokens) < 2e-2
    assert relative_error(found.deepstack, expected.deepstack) < 2e-2
    engine.encode(pixels[:3])
    assert shapes[2:] == [(4, 36, 1536)]  # 3 of 4 are enough to pad


def test_lossy_precision_is_named(tiny_checkpoint: Path, copy: Path) -> None:
    rough = qwen.load(tiny_checkpoint, CPU, torch.bfloat16)
    with pytest.raises(
        EngineMismatchError, match=r"weights in fp32 \(this checkpoint was loaded in bfloat16\)"
    ):
        BuiltEngines.open(copy, rough)


def test_capped_buckets() -> None:
    assert capped((1, 2, 4, 8), 8) == (1, 2, 4, 8)
    assert capped((1, 2, 4, 8), 6) == (1, 2, 4, 6)
    assert capped((1, 2, 4, 8), 4) == (1, 2, 4)
    assert capped((8,), 3) == (3,)


@pytest.mark.parametrize(("size", "warned"), [(32 << 20, False), (34 << 20, True)])
def test_a_plan_that_holds_wider_weights_than_its_graph_is_named(
    size: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "build_plan", lambda *_: bytes(size))
    graph = tmp_path / "graphs" / "tower.onnx"
    graph.parent.mkdir()
    graph.write_bytes(bytes(1 << 20))
    recipe = Recipe.make({"backend": "tensorrt_rtx", "preset": "demo", "out": tmp_path})
    build._write_plan(recipe, graph, [], tmp_path / "tower.plan", lambda *_: None)
    assert (tmp_path / "tower.plan").stat().st_size == size
    expected = ["tower.plan has 36 MB, its graph 1 MB: the builder did not keep to fp16 everywhere"]
    assert [record.getMessage() for record in caplog.records] == expected * warned
