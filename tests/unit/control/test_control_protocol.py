"""The messages of the control socket: shapes, limits, and bytes from a hostile peer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.control.protocol import (
    MAX_LINE_BYTES,
    Event,
    Failure,
    LineBuffer,
    Request,
    Result,
    decode_answer,
    decode_request,
    encode_error,
    encode_event,
    encode_request,
    encode_result,
)
from bitmapd.errors import BitmapdError, BusyError, UsageError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)  # fmt: skip
json_objects = st.dictionaries(st.text(max_size=8), json_values, max_size=4)


def line_of(data: bytes) -> bytes:
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    return data[:-1]


@given(st.text(max_size=30), json_objects)
def test_a_request_arrives_as_it_was_sent(verb: str, args: dict[str, Any]) -> None:
    assert decode_request(line_of(encode_request(verb, args))) == Request(verb, args)


def test_args_may_be_left_out() -> None:
    assert decode_request(b'{"verb": "ping"}') == Request("ping", {})


@given(json_objects, json_values)
def test_answers_arrive_as_they_were_sent(fields: dict[str, Any], value: Any) -> None:
    assert decode_answer(line_of(encode_event(fields))) == Event(fields)
    assert decode_answer(line_of(encode_result(value))) == Result(value)


@given(st.text(max_size=50), st.none() | st.text(max_size=50))
def test_an_error_keeps_class_message_and_hint(message: str, hint: str | None) -> None:
    answer = decode_answer(line_of(encode_error(BusyError(message, hint))))
    assert isinstance(answer, Failure)
    assert type(answer.error) is BusyError
    assert (answer.error.message, answer.error.hint) == (message, hint)


def test_an_unknown_error_code_becomes_the_base_class() -> None:
    answer = decode_answer(b'{"error": {"code": "from-the-future", "message": "m"}}')
    assert isinstance(answer, Failure)
    assert type(answer.error) is BitmapdError


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"{",
        b'{"verb": 1}',
        b'{"args": {}}',
        b'{"verb": "x", "args": []}',
        b'{"verb": "x", "more": 1}',
        b'{"verb": "x", "args": {"a": NaN}}',
        b'{"verb": "x", "args": {"a": ' + b"[" * 60_000 + b"}}",
        b'{"verb": "x", "args": {"a": ' + b"9" * 60_000 + b"}}",
        b'{"verb": "' + b"x" * MAX_LINE_BYTES + b'"}',
    ],
)
def test_malformed_requests_are_usage_errors(line: bytes) -> None:
    with pytest.raises(UsageError):
        decode_request(line)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"event": 1},
        {"error": "text"},
        {"error": {"code": "busy"}},
        {"error": {"message": "m", "hint": 3}},
        {"result": 1, "event": {}},
        {"surprise": {}},
    ],
)
def test_malformed_answers_are_usage_errors(message: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        decode_answer(json.dumps(message).encode())


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_usage_errors(garbage: bytes) -> None:
    for decode in (decode_request, decode_answer):
        try:
            decode(garbage)
        except UsageError:
            continue


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(BitmapdError, match="longer than"):
        encode_result("x" * MAX_LINE_BYTES)
    longest = encode_result("x" * (MAX_LINE_BYTES - len(encode_result(""))))
    assert len(longest) == MAX_LINE_BYTES
    assert LineBuffer().feed(longest) == [longest[:-1]]


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=6), st.data())
def test_lines_do_not_depend_on_the_pieces_they_come_in(
    lines: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    buffer, got, start = LineBuffer(), [], 0
    while start < len(stream):
        stop = data.draw(st.integers(start + 1, len(stream)))
        got += buffer.feed(stream[start:stop])
        start = stop
    assert got == lines


@pytest.mark.parametrize("data", [b"x" * MAX_LINE_BYTES, b"x" * MAX_LINE_BYTES + b"\n{}\n"])
def test_an_endless_line_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="longer than"):
        LineBuffer().feed(data)
