"""Every parity check fails on an engine broken on purpose: otherwise it would prove nothing."""

from __future__ import annotations

import parity
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from arrcoc import Engine, sequence
from arrcoc.lod import tower
from arrcoc.qwen import QwenVL

rotate, axial_rotary, merge_order = tower.rotate, tower.axial_rotary, tower.merge_order
trunk, tile_positions = tower.StaticTower.trunk, sequence.tile_positions
run_layers, rotary, queries = QwenVL.run_layers, QwenVL.rotary, QwenVL.queries


def swapped_planes(self, *given):
    hidden, planes = trunk(self, *given)
    return hidden, planes[[1, 0, *range(2, len(planes))]]


def dropped_plane(self, *given):
    hidden, planes = trunk(self, *given)
    return hidden, torch.cat((planes[:-1], torch.zeros_like(planes[-1:])))


def shifted(axis):
    step = torch.tensor([0.5 * (axis == 0), 0.5 * (axis == 1)])[:, None, None]
    return lambda *given: tile_positions(*given) + step


def planes_a_layer_late(self, *given, deepstack=None, **more):
    late = None if deepstack is None else deepstack.roll(1, 0)
    return run_layers(self, *given, deepstack=late, **more)


def no_plane(self, *given, deepstack=None, **more):
    return run_layers(self, *given, deepstack=None, **more)


VISION = ("tokens", "deepstack", "logits")
MUTATIONS = {
    "vision RoPE sign": (
        (tower, "rotate", lambda v, cos, sin: rotate(v, cos, -sin)),
        VISION,
    ),
    "vision cos and sin exchanged": ((tower, "rotate", lambda v, cos, sin: rotate(v, sin, cos)), VISION),
    "rows and columns exchanged": (
        (tower, "axial_rotary", lambda rows, cols, dim: axial_rotary(cols, rows, dim)),
        VISION,
    ),
    "merge order transposed": (
        (tower, "merge_order", lambda grid, merge: merge_order(grid.transpose(0, 1), merge)),
        VISION,
    ),
    "DeepStack planes swapped": (
        (tower.StaticTower, "trunk", swapped_planes),
        ("deepstack", "logits"),
    ),
    "DeepStack plane dropped": ((tower.StaticTower, "trunk", dropped_plane), ("deepstack", "logits")),
    "DeepStack planes at other layers": ((QwenVL, "run_layers", planes_a_layer_late), ("logits",)),
    "DeepStack left out of the decoder": ((QwenVL, "run_layers", no_plane), ("logits",)),
    "half a token down": ((sequence, "tile_positions", shifted(0)), ("positions", "logits")),
    "half a token right": ((sequence, "tile_positions", shifted(1)), ("positions", "logits")),
    "text RoPE sign": (
        (QwenVL, "rotary", lambda self, p: rotary(self, -p)),
        ("logits",),
    ),
    "text RoPE h and w exchanged": (
        (QwenVL, "rotary", lambda self, p: rotary(self, p[[0, 2, 1]])),
        ("logits",),
    ),
    "text after the image starts too late": (
        (sequence, "extent", lambda grid, high: float(max(grid.rows, grid.cols) * high + 1)),
        ("positions", "logits"),
    ),
}


@pytest.fixture(scope="module")
def messages(photo):
    return parity.turn("What is this?", photo.crop((100, 0, 228, 128)))


@pytest.fixture(scope="module")
def stock_run(stock_model, messages):
    return parity.run_stock(stock_model, messages)


def engine_of(folder) -> Engine:
    return Engine.from_pretrained(folder, preset="demo", device="cpu", halo=0)


def test_the_comparisons_hold_without_a_mutation(tiny_checkpoint, messages, stock_run):
    ours = parity.run_arrcoc(engine_of(tiny_checkpoint), messages)
    for name in ("tokens", "deepstack", "positions", "logits", "text"):
        getattr(parity, f"same_{name}")(ours, stock_run)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(name, tiny_checkpoint, messages, stock_run, monkeypatch):
    (owner, attribute, broken), seen_by = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, broken)
    ours = parity.run_arrcoc(engine_of(tiny_checkpoint), messages)
    for comparison in seen_by:
        with pytest.raises(AssertionError):
            getattr(parity, f"same_{comparison}")(ours, stock_run)


def unrotated(self, layer, hidden, positions):
    return queries(self, layer, hidden, torch.zeros_like(positions))


def turned_back(self, layer, hidden, positions):
    return queries(self, layer, hidden, -positions)


@pytest.mark.parametrize("broken", [turned_back, unrotated])
def test_a_mutation_of_the_probes_queries_is_seen(broken, tiny_checkpoint, messages, monkeypatch):
    eager = Qwen3VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    engine = engine_of(tiny_checkpoint)
    parity.same_attention(engine, eager, messages)
    monkeypatch.setattr(QwenVL, "queries", broken)
    with pytest.raises(AssertionError):
        parity.same_attention(engine, eager, messages)
