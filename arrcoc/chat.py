"""Questions and chat messages: checked, and taken apart into text and images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_utils import extract_vision_info

from arrcoc.errors import QueryError

Message = dict[str, Any]

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")
_IMAGE_KEYS = {"image", "image_url"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, ready for the chat template.

    Attributes:
        messages: with every image replaced by a bare placeholder.
        images: what stood there, in order: anything `arrcoc.image.decode` takes.
        question: text of the last user turn; what relevance is judged by.
        texts: every piece of text in the chat.
    """

    messages: list[Message]
    images: list[Any]
    question: str
    texts: list[str]


def single(image: Any, question: str) -> Conversation:
    """One image and one question as a chat of one turn."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return Conversation([{"role": "user", "content": content}], [image], question, [question])


def parse(messages: Sequence[Message]) -> Conversation:
    """Take apart messages in Qwen's chat format.

    Size hints beside an image (min_pixels, resized_height, ...) have no effect, since the budget decides,
    and are named in a warning in the log.

    Raises:
        QueryError: not a list of messages, unknown roles or content, video, or no user turn at the end.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _bad(f"{type(messages).__name__} as messages", "a non-empty list of messages")
    plain = [_normalise(message) for message in messages]
    if plain[-1]["role"] != "user":
        raise _bad(f"a chat that ends with the {plain[-1]['role']}", "a chat whose last turn is the user's")
    images = [_source(element) for element in extract_vision_info(plain)]
    texts = [e["text"] for message in plain for e in message["content"] if e["type"] == "text"]
    question = "\n".join(e["text"] for e in plain[-1]["content"] if e["type"] == "text")
    bare = [{"role": m["role"], "content": [_bare(e) for e in m["content"]]} for m in plain]
    return Conversation(bare, images, question, texts)


def check_question(question: object, max_chars: int) -> str:
    """Return the question if it is text of a sensible length.

    Raises:
        QueryError: not a string, blank, longer than `max_chars` characters, or with half a surrogate pair.
    """
    if not isinstance(question, str):
        raise _bad(f"a question of type {type(question).__name__}", "a string")
    if not question.strip():
        raise _bad("an empty question", f"1 to {max_chars:,} characters")
    if len(question) > max_chars:
        remedy = "Shorten it, or raise max_question_chars"
        given = f"a question of {len(question):,} characters"
        raise QueryError(given, f"1 to {max_chars:,} characters", remedy)
    check_unicode(question)
    return question


def check_unicode(text: str) -> None:
    """Raise `QueryError` for text that holds half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise _bad(f"text with the lone surrogate {half!r} at {error.start}", "valid Unicode") from None


def _normalise(message: object) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES or "content" not in message:
        raise _bad(f"the message {_short(message)}", f"a dict with content and a role of {', '.join(_ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise _bad(f"content of type {type(content).__name__}", "a string or a non-empty list of elements")
    return {"role": message["role"], "content": [_element(e, message["role"]) for e in content]}


def _element(element: object, role: str) -> Message:
    keys = set(element) if isinstance(element, dict) else set()
    kind = element.get("type") if isinstance(element, dict) else None
    image_keys = keys & _IMAGE_KEYS
    if isinstance(element, dict) and isinstance(element.get("text"), str) and kind in {None, "text"}:
        if not image_keys and "video" not in keys:
            return {"type": "text", "text": element["text"]}
    elif isinstance(element, dict) and len(image_keys) == 1 and kind in {None, *_IMAGE_KEYS}:
        if role != "user":
            raise _bad(f"an image in a {role} message", "images in user messages")
        if not keys & {"text", "video"}:
            return _image(element, image_keys.pop())
    kinds = "{'type': 'text', 'text': ...} or {'type': 'image', 'image': ...}; video is not supported"
    raise _bad(f"the element {_short(element)}", kinds)


def _image(element: Message, key: str) -> Message:
    """An image element as `extract_vision_info` finds it, without hints."""
    ignored = sorted(str(name) for name in element if name not in {"type", key})
    if ignored:
        logger.warning("%s beside an image: no effect, the budget decides on its tokens", ", ".join(ignored))
    return {"type": "image", "image": element[key]}


def _source(element: Message) -> Any:
    value = element["image"]
    return value.get("url") if isinstance(value, dict) else value


def _bare(element: Message) -> Message:
    return element if element["type"] == "text" else {"type": "image"}


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _bad(given: str, allowed: str) -> QueryError:
    return QueryError(given, allowed, "Correct the question or message")
