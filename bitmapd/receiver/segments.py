"""Segments and batches: what was received, before it is in the image (pure).

A segment is 4 MiB: a page that says which one it is, then batches.  A batch is a page with up to 62
entries and their payloads behind it, packed, and is written at once.

1. Each use of a segment has a sequence of its own, higher than all before, and its batches repeat
   it with a number of their own: what an older use has left is never taken for a part of this one.
2. A batch that is not what its place says ends its segment: where the next one would be is known
   only from the one before.
3. Page checksums are salted with the journal's UUID; payloads are held by the sums of their
   entries.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bitmapd.crc import crc32c
from bitmapd.peer.frames import PeerError
from bitmapd.points.codec import ENTRY, MAX_ENTRIES, read_entry
from bitmapd.points.messages import Entry
from bitmapd.receiver.places import PAGE_BYTES, padded
from bitmapd.record.geometry import Geometry
from bitmapd.record.pages import Raw

SEGMENT_MAGIC: Final = b"BMPseg01"
BATCH_MAGIC: Final = b"BMPbat01"

_SEGMENT: Final = struct.Struct("<8sQ16s")
_BATCH: Final = struct.Struct("<8sQ16sQIII")
_ENTRIES_AT: Final = 64
_ENTRY_BYTES: Final = 64  # as on the wire, offset of the payload, reserve
_OFFSET: Final = struct.Struct("<I")
_ZERO: Final = bytes(3)
_CRC: Final = struct.Struct("<I")
_CRC_AT: Final = PAGE_BYTES - 4
_SEGMENT_SALT: Final = b"bitmapd segment"
_BATCH_SALT: Final = b"bitmapd batch"


@dataclass(frozen=True, slots=True)
class Batch:
    """What the page of a batch says; `number` counts from 0 in its segment.  `entries` are without
    their payloads, of which `lengths` has the bytes."""

    sequence: int
    number: int
    incarnation: bytes
    point: int
    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return PAGE_BYTES + padded(sum(self.lengths))

    def payloads(self) -> Iterator[tuple[Entry, int, int]]:
        """Each entry, where its payload is from the batch's first byte on, and how long it is."""
        at = PAGE_BYTES
        for entry, length in zip(self.entries, self.lengths, strict=True):
            yield entry, at, length
            at += length


def encode_segment(page: memoryview, sequence: int, journal: bytes) -> None:
    """Fill the first page of a segment."""
    page[:] = bytes(PAGE_BYTES)
    _SEGMENT.pack_into(page, 0, SEGMENT_MAGIC, sequence, journal)
    _CRC.pack_into(page, _CRC_AT, _checksum(page, _SEGMENT_SALT, journal))


def decode_segment(raw: Raw, journal: bytes) -> int | None:
    """The sequence of a segment; None if there is none of this journal."""
    if raw is None or bytes(raw[:8]) != SEGMENT_MAGIC:
        return None
    _, sequence, owner = _SEGMENT.unpack_from(raw)
    (stored,) = _CRC.unpack_from(raw, _CRC_AT)
    if stored != _checksum(raw, _SEGMENT_SALT, journal) or owner != journal:
        return None
    return int(sequence)


def encode_batch(buffer: memoryview, batch: Batch, journal: bytes) -> None:
    """Fill the `total_bytes` of a batch whose entries have their payloads."""
    buffer[:PAGE_BYTES] = bytes(PAGE_BYTES)
    _BATCH.pack_into(
        buffer,
        0,
        BATCH_MAGIC,
        batch.sequence,
        batch.incarnation,
        batch.point,
        batch.number,
        sum(batch.lengths),
        len(batch.entries),
    )
    end = PAGE_BYTES
    for index, (entry, at, length) in enumerate(batch.payloads()):
        place = _ENTRIES_AT + index * _ENTRY_BYTES
        ENTRY.pack_into(
            buffer,
            place,
            entry.block,
            entry.stamp,
            entry.mask,
            entry.encoding,
            _ZERO,
            length,
            entry.sum64,
        )
        _OFFSET.pack_into(buffer, place + ENTRY.size, at - PAGE_BYTES)
        end = at + length
        buffer[at:end] = entry.payload
    buffer[end:] = bytes(len(buffer) - end)
    page = buffer[:PAGE_BYTES]
    _CRC.pack_into(page, _CRC_AT, _checksum(page, _BATCH_SALT, journal))


def decode_batch(
    raw: Raw, journal: bytes, geometry: Geometry, sequence: int, number: int
) -> Batch | None:
    """What the page of batch `number` says; None if it is not one, or makes no sense."""
    if raw is None or bytes(raw[:8]) != BATCH_MAGIC:
        return None
    (stored,) = _CRC.unpack_from(raw, _CRC_AT)
    if stored != _checksum(raw, _BATCH_SALT, journal):
        return None
    _, found_sequence, incarnation, point, found_number, payload_bytes, count = _BATCH.unpack_from(
        raw
    )
    if (found_sequence, found_number) != (sequence, number) or not 0 < count <= MAX_ENTRIES:
        return None
    entries: list[Entry] = []
    lengths: list[int] = []
    page = memoryview(raw)
    for index in range(count):
        place = _ENTRIES_AT + index * _ENTRY_BYTES
        (offset,) = _OFFSET.unpack_from(raw, place + ENTRY.size)
        try:
            entry, length, _ = read_entry(page, place, geometry, has_grown=True)
        except PeerError:
            return None
        if offset != sum(lengths):
            return None
        entries.append(entry)
        lengths.append(length)
    if sum(lengths) != payload_bytes:
        return None
    return Batch(sequence, number, incarnation, point, tuple(entries), tuple(lengths))


def _checksum(raw: bytes | bytearray | memoryview, salt: bytes, journal: bytes) -> int:
    return int(crc32c(raw[:_CRC_AT], crc32c(salt + journal)))
