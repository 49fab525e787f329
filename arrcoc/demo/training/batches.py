"""Training batches: canvases of one size with tokenised questions, drawn in worker processes.

Everything about a batch follows from (seed, step, rank), so a run that is killed goes on exactly where it
stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arrcoc.demo.placards import PICTURE, Example, families_for, glyph_labels, sample, target_tiles
from arrcoc.demo.training.recipe import Recipe
from arrcoc.qwen import QwenVL

IGNORE = -100
"""Label of tokens that are not part of the answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B examples of one canvas size.

    Attributes:
        images: uint8 [B, 3, S, S].
        tails: int64 [B, M], token ids after the image (question, answer, end of turn), padded on the right.
        labels: int64 [B, M], the answer's tokens and its end of turn where they stand in `tails`, else
            IGNORE.
        glyphs: int64 [B, S/16, S/16], the glyph in each patch.
        targets: bool [B, R, C], tiles that must be seen in detail.
        families: the question family of each example.
        questions: the question of each example.
        answers: the answer of each example.
        canvas: S.
        mode: which way of encoding this step takes (see `arrcoc.demo.training.modes`).
        plan_seed: seeds the choice of allocations.
    """

    images: Tensor
    tails: Tensor
    labels: Tensor
    glyphs: Tensor
    targets: Tensor
    families: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    canvas: int
    mode: str
    plan_seed: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("images", "tails", "labels", "glyphs", "targets")
        }
        plain = {
            name: getattr(self, name)
            for name in ("families", "questions", "answers", "canvas", "mode", "plan_seed")
        }
        return Batch(**moved, **plain)


class Prompts:
    """The chat template around a question, as token ids; picklable, so that workers tokenise."""

    def __init__(self, qwen: QwenVL) -> None:
        """Args: the checkpoint whose tokenizer and template are used."""
        self.head, _ = qwen.render([_user("?")])
        self._qwen_parts = qwen.tokenizer, qwen.special.image_pad
        self._end = qwen.tokenize("<|im_end|>")

    def tail(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids after the image, and labels of the same length."""
        tokenizer, image_pad = self._qwen_parts
        text = tokenizer.apply_chat_template(
            [_user(question)], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        asked = text[text.index(image_pad) + 1 :]
        reply = [*tokenizer(answer, add_special_tokens=False).input_ids, *self._end]
        return [*asked, *reply], [IGNORE] * len(asked) + reply


class BatchDataset(Dataset[Batch]):
    """Item i is the whole batch of step `start + i` for one rank."""

    def __init__(
        self, recipe: Recipe, prompts: Prompts, steps: range, rank: int, photographs: Path | None = None
    ) -> None:
        """Args: recipe; how prompts are written; which steps; which process; more photographs."""
        self.recipe, self.prompts, self.steps, self.rank = recipe, prompts, steps, rank
        self.photographs = photographs

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __getitem__(self, item: int) -> Batch:
        """The batch of one step."""
        torch.set_num_threads(1)
        step = self.steps[item]
        phase = self.recipe.phase(step)
        # The draw is the same on every rank, so that all of them do equal work.
        rng = np.random.default_rng([self.recipe.seed, step])
        canvas, size = phase.draw_canvas(rng)
        size = max(1, round(size * self.recipe.batch_scale))
        mode = phase.draw_mode(rng)
        first = (step * 4096 + self.rank * 512) * 2
        examples = [self._example(first + place, canvas, phase.pictures) for place in range(size)]
        plan_seed = int(rng.integers(1 << 31)) * 64 + self.rank
        return collate(examples, self.prompts, self.recipe.tile, canvas, mode, plan_seed)

    def _example(self, index: int, canvas: int, pictures: float) -> Example:
        possible = [family for family in families_for(canvas) if family != PICTURE]
        with_picture = PICTURE in families_for(canvas) and (index * 2654435761 % 1000) / 1000 < pictures
        families = [PICTURE] if with_picture else possible
        return sample(self.recipe.seed, index, "train", canvas, families, photographs=self.photographs)


def collate(
    examples: list[Example], prompts: Prompts, tile: int, canvas: int, mode: str, plan_seed: int
) -> Batch:
    """Make a batch of examples of one canvas size."""
    pairs = [prompts.tail(example.question, example.answer) for example in examples]
    longest = max(len(ids) for ids, _ in pairs)
    tails = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels = torch.full((len(pairs), longest), IGNORE)
    for row, (ids, wanted) in enumerate(pairs):
        tails[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(wanted)] = torch.tensor(wanted)
    pixels = (
        torch.from_numpy(np.stack([example.image for example in examples])).permute(0, 3, 1, 2).contiguous()
    )
    return Batch(
        images=pixels,
        tails=tails,
        labels=labels,
        glyphs=torch.from_numpy(np.stack([glyph_labels(example) for example in examples])),
        targets=torch.from_numpy(np.stack([target_tiles(example, tile) for example in examples])),
        families=tuple(example.family for example in examples),
        questions=tuple(example.question for example in examples),
        answers=tuple(example.answer for example in examples),
        canvas=canvas,
        mode=mode,
        plan_seed=plan_seed,
    )


def _user(question: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
