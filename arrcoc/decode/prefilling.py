"""Running a prompt into a slot."""

from __future__ import annotations

from torch import Tensor

from arrcoc.decode.graphs import run_captured
from arrcoc.decode.layers_step import run_static
from arrcoc.decode.slots import Slot
from arrcoc.errors import DecodeError
from arrcoc.kv import KvCache
from arrcoc.prefixes import Prefix
from arrcoc.qwen import QwenVL
from arrcoc.records import Prompt
from arrcoc.text import TextWeights

_LAUNCH_SECONDS = 0.45e-3  # of the host, for one fused layer
_PRODUCT_RATE = 550e12  # operations a second of a layer's matrix products at a few hundred rows


def check_length(qwen: QwenVL, prompt: Prompt) -> None:
    """Raise `DecodeError` for a prompt longer than the checkpoint's context."""
    length = prompt.embeds.shape[1]
    if length > qwen.max_positions:
        raise DecodeError(
            f"a prompt of {length:,} tokens",
            f"at most {qwen.max_positions:,}, the checkpoint's context",
            "Lower the budget or shorten the text",
        )


def dense_planes(prompt: Prompt) -> Tensor:
    """DeepStack planes [L, N, D] over all positions, 0 where text stands.

    Computed without knowing on the host where vision tokens stand, so nothing waits for the device.
    """
    planes = prompt.deepstack
    if planes.shape[1] == 0:
        return planes.new_zeros(0, *prompt.embeds.shape[1:])
    row = (prompt.vision.cumsum(0) - 1).clamp_min_(0)
    return planes[:, row].mul_(prompt.vision[:, None])


def fill(
    qwen: QwenVL, slot: Slot, prompt: Prompt, prefix: Prefix | None, chunk: int | None, most_static: int
) -> Tensor:
    """Run a prompt through all layers into an empty slot; fp32 logits [vocabulary] of the next token.

    Args:
        qwen: the checkpoint.
        slot: its capacity exceeds the prompt's length.
        prompt: embeddings, positions and DeepStack planes.
        prefix: the prompt's first columns, computed before.
        chunk: most positions of one pass; None for all.
        most_static: up to so many new positions run from a captured graph, padded to a static shape, from
            the second time on that a slot meets the shape: capturing takes longer than running once.
    """
    length, done = prompt.embeds.shape[1], 0
    assert length <= slot.capacity, f"{length} positions for {slot.capacity}"
    if prefix is not None:
        prefix.complete(qwen)
        prefix.load_into(slot.kv)
        done = prefix.length
    assert done < length, "a prompt ends after its prefix"
    size = static_size(length - done, most_static)
    if size is not None and done + size <= slot.capacity and slot.met_before(size):
        return _run_static(qwen, slot, prompt, done, size)
    return run(qwen, KvCache.holding(slot.kv, done), prompt, done, chunk)


def run(qwen: QwenVL, cache: KvCache, prompt: Prompt, done: int, chunk: int | None) -> Tensor:
    """Run a prompt's columns from `done` on over a cache of those before; logits of the next token."""
    length = prompt.embeds.shape[1]
    planes = dense_planes(prompt)
    size = length - done if chunk is None else chunk
    for start in range(done, length, size):
        part = slice(start, min(start + size, length))
        hidden = qwen.run_layers(
            prompt.embeds[:, part],
            prompt.positions[:, part],
            cache,
            range(qwen.n_layers),
            deepstack=planes[:, part],
            last_only=True,
        )
    return qwen.logits(hidden)[0, 0]


def static_size(count: int, most: int) -> int | None:
    """The padded size of a pass over `count` positions: the next multiple of 64, above 512 of 128.

    None above `most`.
    """
    step = 64 if count <= 512 else 128
    size = -(-count // step) * step
    return size if size <= most else None


def most_captured(weights: TextWeights) -> int:
    """Positions up to which a prefill takes longer to launch than to compute, a multiple of 64, at most 2048.

    An estimate by `_LAUNCH_SECONDS` and `_PRODUCT_RATE`; where it is off, prompts only take the other way.
    """
    parameters = sum(m.rows * m.columns for m in weights.layers[0].matrices)
    return min(2048, int(_LAUNCH_SECONDS * _PRODUCT_RATE / (2 * parameters)) // 64 * 64)


def _run_static(qwen: QwenVL, slot: Slot, prompt: Prompt, done: int, size: int) -> Tensor:
    count = prompt.embeds.shape[1] - done
    planes = dense_planes(prompt)[:, done:]
    given = slot.inputs(size, len(qwen.vision.deepstack))
    # Rows beyond `count` are what a former prompt left: no row before them attends to them, and the
    # positions that they fill in the cache are overwritten before anything sees them.
    given.embeds[:, :count] = prompt.embeds[:, done:]
    given.positions[:, :count] = prompt.positions[:, done:]
    if planes.shape[0]:
        given.planes[:, :count] = planes
    else:
        given.planes.zero_()
    given.last.fill_(count - 1)
    slot.length.fill_(done)

    def work() -> None:
        hidden = run_static(qwen, slot, given.embeds, given.positions, given.planes)
        slot.logits.copy_(qwen.logits(hidden.index_select(1, given.last))[0, 0])

    run_captured(slot, f"prefill {size}", work)
    return slot.logits.clone()
