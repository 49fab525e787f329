"""The public names and signatures that the README and issue 2 promise."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import arrcoc
from arrcoc import errors

EMPTY = inspect.Parameter.empty
ENGINE: dict[str, list[tuple[str, Any]]] = {
    "from_pretrained": [
        *(("model", None), ("preset", "auto"), ("device", "auto"), ("dtype", "auto"), ("engines", None)),
        ("**overrides", EMPTY),
    ],
    "encode": [("image", EMPTY), ("question", EMPTY), ("budget", None)],
    "ask": [
        *(("image", EMPTY), ("question", EMPTY), ("budget", None)),
        *(("max_new_tokens", None), ("temperature", 0.0), ("**sampling", EMPTY)),
    ],
    "stream": [
        *(("image", EMPTY), ("question", EMPTY), ("budget", None)),
        *(("max_new_tokens", None), ("temperature", 0.0), ("**sampling", EMPTY)),
    ],
    "chat": [
        *(("messages", EMPTY), ("budget", None)),
        *(("max_new_tokens", None), ("temperature", 0.0), ("**sampling", EMPTY)),
    ],
    "open": [("image", EMPTY), ("budget", None), ("conversation", False)],
    "prefix_stats": [],
    "describe": [],
    "cache_stats": [],
    "evict_low_relevance": [("threshold", EMPTY)],
}
ENCODING = [
    *("tokens", "deepstack", "positions", "lod", "relevance", "scores", "tensions", "n_tokens"),
    *("full_tokens", "timings", "plot", "save", "load", "segments", "sides", "layout", "question"),
    *("budget", "share", "lod_counts", "source_size", "distortion"),
]


@pytest.mark.parametrize("name", ENGINE)
def test_signatures_of_the_engine(name: str) -> None:
    method = getattr(arrcoc.Engine, name)
    found = [
        (("**" if p.kind is p.VAR_KEYWORD else "") + p.name, p.default)
        for p in inspect.signature(method).parameters.values()
        if p.name != "self"
    ]
    assert found == ENGINE[name]


def test_names_of_encoding_and_answer() -> None:
    for name in ENCODING:
        assert hasattr(arrcoc.Encoding, name), name
    for name in ("text", "encoding", "encodings", "timings", "prompt_tokens", "new_tokens", "finish"):
        assert hasattr(arrcoc.Answer, name), name
    assert list(inspect.signature(arrcoc.Encoding.plot).parameters) == ["self", "path"]
    assert inspect.signature(arrcoc.Encoding.plot).parameters["path"].default is None
    assert list(inspect.signature(arrcoc.Encoding.save).parameters) == ["self", "path"]
    assert list(inspect.signature(arrcoc.Encoding.load).parameters) == ["path", "device"]


def test_every_error_class_is_public_and_an_arrcoc_error() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
    assert set(kinds) >= {
        *("ArrcocError", "ConfigError", "ImageError", "QueryError", "BudgetError", "ModelError"),
        *("EngineBuildError", "EngineMismatchError", "DecodeError"),
    }
    for name, kind in kinds.items():
        assert name in arrcoc.__all__
        assert getattr(arrcoc, name) is kind
        assert issubclass(kind, arrcoc.ArrcocError)
        assert (
            str(kind("7 cats", "at most 3", "Give some away"))
            == "7 cats. Allowed: at most 3. Give some away."
        )


def test_all_names_resolve_and_are_sorted() -> None:
    assert list(arrcoc.__all__) == sorted(arrcoc.__all__)
    for name in arrcoc.__all__:
        assert getattr(arrcoc, name).__name__ == name
        assert name in dir(arrcoc)
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        arrcoc.Engin  # noqa: B018


def _public(module: str) -> list[tuple[str, Any]]:
    loaded = importlib.import_module(module)
    own = [(n, v) for n, v in vars(loaded).items() if getattr(v, "__module__", "") == module and n[0] != "_"]
    members = [
        (f"{n}.{m}", v) for n, c in own if inspect.isclass(c) for m, v in vars(c).items() if m[0] != "_"
    ]
    callables = [(n, getattr(v, "__func__", v)) for n, v in members]
    return own + [(n, v) for n, v in callables if inspect.isfunction(v) or isinstance(v, property)]


PACKAGE = Path(arrcoc.__file__).parent
MODULES = sorted(f"arrcoc.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem[0] != "_")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_and_class_says_what_it_does(module: str) -> None:
    assert (importlib.import_module(module).__doc__ or "").strip()
    for name, value in _public(module):
        if inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, property):
            assert (value.__doc__ or "").strip(), f"{module}.{name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_prints_outside_the_command_line(path: Path) -> None:
    if path.stem in {"cli", "console", "__main__"} or "demo" in path.parts:
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
