"""Decoding: how tokens are chosen, when it stops, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from arrcoc import Engine, sequence
from arrcoc.answer import text_pieces
from arrcoc.decode import Sampling, TransformersDecoder
from arrcoc.decode.transformers_decoder import choose
from arrcoc.errors import DecodeError

PROBABILITIES = (0.5, 0.25, 0.15, 0.1)
LOGITS = torch.tensor(PROBABILITIES).log()


def drawn(count: int = 400, **fields) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**({"temperature": 1.0} | fields))
    return Counter(choose(LOGITS, sampling, generator) for _ in range(count))


def test_greedy_takes_the_likeliest():
    assert choose(torch.tensor([0.1, 3.0, 2.9]), Sampling(), None) == 1


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        # Before tokens 0, 1, 2, 3 stand 0, 0.5, 0.75, 0.9: a token stays while that is below top_p.
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        # top_k 2 leaves 2/3 and 1/3; before token 1 stands 2/3, which reaches 0.6.
        ({"top_k": 2, "top_p": 0.6}, {0}),
    ],
)
def test_what_is_sampled_from(fields, kept):
    assert set(drawn(**fields)) == kept


def test_sampling_follows_the_probabilities_and_the_temperature():
    counts = drawn(4000)
    # Three standard deviations of a share of 4,000 draws at p = 0.5 are 3 * sqrt(0.25 / 4000) = 0.024.
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.024)
    # At temperature 0.5 probabilities are squared: 0.25 / (0.25 + 0.0625 + 0.0225 + 0.01) = 0.725.
    assert drawn(4000, temperature=0.5)[0] / 4000 == pytest.approx(0.725, abs=0.024)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"seed": -1},
        {"seed": "x"},
        {"seed": 1 << 63},
    ],
)
def test_bad_sampling_is_refused(fields):
    with pytest.raises(DecodeError) as caught:
        Sampling(**fields)
    assert next(iter(fields)) in caught.value.given
    assert caught.value.allowed
    assert caught.value.remedy


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")._qwen


@pytest.fixture(scope="module")
def decoder(qwen):
    return TransformersDecoder(qwen)


@pytest.fixture
def prompt(qwen):
    (run,) = qwen.render([{"role": "user", "content": "Tell me about the weather."}])
    return sequence.prompt([qwen.embed(run)], [], [])


def generated(decoder, prompt, **fields) -> list[int]:
    return list(decoder.generate(decoder.prefill(prompt), Sampling(**fields)))


def test_a_seed_decides_what_is_sampled(decoder, prompt):
    runs = [generated(decoder, prompt, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_greedy_follows_the_logits_of_every_step(decoder, prompt):
    state, wanted = decoder.prefill(prompt), []
    for _ in range(5):
        wanted.append(int(state.logits.argmax()))
        decoder.step(state, wanted[-1])
    assert generated(decoder, prompt, max_new_tokens=5) == wanted
    assert state.length == prompt.embeds.shape[1] + 5
    assert state.next_position == prompt.next_position + 5


def test_a_step_equals_a_longer_prompt(qwen, decoder, prompt):
    state = decoder.prefill(prompt)
    stepped = decoder.step(state, 65)
    longer = sequence.prompt([torch.cat((prompt.embeds[0], qwen.embed([65])))], [], [])
    torch.testing.assert_close(stepped, decoder.prefill(longer).logits, atol=1e-4, rtol=1e-4)


def test_it_stops_at_a_stop_token_and_keeps_it_to_itself(decoder, prompt, monkeypatch):
    free = generated(decoder, prompt, max_new_tokens=6)
    stop = next(token for token in free[1:] if token != free[0])
    monkeypatch.setitem(vars(decoder._qwen), "stop_ids", frozenset([stop]))
    assert generated(decoder, prompt, max_new_tokens=6) == free[: free.index(stop)]


def test_it_stops_at_max_new_tokens_without_a_step_too_many(decoder, prompt):
    state = decoder.prefill(prompt)
    assert len(list(decoder.generate(state, Sampling(max_new_tokens=3)))) == 3
    assert state.length == prompt.embeds.shape[1] + 2


def test_a_prompt_beyond_the_context_is_refused(qwen, decoder):
    run = torch.zeros(1, qwen.width).expand(qwen.max_positions + 1, -1)
    with pytest.raises(DecodeError, match="32,769 tokens") as caught:
        decoder.prefill(sequence.prompt([run], [], []))
    assert "32,768" in caught.value.allowed
    assert "budget" in caught.value.remedy


def test_requests_may_be_interleaved(decoder, prompt):
    alone = generated(decoder, prompt, max_new_tokens=4)
    other = dataclasses.replace(prompt, embeds=prompt.embeds.flip(1))
    first = decoder.generate(decoder.prefill(prompt), Sampling(max_new_tokens=4))
    second = decoder.generate(decoder.prefill(other), Sampling(max_new_tokens=4))
    turns = [pair[0] for pair in zip(first, second, strict=False)]
    assert turns == alone


@pytest.mark.parametrize("text", ["Grüße", "日本語 ok", "a 🙂 b 🙂", "plain words"])
def test_streamed_pieces_join_to_the_text_across_split_characters(text, qwen):
    ids = qwen.tokenize(text)
    seen: list[int] = []
    pieces = list(text_pieces(iter(ids), qwen.detokenize, seen))
    assert "".join(pieces) == qwen.detokenize(ids) == text
    assert seen == ids
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_an_unfinished_character_is_still_given_at_the_end(qwen):
    ids = qwen.tokenize("🙂")[:-1]
    assert "".join(text_pieces(iter(ids), qwen.detokenize, [])) == qwen.detokenize(ids) != ""
