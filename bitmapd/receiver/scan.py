"""Reading a journal at the start (pure but for the `Device` it is given).

1. Of segments and batches only the pages are read: what was committed was durable before, and its
   payloads are verified before they are applied.
2. The open point is what its sender may be told to leave out.  Its payloads may never have become
   durable, so they are read and verified; the first that is wrong ends its segment.
3. Batches count for the points that the commit page names as queued, and for the one after
   `committed` if they are of the incarnation that it names.  All others are leftovers.
4. Sequences of segments go on above every one that may be on the medium, also of segments whose
   first page never became durable: a run uses fewer between two commits than the journal has
   segments.
5. A flush follows: what was read may have been written by a process that died before it was
   durable, and from now on others rely on it.

What cannot be read is as if it had never been written; a committed point that lacks entries then is
found out by its count and digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bitmapd.errors import NotFoundError, RecordDamagedError
from bitmapd.media.base import Device
from bitmapd.media.buffers import aligned
from bitmapd.peer.frames import PeerError
from bitmapd.points.codec import with_payload
from bitmapd.points.pieces import Unpacker
from bitmapd.receiver.commit import CommitPage, choose_page
from bitmapd.receiver.directory import Directory, choose_directory
from bitmapd.receiver.entries import Entries, Kept, kept
from bitmapd.receiver.places import (
    COMMIT_OFFSETS,
    DIRECTORY_BYTES,
    DIRECTORY_OFFSETS,
    PAGE_BYTES,
    Places,
)
from bitmapd.receiver.segments import Batch, decode_batch, decode_segment
from bitmapd.receiver.steps import Steps, together
from bitmapd.receiver.superblock import JournalSuperblock, choose_superblock
from bitmapd.record.copies import SUPERBLOCK_OFFSETS, Choice

AT_ONCE: Final = 64  # pages that are read side by side


@dataclass(slots=True)
class Segment:
    """`points`: those with a batch in it that are not applied or dropped; none: it is free."""

    index: int
    sequence: int = 0
    points: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Scanned:
    """What is in a journal.  `points`: of those that are queued, by number."""

    choice: Choice[JournalSuperblock]
    page: CommitPage
    notes: tuple[str, ...]
    segments: list[Segment] = field(default_factory=list)
    points: dict[int, Entries] = field(default_factory=dict)
    open: Entries = field(default_factory=Entries)
    next_sequence: int = 1
    directory: Directory = field(default_factory=Directory)


def read(device: Device, offset_bytes: int, length_bytes: int) -> Steps[memoryview | None]:
    """What is there; None if the medium does not give it."""
    buffer = aligned(length_bytes)
    try:
        yield partial(device.read, offset_bytes, buffer)
    except OSError:
        return None
    return buffer


def scan(device: Device) -> Steps[Scanned]:
    """NotFoundError if there is no journal, RecordDamagedError or FormatTooNewError if it cannot be
    used.  OSError if its flush fails."""
    copies = []
    for offset in SUPERBLOCK_OFFSETS:
        copies.append((yield from read(device, offset, PAGE_BYTES)))
    choice = choose_superblock(*copies)
    if choice is None:
        raise NotFoundError(
            f"there is no journal on {device.name}", hint="'dmctl receive' makes one"
        )
    size_bytes = choice.superblock.journal_bytes
    if size_bytes > device.size_bytes:
        raise RecordDamagedError(
            f"{device.name} has {device.size_bytes} bytes; the journal on it was made with"
            f" {size_bytes}",
            hint="give it its size back, or make the receiver anew",
        )
    pages: list[memoryview | None] = []
    for offset in COMMIT_OFFSETS:
        pages.append((yield from read(device, offset, PAGE_BYTES)))
    page, faults = choose_page(pages, choice.superblock.journal.bytes)
    slots: list[memoryview | None] = []
    for offset in DIRECTORY_OFFSETS:
        slots.append((yield from read(device, offset, DIRECTORY_BYTES)))
    journal = choice.superblock.journal.bytes
    directory, lost = choose_directory(slots, journal, page.kept_sequence)
    notes = choice.warnings + choice.notes + faults + lost
    found = Scanned(choice, page, notes, directory=directory)
    line = choice.superblock.line
    if line is not None:
        places = Places(line.geometry, choice.superblock.journal_bytes)
        yield from _segments(device, found, places, Unpacker(line.geometry, line.volume.bytes))
    yield device.flush
    return found


def _segments(device: Device, found: Scanned, places: Places, unpacker: Unpacker) -> Steps[None]:
    page, journal = found.page, found.page.journal
    found.points = {queued.point: Entries() for queued in page.queue}
    found.segments = [Segment(index) for index in range(places.segments)]
    for at in range(0, len(found.segments), AT_ONCE):
        group = found.segments[at : at + AT_ONCE]
        offsets = [places.segment_offset(segment.index) for segment in group]
        pages = yield from pages_at(device, offsets)
        for segment, raw in zip(group, pages, strict=True):
            segment.sequence = decode_segment(raw, journal) or 0
    highest = max(segment.sequence for segment in found.segments)
    found.next_sequence = max(highest, page.scan_from) + places.segments + 1
    for segment in sorted(found.segments, key=lambda segment: segment.sequence):
        if segment.sequence >= page.scan_from:
            yield from _batches(device, found, places, unpacker, segment)


def pages_at(device: Device, offsets: Sequence[int]) -> Steps[list[memoryview | None]]:
    """The pages there, at most `AT_ONCE` of them; one after another takes a disk half an hour for a
    journal of 1 TiB."""
    buffer = aligned(len(offsets) * PAGE_BYTES)
    pages = [buffer[at : at + PAGE_BYTES] for at in range(0, len(buffer), PAGE_BYTES)]
    try:
        yield together([partial(device.read, *place) for place in zip(offsets, pages, strict=True)])
    except OSError:
        found = []
        for offset in offsets:
            found.append((yield from read(device, offset, PAGE_BYTES)))
        return found
    return list(pages)


def _batches(
    device: Device, found: Scanned, places: Places, unpacker: Unpacker, segment: Segment
) -> Steps[None]:
    """Take in what one segment has."""
    page = found.page
    queued = {queued.point: queued.incarnation for queued in page.queue}
    start = places.segment_offset(segment.index)
    at, number = PAGE_BYTES, 0
    while at + PAGE_BYTES <= places.segment_bytes:
        raw = yield from read(device, start + at, PAGE_BYTES)
        batch = decode_batch(raw, page.journal, places.geometry, segment.sequence, number)
        if batch is None or at + batch.total_bytes > places.segment_bytes:
            return
        entries: Entries | None = None
        if queued.get(batch.point) == batch.incarnation:
            entries = found.points[batch.point]
        elif (batch.point, batch.incarnation) == (page.committed + 1, page.incarnation):
            whole = yield from read(device, start + at, batch.total_bytes)
            if whole is None or not _is_whole(batch, whole, unpacker):
                return
            entries = found.open
        if entries is not None:
            segment.points.add(batch.point)
            for line in kept_entries(batch, start + at):
                entries.add(line)
        at += batch.total_bytes
        number += 1


def kept_entries(batch: Batch, place_bytes: int) -> list[Kept]:
    """Its entries, when the batch is at this place of the journal."""
    return [kept(entry, place_bytes + at, length) for entry, at, length in batch.payloads()]


def _is_whole(batch: Batch, raw: memoryview, unpacker: Unpacker) -> bool:
    for entry, at, length in batch.payloads():
        try:
            unpacker.unpack(with_payload(entry, raw[at : at + length]))
        except PeerError:
            return False
    return True
