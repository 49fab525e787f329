"""Accuracy against vision tokens on held-out placards: runs `arrcoc eval`, keeps its result and its curve.

    python benchmarks/accuracy.py [--model FOLDER] [--count 72] [--workers 1] [--answers FOLDER]

A run that is cut off goes on from the answers in its folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, ROOT, progress

METHODS = "arrcoc,downscale,random,saliency,fastv,visionzip,oracle"
BUDGETS = "0.04,0.0625,0.125,0.25,0.5,1.0"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the evaluation; see the module's docstring."""
    given = _parser().parse_args(arguments)
    command = [
        *("arrcoc", "eval", "--out", str(given.answers), "--dataset", "placards", "--preset", given.preset),
        *("--methods", given.methods, "--budgets", given.budgets, "--count", str(given.count)),
        *("--workers", str(given.workers), "--device", given.device),
        *(("--model", str(given.model)) if given.model else ()),
    ]
    progress(" ".join(command))
    subprocess.run(command, check=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(given.answers / "results.json", given.out)
    if given.picture:
        shutil.copyfile(given.answers / "curve.png", given.picture)
    progress(f"{given.out.name} written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; default: the bundled one")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--count", type=int, default=72, help="questions")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--answers", type=Path, default=Path("out/accuracy"), help="folder of the answers")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "accuracy.png")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
