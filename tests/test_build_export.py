"""The exported graph computes what the stock vision tower does, and the check notices when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arrcoc import EngineBuildError, qwen
from arrcoc.lod import tower as towers
from arrcoc.lod.export import LEGACY_OPSET, compare, export, relative_error, require
from arrcoc.lod.tower import StaticTower

onnx = pytest.importorskip("onnx", reason="needs arrcoc's extra onnx")
pytest.importorskip("onnxscript", reason="needs arrcoc's extra onnx")
pytest.importorskip("onnxruntime", reason="needs arrcoc's extra onnx")

EXACT = 1e-5


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> StaticTower:
    """The tower of the tests' checkpoint, whose weights have unit scale."""
    return StaticTower(qwen.load(checkpoint, torch.device("cpu"), dtype).vision)


@pytest.fixture(scope="module")
def tower(tiny_checkpoint: Path) -> StaticTower:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def graph(tower: StaticTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "tower.onnx"
    export(tower, path)
    return path


@pytest.mark.parametrize(("edge", "batch"), [(1, 1), (2, 3), (3, 2), (6, 1)])
def test_one_graph_serves_every_lod(graph: Path, tower: StaticTower, edge: int, batch: int) -> None:
    for error in compare(graph, tower, edge, batch).values():
        assert error <= EXACT


def test_graph_equals_the_stock_tower(graph: Path, tower: StaticTower, stock_model) -> None:
    """Without the static tower in between: 2 tiles of 2 x 2 tokens as two images of the stock model."""
    import onnxruntime

    shape = towers.geometry(tower.weights, 2, 2)
    patches = torch.randn(2, 16, 1536, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = ("patches", "positions", "cos", "sin")
    feeds = {name: t.detach().numpy() for name, t in zip(names, (patches, *shape), strict=True)}
    tokens, planes = (torch.from_numpy(a) for a in session.run(["tokens", "deepstack"], feeds))
    with torch.inference_mode():
        stock = stock_model.model.visual(patches.flatten(0, 1), grid_thw=torch.tensor([[1, 4, 4]] * 2))
    assert relative_error(tokens.flatten(0, 1), stock.pooler_output) <= EXACT
    for ours, theirs in zip(planes, stock.deepstack_features, strict=True):
        assert relative_error(ours.flatten(0, 1), theirs) <= EXACT


def test_legacy_opset_serves_every_lod_too(tower: StaticTower, tmp_path: Path) -> None:
    path = tmp_path / "tower.onnx"
    export(tower, path, LEGACY_OPSET)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [17]
    for edge in (1, 4):
        assert max(compare(path, tower, edge).values()) <= EXACT


def test_legacy_graph_takes_shapes_for_reshapes_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Attention's scale is a number and not derived from a shape in every block, in the graph's precision."""
    tower = load(tiny_checkpoint, torch.float16)
    export(tower, tmp_path / "tower.onnx", LEGACY_OPSET)
    graph = onnx.load(tmp_path / "tower.onnx").graph
    readers = {name: [] for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.get(name, []).append(node.op_type)
    shapes = [node.output[0] for node in graph.node if node.op_type == "Shape"]
    assert {kind for name in shapes for kind in readers[name]} == {"Gather"}
    assert not any(node.op_type == "Sqrt" for node in graph.node)
    scale = tower.weights.head_dim**-0.25
    numbers = [onnx.numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"]
    found = [n.item() for n in numbers if n.dtype == "float16" and n.shape == (1,)]
    assert found == pytest.approx([scale] * (2 * len(tower.weights.blocks)), rel=1e-3)


def turned_back(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ROTATE(vectors, cos, -sin)


ROTATE = towers.rotate


def test_check_notices_a_flipped_rotation(
    tower: StaticTower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(towers, "rotate", turned_back)
    export(tower, tmp_path / "tower.onnx", LEGACY_OPSET)
    monkeypatch.undo()
    errors = compare(tmp_path / "tower.onnx", tower, 4)
    assert min(errors.values()) > 0.02


class Swapped(StaticTower):
    """The first two DeepStack planes change places."""

    def forward(self, patches: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        tokens, planes = super().forward(patches, positions, cos, sin)
        return tokens, planes[[1, 0, *range(2, len(planes))]]


def test_check_notices_swapped_planes(tower: StaticTower, tmp_path: Path) -> None:
    export(Swapped(tower.weights), tmp_path / "tower.onnx", LEGACY_OPSET)
    errors = compare(tmp_path / "tower.onnx", tower, 2)
    assert errors["tokens"] <= EXACT
    assert errors["deepstack"] > 0.5


def test_rotation_stays_in_fp32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tower = load(tiny_checkpoint, torch.float16)
    export(tower, tmp_path / "tower.onnx", LEGACY_OPSET)
    graph = onnx.load(tmp_path / "tower.onnx").graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert types == {"patches": half, "positions": half, "cos": single, "sin": single}
    # Queries and keys of every block go to fp32 and back.
    casts = [node.attribute[0].i for node in graph.node if node.op_type == "Cast"]
    assert min(casts.count(single), casts.count(half)) >= 2 * len(tower.weights.blocks)
    # The same products with fp16 rounding in another order: below 2 %.
    assert max(compare(tmp_path / "tower.onnx", tower, 2).values()) < 2e-2


def test_graph_names_no_folder_of_this_machine(graph: Path) -> None:
    root = str(Path(towers.__file__).parent).encode()
    assert root not in graph.read_bytes()
    assert not any(node.metadata_props for node in onnx.load(graph, load_external_data=False).graph.node)


def test_relative_error() -> None:
    # |(3, 4) - (3, 3)| / |(3, 3)| = 1 / sqrt(18)
    assert relative_error(torch.tensor([3.0, 4]), torch.tensor([3.0, 3])) == pytest.approx(18**-0.5)
    assert relative_error(torch.tensor([3.0]), torch.tensor([3.0, 3])) == float("inf")
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([3.0])) == float("inf")


def test_missing_package_is_named() -> None:
    with pytest.raises(EngineBuildError, match=r"needs the Python package no_such_package.*pip install"):
        require("no_such_package")
