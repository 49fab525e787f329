"""What `tensorrt86_torch.py` asks of engines besides their speed: errors, answers, threads, streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_accuracy import BUDGETS, cases
from decode_accuracy import answers as ask
from tensorrt86_engines import Case, apart, errors, turned
from tensorrt86_timing import median_ms, say

import arrcoc
from arrcoc.evaluation.metrics import exact_match
from arrcoc.lod import BuiltEngines
from arrcoc.records import Features

_ROUNDS = 25


def compare(case: Case, opened: BuiltEngines) -> dict[str, Any]:
    """Relative errors against the tower in fp32: of the plan, also with its rotation turned, and of torch."""
    found: dict[str, Any] = {}
    exact = case.exact()
    for shape in case.shapes:
        wanted = exact[shape.side].encode(shape.pixels)
        plan = case.engine("plan", shape.side, opened)
        entry = {"plan": errors(plan.encode(shape.pixels), wanted)}
        entry["rotation turned"] = errors(turned(plan, shape.pixels), wanted)
        for way in ("eager", "fused"):
            entry[way] = errors(case.engine(way, shape.side).encode(shape.pixels), wanted)
        found[shape.name] = entry
        say(f"{case.name} {shape.name}: " + ", ".join(f"{way} {e['tokens']}" for way, e in entry.items()))
    return found


def threads(case: Case, opened: BuiltEngines) -> dict[str, int]:
    """Two threads on streams of their own, all LODs in turn: calls whose features differ from one by one."""
    engines = {shape.side: case.engine("plan", shape.side, opened) for shape in case.shapes}
    alone = {shape.name: engines[shape.side].encode(shape.pixels) for shape in case.shapes}
    torch.cuda.synchronize()
    counts = {"calls": 0, "different": 0}
    failed: list[BaseException] = []

    def work(shapes: list[Any]) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                said = [(s.name, engines[s.side].encode(s.pixels)) for _ in range(_ROUNDS) for s in shapes]
                torch.cuda.current_stream().synchronize()
                different = sum(not same(features, alone[name]) for name, features in said)
            counts["calls"] += len(said)
            counts["different"] += different
        except BaseException as error:  # told by the thread that waits
            failed.append(error)

    running = [threading.Thread(target=work, args=(order,)) for order in (case.shapes, case.shapes[::-1])]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]
    say(f"{case.name}: threads {counts}")
    return counts


def same(one: Features, other: Features) -> bool:
    """Whether all bits agree."""
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.deepstack, other.deepstack)


def answers(folder: Path, each: int = 10) -> dict[str, Any]:
    """Placards' questions, answered with the built engines and with eager torch, all else alike."""
    drawn = cases(each)
    found: dict[str, Any] = {"questions": len(drawn)}
    said: dict[str, dict[str, list[str]]] = {}
    for way, given in {"eager": {"lod_engine": "eager"}, "plan": {"engines": folder}}.items():
        engine = arrcoc.Engine.from_pretrained(device="cuda", dtype="float16", **given)  # type: ignore[arg-type]
        said[way] = {name: ask(engine, drawn, budget, 0) for name, budget in BUDGETS.items()}
        found[f"{way}_engines"] = sorted(set(engine.describe()["lod_engines"].values()))
        engine.close()
    for name in BUDGETS:
        right = {
            way: int(sum(exact_match(a, (case[2],)) for a, case in zip(texts[name], drawn, strict=True)))
            for way, texts in said.items()
        }
        pairs = zip(said["plan"][name], said["eager"][name], strict=True)
        found[name] = {"right": right, "changed": sum(a != b for a, b in pairs)}
    say(f"answers: {found}")
    return found


def streams(case: Case, opened: BuiltEngines) -> dict[str, Any]:
    """The four LODs one after the other, and side by side with scratch memory and streams of their own."""
    shared = {shape.side: case.engine("plan", shape.side, opened) for shape in case.shapes}
    own = apart(case, opened)
    beside = [torch.cuda.Stream() for _ in case.config.sides]
    found: dict[str, Any] = {}
    for kind in ("largest", "single"):
        shapes = [shape for shape in case.shapes if (shape.batch == 1) == (kind == "single")]

        def in_turn(engines: Any, shapes: list[Any] = shapes) -> list[Features]:
            return [engines[shape.side].encode(shape.pixels) for shape in shapes]

        def side_by_side(shapes: list[Any] = shapes) -> list[Features]:
            here, made = torch.cuda.current_stream(), []
            for shape, stream in zip(shapes, beside, strict=True):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    made.append(own[shape.side].encode(shape.pixels))
            for stream in beside:
                here.wait_stream(stream)
            return made

        ways: dict[str, Callable[[], list[Features]]] = {
            "shared scratch, in turn": lambda: in_turn(shared),
            "own scratch, in turn": lambda: in_turn(own),
            "own scratch, side by side": side_by_side,
        }
        agree = [same(a, b) for a, b in zip(side_by_side(), in_turn(shared), strict=True)]
        torch.cuda.synchronize()
        found[kind] = {way: median_ms(run) for way, run in ways.items()} | {"agree": all(agree)}
        say(f"{case.name}, {kind} batches: {found[kind]}")
    return found
