"""One decode step through the Triton kernels: which blocks, in which order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from arrcoc.decode.blocking import Blocking, Blocks, blocking_for, is_even
from arrcoc.decode.slots import MOST_SPLITS, Slot
from arrcoc.text import Matrix, TextLayer, TextWeights


class KernelStep:
    """Queues the kernels of one step on a slot, for weights on CUDA (or in Triton's interpreter)."""

    name = "Triton kernels"

    def __init__(
        self,
        weights: TextWeights,
        blocking: Blocking | None = None,
        pdl: bool | None = None,
        compile_only: bool = False,
    ) -> None:
        """Make a step.

        Args:
            weights: of the decoder.
            blocking: how its matrices are divided; None takes what was measured to be fast on an H200.
            pdl: whether a kernel begins to load weights before the one before it has ended; None where
                the device can (compute capability 9.0 and up).
            compile_only: kernels are compiled where they would be queued.
        """
        self._compile_only, self._compiled = compile_only, False
        self._weights, self._blocking = weights, blocking or blocking_for(weights)
        device = weights.embedding.device
        on_gpu = device.type == "cuda"
        can = on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
        self._pdl = can if pdl is None else pdl

    @staticmethod
    def supports(weights: TextWeights) -> bool:
        """Whether the kernels take these sizes: heads of a power of two of at least 32."""
        width, group = weights.head_dim, weights.heads // weights.kv_heads
        return width >= 32 and width & (width - 1) == 0 and group <= 64

    def logits(self, slot: Slot) -> None:
        """Run `slot.token` through the model: its keys and values are appended, `slot.logits` set.

        The scalars of the slot stay as they are.
        """
        self._begin(slot)
        for number, layer in enumerate(self._weights.layers):
            self._layer(slot, layer, slot.kv[number])
        self._head(slot)

    def compile(self, slot: Slot) -> None:
        """Compile all kernels side by side, once; else each is compiled as it first runs."""
        import triton

        if self._compiled or slot.kv.device.type != "cuda" or not hasattr(triton, "AsyncCompileMode"):
            return
        self._compiled = True
        first = replace(self._weights, layers=self._weights.layers[:1])
        once = KernelStep(first, self._blocking, self._pdl, compile_only=True)
        with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            once.logits(slot)
            once.finish(slot)

    def finish(self, slot: Slot) -> None:
        """Choose the likeliest token, and move the slot's scalars one step on."""
        blocks = -(-self._weights.head.rows // self._blocking.head.rows)
        self._launch(
            self._kernels.finish,
            (1,),
            8,
            (slot.best, slot.best_at, slot.token, slot.history, slot.step, slot.length, slot.position),
            {"BLOCKS": blocks, "BLOCK": min(4096, max(16, 1 << (blocks - 1).bit_length()))},
        )

    @cached_property
    def _kernels(self) -> ModuleType:
        from arrcoc.decode import kernels  # Triton is not on every machine

        return kernels

    @cached_property
    def _attention(self) -> ModuleType:
        from arrcoc.decode import attend_kernel

        return attend_kernel

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], warps: int, arguments: Any, constants: dict[str, Any]
    ) -> None:
        options = {"launch_pdl": True} if self._pdl else {}
        dependent = (2 if self._blocking.early else 1) if self._pdl else 0
        given = constants | {"PDL": dependent, "num_warps": warps} | options
        if self._compile_only:
            kernel.warmup(*arguments, grid=grid, **given)
        else:
            kernel[grid](*arguments, **given)

    def _begin(self, slot: Slot) -> None:
        weights = self._weights
        width, block = weights.embedding.shape[1], 512
        self._launch(
            self._kernels.begin,
            (-(-width // block),),
            4,
            (
                slot.token,
                weights.embedding,
                slot.x,
                slot.position,
                weights.frequencies,
                slot.cosine,
                slot.sine,
            ),
            {"D": width, "HALF": weights.head_dim // 2, "BLOCK": block},
        )

    def _layer(self, slot: Slot, layer: TextLayer, kv: Tensor) -> None:
        blocking = self._blocking
        qkv = (layer.query, layer.key, layer.value)
        self._product(blocking.qkv, qkv, slot.x, layer.attention_gain, slot.qkv)
        self._attend(slot, layer, kv)
        self._product(blocking.out, (layer.out,), slot.mixed, None, slot.x)
        self._gated(blocking.gated, layer, slot)
        self._product(blocking.down, (layer.down,), slot.mlp, None, slot.x)

    def _product(
        self,
        blocks: Blocks,
        matrices: tuple[Matrix, ...],
        x: Tensor,
        gain: Tensor | None,
        y: Tensor,
    ) -> None:
        """Y = the products of these matrices with the normalised x; without a gain, y += the product."""
        three = [*matrices, matrices[0], matrices[0]][:3]
        rows = [*(m.rows for m in matrices), 0, 0][:3]
        values = [m.values for m in three]
        scales = [m.values if m.scale is None else m.scale for m in three]
        constants = {f"N{i}": count for i, count in enumerate(rows)}
        constants |= {"K": matrices[0].columns, "NORM": gain is not None, "ADD": gain is None}
        constants |= self._constants(blocks, matrices)
        grid = (sum(-(-count // blocks.rows) for count in rows),)
        gains = x if gain is None else gain
        arguments = (*values, *scales, x, gains, y, self._weights.eps)
        self._launch(self._kernels.product, grid, blocks.warps, arguments, constants)

    def _constants(self, blocks: Blocks, matrices: tuple[Matrix, ...]) -> dict[str, Any]:
        even, scaled = is_even(blocks, matrices), matrices[0].scale is not None
        made: dict[str, Any] = {"BLOCK_N": blocks.rows, "BLOCK_K": blocks.columns, "EVEN": even}
        return made | {"SCALED": scaled}

    def _gated(self, blocks: Blocks, layer: TextLayer, slot: Slot) -> None:
        gate, up = layer.gate, layer.up
        scales = [m.values if m.scale is None else m.scale for m in (gate, up)]
        arguments = (gate.values, up.values, *scales, slot.x, layer.mlp_gain, slot.mlp, self._weights.eps)
        constants = {"N": gate.rows, "K": gate.columns} | self._constants(blocks, (gate, up))
        self._launch(
            self._kernels.gated_product, (-(-gate.rows // blocks.rows),), blocks.warps, arguments, constants
        )

    def _attend(self, slot: Slot, layer: TextLayer, kv: Tensor) -> None:
        weights = self._weights
        heads, kv_heads, width = weights.heads, weights.kv_heads, weights.head_dim
        arguments = (
            *(slot.qkv, layer.query_gain, layer.key_gain, slot.cosine, slot.sine, kv[0], kv[1]),
            *(slot.length, slot.sums, slot.parts, slot.arrived, slot.mixed),
            *(width**-0.5, weights.eps, slot.capacity),
        )
        lanes = 1 << (heads // kv_heads - 1).bit_length()
        constants = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": width // 2}
        constants |= {"ROWS": max(16, lanes), "LANES": lanes}
        positions, splits, warps = self._blocking.attend
        assert splits <= MOST_SPLITS, f"{splits} parts"
        constants |= {"SPLITS": splits, "BLOCK_T": positions}
        self._launch(self._attention.attend, (kv_heads, splits), warps, arguments, constants)

    def _head(self, slot: Slot) -> None:
        weights, blocks = self._weights, self._blocking.head
        assert weights.head.scale is None, "the vocabulary's matrix is not quantised"
        rows = weights.head.rows
        arguments = (
            *(weights.head.values, slot.x, weights.gain, slot.logits, slot.best, slot.best_at),
            weights.eps,
        )
        constants = {"N": rows, "K": weights.head.columns} | self._constants(blocks, (weights.head,))
        del constants["SCALED"]
        self._launch(self._kernels.vocabulary, (-(-rows // blocks.rows),), blocks.warps, arguments, constants)
