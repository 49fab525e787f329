"""Questions and chat messages, taken apart without a model."""

import logging
from typing import Any

import pytest

from arrcoc import chat
from arrcoc.errors import QueryError


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def picture(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def test_images_in_order_texts_in_order_and_the_last_user_turn_is_the_question() -> None:
    found = chat.parse(
        [
            {"role": "system", "content": "Be brief."},
            user(picture("a.png"), text("First?"), {"type": "image_url", "image_url": {"url": "b.png"}}),
            {"role": "assistant", "content": [text("Yes.")]},
            user({"image": "c.png"}, {"text": "And"}, text("now?")),
        ]
    )
    assert found.images == ["a.png", "b.png", "c.png"]
    assert found.texts == ["Be brief.", "First?", "Yes.", "And", "now?"]
    assert found.question == "And\nnow?"
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "user"]
    assert found.messages[1]["content"] == [{"type": "image"}, text("First?"), {"type": "image"}]


def test_a_string_is_one_text_element_and_messages_stay_as_they_were() -> None:
    given = [{"role": "user", "content": "Who?"}]
    assert chat.parse(given).messages == [user(text("Who?"))]
    assert given == [{"role": "user", "content": "Who?"}]


def test_single_equals_the_chat_of_one_turn() -> None:
    assert chat.single("a.png", "Who?") == chat.parse([user(picture("a.png"), text("Who?"))])


def test_size_hints_are_ignored_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "arrcoc"):
        found = chat.parse([user(picture("a.png") | {"min_pixels": 4, "resized_height": 2}, text("Who?"))])
    assert found.images == ["a.png"]
    assert "min_pixels, resized_height" in caplog.text


QUESTION = user(text("Who?"))


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "NoneType"),
        ([], "list as messages"),
        ("Who?", "str as messages"),
        ({"role": "user", "content": "Who?"}, "dict as messages"),
        ((message for message in [QUESTION]), "generator as messages"),
        ([[QUESTION]], "the message"),
        (["Who?"], "the message 'Who?'"),
        ([{"content": "Who?"}], "the message"),
        ([{"role": "user"}], "the message"),
        ([{"role": "tool", "content": "Who?"}], "role"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": []}], "content of type list"),
        ([{"role": "user", "content": (text("Who?"),)}], "content of type tuple"),
        ([user("Who?")], "the element 'Who?'"),
        ([user({"type": "text"})], "the element"),
        ([user({"type": "text", "text": 5})], "the element"),
        ([user({"type": "image"})], "the element"),
        ([user({"type": "video", "video": "a.mp4"})], "video"),
        ([user({"video": "a.mp4"})], "video"),
        ([user({"type": "video", "image": "a.png"})], "video"),
        ([user(picture("a.png") | {"video": "a.mp4"})], "video"),
        ([user({"image": "a.png", "image_url": "b.png"})], "the element"),
        ([user(text("Who?") | {"image": "a.png"})], "the element"),
        ([user(text("Who?") | {"video": "a.mp4"})], "the element"),
        ([user(picture("a.png") | {"text": "Who?"})], "the element"),
        ([user({"type": "audio", "audio": "a.wav"})], "the element"),
        ([{"role": "system", "content": [picture("a.png")]}, QUESTION], "an image in a system message"),
        ([QUESTION, {"role": "assistant", "content": [picture("a.png")]}, QUESTION], "assistant message"),
        ([QUESTION, {"role": "assistant", "content": "Me."}], "ends with the assistant"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, named: str) -> None:
    with pytest.raises(QueryError) as caught:
        chat.parse(messages)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("question", "named"),
    [
        (None, "NoneType"),
        (7, "int"),
        (b"Who?", "bytes"),
        (["Who?"], "list"),
        ("", "empty"),
        (" \t\n\u2003", "empty"),
        ("x" * 11, "11 characters"),
        ("a\ud800", "lone surrogate '\\ud800' at 1"),
    ],
)
def test_questions_that_are_refused(question: object, named: str) -> None:
    with pytest.raises(QueryError) as caught:
        chat.check_question(question, max_chars=10)
    assert named in str(caught.value)


def test_a_question_as_long_as_allowed_is_returned_as_it_is() -> None:
    assert chat.check_question("x" * 8 + " ?", max_chars=10) == "x" * 8 + " ?"
