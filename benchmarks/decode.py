"""Milliseconds of a decode step beside the time that reading the weights takes, and of a prefill.

Random weights of Qwen3-VL's sizes, made on the device; text decoder only. The floor of a step is the bytes of
the text decoder's matrices over the bandwidth of a device-to-device copy measured in the same run.

    python benchmarks/decode.py [--shapes 8b 2b] [--sections check step sweep quantized prefill]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from common import RESULTS, facts, progress, write_result
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from arrcoc import sequence
from arrcoc.decode import Sampling, TransformersDecoder
from arrcoc.decode.blocking import Blocking, Blocks, blocking_for
from arrcoc.decode.choice import steps, trouble
from arrcoc.decode.graphed_decoder import GraphedDecoder, GraphedState, place
from arrcoc.decode.launch import KernelStep
from arrcoc.decode.layers_step import LayersStep
from arrcoc.decode.quantized import quantize_text
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"layers": 36, "width": 4096, "heads": 32, "kv_heads": 8, "mlp": 12288},
    "4b": {"layers": 36, "width": 2560, "heads": 32, "kv_heads": 8, "mlp": 9728, "tied": True},
    "2b": {"layers": 28, "width": 2048, "heads": 16, "kv_heads": 8, "mlp": 6144, "tied": True},
    "tiny": {"layers": 4, "width": 512, "heads": 8, "kv_heads": 2, "mlp": 1536, "vocabulary": 4099},
}
"""Qwen3-VL's text decoders, and a small one with a vocabulary of an odd size."""
CONTEXT = 2048
"""Positions in the cache where steps are timed."""
CHOICES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "attend": ((32, 32, 2), (16, 32, 4), (16, 32, 2), (32, 16, 4), (32, 64, 4), (16, 64, 4), (64, 16, 4)),
    "gated": ((2, 2048, 4), (4, 512, 4), (2, 1024, 4), (4, 1024, 8), (4, 2048, 8)),
    "down": ((8, 1024, 8), (4, 1024, 4), (4, 2048, 4), (2, 2048, 4), (8, 512, 4)),
    "qkv": ((4, 1024, 4), (4, 2048, 4), (8, 1024, 8), (8, 512, 4), (16, 512, 4)),
    "out": ((4, 1024, 4), (4, 2048, 4), (8, 1024, 8), (8, 512, 4), (2, 2048, 4)),
    "head": ((4, 1024, 4), (16, 512, 4), (8, 2048, 8)),
}
"""Other ways to divide each matrix and the attention than the usual one: `arrcoc.decode.blocking.Blocks`."""
NOISE = 0.002
"""What is faster by no more than this share is not taken for faster."""


def make_qwen(name: str, device: torch.device, dtype: torch.dtype) -> QwenVL:
    """A checkpoint of one of the shapes with random weights, made on the device."""
    shape = SHAPES[name]
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    text = {
        "vocab_size": shape.get("vocabulary", 151_936),
        "hidden_size": shape["width"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_parameters": rope,
        "rope_scaling": rope,
        "rope_theta": 5e6,
        "tie_word_embeddings": shape.get("tied", False),
    }
    vision = {"depth": 4, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
    vision |= {"out_hidden_size": shape["width"], "deepstack_visual_indexes": [0, 1, 2]}
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=shape.get("tied", False)
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model: Any = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    torch.set_default_dtype(default)
    tokenizer = SimpleNamespace(eos_token_id=None)
    qwen = QwenVL(model, tokenizer, ((0.5,) * 3, (0.5,) * 3))
    vars(qwen)["stop_ids"] = frozenset()
    return qwen


def graphed(qwen: QwenVL, **options: Any) -> GraphedDecoder:
    """The decoder that an engine takes on CUDA."""
    return GraphedDecoder(qwen, **{"step": steps(qwen)[0]} | options)


def make_prompt(qwen: QwenVL, length: int, seed: int = 0) -> Prompt:
    """A prompt of random tokens, half of them with DeepStack planes."""
    torch.manual_seed(seed)
    ids = torch.randint(0, qwen.text.embedding.shape[0], (length,), device=qwen.device)
    with torch.inference_mode():
        plain = sequence.prompt([qwen.embed_tensor(ids)], [], [])
        vision = torch.arange(length, device=qwen.device) % 2 == 0
        planes = torch.randn(3, (length + 1) // 2, qwen.width, device=qwen.device, dtype=qwen.dtype) * 0.02
        return replace(plain, vision=vision, deepstack=planes)


# Correctness.


def relative(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((have.double() - want.double()).norm() / want.double().norm())


def check_tiny(device: torch.device) -> dict[str, Any]:
    """Graphed against eager in fp32: logits, tokens, sampling, growth and interleaving."""
    qwen = make_qwen("tiny", device, torch.float32)
    eager, found = TransformersDecoder(qwen), {}
    steps = {"layers": LayersStep(qwen), "kernels": KernelStep(qwen.text, pdl=False)}
    steps["kernels, pdl"] = KernelStep(qwen.text)
    for name, step in steps.items():
        decoder = GraphedDecoder(qwen, step=step, room=8)
        worst, same = 0.0, True
        for length in (5, 100, 1020, 3000):
            prompt = make_prompt(qwen, length)
            one, other = eager.prefill(prompt), decoder.prefill(prompt)
            worst = max(worst, relative(other.logits, one.logits))
            for token in (7, 11, 4000):
                worst = max(worst, relative(decoder.step(other, token), eager.step(one, token)))
            same &= tokens(eager, prompt, 48) == tokens(decoder, prompt, 48)
        found[name] = {"worst_logits": worst, "same_tokens": same} | check_use(decoder, qwen)
        progress(f"tiny fp32, {name}: {found[name]}")
    return found


def tokens(decoder: Any, prompt: Prompt, count: int, **sampling: Any) -> list[int]:
    """Token ids of a whole answer."""
    return list(decoder.generate(decoder.prefill(prompt), Sampling(max_new_tokens=count, **sampling)))


def check_use(decoder: GraphedDecoder, qwen: QwenVL) -> dict[str, bool]:
    """Seeds, top-k of one, a stop token, and two requests at once."""
    prompt, other = make_prompt(qwen, 40), make_prompt(qwen, 60, seed=1)
    free = tokens(decoder, prompt, 24)
    seeded = [tokens(decoder, prompt, 24, temperature=1.0, seed=s) for s in (1, 1, 2)]
    nucleus = [tokens(decoder, prompt, 24, temperature=1.0, top_p=0.9, top_k=50, seed=s) for s in (1, 1, 2)]
    stop = free[10]
    vars(qwen)["stop_ids"] = frozenset([stop])
    stopped = tokens(decoder, prompt, 24)
    vars(qwen)["stop_ids"] = frozenset()
    first = decoder.generate(decoder.prefill(prompt), Sampling(max_new_tokens=24))
    second = decoder.generate(decoder.prefill(other), Sampling(max_new_tokens=24))
    turns = list(zip(first, second, strict=True))
    return {
        "seeded": seeded[0] == seeded[1] != seeded[2],
        "nucleus": nucleus[0] == nucleus[1] != nucleus[2],
        "top_k_of_one": tokens(decoder, prompt, 24, temperature=1.0, top_k=1) == free,
        "stops": stopped == free[: free.index(stop)],
        "two_at_once": [t[0] for t in turns] == free and [t[1] for t in turns] == tokens(decoder, other, 24),
    }


def check_shape(qwen: QwenVL) -> dict[str, Any]:
    """At full size: how far the kernels' logits are from the eager ones along the same tokens."""
    eager, decoder = TransformersDecoder(qwen), graphed(qwen)
    prompt = make_prompt(qwen, CONTEXT - 64)
    told = trouble(decoder, eager, qwen)
    with stock_layers(qwen):
        one, other = eager.prefill(prompt), decoder.prefill(prompt)
        errors, agreed = [relative(other.logits, one.logits)], 0
        for _ in range(8):
            token = int(one.logits.argmax())
            want, have = eager.step(one, token), decoder.step(other, token)
            errors.append(relative(have, want))
            agreed += int(have.argmax()) == int(want.argmax())
    return {"trouble": told, "relative_logits": [round(e, 5) for e in errors], "same_likeliest_of_8": agreed}


# Time.


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes read and written a second by a copy of 4 GiB."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (device_ms(lambda: target.copy_(source), repeats) / 1e3)


def device_ms(work: Callable[[], object], repeats: int, inner: int = 1) -> float:
    """Median device time of `inner` calls, for one call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(inner):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / inner)
    return statistics.median(times)


def step_ms(decoder: GraphedDecoder, state: GraphedState, repeats: int = 3, inner: int = 16) -> float:
    """Device time of one captured greedy step at the state's context."""
    slot = state.slot
    if slot.graphs.pop("greedy", None) is not None:
        slot.pool = torch.cuda.graph_pool_handle()  # a pool goes with its last graph

    def work() -> None:
        decoder._run(slot, "greedy")

    with torch.inference_mode():
        place(slot, state)
        return device_ms(work, repeats, inner)


@contextmanager
def stock_layers(qwen: QwenVL) -> Iterator[None]:
    """Run transformers' own layers, not the fused ones."""
    fused = qwen.fused
    vars(qwen)["fused"] = None
    yield
    vars(qwen)["fused"] = fused


def eager_step_ms(qwen: QwenVL, prompt: Prompt) -> float:
    """Device time of one step of the eager decoder."""
    decoder = TransformersDecoder(qwen)
    state = decoder.prefill(prompt)
    return device_ms(lambda: decoder.step(state, 5), 5)


def wall_ms(decoder: GraphedDecoder, prompt: Prompt, count: int = 96) -> float:
    """Wall time of a generated token, as a caller of `generate` sees it."""
    state = decoder.prefill(prompt)
    stream = decoder.generate(state, Sampling(max_new_tokens=count))
    next(stream)
    start = perf_counter()
    made = sum(1 for _ in stream)
    return (perf_counter() - start) * 1e3 / made


def time_steps(qwen: QwenVL, bandwidth: float) -> dict[str, Any]:
    """Steps of every kind in bf16, and their ratio to the floor."""
    prompt = make_prompt(qwen, CONTEXT - 48)
    floor = qwen.text.nbytes / bandwidth * 1e3
    made: dict[str, Any] = {"weight_bytes": qwen.text.nbytes, "floor_ms": floor}
    with stock_layers(qwen):
        made["eager_ms"] = eager_step_ms(qwen, prompt)
    made["fused_layers_ms"] = eager_step_ms(qwen, prompt)
    kinds = {"layers_in_graph": LayersStep(qwen), "kernels_without_pdl": KernelStep(qwen.text, pdl=False)}
    kinds["kernels"] = KernelStep(qwen.text)
    for name, step in kinds.items():
        decoder = GraphedDecoder(qwen, step=step)
        made[f"{name}_ms"] = step_ms(decoder, decoder.prefill(prompt))
    made["generate_wall_ms"] = wall_ms(decoder, prompt)
    sampled = graphed(qwen)
    state = sampled.prefill(prompt)
    for mode, fields in (("sampled", {}), ("top_p", {"top_p": 0.9})):
        stream = sampled.generate(state, Sampling(max_new_tokens=32, temperature=1.0, seed=1, **fields))
        next(stream), next(stream)
        start = perf_counter()
        made[f"{mode}_wall_ms"] = sum(1 for _ in stream) and (perf_counter() - start) * 1e3 / 30
    made["kernels_over_floor"] = made["kernels_ms"] / floor
    made["eager_over_kernels"] = made["eager_ms"] / made["kernels_ms"]
    return made


def profile_step(qwen: QwenVL) -> dict[str, Any]:
    """Device time of each kernel in one captured step, without overlap; microseconds and counts."""
    decoder = GraphedDecoder(qwen, step=KernelStep(qwen.text, pdl=False))
    state = decoder.prefill(make_prompt(qwen, CONTEXT - 48))
    step_ms(decoder, state, 1, 1)
    kind = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as profile:
        state.slot.graphs["greedy"].replay()
        torch.cuda.synchronize()
    rows = {e.key[:40]: (round(e.self_device_time_total, 1), e.count) for e in profile.key_averages()}
    return {name: row for name, row in sorted(rows.items(), key=lambda r: -r[1][0]) if row[0] > 0}


def sweep(qwen: QwenVL, state: GraphedState, decoder: GraphedDecoder) -> dict[str, Any]:
    """Step times, choosing the fastest division of one matrix after another."""
    usual = best = blocking_for(qwen.text)
    others = [best._replace(**{field: Blocks(*b)}) for field, many in CHOICES.items() for b in many]
    compile_all(qwen, state, [*others, *(b._replace(early=not b.early) for b in (best, *others))])
    least = timed_with(decoder, state, best)
    found: dict[str, Any] = {"usual": least, "tried": []}
    for field in (*CHOICES, "early"):
        values = [Blocks(*b) for b in CHOICES[field]] if field in CHOICES else [not best.early]
        for value in values:
            other = best._replace(**{field: value})
            took = timed_with(decoder, state, other)
            found["tried"].append({"what": field, "as": value, "ms": round(took, 4)})
            if took < least * (1 - NOISE):
                best, least = other, took
    found["best"] = best._asdict()
    return found | {
        "best again": timed_with(decoder, state, best),
        "usual again": timed_with(decoder, state, usual),
    }


def timed_with(decoder: GraphedDecoder, state: GraphedState, blocking: Blocking) -> float:
    """Step time with these blocks."""
    decoder._step = KernelStep(decoder._qwen.text, blocking)
    return step_ms(decoder, state)


def compile_all(qwen: QwenVL, state: GraphedState, blockings: Sequence[Blocking]) -> None:
    """Compile the kernels of many blockings side by side."""
    import triton

    weights = qwen.text
    once = replace(weights, layers=weights.layers[:1])
    with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
        for blocking in blockings:
            step = KernelStep(once, blocking, compile_only=True)
            step.logits(state.slot)
            step.finish(state.slot)


def time_quantized(qwen: QwenVL, bandwidth: float, kind: Any, swept: bool) -> dict[str, Any]:
    """Steps with weights of one byte; changes the checkpoint."""
    prompt = make_prompt(qwen, CONTEXT - 48)
    before = TransformersDecoder(qwen).prefill(prompt).logits
    quantize_text(qwen, kind)
    floor = qwen.text.nbytes / bandwidth * 1e3
    decoder = graphed(qwen)
    state = decoder.prefill(prompt)
    made: dict[str, Any] = {"weight_bytes": qwen.text.nbytes, "floor_ms": floor}
    made["relative_logits"] = relative(state.logits, before)
    eager = TransformersDecoder(qwen)
    one = eager.prefill(prompt)
    made["kernels_against_eager"] = relative(decoder.step(state, 5), eager.step(one, 5))
    made["kernels_ms"] = timed_with(decoder, state, blocking_for(qwen.text))
    if swept:
        made["sweep"] = sweep(qwen, state, decoder)
    made["kernels_over_floor"] = made["kernels_ms"] / floor
    return made


def time_prefill(qwen: QwenVL, lengths: Sequence[int]) -> dict[str, Any]:
    """Prefill of whole prompts, and of a prompt's second half over its first."""
    made: dict[str, Any] = {}
    decoders = {
        "slots": graphed(qwen, most_static=0),
        "eager": TransformersDecoder(qwen),
        "graphed": graphed(qwen, most_static=2048),
        "chunks_of_4096": graphed(qwen, most_static=0, prefill_chunk=4096),
    }
    for length in lengths:
        made[str(length)] = prefill_row(qwen, decoders, make_prompt(qwen, length))
        progress(f"prefill {length}: {made[str(length)]}")
    return made


def prefill_row(qwen: QwenVL, decoders: dict[str, Any], prompt: Prompt) -> dict[str, float]:
    """One length: times of every decoder that is for it, and how far its logits are from the plain ones."""
    length = prompt.embeds.shape[1]
    row, repeats = {}, 3 if length > 4096 else 5
    for _ in range(2 if length <= 2048 else 0):
        decoders["graphed"].prefill(prompt)  # captured the second time
    plain = decoders["slots"].prefill(prompt).logits
    for name, decoder in decoders.items():
        if (name == "graphed" and length > 2048) or (name == "chunks_of_4096" and length <= 4096):
            continue
        row[f"{name}_ms"] = device_ms(partial(decoder.prefill, prompt), repeats)
        row[f"{name}_error"] = relative(decoder.prefill(prompt).logits, plain)
    if length in (256, 12_544):
        with stock_layers(qwen):
            row["stock_layers_ms"] = device_ms(partial(decoders["eager"].prefill, prompt), repeats)
            row["stock_layers_error"] = relative(decoders["eager"].prefill(prompt).logits, plain)
    row["second_half_ms"] = device_ms(partial(continue_half, qwen, prompt), repeats)
    return {name: round(value, 4) for name, value in row.items()}


def continue_half(qwen: QwenVL, prompt: Prompt) -> Tensor:
    """The second half of a prompt over a cache that is as long as its first; its contents do not matter."""
    from arrcoc.decode import prefilling
    from arrcoc.kv import KvCache

    half = prompt.embeds.shape[1] // 2
    weights = qwen.text
    shape = (qwen.n_layers, 2, weights.kv_heads, 2 * half + 64, weights.head_dim)
    block = torch.zeros(shape, dtype=qwen.dtype, device=qwen.device)
    with torch.inference_mode():
        return prefilling.run(qwen, KvCache.holding(block, half), prompt, half, None)


# The run.


@contextmanager
def section(result: dict[str, Any], name: str, clock: float) -> Iterator[None]:
    """Print what a section found; where it fails, print why and go on with the next."""
    try:
        yield
        progress(f"[{perf_counter() - clock:5.1f} s] {name}: {result.get(name)}")
    except Exception:
        progress(f"[{perf_counter() - clock:5.1f} s] {name} FAILED\n{traceback.format_exc()}")
        result[name] = {"failed": traceback.format_exc().splitlines()[-1]}


def run_shape(name: str, options: argparse.Namespace, bandwidth: float, clock: float) -> dict[str, Any]:
    """All sections of one shape."""
    device, made = torch.device(options.device), {}
    qwen = make_qwen(name, device, torch.bfloat16)
    wanted = options.sections
    if "check" in wanted:
        with section(made, "check", clock):
            made["check"] = check_shape(qwen)
    if "step" in wanted:
        with section(made, "step", clock):
            made["step"] = time_steps(qwen, bandwidth)
        with section(made, "profile", clock):
            made["profile"] = profile_step(qwen)
    if "sweep" in wanted:
        with section(made, "sweep", clock):
            decoder = graphed(qwen)
            made["sweep"] = sweep(qwen, decoder.prefill(make_prompt(qwen, CONTEXT - 48)), decoder)
    if "prefill" in wanted:
        with section(made, "prefill", clock):
            made["prefill"] = time_prefill(qwen, options.lengths)
    if "quantized" in wanted:
        for kind in ("int8", "float8"):
            with section(made, kind, clock):
                made[kind] = time_quantized(qwen, bandwidth, kind, "sweep" in wanted)
            del qwen
            if kind == "int8":
                qwen = make_qwen(name, device, torch.bfloat16)
    return made


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and write its JSON."""
    options = _options(arguments)
    device, clock = torch.device(options.device), perf_counter()
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {
        "benchmark": "decode",
        **facts("benchmarks/decode.py", arguments, device),
        "dtype": "bfloat16",
        "context": CONTEXT,
        "copy_bytes_per_second": bandwidth,
    }
    progress(f"copy {bandwidth / 1e12:.3f} TB/s on {result['device']}")
    if "check" in options.sections:
        with section(result, "tiny", clock):
            result["tiny"] = check_tiny(device)
    for name in options.shapes:
        with section(result, name, clock):
            result[name] = run_shape(name, options, bandwidth, clock)
        write_result(Path(options.out), result)
        torch.cuda.empty_cache()
    progress(f"{perf_counter() - clock:.1f} s in all")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["8b", "2b"], choices=list(SHAPES))
    sections = ["check", "step", "prefill", "sweep", "quantized"]
    parser.add_argument("--sections", nargs="+", default=sections, choices=sections)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 800, 1568, 3136, 12_544])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=str(RESULTS / "decode.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
