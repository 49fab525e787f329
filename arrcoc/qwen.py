"""The only module that knows Hugging Face's attribute paths of Qwen-VL.

Everything else sees `QwenVL`: a tokenizer and chat template, the vision weights as plain modules, and the
text decoder as a stack of layers that can be run in part, over a cache of the caller's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from arrcoc import loading
from arrcoc.errors import QueryError
from arrcoc.kv import LayerCache, RoomyCache
from arrcoc.loading import ARCHITECTURE, PixelStats
from arrcoc.records import Query
from arrcoc.text import TextWeights, text_weights
from arrcoc.text_layers import FusedLayers, fused_layers, why_not
from arrcoc.transfer import to_device
from arrcoc.vision import Block, Merger, VisionWeights


class SpecialTokens(NamedTuple):
    """Ids of the tokens that arrcoc itself must place or find."""

    image_pad: int
    vision_start: int
    vision_end: int


class QwenVL:
    """A loaded Qwen-VL checkpoint; holds no state of any request."""

    def __init__(self, model: Any, tokenizer: Any, pixel_stats: PixelStats) -> None:
        """Args: stock model in eval mode, its tokenizer, mean and std of pixels in [0, 1]."""
        self.model, self.tokenizer = model, tokenizer
        self._pixel_stats = pixel_stats
        self._text = model.model.language_model
        config = model.config
        self.special = SpecialTokens(
            config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
        )

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
        ends = self.tokenizer.eos_token_id
        return frozenset([*ids, *([] if ends is None else [ends])])

    @cached_property
    def vision(self) -> VisionWeights:
        """The vision tower's weights."""
        return vision_weights(self.model, self._pixel_stats)

    @property
    def text(self) -> TextWeights:
        """The text decoder's weights."""
        return text_weights(self.model)

    @cached_property
    def fused(self) -> FusedLayers | None:
        """The text decoder's layers as fused kernels, where they can run; made at first use."""
        return fused_layers(self.text)

    def describe_layers(self) -> str:
        """What prompts run through, in words."""
        reason = why_not(self.text)
        return FusedLayers.name if reason is None else f"transformers' layers ({reason})"

    def forget_kernels(self) -> None:
        """Make `fused` anew at its next use: the weights were replaced."""
        vars(self).pop("fused", None)

    @property
    def text_blocks(self) -> nn.ModuleList:
        """The text decoder's layers as modules: what may be quantised."""
        return self._text.layers  # type: ignore[no-any-return]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the vision weights, their precision and the pixel normalisation.

        Two checkpoints with the same fingerprint encode pixels to the same features.
        """
        return self.fingerprint_in(self.dtype)

    def fingerprint_in(self, dtype: torch.dtype) -> str:
        """What `fingerprint` is when the vision weights are cast to another precision."""
        digest = hashlib.blake2b(repr((self._pixel_stats, ARCHITECTURE)).encode(), digest_size=16)
        for name, stored in sorted(self.model.model.visual.state_dict().items()):
            tensor = stored.to(dtype)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_checksum(tensor))
        return digest.hexdigest()

    # Text.

    def query(self, question: str) -> Query:
        """A question as a record: its token ids and the mean of their embeddings, fp32 [D]."""
        self.check_text(question)
        ids = tuple(self.tokenizer(question, add_special_tokens=False).input_ids)
        return Query(question, ids, self.embed(ids).float().mean(0))

    @cached_property
    def embedding_probe(self) -> Tensor:
        """A few token embeddings, fp32 [16, D] on the CPU, evenly spaced over the vocabulary.

        They tell one checkpoint's embeddings from another's, whatever precision it was loaded in.
        """
        table: Tensor = self._text.embed_tokens.weight
        rows = torch.linspace(0, len(table) - 1, 16, device=table.device).long()
        return table[rows].detach().float().cpu()

    def check_text(self, text: str) -> None:
        """Raise `QueryError` if text holds one of the tokenizer's control tokens.

        A control token inside a question would be read as prompt structure: an image that is not there,
        or a turn that nobody took.
        """
        for token in self._control_tokens:
            if token in text:
                raise QueryError(f"text with the control token {token}", "plain text", "Remove or escape it")

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[list[int]]:
        """Token ids of a chat, cut at its images: k images give k + 1 runs, without the image tokens."""
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
        return self._text.embed_tokens(to_device(torch.tensor(ids, dtype=torch.long), self.device))  # type: ignore[no-any-return]

    def embed_tensor(self, ids: Tensor) -> Tensor:
        """Embeddings [m, D] of token ids int64 [m] on the device."""
        return self._text.embed_tokens(ids)  # type: ignore[no-any-return]

    def run_layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: LayerCache,
        layers: range,
        *,
        vision: Tensor | None = None,
        deepstack: Tensor | None = None,
        mask: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Run some decoder layers over new positions, appending their keys and values to the cache.

        Args:
            hidden: [1, m, D] input of the first of these layers; [B, m, D] with a mask and a cache for it.
            positions: [3, m] M-RoPE positions, integer or fp32; [3, B, m] for several sequences.
            cache: holds the earlier positions of every layer in `layers`, equally many in each.
            layers: consecutive layer numbers.
            vision: int64 [v], where in `hidden` vision tokens stand; None where the planes are dense.
            deepstack: [L, v, D] planes, plane i added after layer i as in the stock model; dense [L, m, D].
            mask: bool [1, 1, m, past + m], True = attend; causal if None.
            observe: called with the layer number and its input [1, m, D] before each layer.
            last_only: whether no other row of the result than the last is wanted.

        Returns:
            [1, m, D] output of the last layer, before the final norm; [1, 1, D] with `last_only`.
        """
        rotary = self.rotary(positions)
        if mask is None and len(hidden) == 1 and self.fused is not None:
            return self.fused.run(
                hidden,
                rotary,
                cast(RoomyCache, cache),  # only those of several sequences are not, which have a mask
                layers,
                vision=vision,
                deepstack=deepstack,
                observe=observe,
                last_only=last_only,
            )
        if mask is None:
            mask = _continuation_mask(hidden.shape[1], cache.length(layers.start), hidden.device)
        for number in layers:
            if observe is not None:
                observe(number, hidden)
            hidden = self._text.layers[number](
                hidden, position_embeddings=rotary, attention_mask=mask, past_key_values=cache
            )
            if deepstack is not None and number < deepstack.shape[0]:
                plane = deepstack[number].to(hidden.dtype)[None]
                hidden = hidden + plane if vision is None else hidden.index_add(1, vision, plane)
        return hidden[:, -1:] if last_only else hidden

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, m, head_dim], of M-RoPE positions [3, m] (then B = 1) or [3, B, m]."""
        like = self._text.embed_tokens.weight
        placed = to_device(positions, self.device)
        cos, sin = self._text.rotary_emb(like, placed if placed.ndim == 3 else placed[:, None, :])
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
    parts = loading.read(name, dtype)
    model = parts.model.to(device).eval().requires_grad_(False)
    return QwenVL(model, parts.tokenizer, parts.pixel_stats)


def vision_weights(model: Any, pixel_stats: PixelStats) -> VisionWeights:
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
    return Merger(
        module.norm, module.linear_fc1, module.act_fn, module.linear_fc2, module.use_postshuffle_norm
    )


def _continuation_mask(new: int, past: int, device: torch.device) -> Tensor | None:
    """Causal mask [.., new, past + new], True = attend; None where the stock causal path is right.

    On CUDA it is a bias that only names its pattern: attention takes a fused kernel for it, and nothing of
    the mask's size is made.
    """
    if past == 0 or new == 1:
        return None
    if device.type == "cuda":
        bias: Tensor = causal_lower_right(new, past + new)
        return bias
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
