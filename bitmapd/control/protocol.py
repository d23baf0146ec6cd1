"""The messages of the control socket (pure).

One JSON object a line, UTF-8, at most `MAX_LINE_BYTES` with the newline.  A client sends requests
`{"verb": …, "args": {…}}`, one at a time.  The answer to each is any number of `{"event": {…}}`
lines and then exactly one `{"result": …}` or `{"error": {code, exit_status, message, hint}}`.

1. What comes from the other side is untrusted: a line that is too long, is not JSON, or has not
   exactly the shape above raises `UsageError` and nothing else.  The connection is of no use
   afterwards, because the place where the next message begins is not known for certain.
2. Messages that are too long are refused by the sender, so that a receiver that keeps to the limit
   never sees one.  Handlers bound the lists in their results.
3. `LineBuffer` holds less than two lines, whatever is fed to it in whatever pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitmapd.errors import BitmapdError, UsageError, error_from_json

MAX_LINE_BYTES = 64 << 10

Json = Any  # what json.loads gives; checked where it is used


@dataclass(frozen=True, slots=True)
class Request:
    verb: str
    args: dict[str, Json]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened before the answer was complete: progress, or a line of the log."""

    fields: dict[str, Json]


@dataclass(frozen=True, slots=True)
class Result:
    value: Json


@dataclass(frozen=True, slots=True)
class Failure:
    error: BitmapdError


Answer = Event | Result | Failure


def _encode(message: Mapping[str, Json]) -> bytes:
    line = json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise BitmapdError(
            f"a control message of {len(line)} bytes is longer than {MAX_LINE_BYTES}"
        )
    return line


def _refuse_constant(text: str) -> Json:
    raise ValueError(f"{text} is not JSON")


def _decode(line: bytes) -> dict[str, Json]:
    if len(line) > MAX_LINE_BYTES:
        raise UsageError(f"a control message is longer than {MAX_LINE_BYTES} bytes")
    try:
        message = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"a control message is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise UsageError("a control message is not a JSON object")
    return message


def encode_request(verb: str, args: Mapping[str, Json]) -> bytes:
    return _encode({"verb": verb, "args": dict(args)})


def decode_request(line: bytes) -> Request:
    message = _decode(line)
    verb, args = message.get("verb"), message.get("args", {})
    if message.keys() - {"verb", "args"} or not isinstance(verb, str) or not isinstance(args, dict):
        raise UsageError('a control request is not of the form {"verb": "…", "args": {…}}')
    return Request(verb, args)


def encode_event(fields: Mapping[str, Json]) -> bytes:
    return _encode({"event": dict(fields)})


def encode_result(value: Json) -> bytes:
    return _encode({"result": value})


def encode_error(error: BitmapdError) -> bytes:
    return _encode({"error": error.to_json()})


def decode_answer(line: bytes) -> Answer:
    message = _decode(line)
    if len(message) == 1:
        if "result" in message:
            return Result(message["result"])
        body = next(iter(message.values()))
        if isinstance(body, dict) and "event" in message:
            return Event(body)
        if isinstance(body, dict) and "error" in message:
            return Failure(_error(body))
    raise UsageError("a control answer is neither an event nor a result nor an error")


def _error(body: dict[str, Json]) -> BitmapdError:
    if not isinstance(body.get("message"), str) or not isinstance(body.get("hint"), str | None):
        raise UsageError("the error in a control answer has no message")
    return error_from_json(body)


class LineBuffer:
    """Cuts a byte stream into lines; see the module docstring for the bound."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are now complete, without their newlines."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) >= MAX_LINE_BYTES or any(
            len(line) >= MAX_LINE_BYTES for line in lines
        ):
            raise UsageError(f"a control message is longer than {MAX_LINE_BYTES} bytes")
        return lines
