"""From a conversation and its encoded images to the prompt that the decoder runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arrcoc import sequence
from arrcoc.encoding import Encoding
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt


@torch.inference_mode()
def build(
    qwen: QwenVL, messages: Sequence[dict[str, Any]], encodings: Sequence[Encoding]
) -> tuple[Prompt, tuple[int, ...]]:
    """Render a conversation with its images' vision tokens in place.

    Args:
        qwen: the checkpoint.
        messages: with a bare placeholder for every image.
        encodings: one for each placeholder, in order, on the checkpoint's device.

    Returns:
        The prompt, and the token ids that stand before its first image.
    """
    runs = qwen.render(messages)
    assert len(runs) == len(encodings) + 1, f"{len(runs) - 1} placeholders for {len(encodings)} images"
    text = [qwen.embed(run) for run in runs]
    images = [encoding.sequence for encoding in encodings]
    captions = [_captions(qwen, encoding) for encoding in encodings]
    prompt = sequence.prompt(text, images, captions)
    return replace(prompt, text_ids=tuple(token for run in runs for token in run)), tuple(runs[0])


def _captions(qwen: QwenVL, encoding: Encoding) -> list[Tensor]:
    """What stands between an image's segments: the end of one, the caption and the start of the next."""
    between = [qwen.tokenize(f"\n{segment.caption}") for segment in encoding.segments[1:]]
    end, start = qwen.special.vision_end, qwen.special.vision_start
    return [qwen.embed([end, *ids, start]) for ids in between]
