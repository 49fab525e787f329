"""Builds plans of TensorRT (8.6 and above) and TensorRT-RTX from ONNX: one code path, free of torch.

Runs under Python 3.9 too. What differs between versions is asked of the module, never of its version:
8.6 wants `EXPLICIT_BATCH` and takes the precision as a builder flag; later ones are strongly typed, so the
precision is the graph's own; TensorRT-RTX builds for other GPUs than the one at hand, or without any.
Where the precision is a flag, the builder may choose for each layer: each is pinned to what the graph has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from arrcoc.errors import EngineBuildError
from arrcoc.lod.plan import make_log, trt_module

Range = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, typical and largest shape of an input."""
Profile = Mapping[str, Range]
"""Range of every input that has open axes."""
Progress = Callable[[str, int, int], None]
"""(phase, steps done, steps in all); phases nest, an outer one's next step comes after its inner ones."""

CURRENT = "current"
_SHOWN_ERRORS = 3


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is built.

    Attributes:
        precision: fp32, fp16 or bf16: the graph's own precision.
        archs: compute capabilities such as `sm89`, or `current` alone for the GPU at hand.
        workspace_bytes: most memory that one kernel may use besides tensors; None is the library's limit.
        timing_cache: file of kernel timings, read if there and written afterwards.
        level: how long the builder searches for fast kernels, 0 to 5; None is the library's default.
    """

    precision: str
    archs: Sequence[str] = (CURRENT,)
    workspace_bytes: Optional[int] = None  # noqa: UP045
    timing_cache: Optional[Path] = None  # noqa: UP045
    level: Optional[int] = None  # noqa: UP045


def build(
    backend: str,
    onnx: Path,
    profiles: Sequence[Profile],
    options: PlanOptions,
    progress: Progress | None = None,
) -> bytes:
    """Build a plan with one optimisation profile for each LOD.

    Args:
        backend: `tensorrt` or `tensorrt_rtx`.
        onnx: the graph; its weights may lie in a file beside it.
        profiles: in the order of `Plan.context`'s indices.
        options: see `PlanOptions`.
        progress: told of the builder's phases, where the version can.

    Returns:
        The plan, serialised.

    Raises:
        EngineBuildError: the backend is missing, the parser refused a node, or the builder the network, the
            precision or an architecture; each is named, in the library's own words.
    """
    trt = trt_module(backend)
    log = make_log(trt)
    builder = _builder(trt, log)
    network = builder.create_network(network_flags(trt))
    _parse(trt, log, network, onnx)
    config = builder.create_builder_config()
    set_precision(trt, config, options.precision)
    if options.precision != "fp32" and not strongly_typed(trt):
        pin_types(trt, config, network, options.precision)
    set_archs(trt, config, options.archs)
    set_effort(trt, config, options)
    for number, profile in enumerate(profiles):
        _add_profile(builder, config, number, profile)
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)
    cache = _read_timings(config, options.timing_cache)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise _refused(trt, log, f"a network for {', '.join(options.archs)} in {options.precision}")
    if cache is not None and options.timing_cache is not None:
        _write_atomically(options.timing_cache, bytes(memoryview(cache.serialize())))
    return bytes(memoryview(data))


def network_flags(trt: Any) -> int:
    """Bits for `create_network`: explicit batch where it must be said, strong typing where there is such."""
    kinds = trt.NetworkDefinitionCreationFlag
    wanted = [getattr(kinds, name, None) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED")]
    return sum(1 << int(kind) for kind in wanted if kind is not None)


def strongly_typed(trt: Any) -> bool:
    """Whether networks take their precision from the graph; such versions also read ONNX above opset 17."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def known_archs(trt: Any) -> dict[str, Any]:
    """Compute capabilities that a module builds for, such as `sm89`, besides that of the GPU at hand."""
    known = getattr(trt, "ComputeCapability", None)
    members = {} if known is None else known.__members__
    return {name.lower(): member for name, member in members.items() if name.startswith("SM")}


def set_precision(trt: Any, config: Any, precision: str) -> None:
    """Set the builder flags that a precision needs.

    A strongly typed network computes in the graph's own types, and needs none; fp32 means fp32, not TF32.

    Raises:
        EngineBuildError: the version has neither strong typing nor the precision.
    """
    flags = trt.BuilderFlag
    if precision == "fp32":
        config.clear_flag(flags.TF32)
        return
    if strongly_typed(trt):
        return
    flag = getattr(flags, precision.upper(), None)
    if flag is None:
        given = f"precision {precision} with {trt.__name__} {trt.__version__}, which does not have it"
        raise EngineBuildError(given, "fp16 or fp32", "Choose one of these")
    config.set_flag(flag)


def pin_types(trt: Any, config: Any, network: Any, precision: str) -> int:
    """Have a weakly typed builder compute in fp32 what the graph casts to it, and the rest in its precision.

    What is in fp32, as the rotary embedding is, is followed from inputs and casts to it up to the casts out
    of it: the types that such a network tells of its tensors are guesses before it is built, and 8.6.0 says
    fp32 of what any cast gives. The rest is pinned too, as a builder that searches little takes fp32.

    Returns:
        How many layers were pinned to fp32.
    """
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    kinds, narrow = trt.LayerType, {"fp16": "float16", "bf16": "bfloat16"}[precision]
    floats = (trt.float32, getattr(trt, narrow))
    wide = {t.name for t in map(network.get_input, range(network.num_inputs)) if t.dtype == trt.float32}
    pinned = 0
    for layer in map(network.get_layer, range(network.num_layers)):
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        in_fp32 = any(t is not None and t.name in wide for t in inputs)
        gives_floats = all(t.dtype in floats for t in outputs)
        if layer.type == kinds.CAST:
            wide.update(t.name for t in outputs if t.dtype == trt.float32 and not in_fp32)
        elif layer.type != kinds.SHAPE and in_fp32 and gives_floats:
            wide.update(t.name for t in outputs)
            _pin(layer, trt.float32)
            pinned += 1
        elif layer.type not in (kinds.SHAPE, kinds.CONSTANT) and gives_floats:
            _pin(layer, floats[1])
    return pinned


def _pin(layer: Any, kind: Any) -> None:
    layer.precision = kind
    for place in range(layer.num_outputs):
        layer.set_output_type(place, kind)


def set_effort(trt: Any, config: Any, options: PlanOptions) -> None:
    """Set how much memory and time the builder may take.

    Raises:
        EngineBuildError: the version has no such levels.
    """
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.level is None:
        return
    if not hasattr(config, "builder_optimization_level"):
        given = f"optimisation level {options.level} with {trt.__name__} {trt.__version__}"
        raise EngineBuildError(given, "8.6 and above", "Leave it out")
    config.builder_optimization_level = options.level


def set_archs(trt: Any, config: Any, archs: Sequence[str]) -> None:
    """Name the compute capabilities to build for; `current` alone leaves it to the GPU at hand.

    Raises:
        EngineBuildError: an architecture that the backend does not build for.
    """
    known = getattr(trt, "ComputeCapability", None)
    if known is None and tuple(archs) == (CURRENT,):
        return
    if known is None:
        given = f"--arch {','.join(archs)} with {trt.__name__}, which builds for the GPU at hand"
        raise EngineBuildError(given, "current", "Choose this, or the backend tensorrt_rtx")
    members = known_archs(trt)
    if len(archs) == 1:
        members[CURRENT] = known.CURRENT
    for arch in archs:
        if arch not in members:
            given = f"architecture {arch!r} with {trt.__name__} {trt.__version__}"
            raise EngineBuildError(given, f"{CURRENT} alone, or {', '.join(members)}", "Choose among these")
    config.num_compute_capabilities = len(archs)
    for place, arch in enumerate(archs):
        if not config.set_compute_capability(members[arch], place):
            raise EngineBuildError(f"architecture {arch!r}, which was refused", "others", "Leave it out")


def _builder(trt: Any, log: Any) -> Any:
    """A builder; the bindings raise TypeError where the library gives none."""
    try:
        return trt.Builder(log)
    except TypeError:
        raise _refused(trt, log, "a build on this machine") from None


def _parse(trt: Any, log: Any, network: Any, onnx: Path) -> None:
    parser = trt.OnnxParser(network, log)
    # From the file and not from bytes: weights in a file beside the graph are found by its path.
    if parser.parse_from_file(str(onnx)):
        return
    errors = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
    raise _refused(trt, log, f"the graph {onnx.name} (at the parser)", errors)


def _describe(error: Any) -> str:
    """A parser's error: which node, and why."""
    named = hasattr(error, "node_name")
    where = f"{error.node_operator()} {error.node_name()!r}" if named else f"node {error.node()}"
    return f"{where}: {' '.join(error.desc().split())}"


def _add_profile(builder: Any, config: Any, number: int, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for name, (least, typical, most) in profile.items():
        made.set_shape(name, tuple(least), tuple(typical), tuple(most))
    if config.add_optimization_profile(made) < 0:
        raise EngineBuildError(
            f"profile {number}: {dict(profile)}", "shapes the graph takes", "Correct the sizes"
        )


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            progress(phase_name, self.steps[phase_name], self.steps[phase_name])

    return Monitor()


def _read_timings(config: Any, path: Path | None) -> Any:
    """The timing cache that a build fills, from a file if it is there; None where none is asked for."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        given = f"timing cache {path}, which was made by another version or for another GPU"
        raise EngineBuildError(
            given, "a cache of this builder and this GPU", "Name another file, or remove it"
        )
    return cache


def _write_atomically(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _refused(trt: Any, log: Any, given: str, errors: Sequence[str] = ()) -> EngineBuildError:
    reasons = "; ".join(list(errors or log.errors)[:_SHOWN_ERRORS]) or "no reason given"
    return EngineBuildError(
        f"{given}, refused by {trt.__name__} {trt.__version__}: {reasons.rstrip('.')}",
        "what this version builds",
        "Choose another precision, architecture or backend, or another version",
    )
