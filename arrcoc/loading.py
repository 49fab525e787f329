"""Reads the parts of a checkpoint from a local folder or the Hugging Face hub, and says readably why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

from arrcoc.errors import ModelError

ARCHITECTURE = "qwen3_vl"

PixelStats = tuple[Sequence[float], Sequence[float]]


class Parts(NamedTuple):
    """A checkpoint as transformers loads it.

    Attributes:
        model: stock Qwen3-VL on the CPU.
        tokenizer: with a chat template.
        pixel_stats: mean and std of pixels in [0, 1], three channels each.
    """

    model: Any
    tokenizer: Any
    pixel_stats: PixelStats


def read(name: str | Path, dtype: torch.dtype) -> Parts:
    """Read a Qwen3-VL checkpoint from a local folder or, by its hub name, from the Hugging Face hub.

    Args:
        name: a folder, or a hub name like `Qwen/Qwen3-VL-2B-Instruct`.
        dtype: precision of the weights.

    Raises:
        ModelError: nothing there, files missing or damaged, weights missing, or another architecture.
    """
    source = _source(name)
    config = _part(source, "config.json", lambda: AutoConfig.from_pretrained(source))
    if config.model_type != ARCHITECTURE:
        given = f"{source} is a {config.model_type!r} model"
        raise ModelError(given, f"Qwen3-VL ({ARCHITECTURE!r})", "Choose a Qwen3-VL checkpoint")
    tokenizer = _part(source, "the tokenizer", lambda: AutoTokenizer.from_pretrained(source))
    _check_tokenizer(source, tokenizer, config)
    stats = _part(source, "preprocessor_config.json", lambda: _pixel_stats(source))
    return Parts(_weights(source, dtype), tokenizer, stats)


def _source(name: str | Path) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    is_hub_name = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if path.exists() or not is_hub_name:
        raise ModelError(
            f"model {str(name)!r} is {'a file' if path.exists() else 'not there'}",
            "a folder with a Qwen3-VL checkpoint or a hub name like Qwen/Qwen3-VL-2B-Instruct",
            "Check the path",
        )
    return str(name)


def _part(source: str, what: str, read_it: Callable[[], Any]) -> Any:
    try:
        return read_it()
    # transformers, tokenizers (bare Exception) and safetensors raise many kinds on damaged files.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        given = f"{source}: {what} cannot be loaded ({reason.splitlines()[0].rstrip('.')})"
        if Path(source).is_dir():
            raise ModelError(given, "a complete Qwen3-VL checkpoint", "Copy or download it again") from error
        raise ModelError(
            given,
            "a local folder, or a hub name while the Hugging Face hub can be reached",
            "Neither a folder nor a hub model of this name was found: check the name and the connection, "
            "or download the checkpoint elsewhere and name its folder",
        ) from error


def _check_tokenizer(source: str, tokenizer: Any, config: Any) -> None:
    """transformers makes an empty tokenizer, without a word, of a folder that lacks the tokenizer's files."""
    if tokenizer.convert_ids_to_tokens(config.image_token_id) not in tokenizer.added_tokens_encoder:
        raise ModelError(
            f"{source}: the tokenizer has no image token (id {config.image_token_id})",
            "the tokenizer files that belong to the checkpoint",
            "Copy or download tokenizer.json and tokenizer_config.json again",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{source} has no chat template", "a Qwen3-VL checkpoint with one", "Copy chat_template.jinja"
        )
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    ids = _part(
        source,
        "the chat template",
        lambda: tokenizer.apply_chat_template(turn, tokenize=True, return_dict=True)["input_ids"],
    )
    if list(ids).count(config.image_token_id) != 1:
        given = f"{source}: the chat template places no image token"
        raise ModelError(given, "a Qwen3-VL chat template", "Copy chat_template.jinja from the checkpoint")


def _weights(source: str, dtype: torch.dtype) -> Any:
    stock: Any = Qwen3VLForConditionalGeneration  # its hints leave out the pair that loading info makes
    model, info = _part(
        source,
        "weights",
        lambda: stock.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        ),
    )
    lacking = sorted(info["missing_keys"]) or sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lacking:
        given = f"{source}: {len(lacking)} weights missing or of another shape, for example {lacking[0]}"
        raise ModelError(given, "a complete Qwen3-VL checkpoint", "Copy or download it again")
    return model


def _pixel_stats(source: str) -> PixelStats:
    values, _ = ImageProcessingMixin.get_image_processor_dict(source)
    values = values.get("image_processor", values)
    half = (0.5, 0.5, 0.5)  # Qwen3-VL's own, where a file leaves them out
    mean, std = ([float(v) for v in values.get(key, half)] for key in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"image_mean {mean}, image_std {std}")
    return mean, std
