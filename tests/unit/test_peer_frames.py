"""Frames between two nodes."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.peer.frames import (
    HEADER_BYTES,
    MAX_GREETING_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_TEXT_BYTES,
    ErrorCode,
    Flag,
    Frame,
    Kind,
    Part,
    PeerError,
    Reader,
    encode,
    pack_text,
    refusal,
)

parts = st.builds(
    Part,
    st.integers(0, 255),
    st.integers(0, 3),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=200),
)


def stream_of(sent: list[Part]) -> bytes:
    return b"".join(encode(part, number) for number, part in enumerate(sent, 1))


def all_of(reader: Reader) -> list[Frame]:
    return list(iter(reader.take, None))


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[first:stop] for first, stop in itertools.pairwise(edges)]


def test_a_frame_byte_by_byte() -> None:
    frame = encode(Part(Kind.GOT, Flag.LAST, 0x0102030405060708, b"\x2a" + bytes(7)), 3)
    front = bytes.fromhex("42504c4b 01 12 0200 08000000")
    back = bytes.fromhex("0300000000000000 0807060504030201 2a00000000000000")
    assert frame[:12] == front
    assert frame[16:] == back
    assert frame[12:16] == struct.pack("<I", crc32c(front + back))


@given(st.lists(parts, max_size=6), st.lists(st.integers(0, 1 << 16), max_size=12))
def test_any_cutting_gives_the_frames_back(sent: list[Part], cuts: list[int]) -> None:
    reader, got = Reader(), []
    for piece in pieces(stream_of(sent), cuts):
        reader.feed(piece)
        got += all_of(reader)
    assert got == [
        Frame(part.kind, part.flags, part.request, part.payload, number)
        for number, part in enumerate(sent, 1)
    ]
    assert not reader.held_bytes


@given(st.lists(parts, min_size=1, max_size=3), st.data())
def test_a_flipped_bit_never_makes_another_frame(sent: list[Part], data: st.DataObject) -> None:
    stream = bytearray(stream_of(sent))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit >> 3] ^= 1 << (bit & 7)
    reader, got = Reader(), []
    reader.feed(bytes(stream))
    with contextlib.suppress(PeerError):
        got += iter(reader.take, None)
    ends, end = [], 0
    for part in sent:
        end += HEADER_BYTES + len(part.payload)
        ends.append(end)
    whole = sum(end <= bit >> 3 for end in ends)
    assert [frame.payload for frame in got] == [part.payload for part in sent[:whole]]


def header(**changes: int | bytes) -> bytes:
    values = {"magic": b"BPLK", "version": 1, "kind": 1, "flags": 0, "length": 0}
    values.update(changes)
    return struct.pack("<4sBBHI", *values.values()) + bytes(20)


@pytest.mark.parametrize(
    ("bad", "code", "text"),
    [
        (header(magic=b"BPLk"), ErrorCode.HEADER, "begins with"),
        (header(version=2), ErrorCode.HEADER, "version 2"),
        (header(flags=4), ErrorCode.HEADER, "0x4"),
        (header(flags=0x8001), ErrorCode.HEADER, "0x8001"),
        (header(length=MAX_GREETING_BYTES + 1), ErrorCode.TOO_LONG, "4097"),
        (header(length=0xFFFFFFFF), ErrorCode.TOO_LONG, "4294967295"),
    ],
)
def test_a_bad_header_is_refused_before_anything_follows(
    bad: bytes, code: ErrorCode, text: str
) -> None:
    reader = Reader()
    reader.feed(bad[:-1])
    assert reader.take() is None
    reader.feed(bad[-1:])
    for _ in range(2):  # and for ever
        with pytest.raises(PeerError, match=text) as caught:
            reader.take()
        assert caught.value.code is code
    assert caught.value.text == str(caught.value)


def test_the_limit_counts_when_a_frame_is_taken() -> None:
    long = Part(Kind.RECORD, 0, 0, bytes(MAX_PAYLOAD_BYTES))
    reader = Reader()
    reader.feed(stream_of([Part(Kind.HELLO, 0, 0, bytes(MAX_GREETING_BYTES)), long]))
    assert reader.take() is not None
    with pytest.raises(PeerError):
        reader.take()
    reader.limit_bytes = MAX_PAYLOAD_BYTES
    assert reader.take() == Frame(Kind.RECORD, 0, 0, long.payload, 2)


def test_little_is_held_however_much_passes() -> None:
    reader, length = Reader(MAX_PAYLOAD_BYTES), HEADER_BYTES + 70_000
    for piece in pieces(
        stream_of([Part(Kind.ADD, 0, number, bytes(70_000)) for number in range(40)]),
        list(range(0, 40 * length, 60_000)),
    ):
        reader.feed(piece)
        all_of(reader)
        assert reader.held_bytes < length
    assert len(reader._held) < 2 * length


def fresh(sequence: int) -> Reader:
    """One that waits for this frame."""
    reader = Reader(MAX_PAYLOAD_BYTES)
    for number in range(1, sequence):
        reader.feed(encode(Part(Kind.PING, 0, 0, b""), number))
        assert reader.take() is not None
    return reader


@pytest.mark.parametrize("sequence", [0, 1, 3, 2**64 - 1])
def test_only_the_next_frame_is_taken(sequence: int) -> None:
    reader = fresh(2)
    reader.feed(encode(Part(Kind.GOT, 0, 0, b""), sequence))
    with pytest.raises(PeerError, match="after frame 1") as caught:
        reader.take()
    assert caught.value.code is ErrorCode.BROKEN


def test_a_text_is_printable_and_short() -> None:
    assert pack_text("Größe") == b"\x07\x00" + "Größe".encode()
    assert pack_text("a\x1b[2J") == b"\x08\x00a\\x1b[2J"
    assert pack_text("ä" * 600) == struct.pack("<H", MAX_TEXT_BYTES) + "ä".encode() * 512
    assert pack_text("a" + "ä" * 600) == struct.pack("<H", 1023) + b"a" + "ä".encode() * 511


def test_a_refusal_says_why() -> None:
    assert refusal(ErrorCode.RUNS, "no") == Part(Kind.ERROR, 0, 0, b"\x05\x00\x02\x00no")
