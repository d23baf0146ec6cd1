"""Messages to the parts of frames, and frames to messages (pure).

A message is one frame, or several if its lists of runs do not fit into one: all but the last carry
MORE, follow one another directly, and are one message when the last is there.  A record travels as
one part for each page and one with the digest, whatever its size.

1. A message comes out whole and validated, or not at all: `Decoder.feed` raises PeerError, after
   which the connection ends.
2. What a message holds is bounded: lists ascend inside the volume, and all but a record have at
   most 64 parts.  Each part of several carries a run, so that they come to an end.
3. What is sent twice is the same bytes: lists are in one form, and parts are filled in order.

The layouts are a table: request number, fixed fields, lists, text, in this order, as in the value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bitmapd.partner.messages import (
    Add,
    Ask,
    Bye,
    Error,
    Free,
    Goodbye,
    Got,
    Grant,
    Hello,
    HelloFlag,
    Message,
    Ping,
    Pong,
    Ready,
    Record,
    Remove,
    Resize,
    Resized,
    Role,
    Run,
    Runs,
    Status,
    Take,
    Taken,
)
from bitmapd.partner.payloads import (
    BLOCK_RUN,
    COUNT,
    EXTENT_RUN,
    RecordReader,
    fitting,
    pack_runs,
    read_runs,
    read_text,
    record_payloads,
    wrong,
)
from bitmapd.peer.frames import (
    FIRST_OPTIONAL_KIND,
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    Flag,
    Frame,
    Kind,
    Part,
    PeerError,
    pack_text,
)

MAX_PARTS: Final = 64
MAX_REQUESTS: Final = 1024
_MORE: Final = int(Flag.MORE)
_LAST: Final = int(Flag.LAST)
_NOTHING: Final = struct.Struct("<")
# In the order of the fields of `Hello`.
_HELLO: Final = struct.Struct("<16sBBBBIQQQQQ16s64sQIIQ16sII")
_ROLE, _FLAGS, _GENERATIONS, _TEXTS = 4, 5, 12, 20


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of one kind.  `least_request`: None if it has no request number, which is 0 then."""

    kind: Kind
    make: Callable[..., Message]
    head: struct.Struct = _NOTHING
    lists: tuple[struct.Struct, ...] = ()
    text: bool = False
    least_request: int | None = None
    answers: bool = False  # there may be several, and the last one says so
    limits: tuple[int, ...] = ()  # of the fixed fields, where a byte could say more


_SHAPES: Final[dict[type, _Shape]] = {
    Ready: _Shape(Kind.READY, Ready, struct.Struct("<Q")),
    Add: _Shape(Kind.ADD, Add, lists=(EXTENT_RUN,) * 3, least_request=1),
    Grant: _Shape(
        Kind.GRANT, Grant, lists=(EXTENT_RUN,) * 3 + (BLOCK_RUN,), least_request=0, answers=True
    ),
    Got: _Shape(Kind.GOT, Got, struct.Struct("<Q")),
    Remove: _Shape(Kind.REMOVE, Remove, lists=(EXTENT_RUN,)),
    Free: _Shape(Kind.FREE, Free, lists=(EXTENT_RUN,)),
    Ask: _Shape(Kind.ASK, Ask, lists=(BLOCK_RUN,), least_request=1),
    Status: _Shape(
        *(Kind.STATUS, Status, struct.Struct("<B"), (EXTENT_RUN,)),
        least_request=1, answers=True, limits=(1,),
    ),
    Ping: _Shape(Kind.PING, Ping, struct.Struct("<QIQQBQ"), limits=(-1, -1, -1, -1, 2, -1)),
    Pong: _Shape(Kind.PONG, Pong, struct.Struct("<Q")),
    Take: _Shape(Kind.TAKE, lambda force: Take(bool(force)), struct.Struct("<B"), limits=(1,)),
    Taken: _Shape(Kind.TAKEN, Taken, struct.Struct("<B"), text=True),
    Resize: _Shape(Kind.RESIZE, Resize, struct.Struct("<QB"), limits=(-1, 3)),
    Resized: _Shape(Kind.RESIZED, Resized, struct.Struct("<B"), text=True),
    Bye: _Shape(
        Kind.BYE, lambda reason: Bye(Goodbye(reason)), struct.Struct("<B"), limits=(1,)
    ),
    Error: _Shape(Kind.ERROR, Error, struct.Struct("<H"), text=True),
}  # fmt: skip
_BY_KIND: Final = {int(shape.kind): shape for shape in _SHAPES.values()}


def encode(message: Message) -> list[Part]:
    """The frames that carry it, but for their sequences.  ValueError if its lists take more than
    64 of them (some 5 million runs of blocks): who has more sends several messages."""
    if isinstance(message, Record):
        payloads = record_payloads(message)
        parts = [Part(Kind.RECORD, _MORE, 0, payload) for payload in payloads]
        parts[-1] = Part(Kind.RECORD, 0, 0, payloads[-1])
        return parts
    if isinstance(message, Hello):
        return [Part(Kind.HELLO, 0, 0, _hello_payload(message))]
    shape = _SHAPES[type(message)]
    values = _fields(message)
    request = 0 if shape.least_request is None else values.pop(0)
    flags = _LAST if shape.answers and values.pop() else 0
    text = pack_text(values.pop()) if shape.text else b""
    at = len(values) - len(shape.lists)
    head = shape.head.pack(*values[:at])
    lists = [fitting(runs, layout) for runs, layout in zip(values[at:], shape.lists, strict=True)]
    size = len(head) + sum(
        COUNT.size + layout.size * len(runs)
        for runs, layout in zip(lists, shape.lists, strict=True)
    )
    if size <= MAX_PAYLOAD_BYTES:
        packed = [pack_runs(runs, layout) for runs, layout in zip(lists, shape.lists, strict=True)]
        return [Part(shape.kind, flags, request, b"".join((head, *packed, text)))]
    payloads = _split(head, lists, shape.lists)
    if len(payloads) > MAX_PARTS:
        raise ValueError(f"{type(message).__name__} takes {len(payloads)} frames")
    parts = [Part(shape.kind, _MORE, request, payload) for payload in payloads]
    parts[-1] = Part(shape.kind, flags, request, payloads[-1])
    return parts


def _split(head: bytes, lists: list[Runs], layouts: tuple[struct.Struct, ...]) -> list[bytes]:
    """Payloads that are filled with one list after the other."""
    payloads = []
    starts = [0] * len(lists)
    while any(start < len(runs) for start, runs in zip(starts, lists, strict=True)):
        room = MAX_PAYLOAD_BYTES - len(head) - COUNT.size * len(lists)
        packed = [head]
        for number, (runs, layout) in enumerate(zip(lists, layouts, strict=True)):
            start = starts[number]
            stop = min(len(runs), start + room // layout.size)
            packed.append(pack_runs(runs[start:stop], layout))
            room -= layout.size * (stop - start)
            starts[number] = stop
        payloads.append(b"".join(packed))
    return payloads


def _fields(message: Message) -> list[Any]:
    return [getattr(message, name) for name in message.__dataclass_fields__]


def _hello_payload(hello: Hello) -> bytes:
    values = _fields(hello)
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


class Decoder:
    """Frames of one direction in, messages out.  `extents` and `blocks` are those of the volume;
    with 0, as before the greeting, there is no run that would fit."""

    def __init__(self, extents: int = 0, blocks: int = 0) -> None:
        self.extents = extents
        self.blocks = blocks
        self._first: Frame | None = None  # of several parts
        self._parts = 0
        self._head: tuple[int, ...] = ()
        self._lists: list[list[Run]] = []
        self._record = RecordReader(0)

    def feed(self, frame: Frame) -> Message | None:
        """The message that this frame completes; None in the midst of one, and for a kind that may
        be skipped.  Raises PeerError: HEADER, TOO_LONG, BROKEN, KIND, RUNS, ANSWER."""
        first = self._first
        if first is not None and (frame.kind, frame.request) != (first.kind, first.request):
            raise PeerError(
                ErrorCode.BROKEN,
                f"kind {frame.kind} came where another part of kind {first.kind} had to",
            )
        shape = _BY_KIND.get(frame.kind)
        if shape is not None:
            return self._message(shape, frame)
        if frame.kind == Kind.RECORD:
            return self._page(frame)
        if frame.kind == Kind.HELLO:
            _plain(frame, 0)
            return _read_hello(frame.payload)
        if frame.kind < FIRST_OPTIONAL_KIND:
            raise PeerError(ErrorCode.KIND, f"a frame is of the unknown kind {frame.kind}")
        return None

    def _page(self, frame: Frame) -> Record | None:
        _plain(frame, _MORE)
        if self._first is None:
            self._record = RecordReader(self.extents)
        if frame.flags:
            self._first = frame
            self._record.page(frame.payload)
            return None
        self._first = None
        return self._record.end(frame.payload)

    def _message(self, shape: _Shape, frame: Frame) -> Message | None:
        flags, payload = frame.flags, frame.payload
        if flags & _LAST and (flags & _MORE or not shape.answers):
            raise PeerError(ErrorCode.HEADER, f"kind {frame.kind} cannot have LAST here")
        if flags & _MORE and not shape.lists:
            raise PeerError(ErrorCode.HEADER, f"kind {frame.kind} is never in parts")
        least = shape.least_request
        if frame.request if least is None else frame.request < least:
            raise PeerError(ErrorCode.ANSWER, f"kind {frame.kind} has the request {frame.request}")
        if self._first is None:
            self._lists = [[] for _ in shape.lists]
            self._parts = 0
        at = self._read_head(shape, payload)
        before = at
        for layout, found in zip(shape.lists, self._lists, strict=True):
            at = read_runs(
                payload, at, layout, self.extents if layout is EXTENT_RUN else self.blocks, found
            )
        texts: tuple[str, ...] = ()
        if shape.text:
            text, at = read_text(payload, at)
            texts = (text,)
        if at != len(payload):
            raise wrong(f"{len(payload) - at} bytes are left over in kind {frame.kind}")
        if flags & _MORE:
            self._hold(frame, empty=at - before == COUNT.size * len(shape.lists))
            return None
        self._first = None
        lists, self._lists = self._lists, []
        return shape.make(
            *(() if least is None else (frame.request,)),
            *self._head,
            *map(tuple, lists),
            *texts,
            *((bool(flags),) if shape.answers else ()),
        )

    def _read_head(self, shape: _Shape, payload: bytes) -> int:
        """The fixed fields, which all parts repeat; returns where they end."""
        size = shape.head.size
        if len(payload) < size:
            raise wrong(f"kind {shape.kind} is cut short")
        head: tuple[Any, ...] = shape.head.unpack_from(payload)
        for value, limit in zip(head, shape.limits, strict=False):
            if 0 <= limit < value:
                raise wrong(f"kind {shape.kind} has {value} where {limit} is the most")
        if self._first is not None and head != self._head:
            raise wrong(f"the parts of kind {shape.kind} differ in more than their lists")
        self._head = head
        return size

    def _hold(self, frame: Frame, empty: bool) -> None:
        self._parts += 1
        if empty:
            raise wrong(f"a part of kind {frame.kind} is empty and not the last")
        if self._parts >= MAX_PARTS:
            raise PeerError(
                ErrorCode.TOO_LONG, f"kind {frame.kind} has more than {MAX_PARTS} parts"
            )
        self._first = frame


def _plain(frame: Frame, flags: int) -> None:
    if frame.flags & ~flags:
        raise PeerError(ErrorCode.HEADER, f"kind {frame.kind} has the flags {frame.flags}")
    if frame.request:
        raise PeerError(ErrorCode.ANSWER, f"kind {frame.kind} has the request {frame.request}")
