"""The decoder with static memory gives what the eager one gives, token for token."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arrcoc import Engine, sequence
from arrcoc.decode import (
    GraphedDecoder,
    Sampling,
    TransformersDecoder,
    graphed_decoder,
    graphs,
    selection,
    slots,
)
from arrcoc.decode.layers_step import LayersStep
from arrcoc.decode.prefilling import dense_planes
from arrcoc.decode.slots import Slot, SlotPool, capacity_for
from arrcoc.errors import DecodeError
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint: Path) -> QwenVL:
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")._qwen


@pytest.fixture(scope="module")
def eager(qwen: QwenVL) -> TransformersDecoder:
    return TransformersDecoder(qwen)


@pytest.fixture
def decoder(qwen: QwenVL) -> GraphedDecoder:
    return GraphedDecoder(qwen, room=8)


@pytest.fixture(scope="module")
def make(qwen: QwenVL) -> Callable[..., Prompt]:
    def prompt(length: int, seed: int = 0) -> Prompt:
        """Random tokens, every other one with DeepStack planes."""
        torch.manual_seed(seed)
        ids = torch.randint(0, 1000, (length,))
        plain = sequence.prompt([qwen.embed_tensor(ids)], [], [])
        vision = torch.arange(length) % 2 == 0
        planes = torch.randn(3, int(vision.sum()), qwen.width)
        return replace(plain, vision=vision, deepstack=planes)

    return prompt


def answer(decoder, prompt: Prompt, count: int = 12, **fields) -> list[int]:
    return list(decoder.generate(decoder.prefill(prompt), Sampling(max_new_tokens=count, **fields)))


@pytest.mark.parametrize("length", [1, 65, 300, 1020])
def test_prefill_steps_and_answers_equal_the_eager_ones(length: int, make, eager, decoder) -> None:
    prompt = make(length)
    one, other = eager.prefill(prompt), decoder.prefill(prompt)
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=1e-5)
    for token in (5, 500):
        want = eager.step(one, token)
        torch.testing.assert_close(decoder.step(other, token), want, atol=1e-5, rtol=1e-5)
    assert (other.length, other.next_position) == (one.length, one.next_position)
    assert answer(decoder, prompt) == answer(eager, prompt)


@pytest.mark.parametrize("options", [{"most_static": 0}, {"most_static": 0, "prefill_chunk": 50}])
def test_prefill_in_one_pass_in_chunks_and_padded_is_the_same(options, qwen, make, eager) -> None:
    prompt = make(170)
    want = eager.prefill(prompt).logits
    have = GraphedDecoder(qwen, **options).prefill(prompt).logits
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


def test_planes_lie_where_vision_tokens_stand(make) -> None:
    prompt = make(5)
    dense = dense_planes(prompt)
    assert dense.shape == (3, 5, prompt.embeds.shape[2])
    assert torch.equal(dense[:, [0, 2, 4]], prompt.deepstack)
    assert not dense[:, [1, 3]].any()
    text = replace(prompt, vision=prompt.vision & False, deepstack=prompt.deepstack[:, :0])
    assert dense_planes(text).shape[0] == 0


def test_a_former_prompt_leaves_no_trace_in_its_slot(make, eager, decoder) -> None:
    assert answer(decoder, make(900, seed=3)) != answer(decoder, make(40))
    gc.collect()
    assert len(decoder._pool._idle) == 1
    for length in (70, 40):
        assert answer(decoder, make(length)) == answer(eager, make(length))


def test_a_slot_grows_when_an_answer_does_not_fit(make, eager, decoder) -> None:
    prompt = make(1010)
    state = decoder.prefill(prompt)
    assert state.slot.capacity == 1024
    made = list(decoder.generate(state, Sampling(max_new_tokens=30)))
    assert state.slot.capacity == 2048
    assert made == answer(eager, prompt, 30)


@pytest.mark.parametrize(
    "sampled", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 3, "top_k": 9}]
)
def test_a_slot_grows_in_the_middle_of_an_answer(sampled, qwen, make, eager, monkeypatch) -> None:
    monkeypatch.setattr(graphed_decoder, "FIRST_ROOM", 2)
    monkeypatch.setattr(slots, "_LEAST_CAPACITY", 32)
    prompt = make(30)
    decoder = GraphedDecoder(qwen, room=2)
    state = decoder.prefill(prompt)
    assert state.slot.capacity == 32
    made = list(decoder.generate(state, Sampling(max_new_tokens=120, **sampled)))
    assert state.slot.capacity == 256
    monkeypatch.undo()
    assert made == answer(GraphedDecoder(qwen), prompt, 120, **sampled)
    if "top_k" not in sampled:  # the eager decoder draws it otherwise
        assert made[:40] == answer(eager, prompt, 40, **sampled)
    assert state.length == 30 + len(made) - 1
    assert sorted(slot.capacity for slot in decoder._pool._idle) == [32, 64, 128]


def test_a_slot_that_grows_may_be_anothers_at_once(qwen, make, monkeypatch) -> None:
    """Tokens on their way to the host are read before the old slot goes back."""
    monkeypatch.setattr(graphed_decoder, "_AHEAD", 2)
    monkeypatch.setattr(graphed_decoder, "FIRST_ROOM", 2)
    monkeypatch.setattr(slots, "_LEAST_CAPACITY", 32)
    give_back, prepare = SlotPool.give_back, Slot.__init__

    def apart(self: Slot, *given) -> None:
        prepare(self, *given)
        self.seen = torch.zeros_like(self.history)  # as on a GPU, where it lies on the host

    monkeypatch.setattr(Slot, "__init__", apart)

    def spoil(self: SlotPool, slot: Slot) -> None:
        with torch.inference_mode():
            slot.seen.fill_(-1)
        give_back(self, slot)

    monkeypatch.setattr(SlotPool, "give_back", spoil)
    decoder = GraphedDecoder(qwen, room=2)
    state = decoder.prefill(make(30))
    run = decoder._start(state, Sampling(max_new_tokens=100))
    made = []
    for count in range(100):
        run.queue(min(count + 3, 100))
        made.append(run.token())
    assert -1 not in made
    assert made == answer(GraphedDecoder(qwen), make(30), 100)


def test_a_long_answer_reserves_no_more_than_it_needs(make, decoder, eager) -> None:
    state = decoder.prefill(make(40))
    stream = decoder.generate(state, Sampling(max_new_tokens=1_000_000))
    assert [next(stream) for _ in range(8)] == answer(eager, make(40), 8)
    assert state.slot.capacity == 8192


def test_too_little_memory_is_told_after_idle_slots_went(qwen, make, monkeypatch) -> None:
    decoder = GraphedDecoder(qwen, room=8)
    answer(decoder, make(40))
    gc.collect()
    assert decoder._pool.idle_bytes() > 0
    limit, real = 3000, Slot

    def allocate(weights, capacity, captures):
        if capacity > limit or decoder._pool.idle_bytes():
            raise torch.OutOfMemoryError("out of memory")
        return real(weights, capacity, captures)

    monkeypatch.setattr(slots, "Slot", allocate)
    assert decoder.prefill(make(1100)).slot.capacity == 2048
    gc.collect()
    size = 8 * qwen.n_layers * qwen.text.kv_heads * qwen.text.head_dim * 4096
    with pytest.raises(DecodeError, match=f"{size:,} bytes for 4,096 positions"):
        decoder.prefill(make(2100))


def test_requests_at_once_have_slots_of_their_own_and_give_them_back(make, decoder) -> None:
    alone = [answer(decoder, make(40, seed)) for seed in (1, 2)]
    streams = [decoder.generate(decoder.prefill(make(40, s)), Sampling(max_new_tokens=12)) for s in (1, 2)]
    turns = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == alone
    del streams
    gc.collect()
    assert len(decoder._pool._idle) == 2


def test_a_dropped_stream_gives_its_slot_back(make, decoder) -> None:
    stream = decoder.generate(decoder.prefill(make(40)), Sampling(max_new_tokens=12))
    next(stream)
    assert decoder._pool.idle_bytes() == 0
    del stream
    gc.collect()
    assert decoder._pool.idle_bytes() > 0


def test_it_stops_as_if_stepped_one_by_one(make, decoder, qwen, monkeypatch) -> None:
    free = answer(decoder, make(40))
    stop = next(token for token in free[1:] if token != free[0])
    monkeypatch.setitem(vars(qwen), "stop_ids", frozenset([stop]))
    state = decoder.prefill(make(40))
    made = list(decoder.generate(state, Sampling(max_new_tokens=12)))
    assert made == free[: free.index(stop)]
    assert state.length == 40 + len(made)
    assert state.next_position == 40 + len(made)


def test_a_prompt_beyond_the_context_is_refused(qwen, decoder) -> None:
    run = torch.zeros(1, qwen.width).expand(qwen.max_positions + 1, -1)
    with pytest.raises(DecodeError, match="32,769 tokens"):
        decoder.prefill(sequence.prompt([run], [], []))


@pytest.mark.parametrize(
    ("positions", "capacity"), [(1, 1024), (1024, 1024), (1025, 2048), (4096, 4096), (9000, 16384)]
)
def test_capacities(positions: int, capacity: int) -> None:
    assert capacity_for(positions) == capacity


def test_the_pool_keeps_what_its_bound_allows(qwen) -> None:
    each = Slot(qwen.text, 1024).nbytes
    pool = SlotPool(qwen.text, keep_bytes=2 * each)
    slots = [pool.lease(1024) for _ in range(3)]
    for slot in slots:
        pool.give_back(slot)
    assert pool.idle_bytes() == 2 * each
    assert pool.lease(1024) is slots[2]
    assert pool.lease(2048).capacity == 2048
    assert pool.lease(1024) is slots[1]


def test_a_slot_may_come_back_while_its_thread_is_in_the_pool(qwen) -> None:
    pool, done = SlotPool(qwen.text, keep_bytes=1 << 30), threading.Event()
    slot = pool.lease(1024)

    def run() -> None:
        with pool._lock:  # where the garbage collector may finalise a dropped request
            pool.give_back(slot)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(5)
    assert pool.lease(1024) is slot


# Sampling on the device.

LOGITS = torch.tensor((0.5, 0.25, 0.15, 0.1)).log()


def drawn(slot: Slot, count: int, **fields) -> Counter[int]:
    slot.logits = LOGITS
    sampling = Sampling(temperature=fields.pop("temperature", 1.0), seed=0, **fields)
    selection.prepare(slot, sampling)
    mode = selection.mode_of(sampling)
    return Counter(int(selection.choose(slot, mode)) for _ in range(count))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # 2/3 and 1/3 are left; before the second stands 2/3
    ],
)
def test_what_is_sampled_from(qwen, fields, kept) -> None:
    assert set(drawn(Slot(qwen.text, 1024), 300, **fields)) == kept


def test_sampling_follows_the_probabilities_and_the_temperature(qwen) -> None:
    slot = Slot(qwen.text, 1024)
    # Three standard deviations of a share of 4,000 draws at p = 0.5: 0.024.
    assert drawn(slot, 4000)[0] / 4000 == pytest.approx(0.5, abs=0.024)
    # At temperature 0.5 probabilities are squared: 0.25 / 0.345 = 0.725.
    assert drawn(slot, 4000, temperature=0.5)[0] / 4000 == pytest.approx(0.725, abs=0.024)
    # Of the two likeliest alone: 2/3.
    assert drawn(slot, 4000, top_k=2)[0] / 4000 == pytest.approx(2 / 3, abs=0.024)


def test_a_seed_decides_what_is_sampled(make, decoder) -> None:
    for fields in ({}, {"top_p": 0.9}):
        runs = [answer(decoder, make(40), temperature=1.0, seed=seed, **fields) for seed in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]
    assert answer(decoder, make(40), temperature=1.0, top_k=1) == answer(decoder, make(40))


# Triton's kernels, in its interpreter, which must be chosen before Triton is imported.

_KERNELS = Path(__file__).with_name("decode_kernels.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_equal_the_layers() -> None:
    """In a process of its own: logits after steps at several lengths, bf16-free, all weight formats."""
    found = subprocess.run(
        [sys.executable, str(_KERNELS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_slot_comes_back_with_what_a_failed_prefill_queued(decoder, make, monkeypatch) -> None:
    """Whoever leases it next, on another stream, waits for that."""
    events: list[str] = []

    def fail(*_):
        events.append("queued")
        raise torch.OutOfMemoryError("out of memory")

    give_back = SlotPool.give_back
    monkeypatch.setattr(graphed_decoder.prefilling, "fill", fail)
    monkeypatch.setattr(Slot, "mark_used", lambda _: events.append("marked"))
    monkeypatch.setattr(SlotPool, "give_back", lambda *given: (events.append("back"), give_back(*given)))
    with pytest.raises(torch.OutOfMemoryError):
        decoder.prefill(make(40))
    gc.collect()
    assert events == ["queued", "marked", "back"]


# Captures that fail.


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that captures nothing; each try leaves the generator useless, as CUDA does."""
    tried: list[str] = []

    def refuse(work, device, pool, generator):
        tried.append(work.__qualname__)
        generator.manual_seed(0)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "captured", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return tried


def test_an_answer_is_given_where_nothing_can_be_captured(qwen, make, eager, refusing, caplog) -> None:
    decoder = GraphedDecoder(qwen, room=8)
    assert decoder.backend == "transformers layers, not captured, float32"
    decoder._pool.captures.wanted = True
    assert decoder.backend == "transformers layers, CUDA graphs, float32"
    sampled = {"temperature": 1.0, "seed": 4}
    for _ in range(2):
        assert answer(decoder, make(40), **sampled) == answer(eager, make(40), **sampled)
        assert answer(decoder, make(40)) == answer(eager, make(40))
    assert len(refusing) == 1
    assert decoder.backend == "transformers layers, no CUDA graphs (operation not permitted), float32"
    assert [r.getMessage() for r in caplog.records] == [
        "decoding runs without CUDA graphs: operation not permitted"
    ]


def test_graphs_that_draw_from_a_spoilt_generator_are_used_no_more(qwen, refusing) -> None:
    slot, ran = Slot(qwen.text, 1024), list[str]()
    slot.captures.wanted, spoilt = True, slot.generator
    slot.graphs["older"] = SimpleNamespace(replay=lambda: pytest.fail("it draws no more"))
    for name in ("newer", "older"):
        graphs.run_captured(slot, name, lambda name=name: ran.append(name))
    assert ran == ["newer", "newer", "older"], "once as a rehearsal"
    assert (slot.graphs, len(refusing)) == ({"older": None, "newer": None}, 1)
    assert slot.generator is not spoilt


def test_too_little_memory_for_one_graph_is_no_failure_for_good(
    qwen, make, eager, refusing, monkeypatch
) -> None:
    def refuse(*_):
        refusing.append("once more")
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(graphs, "captured", refuse)
    decoder = GraphedDecoder(qwen, room=8)
    decoder._pool.captures.wanted = True
    sampled = {"temperature": 1.0, "seed": 4}
    assert answer(decoder, make(40), **sampled) == answer(eager, make(40), **sampled)
    assert len(refusing) == 1, "not at every token"
    assert decoder.backend == "transformers layers, CUDA graphs, float32"


@pytest.mark.gpu
def test_on_the_gpu_a_step_that_waits_cannot_be_captured_and_runs(tiny_checkpoint: Path) -> None:
    class Waiting(LayersStep):
        def logits(self, slot: Slot) -> None:
            super().logits(slot)
            slot.logits += 0 * slot.length.item()

    qwen = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda", dtype="float32")._qwen
    eager, decoder = TransformersDecoder(qwen), GraphedDecoder(qwen, step=Waiting(qwen), room=8)
    prompt = sequence.prompt([qwen.embed(list(range(300)))], [], [])
    assert answer(decoder, prompt, 24) == answer(eager, prompt, 24)
    sampled = {"temperature": 1.0, "seed": 4}
    plain = GraphedDecoder(qwen, step=LayersStep(qwen), room=8)
    assert answer(decoder, prompt, 24, **sampled) == answer(plain, prompt, 24, **sampled)
    assert "no CUDA graphs (" in decoder.backend
    assert "CUDA graphs," in plain.backend


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 3}])
def test_on_the_gpu_a_slot_grows_in_the_middle_of_an_answer(sampled, tiny_checkpoint, monkeypatch) -> None:
    qwen = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda", dtype="float32")._qwen
    prompt = sequence.prompt([qwen.embed(list(range(30)))], [], [])
    expected = answer(GraphedDecoder(qwen), prompt, 200, **sampled)
    monkeypatch.setattr(graphed_decoder, "FIRST_ROOM", 2)
    monkeypatch.setattr(slots, "_LEAST_CAPACITY", 32)
    decoder = GraphedDecoder(qwen, room=2)
    for _ in range(2):
        state = decoder.prefill(prompt)
        assert list(decoder.generate(state, Sampling(max_new_tokens=200, **sampled))) == expected
        assert state.slot.capacity == 256
        del state


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["layers", "kernels"])
def test_on_the_gpu_captured_steps_equal_eager_ones(step: str, tiny_checkpoint: Path) -> None:
    from arrcoc.decode.launch import KernelStep

    qwen = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda", dtype="float32")._qwen
    if step == "kernels" and not KernelStep.supports(qwen.text):
        pytest.skip("the tiny checkpoint's heads have no kernels; benchmarks/decode.py checks them")
    chosen = LayersStep(qwen) if step == "layers" else KernelStep(qwen.text)
    eager, graphed = TransformersDecoder(qwen), GraphedDecoder(qwen, step=chosen, room=8)
    for length in (5, 300, 1020):
        prompt = sequence.prompt([qwen.embed(list(range(length)))], [], [])
        assert answer(graphed, prompt, 24) == answer(eager, prompt, 24)
    seeded = [answer(graphed, prompt, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
