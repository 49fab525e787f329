"""The stock text model in training: the same layers, without host synchronisation, and watched at one."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

WATCHED = 0.45
"""Depth of the layer whose attention is trained to look at the evidence, as a share of all layers: among
those that the glimpse scorer probes."""
_ENDS = 4
_NEAR = 0.7


class Watch(NamedTuple):
    """Where the end of the prompt should look.

    Attributes:
        last: int64 [B], the token that predicts the answer's first one.
        spot: fp32 [B, 2, N], centre (y, x) in px of what each token shows.
        reach: fp32 [B, N], half of its side in px; below 0 for text.
        boxes: fp32 [B, 5, 4], centre and half size (x, y, w, h) in px; half sizes of 0 for none.
    """

    last: Tensor
    spot: Tensor
    reach: Tensor
    boxes: Tensor


def fuse_norms(text: Any) -> None:
    """Let the text model's RMS norms run as one kernel each."""
    for module in text.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)


def run_text(
    text: Any, embeds: Tensor, positions: Tensor, planes: Tensor, watch: Watch
) -> tuple[Tensor, Tensor]:
    """The stock text model on embeddings: causal, padded on the right, DeepStack planes added densely.

    Args:
        text: the stock text model.
        embeds: [B, N, D].
        positions: fp32 [3, B, N].
        planes: [L, B, N, D], zero where there is no vision token.
        watch: what to look at.

    Returns:
        last hidden state [B, N, D] and the evidence loss, a scalar.
    """
    turns = text.rotary_emb(embeds, positions)
    hidden, loss = embeds, embeds.new_zeros(()).float()
    watched = round(WATCHED * (len(text.layers) - 1))
    for number, layer in enumerate(text.layers):
        if number == watched:
            loss = evidence_loss(layer, hidden, turns, watch)
        hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
        if number < len(planes):
            hidden = hidden + planes[number].to(hidden.dtype)
    return text.norm(hidden), loss


def evidence_loss(layer: Any, hidden: Tensor, turns: tuple[Tensor, Tensor], watch: Watch) -> Tensor:
    """Mean over signs of -log(share of the attention to the image that falls on the sign).

    The attention is that of the prompt's last rows, over vision tokens alone, averaged over heads.
    """
    attention, (cos, sin) = layer.self_attn, turns
    normed = layer.input_layernorm(hidden)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    ends = watch.last[:, None] - torch.arange(_ENDS, device=hidden.device)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    keys = attention.k_norm(attention.k_proj(normed).view(shape)).transpose(1, 2)
    queries = attention.q_norm(attention.q_proj(normed[rows, ends]).unflatten(-1, shape[2:])).transpose(1, 2)
    keys, queries = _turn(keys, cos, sin), _turn(queries, cos[rows, ends], sin[rows, ends])
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = (queries @ keys.transpose(2, 3)).float() * attention.scaling
    scores = scores.masked_fill((watch.reach < 0)[:, None, None], float("-inf"))
    shares = scores.softmax(-1).mean((1, 2))
    return _missed(shares, watch)


def _missed(shares: Tensor, watch: Watch) -> Tensor:
    """`evidence_loss` from the shares of attention [B, N]."""
    centre, half = watch.boxes[..., :2], watch.boxes[..., 2:]
    spot = watch.spot.flip(1)[:, None]  # [B, 1, 2 (x, y), N]
    near = (spot - centre[..., None]).abs() < watch.reach[:, None, None] + _NEAR * half[..., None]
    covers = near.all(2) & (watch.reach >= 0)[:, None]
    mass = (shares[:, None] * covers).sum(-1)
    counts = (half[..., 0] > 0) & covers.any(-1)
    lost = torch.where(counts, -torch.log(mass + 1e-6), 0.0)
    return lost.sum() / counts.sum().clamp(min=1)


def _turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The stock rotation of [B, heads, n, head_dim] by cos and sin [B, n, head_dim]."""
    turned, _ = stock.apply_rotary_pos_emb(vectors, vectors, cos, sin)
    return turned  # type: ignore[no-any-return]


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden, (hidden.shape[-1],), module.weight, module.variance_epsilon)
