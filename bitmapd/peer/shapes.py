"""Messages to the parts of frames, and frames to messages, by a table (pure).

The layout of most messages is a `Shape`: request number, fixed fields, lists, text, in this order,
as in the value.  One that does not fit into a frame is several: all but the last carry MORE, follow
one another directly, and are one message when the last is there.

1. A message comes out whole and validated, or not at all: `ShapeReader` raises PeerError, after
   which the connection ends.
2. What a message holds is bounded: lists ascend inside the volume, and it has at most 64 parts.
   Each part of several carries a run, so that they come to an end.
3. What is sent twice is the same bytes: lists are in one form, and parts are filled in order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from bitmapd.peer.frames import (
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    Flag,
    Frame,
    Part,
    PeerError,
    pack_text,
)
from bitmapd.peer.payloads import (
    COUNT,
    EXTENT_RUN,
    Run,
    Runs,
    fitting,
    pack_runs,
    read_runs,
    read_text,
    wrong,
)

MAX_PARTS: Final = 64
_MORE: Final = int(Flag.MORE)
_LAST: Final = int(Flag.LAST)
_NOTHING: Final = struct.Struct("<")

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Shape(Generic[M_co]):
    """Of one kind.  `least_request`: None if it has no request number, which is 0 then."""

    kind: int
    make: Callable[..., M_co]
    head: struct.Struct = _NOTHING
    lists: tuple[struct.Struct, ...] = ()
    text: bool = False
    least_request: int | None = None
    answers: bool = False  # there may be several, and the last one says so
    limits: tuple[int, ...] = ()  # of the fixed fields, where a byte could say more


def encode_shaped(shape: Shape[M], message: M) -> list[Part]:
    """The frames that carry it, but for their sequences.  ValueError if its lists take more than
    64 of them (some 5 million runs of blocks): who has more sends several messages."""
    values = fields(message)
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


def fields(message: object) -> list[Any]:
    """The values of a dataclass, in the order of its fields."""
    names: dict[str, Any] = message.__dataclass_fields__  # type: ignore[attr-defined]
    return [getattr(message, name) for name in names]


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


class ShapeReader(Generic[M]):
    """Frames of one direction in, messages with a shape out.  `extents` and `blocks` are those of
    the volume; with 0, as before the greeting, there is no run that would fit."""

    def __init__(self, extents: int = 0, blocks: int = 0) -> None:
        self.extents = extents
        self.blocks = blocks
        self._first: Frame | None = None  # of several parts
        self._parts = 0
        self._head: tuple[int, ...] = ()
        self._lists: list[list[Run]] = []

    def follows(self, frame: Frame) -> None:
        """Raises PeerError BROKEN if another part had to come instead."""
        first = self._first
        if first is not None and (frame.kind, frame.request) != (first.kind, first.request):
            raise PeerError(
                ErrorCode.BROKEN,
                f"kind {frame.kind} came where another part of kind {first.kind} had to",
            )

    def holds(self, frame: Frame | None) -> bool:
        """Note whether another part of this one follows; returns whether it is the first."""
        was_first = self._first is None
        self._first = frame
        return was_first

    def read(self, shape: Shape[M], frame: Frame) -> M | None:
        """The message that this frame completes; None in the midst of one.  Raises PeerError:
        HEADER, TOO_LONG, RUNS, ANSWER."""
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

    def _read_head(self, shape: Shape[M], payload: bytes) -> int:
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


def plain(frame: Frame, flags: int) -> None:
    """Raises PeerError if it has other flags than these, or a request number."""
    if frame.flags & ~flags:
        raise PeerError(ErrorCode.HEADER, f"kind {frame.kind} has the flags {frame.flags}")
    if frame.request:
        raise PeerError(ErrorCode.ANSWER, f"kind {frame.kind} has the request {frame.request}")
