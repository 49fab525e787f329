"""Choosing the next token on the device, in operations that can be captured."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from arrcoc.decode.protocol import Sampling
from arrcoc.decode.slots import Slot

Mode = Literal["greedy", "sampled", "filtered"]


def mode_of(sampling: Sampling) -> Mode:
    """Greedy; sampled from all tokens; or sampled after top-k and top-p, which needs them sorted."""
    if sampling.temperature == 0:
        return "greedy"
    return "filtered" if sampling.top_k or sampling.top_p < 1 else "sampled"


def prepare(slot: Slot, sampling: Sampling) -> None:
    """Write a request's sampling into its slot."""
    slot.temperature.fill_(sampling.temperature)
    slot.top_p.fill_(sampling.top_p)
    slot.top_k.fill_(sampling.top_k or slot.logits.numel())
    if sampling.seed is not None:
        slot.generator.manual_seed(sampling.seed)
    elif sampling.temperature > 0:
        slot.generator.seed()


def choose(slot: Slot, mode: Mode) -> Tensor:
    """The next token, int64 [1], from `slot.logits`.

    Sampling is an exponential race (the Gumbel-max trick): with independent exponential noise e, the largest
    of log p - log e is token i with probability p_i. Top-p keeps a token if those likelier than it have not
    yet reached top_p, so the likeliest always stays.
    """
    if mode == "greedy":
        return slot.logits.argmax(keepdim=True)
    scaled = slot.logits / slot.temperature
    noise = torch.empty_like(scaled).exponential_(generator=slot.generator).log_()
    if mode == "sampled":
        return (scaled - noise).argmax(keepdim=True)
    ordered, order = scaled.sort(descending=True)
    rank = torch.arange(len(ordered), device=ordered.device)
    ordered = ordered.masked_fill(rank >= slot.top_k, float("-inf"))
    probability = ordered.softmax(-1)
    ordered = ordered.masked_fill(probability.cumsum(-1) - probability >= slot.top_p, float("-inf"))
    return order.gather(0, (ordered - noise).argmax(keepdim=True))


def advance(slot: Slot, chosen: Tensor) -> None:
    """Write down a token that was chosen after a step, and move the slot's scalars one step on."""
    record(slot, chosen)
    slot.length += 1
    slot.position += 1


def record(slot: Slot, chosen: Tensor) -> None:
    """Write down a token, int64 [1], as the newest."""
    slot.token.copy_(chosen)
    slot.history.index_copy_(0, slot.step, chosen)
    slot.step += 1
