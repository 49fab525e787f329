"""FastV: vision tokens are dropped inside the decoder (Chen et al. 2024, arXiv 2403.06764).

The whole image is encoded and runs through the first K = 2 layers; then only the vision tokens that the last
prompt token attends to most, averaged over the heads of layer K, go on. The first K layers keep the keys and
values of all tokens, as in the authors' code, so FastV saves time and memory in the other layers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arrcoc.decode.transformers_decoder import DecodeState
from arrcoc.errors import ModelError
from arrcoc.kv import KvCache
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt

LAYER = 2
"""K, the number of layers that see every token; the paper's choice."""


def received(query: Tensor, keys: Tensor) -> Tensor:
    """Attention that one row pays to every column, averaged over heads.

    Args:
        query: [heads, 1, head_dim], rotated, of the last row.
        keys: [kv_heads, N, head_dim], rotated; query heads are grouped over them in order.

    Returns:
        fp32 [N], softmax(q k / sqrt(head_dim)), sums to 1.
    """
    kv_heads, _, width = keys.shape
    grouped = query.float().reshape(kv_heads, -1, width)
    weights: Tensor = (grouped @ keys.float().mT / width**0.5).softmax(dim=-1)
    return weights.mean(dim=(0, 1))


def strongest(scores: Tensor, keep: int) -> Tensor:
    """Indices int64 [keep] of the highest scores, ascending; ties go to the earlier."""
    order = scores.sort(descending=True, stable=True).indices
    return order[:keep].sort().values


@torch.inference_mode()
def prefill(qwen: QwenVL, prompt: Prompt, keep: int, layer: int = LAYER) -> DecodeState:
    """Run a prompt, dropping vision tokens after the first layers.

    Args:
        qwen: the checkpoint.
        prompt: with all vision tokens.
        keep: vision tokens that go on, at least 1; all of them give the unpruned model.
        layer: K; the ranking is by the attention of layer K, counted from 1.

    Raises:
        ModelError: the decoder has no layer after K.
    """
    if not 0 < layer < qwen.n_layers:
        given = f"FastV after layer {layer} of {qwen.n_layers}"
        raise ModelError(given, "a layer before the last", "Choose a deeper checkpoint")
    cache = KvCache(qwen.n_layers, capacity=prompt.embeds.shape[1] + 64)
    places = prompt.vision.nonzero()[:, 0]
    last: list[Tensor] = []

    def observe(number: int, hidden: Tensor) -> None:
        if number == layer - 1:
            last.append(qwen.queries(number, hidden[:, -1:], prompt.positions[:, -1:]))

    hidden = qwen.run_layers(
        prompt.embeds,
        prompt.positions,
        cache,
        range(layer),
        vision=places,
        deepstack=prompt.deepstack,
        observe=observe,
    )
    kept = strongest(received(last[0], cache.keys(layer - 1)[0])[places], keep)
    staying = ~prompt.vision
    staying[places[kept]] = True
    columns = staying.nonzero()[:, 0]
    hidden = qwen.run_layers(
        hidden[:, columns],
        prompt.positions[:, columns],
        cache,
        range(layer, qwen.n_layers),
        vision=prompt.vision[columns].nonzero()[:, 0],
        deepstack=prompt.deepstack[:, kept],
    )
    logits = qwen.logits(hidden[:, -1:])[0, 0]
    return DecodeState(cache, logits, prompt.next_position, len(columns))
