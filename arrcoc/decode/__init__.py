"""Decoders: text out of a prompt of embeddings."""

from arrcoc.decode.batch import BatchDecoder
from arrcoc.decode.choice import make_decoder
from arrcoc.decode.graphed_decoder import GraphedDecoder
from arrcoc.decode.protocol import Decoder, Sampling
from arrcoc.decode.quantized import quantize_text
from arrcoc.decode.speculative import SpeculativeDecoder
from arrcoc.decode.transformers_decoder import TransformersDecoder

__all__ = [
    "BatchDecoder",
    "Decoder",
    "GraphedDecoder",
    "Sampling",
    "SpeculativeDecoder",
    "TransformersDecoder",
    "make_decoder",
    "quantize_text",
]
