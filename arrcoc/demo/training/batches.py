"""Training batches: canvases of one size with tokenised questions, drawn in worker processes.

Everything about a batch follows from (seed, step, rank), so a run that is killed goes on exactly where it
stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arrcoc.demo.placards import PICTURE, Example, families_for, glyph_labels, sample, target_tiles
from arrcoc.demo.training.recipe import Recipe
from arrcoc.errors import ConfigError
from arrcoc.qwen import QwenVL

_PROBE = "What is it?"

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
        self._tokenizer = qwen.tokenizer
        # Rendering the template takes a millisecond, so that it is done once: special tokens on either side
        # keep the question's own tokens apart from it.
        self._before, self._after = self._around(qwen.special.image_pad)
        self._end = qwen.tokenize("<|im_end|>")

    def tail(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids after the image, and labels of the same length."""
        asked = [*self._before, *self._ids(question), *self._after]
        reply = [*self._ids(answer), *self._end]
        return [*asked, *reply], [IGNORE] * len(asked) + reply

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _around(self, image_pad: int) -> tuple[list[int], list[int]]:
        """What the template puts between image and question, and between question and answer."""
        rendered = self._tokenizer.apply_chat_template(
            [_user(_PROBE)], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        asked, probe = list(rendered[rendered.index(image_pad) + 1 :]), self._ids(_PROBE)
        found = [i for i in range(len(asked)) if asked[i : i + len(probe)] == probe]
        if len(found) != 1:
            raise ConfigError(
                "a chat template that changes the question",
                "a template that writes it as it is between special tokens",
                "Train on a skeleton of `make_skeleton`",
            )
        return asked[: found[0]], asked[found[0] + len(probe) :]


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
        drawn = draw_step(self.recipe, self.steps[item], self.rank)
        examples = [self._example(index, drawn) for index in drawn.indices]
        return collate(examples, self.prompts, self.recipe.tile, drawn.canvas, drawn.mode, drawn.plan_seed)

    def _example(self, index: int, drawn: StepDraw) -> Example:
        families = step_families(drawn, index)
        return sample(self.recipe.seed, index, "train", drawn.canvas, families, photographs=self.photographs)


class StepDraw(NamedTuple):
    """What one rank does in one step: canvas side, mode, indices of its examples, share of pictures."""

    canvas: int
    mode: str
    indices: range
    pictures: float
    plan_seed: int


def draw_step(recipe: Recipe, step: int, rank: int) -> StepDraw:
    """Draw a step; canvas, mode and batch size are the same on every rank, so that all do equal work."""
    phase = recipe.phase(step)
    rng = np.random.default_rng([recipe.seed, step])
    canvas, size = phase.draw_canvas(rng)
    size = max(1, round(size * recipe.batch_scale))
    mode = phase.draw_mode(rng)
    first = (step * 4096 + rank * 512) * 2
    plan_seed = int(rng.integers(1 << 31)) * 64 + rank
    return StepDraw(canvas, mode, range(first, first + size), phase.pictures, plan_seed)


def step_families(drawn: StepDraw, index: int) -> list[str]:
    """Families that an example of a step is drawn from: pictures alone for their share, or all others."""
    possible = families_for(drawn.canvas)
    if PICTURE in possible and (index * 2654435761 % 1000) / 1000 < drawn.pictures:
        return [PICTURE]
    return [family for family in possible if family != PICTURE]


def collate(
    examples: list[Example],
    prompts: Prompts,
    tile: int,
    canvas: int,
    mode: str,
    plan_seed: int,
    pixels: Tensor | None = None,
) -> Batch:
    """Make a batch of examples of one canvas size; `pixels` stands in for their images."""
    pairs = [prompts.tail(example.question, example.answer) for example in examples]
    longest = max(len(ids) for ids, _ in pairs)
    tails = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels = torch.full((len(pairs), longest), IGNORE)
    for row, (ids, wanted) in enumerate(pairs):
        tails[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(wanted)] = torch.tensor(wanted)
    if pixels is None:
        stacked = np.stack([example.image for example in examples])
        pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
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
