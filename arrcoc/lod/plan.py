"""Plans of TensorRT (8.6 and above) and TensorRT-RTX: load, bind, execute.

Free of torch: shapes, device addresses and a stream go in. Runs under Python 3.9 too, which is what the
wheel of TensorRT 8.6.0 wants. `arrcoc.lod.plan_builder` makes plans.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Optional

from arrcoc.errors import EngineBuildError, EngineMismatchError

PLAN_BACKENDS = ("tensorrt", "tensorrt_rtx")
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
_LOG = logging.getLogger(__name__)
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def trt_module(backend: str) -> Any:
    """The Python module of a backend, `tensorrt` or `tensorrt_rtx`: both have one API.

    Raises:
        EngineBuildError: it cannot be imported.
    """
    assert backend in PLAN_BACKENDS, backend
    try:
        return import_module(backend)
    except ImportError as error:
        given = f"backend {backend}, whose Python package cannot be imported ({error})"
        remedy = f"pip install {_PACKAGES[backend]}, or choose another backend"
        raise EngineBuildError(given, "a backend that is installed", remedy) from None


def make_log(trt: Any) -> Any:
    """A logger for a module of `trt_module`; its `.errors` keeps the errors logged, oldest first.

    The library's warnings go to Python's logging as info, its information as debug.
    """
    levels = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == levels.VERBOSE:
                return
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            level = logging.DEBUG if severity == levels.INFO else logging.INFO
            _LOG.log(level, "%s: %s", trt.__name__, message)

    return Log()


class Plan:
    """A deserialised plan: weights on the device, no memory for activations yet."""

    def __init__(self, backend: str, data: bytes, name: str = "the plan") -> None:
        """Deserialise a plan on the current CUDA device.

        Args:
            backend: `tensorrt` or `tensorrt_rtx`.
            data: what `plan_builder.build` gave. Only load what you built or verified: a plan holds code.
            name: what errors call it.

        Raises:
            EngineBuildError: the backend is not installed.
            EngineMismatchError: the runtime refused the plan; its own words are in the message.
        """
        trt = trt_module(backend)
        log = make_log(trt)
        self._log = log  # the runtime does not keep it alive
        self._runtime = _deserializer(trt, log, name)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise _refused(backend, trt, name, log.errors)
        self._strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._engine.get_tensor_mode
        self.inputs: tuple[str, ...] = tuple(n for n in names if mode(n) == trt.TensorIOMode.INPUT)
        self.outputs: tuple[str, ...] = tuple(n for n in names if mode(n) == trt.TensorIOMode.OUTPUT)

    @property
    def n_profiles(self) -> int:
        """Optimisation profiles, one for each LOD that the plan serves."""
        return int(self._engine.num_optimization_profiles)

    def dtype(self, tensor: str) -> str:
        """Precision of an input or output: float32, float16 or bfloat16."""
        return _DTYPES[str(self._engine.get_tensor_dtype(tensor)).rpartition(".")[2]]

    def scratch_bytes(self, profile: int) -> int:
        """Device memory that activations of one profile take; 8.6 tells the largest of all profiles."""
        for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
            if hasattr(self._engine, name):
                return int(getattr(self._engine, name)(profile))
        return int(self._engine.device_memory_size)

    def context(self, profile: int, stream: int, scratch: Optional[int] = None) -> Context:  # noqa: UP045
        """The state to run one profile with.

        Args:
            profile: its index; two contexts of one plan must not share it.
            stream: address of a CUDA stream; wait for it before the first `Context.enqueue` on another.
            scratch: device address of `scratch_bytes(profile)` bytes that outlive the context; contexts that
                never run at once may share them. None leaves the memory to the runtime, for each context.
        """
        assert 0 <= profile < self.n_profiles, (profile, self.n_profiles)
        context = self._bare_context(profile, scratch)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            reason = self._log.errors[-1] if self._log.errors else "no reason given"
            given = f"a context for profile {profile}, which the runtime refused: {reason}"
            raise EngineMismatchError(
                given, "a plan that fits this GPU's memory", "Build for smaller batches"
            )
        return Context(context, self.inputs, self.outputs)

    def _bare_context(self, profile: int, scratch: Optional[int]) -> Any:  # noqa: UP045
        engine, strategies = self._engine, self._strategies
        if scratch is None:
            return engine.create_execution_context()
        if strategies is None:  # up to 9
            context = engine.create_execution_context_without_device_memory()
            if context is not None:
                context.device_memory = scratch
            return context
        context = engine.create_execution_context(strategies.USER_MANAGED)
        if context is not None:
            context.set_device_memory(scratch, self.scratch_bytes(profile))
        return context


class Context:
    """Runs one profile of a plan; one call at a time, and on one stream at a time."""

    def __init__(self, context: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._context, self._inputs, self._outputs = context, tuple(inputs), tuple(outputs)
        self._bound: dict[str, tuple[int, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Set the inputs' shapes where they are others than before; returns the outputs'.

        Raises:
            EngineMismatchError: a shape lies outside the profile.
        """
        assert set(shapes) == set(self._inputs), (sorted(shapes), self._inputs)
        wanted = {name: tuple(shapes[name]) for name in self._inputs}
        if wanted != self._bound:
            self._bound = {}
            for name, shape in wanted.items():
                if not self._context.set_input_shape(name, shape):
                    given = f"input {name} of shape {shape}"
                    raise EngineMismatchError(
                        given, "the shapes that the plan was built for", "Build the engines again"
                    )
            self._shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
            self._bound = wanted
        return dict(self._shapes)

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Start the work on a CUDA stream and return at once.

        Args:
            addresses: device address of every input and output, dense, of the shapes last bound. The memory
                must live until the stream has passed this work.
            stream: address of the stream.
        """
        for name in self._inputs + self._outputs:
            if not self._context.set_tensor_address(name, addresses[name]):
                raise RuntimeError(f"the runtime refused the address of {name}")
        if not self._context.execute_async_v3(stream):
            raise RuntimeError("the runtime refused to enqueue the plan")


def _deserializer(trt: Any, log: Any, name: str) -> Any:
    """A runtime; the bindings raise TypeError where the library gives none, as without a CUDA driver."""
    try:
        return trt.Runtime(log)
    except TypeError:
        raise _refused(trt.__name__, trt, name, log.errors) from None


def _refused(backend: str, trt: Any, name: str, errors: Sequence[str]) -> EngineMismatchError:
    reason = errors[-1] if errors else "no reason given"
    return EngineMismatchError(
        f"{name}, which the runtime of {backend} {trt.__version__} refused: {reason.rstrip('.')}",
        "a plan built by this version of it, for this GPU's architecture",
        "Build the engines again with arrcoc build on this machine, or for its --arch",
    )
