"""LOD engines: encoders of static shape behind one protocol."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arrcoc.lod.built import BuiltEngines
    from arrcoc.lod.protocol import LodEngine
    from arrcoc.lod.torch_engine import TorchLodEngine
    from arrcoc.lod.torch_engines import TorchEngines

__all__ = ["BuiltEngines", "LodEngine", "TorchEngines", "TorchLodEngine"]

_HOMES = {
    "BuiltEngines": "built",
    "LodEngine": "protocol",
    "TorchEngines": "torch_engines",
    "TorchLodEngine": "torch_engine",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `arrcoc.lod.plan` also runs where there is no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
