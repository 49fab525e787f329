"""Plans of TensorRT-RTX, built without a GPU; the differences between versions; the module without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import arrcoc
from arrcoc import EngineBuildError, EngineMismatchError, qwen
from arrcoc.lod import BuiltEngines, TorchLodEngine, build, built, manifest, plan, plan_builder
from arrcoc.lod.export import LEGACY_OPSET, export, relative_error
from arrcoc.lod.recipe import Recipe
from arrcoc.lod.tower import StaticTower

PACKAGE = Path(arrcoc.__file__).parent
CPU = torch.device("cpu")
ARCHS = ("sm80", "sm89", "sm120")


class Kinds86(IntEnum):
    EXPLICIT_BATCH = 0
    EXPLICIT_PRECISION = 1


class Kinds10(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Kinds11(IntEnum):
    STRONGLY_TYPED = 1


class Flags86(IntEnum):
    FP16 = 0
    TF32 = 7


class Recorder:
    """A builder's configuration that notes what is set."""

    def __init__(self) -> None:
        self.set: list[IntEnum] = []
        self.cleared: list[IntEnum] = []

    def set_flag(self, flag: IntEnum) -> None:
        self.set.append(flag)

    def clear_flag(self, flag: IntEnum) -> None:
        self.cleared.append(flag)


def fake(kinds: Any) -> Any:
    """A TensorRT as far as flags go."""
    return SimpleNamespace(
        __name__="tensorrt", __version__="x", NetworkDefinitionCreationFlag=kinds, BuilderFlag=Flags86
    )


@pytest.mark.parametrize(
    ("kinds", "bits", "flags"),
    [
        (Kinds86, 0b01, [Flags86.FP16]),  # explicit batch; precision by flag
        (Kinds10, 0b11, []),
        (Kinds11, 0b10, []),
    ],
)
def test_flags_of_each_version(kinds: Any, bits: int, flags: list[IntEnum]) -> None:
    trt, config = fake(kinds), Recorder()
    assert plan_builder.network_flags(trt) == bits
    plan_builder.set_precision(trt, config, "fp16")
    assert config.set == flags
    plan_builder.set_precision(trt, config, "fp32")
    assert config.cleared == [Flags86.TF32]


def test_what_tensorrt_86_lacks_is_refused() -> None:
    with pytest.raises(EngineBuildError, match="precision bf16 with tensorrt x, which does not have it"):
        plan_builder.set_precision(fake(Kinds86), Recorder(), "bf16")
    with pytest.raises(EngineBuildError, match="--arch sm89 with tensorrt, which builds for the GPU at hand"):
        plan_builder.set_archs(fake(Kinds86), Recorder(), ("sm89",))
    plan_builder.set_archs(fake(Kinds86), Recorder(), ("current",))


class FakeTimings:
    """A configuration with timing caches; one of b"old" is another GPU's."""

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(data=data, serialize=lambda: data + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return bool(cache.data != b"old" or ignore_mismatch)


def test_timing_cache_is_read_and_another_gpus_refused(tmp_path: Path) -> None:
    path = tmp_path / "timings"
    assert plan_builder._read_timings(FakeTimings(), None) is None
    assert plan_builder._read_timings(FakeTimings(), path).data == b""
    path.write_bytes(b"new")
    assert plan_builder._read_timings(FakeTimings(), path).data == b"new"
    path.write_bytes(b"old")
    with pytest.raises(
        EngineBuildError, match=r"timings, which was made by another version or for another GPU"
    ):
        plan_builder._read_timings(FakeTimings(), path)


class FakeContext:
    """An execution context of one input `a` of at most 4 rows and one output `b` of the same shape."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.set: list[tuple[int, ...]] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        self.set.append(shape)
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        return stream != 13


def test_context_binds_and_enqueues() -> None:
    fake = FakeContext()
    context = plan.Context(fake, ["a"], ["b"])
    assert context.bind({"a": [3, 5]}) == {"b": (3, 5)}
    context.enqueue({"a": 512, "b": 1024}, 7)
    assert (fake.addresses, fake.streams) == ({"a": 512, "b": 1024}, [7])
    with pytest.raises(EngineMismatchError, match=r"input a of shape \(5, 5\)"):
        context.bind({"a": [5, 5]})
    with pytest.raises(RuntimeError, match="address of b"):
        context.enqueue({"a": 512, "b": 1}, 7)
    with pytest.raises(RuntimeError, match="refused to enqueue"):
        context.enqueue({"a": 512, "b": 1024}, 13)


class FakeEngine:
    """An engine of two profiles; notes how contexts get their memory."""

    num_optimization_profiles = 2

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def made(self, *notes: Any) -> Any:
        self.notes += notes
        return SimpleNamespace(
            set_optimization_profile_async=lambda profile, stream: True,
            set_device_memory=lambda address, size: self.notes.append((address, size)),
        )

    def create_execution_context(self, *strategy: Any) -> Any:
        return self.made("own", *strategy)


class FakeEngine86(FakeEngine):
    device_memory_size = 512

    def create_execution_context_without_device_memory(self) -> Any:
        return self.made("bare")


class FakeEngine10(FakeEngine):
    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 100 * (profile + 1)


def test_context_sets_shapes_that_change_alone() -> None:
    fake = FakeContext()
    context = plan.Context(fake, ["a"], ["b"])
    for rows in (3, 3, 2, 3):
        assert context.bind({"a": (rows, 5)}) == {"b": (rows, 5)}
    with pytest.raises(EngineMismatchError):
        context.bind({"a": (5, 5)})
    assert context.bind({"a": (3, 5)}) == {"b": (3, 5)}, "what was refused is not what is bound"
    assert fake.set == [(3, 5), (2, 5), (3, 5), (5, 5), (3, 5)]


def bare_plan(engine: FakeEngine, strategies: Any) -> plan.Plan:
    made = object.__new__(plan.Plan)
    made._engine, made._strategies = engine, strategies
    made.inputs, made.outputs = ("a",), ("b",)
    return made


def test_contexts_share_memory_in_each_versions_way() -> None:
    old = bare_plan(FakeEngine86(), None)
    assert [old.scratch_bytes(profile) for profile in (0, 1)] == [512, 512]
    context = old.context(1, 0, 4096)
    assert context._context.device_memory == 4096
    assert old._engine.notes == ["bare"]
    new = bare_plan(FakeEngine10(), SimpleNamespace(USER_MANAGED="user"))
    assert [new.scratch_bytes(profile) for profile in (0, 1)] == [100, 200]
    new.context(1, 0, 4096)
    assert new._engine.notes == ["own", "user", (4096, 200)]
    new.context(0, 0)
    assert new._engine.notes[3:] == ["own"]


def test_plan_modules_need_neither_torch_nor_a_newer_python() -> None:
    """TensorRT 8.6.0 wants Python 3.9, where there is no torch of ours, no pydantic and no typer."""
    script = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pydantic', 'typer', 'yaml', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import arrcoc.lod.plan_builder, arrcoc.lod.plan"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    for name in ("__init__", "errors", "lod/__init__", "lod/plan", "lod/plan_builder"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"), feature_version=(3, 9))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        words = {(getattr(c.func, "id", ""), word.arg) for c in calls for word in c.keywords}
        assert not words & {("zip", "strict"), ("dataclass", "slots"), ("dataclass", "kw_only")}


def test_missing_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        EngineBuildError, match=r"backend tensorrt, .*pip install tensorrt, or choose another"
    ):
        plan.trt_module("tensorrt")


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs arrcoc's extra tensorrt-rtx")


@pytest.fixture(scope="module")
def half(tiny_checkpoint: Path) -> qwen.QwenVL:
    return qwen.load(tiny_checkpoint, CPU, torch.float16)


def recipe(folder: Path, **changes: Any) -> Recipe:
    values = {"preset": "demo", "backend": "tensorrt_rtx", "arch": ARCHS, "out": folder}
    return Recipe.make(values | {"max_batch": (4, 4, 2, 2)} | changes)


@pytest.fixture(scope="module")
def shared_plan(rtx: Any, half: qwen.QwenVL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plan for three architectures and four LODs; do not change it."""
    out = tmp_path_factory.mktemp("plans") / "shared"
    phases = []
    build.build(recipe(out), half, lambda what, done, total: phases.append((what, done, total)))
    assert ("building tower.plan", 0, 0) in phases
    assert any(done == total > 1 for _, done, total in phases), "the builder's own phases are told"
    return out


def test_one_plan_has_a_profile_for_each_lod(shared_plan: Path, half: qwen.QwenVL) -> None:
    made = manifest.read(shared_plan)
    assert made.archs == ARCHS
    assert made.precision == "fp16"
    assert made.weights == half.fingerprint
    assert [(lod.file, lod.profile) for lod in made.lods] == [("tower.plan", i) for i in range(4)]
    assert {path.name for path in shared_plan.iterdir()} == {"manifest.json", "tower.plan"}
    # fp16 weights of the tower, once for all LODs and architectures, and code beside them.
    weights = 2 * sum(p.numel() for p in half.model.model.visual.parameters())
    assert made.files["tower.plan"].bytes > weights


def test_four_plans_where_asked(
    rtx: Any, half: qwen.QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By way of opset 17, as for TensorRT 8.6."""
    monkeypatch.setattr(build, "OPSET", LEGACY_OPSET)
    more = {"separate": True, "arch": ("sm89",), "workspace_gb": 1, "optimization_level": 0}
    made = build.build(recipe(tmp_path / "four", **more), half)
    assert made.opset == 17
    assert [(lod.file, lod.profile) for lod in made.lods] == [(f"side{s}.plan", 0) for s in (1, 2, 3, 4)]
    assert set(made.files) == {f"side{s}.plan" for s in (1, 2, 3, 4)}
    assert made.separate
    assert "--separate" in made.rebuild(tmp_path)


def test_tampered_plan_is_refused_before_it_is_deserialised(
    shared_plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = Path(shutil.copytree(shared_plan, tmp_path / "copy"))
    data = bytearray((copy / "tower.plan").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "tower.plan").write_bytes(data)
    made = manifest.read(copy)
    here: Any = SimpleNamespace(device=torch.device("cuda"), vision=None, dtype=torch.float16)
    with pytest.raises(EngineMismatchError, match=r"sha256 of tower\.plan.*Build again: arrcoc build"):
        BuiltEngines(copy, made, here).engine(2, (1, 2))


def test_a_profile_has_one_runner_however_many_engines(
    shared_plan: Path, half: qwen.QwenVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 8.6 refuses a second context for a profile; two presets may want one side."""
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(built, "Plan", lambda backend, data, name: "plan")
    monkeypatch.setattr(built, "Scratch", lambda plan, device: "scratch")
    monkeypatch.setattr(built, "PlanRunner", lambda plan, profile, device, scratch: made.append(profile))
    here: Any = SimpleNamespace(device=CPU, vision=half.vision, dtype=torch.float16)
    opened = BuiltEngines(shared_plan, manifest.read(shared_plan), here)
    for side in (1, 2, 1, 2):
        opened.engine(side, (1, 2))
    assert made == [0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA driver")
def test_runtime_without_a_driver_says_so(shared_plan: Path) -> None:
    with pytest.raises(EngineMismatchError, match=r"refused: .*CUDA driver"):
        plan.Plan("tensorrt_rtx", (shared_plan / "tower.plan").read_bytes())


@pytest.fixture(scope="module")
def graph(half: qwen.QwenVL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "tower.onnx"
    export(StaticTower(half.vision), path, LEGACY_OPSET)
    return path


def test_refusals_of_parser_and_builder_are_named(
    rtx: Any, half: qwen.QwenVL, graph: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="needs arrcoc's extra onnx")
    model = onnx.load(graph)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmacks"
    onnx.save(model, tmp_path / "odd.onnx")
    options = plan_builder.PlanOptions("fp16", ("sm89",))
    profile = build.profile(half.vision, 1, 0, 1)
    with pytest.raises(EngineBuildError, match=r"odd\.onnx \(at the parser\), refused by .*Softmacks"):
        plan_builder.build("tensorrt_rtx", tmp_path / "odd.onnx", [profile], options)
    wrong = profile | {"cos": ((4, 7), (4, 7), (4, 7))}
    with pytest.raises(EngineBuildError, match="cos"):
        plan_builder.build("tensorrt_rtx", graph, [wrong], options)
    with pytest.raises(EngineBuildError, match=r"architecture 'sm90' with tensorrt_rtx .*sm80, sm86, sm89"):
        plan_builder.build("tensorrt_rtx", graph, [profile], plan_builder.PlanOptions("fp16", ("sm90",)))


class Pinnable:
    """A layer of a real network that notes what is pinned."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.precision, self.types, self.guess = layer, None, [], None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def get_output(self, place: int) -> Any:
        made = self.layer.get_output(place)
        return made if self.guess is None else SimpleNamespace(name=made.name, dtype=self.guess)

    def set_output_type(self, place: int, kind: Any) -> None:
        self.types.append(kind)


@pytest.mark.parametrize("guessed", [False, True], ids=["types known", "every cast said to give fp32"])
def test_types_are_pinned_where_they_are_weak(
    rtx: Any, graph: Path, half: qwen.QwenVL, guessed: bool
) -> None:
    """A strongly typed network knows what is fp32 and what fp16: all of it but the casts is pinned so."""
    log = plan.make_log(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(plan_builder.network_flags(rtx))
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(graph))
    layers = [Pinnable(network.get_layer(i)) for i in range(network.num_layers)]
    kinds = rtx.LayerType
    for layer in layers:
        if guessed and layer.type == kinds.CAST and layer.get_output(0).dtype == rtx.float16:
            layer.guess = rtx.float32
    weak = SimpleNamespace(
        num_inputs=network.num_inputs,
        get_input=network.get_input,
        num_layers=len(layers),
        get_layer=lambda place: layers[place],
    )
    flags = SimpleNamespace(PREFER_PRECISION_CONSTRAINTS="prefer")
    trt = SimpleNamespace(float32=rtx.float32, float16=rtx.float16, LayerType=kinds, BuilderFlag=flags)
    config = Recorder()
    count = plan_builder.pin_types(trt, config, weak, "fp16")
    assert config.set == ["prefer"]
    known = {layer.name: layer.layer.get_output(0).dtype for layer in layers}
    for kind, left in ((rtx.float32, (kinds.CAST,)), (rtx.float16, (kinds.CAST, kinds.CONSTANT))):
        pinned = {layer.name for layer in layers if layer.precision == kind}
        assert pinned == {n.name for n in layers if known[n.name] == kind and n.type not in left}
    assert all(layer.types == [layer.precision] * layer.num_outputs for layer in layers if layer.precision)
    # Of queries and keys: two slices, a negation, a joint, two products and a sum.
    assert count >= 14 * len(half.vision.blocks)


def test_level_is_set_where_there_are_levels() -> None:
    options = plan_builder.PlanOptions("fp16", level=2)
    config = SimpleNamespace(builder_optimization_level=3)
    plan_builder.set_effort(fake(Kinds86), config, options)
    assert config.builder_optimization_level == 2
    with pytest.raises(EngineBuildError, match="optimisation level 2 with tensorrt x"):
        plan_builder.set_effort(fake(Kinds86), Recorder(), options)


def runs_here(backend: str) -> bool:
    """Whether plans of a backend run on this GPU."""
    try:
        trt = plan.trt_module(backend)
    except EngineBuildError:
        return False
    major, minor = torch.cuda.get_device_capability()
    return backend == "tensorrt" or f"sm{major}{minor}" in plan_builder.known_archs(trt)


@pytest.fixture(scope="module")
def built_here(tiny_checkpoint: Path, half: qwen.QwenVL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plan for this GPU, of TensorRT or TensorRT-RTX; do not change it."""
    running = [backend for backend in plan.PLAN_BACKENDS if runs_here(backend)]
    if not running:
        pytest.skip("neither tensorrt nor tensorrt_rtx runs on this GPU")
    out = tmp_path_factory.mktemp("plans") / "here"
    build.build(recipe(out, backend=running[0], arch=("current",), optimization_level=0), half)
    return out


@pytest.fixture(scope="module")
def on_gpu(tiny_checkpoint: Path) -> qwen.QwenVL:
    return qwen.load(tiny_checkpoint, torch.device("cuda"), torch.float16)


@pytest.mark.gpu
def test_plan_computes_what_torch_does(built_here: Path, on_gpu: qwen.QwenVL) -> None:
    """On a GPU that runs plans: every LOD, a padded batch, and two streams in turn."""
    opened = BuiltEngines.open(built_here, on_gpu)
    for side in (1, 2, 3, 4):
        edge = (side + 2) * 32
        pixels = torch.randint(0, 256, (3, 3, edge, edge), dtype=torch.uint8, device="cuda")
        engine, reference = opened.engine(side, (1, 2, 4)), TorchLodEngine(on_gpu, side, (1, 2, 4), 1)
        first = engine.encode(pixels)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            second = engine.encode(pixels.flip(0))
        torch.cuda.synchronize()
        expected = reference.encode(pixels)
        assert relative_error(first.tokens, expected.tokens) < 1e-2
        assert relative_error(first.deepstack, expected.deepstack) < 1e-2
        assert relative_error(second.tokens.flip(0), expected.tokens) < 1e-2


@pytest.mark.gpu
def test_threads_share_a_plan(built_here: Path, on_gpu: qwen.QwenVL) -> None:
    """All LODs from two threads, each on a stream of its own: what one by one gives, to the bit."""
    opened = BuiltEngines.open(built_here, on_gpu)
    engines = {side: opened.engine(side, (1, 2)) for side in (1, 2, 3, 4)}
    made = {
        side: torch.randint(
            0, 256, (2, 3, (side + 2) * 32, (side + 2) * 32), dtype=torch.uint8, device="cuda"
        )
        for side in engines
    }
    alone = {side: engines[side].encode(pixels) for side, pixels in made.items()}
    torch.cuda.synchronize()

    def work(order: list[int]) -> list[bool]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [(side, engines[side].encode(made[side])) for _ in range(20) for side in order]
            torch.cuda.current_stream().synchronize()
            return [torch.equal(features.tokens, alone[side].tokens) for side, features in found]

    with ThreadPoolExecutor(2) as pool:
        agree = [flag for flags in pool.map(work, ([1, 2, 3, 4], [4, 3, 2, 1])) for flag in flags]
    assert len(agree) == 160
    assert all(agree)


@pytest.mark.gpu
def test_an_engine_uses_the_plan(built_here: Path, tiny_checkpoint: Path) -> None:
    picture = Image.linear_gradient("L").rotate(30).resize((384, 384)).convert("RGB")
    given: dict[str, Any] = {"preset": "demo", "device": "cuda", "dtype": "float16"}
    encoded = []
    for more in ({"engines": built_here}, {"lod_engine": "eager"}):
        engine = arrcoc.Engine.from_pretrained(tiny_checkpoint, **given, **more)
        encoded.append(engine.ask(picture, "What is it?", 0.5, max_new_tokens=8).encoding)
        backends = set(engine.describe()["lod_engines"].values())
        assert all(name.startswith("tensorrt") == ("engines" in more) for name in backends)
        engine.close()
    assert relative_error(encoded[0].tokens, encoded[1].tokens) < 1e-2
    assert relative_error(encoded[0].deepstack, encoded[1].deepstack) < 1e-2
