"""What `Engine.ask`, `Engine.chat` and `Engine.stream` give back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from arrcoc.encoding import Encoding


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how it came about.

    Attributes:
        text: the answer.
        encodings: one per image of the prompt, in order.
        timings: milliseconds per stage, `total` included.
        prompt_tokens: text and vision tokens of the prompt.
        new_tokens: tokens generated.
        finish: `stop` where the model ended its answer, `length` where `max_new_tokens` did.
    """

    text: str
    encodings: tuple[Encoding, ...]
    timings: dict[str, float]
    prompt_tokens: int
    new_tokens: int
    finish: Literal["stop", "length"]

    @property
    def encoding(self) -> Encoding | None:
        """Encoding of the only or last image; None for a chat without images."""
        return self.encodings[-1] if self.encodings else None


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are generated; `answer` holds the whole once they are exhausted.

    The pieces joined are exactly `answer.text`.
    """

    def __init__(self, pieces: Iterator[str], finish: Callable[[], Answer]) -> None:
        """Args: the pieces; what makes the answer once they have ended."""
        self._pieces, self._finish = pieces, finish
        self.answer: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            if self.answer is None:
                self.answer = self._finish()
            raise


def text_pieces(tokens: Iterator[int], detokenize: Callable[[list[int]], str], seen: list[int]) -> Iterator[str]:
    """Text as it becomes final, token by token; every token is also appended to `seen`.

    A piece is held back while it ends in a replacement character: a character of several bytes may still
    be completed by the next token.
    """
    done = ""
    for token in tokens:
        seen.append(token)
        text = detokenize(seen)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(done):
            continue
        yield text[len(done) :]
        done = text
    rest = detokenize(seen)[len(done) :]
    if rest:
        yield rest
