"""Make the golden images of a journal: `python -m tests.data.make_journal_golden`.

Each stands for one way in which a journal is found.  NAME.img.gz has what is used of it, the rest
of its 64 MiB is zeros; NAME.json says what a scan finds.
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

from crc32c import crc32c

from bitmapd.errors import BitmapdError
from bitmapd.points.messages import Encoding, Entry
from bitmapd.points.pieces import digest, piece_sum
from bitmapd.receiver.commit import (
    NEVER,
    NO_FLAGS,
    CommitPage,
    Queued,
    encode_page,
    slot_offset,
)
from bitmapd.receiver.places import MIN_JOURNAL_BYTES, PAGE_BYTES, Places
from bitmapd.receiver.scan import Scanned, scan
from bitmapd.receiver.segments import Batch, encode_batch, encode_segment
from bitmapd.receiver.steps import run
from bitmapd.receiver.superblock import JournalSuperblock, Line, encode_superblock
from bitmapd.record.copies import SUPERBLOCK_OFFSETS
from bitmapd.record.geometry import Geometry
from tests.support.sim import SimDisk, SimLoop, drain

FOLDER = Path(__file__).parent / "journal"
JOURNAL = UUID("5d8f1c1e-0a3b-4c5d-8e7f-102132435465")
FOREIGN = UUID("e0e1e2e3-0000-4000-8000-000000000002")
VOLUME = UUID("7a1c6f0e-3b52-4c8d-9d6e-1f2a3b4c5d6e")
GENERATION = UUID("10000000-0000-4000-8000-00000000000a")
SENDER = bytes(range(16))
GEOMETRY = Geometry(10 << 20)
PLACES = Places(GEOMETRY, MIN_JOURNAL_BYTES)
USED_BYTES = PLACES.segment_offset(2)
LINE = Line(VOLUME, GEOMETRY, (GENERATION,), 3)


def superblock(**changes: Any) -> JournalSuperblock:
    values: dict[str, Any] = {
        "journal": JOURNAL,
        "name": "vol0",
        "journal_bytes": MIN_JOURNAL_BYTES,
        "image": "file:/srv/vol0.img",
        "image_bytes": 10 << 20,
        "created_s": 1_767_225_600,
        "updated_s": 1_767_312_000,
        "line": LINE,
        "sequence": 2,
    }
    return JournalSuperblock(**(values | changes))


def entry(block: int, stamp: int, fill: int, mask: int = 0xFFFF) -> Entry:
    raw = bytes([fill]) * 4096 * mask.bit_count()
    sum64 = piece_sum(VOLUME.bytes, block, stamp, mask, raw)
    return Entry(block, stamp, mask, Encoding.RAW, sum64, raw)


QUEUED = (entry(3, 1, 7), entry(4, 2, 8, 0x8001))
OPEN = (entry(3, 4, 9, 0x0002), entry(100, 5, 10))
ZEROS = Entry(
    9, 3, 0xFFFF, Encoding.ZEROS, piece_sum(VOLUME.bytes, 9, 3, 0xFFFF, bytes(65536)), b""
)


def batch(number: int, point: int, *entries: Entry) -> Batch:
    lengths = tuple(len(found.payload) for found in entries)
    return Batch(5, number, SENDER, point, entries, lengths)


BATCHES = (batch(0, 8, *QUEUED), batch(1, 8, ZEROS), batch(2, 9, *OPEN))


def places_of() -> list[int]:
    at = PLACES.segment_offset(1) + PAGE_BYTES
    found = []
    for one in BATCHES:
        found.append(at)
        at += one.total_bytes
    return found


AT = places_of()


def page(sequence: int, *, queue: bool) -> bytes:
    entries = [(e.block, e.stamp, e.mask, e.sum64) for e in (*QUEUED, ZEROS)]
    queued = Queued(8, SENDER, 3, digest(entries), 1_767_312_000_000_000_000)
    return encode_page(
        CommitPage(
            sequence,
            JOURNAL.bytes,
            GENERATION.bytes,
            3,
            8 if queue else 7,
            7,
            0,
            NO_FLAGS,
            (queued,) if queue else (),
            1,
            5,
            SENDER,
            1_767_312_000_000_000_000,
        )
    )


def put(image: bytearray, offset: int, raw: bytes) -> None:
    image[offset : offset + len(raw)] = raw


def dirty() -> bytearray:
    """A point is queued, and some of the next one is here."""
    image = bytearray(USED_BYTES)
    for offset in SUPERBLOCK_OFFSETS:
        put(image, offset, encode_superblock(superblock()))
    put(image, slot_offset(10), page(10, queue=False))
    put(image, slot_offset(11), page(11, queue=True))
    view = memoryview(image)
    start = PLACES.segment_offset(1)
    encode_segment(view[start : start + PAGE_BYTES], 5, JOURNAL.bytes)
    for at, one in zip(AT, BATCHES, strict=True):
        encode_batch(view[at : at + one.total_bytes], one, JOURNAL.bytes)
    return image


def fresh() -> bytearray:
    """As `dmctl receive` makes it: no sender has come."""
    image = bytearray(USED_BYTES)
    for offset in SUPERBLOCK_OFFSETS:
        put(image, offset, encode_superblock(superblock(line=None, sequence=1)))
    nil = bytes(16)
    first = CommitPage(1, JOURNAL.bytes, nil, 0, 0, 0, NEVER, NO_FLAGS, (), 0, 1, nil, 0)
    put(image, slot_offset(1), encode_page(first))
    return image


def torn_page() -> bytearray:
    """The commit page of point 8 was cut short after a sector: 7 is the last one."""
    image = dirty()
    put(image, slot_offset(11) + 512, bytes(PAGE_BYTES - 512))
    return image


def both_pages() -> bytearray:
    image = torn_page()
    image[slot_offset(10) + 60] ^= 1
    return image


def rotten_entry() -> bytearray:
    """A bit of what point 8 has for block 3 has changed; a scan does not look there."""
    image = dirty()
    image[AT[0] + PAGE_BYTES + 5000] ^= 0x10
    return image


def rotten_batch() -> bytearray:
    """The page of the second batch is damaged: nobody knows what was in it, or what follows."""
    image = dirty()
    image[AT[1] + 70] ^= 0x10
    return image


def torn_batch() -> bytearray:
    """A batch of the open point lacks its end."""
    image = dirty()
    put(image, AT[2] + BATCHES[2].total_bytes - PAGE_BYTES, bytes(PAGE_BYTES))
    return image


def leftover() -> bytearray:
    """The open point is of a process that is gone."""
    image = dirty()
    one = Batch(5, 2, bytes(reversed(SENDER)), 9, OPEN, tuple(len(e.payload) for e in OPEN))
    encode_batch(memoryview(image)[AT[2] : AT[2] + one.total_bytes], one, JOURNAL.bytes)
    return image


def foreign() -> bytearray:
    """Segments of another journal, which was here before."""
    image = dirty()
    start = PLACES.segment_offset(1)
    encode_segment(memoryview(image)[start : start + PAGE_BYTES], 5, FOREIGN.bytes)
    return image


def foreign_batch() -> bytearray:
    image = dirty()
    view = memoryview(image)[AT[1] : AT[1] + BATCHES[1].total_bytes]
    encode_batch(view, BATCHES[1], FOREIGN.bytes)
    return image


def newer() -> bytearray:
    """Version 2, with a valid checksum."""
    image = dirty()
    for offset in SUPERBLOCK_OFFSETS:
        struct.pack_into("<I", image, offset + 16, 2)
        checksum = crc32c(image[offset : offset + 4092], crc32c(b"bitmapd journal"))
        struct.pack_into("<I", image, offset + 4092, checksum)
    return image


def nothing() -> bytearray:
    return bytearray(USED_BYTES)


def images() -> dict[str, bytes]:
    makers = (
        dirty,
        fresh,
        torn_page,
        both_pages,
        rotten_entry,
        rotten_batch,
        torn_batch,
        leftover,
        foreign,
        foreign_batch,
        newer,
        nothing,
    )
    return {maker.__name__.replace("_", "-"): bytes(maker()) for maker in makers}


def disk(image: bytes) -> SimDisk:
    return SimDisk("journal", MIN_JOURNAL_BYTES, image + bytes(MIN_JOURNAL_BYTES - len(image)))


def scanned(journal: SimDisk) -> Scanned:
    """Or the error that a scan ends with."""
    ends: list[Scanned] = []

    def done(error: OSError | None, found: Scanned | None) -> None:
        assert error is None
        assert found is not None
        ends.append(found)

    run(scan(journal), done)
    drain(SimLoop(), journal)
    return ends[0]


def described(image: bytes) -> dict[str, Any]:
    try:
        found = scanned(disk(image))
    except BitmapdError as error:
        return {"error": error.to_json()}
    line = found.choice.superblock.line
    return {
        "volume": None if line is None else str(line.volume),
        "committed": found.page.committed,
        "applied": found.page.applied,
        "notes": list(found.notes),
        "points": {
            str(number): {
                "blocks": [list(pair) for pair in entries.stamps()],
                "whole": any(
                    (queued.point, queued.entries, queued.digest)
                    == (number, entries.count, entries.digest())
                    for queued in found.page.queue
                ),
            }
            for number, entries in found.points.items()
        },
        "open": [list(pair) for pair in found.open.stamps()],
        "used_segments": [segment.index for segment in found.segments if segment.points],
        "next_sequence": found.next_sequence,
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, image in images().items():
        (FOLDER / f"{name}.img.gz").write_bytes(gzip.compress(image, 9, mtime=0))
        text = json.dumps(described(image), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
