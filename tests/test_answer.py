"""Streams of text pieces, without a model: a byte-level vocabulary in which token i is byte i."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrcoc.answer import Answer, AnswerStream, text_pieces


def decode_bytes(ids: list[int]) -> str:
    """Ids from 256 on are control tokens: they have no text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def pieces_of(ids: list[int]) -> list[str]:
    return list(text_pieces(iter(ids), decode_bytes, []))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([72, 105], ["H", "i"]),
        # U+20AC is E2 82 AC: held back until its third byte
        ([0x61, 0xE2, 0x82, 0xAC, 0x62], ["a", "\u20ac", "b"]),
        # a lead byte that nothing completes shows as one replacement character, with what follows it
        ([0xE2, 0x61], ["\ufffda"]),
        # cut short by the end
        ([0x61, 0xE2, 0x82], ["a", "\ufffd"]),
        # the replacement character itself is EF BF BD, and may be the model's own word
        ([0xEF, 0xBF, 0xBD, 0x61], ["\ufffda"]),
        ([0xEF, 0xBF, 0xBD], ["\ufffd"]),
        # control tokens have no text, inside a character neither
        ([256, 72, 257], ["H"]),
        ([0xE2, 256, 0x82, 0xAC], ["\u20ac"]),
    ],
)
def test_pieces_by_hand(ids: list[int], expected: list[str]) -> None:
    assert pieces_of(ids) == expected


@given(st.lists(st.integers(0, 258), max_size=40))
@settings(deadline=None)
def test_pieces_joined_are_the_whole_text(ids: list[int]) -> None:
    seen: list[int] = []
    pieces = list(text_pieces(iter(ids), decode_bytes, seen))
    assert "".join(pieces) == decode_bytes(ids)
    assert all(pieces)
    assert seen == ids


def test_decoding_stays_linear_in_the_length() -> None:
    decoded = []

    def counting(ids: list[int]) -> str:
        decoded.append(len(ids))
        return decode_bytes(ids)

    list(text_pieces(iter([97] * 500), counting, []))
    assert sum(decoded) == 500


def answer(text: str = "Hi") -> Answer:
    return Answer(text, (), {"total": 1.0}, 3, 2, "stop")


def test_answer_appears_after_the_last_piece_and_is_made_once() -> None:
    made: list[int] = []

    def finish() -> Answer:
        made.append(1)
        return answer()

    stream = AnswerStream(iter(["H", "i"]), finish)
    assert [next(stream), next(stream)] == ["H", "i"]
    assert stream.answer is None
    assert list(stream) == []
    assert stream.answer == answer()
    assert list(stream) == []
    assert stream.exhaust() == answer()
    assert made == [1]


def test_a_failed_stream_raises_once_and_has_no_answer() -> None:
    def failing() -> Iterator[str]:
        yield "H"
        raise RuntimeError("out of memory")

    stream = AnswerStream(failing(), answer)
    assert next(stream) == "H"
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    assert list(stream) == []
    assert stream.answer is None


def test_a_dropped_stream_ends_its_generator_at_once() -> None:
    ended: list[int] = []

    def pieces() -> Iterator[str]:
        try:
            yield from "abc"
        finally:
            ended.append(1)

    stream = AnswerStream(pieces(), answer)
    next(stream)
    del stream  # no reference cycle: the tensors behind it go now, not at the next collection
    assert ended == [1]


def test_encoding_of_an_answer_without_images_is_none() -> None:
    assert answer().encoding is None
