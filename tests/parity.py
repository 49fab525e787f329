"""What arrcoc and the stock Qwen3-VL make of the same pixels and words, and comparisons of the two.

Every comparison raises AssertionError where they differ; `test_parity` wants them to hold, `test_mutations`
wants each to fail on a broken engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from arrcoc import Engine
from arrcoc.kv import KvCache
from arrcoc.records import Prompt

TOLERANCE = 2e-5  # relative error in fp32; a flipped sign or a swapped plane is off by more than 1e-2
NEW_TOKENS = 16


@dataclass(frozen=True)
class Run:
    """One prompt through one of the two: n vision tokens, N tokens in all.

    tokens [n, D], deepstack [L, n, D], positions [3, N], logits [vocabulary] of the first new token.
    """

    tokens: Tensor
    deepstack: Tensor
    positions: Tensor
    logits: Tensor
    text: str


def turn(question: str, *images: Image.Image) -> list[dict[str, Any]]:
    """A chat of one user turn, images first."""
    pictures = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def stock_inputs(model: Any, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Through AutoProcessor and the chat template."""
    processor = AutoProcessor.from_pretrained(model.config._name_or_path)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
    return dict(processor(text=[text], images=images or None, return_tensors="pt"))


def run_stock(model: Any, messages: Sequence[dict[str, Any]], new_tokens: int = NEW_TOKENS) -> Run:
    """Stock forward and greedy generate; what its text model is given is caught on the way in."""
    inputs = stock_inputs(model, messages)
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.update(given), with_kwargs=True
    )
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1]
        hook.remove()
        made = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    places = seen["position_ids"]
    if places is None:  # the stock text model then counts from 0
        places = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    planes = seen.get("deepstack_visual_embeds") or []
    vision = inputs["input_ids"][0] == model.config.image_token_id
    processor = AutoProcessor.from_pretrained(model.config._name_or_path)
    answer = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Run(
        tokens=seen["inputs_embeds"][0][vision],
        deepstack=torch.stack(list(planes)) if len(planes) else torch.zeros(0),
        positions=places[-3:, 0].float(),
        logits=logits.float(),
        text=answer,
    )


def run_arrcoc(engine: Engine, messages: Sequence[dict[str, Any]], new_tokens: int = NEW_TOKENS) -> Run:
    """The engine at full budget, and the prompt that it gives to its decoder."""
    prompt, logits, text = caught(engine, messages, new_tokens)
    return Run(prompt.embeds[0][prompt.vision], prompt.deepstack, prompt.positions.float(), logits, text)


def caught(engine: Engine, messages: Sequence[dict[str, Any]], new_tokens: int) -> tuple[Prompt, Tensor, str]:
    """Prompt and first logits as they pass through the engine's decoder, and the answer."""
    original, seen = engine._decoder.prefill, []

    def prefill(prompt: Prompt, prefix: Any = None) -> Any:
        state = original(prompt, prefix)
        seen.append((prompt, state.logits))
        return state

    with mock.patch.object(engine._decoder, "prefill", prefill):
        answer = engine.chat(messages, budget=1.0, max_new_tokens=new_tokens)
    ((prompt, logits),) = seen
    return prompt, logits, answer.text


def relative_error(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert have.shape == want.shape, (have.shape, want.shape)
    return float((have - want).norm() / want.norm())


def same_tokens(ours: Run, stock: Run) -> None:
    assert relative_error(ours.tokens, stock.tokens) < TOLERANCE


def same_deepstack(ours: Run, stock: Run) -> None:
    assert ours.deepstack.shape == stock.deepstack.shape
    for have, want in zip(ours.deepstack, stock.deepstack, strict=True):
        assert relative_error(have, want) < TOLERANCE


def same_positions(ours: Run, stock: Run) -> None:
    assert torch.equal(ours.positions, stock.positions)


def same_logits(ours: Run, stock: Run) -> None:
    assert relative_error(ours.logits, stock.logits) < TOLERANCE


def same_text(ours: Run, stock: Run) -> None:
    assert stock.text
    assert ours.text == stock.text


def same_attention(engine: Engine, eager: Any, messages: Sequence[dict[str, Any]]) -> None:
    """Attention of the last row over all columns, from `QwenVL.queries` and the cache's keys, per layer."""
    with torch.inference_mode():
        inputs = stock_inputs(eager, messages)
        stock = eager(**inputs, output_attentions=True).attentions
        prompt, _, _ = caught(engine, messages, 1)
        for layer, have in enumerate(_attention(engine._qwen, prompt)):
            assert relative_error(have, stock[layer][0, :, -1]) < TOLERANCE, layer


def _attention(qwen: Any, prompt: Any) -> list[Tensor]:
    cache, inputs = KvCache(qwen.n_layers, capacity=8), []
    qwen.run_layers(
        prompt.embeds,
        prompt.positions,
        cache,
        range(qwen.n_layers),
        vision=prompt.vision.nonzero()[:, 0],
        deepstack=prompt.deepstack,
        observe=lambda _, hidden: inputs.append(hidden),
    )
    found = []
    for layer, hidden in enumerate(inputs):
        query = qwen.queries(layer, hidden[:, -1:], prompt.positions[:, -1:])
        keys = cache.keys(layer)[0]
        keys = keys.repeat_interleave(len(query) // len(keys), dim=0)
        found.append((query @ keys.mT / query.shape[-1] ** 0.5).softmax(-1)[:, 0])
    return found
