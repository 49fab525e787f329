"""The glimpse: where a question looks, compared with where anybody would."""

from __future__ import annotations

import pytest
import torch

from arrcoc import Engine, image, sequence, texture
from arrcoc.attention_probe import attention_shares, probe_layers, relative, sinks
from arrcoc.config import build, load
from arrcoc.glimpse import GlimpseScorer, JointGlimpse
from arrcoc.kv import KvCache

CONFIG = load("demo")


def test_probe_layers():
    # 0.4, 0.5, 0.6 of 36: 14.4, 18, 21.6, rounded down; of 4: 1.6, 2, 2.4 -> 1, 2, 2.
    assert probe_layers((0.4, 0.5, 0.6), 36) == [14, 18, 21]
    assert probe_layers((0.6, 0.5, 0.4), 4) == [1, 2]
    assert probe_layers((1.0,), 4) == [3]


def test_sinks_exceed_a_multiple_of_the_median():
    norms = torch.tensor([1.0, 2.0, 3.0, 8.0, 8.1])  # median 3
    assert sinks(norms, 2.7).tolist() == [False, False, False, False, False]
    assert sinks(norms, 2.68).tolist() == [False, False, False, False, True]


def test_attention_shares_of_two_tokens():
    # One head of width 4, so scores are q.k / 2. q.k = 2 ln 3 and 0: weights 3 : 1.
    keys = torch.tensor([[[2 * torch.tensor(3.0).log(), 0, 0, 0], [0, 0, 0, 0]]])
    query = torch.tensor([[[1.0, 0, 0, 0]]])
    none = torch.tensor([False, False])
    torch.testing.assert_close(attention_shares(query, keys, none), torch.tensor([0.75, 0.25]))


def test_attention_shares_average_rows_and_grouped_heads():
    # Two key heads, two query heads each; query heads 0 and 1 see key head 0, which is drawn to token 0.
    far = 1000.0
    keys = torch.tensor([[[far, 0.0], [0.0, 0.0]], [[0.0, 0.0], [far, 0.0]]])
    query = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    # Heads 0 and 1: all on token 0; head 2: all on token 1; head 3: half and half. (1 + 1 + 0 + 0.5) / 4.
    shares = attention_shares(query, keys, torch.tensor([False, False]))
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375]))


def test_attention_shares_leave_sinks_out():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 3, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    excluded = torch.tensor([False, True, False, False, False])
    shares = attention_shares(query, keys, excluded)
    assert shares[1] == 0
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    kept = attention_shares(query, keys[:, ~excluded], torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(shares[~excluded], kept)
    assert attention_shares(query, keys, torch.ones(5, dtype=torch.bool)).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("asked", "anyhow", "gain", "expected"),
    # a**g / (a**g + b**g): 3/4; 9/10 at gain 2; nobody looks; only one looks.
    [
        (0.3, 0.1, 1.0, 0.75),
        (0.3, 0.1, 2.0, 0.9),
        (0.2, 0.2, 3.0, 0.5),
        (0.0, 0.0, 1.0, 0.5),
        (0.1, 0.0, 1.0, 1.0),
        (0.0, 0.1, 1.0, 0.0),
    ],
)
def test_relative(asked, anyhow, gain, expected):
    found = relative(torch.tensor(asked), torch.tensor(anyhow), gain)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def qwen(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cpu")._qwen


@pytest.fixture(scope="module")
def frame(qwen, photo):
    return image.frame(image.decode(photo.crop((0, 0, 384, 256)), 10**8), CONFIG, 32, qwen.device)


@pytest.fixture(scope="module")
def features(qwen, frame):
    return JointGlimpse(qwen).encode(frame)


def scorer(qwen, frame, features, config=CONFIG) -> GlimpseScorer:
    where = sequence.glimpse_positions(frame.grid, config.sides[0], config.sides[3])
    return GlimpseScorer(qwen, features, where, sequence.extent(frame.grid, 4), frame.grid, config)


def judge(made: GlimpseScorer, qwen, frame, question: str) -> torch.Tensor:
    return made(texture.extract(frame, CONFIG), qwen.query(question))


def test_the_joint_glimpse_is_the_stock_towers_view_of_the_small_frame(features, frame, stock_model):
    from parity import TOLERANCE, relative_error, run_stock, turn
    from PIL import Image

    small = Image.fromarray(frame.background.permute(1, 2, 0).numpy())
    stock = run_stock(stock_model, turn("?", small), 1)
    assert features.tokens.shape == (1, 6, 64)
    assert relative_error(features.tokens[0], stock.tokens) < TOLERANCE
    assert relative_error(features.deepstack[:, 0], stock.deepstack) < TOLERANCE


def test_a_glimpse_by_fused_kernels_that_fail_is_told_and_made_without(
    qwen, frame, features, monkeypatch, caplog
):
    class Broken:
        def encode(self, pixels):
            raise RuntimeError("no such kernel")

    monkeypatch.setattr("arrcoc.glimpse.joint_tower", lambda _: Broken())
    joint = JointGlimpse(qwen, fused=True)
    for _ in range(2):
        assert torch.equal(joint.encode(frame).tokens, features.tokens)
    assert [r.getMessage() for r in caplog.records] == [
        "glimpses are encoded without fused kernels: no such kernel"
    ]


def test_too_little_memory_for_one_glimpse_leaves_the_fused_kernels_on(
    qwen, frame, features, monkeypatch, caplog
):
    class Tight:
        asked = 0

        def encode(self, pixels):
            self.asked += 1
            if self.asked == 1:
                raise torch.OutOfMemoryError("out of memory")
            return "by fused kernels"

        def describe(self):
            return "CUDA graphs (0 captured)"

    monkeypatch.setattr("arrcoc.glimpse.joint_tower", lambda _: Tight())
    joint = JointGlimpse(qwen, fused=True)
    assert torch.equal(joint.encode(frame).tokens, features.tokens)
    assert joint.encode(frame) == "by fused kernels"
    assert joint.describe() == "fused kernels, CUDA graphs (0 captured)"
    assert JointGlimpse(qwen).describe() == "the stock weights"
    assert [r.getMessage() for r in caplog.records] == [
        "a glimpse is encoded without fused kernels: out of memory"
    ]


def test_fused_kernels_encode_glimpses_where_they_may(qwen, frame, features, monkeypatch):
    class Fused:
        def encode(self, pixels):
            assert torch.equal(pixels[0], frame.background)
            return features

    monkeypatch.setattr("arrcoc.glimpse.joint_tower", lambda _: Fused())
    assert JointGlimpse(qwen, fused=True).encode(frame) is features
    assert JointGlimpse(qwen).encode(frame) is not features


@pytest.mark.gpu
def test_fused_kernels_give_the_glimpse_of_the_stock_weights(tiny_checkpoint, photo):
    qwen = Engine.from_pretrained(tiny_checkpoint, preset="demo", device="cuda", dtype="bfloat16")._qwen
    seen = image.frame(image.decode(photo, 10**8), CONFIG, 32, qwen.device)
    expected, found = JointGlimpse(qwen).encode(seen), JointGlimpse(qwen, fused=True).encode(seen)
    for one, other in zip(
        (expected.tokens, expected.deepstack), (found.tokens, found.deepstack), strict=True
    ):
        assert one.shape == other.shape
        assert float((one - other).float().norm() / one.float().norm()) < 0.03


def test_scores_depend_on_the_question_and_not_on_what_was_asked_before(qwen, frame, features):
    one = scorer(qwen, frame, features)
    first = judge(one, qwen, frame, "What is on her sleeve?")
    second = judge(one, qwen, frame, "Which colour is the rocket?")
    assert first.shape == (2, 3)
    assert ((first > 0) & (first < 1)).all()
    assert not torch.allclose(first, second, atol=1e-3)
    again = judge(scorer(qwen, frame, features), qwen, frame, "Which colour is the rocket?")
    assert torch.equal(second, again)


def test_the_generic_prompt_is_neutral(qwen, frame, features):
    neutral = judge(scorer(qwen, frame, features), qwen, frame, CONFIG.generic_prompt)
    torch.testing.assert_close(neutral, torch.full((2, 3), 0.5))


def test_all_sinks_leave_no_opinion(qwen, frame, features, monkeypatch):
    monkeypatch.setattr(
        "arrcoc.prefix_graph.sinks", lambda norms, _: torch.ones_like(norms, dtype=torch.bool)
    )
    assert torch.equal(judge(scorer(qwen, frame, features), qwen, frame, "Why?"), torch.full((2, 3), 0.5))


def test_a_sink_takes_no_share(qwen, frame, features, monkeypatch):
    monkeypatch.setattr("arrcoc.prefix_graph.sinks", lambda norms, _: torch.arange(len(norms)) == 4)
    found = judge(scorer(qwen, frame, features), qwen, frame, "Why?")
    assert found[1, 1] == 0.5  # nobody looks at tile 4
    assert (found != 0.5).sum() == 5


@pytest.mark.parametrize("prompt", ["What is on her sleeve?", CONFIG.generic_prompt])
def test_the_prefix_equals_a_run_over_image_and_prompt_together(qwen, frame, features, prompt):
    made = scorer(qwen, frame, features)
    head, tail = made._prompt(prompt)
    with torch.inference_mode():
        prefix = made.prepare()
        apart = made._attention(prefix, tail)
        vision = torch.arange(prefix.image.start, prefix.image.stop)
        whole = torch.cat((qwen.embed(head), features.tokens[0], qwen.embed(tail)))[None]
        steps = torch.arange(len(tail)).float() + prefix.next_position
        positions = torch.cat((prefix.positions, steps.expand(3, -1)), dim=1)
        cache, seen = KvCache(qwen.n_layers, 8), []

        def observe(layer, hidden):
            if layer in made._layers:
                norms = hidden[0, prefix.image].norm(dim=-1)
                query = qwen.queries(layer, hidden[:, prefix.length + 1 :], positions[:, prefix.length + 1 :])
                seen.append((layer, query, sinks(norms, CONFIG.sink_ratio)))

        depth = range(prefix.depth)
        planes = features.deepstack[:, 0]
        qwen.run_layers(whole, positions, cache, depth, vision=vision, deepstack=planes, observe=observe)
        together = [attention_shares(q, cache.keys(n)[0, :, prefix.image], out) for n, q, out in seen]
    expected = torch.stack(together).mean(0)
    torch.testing.assert_close(apart, expected, atol=1e-6, rtol=1e-4)
    if prompt == CONFIG.generic_prompt:
        torch.testing.assert_close(prefix.probe.generic, expected, atol=1e-6, rtol=1e-4)


def test_a_question_leaves_the_prefix_as_it_was(qwen, frame, features):
    one = scorer(qwen, frame, features)
    prefix = one.prepare()
    before = prefix.fork(prefix.length, layers=prefix.depth).block(prefix.length).clone()
    judge(one, qwen, frame, "What is on her sleeve?")
    assert one.prefix is prefix
    assert torch.equal(prefix.fork(prefix.length, layers=prefix.depth).block(prefix.length), before)


def test_a_known_prefix_gives_the_same_scores_and_is_not_run_again(qwen, frame, features, monkeypatch):
    first = scorer(qwen, frame, features)
    expected = judge(first, qwen, frame, "What is on her sleeve?")
    where = sequence.glimpse_positions(frame.grid, CONFIG.sides[0], CONFIG.sides[3])
    extent = sequence.extent(frame.grid, 4)
    second = GlimpseScorer(qwen, features, where, extent, frame.grid, CONFIG, first.prefix)
    monkeypatch.setattr("arrcoc.prefix_graph.run_rows", None)
    assert torch.equal(judge(second, qwen, frame, "What is on her sleeve?"), expected)


def test_it_runs_no_deeper_than_the_last_probe(qwen, frame, features):
    config = build(CONFIG.model_dump() | {"probe_depth": (0.25,)})
    made = scorer(qwen, frame, features, config)
    judge(made, qwen, frame, "Why?")
    assert made.prefix.depth == 2
    assert list(made.prefix.probe.excluded) == [1]
    assert made.prefix.layer(1)[0].shape[2] == made.prefix.length
