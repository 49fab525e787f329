"""The text decoder's matrices in int8 or float8, with one scale a row, by torchao."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from arrcoc.errors import ConfigError
from arrcoc.qwen import QwenVL

WeightFormat = Literal["bf16", "int8", "float8"]


def quantize_text(qwen: QwenVL, weights: WeightFormat) -> None:
    """Replace the matrices of the decoder's layers, in place; activations stay as they are.

    Embeddings, the vocabulary's matrix and every norm keep the model's precision. A decode step then reads
    half the bytes of bfloat16 for its layers; a prefill widens each matrix when it comes to it.

    Args:
        qwen: the checkpoint; whoever else uses it sees the new weights too.
        weights: `bf16` leaves everything as it is; `int8` is symmetric; `float8` is e4m3.

    Raises:
        ConfigError: torchao is not installed.
    """
    if weights == "bf16":
        return
    if importlib.util.find_spec("torchao") is None:
        given = f"decode_weights={weights!r} without torchao"
        remedy = "Run pip install 'arrcoc[quantized]'"
        raise ConfigError(given, "decode_weights='bf16', or torchao installed", remedy)
    from torchao.quantization import quantize_

    with torch.inference_mode(False), torch.no_grad():
        quantize_(qwen.text_blocks, _recipe(weights))
    qwen.forget_kernels()


def _recipe(weights: Literal["int8", "float8"]) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow

    if weights == "int8":
        return Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    return Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
