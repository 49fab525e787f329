"""Several requests at once, and guessed tokens: the same answers as one by one and step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arrcoc import Engine, sequence
from arrcoc.decode import (
    BatchDecoder,
    Sampling,
    SpeculativeDecoder,
    TransformersDecoder,
    make_decoder,
    quantize_text,
)
from arrcoc.decode import batch as decode_batch
from arrcoc.decode.speculative import Draft, PromptLookup
from arrcoc.errors import BudgetError, ConfigError, DecodeError, QueryError


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")


@pytest.fixture(scope="module")
def eager(engine: Engine) -> TransformersDecoder:
    return TransformersDecoder(engine._qwen)


def text_prompt(engine: Engine, ids: list[int]):
    made = sequence.prompt([engine._qwen.embed(ids)], [], [])
    return made.__class__(*[getattr(made, f) for f in made.__slots__[:-1]], text_ids=tuple(ids))


def alone(decoder, prompt, count: int, **fields) -> list[int]:
    return list(decoder.generate(decoder.prefill(prompt), Sampling(max_new_tokens=count, **fields)))


@pytest.fixture(scope="module")
def prompts(engine: Engine):
    generator = np.random.default_rng(0)
    return [text_prompt(engine, generator.integers(0, 1000, n).tolist()) for n in (3, 200, 41)]


# Batches.


def test_prompts_decoded_together_equal_one_by_one(engine, eager, prompts) -> None:
    batch = BatchDecoder(engine._qwen)
    made = batch.generate(prompts, [None] * 3, Sampling(max_new_tokens=10))
    assert made == [alone(eager, prompt, 10) for prompt in prompts]
    # The memory is used again; what the former batch left in it is not seen.
    again = batch.generate(prompts[::-1], [None] * 3, Sampling(max_new_tokens=10))
    assert again == made[::-1]
    assert batch.generate([], [], Sampling()) == []


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 5}])
def test_memory_grows_in_the_middle_of_the_answers(engine, eager, prompts, sampled, monkeypatch) -> None:
    monkeypatch.setattr(decode_batch, "_FIRST_ROOM", 2)
    monkeypatch.setattr("arrcoc.decode.slots._LEAST_CAPACITY", 32)
    batch = BatchDecoder(engine._qwen)
    made = batch.generate(prompts, [None] * 3, Sampling(max_new_tokens=90, **sampled))
    assert batch._kept[0].capacity == 512, "256 for the longest prompt and two tokens"
    assert made == [alone(eager, prompt, 90, **sampled) for prompt in prompts]


def test_memory_of_a_former_batch_is_lent_to_the_stream_that_uses_it(engine, prompts, monkeypatch) -> None:
    lent: list[int] = []
    monkeypatch.setattr(decode_batch.BatchMemory, "lend", lambda self: lent.append(id(self)))
    batch = BatchDecoder(engine._qwen)
    for _ in range(2):
        batch.generate(prompts, [None] * 3, Sampling(max_new_tokens=2))
    assert lent == [id(batch._kept[0])], "its own memory needs no lending"


def test_batches_are_captured_unless_the_decoder_is_to_be_eager(engine, prompts, monkeypatch) -> None:
    """On CUDA; here it is only asked for."""
    for choice in ("eager", "graphed"):
        made = Engine.from_pretrained(engine._qwen.name, preset="demo", device="cpu", decoder=choice)
        assert made._batch.capture == (choice == "graphed")
    batch = BatchDecoder(engine._qwen)
    assert (batch.captures.wanted, batch.notes()) == (False, [])
    batch.captures.fail(RuntimeError("not permitted\nhere"))
    assert batch.notes() == ["Batches are decoded without CUDA graphs: not permitted"]


@pytest.mark.gpu
def test_on_the_gpu_an_eager_decoder_captures_no_batch(tiny_checkpoint: Path) -> None:
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    answers = []
    for choice in ("eager", "graphed"):
        made = Engine.from_pretrained(tiny_checkpoint, "demo", "cuda", "float32", decoder=choice)
        answers.append([a.text for a in made.ask_batch([(image, "a"), (image, "b")], max_new_tokens=6)])
        (memory,) = made._batch._kept
        assert bool(memory.graphs) == (choice == "graphed")
    assert answers[0] == answers[1]


def test_memory_beyond_the_bound_is_not_kept(engine, prompts) -> None:
    for bound, kept in ((1 << 30, 1), (1000, 0)):
        batch = BatchDecoder(engine._qwen, keep_bytes=bound)
        batch.generate(prompts, [None] * 3, Sampling(max_new_tokens=2))
        assert len(batch._kept) == kept


def test_one_that_stops_leaves_the_others_alone(engine, eager, prompts, monkeypatch) -> None:
    free = [alone(eager, prompt, 10) for prompt in prompts]
    stop = next(token for token in free[1][2:] if token not in free[1][:2])
    monkeypatch.setitem(vars(engine._qwen), "stop_ids", frozenset([stop]))
    made = BatchDecoder(engine._qwen).generate(prompts, [None] * 3, Sampling(max_new_tokens=10))
    assert made == [alone(eager, prompt, 10) for prompt in prompts]
    assert len(made[1]) < 10


def test_sampled_rows_have_generators_of_their_own(engine, eager, prompts) -> None:
    sampling = {"temperature": 1.0, "seed": 5, "top_p": 0.9}
    made = BatchDecoder(engine._qwen).generate(prompts, [None] * 3, Sampling(max_new_tokens=6, **sampling))
    assert made == [alone(eager, prompt, 6, **sampling) for prompt in prompts]


def test_ask_batch_equals_ask_with_mixed_sizes_and_budgets(engine) -> None:
    generator = np.random.default_rng(1)
    large = generator.integers(0, 255, (512, 640, 3), dtype=np.uint8)
    small = generator.integers(0, 255, (256, 256, 3), dtype=np.uint8)
    requests = [
        (large, "What is it?"),
        (small, "Where?", 0.5),
        (large, "Name the colour.", 90),
        (small, "x", 1.0),
    ]
    made = engine.ask_batch(requests, max_new_tokens=6)
    for request, answer in zip(requests, made, strict=True):
        want = engine.ask(*request, max_new_tokens=6)
        for name in ("text", "new_tokens", "prompt_tokens", "finish"):
            assert getattr(answer, name) == getattr(want, name), name
        assert torch.equal(answer.encoding.tokens, want.encoding.tokens)
        assert {"prefill", "generate", "total"} <= set(answer.timings)
    assert engine.ask_batch([]) == []


def test_a_bad_request_in_a_batch_is_refused(engine) -> None:
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    with pytest.raises(QueryError):
        engine.ask_batch([(image, "fine"), (image, " ")])
    with pytest.raises(BudgetError):
        engine.ask_batch([(image, "fine", 10**6)])
    with pytest.raises(DecodeError):
        engine.ask_batch([(image, "fine")], temperature=-1)


# Guessing.


@pytest.mark.parametrize(
    ("text", "count", "guesses"),
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),  # the three last tokens stood before 4
        ([9, 2, 3, 5, 1, 2, 3], 2, [5, 1]),  # only two of them did
        ([7, 8, 7, 9, 7], 3, [9, 7]),  # the latest place counts; no more follows it
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([1, 1], 0, []),
    ],
)
def test_prompt_lookup(text, count, guesses) -> None:
    assert PromptLookup().begin()(text, count) == guesses


def test_a_draft_guesses_its_own_greedy_continuation(engine, eager, prompts) -> None:
    ids = list(prompts[2].text_ids)
    propose = Draft(engine._qwen).begin()
    free = alone(eager, prompts[2], 9)
    assert propose(ids, 4) == free[:4]
    assert propose(ids + free[:2], 4) == free[2:6]  # guesses that held stay in its cache
    other = [*ids, free[0], 17]  # one that did not is dropped
    assert propose(other, 3) == alone(eager, text_prompt(engine, other), 3)


@pytest.mark.parametrize("kind", ["lookup", "itself", "wrong"])
def test_guessing_changes_no_token(kind, engine, eager, prompts) -> None:
    class Wrong:
        name = "always wrong"

        def begin(self):
            return lambda text, count: [7] * count

    proposer = {"lookup": PromptLookup(), "itself": Draft(engine._qwen), "wrong": Wrong()}[kind]
    decoder = SpeculativeDecoder(engine._qwen, proposer)
    for prompt in prompts:
        assert alone(decoder, prompt, 15) == alone(eager, prompt, 15)
        sampled = alone(decoder, prompt, 5, temperature=1.0, seed=3)
        assert sampled == alone(decoder, prompt, 5, temperature=1.0, seed=3)


def test_right_guesses_save_passes(engine, prompts, monkeypatch) -> None:
    decoder, passes = SpeculativeDecoder(engine._qwen, Draft(engine._qwen)), []
    check = decoder._check
    monkeypatch.setattr(decoder, "_check", lambda *given: (passes.append(1), check(*given))[1])
    # The draft is the model, so all guesses hold: the first token, then eight a pass.
    assert len(alone(decoder, prompts[0], 17)) == 17
    assert len(passes) == 2


def test_guessing_stops_and_counts_as_stepping(engine, eager, prompts, monkeypatch) -> None:
    free = alone(eager, prompts[1], 10)
    stop = next(token for token in free[3:] if token not in free[:3])
    monkeypatch.setitem(vars(engine._qwen), "stop_ids", frozenset([stop]))
    decoder = SpeculativeDecoder(engine._qwen, Draft(engine._qwen))
    assert alone(decoder, prompts[1], 10) == free[: free.index(stop)]


# Choosing a decoder.


def test_what_a_configuration_asks_for(tiny_checkpoint, engine) -> None:
    def made(**fields) -> str:
        config = engine._presets.base.updated(fields)
        return type(make_decoder(engine._qwen, config)).__name__

    assert made() == made(decoder="eager") == "TransformersDecoder"
    assert made(decoder="graphed") == "GraphedDecoder"
    assert made(speculative="prompt_lookup") == made(speculative=str(tiny_checkpoint)) == "SpeculativeDecoder"
    with pytest.raises(ConfigError, match="speculative"):
        made(speculative="prompt_lookup", decoder="eager")


def test_quantised_weights_without_torchao_name_the_extra(engine, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'arrcoc\[quantized\]'"):
        quantize_text(engine._qwen, "int8")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"decoder": "graphed"}, "transformers layers, not captured, float32"),
        ({"speculative": "prompt_lookup"}, "transformers layers, not captured, float32, prompt lookup"),
        ({"decode_weights": "int8"}, "transformers sdpa float32, int8 weights"),
    ],
)
def test_an_engine_answers_with_every_decoder_and_says_which(fields, told, tiny_checkpoint, engine) -> None:
    pytest.importorskip("torchao")
    image = np.random.default_rng(2).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    other = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu", **fields)
    assert other.describe()["decoder"] == told
    if "decode_weights" not in fields:
        want = engine.ask(image, "What is it?", max_new_tokens=8).text
        assert other.ask(image, "What is it?", max_new_tokens=8).text == want
    else:
        assert other.ask(image, "What is it?", max_new_tokens=8).new_tokens
