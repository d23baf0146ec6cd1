"""Replies of an untrusted NBD server (pure: bytes in, finished requests out).

The owner of the socket receives into `buffer()` and reports how much came with `received(count)`.
Headers and small payloads go through a staging area; what is left of a read's data is received
straight into the caller's buffer.  Requests that are answered appear in `finished`, in the order
in which their last reply came.

1. Whatever bytes arrive, in whatever pieces, `received` returns or raises `ProtocolError`, after
   which the parser must not be used any more; what finished earlier stands.
2. A reply is believed only if its handle is that of a request that is in flight and was sent as a
   whole (`sent_bytes`), its kind fits the command, and its offsets lie inside the request.
3. A read succeeds only when every byte of it was delivered exactly once.
4. Nothing outside the buffer of the request that is answered is ever written.
5. Memory: the staging area, plus at most one payload of MAX_PAYLOAD_BYTES, plus the pieces of
   each read, of which there may be one per 512 bytes.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from dataclasses import dataclass, field

from bitmapd.media.base import ALLOC_HOLE, ALLOC_ZERO, Done
from bitmapd.nbd.client.handshake import printable
from bitmapd.nbd.numbers import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Errno,
    ReplyFlag,
)
from bitmapd.nbd.wire import (
    BLOCK_DESCRIPTOR,
    CONTEXT_ID,
    ERROR_CHUNK,
    ERROR_OFFSET_CHUNK_TAIL,
    OFFSET_DATA,
    OFFSET_HOLE,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
    ProtocolError,
)

STAGING_BYTES = 16 << 10
MAX_PAYLOAD_BYTES = 8 << 20
MAX_DESCRIPTORS = 1 << 16  # of one block status; what a server says beyond them is left out
SMALLEST_PIECE_BYTES = 512

# Plain integers: enum attributes would be a good part of a reply's cost.
_READ, _BLOCK_STATUS = int(Cmd.READ), int(Cmd.BLOCK_STATUS)
_DONE, _NONE, _DATA = int(ReplyFlag.DONE), int(Chunk.NONE), int(Chunk.OFFSET_DATA)
_HOLE, _STATUS = int(Chunk.OFFSET_HOLE), int(Chunk.BLOCK_STATUS)
_ERROR_OFFSET, _ERROR_BIT = int(Chunk.ERROR_OFFSET), 1 << 15
_SIMPLE_BYTES, _STRUCTURED_BYTES = SIMPLE_REPLY.size, STRUCTURED_REPLY.size
_KNOWN_ERRORS = frozenset(int(number) for number in Errno)


@dataclass(slots=True)
class InFlight:
    """A request in flight; `buffer` is where a read's data go."""

    handle: int
    command: int
    offset_bytes: int
    length_bytes: int
    done: Done
    buffer: memoryview | None = None
    sent_at_bytes: int = 0  # of the connection's output, after this request
    submitted_s: float = 0.0
    error: tuple[int, str] | None = None
    covered_bytes: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    descriptors: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Sink:
    """The rest of a payload that is received without staging; `payload` is the whole of it, where
    it is not the data of a read."""

    rest: memoryview
    request: InFlight
    last: bool
    kind: int
    payload: bytearray | None = None


class ReplyParser:
    """See the module docstring.  The owner adds requests to `requests` by their handle and keeps
    `sent_bytes`, the length of all output that the kernel has taken."""

    def __init__(self, structured: bool, allocation_id: int | None = None) -> None:
        self.requests: dict[int, InFlight] = {}
        self.finished: deque[InFlight] = deque()
        self.sent_bytes = 0
        self.data_bytes = 0  # of reads, received so far
        self._structured = structured
        self._allocation_id = allocation_id
        self._staging = bytearray(STAGING_BYTES)
        self._view = memoryview(self._staging)
        self._end = 0
        self._sink: _Sink | None = None

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        return self._view[self._end :] if self._sink is None else self._sink.rest

    def received(self, count: int) -> None:
        """`count` bytes were put at the start of `buffer()`."""
        sink = self._sink
        if sink is None:
            self._end += count
            self._parse()
            return
        sink.rest = sink.rest[count:]
        if sink.payload is None:
            self.data_bytes += count
        if sink.rest:
            return
        self._sink = None
        if sink.payload is not None:
            self._chunk(sink.request, sink.kind, bytes(sink.payload), sink.last)
        elif sink.last:
            self._finish(sink.request)

    def _parse(self) -> None:
        at, end = 0, self._end
        while self._sink is None:
            consumed = self._reply(at, end - at)
            if consumed == 0:
                break
            at += consumed
        if at:
            self._staging[: end - at] = self._staging[at:end]
            self._end = end - at

    def _reply(self, at: int, available: int) -> int:
        """Take one reply from the staging area; returns its length there, 0 if more is needed."""
        if available < _SIMPLE_BYTES:
            return 0
        magic, number, handle = SIMPLE_REPLY.unpack_from(self._staging, at)
        if magic == SIMPLE_REPLY_MAGIC:
            return self._simple(at + _SIMPLE_BYTES, available - _SIMPLE_BYTES, number, handle)
        if magic != STRUCTURED_REPLY_MAGIC or not self._structured:
            raise ProtocolError(f"reply magic {magic:#x} is wrong")
        if available < _STRUCTURED_BYTES:
            return 0
        length: int
        _, flags, kind, handle, length = STRUCTURED_REPLY.unpack_from(self._staging, at)
        request = self._find(handle)
        last = bool(flags & _DONE)
        _check_chunk(request, kind, length, last)
        at += _STRUCTURED_BYTES
        available -= _STRUCTURED_BYTES
        if kind == _DATA:
            if available < OFFSET_DATA.size:
                return 0
            (offset,) = OFFSET_DATA.unpack_from(self._staging, at)
            target = _cover(request, offset, length - OFFSET_DATA.size)
            head = OFFSET_DATA.size
            taken = self._fill(at + head, available - head, target, request, last)
            return _STRUCTURED_BYTES + head + taken
        if length <= available:
            self._chunk(request, kind, bytes(self._view[at : at + length]), last)
            return _STRUCTURED_BYTES + length
        if _STRUCTURED_BYTES + length <= STAGING_BYTES:
            return 0
        payload = bytearray(length)
        payload[:available] = self._view[at : at + available]
        rest = memoryview(payload)[available:]
        self._sink = _Sink(rest, request, last, kind, payload)
        return _STRUCTURED_BYTES + available

    def _simple(self, at: int, available: int, number: int, handle: int) -> int:
        request = self._find(handle)
        if request.command == _READ and self._structured:
            raise ProtocolError("a read was answered with a simple reply")
        if number:
            request.error = (_known(number), "")
        elif request.command == _BLOCK_STATUS:
            raise ProtocolError("block status was answered without the status")
        elif request.command == _READ:
            target = _cover(request, request.offset_bytes, request.length_bytes)
            return _SIMPLE_BYTES + self._fill(at, available, target, request, True)
        self._finish(request)
        return _SIMPLE_BYTES

    def _find(self, handle: int) -> InFlight:
        request = self.requests.get(handle)
        if request is None:
            raise ProtocolError(f"reply to a request that is not in flight, handle {handle:#x}")
        if request.sent_at_bytes > self.sent_bytes:
            raise ProtocolError("a request was answered before it was sent")
        return request

    # -- payloads -------------------------------------------------------------------------
    def _fill(
        self, at: int, available: int, target: memoryview, request: InFlight, last: bool
    ) -> int:
        """Put data into `target`: what is staged now, the rest when it comes."""
        taken = min(available, len(target))
        target[:taken] = self._view[at : at + taken]
        self.data_bytes += taken
        if taken < len(target):
            self._sink = _Sink(target[taken:], request, last, _DATA)
        elif last:
            self._finish(request)
        return taken

    def _chunk(self, request: InFlight, kind: int, payload: bytes, last: bool) -> None:
        """A chunk without data of a read, complete and of a length that fits its kind."""
        if kind == _HOLE:
            offset, size = OFFSET_HOLE.unpack(payload)
            if size == 0:
                raise ProtocolError("a hole of no bytes")
            _cover(request, offset, size)[:] = bytes(size)
        elif kind == _STATUS:
            self._block_status(request, payload)
        elif kind & _ERROR_BIT:
            _take_error(request, kind, payload)
        if last:
            self._finish(request)

    def _block_status(self, request: InFlight, payload: bytes) -> None:
        (context,) = CONTEXT_ID.unpack_from(payload)
        if context != self._allocation_id:
            raise ProtocolError(f"block status of context {context}, which was not selected")
        if request.descriptors:
            raise ProtocolError("block status was sent twice")
        left = request.length_bytes
        for length, flags in BLOCK_DESCRIPTOR.iter_unpack(payload[CONTEXT_ID.size :]):
            if length == 0:
                raise ProtocolError("block status of no bytes")
            if left == 0:
                raise ProtocolError("block status beyond the range that was asked for")
            if len(request.descriptors) == MAX_DESCRIPTORS:
                break
            # The last one may go beyond the range.
            length = min(length, left)  # noqa: PLW2901
            request.descriptors.append((length, flags & (ALLOC_HOLE | ALLOC_ZERO)))
            left -= length

    def _finish(self, request: InFlight) -> None:
        if request.error is None:
            if request.command == _READ and request.covered_bytes != request.length_bytes:
                raise ProtocolError(
                    f"a read of {request.length_bytes} bytes got {request.covered_bytes}"
                )
            if request.command == _BLOCK_STATUS and not request.descriptors:
                raise ProtocolError("block status was answered without the status")
        del self.requests[request.handle]
        self.finished.append(request)


def _check_chunk(request: InFlight, kind: int, length: int, last: bool) -> None:
    """Whether a chunk of this kind and length may answer this request at all."""
    if kind == _DATA:
        fits = request.command == _READ and length > OFFSET_DATA.size
    elif kind == _HOLE:
        fits = request.command == _READ and length == OFFSET_HOLE.size
    elif kind == _NONE:
        fits = length == 0 and last
    elif kind == _STATUS:
        rest = length - CONTEXT_ID.size
        fits = request.command == _BLOCK_STATUS and rest > 0 and rest % BLOCK_DESCRIPTOR.size == 0
        fits = fits and length <= MAX_PAYLOAD_BYTES
    elif kind & _ERROR_BIT:
        least = ERROR_CHUNK.size + (ERROR_OFFSET_CHUNK_TAIL.size if kind == _ERROR_OFFSET else 0)
        fits = least <= length <= least + 0xFFFF
    else:
        fits = False
    if not fits:
        raise ProtocolError(
            f"reply of kind {kind} with {length} bytes to command {request.command}"
        )


def _cover(request: InFlight, offset_bytes: int, length_bytes: int) -> memoryview:
    """The part of a read's buffer that a chunk fills; it must not have been filled before."""
    buffer = request.buffer
    if buffer is None:
        raise RuntimeError("a read has no buffer")
    start = offset_bytes - request.offset_bytes
    stop = start + length_bytes
    if start < 0 or stop > request.length_bytes:
        raise ProtocolError(f"data at {offset_bytes} lie outside the read they answer")
    pieces = request.pieces
    place = bisect(pieces, (start, stop))
    if (place and pieces[place - 1][1] > start) or (
        place < len(pieces) and pieces[place][0] < stop
    ):
        raise ProtocolError(f"data at {offset_bytes} were sent twice")
    if len(pieces) > request.length_bytes // SMALLEST_PIECE_BYTES + 1:
        raise ProtocolError(f"a read was answered in more than {len(pieces)} pieces")
    pieces.insert(place, (start, stop))
    request.covered_bytes += length_bytes
    return buffer[start:stop]


def _take_error(request: InFlight, kind: int, payload: bytes) -> None:
    number, length = ERROR_CHUNK.unpack_from(payload)
    rest = len(payload) - ERROR_CHUNK.size
    if kind == _ERROR_OFFSET:
        rest -= ERROR_OFFSET_CHUNK_TAIL.size
        (offset,) = ERROR_OFFSET_CHUNK_TAIL.unpack_from(
            payload, len(payload) - ERROR_OFFSET_CHUNK_TAIL.size
        )
        if not 0 <= offset - request.offset_bytes < request.length_bytes:
            raise ProtocolError(f"an error at {offset} lies outside its request")
    if number == 0:
        raise ProtocolError("an error without a number")
    if length > rest:
        raise ProtocolError("the text of an error is longer than the reply")
    if request.error is None:
        text = payload[ERROR_CHUNK.size : ERROR_CHUNK.size + length]
        request.error = (_known(number), printable(bytes(text)))


def _known(number: int) -> int:
    """Errors that the protocol does not know mean nothing on this machine."""
    return number if number in _KNOWN_ERRORS else int(Errno.EIO)
