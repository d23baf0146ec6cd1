"""The parser of a server's replies: what is believed, and what is not."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.nbd.client.replies import (
    MAX_DESCRIPTORS,
    MAX_PAYLOAD_BYTES,
    STAGING_BYTES,
    InFlight,
    ReplyParser,
)
from bitmapd.nbd.numbers import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
)
from bitmapd.nbd.wire import SIMPLE_REPLY, STRUCTURED_REPLY, ProtocolError

CONTEXT = 5
BASE = 1 << 40  # where all the requests of these tests begin


def simple(handle: int, error: int = 0, data: bytes = b"") -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, handle) + data


def chunk(handle: int, kind: int, payload: bytes = b"", last: bool = True, flags: int = 0) -> bytes:
    head = STRUCTURED_REPLY.pack(
        STRUCTURED_REPLY_MAGIC, flags | int(last), kind, handle, len(payload)
    )
    return head + payload


def data_chunk(handle: int, at: int, data: bytes, last: bool = False) -> bytes:
    return chunk(handle, Chunk.OFFSET_DATA, struct.pack(">Q", BASE + at) + data, last)


def hole_chunk(handle: int, at: int, size: int, last: bool = False) -> bytes:
    return chunk(handle, Chunk.OFFSET_HOLE, struct.pack(">QI", BASE + at, size), last)


def error_chunk(handle: int, number: int, text: bytes = b"", last: bool = True) -> bytes:
    return chunk(handle, Chunk.ERROR, struct.pack(">IH", number, len(text)) + text, last)


def error_at(handle: int, number: int, at: int, last: bool = True) -> bytes:
    payload = struct.pack(">IHQ", number, 0, BASE + at)
    return chunk(handle, Chunk.ERROR_OFFSET, payload, last)


def status_chunk(
    handle: int, *pairs: tuple[int, int], context: int = CONTEXT, last: bool = True
) -> bytes:
    payload = struct.pack(">I", context) + b"".join(struct.pack(">II", *pair) for pair in pairs)
    return chunk(handle, Chunk.BLOCK_STATUS, payload, last)


def done(_error: OSError | None) -> None:
    raise AssertionError("the parser calls nobody")


def a_request(handle: int, command: int, length: int) -> InFlight:
    buffer = memoryview(bytearray(b"\xaa" * length)) if command == Cmd.READ else None
    return InFlight(handle, command, BASE, length, done, buffer)


def a_parser(*requests: InFlight, structured: bool = True) -> ReplyParser:
    parser = ReplyParser(structured, CONTEXT if structured else None)
    for request in requests:
        parser.requests[request.handle] = request
    return parser


def feed(parser: ReplyParser, data: bytes, piece_bytes: int = 1 << 30) -> None:
    """Deliver as a socket would: never more than fits, never more than a piece."""
    at = 0
    while at < len(data):
        target = parser.buffer()
        assert len(target) > 0
        count = min(len(target), piece_bytes, len(data) - at)
        target[:count] = data[at : at + count]
        parser.received(count)
        at += count


def content(request: InFlight) -> bytes:
    assert request.buffer is not None
    return bytes(request.buffer)


READ = Cmd.READ


# -- what is believed ---------------------------------------------------------------------
@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 30])
@pytest.mark.parametrize("length", [1, 512, STAGING_BYTES - 16, STAGING_BYTES, 100_000])
def test_simple_reply_to_a_read(length: int, piece_bytes: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    request, other = a_request(1, READ, length), a_request(2, Cmd.WRITE, 512)
    parser = a_parser(request, other, structured=False)
    feed(parser, simple(1, data=data[:length]) + simple(2), piece_bytes)
    assert content(request) == data[:length]
    assert list(parser.finished) == [request, other]
    assert parser.requests == {}
    assert parser.data_bytes == length


@pytest.mark.parametrize("piece_bytes", [1, 13, 1 << 30])
def test_a_read_in_pieces_out_of_order_between_other_replies(piece_bytes: int) -> None:
    first, second, write = (
        a_request(1, READ, 60_000),
        a_request(2, READ, 1024),
        a_request(3, Cmd.WRITE, 9),
    )
    parser = a_parser(first, second, write)
    feed(
        parser,
        data_chunk(1, 40_000, b"c" * 20_000)
        + data_chunk(2, 0, b"x" * 512)
        + hole_chunk(1, 10_000, 30_000)
        + simple(3)
        + chunk(2, Chunk.OFFSET_HOLE, struct.pack(">QI", BASE + 512, 512), flags=0x8000)
        + data_chunk(1, 0, b"a" * 10_000, last=True),
        piece_bytes,
    )
    assert content(first) == b"a" * 10_000 + bytes(30_000) + b"c" * 20_000
    assert content(second) == b"x" * 512 + bytes(512)
    assert list(parser.finished) == [write, second, first]
    assert all(request.error is None for request in parser.finished)


def test_none_ends_a_reply() -> None:
    read, flush = a_request(1, READ, 8), a_request(2, Cmd.FLUSH, 0)
    parser = a_parser(read, flush)
    feed(parser, data_chunk(1, 0, b"12345678"))
    assert not parser.finished
    feed(parser, chunk(1, Chunk.NONE) + chunk(2, Chunk.NONE))
    assert list(parser.finished) == [read, flush]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (simple(1, 28), (errno.ENOSPC, "")),
        (simple(1, 4711), (errno.EIO, "")),
        (error_chunk(1, 5, b"bad\nsector"), (errno.EIO, "bad?sector")),
        (error_at(1, 22, 511), (errno.EINVAL, "")),
        (error_chunk(1, 1, b"a", last=False) + error_chunk(1, 5, b"b"), (errno.EPERM, "a")),
        # A kind of error that nobody has told us of is still an error.
        (chunk(1, (1 << 15) + 77, struct.pack(">IH", 12, 2) + b"hmrest"), (errno.ENOMEM, "hm")),
        (error_chunk(1, 5, last=False) + chunk(1, Chunk.NONE), (errno.EIO, "")),
    ],
)
def test_errors_of_a_write(reply: bytes, error: tuple[int, str]) -> None:
    request = a_request(1, Cmd.WRITE, 512)
    parser = a_parser(request)
    feed(parser, reply)
    assert list(parser.finished) == [request]
    assert request.error == error


def test_a_failed_read_need_not_be_complete() -> None:
    structured, plain = a_request(1, READ, 512), a_request(1, READ, 512)
    parser = a_parser(structured)
    feed(parser, data_chunk(1, 0, b"x" * 100) + error_at(1, 5, 100))
    assert structured.error == (errno.EIO, "")
    parser = a_parser(plain, structured=False)
    feed(parser, simple(1, 5))
    assert plain.error == (errno.EIO, "")


def test_block_status_is_cut_to_the_range_and_to_known_flags() -> None:
    request = a_request(1, Cmd.BLOCK_STATUS, 4096)
    parser = a_parser(request)
    feed(parser, status_chunk(1, (1024, 3), (1024, 0xFFFFFFFC), (1 << 20, 2)))
    assert request.descriptors == [(1024, 3), (1024, 0), (2048, 2)]


@pytest.mark.parametrize("piece_bytes", [1000, 1 << 30])
def test_long_block_status(piece_bytes: int) -> None:
    count = MAX_DESCRIPTORS + 10
    request, after = a_request(1, Cmd.BLOCK_STATUS, count * 512), a_request(2, Cmd.WRITE, 1)
    parser = a_parser(request, after)
    reply = status_chunk(1, *((512, i % 4) for i in range(count)), last=False)
    feed(parser, reply + chunk(1, Chunk.NONE) + simple(2), piece_bytes)
    assert request.descriptors == [(512, i % 4) for i in range(MAX_DESCRIPTORS)]
    assert list(parser.finished) == [request, after]
    assert parser.data_bytes == 0


def test_failed_block_status() -> None:
    one, two = a_request(1, Cmd.BLOCK_STATUS, 512), a_request(2, Cmd.BLOCK_STATUS, 512)
    parser = a_parser(one, two)
    feed(parser, simple(1, 22) + error_chunk(2, 5))
    assert (one.error, two.error) == ((errno.EINVAL, ""), (errno.EIO, ""))


# -- what is not --------------------------------------------------------------------------
FULL = data_chunk(1, 0, bytes(512), last=True)


@pytest.mark.parametrize(
    ("command", "reply", "match"),
    [
        (READ, bytes(16), "magic 0x0"),
        (READ, simple(1), "simple reply"),
        (READ, simple(9), "not in flight, handle 0x9"),
        (READ, data_chunk(9, 0, b"x"), "not in flight"),
        (READ, FULL + FULL, "not in flight"),
        (READ, chunk(1, Chunk.NONE), "512 bytes got 0"),
        (READ, data_chunk(1, 0, bytes(511), last=True), "512 bytes got 511"),
        (READ, hole_chunk(1, 0, 511, last=True), "512 bytes got 511"),
        (READ, data_chunk(1, 1, bytes(512)), "outside the read"),
        (READ, data_chunk(1, -1, bytes(2)), "outside the read"),
        (READ, hole_chunk(1, 0, 513), "outside the read"),
        (READ, hole_chunk(1, 0, 0), "hole of no bytes"),
        (READ, data_chunk(1, 0, bytes(2)) + data_chunk(1, 1, b"x"), "sent twice"),
        (READ, data_chunk(1, 5, bytes(2)) + hole_chunk(1, 0, 6), "sent twice"),
        (READ, data_chunk(1, 5, bytes(2)) + data_chunk(1, 5, bytes(1)), "sent twice"),
        (READ, b"".join(hole_chunk(1, i, 1) for i in range(9)), "more than 3 pieces"),
        (READ, data_chunk(1, 0, b""), "kind 1 with 8 bytes to command 0"),
        (READ, chunk(1, Chunk.OFFSET_HOLE, bytes(13)), "kind 2 with 13 bytes"),
        (READ, chunk(1, Chunk.NONE, last=False), "kind 0 with 0 bytes"),
        (READ, chunk(1, Chunk.NONE, b"x"), "kind 0 with 1 bytes"),
        (READ, chunk(1, 3, b"x"), "kind 3 with 1 bytes"),
        (READ, status_chunk(1, (512, 0)), "kind 5"),
        (READ, error_chunk(1, 0), "without a number"),
        (READ, chunk(1, Chunk.ERROR, struct.pack(">IH", 5, 1)), "text of an error is longer"),
        (READ, chunk(1, Chunk.ERROR_OFFSET, struct.pack(">IHQ", 5, 1, BASE)), "longer"),
        (READ, chunk(1, Chunk.ERROR, bytes(5)), "kind 32769 with 5 bytes"),
        (READ, chunk(1, Chunk.ERROR_OFFSET, bytes(13)), "kind 32770 with 13 bytes"),
        (READ, chunk(1, Chunk.ERROR, bytes(0x10000 + 6)), "kind 32769 with 65542 bytes"),
        (READ, error_at(1, 5, 512), "outside its request"),
        (READ, error_at(1, 5, -1), "outside its request"),
        (Cmd.FLUSH, error_at(1, 5, 0), "outside its request"),
        (Cmd.WRITE, FULL, "kind 1 with 520 bytes to command 1"),
        (Cmd.WRITE, hole_chunk(1, 0, 512), "kind 2 with 12 bytes to command 1"),
        (Cmd.WRITE, status_chunk(1, (512, 0)), "kind 5"),
        (Cmd.BLOCK_STATUS, simple(1), "without the status"),
        (Cmd.BLOCK_STATUS, chunk(1, Chunk.NONE), "without the status"),
        (Cmd.BLOCK_STATUS, status_chunk(1), "kind 5 with 4 bytes"),
        (Cmd.BLOCK_STATUS, status_chunk(1, (512, 0), context=6), "context 6"),
        (Cmd.BLOCK_STATUS, status_chunk(1, (1, 0), last=False) * 2, "sent twice"),
        (Cmd.BLOCK_STATUS, status_chunk(1, (0, 0)), "no bytes"),
        (Cmd.BLOCK_STATUS, status_chunk(1, (512, 0), (1, 0)), "beyond the range"),
        (Cmd.BLOCK_STATUS, status_chunk(1, (512, 0))[:-1] + b"12", "in flight|magic"),
        (
            Cmd.BLOCK_STATUS,
            STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, 1, 5, 1, MAX_PAYLOAD_BYTES + 4),
            "kind 5 with 8388612 bytes",
        ),
    ],
)
def test_violations_are_named(command: int, reply: bytes, match: str) -> None:
    request = a_request(1, command, 0 if command == Cmd.FLUSH else 512)
    with pytest.raises(ProtocolError, match=match):
        feed(a_parser(request), reply + bytes(40))


def test_structured_replies_that_were_not_negotiated() -> None:
    with pytest.raises(ProtocolError, match="magic 0x668e33ef"):
        feed(a_parser(a_request(1, READ, 512), structured=False), FULL)


@pytest.mark.parametrize("reply", [simple(1, 5), simple(1), error_chunk(1, 5), chunk(1, 0)])
def test_an_answer_to_what_was_not_sent_yet(reply: bytes) -> None:
    request = a_request(1, Cmd.WRITE, 512)
    request.sent_at_bytes = 540
    parser = a_parser(request)
    parser.sent_bytes = 539
    with pytest.raises(ProtocolError, match="before it was sent"):
        feed(parser, reply)
    parser = a_parser(request)
    parser.sent_bytes = 540
    feed(parser, reply)
    assert list(parser.finished) == [request]


def test_misuse_is_a_bug_of_the_caller() -> None:
    request = InFlight(1, READ, BASE, 512, done)
    with pytest.raises(RuntimeError, match="no buffer"):
        feed(a_parser(request), FULL)


# -- properties ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Requests of (command, length) and a server's replies to them."""

    requests: list[tuple[int, int]]
    replies: list[bytes]
    contents: dict[int, bytes]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A server that keeps to the protocol: any split of the reads, any order."""
    requests: list[tuple[int, int]] = []
    contents: dict[int, bytes] = {}
    streams: list[list[bytes]] = []
    for handle in range(1, draw(st.integers(1, 5)) + 1):
        command = draw(
            st.sampled_from([Cmd.READ, Cmd.READ, Cmd.WRITE, Cmd.FLUSH, Cmd.BLOCK_STATUS])
        )
        length = 0 if command == Cmd.FLUSH else draw(st.sampled_from([512, 4096, 40_000]))
        requests.append((command, length))
        if command == Cmd.READ:
            edges = draw(st.sets(st.integers(1, length - 1), max_size=2))
            pieces, stream, whole = [], [], bytearray(length)
            for start, stop in pairwise([0, *sorted(edges), length]):
                if draw(st.booleans()):
                    value = draw(st.integers(1, 255))
                    whole[start:stop] = bytes([value]) * (stop - start)
                    pieces.append(data_chunk(handle, start, bytes(whole[start:stop])))
                else:
                    pieces.append(hole_chunk(handle, start, stop - start))
            stream = [*draw(st.permutations(pieces)), chunk(handle, Chunk.NONE)]
            contents[handle] = bytes(whole)
        elif command == Cmd.BLOCK_STATUS:
            stream = [status_chunk(handle, (length - 1, 3), (1, 0), last=True)]
        else:
            stream = [draw(st.sampled_from([simple(handle), chunk(handle, Chunk.NONE)]))]
        streams.append(stream)
    replies: list[bytes] = []
    while streams:
        stream = streams[draw(st.integers(0, len(streams) - 1))]
        replies.append(stream.pop(0))
        streams = [left for left in streams if left]
    return Plan(requests, replies, contents)


def play(plan: Plan, data: bytes, piece_bytes: int) -> tuple[ReplyParser, dict[int, InFlight], str]:
    requests = {
        handle: a_request(handle, command, length)
        for handle, (command, length) in enumerate(plan.requests, 1)
    }
    parser = a_parser(*requests.values())
    try:
        feed(parser, data, piece_bytes)
    except ProtocolError as error:
        return parser, requests, str(error)
    return parser, requests, ""


@given(plans(), st.sampled_from([1, 3, 100, 5000, 1 << 30]))
def test_a_correct_server_is_understood_however_bytes_are_cut(plan: Plan, piece: int) -> None:
    parser, requests, error = play(plan, b"".join(plan.replies), piece)
    assert error == ""
    assert not parser.requests
    assert {request.handle for request in parser.finished} == set(requests)
    for handle, request in requests.items():
        assert request.error is None
        if request.command == Cmd.READ:
            assert content(request) == plan.contents[handle]
        if request.command == Cmd.BLOCK_STATUS:
            assert request.descriptors == [(request.length_bytes - 1, 3), (1, 0)]


@given(
    plans(),
    st.lists(
        st.tuples(
            st.sampled_from(["byte", "cut", "again", "garbage"]),
            st.integers(0, 1 << 20),
            st.binary(min_size=1, max_size=40),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 11, 300, 4096]),
)
def test_a_hostile_server_gets_no_further_than_a_protocol_error(
    plan: Plan, spoils: list[tuple[str, int, bytes]], piece: int
) -> None:
    replies = list(plan.replies)
    for how, place, garbage in spoils:
        at = place % len(replies)
        if how == "byte" and replies[at]:
            spoiled = bytearray(replies[at])
            spoiled[place % min(len(spoiled), 40)] ^= garbage[0]
            replies[at] = bytes(spoiled)
        elif how == "cut":
            replies[at] = replies[at][: -len(garbage)]
        elif how == "again":
            replies.insert(at, replies[at])
        else:
            replies.insert(at, garbage)
    data = b"".join(replies)
    parser, requests, error = play(plan, data, piece)
    whole_parser, whole_requests, whole_error = play(plan, data, 1 << 30)
    assert error == whole_error
    assert [r.handle for r in parser.finished] == [r.handle for r in whole_parser.finished]
    handles = [request.handle for request in parser.finished]
    assert len(handles) == len(set(handles))
    assert set(handles) | set(parser.requests) == set(requests)
    for handle in handles:
        request = requests[handle]
        assert request.error == whole_requests[handle].error
        if request.command == Cmd.READ and request.error is None:
            # Success means that each byte was delivered, once: none of the old ones is left
            # unless the server sent it.
            assert sum(stop - start for start, stop in request.pieces) == request.length_bytes
            assert all(a[1] <= b[0] for a, b in pairwise(request.pieces))
            assert content(request) == content(whole_requests[handle])


@given(st.binary(max_size=300), st.booleans())
def test_noise(data: bytes, structured: bool) -> None:
    parser = a_parser(a_request(1, READ, 512), structured=structured)
    try:
        feed(parser, data)
    except ProtocolError:
        return
    assert len(data) < 16
