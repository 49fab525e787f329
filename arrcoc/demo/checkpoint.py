"""An untrained Qwen3-VL in the stock folder format, made on the spot: for tests and benchmarks, and to train.

The weights have unit scale (matrices 1/sqrt(fan_in), embeddings 1), unlike the stock initialiser's 0.02,
under which attention is nearly uniform and a wrong RoPE or DeepStack plane hardly changes the output.
"""

from __future__ import annotations

import json
import shutil
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from arrcoc.errors import ConfigError, ModelError

SizeName = Literal["tiny", "reader", "2b"]

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VISION_PAD = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    VISION_PAD,
    IMAGE_PAD,
    VIDEO_PAD,
)
"""Qwen's special tokens, in the order of their ids."""

_RECIPE = 3  # Raise when the bytes of a checkpoint change, so that cached ones are made anew.
_RECIPE_FILE = "arrcoc_checkpoint.json"
_WORD_PIECES = 1024
# The mergers' `linear_fc2` writes no residual stream and stays out of this for want of `mlp.`.
_RESIDUAL_WRITERS = ("attn.proj.weight", "mlp.linear_fc2.weight", "o_proj.weight", "down_proj.weight")
# The pre-tokenisation pattern of Qwen2, Qwen2.5 and Qwen3.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Size:
    """Dimensions of one checkpoint; the text model's width is also the vision tower's output width."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    mrope_section: tuple[int, int, int]
    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    deepstack: tuple[int, ...]
    dtype: Literal["float32", "bfloat16"]
    theta: float = 1000.0


_SIZES: dict[str, _Size] = {
    "tiny": _Size(4, 64, 4, 2, 128, (4, 2, 2), 4, 64, 4, 128, (0, 1, 2), "float32"),
    "reader": _Size(7, 256, 4, 2, 768, (12, 10, 10), 6, 256, 4, 1024, (1, 3), "bfloat16", 10_000.0),
    "2b": _Size(28, 2048, 16, 8, 6144, (24, 20, 20), 24, 1024, 16, 4096, (5, 11, 17), "bfloat16", 5e6),
}


def make_checkpoint(folder: str | Path, seed: int = 0, size: SizeName = "tiny", more_text: str = "") -> Path:
    """Write an untrained Qwen3-VL that stock transformers loads by `from_pretrained(folder)`.

    The folder appears whole or not at all, and two processes may make the same one at once. A folder
    that already holds this very checkpoint is left as it is.

    Args:
        folder: where to write; must not exist, be empty, or hold the same checkpoint.
        seed: of the weights.
        size: `tiny` (text 4 x 64, vision 4 x 64, fp32), `reader` (text 7 x 256, vision 6 x 256, bf16), which
            is trained on placards, or `2b` (the layers of Qwen3-VL-2B with this small vocabulary, bf16,
            3.4 GB), for benchmarks on a GPU.
        more_text: text to train the tokenizer on, besides the bundled one.

    Returns:
        The folder's absolute path.

    Raises:
        ConfigError: unknown size.
        ModelError: the folder holds something else, or cannot be written.
    """
    if size not in _SIZES:
        raise ConfigError(f"checkpoint size {size!r}", " or ".join(_SIZES), "Choose one of these")
    target = Path(folder).absolute()
    recipe = {"recipe": _RECIPE, "seed": seed, "size": size, "more_text": zlib.crc32(more_text.encode())}
    if _holds(target, recipe):
        return target
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        _write(scratch, seed, _SIZES[size], recipe, more_text)
        _move(scratch, target, recipe)
    except OSError as error:
        raise ModelError(
            f"folder {target}: {error.strerror}", "a writable folder", "Name another one"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def unit_scale_weights(config: Qwen3VLConfig, seed: int) -> dict[str, Tensor]:
    """State dict of a Qwen3-VL with weights of unit scale, fp32 on the CPU.

    Matrices have standard deviation 1/sqrt(fan_in); those that write to the residual stream are scaled
    by a further 1/sqrt(2*depth) (Radford et al. 2019, section 2.3), so that activations stay O(1).
    Embeddings have 1; norm weights are 1 + 0.1*N(0, 1) and biases 0.1*N(0, 1), so that no two are alike.

    Args:
        config: the model's configuration.
        seed: of the CPU generator that draws every weight, in alphabetical order of the names.
    """
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in Qwen3VLForConditionalGeneration(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    text: Any = config.text_config
    vision: Any = config.vision_config
    depths = (vision.depth, text.num_hidden_layers)
    return {name: _draw(name, shapes[name], depths, generator) for name in sorted(shapes)}


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE with Qwen's pre-tokenisation and special tokens, trained on `text`; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_WORD_PIECES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _draw(name: str, shape: torch.Size, depths: tuple[int, int], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return 0.1 * noise
    if "norm" in name:
        return 1 + 0.1 * noise
    if "embed_tokens" in name or "pos_embed" in name:
        return noise
    noise /= shape[1:].numel() ** 0.5
    depth = depths[0] if ".visual.blocks." in name else depths[1]
    residual = name.endswith(
        (".attn.proj.weight", ".mlp.linear_fc2.weight", ".o_proj.weight", ".down_proj.weight")
    )
    return noise / (2 * depth) ** 0.5 if residual else noise


def _holds(folder: Path, recipe: dict[str, Any]) -> bool:
    try:
        found = json.loads((folder / _RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == recipe)


def _move(scratch: Path, target: Path, recipe: dict[str, Any]) -> None:
    """Rename into place; a folder that stands there already is fine if it is the same checkpoint."""
    try:
        scratch.rename(target)
    except OSError:
        if not target.exists():
            raise
        if not _holds(target, recipe):
            given = f"folder {target}, which holds something else"
            raise ModelError(given, "a new or an empty folder", "Name another one, or remove it") from None


def _write(folder: Path, seed: int, size: _Size, recipe: dict[str, Any], more_text: str) -> None:
    demo = resources.files("arrcoc.demo")
    tokenizer = train_tokenizer(demo.joinpath("corpus.txt").read_text(encoding="utf-8") + more_text)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = demo.joinpath("chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, content in _json_files(size, tokenizer):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = unit_scale_weights(Qwen3VLConfig(**_model_config(size, tokenizer)), seed)
    dtype = getattr(torch, size.dtype)
    stored = {name: weight.to(dtype) for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / _RECIPE_FILE).write_text(json.dumps(recipe) + "\n", encoding="utf-8")


def _json_files(size: _Size, tokenizer: Tokenizer) -> Iterator[tuple[str, dict[str, Any]]]:
    ends = [_id(tokenizer, IM_END), _id(tokenizer, END_OF_TEXT)]
    yield "config.json", _model_config(size, tokenizer)
    yield "generation_config.json", {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]}
    yield "tokenizer_config.json", _TOKENIZER_CONFIG
    yield "preprocessor_config.json", _IMAGE_PROCESSOR
    yield "video_preprocessor_config.json", _VIDEO_PROCESSOR


def _id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return int(index)


def _model_config(size: _Size, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {token: _id(tokenizer, token) for token in SPECIAL_TOKENS}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": size.dtype,
        "image_token_id": ids[IMAGE_PAD],
        "video_token_id": ids[VIDEO_PAD],
        "vision_start_token_id": ids[VISION_START],
        "vision_end_token_id": ids[VISION_END],
        "tie_word_embeddings": False,
        "text_config": _text_config(size, tokenizer.get_vocab_size(), ids),
        "vision_config": _vision_config(size),
    }


def _text_config(size: _Size, vocab: int, ids: dict[str, int]) -> dict[str, Any]:
    # A theta of 5e6 over so few rotary pairs would leave h and w nearly unrotated.
    rope = {"rope_type": "default", "mrope_section": list(size.mrope_section), "mrope_interleaved": True}
    return {
        "model_type": "qwen3_vl_text",
        "vocab_size": vocab,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.width // size.heads,
        "max_position_embeddings": 32768,
        "rope_scaling": rope,
        "rope_theta": size.theta,
        "eos_token_id": ids[IM_END],
        "pad_token_id": ids[END_OF_TEXT],
    }


def _vision_config(size: _Size) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl",
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "num_heads": size.vision_heads,
        "intermediate_size": size.vision_mlp,
        "out_hidden_size": size.width,
        "deepstack_visual_indexes": list(size.deepstack),
        "num_position_embeddings": 2304,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


_TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_prefix_space": False,
    "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": IM_END,
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": END_OF_TEXT,
    "split_special_tokens": False,
    "unk_token": None,
}
_PATCHES: dict[str, Any] = {
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Qwen3-VL's own least size is 65536 px; one token's worth lets a single tile pass unscaled.
_IMAGE_PROCESSOR: dict[str, Any] = _PATCHES | {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 1024, "longest_edge": 16777216},
}
_VIDEO_PROCESSOR: dict[str, Any] = _PATCHES | {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"shortest_edge": 4096, "longest_edge": 25165824},
}
