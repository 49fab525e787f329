"""What float8 tiles cost in answers: the same questions with and without, before a build is accepted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from arrcoc import config as configs
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.engine import Engine
from arrcoc.errors import BudgetError
from arrcoc.evaluation.metrics import exact_match
from arrcoc.evaluation.records import Case, Cases
from arrcoc.lod import BuiltEngines, LodEngine, TorchEngines, TorchLodEngine
from arrcoc.lod.float8_graph import quantized
from arrcoc.lod.manifest import Accuracy
from arrcoc.qwen import QwenVL, load

BUDGET = 0.25
"""Share of full resolution that every question gets: tiles of all LODs are seen."""
MAX_NEW_TOKENS = 16

Progress = Callable[[str, int, int], None]


class EmulatedFloat8(BuiltEngines):
    """Stands for a float8 build that is not there yet: torch computes what its plan will."""

    def __init__(self, qwen: QwenVL, largest: Mapping[str, float], halo: int) -> None:
        """Args: the checkpoint, the largest input of every block layer by name, tokens of margin."""
        self._coarse = copy.copy(qwen)
        self._coarse.__dict__["vision"] = quantized(qwen.vision, largest)
        self._coarse.__dict__["fingerprint"] = f"{qwen.fingerprint} float8"
        self._halo = halo

    def serves(self, sides: Sequence[int], halo: int) -> bool:
        """Whatever there is."""
        return True

    def engine(
        self, side: int, buckets: Sequence[int], torch_engines: TorchEngines | None = None
    ) -> LodEngine:
        """The emulated engine of a side."""
        return TorchLodEngine(self._coarse, side, buckets, self._halo)

    def plan_stage(self, height: int, width: int, cells: int) -> None:
        """Nothing: the plan stage is never in float8."""


def measure(
    model: str | Path | None,
    preset: str | Path,
    largest: Mapping[str, float],
    cases: Cases,
    most: int,
    progress: Progress | None = None,
) -> Accuracy:
    """Share of questions answered right, with the checkpoint's own tiles and with tiles in emulated float8.

    Everything else is the same in both: the glimpse, the text model, the budget. In fp32 on the CPU, in fp16
    on a GPU.

    Args:
        model: folder or hub name; None is the bundled one.
        preset: the build's.
        largest: of every block layer's inputs, by the layer's name.
        cases: the data set.
        most: questions, from the first.
        progress: told of questions done.

    Raises:
        ArrcocError: the checkpoint, the preset or an image cannot be used.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = bundled_checkpoint()[0] if model is None else model
    qwen = load(source, place, torch.float16 if place.type == "cuda" else torch.float32)
    presets = configs.PresetChoice.make(preset, {"cache_bytes": 0, "lod_engine": "eager"})
    fine = Engine(qwen, presets)
    coarse = Engine(qwen, presets, built=EmulatedFloat8(qwen, largest, presets.base.halo))
    count, right = min(most, len(cases)), {"fine": 0.0, "coarse": 0.0}
    for index in range(count):
        if progress is not None:
            progress("answering questions", index, count)
        case = cases[index]
        right["fine"] += _right(fine, case)
        right["coarse"] += _right(coarse, case)
    return Accuracy(
        dataset=cases.name, questions=count, plain=right["fine"] / count, fp8=right["coarse"] / count
    )


def _right(engine: Engine, case: Case) -> float:
    """1 for a right answer; 0 for another, or for an image too large for the budget."""
    try:
        answer = engine.ask(case.image, case.question, BUDGET, max_new_tokens=MAX_NEW_TOKENS)
    except BudgetError:
        return 0.0
    return exact_match(answer.text, case.answers)
