"""Segments and batches: they prove what and whose they are."""

from __future__ import annotations

import struct

import pytest
from crc32c import crc32c

from bitmapd.receiver.places import PAGE_BYTES
from bitmapd.receiver.segments import (
    Batch,
    decode_batch,
    decode_segment,
    encode_batch,
    encode_segment,
)
from tests.data.make_journal_golden import BATCHES, GEOMETRY, JOURNAL

ID = JOURNAL.bytes
BATCH = BATCHES[0]


def written(batch: Batch = BATCH) -> bytearray:
    raw = bytearray(b"\xee" * batch.total_bytes)
    encode_batch(memoryview(raw), batch, ID)
    return raw


def sealed(raw: bytearray, at: int, layout: str, value: object) -> bytes:
    struct.pack_into(layout, raw, at, value)
    struct.pack_into("<I", raw, 4092, crc32c(raw[:4092], crc32c(b"bitmapd batch" + ID)))
    return bytes(raw[:PAGE_BYTES])


def test_a_batch_comes_back_without_its_payloads() -> None:
    for batch in BATCHES:
        raw = written(batch)
        found = decode_batch(raw[:PAGE_BYTES], ID, GEOMETRY, batch.sequence, batch.number)
        assert found is not None
        assert (found.point, found.incarnation) == (batch.point, batch.incarnation)
        assert found.lengths == batch.lengths
        assert found.total_bytes == batch.total_bytes == len(raw)
        for (entry, at, length), (mine, _, _) in zip(
            found.payloads(), batch.payloads(), strict=True
        ):
            assert bytes(raw[at : at + length]) == bytes(mine.payload)
            assert (entry.block, entry.stamp, entry.mask, entry.encoding, entry.sum64) == (
                mine.block,
                mine.stamp,
                mine.mask,
                mine.encoding,
                mine.sum64,
            )
        assert not any(raw[PAGE_BYTES + sum(batch.lengths) :])


@pytest.mark.parametrize(
    ("sequence", "number", "journal"), [(6, 0, ID), (5, 1, ID), (5, 0, bytes(16))]
)
def test_a_batch_of_another_place_is_none(sequence: int, number: int, journal: bytes) -> None:
    assert decode_batch(written()[:PAGE_BYTES], journal, GEOMETRY, sequence, number) is None


@pytest.mark.parametrize(
    ("at", "layout", "value"),
    [
        (44, "<I", 5),  # bytes of payload
        (48, "<I", 0),  # entries
        (48, "<I", 63),
        (64, "<Q", 160),  # block beyond the volume
        (72, "<Q", 0),  # stamp
        (80, "<Q", 0),  # mask
        (88, "<B", 3),  # encoding
        (92, "<I", 65535),  # length that does not fit the mask
        (128 + 40, "<I", 4096),  # offset of the second payload
    ],
)
def test_a_batch_that_contradicts_itself_is_none(at: int, layout: str, value: int) -> None:
    assert decode_batch(sealed(written(), at, layout, value), ID, GEOMETRY, 5, 0) is None


def test_damage_is_seen() -> None:
    raw = written()[:PAGE_BYTES]
    for at in range(0, PAGE_BYTES, 31):
        raw[at] ^= 1
        assert decode_batch(raw, ID, GEOMETRY, 5, 0) is None
        raw[at] ^= 1
    assert decode_batch(None, ID, GEOMETRY, 5, 0) is None


def test_a_segment_says_which_one_it_is() -> None:
    page = bytearray(b"\xee" * PAGE_BYTES)
    encode_segment(memoryview(page), 77, ID)
    assert decode_segment(page, ID) == 77
    assert decode_segment(page, bytes(16)) is None
    assert decode_segment(None, ID) is None
    page[100] ^= 1
    assert decode_segment(page, ID) is None
    assert decode_segment(bytes(PAGE_BYTES), ID) is None
