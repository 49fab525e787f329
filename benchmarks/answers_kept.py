"""Answers of the bundled checkpoint with each optimisation on, beside all of them off: how many change.

Sixty questions of the held-out split, ten of each family, at full resolution and at an eighth of its tokens.
What changes nothing but speed should change no answer beyond what another order of rounding does; what is
kept or computed in fewer bits may.

    python benchmarks/answers_kept.py [--each 10] [--device cpu] [--dtype auto] [--ways NAME ...]
"""

from __future__ import annotations

import argparse
import gc
import io
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from common import facts, markdown_table, progress, write_result
from decode_accuracy import BUDGETS, NEW_TOKENS, Case, answers, cases, read_options
from PIL import Image

import arrcoc
from arrcoc.evaluation.metrics import exact_match

OFF: dict[str, Any] = {
    "decoder": "eager", "lod_engine": "eager", "jpeg": "cpu", "prefetch": "off",
    "prefix_bytes": 0, "cache_bytes": 0,
}  # fmt: skip
"""Every optimisation that can be switched off; the plan stage's graph on CUDA cannot."""
KEPT = arrcoc.Config().prefix_bytes

Answers = Callable[[arrcoc.Engine, Sequence[Case], int], list[str]]


def alone(engine: arrcoc.Engine, drawn: Sequence[Case], budget: int) -> list[str]:
    """One question after the other."""
    return answers(engine, drawn, budget, 0)


def twice(engine: arrcoc.Engine, drawn: Sequence[Case], budget: int) -> list[str]:
    """Every question a second time, when its tiles and prefixes are known."""
    alone(engine, drawn, budget)
    return alone(engine, drawn, budget)


def sessions(engine: arrcoc.Engine, drawn: Sequence[Case], budget: int) -> list[str]:
    """Each question twice in a session; the second answer counts."""
    said = []
    for image, question, _ in drawn:
        with engine.open(image, budget) as session:
            session.ask(question, max_new_tokens=NEW_TOKENS)
            said.append(session.ask(question, max_new_tokens=NEW_TOKENS).text)
    return said


def batches(engine: arrcoc.Engine, drawn: Sequence[Case], budget: int) -> list[str]:
    """Ten questions at once."""
    return answers(engine, drawn, budget, 10)


def files(engine: arrcoc.Engine, drawn: Sequence[Case], budget: int) -> list[str]:
    """One after the other, from JPEG files."""
    return [engine.ask(_jpeg(image), question, budget, NEW_TOKENS).text for image, question, _ in drawn]


class Way(NamedTuple):
    """One optimisation: fields of the configuration, how questions are asked, what it is compared with."""

    fields: Mapping[str, Any]
    ask: Answers = alone
    beside: str = "all off"


WAYS: dict[str, Way] = {
    "all off": Way(OFF),
    "tile cache": Way(OFF | {"cache_bytes": 1 << 30}, twice),
    "LOD engines captured": Way(OFF | {"lod_engine": "auto"}),
    "decoder captured": Way(OFF | {"decoder": "auto"}),
    "prefill in chunks": Way(OFF | {"prefill_chunk": 100}),
    "prefixes kept": Way(OFF | {"prefix_bytes": KEPT}, twice),
    "sessions": Way(OFF | {"prefix_bytes": KEPT, "cache_bytes": 1 << 30}, sessions),
    "batches of ten": Way(OFF, batches),
    "prompt lookup": Way(OFF | {"decoder": "auto", "speculative": "prompt_lookup"}),
    "all on": Way({}, sessions),
    "JPEG by Pillow": Way(OFF, files),
    "JPEG by nvJPEG": Way(OFF | {"jpeg": "auto"}, files, "JPEG by Pillow"),
    "float8 prefixes": Way({"prefix_dtype": "float8"}, sessions),
    "float8 LOD engines": Way({"lod_precision": "float8"}),
    "int8 weights": Way({"decode_weights": "int8"}),
    "float8 weights": Way({"decode_weights": "float8"}),
}
"""By name; those from "float8 prefixes" on trade bits, the others only time."""


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON after every way."""
    options = read_options(arguments, __doc__, WAYS, "answers_kept.json")
    drawn, wanted = cases(options.each), options.ways or list(WAYS)
    result: dict[str, Any] = {"benchmark": "answers_kept"}
    result |= facts("benchmarks/answers_kept.py", arguments, torch.device(options.device))
    result |= {"cases": len(drawn), "ways": {}}
    said: dict[str, dict[str, list[str]]] = {}
    for name in (n for n in WAYS if n in wanted or n in ("all off", "JPEG by Pillow")):
        begin = perf_counter()
        try:
            result["ways"][name] = _row(name, drawn, said, options)
        except arrcoc.ArrcocError as error:
            result["ways"][name] = {"refused": str(error)}
        except Exception:  # one way that fails must not cost the others on a borrowed GPU
            result["ways"][name] = {"failed": traceback.format_exc().splitlines()[-1]}
        result["ways"][name]["seconds"] = round(perf_counter() - begin, 1)
        progress(f"{name}: {result['ways'][name]}")
        write_result(Path(options.out), result)
        gc.collect()


def _row(
    name: str, drawn: Sequence[Case], said: dict[str, dict[str, list[str]]], options: argparse.Namespace
) -> dict[str, Any]:
    way = WAYS[name]
    engine = arrcoc.Engine.from_pretrained(device=options.device, dtype=options.dtype, **way.fields)
    row: dict[str, Any] = {"beside": way.beside}
    said[name] = {}
    for budget_name, budget in BUDGETS.items():
        texts = said[name][budget_name] = way.ask(engine, drawn, budget)
        against = said[way.beside if way.beside in said else name][budget_name]
        right = sum(exact_match(text, (case[2],)) for text, case in zip(texts, drawn, strict=True))
        changed = sum(a != b for a, b in zip(texts, against, strict=True))
        row[budget_name] = {"right": int(right), "changed": changed}
    found = engine.describe()
    row |= {
        "decoder": found["decoder"],
        "lod_engines": sorted(set(found["lod_engines"].values())),
        "jpeg": found["jpeg"],
    }
    engine.close()
    return row


def answers_kept_table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = []
    for name, row in result["ways"].items():
        if "full" not in row:
            rows.append([name, *["refused" if "refused" in row else "failed"] * 4])
            continue
        cells = [(row[b]["right"], row[b]["changed"]) for b in BUDGETS]
        rows.append([name, *(str(n) for right, changed in cells for n in (right, changed))])
    head = ("", "right, full", "changed", "right, an eighth", "changed")
    versions = result["versions"]
    source = f"`{result['command']}`, {result['date']}, {result['device']}, {result['cases']} questions"
    return markdown_table(head, rows) + f"\n{source}, torch {versions['torch']}.\n"


def _jpeg(image: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
