"""Qwen3-VL of a published size with random weights, made on the device itself: for times, not for answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.qwen import QwenVL


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of text model and vision tower, as Qwen published them."""

    layers: int
    width: int
    heads: int
    mlp: int
    vision_layers: int
    vision_width: int
    vision_mlp: int
    deepstack: tuple[int, ...]


SIZES = {
    "2b": Size(28, 2048, 16, 6144, 24, 1024, 4096, (5, 11, 17)),
    "8b": Size(36, 4096, 32, 12288, 27, 1152, 4304, (8, 16, 24)),
}


def random_qwen(
    name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, layers: int | None = None
) -> QwenVL:
    """A checkpoint of size `2b` or `8b` with normal weights of standard deviation 0.02.

    Tokenizer and chat template are the bundled checkpoint's; `layers` is how many the text model has.
    """
    folder, _ = bundled_checkpoint()
    size = SIZES[name] if layers is None else replace(SIZES[name], layers=layers)
    config = Qwen3VLConfig(**_config(size, json.loads((folder / "config.json").read_text("utf-8"))))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = Qwen3VLForConditionalGeneration(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in model.parameters():
        tensor.normal_(std=0.02, generator=generator)
        if tensor.ndim == 1 and len(tensor) > 1:
            tensor.add_(1)  # norm weights; biases of 1 do no harm
    text = model.model.language_model  # its frequencies are computed, not drawn
    text.rotary_emb = type(text.rotary_emb)(config.text_config).to(device)
    stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return QwenVL(model, AutoTokenizer.from_pretrained(folder), stats)


def _config(size: Size, bundled: dict[str, Any]) -> dict[str, Any]:
    text = bundled["text_config"] | {
        "num_hidden_layers": size.layers,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_attention_heads": size.heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    }
    text.pop("rope_parameters", None)
    text.pop("layer_types", None)
    vision = bundled["vision_config"] | {
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "num_heads": 16,
        "intermediate_size": size.vision_mlp,
        "out_hidden_size": size.width,
        "deepstack_visual_indexes": list(size.deepstack),
    }
    return bundled | {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
