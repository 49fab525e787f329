"""Which decoder serves an engine."""

from __future__ import annotations

import logging
import subprocess

import torch

from arrcoc import triton_support
from arrcoc.config import Config
from arrcoc.decode.graphed_decoder import GraphedDecoder, Step
from arrcoc.decode.launch import KernelStep
from arrcoc.decode.layers_step import LayersStep
from arrcoc.decode.protocol import Decoder
from arrcoc.decode.speculative import Draft, PromptLookup, SpeculativeDecoder
from arrcoc.decode.transformers_decoder import TransformersDecoder
from arrcoc.errors import ConfigError, first_line
from arrcoc.qwen import QwenVL, load
from arrcoc.records import Prompt

logger = logging.getLogger(__name__)

_MOST_OFF = 0.1
"""Relative difference of logits beyond which a decoder is broken: rounding to bfloat16 makes about 0.01."""


def make_decoder(qwen: QwenVL, config: Config) -> Decoder:
    """The decoder that a configuration asks for.

    Raises:
        ConfigError: speculative decoding by the eager decoder, or a draft of another vocabulary.
        ModelError: the draft cannot be loaded.
    """
    chunk = config.prefill_chunk
    eager = TransformersDecoder(qwen, chunk)
    if config.speculative != "none":
        if config.decoder == "eager":
            given = f"speculative={config.speculative!r} with decoder='eager'"
            raise ConfigError(given, "decoder='auto' or 'graphed'", "Choose one of them")
        proposer = PromptLookup() if config.speculative == "prompt_lookup" else _draft(qwen, config)
        return SpeculativeDecoder(
            qwen, proposer, config.decode_bytes, config.max_new_tokens, chunk, steps(qwen)[0]
        )
    if config.decoder == "eager" or (config.decoder == "auto" and qwen.device.type != "cuda"):
        return eager
    for step in steps(qwen):
        made = GraphedDecoder(qwen, config.decode_bytes, config.max_new_tokens, chunk, step=step)
        if qwen.device.type != "cuda" or not (reason := trouble(made, eager, qwen)):
            return made
        logger.warning("%s do not decode here, something slower does: %s", step.name, reason)
        eager.backend = f"{eager.backend} ({step.name}: {reason})"
    return eager


def steps(qwen: QwenVL) -> list[Step]:
    """Ways to compute a step, the fastest first: Triton's kernels on CUDA, transformers' layers."""
    layers: list[Step] = [LayersStep(qwen)]
    if qwen.device.type != "cuda" or not KernelStep.supports(qwen.text):
        return layers
    if reason := triton_support.why_not():
        logger.warning("A decode step runs transformers' layers in a CUDA graph: %s", reason)
        return layers
    return [KernelStep(qwen.text), *layers]


def trouble(decoder: GraphedDecoder, eager: TransformersDecoder, qwen: QwenVL) -> str | None:
    """What is wrong with a decoder on this machine; None if its first step agrees with the eager one.

    Triton may be there without the compiler that it needs, or a driver without what a capture needs. The
    first step also compiles and loads what every later one uses.
    """
    embeds = qwen.embed(range(8))[None]
    positions = torch.arange(8, device=qwen.device).float().expand(3, -1)
    vision, planes = torch.zeros(8, dtype=torch.bool, device=qwen.device), embeds.new_zeros(0, 0, qwen.width)
    prompt = Prompt(embeds, positions, vision, planes, 8.0)
    want = eager.step(eager.prefill(prompt), 1)
    try:
        have = decoder.step(decoder.prefill(prompt), 1)
    except (RuntimeError, ImportError, OSError, AttributeError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    off = float((have - want).norm() / want.norm())
    return None if off < _MOST_OFF else f"logits are off by {off:.2g}"


def _draft(qwen: QwenVL, config: Config) -> Draft:
    draft = load(config.speculative, qwen.device, qwen.dtype)
    if draft.text.head.rows != qwen.text.head.rows:
        given = f"a draft with {draft.text.head.rows:,} tokens in its vocabulary"
        raise ConfigError(given, f"{qwen.text.head.rows:,}, the model's own", "Choose a draft of its family")
    return Draft(draft)
