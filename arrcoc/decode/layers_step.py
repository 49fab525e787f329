"""Decode steps and short prefills through whole layers, fused or transformers' own, at static shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from arrcoc.decode.padded import run_padded
from arrcoc.decode.slots import Slot
from arrcoc.qwen import QwenVL


class StaticKv:
    """A slot's keys and values as a cache whose length is on the device.

    Attention layers get the whole capacity, of which a mask must hide what is not filled.
    """

    def __init__(self, slot: Slot, columns: Tensor) -> None:
        """Args: the slot; columns int64 [m], where new positions go."""
        self._kv, self._columns = slot.kv, columns

    def length(self, layer: int) -> int:
        """Positions that a layer's keys have: the capacity."""
        return int(self._kv.shape[3])

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, m, head_dim] in place and return the layer's whole buffers."""
        keys, values = self._kv[layer_idx]
        keys.index_copy_(1, self._columns, key[0])
        values.index_copy_(1, self._columns, value[0])
        return keys[None], values[None]


def run_static(
    qwen: QwenVL, slot: Slot, embeds: Tensor, positions: Tensor, planes: Tensor | None = None
) -> Tensor:
    """All layers over m positions that follow the `slot.length` positions in the slot; [1, m, D].

    Args:
        qwen: the checkpoint.
        slot: keys and values are written to it; its scalars stay as they are.
        embeds: [1, m, D].
        positions: fp32 [3, m].
        planes: [L, m, D], added after the first L layers.
    """
    if qwen.fused is not None:
        return run_padded(qwen.fused, slot, embeds, qwen.rotary(positions), planes)
    columns = slot.length.long() + torch.arange(embeds.shape[1], device=embeds.device)
    cache, layers = StaticKv(slot, columns), range(qwen.n_layers)
    mask = torch.arange(slot.capacity, device=embeds.device)[None] <= columns[:, None]
    return qwen.run_layers(embeds, positions, cache, layers, deepstack=planes, mask=mask[None, None])


class LayersStep:
    """A decode step without kernels of one's own: what runs where Triton does not."""

    name = "transformers layers"

    def __init__(self, qwen: QwenVL) -> None:
        """Args: the checkpoint."""
        self._qwen = qwen

    def compile(self, slot: Slot) -> None:
        """Nothing to compile."""

    def logits(self, slot: Slot) -> None:
        """Run `slot.token` through the model, as `KernelStep.logits`."""
        embeds = self._qwen.embed_tensor(slot.token)[None]
        hidden = run_static(self._qwen, slot, embeds, slot.position.expand(3, 1))
        slot.logits.copy_(self._qwen.logits(hidden)[0, 0])
