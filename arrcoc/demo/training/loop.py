"""The training loop: one process per GPU, resumable at any step, with its curves on disk."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from arrcoc.demo.placards import ALPHABET
from arrcoc.demo.training.batches import Batch, Prompts
from arrcoc.demo.training.export import load_weights
from arrcoc.demo.training.feed import Feed
from arrcoc.demo.training.flat import FlatAdam
from arrcoc.demo.training.forward import AnswerLoss, Losses
from arrcoc.demo.training.modes import BatchEncoder
from arrcoc.demo.training.recipe import Recipe
from arrcoc.qwen import QwenVL

logger = logging.getLogger(__name__)

STATE = "state.pt"
LOG = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Run:
    """Where and how a run goes on.

    Attributes:
        folder: of its state and log.
        skeleton: checkpoint folder that gives config, tokenizer and chat template.
        photographs: folder of further photographs for backgrounds.
        workers: processes that draw batches, per GPU.
        stop_after: seconds after which the run saves itself and stops; None for never.
        save_every: seconds between saves.
        initial: an exported checkpoint folder whose weights the run starts from, with a fresh optimiser;
            a run that has a state of its own goes on with that.
    """

    folder: Path
    skeleton: Path
    photographs: Path | None = None
    workers: int = 2
    stop_after: float | None = None
    save_every: float = 120.0
    initial: Path | None = None


class Trainer:
    """Trains one model; see `train`."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        """Args: what is trained on; where the run lives."""
        self.recipe, self.run = recipe, run
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = _device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.manual_seed(recipe.seed)
        config: Any = Qwen3VLConfig.from_pretrained(run.skeleton)
        stock: Any = Qwen3VLForConditionalGeneration
        self.model = stock._from_config(config, attn_implementation="sdpa").float()
        if run.initial is not None:
            load_weights(self.model, run.initial)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        _move(self.model, self.device, dtype)
        self.qwen = QwenVL(self.model, AutoTokenizer.from_pretrained(run.skeleton), ([0.5] * 3, [0.5] * 3))
        self.prompts = Prompts(self.qwen)
        glyph_head = nn.Linear(config.vision_config.hidden_size, len(ALPHABET) + 1).to(self.device, dtype)
        self.loss = AnswerLoss(self.model, self.qwen, self.prompts, glyph_head)
        self.encoder = BatchEncoder(self.model, recipe)
        self.adam = FlatAdam([*self.model.parameters(), *glyph_head.parameters()], recipe, self.world)
        self.step, self.spent = 0, 0.0

    def fit(self) -> bool:
        """Train until the recipe's last step, or until `stop_after`; returns whether it is done."""
        self._resume()
        begun = saved = time.monotonic()
        steps = range(self.step, self.recipe.steps)
        with self._progress() as progress:
            task = progress.add_task("train", total=self.recipe.steps, completed=self.step, loss=float("nan"))
            for batch in self._batches(steps):
                losses = self._step(batch)
                if self.step % 50 == 0:
                    record = self._log(losses, batch, begun)
                    progress.update(task, completed=self.step, loss=record["answer"])
                now = time.monotonic()
                out_of_time = self._agree(
                    self.run.stop_after is not None and now - begun > self.run.stop_after
                )
                if out_of_time or now - saved > self.run.save_every:
                    self._save(now - begun)
                    saved = now
                if out_of_time:
                    return self.step >= self.recipe.steps
        self._save(time.monotonic() - begun)
        return True

    def averaged_state(self) -> dict[str, Tensor]:
        """The model's state dict with the moving average of the weights."""
        # A tied parameter has two names in the state dict and one place in the buffer.
        means = dict(zip(map(id, self.adam.parameters), self.adam.unflatten(self.adam.average), strict=True))
        named = self.model.state_dict(keep_vars=True)
        return {name: means.get(id(tensor), tensor).detach() for name, tensor in named.items()}

    def _step(self, batch: Batch) -> Losses:
        losses: Losses = self.loss(batch, self.encoder.encode(batch))
        recipe = self.recipe
        total = losses.answer + recipe.glyph_weight * losses.glyph + recipe.evidence_weight * losses.evidence
        total.backward()  # type: ignore[no-untyped-call]
        self.adam.step(self.step)
        self.step += 1
        return losses

    def _batches(self, steps: range) -> Iterator[Batch]:
        feed = Feed(self.recipe, self.prompts, self.rank, self.device, self.run.photographs, self.run.workers)
        return feed.batches(steps)

    def _log(self, losses: Losses, batch: Batch, begun: float) -> dict[str, Any]:
        record = {
            "step": self.step,
            "seconds": self.spent + time.monotonic() - begun,
            "canvas": batch.canvas,
            "mode": batch.mode,
            "answer": float(losses.answer.detach()),
            "glyph": float(losses.glyph.detach()),
            "evidence": float(losses.evidence.detach()),
            "right": float(losses.right.float().mean()),
            "rate": self.recipe.rate(self.step),
        }
        if self.rank == 0:
            with (self.run.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            logger.info(
                "step %(step)d canvas %(canvas)d %(mode)s "
                "loss %(answer).3f glyph %(glyph).3f evidence %(evidence).2f right %(right).2f",
                record,
            )
        return record

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=Console(stderr=True), disable=self.rank != 0)

    def _agree(self, wish: bool) -> bool:
        """Whether any process wishes to stop; asked every few steps, for it waits for the device."""
        if self.world == 1 or self.step % 20:
            return wish and self.world == 1
        flag = torch.tensor(float(wish), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _save(self, elapsed: float) -> None:
        if self.rank:
            return
        state = {
            "recipe": repr(self.recipe),
            "step": self.step,
            "seconds": self.spent + elapsed,
            "adam": self.adam.state(),
        }
        self.run.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.run.folder / f".{STATE}.partial"
        torch.save(state, scratch)
        scratch.replace(self.run.folder / STATE)

    def _resume(self) -> None:
        path = self.run.folder / STATE
        self.run.folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["recipe"] != repr(self.recipe):
            logger.warning(
                "The run in %s was begun with another recipe; going on with this one", self.run.folder
            )
        self.adam.load(state["adam"])
        self.step, self.spent = state["step"], state["seconds"]
        logger.info("Resumed at step %d", self.step)


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model, its rotary frequencies in FP32: in bfloat16 they would turn distant tokens wrongly."""
    frequencies = {
        module: buffer.clone()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name == "inv_freq"
    }
    model.to(device, dtype).train()
    for module, values in frequencies.items():
        module.register_buffer("inv_freq", values.to(device), persistent=False)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    # cuDNN's attention builds a plan of some 50 ms for every new shape, and here shapes never repeat.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl")
    return torch.device("cuda", local_rank)


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for the record beside the weights."""
    return asdict(recipe)
