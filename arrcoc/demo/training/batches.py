"""Training batches: canvases of one size with tokenised questions, drawn in worker processes.

Everything about a batch follows from (seed, step, rank), so a run that is killed goes on exactly where it
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from arrcoc.demo.placards import (
    MOST_EVIDENCE,
    PICTURE,
    Example,
    evidence,
    families_for,
    glyph_labels,
    sample,
    target_tiles,
)
from arrcoc.demo.training.allocations import draw_allocation
from arrcoc.demo.training.recipe import Recipe
from arrcoc.errors import ConfigError
from arrcoc.qwen import QwenVL

_PROBE = "What is it?"

_MOST_EXAMPLES = 4096  # of one process in one step: their numbers never meet those of another
_BLIND = ("count", "exists", "where")  # families that a glimpse alone may answer

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
        targets: bool [B, R, C], tiles that must be seen in detail; stays on the CPU.
        evidence: fp32 [B, 5, 4], boxes that the answer is read off, as centre and half size (x, y, w, h) in
            px; half sizes are 0 where there are fewer.
        lod: int64 [B, R*C], the drawn allocation; stays on the CPU.
        families: the question family of each example.
        questions: the question of each example.
        answers: the answer of each example.
        canvas: S.
        mode: which way of encoding this step takes (see `arrcoc.demo.training.modes`).
        plan_seed: seeds the choice of allocations; 64 processes share a step's halo and stride.
        answered: int64 [2, K], rows and columns of `tails` that predict a token of the answer.
        last: int64 [B], column of `tails` that ends the prompt and predicts the answer's first token.
    """

    images: Tensor
    tails: Tensor
    labels: Tensor
    glyphs: Tensor
    targets: Tensor
    evidence: Tensor
    lod: Tensor
    answered: Tensor
    last: Tensor
    families: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    canvas: int
    mode: str
    plan_seed: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; what the host decides by stays on the host."""
        pinned = device.type == "cuda"

        def moved(tensor: Tensor) -> Tensor:
            # Only a copy from pinned memory does not wait for the device's queue.
            return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

        names = ("images", "tails", "labels", "glyphs", "evidence", "answered", "last")
        sent: dict[str, Any] = {name: moved(getattr(self, name)) for name in names}
        return replace(self, **sent)


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
    often: Callable[[Sequence[str]], list[str]] = list


def draw_step(recipe: Recipe, step: int, rank: int) -> StepDraw:
    """Draw a step; canvas, mode and batch size are the same on every rank, so that all do equal work."""
    phase = recipe.phase(step)
    rng = np.random.default_rng([recipe.seed, step])
    canvas, mode = phase.draw_canvas(rng), phase.draw_mode(rng)
    plan_seed = int(rng.integers(1 << 31)) * 64 + rank
    size = recipe.batch(phase, canvas, mode, recipe.margins(plan_seed // 64)[0])
    first = (step * 64 + rank) * _MOST_EXAMPLES
    return StepDraw(canvas, mode, range(first, first + size), phase.pictures, plan_seed, recipe.often)


def step_families(drawn: StepDraw, index: int) -> list[str]:
    """What an example's family is drawn from with equal chance: pictures alone for their share, or others."""
    possible = families_for(drawn.canvas)
    if PICTURE in possible and (index * 2654435761 % 1000) / 1000 < drawn.pictures:
        return [PICTURE]
    return drawn.often([family for family in possible if family != PICTURE])


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
        if mode != "glimpse" or examples[row].family in _BLIND:
            labels[row, : len(wanted)] = torch.tensor(wanted)
    if pixels is None:
        stacked = np.stack([example.image for example in examples])
        pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    targets = torch.from_numpy(np.stack([target_tiles(example, tile) for example in examples]))
    rows, columns = (labels != IGNORE).nonzero(as_tuple=True)
    return Batch(
        images=pixels,
        tails=tails,
        labels=labels,
        glyphs=torch.from_numpy(np.stack([glyph_labels(example) for example in examples])),
        targets=targets,
        evidence=torch.from_numpy(np.stack([_evidence(example) for example in examples])),
        lod=draw_allocation(targets, mode, torch.Generator().manual_seed(plan_seed)),
        answered=torch.stack((rows, columns - 1)),
        last=torch.tensor([next(i for i, w in enumerate(wanted) if w != IGNORE) - 1 for _, wanted in pairs]),
        families=tuple(example.family for example in examples),
        questions=tuple(example.question for example in examples),
        answers=tuple(example.answer for example in examples),
        canvas=canvas,
        mode=mode,
        plan_seed=plan_seed,
    )


def _evidence(example: Example) -> NDArray[np.float32]:
    boxes = np.zeros((MOST_EVIDENCE, 4), np.float32)
    for place, (x0, y0, x1, y1) in enumerate(evidence(example)):
        boxes[place] = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return boxes


def _user(question: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
