"""Loss of a training batch: the answer's tokens after image and question, and the glyph in each patch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arrcoc.demo.placards import NO_GLYPH
from arrcoc.demo.training.batches import IGNORE, Batch, Prompts
from arrcoc.demo.training.modes import Encoded
from arrcoc.qwen import QwenVL

_EMPTY_PATCH_WEIGHT = 0.03  # nearly all patches hold no glyph


class Losses(NamedTuple):
    """What a step is judged by.

    Attributes:
        answer: mean cross-entropy of the answer's tokens.
        glyph: weighted cross-entropy of the glyph in each patch at full resolution.
        right: bool [B], whether every token of the answer is the likeliest.
    """

    answer: Tensor
    glyph: Tensor
    right: Tensor


class AnswerLoss(nn.Module):
    """Joins text and vision, runs the stock text model and scores the answers."""

    def __init__(self, model: Any, qwen: QwenVL, prompts: Prompts, glyph_head: nn.Linear) -> None:
        """Args: the stock model in training; its wrapper; the prompts; the auxiliary head."""
        super().__init__()
        self._text, self._lm_head = [model.model.language_model], [model.lm_head]  # in lists: not submodules
        self._qwen, self._head, self.glyph_head = qwen, prompts.head, glyph_head

    def forward(self, batch: Batch, encoded: Encoded) -> Losses:
        """Losses of a batch."""
        if len(encoded.cuts) > 1:
            embeds, positions, vision, labels = self._join_crops(batch, encoded)
        else:
            embeds, positions, vision, labels = self._join(batch, encoded)
        planes = [plane.flatten(0, 1) for plane in encoded.deepstack]
        hidden = self._text[0](
            inputs_embeds=embeds,
            position_ids=positions,
            visual_pos_masks=vision,
            deepstack_visual_embeds=planes,
            use_cache=False,
        ).last_hidden_state
        return self._score(hidden, labels, encoded)

    def _score(self, hidden: Tensor, labels: Tensor, encoded: Encoded) -> Losses:
        wanted = labels[:, 1:]
        asked = wanted != IGNORE
        logits = self._lm_head[0](hidden[:, :-1][asked]).float()
        answer = nn.functional.cross_entropy(logits, wanted[asked])
        wrong = torch.zeros(asked.shape, device=asked.device)
        wrong[asked] = (logits.argmax(-1) != wanted[asked]).float()
        return Losses(answer, self._glyph(encoded), wrong.sum(1) == 0)

    def _glyph(self, encoded: Encoded) -> Tensor:
        if not len(encoded.glyph_labels):
            return encoded.tokens.new_zeros(()).float()
        weight = torch.ones(NO_GLYPH + 1, device=encoded.tokens.device)
        weight[NO_GLYPH] = _EMPTY_PATCH_WEIGHT
        logits = self.glyph_head(encoded.glyph_states).float()
        return nn.functional.cross_entropy(logits, encoded.glyph_labels, weight=weight)

    def _embed(self, ids: Tensor) -> Tensor:
        return self._text[0].embed_tokens(ids)  # type: ignore[no-any-return]

    def _join(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings [B, N, D], positions [3, B, N], vision mask [B, N] and labels [B, N]."""
        size, count = encoded.tokens.shape[:2]
        device = encoded.tokens.device
        head = torch.tensor(self._head, device=device).expand(size, -1)
        start, after = len(self._head), len(self._head) + encoded.extent
        embeds = torch.cat(
            (self._embed(head), encoded.tokens.to(self._embed(head).dtype), self._embed(batch.tails)), 1
        )
        before = torch.arange(start, device=device).float().expand(3, size, -1)
        where = torch.cat((torch.zeros_like(encoded.where[:, :1]), encoded.where), 1).transpose(0, 1) + start
        tail = (torch.arange(batch.tails.shape[1], device=device).float() + after).expand(3, size, -1)
        vision = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=device)
        vision[:, start : start + count] = True
        blank = torch.full((size, start + count), IGNORE, device=device)
        return embeds, torch.cat((before, where, tail), 2), vision, torch.cat((blank, batch.labels), 1)

    def _join_crops(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same where captions of differing length stand between the images; padded on the right."""
        grid = (batch.targets.shape[1], batch.targets.shape[2])
        rows = [self._crop_row(batch, encoded, row, grid) for row in range(len(batch.images))]
        longest = max(len(row[3]) for row in rows)

        def padded(tensors: list[Tensor], dim: int, value: float) -> Tensor:
            pads = [(0, 0) * (t.dim() - 1 - dim) + (0, longest - t.shape[dim]) for t in tensors]
            return torch.stack(
                [nn.functional.pad(t, p, value=value) for t, p in zip(tensors, pads, strict=True)]
            )

        embeds, positions, vision, labels = ([row[i] for row in rows] for i in range(4))
        spread = padded(positions, 1, 0.0).transpose(0, 1)
        return padded(embeds, 0, 0.0), spread, padded(vision, 0, False), padded(labels, 0, IGNORE)

    def _crop_row(
        self, batch: Batch, encoded: Encoded, row: int, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from arrcoc.sequence import caption  # same words as at inference

        device, special = encoded.tokens.device, self._qwen.special
        position = float(len(self._head))
        pieces = [self._text_piece(torch.tensor(self._head, device=device), 0.0, None)]
        for start, stop, extent, tiles in encoded.cuts:
            if tiles is not None:
                words = self._qwen.tokenize(f"\n{caption(int(tiles[row]), *grid)}")
                ids = torch.tensor([special.vision_end, *words, special.vision_start], device=device)
                pieces.append(self._text_piece(ids, position, None))
                position += len(ids)
            where = encoded.where[row, :, start:stop]
            spot = torch.cat((torch.zeros_like(where[:1]), where)) + position
            tokens = encoded.tokens[row, start:stop]
            pieces.append(
                (
                    tokens.to(pieces[0][0].dtype),
                    spot,
                    tokens.new_ones(len(tokens), dtype=torch.bool),
                    batch.labels.new_full((len(tokens),), IGNORE),
                )
            )
            position += extent
        pieces.append(self._text_piece(batch.tails[row], position, batch.labels[row]))
        embeds, positions, vision, labels = zip(*pieces, strict=True)
        return torch.cat(embeds), torch.cat(positions, 1), torch.cat(vision), torch.cat(labels)

    def _text_piece(
        self, ids: Tensor, position: float, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        spot = (torch.arange(len(ids), device=ids.device).float() + position).expand(3, -1)
        plain = torch.full_like(ids, IGNORE) if labels is None else labels
        return self._embed(ids), spot, torch.zeros_like(ids, dtype=torch.bool), plain
