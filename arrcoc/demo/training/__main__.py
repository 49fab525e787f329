"""`torchrun --nproc-per-node N -m arrcoc.demo.training FOLDER`: train on N GPUs of one machine, or resume."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from arrcoc.demo.training import measure
from arrcoc.demo.training.export import export
from arrcoc.demo.training.loop import Run, Trainer, describe
from arrcoc.demo.training.recipe import Recipe
from arrcoc.demo.training.skeleton import make_skeleton

logger = logging.getLogger("arrcoc.demo.training")


def main() -> None:
    """Train until done or out of time; write the checkpoint to FOLDER/checkpoint."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = _arguments()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s"
    )
    recipe = replace(
        Recipe(),
        steps=arguments.steps,
        seed=arguments.seed,
        batch_scale=arguments.batch_scale,
        source=arguments.source,
    )
    skeleton = make_skeleton(arguments.folder / "skeleton")
    run = Run(
        arguments.folder,
        skeleton,
        arguments.photographs,
        arguments.workers,
        arguments.stop_after,
        initial=arguments.initial,
    )
    trainer = Trainer(recipe, run)
    done = trainer.fit()
    if rank == 0:
        _finish(trainer, arguments, done)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _finish(trainer: Trainer, arguments: argparse.Namespace, done: bool) -> None:
    trainer.model.eval()
    trainer.model.load_state_dict(trainer.averaged_state())
    found = {}
    for canvas, batches, size in ((1024, 16, 24), (512, 6, 32), (2048, 6, 6)):
        found[canvas] = measure.accuracy(
            trainer.loss,
            trainer.encoder,
            trainer.recipe,
            trainer.prompts,
            trainer.device,
            canvas,
            range(min(batches, arguments.measure)),
            size,
            arguments.workers,
            None,
        )
        logger.info("%d px, test split\n%s", canvas, measure.table(found[canvas]))
    record = {
        "recipe": describe(trainer.recipe),
        "steps": trainer.step,
        "done": done,
        "seconds": trainer.spent,
        "processes": trainer.world,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("ARRCOC_COMMIT"),
        "held_out": found,
    }
    export(trainer.averaged_state(), trainer.run.skeleton, arguments.folder / "checkpoint", record)
    (arguments.folder / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-scale", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=None, help="seconds")
    parser.add_argument("--measure", type=int, default=16, help="most held-out batches per canvas size")
    parser.add_argument("--photographs", type=Path, default=None)
    parser.add_argument("--source", choices=("drawn", "composed"), default=Recipe().source)
    parser.add_argument("--initial", type=Path, default=None, help="exported folder to start from")
    return parser.parse_args()


if __name__ == "__main__":
    main()
