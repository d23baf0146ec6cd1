"""Blocks in pieces: where they are, what their sums cover, what is packed and unpacked."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.points.codec import with_payload
from bitmapd.points.messages import Encoding, Entry
from bitmapd.points.pieces import (
    MAX_BLOCK_BYTES,
    PIECE_BYTES,
    POOR_PAUSE,
    POOR_RUN,
    Content,
    Packer,
    Unpacker,
    digest,
    gather,
    is_zeros,
    piece_sum,
    raw_bytes,
    spans,
    whole_mask,
)
from bitmapd.record.geometry import Geometry

VOLUME = bytes(range(16))
GEOMETRY = Geometry((1 << 20) + 5 * PIECE_BYTES + 512, 1 << 18, 1 << 15)
SHORT = GEOMETRY.blocks - 1  # five pieces and one of 512 bytes
NOISE = random.Random(3).randbytes(1 << 15)


@given(st.sampled_from([0, SHORT]), st.data())
def test_pieces_are_where_the_mask_says(block: int, data: st.DataObject) -> None:
    mask = data.draw(st.integers(1, whole_mask(GEOMETRY, block)))
    _, length = GEOMETRY.block_bytes_range(block, block + 1)
    bits = [piece for piece in range(64) if mask >> piece & 1]
    expected = b"".join(NOISE[:length][p * PIECE_BYTES : (p + 1) * PIECE_BYTES] for p in bits)
    whole = memoryview(NOISE)[:length]
    assert bytes(gather(GEOMETRY, block, mask, whole)) == expected
    assert raw_bytes(GEOMETRY, block, mask) == len(expected)
    found = list(spans(GEOMETRY, block, mask))
    assert b"".join(NOISE[at : at + count] for at, count in found) == expected
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(found))


def test_the_largest_block_has_64_pieces() -> None:
    geometry = Geometry(1 << 20, 1 << 20, MAX_BLOCK_BYTES)
    assert whole_mask(geometry, 3) == (1 << 64) - 1
    assert list(spans(geometry, 3, (1 << 64) - 1)) == [(0, MAX_BLOCK_BYTES)]
    assert is_zeros(memoryview(bytearray(MAX_BLOCK_BYTES)))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_zeros_are_zeros_from_the_first_byte_to_the_last(kind: Callable[[bytes], Content]) -> None:
    for length in (1, 512, 4096, MAX_BLOCK_BYTES):
        assert is_zeros(kind(bytes(length)))
        for at in {0, length // 2, length - 1}:
            assert not is_zeros(kind(bytes(at) + b"\1" + bytes(length - at - 1)))


def test_a_sum_covers_the_place() -> None:
    sums = {
        piece_sum(VOLUME, 1, 2, 3, b"data"),
        piece_sum(bytes(16), 1, 2, 3, b"data"),
        piece_sum(VOLUME, 2, 2, 3, b"data"),
        piece_sum(VOLUME, 1, 3, 3, b"data"),
        piece_sum(VOLUME, 1, 2, 4, b"data"),
        piece_sum(VOLUME, 1, 2, 3, b"date"),
    }
    assert len(sums) == 6


def test_a_digest_is_of_a_set() -> None:
    entries = [(1, 2, 3, 4), (2, 1, 3, 4)]
    assert digest(entries) == digest(reversed(entries))
    assert digest(entries) != digest(entries[:1])
    assert digest(entries) != digest([(1, 2, 3, 4), (2, 1, 3, 5)])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("content", "plain", "packed"),
    [
        (bytes(1 << 15), Encoding.ZEROS, Encoding.ZEROS),
        (NOISE, Encoding.RAW, Encoding.RAW),
        (b"text" * (1 << 13), Encoding.RAW, Encoding.ZSTD),
    ],
)
def test_what_is_packed_is_unpacked(
    content: bytes, plain: Encoding, packed: Encoding, compress: bool
) -> None:
    buffer = bytearray(content)
    entry = Packer(GEOMETRY, VOLUME, compress=compress).pack(2, 7, 0xFF, memoryview(buffer))
    buffer[:] = b"x" * len(buffer)  # nothing of it is referred to
    assert entry.encoding is (packed if compress else plain)
    assert bytes(Unpacker(GEOMETRY, VOLUME).unpack(entry)) == content


def test_what_does_not_shrink_is_not_tried_for_a_while() -> None:
    packer = Packer(GEOMETRY, VOLUME, compress=True)
    noise, text = memoryview(NOISE), memoryview(b"text" * (1 << 13))

    def encodings(content: memoryview, count: int) -> set[Encoding]:
        return {packer.pack(2, 7, 0xFF, content).encoding for _ in range(count)}

    assert encodings(noise, POOR_RUN - 1) == {Encoding.RAW}
    assert encodings(text, 1) == {Encoding.ZSTD}  # which is not eight in a row
    assert encodings(noise, POOR_RUN) == {Encoding.RAW}
    assert encodings(text, POOR_PAUSE) == {Encoding.RAW}
    assert encodings(text, 1) == {Encoding.ZSTD}


def test_what_shrinks_by_less_than_a_twentieth_is_sent_as_it_is() -> None:
    packer = Packer(GEOMETRY, VOLUME, compress=True)
    kept = len(NOISE) - len(NOISE) // 25
    content = memoryview(NOISE[:kept] + bytes(len(NOISE) - kept))
    assert packer.pack(2, 7, 0xFF, content).encoding is Encoding.RAW


def text_entry() -> Entry:
    return Packer(GEOMETRY, VOLUME, compress=True).pack(2, 7, 0xFF, memoryview(b"text" * (1 << 13)))


def raw_entry() -> Entry:
    return Packer(GEOMETRY, VOLUME, compress=False).pack(2, 7, 0xFF, memoryview(NOISE))


def compressed(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


@pytest.mark.parametrize(
    ("payload", "code", "text"),
    [
        (compressed(bytes(1 << 30)), ErrorCode.TOO_LONG, "unpack to 1073741824 bytes"),
        (compressed(bytes(1 << 14)), ErrorCode.TOO_LONG, "unpack to 16384 bytes"),
        (compressed(b"text" * (1 << 13), write_content_size=False), ErrorCode.TOO_LONG, "to -1"),
        (b"no frame", ErrorCode.BROKEN, "cannot be unpacked"),
        (text_entry().payload[:-3], ErrorCode.BROKEN, "cannot be unpacked"),
        (bytes(text_entry().payload) + b"more", ErrorCode.BROKEN, "cannot be unpacked"),
        (compressed(b"test" * (1 << 13)), ErrorCode.BROKEN, "sum of block 2"),
    ],
)
def test_what_is_not_what_was_packed_is_refused(payload: bytes, code: ErrorCode, text: str) -> None:
    with pytest.raises(PeerError, match=text) as caught:
        Unpacker(GEOMETRY, VOLUME).unpack(with_payload(text_entry(), payload))
    assert caught.value.code is code


def test_a_header_that_lies_about_the_size_does_not_unpack_to_more() -> None:
    """A frame that says 32 KiB and holds a gigabyte of zeros."""
    honest = compressed(bytes(1 << 15))
    bomb = bytearray(compressed(bytes(1 << 30)))
    lying = honest[:7] + bytes(bomb[10:])  # other header, same blocks
    assert zstandard.frame_content_size(lying) == 1 << 15
    with pytest.raises(PeerError):
        Unpacker(GEOMETRY, VOLUME).unpack(with_payload(text_entry(), lying))


def test_rot_is_found_however_it_is_encoded() -> None:
    unpacker = Unpacker(GEOMETRY, VOLUME)
    rotten = bytearray(NOISE)
    rotten[9] ^= 1
    zeros = Packer(GEOMETRY, VOLUME, compress=True).pack(2, 7, 3, memoryview(bytes(8192)))
    elsewhere = Entry(3, 7, 0xFF, Encoding.RAW, raw_entry().sum64, NOISE)
    moved = Entry(zeros.block, zeros.stamp, 5, zeros.encoding, zeros.sum64, b"")
    short = with_payload(raw_entry(), NOISE[:-1])
    for entry in (with_payload(raw_entry(), bytes(rotten)), elsewhere, moved, short):
        with pytest.raises(PeerError, match="sum of block"):
            unpacker.unpack(entry)
