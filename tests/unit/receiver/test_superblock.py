"""The superblock of a journal: what is refused, and what comes back as it was."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any
from uuid import UUID

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import FormatTooNewError, NoSpaceError, RecordDamagedError, UsageError
from bitmapd.receiver.places import (
    COMMIT_OFFSETS,
    DIRECTORY_BYTES,
    DIRECTORY_OFFSETS,
    MAPS_OFFSET,
    MIN_JOURNAL_BYTES,
    PAGE_BYTES,
    SEGMENT_BYTES,
    Places,
)
from bitmapd.receiver.superblock import (
    JournalSuperblock,
    Line,
    choose_superblock,
    decode_superblock,
    encode_superblock,
    has_magic,
)
from bitmapd.record.copies import SUPERBLOCK_OFFSETS
from bitmapd.record.geometry import Geometry
from tests.data.make_journal_golden import GENERATION, LINE, VOLUME, superblock

uuids = st.builds(UUID, int=st.integers(1, (1 << 128) - 1))
texts = st.text(st.characters(max_codepoint=0x2FF), max_size=40).filter(str.isprintable)
u63 = st.integers(0, (1 << 63) - 1)
lines = st.builds(
    Line,
    uuids,
    st.builds(Geometry, st.integers(1, 1 << 44)),
    st.lists(uuids, min_size=1, max_size=4).map(tuple),
    u63,
)
superblocks = st.builds(
    JournalSuperblock,
    journal=uuids,
    name=texts.filter(lambda text: 0 < len(text.encode()) <= 64),
    journal_bytes=u63,
    image=texts,
    image_bytes=u63,
    created_s=u63,
    updated_s=u63,
    line=st.none() | lines,
    sequence=st.integers(0, 1 << 62),
)


def patched(at: int, layout: str, value: Any) -> bytes:
    image = bytearray(encode_superblock(superblock()))
    struct.pack_into(layout, image, at, value)
    struct.pack_into("<I", image, 4092, crc32c(image[:4092], crc32c(b"bitmapd journal")))
    return bytes(image)


@given(superblocks)
def test_what_is_written_comes_back(block: JournalSuperblock) -> None:
    raw = encode_superblock(block)
    assert len(raw) == PAGE_BYTES
    assert has_magic(raw)
    assert decode_superblock(raw) == block


def test_an_update_has_the_next_sequence() -> None:
    after = superblock(line=None).updated(5, line=LINE)
    assert (after.sequence, after.updated_s, after.line) == (3, 5, LINE)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "a" * 65},
        {"name": "a\nb"},
        {"name": "\ud800"},
        {"image": "x" * 256},
        {"journal": UUID(int=0)},
        {"sequence": (1 << 62) + 1},
        {"image_bytes": -1},
    ],
)
def test_what_cannot_be_written_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        superblock(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"generations": ()},
        {"generations": (GENERATION,) * 5},
        {"generations": (UUID(int=0),)},
        {"volume": UUID(int=0)},
        {"term": 1 << 63},
    ],
)
def test_a_line_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(LINE, **changes)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (patched(160, "<I", 3), RecordDamagedError),  # extent size
        (patched(16, "<I", 0), RecordDamagedError),  # version
        (patched(88, "16s", bytes(16)), RecordDamagedError),  # its only generation
        (patched(16, "<I", 2), FormatTooNewError),
        (patched(24, "<Q", 1), FormatTooNewError),
        (b"", RecordDamagedError),
        (None, RecordDamagedError),
    ],
)
def test_what_contradicts_itself_is_damaged(raw: bytes | None, error: type[Exception]) -> None:
    with pytest.raises(error):
        decode_superblock(raw)


def test_the_newer_of_two_copies_of_one_journal_counts() -> None:
    old, new = superblock(line=None, sequence=1), superblock()
    choice = choose_superblock(encode_superblock(old), encode_superblock(new))
    assert choice is not None
    assert (choice.superblock, choice.stale_copy) == (new, 0)
    other = superblock(journal=VOLUME)
    with pytest.raises(RecordDamagedError, match="different journals"):
        choose_superblock(encode_superblock(other), encode_superblock(new))
    assert choose_superblock(bytes(4096), bytes(4096)) is None


def test_places_do_not_overlap() -> None:
    places = Places(Geometry(1 << 40), 10 << 30)
    assert COMMIT_OFFSETS[1] + PAGE_BYTES <= MAPS_OFFSET == places.map_offset(0)
    assert SUPERBLOCK_OFFSETS[0] + PAGE_BYTES == DIRECTORY_OFFSETS[0]
    assert DIRECTORY_OFFSETS[0] + DIRECTORY_BYTES <= SUPERBLOCK_OFFSETS[1]
    assert SUPERBLOCK_OFFSETS[1] + PAGE_BYTES == DIRECTORY_OFFSETS[1]
    assert DIRECTORY_OFFSETS[1] + DIRECTORY_BYTES <= COMMIT_OFFSETS[0]
    assert places.map_bytes * 8 >= places.geometry.extents
    assert places.maps >= 63
    assert places.map_offset(places.maps) <= places.segments_offset
    assert places.segments_offset % (1 << 20) == 0
    assert places.segment_offset(places.segments) <= 10 << 30
    assert places.segment_offset(places.segments) + SEGMENT_BYTES > 10 << 30


@pytest.mark.parametrize(
    ("size_bytes", "journal_bytes"),
    [(1 << 30, MIN_JOURNAL_BYTES - 1), (16 << 40, MIN_JOURNAL_BYTES), (1 << 30, 0)],
)
def test_a_journal_that_is_too_small_is_refused(size_bytes: int, journal_bytes: int) -> None:
    with pytest.raises(NoSpaceError) as caught:
        Places(Geometry(size_bytes), journal_bytes)
    least = int((caught.value.hint or "").split()[2])
    assert Places(Geometry(size_bytes), least).segments >= 8
