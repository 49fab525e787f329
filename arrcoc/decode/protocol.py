"""What every decoder offers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from arrcoc.errors import DecodeError
from arrcoc.records import Prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: smallest set of likeliest tokens whose probability reaches this is sampled from, (0, 1].
        top_k: only this many likeliest tokens are sampled from; 0 for all.
        seed: of the sampling generator, 0 to 2**63 - 1; None draws one.

    Raises:
        DecodeError: a field is of the wrong type or outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise `DecodeError` naming the first field that is not usable."""
        rules = (
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number of at least 1"),
            ("temperature", _number(self.temperature) and self.temperature >= 0, "0 (greedy) or positive"),
            ("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", _whole(self.top_k, 0), "0 (all) or a whole number of tokens"),
            ("seed", self.seed is None or _whole(self.seed, 0), "None or a whole number from 0 to 2**63 - 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise DecodeError(f"{name}={getattr(self, name)!r}", allowed, "Correct this argument")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Decoder(Protocol):
    """Turns a prompt into token ids. Keeps no state of a request outside what `prefill` returns."""

    @property
    def backend(self) -> str:
        """Backend and precision, for people."""
        ...

    def prefill(self, prompt: Prompt, prefix: Any = None) -> Any:
        """Run a prompt; a prefix that was computed before and equals the prompt's beginning is reused."""
        ...

    def step(self, state: Any, token: int) -> Tensor:
        """Append one token; fp32 logits [vocabulary] of the next."""
        ...

    def generate(self, state: Any, sampling: Sampling) -> Iterator[int]:
        """Token ids, one by one, until a stop token (not included) or `max_new_tokens`."""
        ...
