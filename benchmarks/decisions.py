"""What each choice of configuration is worth in accuracy, all variants on the same held-out placards.

A choice is a list of variants of `arrcoc.Config`; the first is what the others are compared with, question by
question. Variants that come to the same configuration are asked once. Positions in units of full-resolution
tokens are no choice: the sequence is defined by them, and every layout shares them.

    python benchmarks/decisions.py --model FOLDER [--choices layout halo] [--budgets 0.0625 0.125 0.25]
                                   [--count 60] [--workers 1] [--device cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from answers import Asker, Job, Wanted, about, gather, open_lab, parser, picture_of, row
from common import facts, write_result
from summaries import cells

from arrcoc.config import Config, PresetChoice
from arrcoc.engine import Engine
from arrcoc.errors import ConfigError
from arrcoc.evaluation import runner
from arrcoc.evaluation.datasets import Placards
from arrcoc.evaluation.methods import Lab
from arrcoc.evaluation.records import Case, Given, Row

SCRIPT = "benchmarks/decisions.py"
BUDGETS = (0.0625, 0.125, 0.25)
AS_SET = "as set"
"""Label of the preset's own configuration."""

Overrides = Mapping[str, Any]
_GLIMPSE: Overrides = {"participatory": "glimpse"}
_REPLACE: Overrides = {"layout": "replace"}


class Variant(NamedTuple):
    """A variant's name in tables, and the fields of `Config` that it sets."""

    label: str
    overrides: Overrides


class Choice(NamedTuple):
    """One decision: its name, what is asked, and the variants, the reference first."""

    name: str
    question: str
    variants: tuple[Variant, ...]


def choices(base: Config, layers: int, head: bool) -> dict[str, Choice]:
    """Every choice by name.

    Args:
        base: the preset's configuration.
        layers: of the checkpoint's decoder.
        head: whether a texture head lies beside the checkpoint.
    """
    made = [
        Choice("layout", "How are the tokens laid out?", _values("layout", "refine", "replace", "crops")),
        Choice("glimpse", "Is the glimpse one image, or tiles?", _values("glimpse", "joint", "tiles")),
        Choice("halo", "Is a margin encoded around each tile?", _values("halo", 0, 1)),
        Choice("overview", "How coarse is the overview?", _values("overview_stride", "auto", 1, 2)),
        Choice("order", "In which order are the tokens?", _values("order", "raster", "tile")),
        Choice("order-replace", "And in replace?", _values("order", "raster", "tile", shared=_REPLACE)),
        # Above about 1.4 utility per token would rise with LOD in `refine`, which Config refuses.
        Choice("utility", "Which utility has a LOD?", _values("utility_exponent", 1.0, 0.5, 0.75, 1.25, 1.4)),
        Choice(
            "utility-replace",
            "And in replace?",
            _values("utility_exponent", 1.0, 0.5, 1.5, 2.0, shared=_REPLACE),
        ),
        Choice("sides", "How many tokens along a tile's edge?", _sides(base)),
        Choice("levels", "Which is the highest level of detail?", _values("max_lod", 3, 2, 1)),
        Choice("gain", "How strong is compress-particularize?", _values("gain", base.gain, 0.0, 0.75, 3.0)),
        Choice("lateral", "How strong is diversify-focus?", _values("lateral", base.lateral, 0.0, 0.25, 1.0)),
        Choice(
            "confident",
            "At which contrast is the question alone believed?",
            _values("confident_contrast", base.confident_contrast, 1e-6, 0.1, 0.5, 1.0),
        ),
        Choice(
            "flat",
            "Below which contrast is relevance uniform?",
            _values("flat_contrast", base.flat_contrast, 1e-6, 0.05, 0.1),
        ),
        Choice(
            "attention-gain",
            "How sharp is relative attention?",
            _values("attention_gain", base.attention_gain, 0.5, 2.0, 4.0, shared=_GLIMPSE),
        ),
        Choice("probe", "Which decoder layers are probed?", _probes(base, layers)),
    ]
    if head:
        made.append(
            Choice("participatory", "Which scorer asks?", _values("participatory", "texture", "glimpse"))
        )
    return {choice.name: choice for choice in made}


def _values(field: str, *values: Any, shared: Overrides | None = None) -> tuple[Variant, ...]:
    distinct = dict.fromkeys(values)
    return tuple(Variant(f"{field} {value}", {**(shared or {}), field: value}) for value in distinct)


def _sides(base: Config) -> tuple[Variant, ...]:
    """The preset's sides, and others at 32 px per token."""
    found = dict.fromkeys((base.sides, (1, 2, 3, 4), (2, 4, 6, 8), (1, 2, 4, 8), (1, 4, 6, 8)))
    return tuple(Variant("sides " + " / ".join(map(str, sides)), {"sides": sides}) for sides in found)


def _probes(base: Config, layers: int) -> tuple[Variant, ...]:
    mix = Variant("mix " + ", ".join(f"{d:g}" for d in base.probe_depth), _GLIMPSE)
    single = (
        Variant(f"layer {n + 1} of {layers}", {**_GLIMPSE, "probe_depth": ((n + 0.5) / layers,)})
        for n in range(layers)
    )
    return (mix, *single)


class Resolved(NamedTuple):
    """A variant as a configuration, with the words that tell it from the preset; or why it is refused."""

    key: str
    config: Config | None
    refused: str = ""


def resolve(base: Config, variant: Variant) -> Resolved:
    """The configuration of a variant, by which equal ones are known."""
    try:
        config = base.updated(variant.overrides)
    except ConfigError as error:
        return Resolved("", None, str(error))
    differing = (name for name in Config.model_fields if getattr(config, name) != getattr(base, name))
    said = [f"{name} {_plain(getattr(config, name))}" for name in differing]
    return Resolved(", ".join(said) or AS_SET, config)


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def asking(lab: Lab, preset: str, wanted: Mapping[str, Config]) -> Callable[[Case], Asker]:
    """Answers by the engine in each configuration, all with one checkpoint and equal tokens."""
    most = lab.max_new_tokens
    engines = {
        key: Engine(lab.qwen, PresetChoice(preset, {preset: config})) for key, config in wanted.items()
    }

    def begin(case: Case) -> Asker:
        picture = picture_of(lab, case)

        def ask(key: str, budget: float) -> Row:
            def answered(tokens: int) -> Given:
                answer = engines[key].ask(picture.pixels, case.question, tokens, max_new_tokens=most)
                assert answer.encoding is not None, "an answer about an image"
                return Given(answer.text, answer.encoding.n_tokens)

            return row(lab, picture, Wanted(key, budget), answered)

        return ask

    return begin


def summary(choice: Choice, resolved: Sequence[Resolved], rows: Sequence[Row]) -> dict[str, Any]:
    """One choice with every variant's accuracy and its difference to the first."""
    made = []
    for variant, found in zip(choice.variants, resolved, strict=True):
        overrides = {name: _jsonable(value) for name, value in variant.overrides.items()}
        part: dict[str, Any] = {"label": variant.label, "overrides": overrides}
        if found.config is None:
            made.append(part | {"refused": found.refused})
        else:
            made.append(part | {"cells": cells(rows, found.key, resolved[0].key)})
    return {"name": choice.name, "question": choice.question, "variants": made}


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def main(arguments: Sequence[str]) -> None:
    """Ask what is not yet answered, and write the JSON."""
    options = _options(arguments)
    lab = open_lab(options)
    base = lab.presets.base
    head = about(lab, options)["participatory"] == "texture"
    known = choices(base, lab.qwen.n_layers, head)
    for name in options.choices or ():
        if name not in known:
            raise ConfigError(f"choice {name!r}", ", ".join(known), "Correct the name")
    chosen = [choice for name, choice in known.items() if name in (options.choices or known)]
    resolved = {choice.name: [resolve(base, variant) for variant in choice.variants] for choice in chosen}
    wanted = {found.key: found.config for part in resolved.values() for found in part if found.config}
    cases = Placards(options.canvas, options.count, options.seed)
    job = Job(
        cases,
        [Wanted(key, budget) for key in wanted for budget in options.budgets],
        asking(lab, options.preset, wanted),
        Path(options.answers),
        runner.identity(lab, cases) | {"script": SCRIPT},
    )
    rows = gather(job, options, SCRIPT, arguments)
    if options.part is None:
        result = {
            "benchmark": "decisions",
            **facts(SCRIPT, arguments, lab.qwen.device),
            **about(lab, options),
        }
        found = [summary(choice, resolved[choice.name], rows) for choice in chosen]
        write_result(Path(options.out), result | {"budgets": options.budgets, "choices": found})


def _options(arguments: Sequence[str]) -> Any:
    made = parser(__doc__, "decisions", 60, BUDGETS)
    made.add_argument("--choices", nargs="+", help="names of choices (default: all)")
    return made.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
