"""Fused decoder layers beside transformers' own, in Triton's interpreter; on a GPU in bf16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECK = """
import sys
import torch
from arrcoc import Engine
from arrcoc.kv import KvCache, Room
from arrcoc import text_kernels
from arrcoc.decode import quantize_text
from arrcoc.text_layers import FusedLayers, attend

def compare_attention():
    torch.manual_seed(1)
    for count, past, heads, kv, width in ((5, 0, 4, 2, 16), (37, 33, 6, 2, 32), (33, 64, 4, 4, 16)):
        query, stop = torch.randn(count, heads + 3, width)[:, :heads], past + count
        held = torch.full((2, kv, stop + 9, width), float("nan"))  # what is beyond is never read
        held[:, :, :stop] = torch.randn(2, kv, stop, width)
        keys, values = held[:, None, :, :stop]
        want = attend(query.transpose(0, 1)[None], keys, values, past)[0].transpose(0, 1).flatten(1)
        for blocks in (None, text_kernels.AttentionBlocks(16, 64, 4, 2)):
            have = text_kernels.attend_rows(query, *held, torch.tensor([past], dtype=torch.int32), blocks)
            torch.testing.assert_close(have, want, rtol=2e-5, atol=2e-5)

compare_attention()
qwen = Engine.from_pretrained(sys.argv[1], "demo", "cpu")._qwen
for tensor in qwen.model.model.language_model.parameters():  # gains and weights that matter
    if tensor.ndim == 1:
        tensor.uniform_(0.5, 1.5)
fused = FusedLayers(qwen.text)

class StaticLength:
    # A cache whose length is a tensor, as captured work has it.
    def __init__(self, block, length):
        self.block, self.filled = block, torch.tensor([length], dtype=torch.int32)
    def length(self, layer):
        return -1
    def room(self, layer, count, like):
        return Room(*self.block[layer], self.filled)

def stock(rest, where, start):
    cache = KvCache.holding(before_block.clone(), 13)
    cache.truncate(start)
    return qwen.run_layers(rest, where, cache, range(qwen.n_layers))

torch.manual_seed(0)
whole = torch.randn(1, 13, qwen.width)
positions = torch.rand(3, 13) * 40
vision, planes = torch.tensor([1, 2, 4]), torch.randn(2, 3, qwen.width)
with torch.inference_mode():
    for start in (0, 5, 12):
        outs, seen, kept = [], [], []
        for run in ("stock", "fused"):
            cache, inputs = KvCache(qwen.n_layers, 4), []
            if start:
                qwen.run_layers(whole[:, :start], positions[:, :start], cache, range(qwen.n_layers))
            more = {"vision": vision, "deepstack": planes} if start < 12 else {}
            if start == 5:
                dense = torch.zeros(2, 8, qwen.width)
                dense[:, vision] = planes
                more = {"vision": None, "deepstack": dense}
            more["observe"] = lambda n, h: inputs.append(h.clone())
            rest, where = whole[:, start:], positions[:, start:]
            before = rest.clone()
            if run == "stock":
                outs.append(qwen.run_layers(rest, where, cache, range(qwen.n_layers), **more))
            else:
                outs.append(fused.run(rest, qwen.rotary(where), cache, range(qwen.n_layers), **more))
            assert torch.equal(rest, before), "what was given stays as it is"
            seen.append(torch.stack(inputs))
            kept.append(cache.block(13))
            before_block = cache.block(13) if run == "stock" else before_block
        for one, other in (outs, seen, kept):
            torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-5)
        cache.truncate(start)
        turn, more["last_only"] = qwen.rotary(where), True
        last = fused.run(rest, turn, cache, range(qwen.n_layers), **more)
        torch.testing.assert_close(last, outs[0][:, -1:], rtol=2e-5, atol=2e-5)
        one = fused.run(rest, turn, StaticLength(cache.block(13), start), range(qwen.n_layers))
        torch.testing.assert_close(one, stock(rest, where, start), rtol=2e-5, atol=2e-5)
    quantize_text(qwen, "int8")
    fused = FusedLayers(qwen.text)
    have = fused.run(rest, qwen.rotary(where), StaticLength(cache.block(13), start), range(qwen.n_layers))
    torch.testing.assert_close(have, stock(rest, where, start), rtol=2e-4, atol=2e-4)
print("equal")
"""


def test_they_give_what_the_stock_layers_give(tiny_checkpoint: Path) -> None:
    """fp32 on the CPU, in a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    import os

    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHECK, str(tiny_checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"


def test_joined_weights_are_there_once_and_stay_the_modules_own() -> None:
    from arrcoc.text import joined, matrix

    for inference in (False, True):  # wherever they were made
        with torch.inference_mode(inference):
            modules = [torch.nn.Linear(4, rows, bias=False).requires_grad_(False) for rows in (3, 2, 5)]
        before, x = torch.cat([m.weight.clone() for m in modules]), torch.randn(2, 4)
        whole = joined([matrix(m) for m in modules])
        assert torch.equal(whole, before)
        assert [m.weight.data_ptr() - whole.data_ptr() for m in modules] == [0, 48, 80]
        assert torch.allclose(torch.cat([m(x) for m in modules], 1), x @ before.T, atol=1e-6)
        assert joined([matrix(m) for m in modules]).data_ptr() == whole.data_ptr(), "moved once"


def test_rows_see_the_past_and_earlier_rows() -> None:
    from arrcoc.text_layers import attend

    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    found = attend(query, keys, values, past=2)
    for row in range(3):
        seen = slice(0, 2 + row + 1)
        for head in range(4):
            scores = (query[0, head, row] @ keys[0, head // 2, seen].T / 8**0.5).softmax(0)
            torch.testing.assert_close(found[0, head, row], scores @ values[0, head // 2, seen])


@pytest.mark.gpu
def test_on_a_gpu_they_agree_within_bf16(tiny_checkpoint: Path) -> None:
    from arrcoc import Engine
    from arrcoc.kv import KvCache

    qwen = Engine.from_pretrained(tiny_checkpoint, "demo", "cuda", "bfloat16")._qwen
    assert qwen.fused is not None
    hidden = torch.randn(1, 40, qwen.width, device="cuda", dtype=torch.bfloat16)
    positions, layers = torch.rand(3, 40) * 40, range(qwen.n_layers)
    outs = []
    with torch.inference_mode():
        for fused in (True, False):
            cache = KvCache(qwen.n_layers, 64)
            for part in (slice(0, 25), slice(25, 40)):
                mask = None
                if not fused:
                    mask = torch.ones(40, 40, dtype=torch.bool, device="cuda").tril()[
                        None, None, part, : part.stop
                    ]
                out = qwen.run_layers(hidden[:, part], positions[:, part], cache, layers, mask=mask)
            outs.append(out.float())
    assert float((outs[0] - outs[1]).norm() / outs[1].norm()) < 0.02
