"""Messages of a pair to the parts of frames, and frames to messages (pure).

Most are a `peer.shapes.Shape`.  A record travels as one part for each page and one with the digest,
whatever its size, so it alone has no bound on its parts; HELLO has texts of its own.

1. A message comes out whole and validated, or not at all: `Decoder.feed` raises PeerError, after
   which the connection ends.
2. What a message holds is bounded (`peer.shapes`); the pages of a record ascend.
3. What is sent twice is the same bytes.
"""

from __future__ import annotations

import struct
from typing import Final

from bitmapd.partner.messages import (
    Add,
    Ask,
    Free,
    Got,
    Grant,
    Hello,
    HelloFlag,
    Lead,
    Message,
    Ping,
    Ready,
    Record,
    Remove,
    Resize,
    Resized,
    Role,
    Status,
    Take,
    Taken,
)
from bitmapd.partner.payloads import RecordReader, record_payloads
from bitmapd.peer.frames import (
    FIRST_OPTIONAL_KIND,
    ErrorCode,
    Flag,
    Frame,
    Kind,
    Part,
    PeerError,
    pack_text,
)
from bitmapd.peer.payloads import BLOCK_RUN, EXTENT_RUN, read_text, wrong
from bitmapd.peer.shapes import Shape, ShapeReader, encode_shaped, fields, plain
from bitmapd.peer.words import BYE, ERROR, Bye, Error, Pong, pong

MAX_REQUESTS: Final = 1024
_MORE: Final = int(Flag.MORE)
# In the order of the fields of `Hello`.
_HELLO: Final = struct.Struct("<16sBBBBIQQQQQ16s64sQIIQ16sII")
_ROLE, _FLAGS, _GENERATIONS, _TEXTS = 4, 5, 12, 20

_SHAPES: Final[dict[type, Shape[Message]]] = {
    Ready: Shape(Kind.READY, Ready, struct.Struct("<Q")),
    Add: Shape(Kind.ADD, Add, lists=(EXTENT_RUN,) * 3, least_request=1),
    Grant: Shape(
        Kind.GRANT, Grant, lists=(EXTENT_RUN,) * 3 + (BLOCK_RUN,), least_request=0, answers=True
    ),
    Got: Shape(Kind.GOT, Got, struct.Struct("<Q")),
    Remove: Shape(Kind.REMOVE, Remove, lists=(EXTENT_RUN,)),
    Free: Shape(Kind.FREE, Free, lists=(EXTENT_RUN,)),
    Ask: Shape(Kind.ASK, Ask, lists=(BLOCK_RUN,), least_request=1),
    Status: Shape(
        *(Kind.STATUS, Status, struct.Struct("<B"), (EXTENT_RUN,)),
        least_request=1, answers=True, limits=(1,),
    ),
    Ping: Shape(Kind.PING, Ping, struct.Struct("<QIQQBQ"), limits=(-1, -1, -1, -1, 5, -1)),
    Pong: pong(Kind.PONG),
    Take: Shape(Kind.TAKE, lambda force: Take(bool(force)), struct.Struct("<B"), limits=(1,)),
    Taken: Shape(Kind.TAKEN, Taken, struct.Struct("<B"), text=True),
    Resize: Shape(Kind.RESIZE, Resize, struct.Struct("<QB"), limits=(-1, 3)),
    Resized: Shape(Kind.RESIZED, Resized, struct.Struct("<B"), text=True),
    Lead: Shape(Kind.LEAD, Lead, struct.Struct("<Q")),
    Bye: BYE,
    Error: ERROR,
}  # fmt: skip
_BY_KIND: Final = {shape.kind: shape for shape in _SHAPES.values()}


def encode(message: Message) -> list[Part]:
    """The frames that carry it, but for their sequences.  ValueError if its lists take more than
    64 of them (`encode_shaped`)."""
    if isinstance(message, Record):
        payloads = record_payloads(message)
        parts = [Part(Kind.RECORD, _MORE, 0, payload) for payload in payloads]
        parts[-1] = Part(Kind.RECORD, 0, 0, payloads[-1])
        return parts
    if isinstance(message, Hello):
        return [Part(Kind.HELLO, 0, 0, _hello_payload(message))]
    return encode_shaped(_SHAPES[type(message)], message)


def _hello_payload(hello: Hello) -> bytes:
    values = fields(hello)
    values[_GENERATIONS] = b"".join(hello.generations)
    return _HELLO.pack(*values[:_TEXTS]) + b"".join(map(pack_text, values[_TEXTS:]))


def _read_hello(payload: bytes) -> Hello:
    if len(payload) < _HELLO.size:
        raise wrong("a HELLO is cut short")
    values = list(_HELLO.unpack_from(payload))
    values[_GENERATIONS] = tuple(struct.unpack("16s" * 4, values[_GENERATIONS]))
    values[_FLAGS] = HelloFlag(values[_FLAGS])
    if values[_ROLE] not in set(Role):
        raise wrong(f"a HELLO has the unknown role {values[_ROLE]}")
    values[_ROLE] = Role(values[_ROLE])
    at = _HELLO.size
    for _ in range(4):
        text, at = read_text(payload, at)
        values.append(text)
    if at != len(payload):
        raise wrong("bytes are left over in a HELLO")
    hello = Hello(*values)
    if hello.node not in (1, 2):
        raise wrong(f"a HELLO is of node {hello.node}")
    if not 1 <= hello.lowest <= hello.highest:
        raise wrong(f"a HELLO has the versions {hello.lowest} to {hello.highest}")
    if not hello.incarnation:
        raise wrong("a HELLO has no incarnation")
    if not 1 <= hello.most_requests <= MAX_REQUESTS:
        raise wrong(f"a HELLO takes {hello.most_requests} requests at a time")
    return hello


class Decoder(ShapeReader[Message]):
    """Frames of one direction in, messages out (`ShapeReader`)."""

    def __init__(self, extents: int = 0, blocks: int = 0) -> None:
        super().__init__(extents, blocks)
        self._record = RecordReader(0)

    def feed(self, frame: Frame) -> Message | None:
        """The message that this frame completes; None in the midst of one, and for a kind that may
        be skipped.  Raises PeerError: HEADER, TOO_LONG, BROKEN, KIND, RUNS, ANSWER."""
        self.follows(frame)
        shape = _BY_KIND.get(frame.kind)
        if shape is not None:
            return self.read(shape, frame)
        if frame.kind == Kind.RECORD:
            return self._page(frame)
        if frame.kind == Kind.HELLO:
            plain(frame, 0)
            return _read_hello(frame.payload)
        if frame.kind < FIRST_OPTIONAL_KIND:
            raise PeerError(ErrorCode.KIND, f"a frame is of the unknown kind {frame.kind}")
        return None

    def _page(self, frame: Frame) -> Record | None:
        plain(frame, _MORE)
        if self.holds(frame if frame.flags else None):
            self._record = RecordReader(self.extents)
        if frame.flags:
            self._record.page(frame.payload)
            return None
        return self._record.end(frame.payload)
