"""The plan stage on a GPU: texture, scorers, opponent processing and allocation of a frame on the device.

Times every stage alone, then the whole from the frame to the plan on the host in four ways: one stage after
another, the scorers on three streams, one CUDA graph of one branch, and one of three. The glimpse scorer,
whose time is that of transformer layers, comes apart with random weights of published sizes. The floor is
the time that reading the frame's bytes takes at the bandwidth of a copy measured in the same run.

    python benchmarks/plan_stage.py [--check] [--profile] [--glimpse 2b 8b]
    python benchmarks/plan_stage.py --picture
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, ROOT, facts, progress, write_result
from plan_stage_views import draw
from random_qwen import random_qwen
from torch import Tensor

from arrcoc import allocation, image, opponent, scorers, sequence, streams, texture, texture_kernel
from arrcoc import config as configs
from arrcoc.config import Config
from arrcoc.engine import Engine
from arrcoc.glimpse import GlimpseScorer, JointGlimpse
from arrcoc.glimpse_tail import Tails
from arrcoc.plan_graph import PlanGraph, PlanGraphs
from arrcoc.records import Frame, Plan, Query, Relevance, Scores
from arrcoc.timing import StageTimer

TOKEN_PX = 32
CASES = (("3840x2160", 2160, 3840, "photo"), ("8960x8960", 8960, 8960, "gigapixel"))
QUERY_DIM = 2048
QUESTION = (
    "What is written on the small sign at the left of the door, and which colours do the letters on it have?"
)


def make_frame(height: int, width: int, config: Config, device: torch.device) -> Frame:
    """A frame of smooth noise with sharp grains, at the grid of an image of this size."""
    tile = config.sides[3] * TOKEN_PX
    grid, _ = image.choose_grid(height, width, tile, config.max_tiles, config.max_distortion)
    random = torch.Generator(device).manual_seed(0)
    coarse = torch.rand(1, 3, grid.rows * 4, grid.cols * 4, generator=random, device=device) * 255
    pixels = torch.empty(3, grid.height, grid.width, dtype=torch.uint8, device=device)
    for channel in range(3):  # plane by plane, as planes of floats are large
        plane = torch.nn.functional.interpolate(
            coarse[:, channel, None], (grid.height, grid.width), mode="bilinear"
        )[0, 0]
        plane += 20 * torch.randn(plane.shape, generator=random, device=device)
        pixels[channel] = plane.clamp_(0, 255).byte()
    background = image.area_resample(pixels, tile, config.sides[0] * TOKEN_PX)
    size = (grid.height, grid.width)
    hashes = torch.zeros(grid.count, 4, dtype=torch.int64)
    return Frame(pixels, background, grid, hashes, size, size, 0.0, 1.0)


def timed(run: Callable[[], object], repeats: int = 30, warm_up: int = 5) -> float:
    """Median milliseconds of a call, from an empty queue to an empty queue."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        _wait()
        start = perf_counter()
        run()
        _wait()
        times.append((perf_counter() - start) * 1e3)
    return round(statistics.median(times), 4)


def queued(run: Callable[[], object], repeats: int = 8) -> float:
    """Milliseconds of a call that the GPU itself is busy with, where the host is far ahead of it.

    Few repeats: a stream takes about a thousand launches before the host must wait.
    """
    if not torch.cuda.is_available():
        return timed(run, repeats)
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(40_000_000)  # the host fills the queue meanwhile
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) / repeats, 4)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stage:
    """The plan stage of one frame and one configuration, in parts and as a whole."""

    def __init__(self, frame: Frame, config: Config, device: torch.device) -> None:
        torch.manual_seed(0)
        self.frame, self.config, self.device = frame, config, device
        self.head = scorers.TextureHead(QUERY_DIM).requires_grad_(False).to(device).eval()
        self.query = Query(QUESTION, (1,), torch.randn(QUERY_DIM, device=device))
        self.judges: tuple[scorers.Scorer, ...] = (scorers.propositional, scorers.perspectival, self.head)
        self.budget = allocation.resolve_budget(None, frame.grid, config)

    def staged(self, parallel: bool) -> Plan:
        """One stage after another; the scorers side by side if `parallel`."""
        maps = texture.extract(self.frame, self.config)
        tasks = [partial(judge, maps, self.query) for judge in self.judges]
        found = streams.parallel(tasks, self.device) if parallel else [task() for task in tasks]
        return self.allocate(opponent.balance(Scores(*found), self.config))

    def allocate(self, relevance: Relevance) -> Plan:
        """The LOD of every tile, on the host."""
        return allocation.plan(relevance, self.frame.grid, self.config, self.budget)

    def graphed(self, graph: PlanGraph) -> Plan:
        """The same by a graph."""
        return self.allocate(graph.judge(self.frame, self.query).relevance)

    def graph(self, parallel: bool, head: bool = True) -> PlanGraph:
        """A captured graph."""
        graphs = PlanGraphs(self.config, self.head if head else None, self.device, parallel)
        graphs.find(self.frame)
        made = graphs.find(self.frame)
        assert made is not None, graphs.failure
        return made

    def parts(self) -> dict[str, Callable[[], object]]:
        """Every stage alone."""
        maps = texture.extract(self.frame, self.config)
        scores = Scores(*(judge(maps, self.query) for judge in self.judges))
        relevance = opponent.balance(scores, self.config)
        on_host = Relevance(
            relevance.map.cpu(), type(relevance.tensions)(*(float(t) for t in relevance.tensions))
        )
        return {
            "texture": lambda: texture.extract(self.frame, self.config),
            "texture in torch": lambda: texture.extract_with_torch(self.frame, self.config.cells),
            "propositional": lambda: scorers.propositional(maps, self.query),
            "perspectival": lambda: scorers.perspectival(maps, self.query),
            "texture head": lambda: self.head(maps, self.query),
            "opponent": lambda: opponent.balance(scores, self.config),
            "allocation with its copy": lambda: self.allocate(relevance),
            "allocation on the host": lambda: self.allocate(on_host),
        }


def copy_bandwidth(device: torch.device, size: int = 1 << 29) -> float:
    """Bytes per second, read and written, of copying `size` bytes on the device."""
    source = torch.empty(size if device.type == "cuda" else 1 << 24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (queued(lambda: target.copy_(source), 10) / 1e3)


def measure_case(name: str, height: int, width: int, config: Config, device: torch.device) -> dict[str, Any]:
    """Times of one frame."""
    stage = Stage(make_frame(height, width, config, device), config, device)
    grid = stage.frame.grid
    read = stage.frame.pixels.nbytes + stage.frame.background.nbytes
    case: dict[str, Any] = {"image": name, "tiles": [grid.rows, grid.cols], "frame_bytes": read}
    parts = stage.parts()
    case["stages_ms"] = {part: timed(run) for part, run in parts.items()}
    # What needs the host cannot be queued ahead.
    ahead = {part: run for part, run in parts.items() if "allocation" not in part}
    case["stages_device_ms"] = {part: queued(run) for part, run in ahead.items()}
    case["whole_ms"] = {
        "sequence": timed(lambda: stage.staged(False)),
        "three streams": timed(lambda: stage.staged(True)),
    }
    _report(case)
    if device.type != "cuda":
        return case
    case["graph_device_ms"] = {}
    for label, parallel in (("graph", False), ("graph of three branches", True)):
        begin = perf_counter()
        graph = stage.graph(parallel)
        _wait()
        case.setdefault("capture_ms", {})[label] = round((perf_counter() - begin) * 1e3, 1)
        case["whole_ms"][label] = timed(partial(stage.graphed, graph))
        case["graph_device_ms"][label] = queued(partial(graph.run_all, stage.frame, stage.query))
    case["floor_ms"] = round(read / copy_bandwidth(device) * 1e3, 4)
    return case


def _report(case: dict[str, Any]) -> None:
    progress(f"{case['image']}: tiles {case['tiles']}, {case['frame_bytes'] / 1e6:.0f} MB")
    for kind in ("stages_ms", "stages_device_ms", "whole_ms", "graph_device_ms", "capture_ms", "floor_ms"):
        if kind in case:
            progress(f"  {kind}: {case[kind]}")


# The glimpse.


def measure_glimpse(name: str, device: torch.device) -> dict[str, Any]:
    """Times of encoding the glimpse and of asking it, for both frames."""
    found: dict[str, Any] = {"model": name}
    with torch.inference_mode():
        begin = perf_counter()
        qwen = random_qwen(name, device)
        _wait()
        progress(f"glimpse at {name}: model made in {perf_counter() - begin:.1f} s")
        query = Query(QUESTION, tuple(qwen.tokenize(QUESTION)), torch.zeros(qwen.width, device=device))
        found["question_tokens"] = len(query.ids)
        for label, height, width, preset in CASES:
            config = configs.load(preset)
            frame = make_frame(height, width, config, device)
            found[label] = _glimpse_times(qwen, frame, query, config)
            progress(f"  {label}: {found[label]}")
    found["session"] = measure_session(qwen, device)
    progress(f"  session: {found['session']}")
    return found


def _glimpse_times(qwen: Any, frame: Frame, query: Query, config: Config) -> dict[str, Any]:
    plain, joint = JointGlimpse(qwen), JointGlimpse(qwen, fused=True)
    features = joint.encode(frame)
    where = sequence.glimpse_positions(frame.grid, config.sides[0], config.sides[3])
    extent = sequence.extent(frame.grid, config.sides[3])

    def scorer(tails: Tails | None = None) -> GlimpseScorer:
        return GlimpseScorer(qwen, features, where, extent, frame.grid, config, None, tails)

    eager, tails = scorer(), Tails(qwen, config)
    static = scorer(tails)
    expected = eager.ask(query)
    unfused = plain.encode(frame)
    begin = perf_counter()
    tails.prepare(static.prepare(), frame.grid)
    _wait()
    prepared = round((perf_counter() - begin) * 1e3, 1)
    gap = float((static.ask(query) - expected).abs().max())
    steady = all(bool(torch.equal(static.ask(query), static.ask(query))) for _ in range(2))
    read = sum(m.nbytes for layer in qwen.text.layers[: eager.prepare().depth - 1] for m in layer.matrices)
    return {
        "tokens": features.tokens.shape[1],
        "encode_ms": timed(lambda: joint.encode(frame), 10, 2),
        "encode_plain_ms": timed(lambda: plain.encode(frame), 5, 1),
        "encode_gap": float((features.tokens - unfused.tokens).norm() / unfused.tokens.norm()),
        "prefix_ms": timed(lambda: scorer().prepare(), 5, 2),
        "prefix_by_graph_ms": timed(lambda: scorer(tails).prepare(), 10, 3),
        "question_ms": timed(lambda: eager.ask(query), 5, 2),
        "question_by_graph_ms": timed(lambda: static.ask(query), 10, 2),
        "question_by_graph_device_ms": queued(lambda: static.ask(query)),
        "question_floor_ms": round(read / copy_bandwidth(frame.pixels.device) * 1e3, 3),
        "first_capture_and_prefix_ms": prepared,
        "relevance_gap": gap,
        "graph_repeats_exactly": steady,
        "tails": tails.describe(),
    }


def measure_session(qwen: Any, device: torch.device) -> dict[str, Any]:
    """Stages of a question about an open image whose tiles are known, and how often the host waits."""
    edge, budget = (3584, 0.125) if device.type == "cuda" else (512, 0.25)
    engine = Engine(qwen, configs.PresetChoice.make("photo", {"prefetch": "off", "max_new_tokens": 1}))
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, edge // 56, edge // 56, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (edge, edge), mode="bilinear")
    pixels = (smooth[0] * 255).to(torch.uint8)
    found: dict[str, Any] = {"image": f"{edge}x{edge}", "budget": budget}
    with engine.open(pixels, budget) as session:
        found["open_ms"] = _rounded(session.timings)
        found["first_question_ms"] = _rounded(session.ask(QUESTION).timings)
        for _ in range(3):
            answer = session.ask(QUESTION)
        runs = [session.ask(QUESTION).timings for _ in range(7)]
        found["question_ms"] = _rounded({k: statistics.median(run[k] for run in runs) for k in runs[0]})
        view, query = session._view, qwen.query(QUESTION)
        look = partial(view.pipeline.look_at, view.scene, query, budget)
        found["up_to_the_prompt_ms"] = timed(lambda: look(StageTimer(device)), 10, 2)
        if device.type == "cuda":
            with counted_waits() as waits:
                look(StageTimer(device))
            found["waits_up_to_the_prompt"] = list(waits)
            with counted_waits() as waits:
                session.ask(QUESTION)
            found["waits_of_an_answer"] = list(waits)
        fresh = engine.ask(pixels, QUESTION, budget)
        assert answer.encoding is not None
        assert fresh.encoding is not None
        found["as_fresh"] = bool(torch.equal(answer.encoding.relevance, fresh.encoding.relevance))
    found["plan_stage"] = engine._viewer.plan_stage()
    return found


def _rounded(timings: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(value, 3) for stage, value in timings.items()}


# Checks and profiles.


def check(device: torch.device) -> None:
    """Compare texture, scores, map and plans between CPU and device, torch and kernel, stream and graph."""
    for preset, height, width in (("photo", 900, 1300), ("gigapixel", 1300, 1900), ("demo", 500, 700)):
        config = configs.load(preset)
        stage = Stage(make_frame(height, width, config, device), config, device)
        frame = stage.frame
        reference = Frame(*(v.cpu() if isinstance(v, Tensor) else v for v in _fields(frame)))
        expected = texture.extract(reference, config)
        for label, maps in (
            ("kernel", texture.extract(frame, config).maps),
            ("torch", texture.extract_with_torch(frame, config.cells)),
        ):
            worst = (maps.cpu().float() - expected.maps.float()).abs().amax(dim=(1, 2))
            progress(f"check {preset}: texture by {label} against CPU, worst {float(worst.max()):.2e}")
        maps = texture.extract(frame, config)
        on_host = texture.Texture(maps.maps.cpu(), maps.grid, maps.cells)
        for judge in stage.judges[:2]:
            worst = (judge(maps, stage.query).cpu() - judge(on_host, stage.query)).abs().max()
            progress(f"check {preset}: {judge.__name__} against CPU, worst {float(worst):.2e}")
        _check_head(stage, maps, on_host, preset)
        _check_graphs(stage, preset)


def _check_head(stage: Stage, maps: texture.Texture, on_host: texture.Texture, preset: str) -> None:
    """How far the texture head's convolutions on the device are from those on the CPU, and from TF32's."""
    query = Query(stage.query.text, stage.query.ids, stage.query.embedding.cpu())
    expected = copy.deepcopy(stage.head).cpu()(on_host, query)
    exact = (stage.head(maps, stage.query).cpu() - expected).abs().max()
    with torch.enable_grad():
        rounded = stage.head.logits(maps.maps[None].clone(), stage.query.embedding[None].clone(), maps.cells)
    worst = (rounded.detach()[0].sigmoid().cpu() - expected).abs().max()
    progress(
        f"check {preset}: texture head against CPU, worst {float(exact):.2e}; in TF32 {float(worst):.2e}"
    )


def _check_graphs(stage: Stage, preset: str) -> None:
    plan = stage.staged(False)
    for label, parallel in (("one branch", False), ("three branches", True)):
        graph = stage.graph(parallel)
        for _ in range(3):
            made = stage.graphed(graph)
            same = torch.equal(made.lod, plan.lod)
            worst = float((made.relevance - plan.relevance).abs().max())
            assert same or worst > 0, "plans differ although maps do not"
        progress(f"check {preset}: graph of {label}: same plan {same}, map differs by {worst:.2e}")
    maps = texture.extract(stage.frame, stage.config)
    beside = stage.graph(True, head=False)
    judged = beside.judge(stage.frame, stage.query, lambda: stage.head(maps, stage.query))
    worst = float((judged.relevance.map - plan.relevance).abs().max())
    progress(f"check {preset}: query-free graph beside a scorer: map differs by {worst:.2e}")
    with counted_waits() as waits:
        stage.graphed(graph)
        by_graph = len(waits)
        stage.staged(True)
    progress(f"check {preset}: host waits by graph {by_graph}, by streams {len(waits) - by_graph}: {waits}")


def _fields(frame: Frame) -> tuple[Any, ...]:
    return tuple(getattr(frame, name) for name in frame.__slots__)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """The host's waits for the device while the body runs, as the warnings that torch gives of them."""
    found: list[str] = []

    def note(message: object, category: object, filename: str, lineno: int, *_: object) -> None:
        # Switching the mode on warns, too, the first time: that it is a prototype.
        if "called a synchronizing" in str(message):
            found.append(f"{Path(filename).name}:{lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def profile(name: str, height: int, width: int, config: Config, device: torch.device) -> None:
    """Print what the device and the host spend the time on."""
    from torch.profiler import ProfilerActivity

    stage = Stage(make_frame(height, width, config, device), config, device)
    graph = stage.graph(True)
    ways: dict[str, Callable[[], object]] = {
        "sequence": lambda: stage.staged(False),
        "graph": lambda: stage.graphed(graph),
    }
    for way, run in ways.items():
        run()
        _wait()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
            _wait()
        averages = seen.key_averages()
        kernels = [e for e in averages if e.self_device_time_total > 0 and e.self_cpu_time_total == 0]
        total, count = sum(k.self_device_time_total for k in kernels), sum(k.count for k in kernels)
        progress(f"profile {name}, {way}: {count} kernels and copies, {total / 1e3:.3f} ms on the device")
        for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:15]:
            progress(f"  {event.self_device_time_total:9.1f} us {event.count:4d} x {event.key[:110]}")
        calls = {e.key: e.count for e in averages if e.key.startswith(("cuda", "cu"))}
        progress(f"  calls: {calls}")


def sweep(name: str, height: int, width: int, config: Config, device: torch.device) -> None:
    """Print the texture kernel's time by how much a program does."""
    frame = make_frame(height, width, config, device)
    usual = texture_kernel.COLUMNS, texture_kernel.WARPS
    for chosen in (usual, (128, 4), (256, 2), (256, 4), (1024, 4), (1024, 8)):
        texture_kernel.COLUMNS, texture_kernel.WARPS = chosen
        found = queued(lambda: texture.extract(frame, config))
        progress(f"sweep {name}: {chosen[0]} columns, {chosen[1]} warps: {found} ms")
    texture_kernel.COLUMNS, texture_kernel.WARPS = usual


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON."""
    options = _options(arguments)
    if options.picture:
        figure = draw(json.loads(Path(options.out).read_text("utf-8")))
        figure.savefig(ROOT / "docs" / "plan_stage.png", dpi=110, metadata={"Software": None})
        return
    device = torch.device(options.device)
    result: dict[str, Any] = {
        "benchmark": "plan_stage",
        **facts("benchmarks/plan_stage.py", arguments, device),
        "cases": [],
        "glimpse": [],
    }
    failed = False
    for section, run in _sections(options, device, result):
        begin = perf_counter()
        try:
            with torch.inference_mode():
                run()
        except Exception:  # the other sections are worth their device time all the same
            traceback.print_exc()
            failed = True
        progress(f"-- {section}: {perf_counter() - begin:.1f} s")
        write_result(Path(options.out), result)
    if failed:
        raise SystemExit(1)


def _sections(
    options: argparse.Namespace, device: torch.device, result: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], object]]]:
    if options.check:
        yield "check", lambda: check(device)
    for name, height, width, preset in _cases(options):
        config = configs.load(preset)

        def one(size: tuple[str, int, int] = (name, height, width), config: Config = config) -> None:
            result["cases"].append(measure_case(*size, config, device))
            _report(result["cases"][-1])

        yield name, one
        if options.profile:
            yield f"profile of {name}", partial(profile, name, height, width, config, device)
            yield f"sweep of {name}", partial(sweep, name, height, width, config, device)
    for size in options.glimpse:
        yield f"glimpse {size}", lambda size=size: result["glimpse"].append(measure_glimpse(size, device))


def _cases(options: argparse.Namespace) -> Sequence[tuple[str, int, int, str]]:
    return (("640x512", 512, 640, "photo"),) if options.quick else CASES


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="compare CPU and device, kernel and torch first")
    parser.add_argument("--profile", action="store_true", help="print kernels and calls")
    parser.add_argument("--glimpse", nargs="*", default=[], choices=["2b", "8b"], help="sizes to time")
    parser.add_argument("--out", default=str(RESULTS / "plan_stage.json"))
    parser.add_argument("--picture", action="store_true", help="draw docs/plan_stage.png from --out")
    parser.add_argument("--quick", action="store_true", help="one small frame: for the tests")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
