"""`torchrun --nproc-per-node N -m arrcoc.demo.training FOLDER`: what `arrcoc demo train` starts on N GPUs."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields
from pathlib import Path

from arrcoc.demo.training.command import Settings, work

_KINDS = {"steps": int, "seed": int, "devices": int, "workers": int, "measure": int}
_KINDS_MORE = {
    "stop_after": float,
    "begin": float,
    "batch_scale": float,
    "photographs": Path,
    "initial": Path,
}


def main() -> None:
    """Train until done or out of time; the first process writes the checkpoint and the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quiet", action="store_true", help="log warnings only")
    for field in fields(Settings)[1:]:
        kind = (_KINDS | _KINDS_MORE).get(field.name, str)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    given = vars(parser.parse_args())
    rank = int(os.environ.get("RANK", "0"))
    level = logging.WARNING if given.pop("quiet") or rank else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    work(Settings(**given | {"devices": int(os.environ.get("WORLD_SIZE", "1"))}))


if __name__ == "__main__":
    main()
