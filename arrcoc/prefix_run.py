"""Head and overview of a prompt through some of the decoder's layers, and where they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arrcoc.kv import KvCache
from arrcoc.records import Features

if TYPE_CHECKING:
    from arrcoc.qwen import QwenVL

Observe = Callable[[int, Tensor], None]


def rows(where: Tensor, begin: int, extent: float, n_tail: int = 0) -> Tensor:
    """Positions of head, overview and tail, fp32 [3, begin + m + n_tail] on the CPU.

    Args:
        where: fp32 [2, m], positions of the overview's tokens in the frame.
        begin: tokens of the head.
        extent: what the image adds to the text position after it.
        n_tail: tokens of the tail.
    """
    placed = torch.cat((torch.zeros_like(where[:1]), where)) + begin
    text = torch.arange(max(begin, n_tail)).float().expand(3, -1)
    return torch.cat((text[:, :begin], placed, text[:, :n_tail] + begin + extent), dim=1)


def run_rows(
    qwen: QwenVL,
    words: Tensor,
    features: Features,
    positions: Tensor,
    begin: int,
    cache: KvCache,
    depth: int,
    observe: Observe | None = None,
) -> Tensor:
    """Run head, overview and tail through the first layers, reading nothing but the device's memory.

    Args:
        qwen: the checkpoint.
        words: [begin + n_tail, D], embeddings of head and tail.
        features: the overview: K = 1, m tokens.
        positions: fp32 [3, begin + m + n_tail].
        begin: tokens of the head.
        cache: empty.
        depth: layers to run.
        observe: as for `QwenVL.run_layers`.

    Returns:
        [1, begin + m + n_tail, D], input of layer `depth`.
    """
    tokens = features.tokens[0]
    return qwen.run_layers(
        torch.cat((words[:begin], tokens, words[begin:]))[None],
        positions,
        cache,
        range(depth),
        vision=torch.arange(begin, begin + len(tokens), device=tokens.device),
        deepstack=features.deepstack[:, 0],
        observe=observe,
    )


def run_rest(
    qwen: QwenVL, hidden: Tensor, planes: Tensor, positions: Tensor, begin: int, depth: int
) -> Tensor:
    """Run head and overview through the layers from `depth` on, reading nothing but the device's memory.

    Args:
        qwen: the checkpoint.
        hidden: [1, length, D], input of layer `depth`.
        planes: [L, m, D], DeepStack planes of the overview.
        positions: fp32 [3, length].
        begin: tokens of the head.
        depth: layers run so far.

    Returns:
        Keys and values [n_layers - depth, 2, kv_heads, length, head_dim].
    """
    length = hidden.shape[1]
    cache = KvCache(qwen.n_layers, length, first=depth)
    vision = torch.arange(begin, length, device=hidden.device)
    rest = range(depth, qwen.n_layers)
    qwen.run_layers(hidden, positions, cache, rest, vision=vision, deepstack=planes)
    return cache.block(length)
