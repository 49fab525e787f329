"""The fused decoder layers over a padded number of rows, at static shapes, so that they can be captured.

Where the rows go in the cache, and how much of it they attend to, is read on the device.
"""

from __future__ import annotations

from torch import Tensor

from arrcoc.decode.slots import Slot
from arrcoc.text_layers import FusedLayers


def run_padded(
    fused: FusedLayers,
    slot: Slot,
    embeds: Tensor,
    rotary: tuple[Tensor, Tensor],
    planes: Tensor | None = None,
) -> Tensor:
    """All layers over m positions that follow the `slot.length` positions in the slot; [1, m, D].

    Args:
        fused: the layers.
        slot: keys and values are written to it; its scalars stay as they are.
        embeds: [1, m, D].
        rotary: cos and sin, each [1, m, head_dim].
        planes: [L, m, D], added after the first L layers.
    """
    weights, kernels = fused.weights, fused.kernels
    cos, sin = rotary[0][0].contiguous(), rotary[1][0].contiguous()
    x, delta = embeds[0].contiguous(), None
    for number, layer in enumerate(weights.layers):
        products, (keys, values) = fused.products[number], slot.kv[number]
        x, normed = kernels.add_norm(x, delta, layer.attention_gain, weights.eps)
        qkv = products.qkv(normed)
        gains = layer.query_gain, layer.key_gain
        kernels.rotate_into(qkv, gains, cos, sin, weights.eps, keys, values, slot.length)
        query = qkv.view(len(qkv), -1, weights.head_dim)[:, : weights.heads]
        mixed = kernels.attend_rows(query, keys, values, slot.length)
        x, normed = kernels.add_norm(x, products.out(mixed), layer.mlp_gain, weights.eps)
        delta = products.down(kernels.silu_mul(products.gate_up(normed)))
        if planes is not None and number < planes.shape[0]:
            x, delta = x + delta, planes[number]
    return (x if delta is None else x + delta)[None]
