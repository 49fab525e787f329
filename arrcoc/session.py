"""Several questions about one image: what they have in common is computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from arrcoc.answer import Answer, AnswerStream
from arrcoc.chat import Conversation, Message, single
from arrcoc.encoding import Encoding
from arrcoc.errors import QueryError
from arrcoc.timing import StageTimer
from arrcoc.viewer import Budget, View


class Turn(NamedTuple):
    """A question of a conversation, and its answer."""

    question: str
    answer: str


class Calls(NamedTuple):
    """What a session asks of its engine.

    Attributes:
        check: returns a usable question, or raises `QueryError`.
        encode: (conversation, budget) to an encoding.
        stream: (conversation, budget, most new tokens, temperature, further sampling) to an answer.
    """

    check: Callable[[str], str]
    encode: Callable[[Conversation, Budget], Encoding]
    stream: Callable[[Conversation, Budget, int | None, float, dict[str, Any]], AnswerStream]


class Session:
    """An image held open for questions; make one with `Engine.open`, and close it by `with` or `close`.

    The frame, its texture, the query-free relevance maps, the whole image at low detail and its keys and
    values through the decoder are computed at opening. A question then pays for its text, for tiles that
    are not in the tile cache, and for what stands after the overview in the prompt. Answers and encodings
    are those of `Engine.ask` on the same image.

    Questions are independent of one another, or, in a conversation, turns of it: earlier questions and
    answers stay in the prompt, and the image, in the first turn, is laid out anew for each question within
    the budget. So turn n is `Engine.chat` on all turns so far, and the vision tokens do not pile up. A turn
    is added when its answer is complete; a stream that is dropped before adds none.

    Threads may share a session.
    """

    def __init__(
        self, view: View, budget: Budget, calls: Calls, timer: StageTimer, *, conversation: bool
    ) -> None:
        """Hold an opened image.

        Args:
            view: the opened image.
            budget: of questions that name none.
            calls: what the session asks of its engine.
            timer: timed the opening.
            conversation: whether questions are turns of one conversation.
        """
        self._view: View | None = view
        self._timer, self._budget, self._calls, self._conversation = timer, budget, calls, conversation
        self._turns: list[Turn] = []
        self._lock = threading.Lock()

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds per stage that opening took, `total` included."""
        return self._timer.milliseconds()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Completed turns of a conversation, first to last; none where questions are independent."""
        with self._lock:
            return tuple(self._turns)

    @property
    def closed(self) -> bool:
        """Whether the session takes no more questions."""
        return self._view is None

    def ask(
        self,
        question: str,
        budget: Budget = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> Answer:
        """Answer a question about the image; arguments as for `Engine.ask`.

        Raises:
            QueryError: the question is not usable, or the session is closed.
            BudgetError, DecodeError: an argument is not usable.
        """
        return self.stream(question, budget, max_new_tokens, temperature, **sampling).exhaust()

    def stream(
        self,
        question: str,
        budget: Budget = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> AnswerStream:
        """`ask`, piece by piece, as `Engine.stream`."""
        conversation = self._ask(question)
        budget = self._budget if budget is None else budget
        answering = self._calls.stream(conversation, budget, max_new_tokens, temperature, sampling)
        return self._remembered(question, answering) if self._conversation else answering

    def encode(self, question: str, budget: Budget = None) -> Encoding:
        """The encoding that `ask` would answer from; in a conversation it adds no turn."""
        return self._calls.encode(self._ask(question), self._budget if budget is None else budget)

    def forget(self) -> None:
        """Begin the conversation anew."""
        with self._lock:
            self._turns.clear()

    def close(self) -> None:
        """Let go of the image; answers under way go on. The engine keeps its prefix while there is room."""
        with self._lock:
            self._view = None

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _ask(self, question: str) -> Conversation:
        """The prompt's text and image so far, ended by this question."""
        question = self._calls.check(question)
        with self._lock:
            if self._view is None:
                raise QueryError(
                    "a question to a closed session", "an open session", "Open the image again by engine.open"
                )
            return _conversation(self._view, self._turns, question)

    def _remembered(self, question: str, answering: AnswerStream) -> AnswerStream:
        """The same stream; its answer becomes a turn once it is complete."""

        def finish() -> Answer:
            assert answering.answer is not None, "the stream has ended"
            with self._lock:
                self._turns.append(Turn(question, answering.answer.text))
            return answering.answer

        return AnswerStream(answering, finish)


def _conversation(view: View, turns: list[Turn], question: str) -> Conversation:
    """Messages of all turns; the image begins the first."""
    if not turns:
        return single(view, question)
    first, *_ = single(view, turns[0].question).messages
    messages: list[Message] = [first]
    for turn, following in zip(turns, [*(t.question for t in turns[1:]), question], strict=True):
        messages += [_message("assistant", turn.answer), _message("user", following)]
    texts = [text for turn in turns for text in turn]
    return Conversation(messages, [view], question, [*texts, question])


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}
