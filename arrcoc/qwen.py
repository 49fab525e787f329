"""The only module that knows Hugging Face's attribute paths of Qwen-VL.

Everything else sees `QwenVL`: a tokenizer and chat template, the vision weights as plain modules, and the
text decoder as a stack of layers that can be run in part, over a cache of the caller's.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.image_processing_base import ImageProcessingMixin

from arrcoc.errors import ModelError, QueryError
from arrcoc.kv import KvCache
from arrcoc.records import Query

logger = logging.getLogger(__name__)

ARCHITECTURE = "qwen3_vl"
_TEMPORAL = 2  # an image is a clip of two equal frames to the patch convolution
_VISION_THETA = 10_000.0


class Block(NamedTuple):
    """One vision transformer block: pre-norm attention, pre-norm MLP."""

    norm1: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    norm2: nn.Module
    mlp: nn.Module


class Merger(NamedTuple):
    """2x2 patch merger; `norm_after` says whether it normalises after the four patches are joined."""

    norm: nn.Module
    fc1: nn.Linear
    activation: nn.Module
    fc2: nn.Linear
    norm_after: bool


@dataclass(frozen=True)
class VisionWeights:
    """The stock vision tower, taken apart.

    Attributes:
        patch_weight: [hidden, 3 * 2 * patch**2], the patch convolution as a matrix.
        patch_bias: [hidden].
        position_table: [side**2, hidden], learned positions of a square grid.
        mean, std: per channel, of pixels in [0, 1].
    """

    patch_weight: Tensor
    patch_bias: Tensor
    position_table: Tensor
    blocks: tuple[Block, ...]
    merger: Merger
    deepstack: dict[int, Merger]
    heads: int
    patch: int
    merge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def hidden(self) -> int:
        """Width of the tower."""
        return int(self.patch_bias.shape[0])

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def token_px(self) -> int:
        """Pixels along the edge of one merged token."""
        return self.patch * self.merge


class SpecialTokens(NamedTuple):
    """Ids of the tokens that arrcoc itself must place or find."""

    image_pad: int
    vision_start: int
    vision_end: int


class QwenVL:
    """A loaded Qwen-VL checkpoint; holds no state of any request."""

    def __init__(self, model: Any, tokenizer: Any, pixel_stats: tuple[Sequence[float], Sequence[float]]) -> None:
        """Args: stock model in eval mode, its tokenizer, mean and std of pixels in [0, 1]."""
        self.model, self.tokenizer = model, tokenizer
        self._pixel_stats = pixel_stats
        self._text = model.model.language_model
        config = model.config
        self.special = SpecialTokens(config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)

    # Facts about the checkpoint.

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._text.embed_tokens.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self._text.embed_tokens.weight.dtype  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """D, width of the text model."""
        return int(self._text.config.hidden_size)

    @property
    def n_layers(self) -> int:
        """Layers of the text model."""
        return len(self._text.layers)

    @property
    def max_positions(self) -> int:
        """Longest context the checkpoint was made for, in tokens."""
        return int(self._text.config.max_position_embeddings)

    @property
    def name(self) -> str:
        """Where the checkpoint came from."""
        return str(self.model.config._name_or_path)

    @property
    def n_parameters(self) -> int:
        """Parameters of vision and text together."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer, from the generation config and the tokenizer."""
        declared = self.model.generation_config.eos_token_id
        ids = [declared] if isinstance(declared, int) else list(declared or [])
        return frozenset([*ids, *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])])

    @cached_property
    def vision(self) -> VisionWeights:
        """The vision tower's weights."""
        return vision_weights(self.model, self._pixel_stats)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the vision weights, their precision and the pixel normalisation.

        Two checkpoints with the same fingerprint encode pixels to the same features.
        """
        digest = hashlib.blake2b(repr((self._pixel_stats, ARCHITECTURE)).encode(), digest_size=16)
        for name, tensor in sorted(self.model.model.visual.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_checksum(tensor))
        return digest.hexdigest()

    # Text.

    def query(self, question: str) -> Query:
        """A question as a record: its token ids and the mean of their embeddings, fp32 [D]."""
        self.check_text(question)
        ids = tuple(self.tokenizer(question, add_special_tokens=False).input_ids)
        return Query(question, ids, self.embed(ids).float().mean(0))

    def check_text(self, text: str) -> None:
        """Raise `QueryError` if text holds one of the tokenizer's control tokens.

        A control token inside a question would be read as prompt structure: an image that is not there,
        or a turn that nobody took.
        """
        for token in self._control_tokens:
            if token in text:
                raise QueryError(f"text with the control token {token}", "plain text", "Remove or escape it")

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[list[int]]:
        """Token ids of a chat, cut at its images: k images give k + 1 runs of ids (no image token in them)."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
        )
        runs: list[list[int]] = [[]]
        for token in encoded["input_ids"]:
            if token == self.special.image_pad:
                runs.append([])
            else:
                runs[-1].append(token)
        return runs

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.added_tokens_encoder)

    # The text decoder, in parts.

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [m, D] of token ids."""
        return self._text.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))  # type: ignore[no-any-return]

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: KvCache,
        layers: range,
        *,
        vision: Tensor | None = None,
        deepstack: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Run some decoder layers over new positions, appending their keys and values to the cache.

        Args:
            hidden: [1, m, D] input of the first of these layers.
            positions: [3, m] M-RoPE positions, integer or fp32.
            cache: holds the earlier positions of every layer in `layers`, equally many in each.
            layers: consecutive layer numbers.
            vision: int64 [v], where in `hidden` vision tokens stand.
            deepstack: [L, v, D] planes, plane i added after layer i as in the stock model.
            observe: called with the layer number and its input [1, m, D] before each layer.

        Returns:
            [1, m, D] output of the last layer, before the final norm.
        """
        rotary = self.rotary(positions)
        mask = _continuation_mask(hidden.shape[1], cache.length(layers.start), hidden.device)
        for number in layers:
            if observe is not None:
                observe(number, hidden)
            hidden = self._text.layers[number](
                hidden, position_embeddings=rotary, attention_mask=mask, past_key_values=cache
            )
            if deepstack is not None and vision is not None and number < deepstack.shape[0]:
                hidden = hidden.index_add(1, vision, deepstack[number].to(hidden.dtype)[None])
        return hidden

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [1, m, head_dim], of M-RoPE positions [3, m]."""
        like = self._text.embed_tokens.weight
        cos, sin = self._text.rotary_emb(like, positions.to(self.device)[:, None, :])
        return cos, sin

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [1, m, vocabulary] of the last layer's output [1, m, D]."""
        return self.model.lm_head(self._text.norm(hidden)).float()  # type: ignore[no-any-return]

    def queries(self, layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [heads, m, head_dim] that a layer's attention makes of its input [1, m, D]."""
        block = self._text.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(hidden)
        query = attention.q_proj(normed).view(*normed.shape[:-1], -1, attention.head_dim)
        query = attention.q_norm(query).transpose(1, 2)
        cos, sin = self.rotary(positions)
        half = query.shape[-1] // 2
        rotated = torch.cat((-query[..., half:], query[..., :half]), dim=-1)
        return (query * cos[:, None] + rotated * sin[:, None])[0]  # type: ignore[no-any-return]


def load(name: str | Path, device: torch.device, dtype: torch.dtype) -> QwenVL:
    """Load a Qwen3-VL checkpoint from a local folder or, by its hub name, through Hugging Face.

    Raises:
        ModelError: nothing there, files missing or damaged, weights missing, or another architecture.
    """
    source = _source(name)
    config = _load_part(AutoConfig, source, "config.json")
    if config.model_type != ARCHITECTURE:
        given = f"{source} is a {config.model_type!r} model"
        raise ModelError(given, f"Qwen3-VL ({ARCHITECTURE!r})", "Choose a Qwen3-VL checkpoint")
    tokenizer = _load_part(AutoTokenizer, source, "the tokenizer files")
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{source} has no chat template", "a Qwen3-VL folder with one", "Copy chat_template.jinja")
    model = _load_weights(source, dtype)
    return QwenVL(model.to(device).eval().requires_grad_(False), tokenizer, _pixel_stats(source))


def _source(name: str | Path) -> str:
    path = Path(name)
    if path.is_dir():
        return str(path)
    is_hub_name = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if path.exists() or not is_hub_name:
        given = f"model {str(name)!r} is {'a file' if path.exists() else 'not there'}"
        raise ModelError(given, "a folder with a Qwen3-VL checkpoint or a hub name like Qwen/Qwen3-VL-2B-Instruct",
                         "Check the path")
    return str(name)


def _load_part(kind: Any, source: str, what: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        given = f"{source}: {what} cannot be loaded ({reason})"
        raise ModelError(given, "a complete Qwen3-VL checkpoint", "Copy or download it again") from error


def _load_weights(source: str, dtype: torch.dtype) -> Any:
    try:
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # safetensors and transformers raise many kinds on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        given = f"{source}: weights cannot be loaded ({reason})"
        raise ModelError(given, "complete safetensors files", "Copy or download them again") from error
    lacking = sorted(info["missing_keys"]) or sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lacking:
        given = f"{source}: {len(lacking)} weights missing or of another shape, for example {lacking[0]}"
        raise ModelError(given, "a complete Qwen3-VL checkpoint", "Copy or download it again")
    return model


def _pixel_stats(source: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError) as error:
        given = f"{source}: preprocessor_config.json cannot be loaded"
        raise ModelError(given, "a complete Qwen3-VL checkpoint", "Copy or download it again") from error
    values = values.get("image_processor", values)
    return list(values.get("image_mean", (0.5,) * 3)), list(values.get("image_std", (0.5,) * 3))


def vision_weights(model: Any, pixel_stats: tuple[Sequence[float], Sequence[float]]) -> VisionWeights:
    """Take a stock model's vision tower apart; parameters are shared, and gradients flow to them.

    Args:
        model: a stock Qwen3-VL model.
        pixel_stats: mean and std of pixels in [0, 1], three channels each.
    """
    tower, config = model.model.visual, model.config.vision_config
    mergers = (_merger(m) for m in tower.deepstack_merger_list)
    mean, std = (tuple(float(v) for v in stats) for stats in pixel_stats)
    return VisionWeights(
        patch_weight=tower.patch_embed.proj.weight.flatten(1),
        patch_bias=tower.patch_embed.proj.bias,
        position_table=tower.pos_embed.weight,
        blocks=tuple(Block(b.norm1, b.attn.qkv, b.attn.proj, b.norm2, b.mlp) for b in tower.blocks),
        merger=_merger(tower.merger),
        deepstack=dict(zip(config.deepstack_visual_indexes, mergers, strict=True)),
        heads=config.num_heads,
        patch=config.patch_size,
        merge=config.spatial_merge_size,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _merger(module: Any) -> Merger:
    return Merger(module.norm, module.linear_fc1, module.act_fn, module.linear_fc2, module.use_postshuffle_norm)


def _continuation_mask(new: int, past: int, device: torch.device) -> Tensor | None:
    """Causal mask [1, 1, new, past + new], True = attend; None where the stock causal path is right."""
    if past == 0 or new == 1:
        return None
    columns = torch.arange(past + new, device=device)
    rows = torch.arange(past, past + new, device=device)
    return (columns[None, :] <= rows[:, None])[None, None]


def _checksum(tensor: Tensor, chunk: int = 1 << 24) -> bytes:
    """Two wrap-around weighted sums over a tensor's 16-bit words, computed where the tensor lies."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = nn.functional.pad(words, (0, -words.numel() % 2)).view(torch.int16)
    totals = [0, 0]
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk].long()
        place = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        for lane, factor in enumerate((0x9E3779B97F4A7C1, 0x2545F4914F6CDD1D)):
            totals[lane] += int((part * (place * factor)).sum())
    return b"".join((total % (1 << 64)).to_bytes(8, "little") for total in totals)


def axial_rotary(rows: Tensor, cols: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [N, head_dim], of the vision tower's 2D RoPE at patch rows and columns [N].

    Half of the frequencies follow the row, half the column (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=rows.device) / (head_dim // 2)
    frequency = 1.0 / (_VISION_THETA**exponent)
    angle = torch.cat((rows[:, None].float() * frequency, cols[:, None].float() * frequency), dim=-1)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def interpolated_positions(table: Tensor, rows: int, cols: int) -> Tensor:
    """Learned positions [rows, cols, hidden] for a grid of patches, bilinear with aligned corners.

    Args:
        table: [side**2, hidden], the checkpoint's square grid.
    """
    side = math.isqrt(table.shape[0])
    grid = table.view(side, side, -1)
    row, col = (torch.linspace(0, side - 1, count, device=table.device) for count in (rows, cols))
    row_low, col_low = row.long(), col.long()
    row_high, col_high = (row_low + 1).clamp(max=side - 1), (col_low + 1).clamp(max=side - 1)
    down, right = (row - row_low)[:, None, None], (col - col_low)[None, :, None]
    corners = ((row_low, col_low, (1 - down) * (1 - right)), (row_low, col_high, (1 - down) * right),
               (row_high, col_low, down * (1 - right)), (row_high, col_high, down * right))
    terms = (grid[r][:, c] * weight for r, c, weight in corners)
    return _sum(terms)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def patchify(pixels: Tensor, weights: VisionWeights, dtype: torch.dtype) -> Tensor:
    """Normalised patches [K, N, 3 * 2 * patch**2] of images uint8 [K, 3, h, w], in the tower's merge order.

    h and w are whole merged tokens; N = h * w / patch**2. Order of patches: token row, token column, row
    and column inside the token, as the stock image processor lays them out.
    """
    count, _, height, width = pixels.shape
    patch, merge = weights.patch, weights.merge
    assert height % weights.token_px == 0 and width % weights.token_px == 0, (height, width)
    mean = torch.tensor(weights.mean, device=pixels.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(weights.std, device=pixels.device).view(1, 3, 1, 1) * 255
    normal = ((pixels - mean) / std).to(dtype)
    blocks = normal.view(
        count, 3, height // weights.token_px, merge, patch, width // weights.token_px, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    flat = blocks.reshape(count, -1, 3, 1, patch * patch)
    return flat.expand(-1, -1, -1, _TEMPORAL, -1).reshape(count, flat.shape[1], -1)
