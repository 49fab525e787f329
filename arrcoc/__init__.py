"""arrcoc: answers about images with Qwen-VL, vision tokens spent only where the question needs them."""

from arrcoc.answer import Answer, AnswerStream
from arrcoc.config import Config
from arrcoc.decode import Sampling
from arrcoc.encoding import Encoding
from arrcoc.engine import Engine
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
from arrcoc.records import Channel, Layout, Lod

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
]
