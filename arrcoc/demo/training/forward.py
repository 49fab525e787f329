"""Losses of a training batch: the answer's tokens, the glyph in each patch, and where the prompt looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arrcoc.demo.placards import NO_GLYPH
from arrcoc.demo.training.batches import Batch, Prompts
from arrcoc.demo.training.modes import Encoded
from arrcoc.demo.training.text import Watch, fuse_norms, run_text
from arrcoc.qwen import QwenVL
from arrcoc.sequence import caption

_EMPTY_PATCH_WEIGHT = 0.03  # nearly all patches hold no glyph


class Losses(NamedTuple):
    """What a step is judged by.

    Attributes:
        answer: mean cross-entropy of the answer's tokens.
        glyph: weighted cross-entropy of the glyph in each patch at full resolution.
        evidence: how much of the attention of the prompt's end misses what the answer is read off.
        right: bool [B], whether every token of the answer is the likeliest.
    """

    answer: Tensor
    glyph: Tensor
    evidence: Tensor
    right: Tensor


class Joined(NamedTuple):
    """A batch as the text model takes it; N tokens, padded on the right.

    Attributes:
        embeds: [B, N, D].
        planes: [L, B, N, D], zero where there is no vision token.
        positions: fp32 [3, B, N].
        spot: fp32 [B, 2, N], the centre (y, x) in px of what a vision token shows.
        reach: fp32 [B, N], half of its side in px; below 0 where there is no vision token.
        tail: int64 [B], where `Batch.tails` begins.
    """

    embeds: Tensor
    planes: Tensor
    positions: Tensor
    spot: Tensor
    reach: Tensor
    tail: Tensor


class AnswerLoss(nn.Module):
    """Joins text and vision, runs the stock text model and scores the answers."""

    def __init__(self, model: Any, qwen: QwenVL, prompts: Prompts, glyph_head: nn.Linear) -> None:
        """Args: the stock model in training; its wrapper; the prompts; the auxiliary head."""
        super().__init__()
        self._text, self._lm_head = [model.model.language_model], [model.lm_head]  # in lists: not submodules
        self._qwen, self._head, self.glyph_head = qwen, prompts.head, glyph_head
        self._sent: dict[Any, Tensor] = {}
        fuse_norms(model.model.language_model)

    def forward(self, batch: Batch, encoded: Encoded) -> Losses:
        """Losses of a batch."""
        joined = self._join_crops(batch, encoded) if encoded.crops else self._join(batch, encoded)
        last = joined.tail + batch.last
        watch = Watch(last, joined.spot, joined.reach, batch.evidence)
        hidden, looked = run_text(self._text[0], joined.embeds, joined.positions, joined.planes, watch)
        return self._score(hidden, joined.tail, batch, encoded, looked)

    def _score(self, hidden: Tensor, tail: Tensor, batch: Batch, encoded: Encoded, looked: Tensor) -> Losses:
        rows, columns = batch.answered
        logits = self._lm_head[0](hidden[rows, tail[rows] + columns]).float()
        wanted = batch.labels[rows, columns + 1]
        answer = nn.functional.cross_entropy(logits, wanted)
        wrong = torch.zeros(len(hidden), device=hidden.device)
        wrong = wrong.index_add(0, rows, (logits.argmax(-1) != wanted).float())
        return Losses(answer, self._glyph(encoded), looked, wrong == 0)

    def _glyph(self, encoded: Encoded) -> Tensor:
        if not len(encoded.glyph_labels):
            return encoded.part.tokens.new_zeros(()).float()
        weight = self._constant("weight", [1.0] * NO_GLYPH + [_EMPTY_PATCH_WEIGHT])
        logits = self.glyph_head(encoded.glyph_states).float()
        return nn.functional.cross_entropy(logits, encoded.glyph_labels, weight=weight)

    def _constant(self, name: Any, values: Any) -> Tensor:
        """A tensor on the device, sent once: sending waits for the device's queue."""
        if name not in self._sent:
            self._sent[name] = torch.tensor(values, device=self.glyph_head.weight.device)
        return self._sent[name]

    def _embed(self, ids: Tensor) -> Tensor:
        return self._text[0].embed_tokens(ids)  # type: ignore[no-any-return]

    def _join(self, batch: Batch, encoded: Encoded) -> Joined:
        part, start = encoded.part, len(self._head)
        size, count = part.tokens.shape[:2]
        device, length = part.tokens.device, batch.tails.shape[1]
        head = self._embed(self._constant("head", self._head)).expand(size, -1, -1)
        embeds = torch.cat((head, part.tokens.to(head.dtype), self._embed(batch.tails)), 1)
        before = torch.arange(start, device=device).float().expand(3, size, -1)
        where = nn.functional.pad(part.where, (0, 0, 1, 0)).transpose(0, 1) + start
        after = torch.arange(length, device=device).float() + start + encoded.extent
        return Joined(
            embeds,
            nn.functional.pad(part.planes, (0, 0, start, length)),
            torch.cat((before, where, after.expand(3, size, -1)), 2),
            nn.functional.pad(part.spot, (start, length)),
            nn.functional.pad(part.reach, (start, length), value=-1.0),
            torch.full((size,), start + count, device=device),
        )

    def _join_crops(self, batch: Batch, encoded: Encoded) -> Joined:
        """The same where captions of differing length stand between the images."""
        rows = [self._crop_row(batch, encoded, row) for row in range(len(batch.families))]
        longest = max(len(row.ids) for row in rows) + batch.tails.shape[1]
        device = encoded.part.tokens.device

        def sent(values: Sequence[Sequence[float]], fill: float, kind: torch.dtype) -> Tensor:
            padded = torch.tensor([[*v, *[fill] * (longest - len(v))] for v in values], dtype=kind)
            return (padded.pin_memory() if device.type == "cuda" else padded).to(device, non_blocking=True)

        places = sent([row.places for row in rows], -1, torch.long)
        tail = sent([[len(row.ids)] + [0] * (longest - 1) for row in rows], 0, torch.long)[:, 0]
        ids = sent([row.ids for row in rows], 0, torch.long)
        height, width = (sent([getattr(row, n) for row in rows], 0, torch.float) for n in ("rows", "columns"))
        text = sent([row.steps for row in rows], 0, torch.float)
        begin = sent([[row.next] + [0.0] * (longest - 1) for row in rows], 0, torch.float)[:, 0]
        # The tails, at differing places: their ids and positions are scattered over the padding.
        reach = torch.arange(batch.tails.shape[1], device=device)
        slots = tail[:, None] + reach
        ids = ids.scatter(1, slots, batch.tails)
        spread = begin[:, None] + reach
        steps, height, width = (p.scatter(1, slots, spread) for p in (text, height, width))
        part, example = encoded.part, torch.arange(len(rows), device=device)[:, None]
        is_vision, index = places >= 0, places.clamp(min=0)
        seen = is_vision[..., None]
        return Joined(
            torch.where(seen, part.tokens[example, index].to(self._embed(ids).dtype), self._embed(ids)),
            torch.where(seen, part.planes[:, example, index], 0.0),
            torch.stack((steps, height, width)),
            part.spot.transpose(1, 2)[example, index].transpose(1, 2),
            torch.where(is_vision, part.reach[example, index], -1.0),
            tail,
        )

    def _crop_row(self, batch: Batch, encoded: Encoded, row: int) -> _Row:
        """Text ids, places of vision tokens and positions of one example, up to its tail."""
        special, made = self._qwen.special, _Row()
        grid = (batch.targets.shape[1], batch.targets.shape[2])
        made.text(self._head)
        first = encoded.crops[row][0][1] if encoded.crops[row] else encoded.part.tokens.shape[1]
        side = round(first**0.5)
        made.image(0, side, encoded.extent, encoded.extent / side)
        for tile, start, width in encoded.crops[row]:
            words = self._qwen.tokenize(f"\n{caption(tile, *grid)}")
            made.text([special.vision_end, *words, special.vision_start])
            made.image(start, width, float(width), 1.0)
        return made


class _Row:
    """The sequence of one example as it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.places: list[int] = []
        self.steps: list[float] = []
        self.rows: list[float] = []
        self.columns: list[float] = []
        self.next = 0.0

    def text(self, ids: list[int]) -> None:
        steps = [self.next + i for i in range(len(ids))]
        self.ids += ids
        self.places += [-1] * len(ids)
        for line in (self.steps, self.rows, self.columns):
            line += steps
        self.next += len(ids)

    def image(self, start: int, side: int, extent: float, scale: float) -> None:
        """side * side vision tokens from `start` on, `scale` apart."""
        offsets = [(i + 0.5) * scale - 0.5 + self.next for i in range(side)]
        count = side * side
        self.ids += [0] * count
        self.places += range(start, start + count)
        self.steps += [self.next] * count
        self.rows += [offset for offset in offsets for _ in range(side)]
        self.columns += offsets * side
        self.next += extent
