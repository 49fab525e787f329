"""Time per stage of arrcoc beside stock full-resolution Qwen3-VL: one checkpoint, the same images, one run.

Every repeat runs stock, arrcoc with an empty tile cache and arrcoc on a further question, one after the
other, so that other load on the machine meets all three. A warm-up round comes first and does not count.

    python benchmarks/stages.py [--model FOLDER] [--images 512 1024 2048] [--budgets 0.1 0.25] [--repeats 5]
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import skimage.data
import torch
from common import RESULTS, Usage, facts, measured, medians, progress, write_result
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

import arrcoc
from arrcoc.demo.bundled import bundled_checkpoint
from arrcoc.timing import TOTAL, StageTimer

QUESTIONS = ("What is written on the round patch on her chest?", "What stands behind her on the right?")
"""The first fills the cache; the second is the further question on the same image."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured answer.

    Attributes:
        tokens: vision tokens.
        new_tokens: tokens generated.
        stages: milliseconds by stage.
        usage: wall time and peak memory.
        cached: share of the refined tiles that came from the cache; 0 without a cache.
    """

    tokens: int
    new_tokens: int
    stages: dict[str, float]
    usage: Usage
    cached: float = 0.0


class StockQwen:
    """Qwen3-VL as transformers ships it: stock processor, stock `generate`."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Load the checkpoint anew, so that nothing is shared with arrcoc."""
        self.processor = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
        self.model: Any = model.to(device).eval()  # type: ignore[arg-type]
        self.device = device

    def run(self, image: Image.Image, question: str, new_tokens: int) -> Run:
        """Answer greedily with exactly `new_tokens` tokens."""
        timer = StageTimer(self.device)
        with measured(self.device) as usage, _stages(timer, self.model.model.visual) as first_token:
            inputs = self._inputs(image, question)
            self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                stopping_criteria=[first_token],
            )
        count = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        return Run(count, new_tokens, timer.milliseconds(), usage)

    def _inputs(self, image: Image.Image, question: str) -> Any:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)


@contextmanager
def _stages(timer: StageTimer, tower: torch.nn.Module) -> Iterator[Any]:
    """Cut a stock answer into preprocess, vision, prefill and generate; yields a stopping criterion.

    The tower's hooks mark where vision begins and ends, and the first call of the criterion marks the
    first token.
    """
    with ExitStack() as hooks, ExitStack() as running:

        def switch(stage: str) -> None:
            running.close()
            running.enter_context(timer.stage(stage))

        seen: list[int] = []

        def first_token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if not seen:
                switch("generate")
            seen.append(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        switch("preprocess")
        hooks.callback(tower.register_forward_pre_hook(lambda *_: switch("vision")).remove)
        hooks.callback(tower.register_forward_hook(lambda *_: switch("prefill")).remove)
        yield first_token


def run_arrcoc(
    engine: arrcoc.Engine, image: Image.Image, question: str, budget: float, new_tokens: int
) -> Run:
    """Answer greedily within a budget, with at most `new_tokens` tokens."""
    before = engine.cache_stats()
    with measured(_device(engine)) as usage:
        answer = engine.ask(image, question, budget=budget, max_new_tokens=new_tokens)
    assert answer.encoding is not None
    assert answer.encoding.n_tokens <= math.floor(budget * answer.encoding.full_tokens)
    after = engine.cache_stats()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    cached = hits / max(1, hits + misses)
    return Run(answer.encoding.n_tokens, answer.new_tokens, answer.timings, usage, cached)


def compare(
    engine: arrcoc.Engine, stock: StockQwen, size: int, budget: float, repeats: int, new_tokens: int
) -> dict[str, Any]:
    """Median times, peak memory and tokens for one image size and one budget, and stock over arrcoc."""
    image = photograph(size)
    runs: dict[str, list[Run]] = {"stock": [], "arrcoc": [], "arrcoc_next_question": []}
    for repeat in range(repeats + 1):
        engine.evict_low_relevance(math.inf)  # empties the tile cache
        first = run_arrcoc(engine, image, QUESTIONS[0], budget, new_tokens)
        second = run_arrcoc(engine, image, QUESTIONS[1], budget, new_tokens)
        # As many new tokens as arrcoc made, at least the one that ends every prefill.
        full = stock.run(image, QUESTIONS[0], max(1, first.new_tokens))
        if repeat:  # the first round is the warm-up
            for name, run in zip(runs, (full, first, second), strict=True):
                runs[name].append(run)
    made = {name: summary(found) for name, found in runs.items()}
    ratios = {name: _ratios(made["stock"], made[name]) for name in ("arrcoc", "arrcoc_next_question")}
    return {"image_px": size, "budget": budget, **made, "stock_over": ratios}


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over runs. `first_token_ms` is the wall time without the stage generate."""
    times = [run.stages | {"wall": run.usage.milliseconds} for run in runs]
    for run in times:
        run["first_token"] = run["wall"] - run.get("generate", 0.0)
    middle = medians(times)
    peaks = [run.usage.peak_bytes for run in runs if run.usage.peak_bytes is not None]
    outside = ("wall", "first_token", TOTAL)
    return {
        "tokens": runs[0].tokens,
        "new_tokens": runs[0].new_tokens,
        "tiles_from_cache": round(runs[0].cached, 3),
        "wall_ms": middle["wall"],
        "wall_ms_runs": [round(run.usage.milliseconds, 3) for run in runs],
        "first_token_ms": middle["first_token"],
        "stages_ms": {name: value for name, value in middle.items() if name not in outside},
        "peak_bytes": max(peaks) if peaks else None,
    }


def _ratios(stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    peaks = (stock["peak_bytes"], ours["peak_bytes"])
    return {
        "tokens": round(stock["tokens"] / ours["tokens"], 3),
        "first_token": round(stock["first_token_ms"] / ours["first_token_ms"], 3),
        "wall": round(stock["wall_ms"] / ours["wall_ms"], 3),
        "peak_memory": round(peaks[0] / peaks[1], 3) if peaks[0] is not None and peaks[1] else None,
    }


def photograph(size: int) -> Image.Image:
    """Scikit-image's astronaut (512 x 512), resampled to size x size pixels."""
    return Image.fromarray(skimage.data.astronaut()).resize((size, size), Image.Resampling.BICUBIC)


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON."""
    options = _options(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = Path(options.model) if options.model else bundled_checkpoint()[0]
    engine = arrcoc.Engine.from_pretrained(folder, device=options.device, dtype=options.dtype)
    device, told = _device(engine), engine.describe()
    stock = StockQwen(folder, device, getattr(torch, told["dtype"]))
    result: dict[str, Any] = {
        "benchmark": "stages",
        **facts("benchmarks/stages.py", arguments, device),
        "model": {"name": Path(options.model).name if options.model else "bundled"}
        | {name: told["model"][name] for name in ("parameters", "fingerprint")},
        "dtype": told["dtype"],
        "layout": told["layout"],
        "repeats": options.repeats,
        "cases": [],
    }
    for size, budget in product(options.images, options.budgets):
        case = compare(engine, stock, size, budget, options.repeats, options.new_tokens)
        result["cases"].append(case)
        write_result(Path(options.out), result)  # after every case: an interrupted run keeps the earlier ones
        progress(f"{size} px, budget {budget:g}: stock over arrcoc {case['stock_over']['arrcoc']}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a Qwen3-VL checkpoint (default: the bundled one)")
    parser.add_argument("--images", type=int, nargs="+", default=[512, 1024, 2048], help="edges in pixels")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25], help="shares of full")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs, after one warm-up")
    parser.add_argument("--new-tokens", type=int, default=16, help="most tokens to generate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", default=str(RESULTS / "stages.json"))
    parser.add_argument("--quick", action="store_true", help="one small image, one repeat: for the tests")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.budgets, options.repeats, options.new_tokens = [256], [0.5], 1, 4
    return options


def _device(engine: arrcoc.Engine) -> torch.device:
    return torch.device(engine.describe()["device"].split()[0])


if __name__ == "__main__":
    main(sys.argv[1:])
