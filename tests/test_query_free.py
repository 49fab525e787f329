"""The plan stage as built engines: the exported graph, the command, and the engine that uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from arrcoc import Engine, EngineBuildError, EngineMismatchError, cli, query_free, qwen, scorers, texture
from arrcoc.config import load
from arrcoc.lod import beside, build, plan_builder
from arrcoc.lod.manifest import FrameGraph, read
from arrcoc.lod.recipe import Recipe, check
from arrcoc.records import Frame, Query, Texture

pytest.importorskip("onnxscript", reason="needs arrcoc's extra onnx")
pytest.importorskip("onnxruntime", reason="needs arrcoc's extra onnx")

CONFIG = load("demo")
QUESTION = "What is on her chest?"
ANY = Query("", (), torch.empty(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[beside.Beside, Path]:
    """The graph for an image of 256 x 384 pixels under preset demo."""
    graph = query_free.exportable(CONFIG, 32, 256, 384)
    path = tmp_path_factory.mktemp("graph") / f"{graph.name}.onnx"
    beside.export(graph, path)
    return graph, path


@pytest.fixture(scope="module")
def built(
    tiny_checkpoint: Path,
    exported: tuple[beside.Beside, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An ONNX build with a plan stage; do not change it."""
    out = tmp_path_factory.mktemp("engines") / "onnx"
    graph, path = exported
    again = query_free.exportable(CONFIG, 32, 250, 380)
    assert again.name == graph.name, "images of two sizes, frames of one"
    with pytest.MonkeyPatch.context() as patched:  # exporting it once is enough
        patched.setattr(build, "export_beside", lambda graph, to: to.write_bytes(path.read_bytes()))
        checkpoint = qwen.load(tiny_checkpoint, torch.device("cpu"), torch.float32)
        build.build(recipe(out, plan_stage=("256x384", "250x380")), checkpoint, None, [graph, again])
    return out


def recipe(folder: Path, **changes: Any) -> Recipe:
    values = {"preset": "demo", "backend": "onnx", "precision": "fp32", "out": folder}
    return Recipe.make(values | changes)


def test_the_command_asks_for_the_frames_of_the_sizes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def note(made: Recipe, qwen: Any, progress: Any, beside: Any, *_: Any) -> None:
        asked.extend(beside)
        raise EngineBuildError("enough", "this", "Stop")

    monkeypatch.setattr(build, "build", note)
    options = [
        "--preset",
        "demo",
        "--backend",
        "onnx",
        "--precision",
        "fp32",
        "--plan-stage",
        "256x384,500x380",
    ]
    where = ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(cli.app, ["build", *options, *where]).exit_code == 1
    assert [graph.name for graph in asked] == ["plan_stage_256x384", "plan_stage_512x384"]


def test_the_graph_computes_what_the_stages_do(exported: tuple[beside.Beside, Path]) -> None:
    graph, path = exported
    random = torch.Generator().manual_seed(1)
    pixels, background = (
        torch.randint(0, 256, t.shape, generator=random).byte() for t in graph.inputs.values()
    )
    grid = graph.module._grid
    assert isinstance(graph.module, query_free.QueryFree)
    frame = Frame(pixels, background, grid, torch.empty(0), (256, 384), (256, 384), 0.0, 1.0)
    made, maps = query_free.judged(beside.OnnxGraph(path), frame, CONFIG.cells)
    expected = texture.extract(frame, CONFIG)
    torch.testing.assert_close(made.maps, expected.maps, atol=1e-3, rtol=0)
    assert beside.relative_error(made.maps.float(), expected.maps.float()) < 1e-4
    wanted = scorers.propositional(expected, ANY), scorers.perspectival(expected, ANY)
    torch.testing.assert_close(maps, wanted, atol=1e-4, rtol=0)


def test_the_graph_names_no_folder_of_this_machine(exported: tuple[beside.Beside, Path]) -> None:
    content = exported[1].read_bytes()
    assert b"site-packages" not in content
    assert str(Path(texture.__file__).parent).encode() not in content


def test_a_graph_that_computes_something_else_is_refused(
    exported: tuple[beside.Beside, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = exported
    monkeypatch.setattr(
        torch.onnx, "export", lambda module, inputs, to, **_: to.write_bytes(path.read_bytes())
    )
    beside.export(graph, tmp_path / "same.onnx")
    monkeypatch.setattr(scorers, "CENTRE_PRIOR", 0.3)
    with pytest.raises(EngineBuildError, match="perspectival differs from torch"):
        beside.export(graph, tmp_path / "other.onnx")


def test_an_exporter_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(
        EngineBuildError, match=r"plan_stage_128x128, which the ONNX exporter.*no such operator"
    ):
        beside.export(query_free.exportable(CONFIG, 32, 128, 128), tmp_path / "x.onnx")


def test_cells_must_be_whole_pixels() -> None:
    with pytest.raises(EngineBuildError, match="12 cells to a tile of 128 pixels"):
        query_free.exportable(CONFIG.updated({"cells": 12}), 32, 256, 256)


def test_the_build_records_each_frame_once(built: Path) -> None:
    name = "plan_stage_256x384.onnx"
    made = read(built)
    assert made.plan_stage == (FrameGraph(height=256, width=384, cells=16, file=name),)
    assert name in made.files
    assert "--plan-stage 256x384" in made.rebuild(built)
    assert not (built / f"{name}.data").exists()


def test_a_manifest_without_plan_stages_reads_as_before(built: Path) -> None:
    facts = json.loads((built / "manifest.json").read_text("utf-8"))
    bare = type(read(built)).model_validate(facts | {"plan_stage": []})
    older = type(bare).model_validate({k: v for k, v in bare.model_dump().items() if k != "plan_stage"})
    assert older.identity() == bare.identity() != read(built).identity()


def test_the_engine_uses_it(
    tiny_checkpoint: Path, built: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain = (
        Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", engines=folder)
        for folder in (built, None)
    )
    fitting, other = photo.resize((384, 256)), photo.resize((256, 256))
    expected = plain.encode(fitting, QUESTION, 0.5)
    ran: list[Texture] = []
    monkeypatch.setattr(texture, "extract", lambda frame, config: ran.append(frame) or 1 / 0)
    found = engine.encode(fitting, QUESTION, 0.5)
    assert ran == []
    torch.testing.assert_close(found.relevance, expected.relevance, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.scores.propositional, expected.scores.propositional, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores.perspectival, expected.scores.perspectival, atol=1e-4, rtol=0)
    with pytest.raises(ZeroDivisionError):
        engine.encode(other, QUESTION, 0.5)
    assert len(ran) == 1, "another frame takes the way through torch"


def test_a_changed_file_is_refused(
    tiny_checkpoint: Path, built: Path, photo: Image.Image, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = copy / "plan_stage_256x384.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineMismatchError, match=r"sha256 of plan_stage_256x384\.onnx"):
        Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", engines=copy).encode(
            photo.resize((384, 256)), QUESTION, 0.5
        )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"plan_stage": ("2160",)}, "plan_stage '2160'.*HxW"),
        ({"plan_stage": ("0x12",)}, "plan_stage '0x12'"),
        ({"plan_stage": ("256x256",), "backend": "torch"}, "backend torch"),
    ],
)
def test_sizes_that_cannot_be_built(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=match):
        check(recipe(tmp_path / "out", **changes))


def test_tensorrt_rtx_builds_it(exported: tuple[beside.Beside, Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel of TensorRT-RTX")
    options = plan_builder.PlanOptions("fp32", ("sm89",))
    assert len(plan_builder.build("tensorrt_rtx", exported[1], [], options)) > 1000
