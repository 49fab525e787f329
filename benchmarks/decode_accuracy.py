"""Answers of the bundled checkpoint with each way of decoding: how many are right, how many change.

Sixty questions of the held-out split, ten of each family, at full resolution and at an eighth of its tokens.
What changes nothing but speed must change no answer; weights of one byte may.

    python benchmarks/decode_accuracy.py [--each 10] [--device cpu] [--dtype auto]
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import RESULTS, facts, progress, write_result

import arrcoc
from arrcoc.demo.placards import FAMILIES, sample
from arrcoc.evaluation.metrics import exact_match

SEED, BUDGETS, NEW_TOKENS = 2026, {"full": 1024, "eighth": 128}, 12
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"decoder": "eager"},
    "graphed": {"decoder": "graphed"},
    "prefill in chunks": {"decoder": "eager", "prefill_chunk": 100},
    "prompt lookup": {"speculative": "prompt_lookup"},
    "batches of 10": {"decoder": "eager"},
    "int8": {"decode_weights": "int8"},
    "float8": {"decode_weights": "float8"},
}
"""Fields of the configuration; the first is what the others are compared with."""

Case = tuple[np.ndarray[Any, Any], str, str]


def cases(each: int) -> list[Case]:
    """Image, question and answer of the first cases of every family."""
    drawn = [sample(SEED, index, "test", 1024, [family]) for family in FAMILIES for index in range(each)]
    return [(d.image, d.question, d.answer) for d in drawn]


def answers(engine: arrcoc.Engine, drawn: Sequence[Case], budget: int, batch: int) -> list[str]:
    """What the engine says, one by one or in batches."""
    if not batch:
        return [engine.ask(i, q, budget, NEW_TOKENS).text for i, q, _ in drawn]
    said: list[str] = []
    for start in range(0, len(drawn), batch):
        requests = [(i, q, budget) for i, q, _ in drawn[start : start + batch]]
        said += [answer.text for answer in engine.ask_batch(requests, NEW_TOKENS)]
    return said


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON."""
    options = read_options(arguments, __doc__, WAYS, "decode_accuracy.json")
    drawn, wanted = cases(options.each), options.ways or list(WAYS)
    result: dict[str, Any] = {"benchmark": "decode_accuracy"}
    result |= facts("benchmarks/decode_accuracy.py", arguments, torch.device(options.device))
    result |= {"cases": len(drawn), "ways": {}}
    usual: dict[str, list[str]] = {}
    for way in ["eager", *(w for w in wanted if w != "eager")]:
        begin = perf_counter()
        engine = arrcoc.Engine.from_pretrained(device=options.device, dtype=options.dtype, **WAYS[way])
        row: dict[str, Any] = {"decoder": engine.describe()["decoder"]}
        for name, budget in BUDGETS.items():
            said = answers(engine, drawn, budget, 10 if way.startswith("batches") else 0)
            usual.setdefault(name, said)
            right = sum(exact_match(text, (a,)) for text, (_, _, a) in zip(said, drawn, strict=True))
            changed = sum(a != b for a, b in zip(said, usual[name], strict=True))
            row[name] = {"right": int(right), "changed": changed}
        row["seconds"] = round(perf_counter() - begin, 1)
        result["ways"][way] = row
        progress(f"{way}: {row}")
        write_result(Path(options.out), result)
        del engine
        gc.collect()


def read_options(
    arguments: Sequence[str], purpose: str | None, ways: Iterable[str], out: str
) -> argparse.Namespace:
    """Options of a script that asks these questions in several ways."""
    parser = argparse.ArgumentParser(description=(purpose or "").splitlines()[0])
    parser.add_argument("--each", type=int, default=10, help="cases of each family")
    parser.add_argument("--ways", nargs="+", choices=list(ways), help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=str(RESULTS / out))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
