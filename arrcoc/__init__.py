"""arrcoc: answers about images with Qwen-VL, vision tokens spent only where the question needs them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from arrcoc.errors import (
    ArrcocError,
    BudgetError,
    ConfigError,
    DecodeError,
    EncodingError,
    EngineBuildError,
    EngineMismatchError,
    ImageError,
    ModelError,
    QueryError,
)

if TYPE_CHECKING:
    from arrcoc.answer import Answer, AnswerStream
    from arrcoc.config import Config
    from arrcoc.decode import Sampling
    from arrcoc.encoding import Encoding
    from arrcoc.engine import Engine
    from arrcoc.records import Channel, Layout, Lod
    from arrcoc.session import Session

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerStream",
    "ArrcocError",
    "BudgetError",
    "Channel",
    "Config",
    "ConfigError",
    "DecodeError",
    "Encoding",
    "EncodingError",
    "Engine",
    "EngineBuildError",
    "EngineMismatchError",
    "ImageError",
    "Layout",
    "Lod",
    "ModelError",
    "QueryError",
    "Sampling",
    "Session",
]

_HOMES = {
    "Answer": "answer",
    "AnswerStream": "answer",
    "Channel": "records",
    "Config": "config",
    "Encoding": "encoding",
    "Engine": "engine",
    "Layout": "records",
    "Lod": "records",
    "Sampling": "decode",
    "Session": "session",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch takes seconds, and `arrcoc --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
