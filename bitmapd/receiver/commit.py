"""Commit pages: what a receiver holds (pure).

Two pages of 4 KiB, written in turn; the one with the higher sequence counts.  What it says is all
that a receiver says of itself: the newest point that is complete, how far the image is, and which
points are between the two.

1. The page of a sequence goes to the slot of its last bit, so the newest valid page is never
   written over: a write that is cut short leaves the page before it.
2. A page has one checksum, salted with the journal's UUID.  A slot without a valid page is one
   whose write was cut short.
3. Points are committed one after the other: those queued are `applied` + 1 to `committed`.
4. `incarnation` is that of the sender whose open point may be taken up.  What another one has sent
   towards a point is void from the moment that this page is durable.
5. `kept_sequence` is that of a directory of kept points that was durable before this page.
6. A point has the size that the volume had at its cut, 0 in pages of programs that had no growth:
   that of the journal's volume.
7. An image that is inconsistent although nothing is queued gets the open point in place.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bitmapd.crc import crc32c
from bitmapd.errors import RecordDamagedError
from bitmapd.receiver.places import COMMIT_OFFSETS, PAGE_BYTES
from bitmapd.record.pages import MAX_SEQUENCE, Raw

MAGIC: Final = b"BMPoint1"
MOST_QUEUED: Final = 16
NEVER: Final = 1 << 63  # inconsistent until point 1: there never was a point

_HEAD: Final = struct.Struct("<8sQ16s16sQQQQII")
_QUEUED: Final = struct.Struct("<Q16sQ16sQ")
_TAIL_AT: Final = _HEAD.size + MOST_QUEUED * _QUEUED.size
_TAIL: Final = struct.Struct("<QQ16sQQ")
_GROUPS_AT: Final = _TAIL_AT + _TAIL.size  # zeros, written by programs that knew of none
_GROUPS: Final = struct.Struct(f"<QQ{MOST_QUEUED}Q")
_SIZES_AT: Final = _GROUPS_AT + _GROUPS.size
_SIZES: Final = struct.Struct(f"<{1 + MOST_QUEUED}Q")  # of `applied`, and of those queued
_CRC: Final = struct.Struct("<I")
_CRC_AT: Final = PAGE_BYTES - 4
_SALT: Final = b"bitmapd commit page"


class PageFlag(enum.IntFlag):
    PROMOTED = 1
    PROMOTING = 2
    VIEW = 4


NO_FLAGS: Final = PageFlag(0)


@dataclass(frozen=True, slots=True)
class Queued:
    """A point that is committed and not applied; `digest` of its entries, as END had it."""

    point: int
    incarnation: bytes
    entries: int
    digest: bytes
    wall_ns: int
    group: int = 0  # number of the point in its group; 0: it is of none
    size_bytes: int = 0  # of the volume


@dataclass(frozen=True, slots=True)
class CommitPage:
    """`scan_from`: segments with a smaller sequence are free; `first_segment` is where the one of
    that sequence is.  `committed_ns`: wall time of the newest point, for people."""

    sequence: int
    journal: bytes
    generation: bytes
    term: int
    committed: int
    applied: int
    inconsistent_until: int  # 0: consistent
    flags: PageFlag
    queue: tuple[Queued, ...]  # in order
    first_segment: int
    scan_from: int
    incarnation: bytes
    committed_ns: int
    kept_sequence: int = 0
    applied_group: int = 0  # number in its group, and wall time, of the point that was applied last
    applied_ns: int = 0

    @property
    def groups(self) -> tuple[int, ...]:
        """Numbers in their group of the points that can be produced from here, in order."""
        return (self.applied_group, *(queued.group for queued in self.queue))

    def point_of(self, group: int) -> int | None:
        """Which of them has that number."""
        at = {number: self.applied + place for place, number in enumerate(self.groups)}
        return at.get(group)

    size_bytes: int = 0  # of the volume at `applied`

    @property
    def committed_bytes(self) -> int:
        """Size of the volume at the newest point."""
        return self.queue[-1].size_bytes if self.queue else self.size_bytes

    @property
    def in_place(self) -> bool:
        """Whether what is received goes into the image at once."""
        return bool(self.inconsistent_until) and not self.queue

    @property
    def fault(self) -> str | None:
        """Why this cannot be."""
        if not 0 < self.sequence <= MAX_SEQUENCE:
            return f"its sequence is {self.sequence}"
        queued = [queued.point for queued in self.queue]
        if queued != [self.applied + 1 + number for number in range(len(queued))] or (
            self.committed != self.applied + len(queued)
        ):
            return f"points {self.applied} to {self.committed} and its queue differ"
        return None


def first_page(journal: bytes) -> CommitPage:
    """Of a journal that was just made."""
    nil = bytes(16)
    return CommitPage(1, journal, nil, 0, 0, 0, NEVER, NO_FLAGS, (), 0, 1, nil, 0)


def slot_offset(sequence: int) -> int:
    """Where the page of this sequence is written."""
    return COMMIT_OFFSETS[sequence % 2]


def encode_page(page: CommitPage) -> bytes:
    raw = bytearray(PAGE_BYTES)
    _HEAD.pack_into(
        raw,
        0,
        MAGIC,
        page.sequence,
        page.journal,
        page.generation,
        page.term,
        page.committed,
        page.applied,
        page.inconsistent_until,
        page.flags,
        len(page.queue),
    )
    for number, queued in enumerate(page.queue):
        values = dataclasses.astuple(queued)[:-2]
        _QUEUED.pack_into(raw, _HEAD.size + number * _QUEUED.size, *values)
    _TAIL.pack_into(
        raw,
        _TAIL_AT,
        page.first_segment,
        page.scan_from,
        page.incarnation,
        page.committed_ns,
        page.kept_sequence,
    )
    groups = [queued.group for queued in page.queue]
    groups += [0] * (MOST_QUEUED - len(groups))
    _GROUPS.pack_into(raw, _GROUPS_AT, page.applied_group, page.applied_ns, *groups)
    sizes = [page.size_bytes, *(queued.size_bytes for queued in page.queue)]
    _SIZES.pack_into(raw, _SIZES_AT, *sizes, *([0] * (1 + MOST_QUEUED - len(sizes))))
    _CRC.pack_into(raw, _CRC_AT, _checksum(raw, page.journal))
    return bytes(raw)


def decode_page(raw: Raw, journal: bytes, slot: int) -> CommitPage:
    """RecordDamagedError says what is wrong."""
    if raw is None:
        raise RecordDamagedError("it cannot be read")
    if len(raw) != PAGE_BYTES or bytes(raw[:8]) != MAGIC:
        raise RecordDamagedError("there is no page")
    (stored,) = _CRC.unpack_from(raw, _CRC_AT)
    if stored != _checksum(raw, journal):
        raise RecordDamagedError("its checksum is wrong")
    _, sequence, owner, generation, term, committed, applied, until, flags, count = (
        _HEAD.unpack_from(raw)
    )
    first_segment, scan_from, incarnation, committed_ns, kept_sequence = _TAIL.unpack_from(
        raw, _TAIL_AT
    )
    applied_group, applied_ns, *groups = _GROUPS.unpack_from(raw, _GROUPS_AT)
    size_bytes, *sizes = _SIZES.unpack_from(raw, _SIZES_AT)
    queue = tuple(
        dataclasses.replace(
            Queued(*_QUEUED.unpack_from(raw, _HEAD.size + number * _QUEUED.size)),
            group=groups[number],
            size_bytes=sizes[number],
        )
        for number in range(min(count, MOST_QUEUED))
    )
    page = CommitPage(
        sequence,
        owner,
        generation,
        term,
        committed,
        applied,
        until,
        PageFlag(flags),
        queue,
        first_segment,
        scan_from,
        incarnation,
        committed_ns,
        kept_sequence,
        applied_group,
        applied_ns,
        size_bytes,
    )
    fault = page.fault
    if fault is None and (count != len(queue) or sequence % 2 != slot or owner != journal):
        fault = "its fields are not those of this place"
    if fault is not None:
        raise RecordDamagedError(f"it contradicts itself: {fault}")
    return page


def choose_page(slots: Sequence[Raw], journal: bytes) -> tuple[CommitPage, tuple[str, ...]]:
    """The page of two slots that counts, and what is worth telling."""
    pages: list[CommitPage] = []
    faults: list[str] = []
    for slot, raw in enumerate(slots):
        try:
            pages.append(decode_page(raw, journal, slot))
        except RecordDamagedError as error:
            faults.append(f"commit page, slot {slot}: {error.message}")
    if not pages:
        raise RecordDamagedError(
            "; ".join(faults),
            hint="the journal cannot be trusted: remove the receiver and make it anew",
        )
    return max(pages, key=lambda page: page.sequence), tuple(faults)


def page_figures(page: CommitPage) -> dict[str, Any]:
    """The keys of `receiver` that a commit page alone tells; the others are null."""
    until = page.inconsistent_until
    return {
        "role": "promoted" if page.flags & PageFlag.PROMOTED else "receiver",
        "committed": page.committed,
        "committed_timestamp_seconds": page.committed_ns / 1e9 if page.committed_ns else None,
        "applied": page.applied,
        "queued_bytes": None,
        "journal_bytes": None,
        "journal_limit_bytes": None,
        "in_place_until": until if page.in_place and page.committed else None,
        "consistent": "never" if until == NEVER else "no" if until else "yes",
        "kept": [],
        "view": None,
    }


def _checksum(raw: bytes | bytearray | memoryview, journal: bytes) -> int:
    return int(crc32c(raw[:_CRC_AT], crc32c(_SALT + journal)))
