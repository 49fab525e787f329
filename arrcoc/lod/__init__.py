"""LOD engines: encoders of static shape behind one protocol."""

from arrcoc.lod.protocol import LodEngine
from arrcoc.lod.torch_engine import TorchLodEngine

__all__ = ["LodEngine", "TorchLodEngine"]
