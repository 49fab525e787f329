"""Accuracy of the LOD engines with the bundled checkpoint: errors, and answers on sixty held-out cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import progress
from torch import Tensor

from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.errors import EngineBuildError
from arrcoc.lod import TorchEngines, TorchLodEngine
from arrcoc.qwen import load
from arrcoc.records import Features

BUDGET = 256
"""Tokens of an answer's image, a quarter of full resolution."""


def relative_errors(have: Features, want: Features) -> dict[str, float]:
    """Norm of the difference over the norm of what is wanted, of tokens and of the worst plane."""

    def error(a: Tensor, b: Tensor) -> float:
        return round(float((a.float() - b.float()).norm() / b.float().norm()), 5)

    planes = zip(have.deepstack, want.deepstack, strict=True)
    return {"tokens": error(have.tokens, want.tokens), "planes": max(error(a, b) for a, b in planes)}


def bundled_accuracy(device: torch.device, each: int = 10) -> dict[str, Any]:
    """The bundled checkpoint: errors against fp32, and answers on `each` held-out cases of a family."""
    from arrcoc.demo.placards import FAMILIES, sample

    folder, _ = bundled_checkpoint()
    exact, fast = load(folder, device, torch.float32), load(folder, device, torch.bfloat16)
    drawn = [(f, i, sample(2026, i, "test", 1024, [f])) for f in FAMILIES for i in range(each)]
    tiles = torch.cat([_cut(d.image, 128) for _, _, d in drawn[::each]]).to(device)
    want = TorchLodEngine(exact, 4, (64,)).encode(tiles)
    engines = {"eager": TorchLodEngine(fast, 4, (64,)), "fused": TorchEngines(fast).engine(4, (64,), 0)}
    found: dict[str, Any] = {"tiles": len(tiles)}
    try:
        engines["float8"] = TorchEngines(fast, precision="float8").engine(4, (64,), 0)
    except EngineBuildError as error:
        found["float8_refused"] = str(error)
    outputs = {way: engine.encode(tiles) for way, engine in engines.items()}
    found["error_against_fp32"] = {way: relative_errors(out, want) for way, out in outputs.items()}
    found["error_against_bf16"] = {
        way: relative_errors(out, outputs["eager"]) for way, out in outputs.items() if way != "eager"
    }
    progress(f"  bundled checkpoint: {found}")
    choices = {"eager": {"lod_engine": "eager"}, "fused": {}, "float8": {"lod_precision": "float8"}}
    found |= {"budget": BUDGET, "questions": len(drawn)}
    found["right"] = {way: _right(drawn, device, choices[way]) for way in engines}
    return found


def _cut(picture: Any, edge: int) -> Tensor:
    """Tiles of an image [h, w, 3]: uint8 [K, 3, edge, edge]."""
    planes = torch.from_numpy(picture).permute(2, 0, 1)
    return (
        planes.unfold(1, edge, edge).unfold(2, edge, edge).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()
    )


def _right(drawn: Sequence[Any], device: torch.device, overrides: dict[str, Any]) -> int:
    """Right answers at `BUDGET` tokens."""
    from arrcoc.evaluation.methods import METHODS, Lab
    from arrcoc.evaluation.metrics import exact_match
    from arrcoc.evaluation.records import Case, Picture

    lab = Lab.open(None, "demo", device.type, "bfloat16", 12, 0, **overrides)
    marks = []
    for family, index, case in drawn:
        pixels = torch.from_numpy(case.image).permute(2, 0, 1).contiguous()
        picture = Picture(Case(str(index), family, pixels, case.question, (case.answer,)), pixels)
        marks.append(exact_match(METHODS["arrcoc"](lab, picture, BUDGET).text, (case.answer,)))
    engines = set(lab.engine.describe()["lod_engines"].values())
    progress(f"  {overrides or 'fused'}: {int(sum(marks))} of {len(drawn)} right, {engines}")
    return int(sum(marks))
