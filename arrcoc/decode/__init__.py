"""Decoders: text out of a prompt of embeddings."""

from arrcoc.decode.protocol import Decoder, Sampling
from arrcoc.decode.transformers_decoder import TransformersDecoder

__all__ = ["Decoder", "Sampling", "TransformersDecoder"]
