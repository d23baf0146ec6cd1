"""Commit pages: the newest valid one counts, and a crash leaves the one before."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import RecordDamagedError
from bitmapd.receiver.commit import (
    COMMIT_OFFSETS,
    MOST_QUEUED,
    CommitPage,
    PageFlag,
    Queued,
    choose_page,
    decode_page,
    encode_page,
    first_page,
    slot_offset,
)

JOURNAL = bytes(range(16, 32))
u64 = st.integers(0, (1 << 64) - 1)
ids = st.binary(min_size=16, max_size=16)


@st.composite
def pages(draw: st.DrawFn) -> CommitPage:
    applied = draw(st.integers(0, 1 << 40))
    queue = tuple(
        Queued(
            applied + 1 + number, draw(ids), draw(u64), draw(ids), draw(u64), draw(u64), draw(u64)
        )
        for number in range(draw(st.integers(0, MOST_QUEUED)))
    )
    return CommitPage(
        sequence=draw(st.integers(1, (1 << 62) - 1)),
        journal=JOURNAL,
        generation=draw(ids),
        term=draw(u64),
        committed=applied + len(queue),
        applied=applied,
        inconsistent_until=draw(u64),
        flags=PageFlag(draw(st.integers(0, 7))),
        queue=queue,
        first_segment=draw(u64),
        scan_from=draw(u64),
        size_bytes=draw(u64),
        incarnation=draw(ids),
        committed_ns=draw(u64),
    )


@given(pages())
def test_what_is_written_comes_back(page: CommitPage) -> None:
    raw = encode_page(page)
    assert len(raw) == 4096
    assert decode_page(raw, JOURNAL, page.sequence % 2) == page
    assert slot_offset(page.sequence) == COMMIT_OFFSETS[page.sequence % 2]


@given(pages(), st.integers(0, 7))
def test_a_write_that_is_cut_short_leaves_the_page_before(page: CommitPage, sectors: int) -> None:
    before = dataclasses.replace(first_page(JOURNAL), sequence=page.sequence + 1)
    torn = bytearray(4096)
    torn[: 512 * sectors] = encode_page(page)[: 512 * sectors]
    slots = [b"", b""]
    slots[page.sequence % 2] = bytes(torn)
    slots[before.sequence % 2] = encode_page(before)
    chosen, notes = choose_page(slots, JOURNAL)
    assert chosen == before
    assert len(notes) == 1


def test_the_higher_sequence_counts() -> None:
    old = dataclasses.replace(first_page(JOURNAL), sequence=4, applied=1, committed=1)
    new = dataclasses.replace(old, sequence=5, applied=2, committed=2)
    assert choose_page((encode_page(old), encode_page(new)), JOURNAL) == (new, ())
    old = dataclasses.replace(old, sequence=6)
    assert choose_page((encode_page(old), encode_page(new)), JOURNAL) == (old, ())


def sealed(page: CommitPage, at: int, layout: str, value: object) -> bytes:
    raw = bytearray(encode_page(page))
    struct.pack_into(layout, raw, at, value)
    checksum = crc32c(raw[:4092], crc32c(b"bitmapd commit page" + JOURNAL))
    struct.pack_into("<I", raw, 4092, checksum)
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (None, "cannot be read"),
        (b"", "no page"),
        (bytes(4096), "no page"),
        (encode_page(first_page(bytes(16))), "checksum"),
        (encode_page(first_page(JOURNAL))[:-1] + b"x", "checksum"),
        (sealed(first_page(JOURNAL), 56, "<Q", 1 << 63), "queue"),  # committed
        (sealed(first_page(JOURNAL), 64, "<Q", 1), "queue"),  # applied
        (sealed(first_page(JOURNAL), 8, "<Q", 0), "sequence"),
        (sealed(first_page(JOURNAL), 8, "<Q", 2), "place"),
        (sealed(first_page(JOURNAL), 16, "16s", bytes(16)), "place"),
        (sealed(first_page(JOURNAL), 84, "<I", 17), "queue"),
    ],
)
def test_what_is_no_page_of_this_place_says_why(raw: bytes | None, says: str) -> None:
    with pytest.raises(RecordDamagedError, match=says):
        decode_page(raw, JOURNAL, 1)


def test_a_page_with_more_than_it_can_name_is_refused() -> None:
    queue = tuple(Queued(number, bytes(16), 0, bytes(16), 0) for number in range(1, 17))
    page = dataclasses.replace(first_page(JOURNAL), committed=16, queue=queue)
    assert decode_page(encode_page(page), JOURNAL, 1) == page
    with pytest.raises(RecordDamagedError, match="place"):
        decode_page(sealed(page, 84, "<I", 17), JOURNAL, 1)


def test_without_a_page_the_journal_is_damaged() -> None:
    with pytest.raises(RecordDamagedError, match=r"slot 0: .*slot 1"):
        choose_page((None, bytes(4096)), JOURNAL)
