"""Run by `test_decode_graphed` with TRITON_INTERPRET=1: one step through the kernels against the layers."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from arrcoc import sequence
from arrcoc.decode import GraphedDecoder, TransformersDecoder, prefilling, quantize_text
from arrcoc.decode.blocking import Blocking, Blocks
from arrcoc.decode.launch import KernelStep
from arrcoc.decode.slots import Slot
from arrcoc.kv import KvCache
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt
from arrcoc.text_layers import FusedLayers

# The last product's loop over bytes is not written out.
EVEN = Blocking(*[Blocks(64, 64, 4)] * 3, Blocks(64, 32, 4), Blocks(64, 64, 4), Blocks(16, 8, 4))
UNEVEN = Blocking(*[Blocks(128, 256, 4)] * 5, Blocks(32, 2, 4))


def make_qwen() -> QwenVL:
    """Two layers of width 192, 6 heads over 2 (three share one), 515 tokens, weights of scale 1."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"vocab_size": 515, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 192}
    config = Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    torch.manual_seed(0)
    model: Any = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)
        elif "norm" in name:
            weight.uniform_(0.5, 1.5)
    qwen = QwenVL(model, SimpleNamespace(eos_token_id=None), ((0.5,) * 3, (0.5,) * 3))
    vars(qwen)["stop_ids"] = frozenset()
    return qwen


def check(qwen: QwenVL, blocking: Blocking, lengths: tuple[int, ...]) -> None:
    """Logits, keys and values of two steps, and the token that the kernels chose."""
    eager, decoder = TransformersDecoder(qwen), GraphedDecoder(qwen, step=KernelStep(qwen.text, blocking))
    for length in lengths:
        torch.manual_seed(length)
        ids = torch.randint(0, 515, (length,))
        prompt = sequence.prompt([qwen.embed_tensor(ids)], [], [])
        one, other = eager.prefill(prompt), decoder.prefill(prompt)
        for token in (3, 514):
            want, have = eager.step(one, token), decoder.step(other, token)
            torch.testing.assert_close(have, want, atol=2e-4, rtol=2e-4)
            assert int(other.slot.token) == int(want.argmax())
        held = other.slot.kv[1, 0, :, : length + 2]
        torch.testing.assert_close(held, one.cache.keys(1)[0], atol=2e-4, rtol=2e-4)
        assert not other.slot.arrived.any()


def check_prefill(qwen: QwenVL) -> None:
    """A padded prefill by the fused layers, after a former prompt, and on top of earlier positions."""
    eager, slot = TransformersDecoder(qwen), Slot(qwen.text, 1024)
    for length, seed in ((100, 1), (40, 2)):
        torch.manual_seed(seed)
        plain = sequence.prompt([qwen.embed_tensor(torch.randint(0, 515, (length,)))], [], [])
        vision = torch.arange(length) % 3 == 0
        prompt = replace(plain, vision=vision, deepstack=torch.randn(1, int(vision.sum()), qwen.width))
        want = eager.prefill(prompt)
        vars(qwen)["fused"] = FusedLayers(qwen.text)
        with torch.inference_mode():
            prefilling.run(qwen, KvCache.holding(slot.kv, 0), first_columns(prompt, 30), 0, None)
            have = prefilling._run_static(qwen, slot, prompt, 30, 128)
        vars(qwen)["fused"] = None
        torch.testing.assert_close(have, want.logits, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(slot.kv[1, 0, :, :length], want.cache.keys(1)[0], atol=2e-4, rtol=2e-4)


def first_columns(prompt: Prompt, count: int) -> Prompt:
    """The beginning of a prompt."""
    planes = prompt.deepstack[:, : int(prompt.vision[:count].sum())]
    vision, positions = prompt.vision[:count], prompt.positions[:, :count]
    return Prompt(prompt.embeds[:, :count], positions, vision, planes, float(count))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    check(make_qwen(), UNEVEN, (1, 70))
    check_prefill(make_qwen())
    for weights, blocking in (("int8", EVEN), ("float8", UNEVEN)):
        if importlib.util.find_spec("torchao"):
            quantized = make_qwen()
            quantize_text(quantized, weights)  # type: ignore[arg-type]
            check(quantized, blocking, (20,))
