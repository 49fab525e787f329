"""What `Engine.ask`, `Engine.chat` and `Engine.stream` give back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from arrcoc.encoding import Encoding

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how it came about.

    Attributes:
        text: the answer.
        encodings: one per image of the prompt, in order.
        timings: milliseconds per stage over the whole request, `total` included.
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

    The pieces joined are exactly `answer.text`. A stream may be dropped at any point: what it holds is
    freed with it. Where generation fails, the error is raised once and `answer` stays None.
    """

    def __init__(self, pieces: Iterator[str], finish: Callable[[], Answer]) -> None:
        """Args: the pieces; what makes the answer once they have ended."""
        self._pieces = pieces
        self._finish: Callable[[], Answer] | None = finish
        self.answer: Answer | None = None

    def __next__(self) -> str:
        """The next piece; StopIteration once the answer is whole."""
        try:
            return next(self._pieces)
        except StopIteration:
            # The closure goes with its last use, and the request's tensors with it.
            finish, self._finish = self._finish, None
            if finish is not None:
                self.answer = finish()
            raise
        except BaseException:
            self._finish = None
            raise

    def exhaust(self) -> Answer:
        """Let the generation run to its end and return the whole answer."""
        for _ in self:
            pass
        assert self.answer is not None, "the stream failed before"
        return self.answer


def text_pieces(
    tokens: Iterable[int], detokenize: Callable[[list[int]], str], seen: list[int]
) -> Iterator[str]:
    """Text as it becomes final, token by token; every token is also appended to `seen`.

    A piece is held back while its text ends in a replacement character: a character of several bytes may
    still be completed by the next token. Where it does not, all bytes so far are whole characters, so the
    text after them does not depend on them and only tokens not yet given out are decoded.

    Args:
        tokens: ids as they are generated.
        detokenize: text of ids by a byte-level vocabulary, incomplete characters as replacement characters.
        seen: receives every token.

    Yields:
        Pieces that are not empty; joined they are `detokenize(seen)`.
    """
    held: list[int] = []
    for token in tokens:
        seen.append(token)
        held.append(token)
        text = detokenize(held)
        if text.endswith(_INCOMPLETE):
            continue
        held.clear()
        if text:
            yield text
    rest = detokenize(held) if held else ""
    if rest:
        yield rest
