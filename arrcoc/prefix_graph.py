"""An image's first look: head, glimpse and generic prompt through the first layers, as one CUDA graph.

For the few hundred rows of a glimpse launching the layers' kernels takes longer than computing. All that the
pass reads but the glimpse's features depends on the shape of the image alone. The remaining layers, for
answers that go on from the glimpse, are a second graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from arrcoc.attention_probe import attention_shares, probe_layers, sinks
from arrcoc.config import Config
from arrcoc.kv import KvCache
from arrcoc.prefix_run import rows, run_rest, run_rows
from arrcoc.prefixes import Prefix, Probe, narrowed, widened
from arrcoc.qwen import QwenVL
from arrcoc.records import Features
from arrcoc.shape_graphs import ShapeGraphs, Tensors
from arrcoc.transfer import to_device

MOST_TOKENS = 2048
"""Most tokens of a glimpse whose first look is captured: with more, launching takes less than computing."""
KEEP_BYTES = 1 << 30
"""Most bytes of features, keys and values that captured shapes keep; one shape alone may exceed it."""


class Shape(NamedTuple):
    """All that the shapes and positions of a first look depend on.

    Attributes:
        head: token ids before the glimpse.
        tail: token ids of the generic prompt after it, of which the first ends the image.
        where: positions of the glimpse's tokens in the frame, fp32 [2, m], as bytes.
        extent: what the image adds to the text position after it.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    where: bytes
    extent: float


class FirstLooks:
    """First looks of one checkpoint and configuration, by a graph from the third image of a shape on.

    Threads may share an object.
    """

    def __init__(self, qwen: QwenVL, config: Config) -> None:
        """Prepare; nothing is allocated or captured yet.

        Args:
            qwen: the checkpoint.
            config: probe layers, sink ratio, and the precision of prefixes.
        """
        self._qwen, self._config = qwen, config
        self._layers = probe_layers(config.probe_depth, qwen.n_layers)
        self._graphs: ShapeGraphs[_Work] = ShapeGraphs(qwen.device, "images are first looked at", KEEP_BYTES)
        self._rests: ShapeGraphs[_Rest] = ShapeGraphs(qwen.device, "first looks are completed", KEEP_BYTES)

    @cached_property
    def prompt(self) -> tuple[list[int], list[int]]:
        """Token ids of the generic prompt before and after an image."""
        return rendered(self._qwen, self._config.generic_prompt)

    def describe(self) -> str:
        """How first looks are launched, in words."""
        return f"{self._graphs.describe()}, the remaining layers: {self._rests.describe()}"

    @torch.inference_mode()
    def look(
        self, head: list[int], tail: list[int], features: Features, where: Tensor, extent: float
    ) -> Prefix:
        """The prompt up to the glimpse, run as deep as the last probed layer, with its probe.

        Args:
            head: token ids before the glimpse.
            tail: token ids of the generic prompt after it, of which the first ends the image.
            features: the glimpse: K = 1, m tokens.
            where: fp32 [2, m] on the CPU, positions of its tokens in the frame.
            extent: what the image adds to the text position after it.
        """
        shape = Shape(tuple(head), tuple(tail), where.contiguous().numpy().tobytes(), extent)
        assert where.shape[1] == features.tokens.shape[1], (where.shape, features.tokens.shape)
        if where.shape[1] <= MOST_TOKENS:
            found = self._graphs.run(
                shape,
                lambda: self._work(shape, where, Features(_like(features.tokens), _like(features.deepstack))),
                lambda work: work.load(features),
                lambda work, made: self._prefix(shape, features, work, *(t.clone() for t in made)),
            )
            if found is not None:
                return found
        work = self._work(shape, where, features)
        return self._prefix(shape, features, work, *work.compute())

    def _work(self, shape: Shape, where: Tensor, features: Features) -> _Work:
        begin, device = len(shape.head), features.tokens.device
        return _Work(
            self._qwen,
            self._config,
            self._layers,
            begin,
            to_device(torch.tensor([*shape.head, *shape.tail]), device),
            to_device(rows(where, begin, shape.extent, len(shape.tail)), device),
            features,
        )

    def _prefix(
        self,
        shape: Shape,
        features: Features,
        work: _Work,
        block: Tensor,
        hidden: Tensor,
        excluded: Tensor,
        generic: Tensor,
    ) -> Prefix:
        """Make a prefix of what `_Work.compute` returned."""
        length = block.shape[3]
        return Prefix(
            shape.head,
            features,
            work.positions[:, :length],
            len(shape.head) + shape.extent,
            hidden,
            KvCache.holding(block, length),
            block.shape[0],
            self._qwen.n_layers,
            self._config.prefix_dtype == "float8",
            Probe(dict(zip(self._layers, excluded, strict=True)), generic),
            partial(self._run_rest, shape, features, work.positions[:, :length]),
        )

    def _run_rest(self, shape: Shape, features: Features, positions: Tensor, hidden: Tensor) -> Tensor | None:
        """See `arrcoc.prefixes.Rest`."""
        if features.tokens.shape[1] > MOST_TOKENS:
            return None
        depth, planes = self._layers[-1] + 1, features.deepstack[:, 0]
        return self._rests.run(
            shape,
            lambda: _Rest(self._qwen, _like(hidden), _like(planes), positions, len(shape.head), depth),
            lambda work: (work.hidden.copy_(hidden), work.planes.copy_(planes)),
            lambda _, made: made[0].clone(),
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """The pass itself over features that lie where they are: see `StaticWork`.

    Attributes:
        begin: tokens of the head.
        ids: int64 [begin + n_tail], of head and tail.
        positions: fp32 [3, begin + m + n_tail].
    """

    qwen: QwenVL
    config: Config
    layers: list[int]
    begin: int
    ids: Tensor
    positions: Tensor
    features: Features

    @property
    def inputs(self) -> Tensors:
        return self.features.tokens, self.features.deepstack

    def load(self, features: Features) -> None:
        self.features.tokens.copy_(features.tokens)
        self.features.deepstack.copy_(features.deepstack)

    def compute(self) -> Tensors:
        """Keys and values, hidden rows [1, length, D], sinks bool [P, m] of P probed layers, attention [m].

        Keys and values are [layers, 2, kv_heads, length, head_dim]; the attention is the generic prompt's.
        """
        begin, length = self.begin, self.begin + self.features.tokens.shape[1]
        cache = KvCache(self.layers[-1] + 1, capacity=self.positions.shape[1])
        excluded, queries = list[Tensor](), list[Tensor]()

        def observe(layer: int, hidden: Tensor) -> None:
            if layer in self.layers:
                norms = hidden[0, begin:length].float().norm(dim=-1)
                excluded.append(sinks(norms, self.config.sink_ratio))
                tail = self.positions[:, length:]
                queries.append(self.qwen.queries(layer, hidden[:, length:], tail))

        depth, words = self.layers[-1] + 1, self.qwen.embed_tensor(self.ids)
        hidden = run_rows(self.qwen, words, self.features, self.positions, begin, cache, depth, observe)
        # The tail's row 0 ends the image and belongs to no prompt.
        generic = [
            attention_shares(query[:, 1:], self._keys(cache, layer)[:, begin:length], out)
            for layer, query, out in zip(self.layers, queries, excluded, strict=True)
        ]
        shares = torch.stack(generic).mean(0)
        return cache.block(length), hidden[:, :length], torch.stack(excluded), shares

    def _keys(self, cache: KvCache, layer: int) -> Tensor:
        """One layer's keys as the prefix will give them, [kv_heads, length, head_dim]."""
        keys = cache.keys(layer)[0, :, : self.begin + self.features.tokens.shape[1]]
        return widened(*narrowed(keys), keys.dtype) if self.config.prefix_dtype == "float8" else keys


def rendered(qwen: QwenVL, question: str) -> tuple[list[int], list[int]]:
    """Token ids of a user's turn before and after its one image; the first of the latter ends the image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    head, tail = qwen.render([{"role": "user", "content": content}])
    return head, tail


@dataclass(frozen=True, slots=True)
class _Rest:
    """The layers after the first look, over rows that lie where they are: see `StaticWork`.

    Attributes: as the arguments of `run_rest`.
    """

    qwen: QwenVL
    hidden: Tensor
    planes: Tensor
    positions: Tensor
    begin: int
    depth: int

    @property
    def inputs(self) -> Tensors:
        return self.hidden, self.planes

    def compute(self) -> Tensors:
        """Keys and values of these layers."""
        return (run_rest(self.qwen, self.hidden, self.planes, self.positions, self.begin, self.depth),)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
