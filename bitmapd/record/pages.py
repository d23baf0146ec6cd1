"""Bitmap pages on the medium, and which of a page's two slots counts (pure).

A page is 4 KiB and stands in two alternating slots.  Offsets and tables are in docs/format.md.

1. Each of the eight 512-byte sectors of a page proves itself: it carries a sequence, its number and
   a crc32c that is salted with the volume's UUID and the page's index, so a sector of another
   page or another volume is not valid here.
2. A page is written to the slot that is not the newest, with a sequence above every one that was
   ever tried on this page, and it names the sequence it supersedes (`previous`).  A write that
   failed or was torn is tried again in the same slot with a *higher* sequence: a number that was
   used before a crash would let sectors of two attempts pass for one whole page, and the first
   attempt may lack extents that have been relied upon since.
3. A slot is whole if its eight sectors are valid and of one sequence.  Two whole slots count only
   if the newer one names the older one as its predecessor: a lost write breaks that chain.  One
   whole slot beside a slot whose sectors are all valid but mixed is a write cut short by a power
   cut; that write was never acknowledged, so the whole slot is the truth.
4. Anything else cannot be told from a slot that held the newer truth and lost it: the page counts
   as all ones (`Verdict.DAMAGED`), with a message.
5. A damaged page is *healed* before anything relies on it: both slots are written with ones, with
   sequences further above all older ones (`HEAL_JUMP`) than a retry can be (`RETRY_WINDOW`).  A
   power cut in mid-heal therefore never looks like an ordinary torn write, and a sector that was
   unreadable only for a while cannot bring an older truth back.

What the writer owes in return: an extent counts as recorded only while it is set in the newest
durable content *and* in every content that was submitted since, because a write that failed may
be on the medium in whole or in part.  What a crash leaves behind: a page in its old or its new
state.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from bitarray import bitarray

from bitmapd.crc import crc32c

PAGE_BYTES: Final = 4096
SECTOR_BYTES: Final = 512
SECTORS: Final = PAGE_BYTES // SECTOR_BYTES
PAGES_OFFSET: Final = 131072

PAGE_HEADER: Final = struct.Struct("<4sI16sQ")  # magic, index, volume UUID, previous sequence
TRAILER: Final = struct.Struct("<QII")  # sequence, sector number, crc32c of the 508 bytes before
PAGE_MAGIC: Final = b"BMPg"
TRAILER_AT: Final = SECTOR_BYTES - TRAILER.size
CRC_AT: Final = SECTOR_BYTES - 4
PAGE_PAYLOAD_BYTES: Final = SECTORS * TRAILER_AT - PAGE_HEADER.size
EXTENTS_PER_PAGE: Final = PAGE_PAYLOAD_BYTES * 8
ONES_PAGE: Final = b"\xff" * PAGE_PAYLOAD_BYTES

MAX_SEQUENCE: Final = 1 << 62
RETRY_WINDOW: Final = 1 << 16
HEAL_JUMP: Final = 1 << 32

_CRC: Final = struct.Struct("<I")
_PAGE_SALT: Final = b"bitmapd page"
_NOTHING: Final = (0,) * SECTORS

# Payload of sector i: where it starts in the page, and which part of the page's bits it holds.
_PIECES: Final = tuple(
    (
        sector,
        sector * SECTOR_BYTES + (PAGE_HEADER.size if sector == 0 else 0),
        sector * SECTOR_BYTES + TRAILER_AT,
        max(0, sector * TRAILER_AT - PAGE_HEADER.size),
        (sector + 1) * TRAILER_AT - PAGE_HEADER.size,
    )
    for sector in range(SECTORS)
)

Raw = bytes | bytearray | memoryview | None  # None: the medium would not give it


class Verdict(enum.Enum):
    WHOLE = "whole"
    TORN = "torn"  # a write was cut short; the slot before it is whole and is used
    DAMAGED = "damaged"  # counts as all ones


def page_count(extents: int) -> int:
    return -(-extents // EXTENTS_PER_PAGE)


def page_offset(index: int, slot: int) -> int:
    return PAGES_OFFSET + (2 * index + slot) * PAGE_BYTES


def record_size_bytes(extents: int) -> int:
    """What the record device must hold."""
    return page_offset(page_count(extents), 0)


def page_bits(bits: bitarray, index: int) -> bytes:
    """What `encode_page` wants for a page; short for the last one."""
    start = index * EXTENTS_PER_PAGE
    return bits[start : start + EXTENTS_PER_PAGE].tobytes()


def encode_page_into(
    page: memoryview, volume: bytes, index: int, sequence: int, previous: int, bits: bytes
) -> None:
    """Fill the 4096 bytes of `page`; `previous` is the sequence of the slot that stays behind.

    `bits` may be shorter than a page's payload (the last page); the rest is zeros.
    """
    if len(bits) != PAGE_PAYLOAD_BYTES:
        if len(bits) > PAGE_PAYLOAD_BYTES:
            raise ValueError(f"a page holds {PAGE_PAYLOAD_BYTES} bytes of bits, not {len(bits)}")
        bits = bits.ljust(PAGE_PAYLOAD_BYTES, b"\0")
    PAGE_HEADER.pack_into(page, 0, PAGE_MAGIC, index, volume, previous)
    seed = page_seed(volume, index)
    pack_trailer = TRAILER.pack_into
    pack_crc = _CRC.pack_into
    for sector, start, end, first, stop in _PIECES:
        page[start:end] = bits[first:stop]
        pack_trailer(page, end, sequence, sector, 0)
        at = end + TRAILER.size
        pack_crc(page, at - 4, crc32c(page[at - SECTOR_BYTES : at - 4], seed))


def encode_page(volume: bytes, index: int, sequence: int, previous: int, bits: bytes) -> bytes:
    page = bytearray(PAGE_BYTES)
    encode_page_into(memoryview(page), volume, index, sequence, previous, bits)
    return bytes(page)


def page_seed(volume: bytes, index: int) -> int:
    return int(crc32c(_PAGE_SALT + volume + index.to_bytes(4, "little")))


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot as read: the sequence of each sector (0: not valid) and, if whole, its content."""

    sequences: tuple[int, ...]
    previous: int
    bits: bytes
    fault: str  # empty if every sector is valid

    @property
    def whole(self) -> bool:
        return not self.fault and len(set(self.sequences)) == 1

    @property
    def sequence(self) -> int:
        """Of a whole slot; the highest valid one otherwise."""
        return max(self.sequences)


def decode_slot(raw: Raw, volume: bytes, index: int) -> Slot:
    """Never raises: what is wrong is in `fault`."""
    if raw is None:
        return Slot(_NOTHING, 0, b"", "cannot be read")
    if len(raw) != PAGE_BYTES:
        return Slot(_NOTHING, 0, b"", f"is cut short after {len(raw)} bytes")
    page = memoryview(raw)
    seed = page_seed(volume, index)
    magic, header_index, header_volume, previous = PAGE_HEADER.unpack_from(page)
    header_valid = (magic, header_index, header_volume) == (PAGE_MAGIC, index, volume)
    sequences = []
    for sector in range(SECTORS):
        start = sector * SECTOR_BYTES
        sequence, number, stored = TRAILER.unpack_from(page, start + TRAILER_AT)
        valid = (
            stored == crc32c(page[start : start + CRC_AT], seed)
            and number == sector
            and 0 < sequence <= MAX_SEQUENCE
            and (sector != 0 or (header_valid and previous < sequence))
        )
        sequences.append(sequence if valid else 0)
    if 0 in sequences:
        return Slot(tuple(sequences), 0, b"", _slot_fault(page, sequences, volume, index))
    bits = b"".join([page[start:end] for _, start, end, _, _ in _PIECES])
    return Slot(tuple(sequences), previous, bits, "")


def _slot_fault(page: memoryview, sequences: list[int], volume: bytes, index: int) -> str:
    if not any(page):
        return "is blank"
    magic, other_index, other, _ = PAGE_HEADER.unpack_from(page)
    (stored,) = _CRC.unpack_from(page, CRC_AT)
    if (
        magic == PAGE_MAGIC
        and (other, other_index) != (volume, index)
        and stored == crc32c(page[:CRC_AT], page_seed(other, other_index))
    ):
        return f"holds page {other_index} of volume {UUID(bytes=other)}"
    bad = [str(sector) for sector, sequence in enumerate(sequences) if not sequence]
    return f"has damaged sectors: {', '.join(bad)}"


@dataclass(frozen=True, slots=True)
class PageState:
    """Where a page stands.  Its next write goes to slot `1 - newest_slot` with sequence
    `highest + 1` and previous `sequence`; a damaged page must be healed first."""

    verdict: Verdict
    newest_slot: int
    sequence: int  # of the newest slot; 0 if damaged
    highest: int  # highest sequence found in either slot
    message: str  # empty if whole

    @property
    def damaged(self) -> bool:
        return self.verdict is Verdict.DAMAGED


@dataclass(frozen=True, slots=True)
class PageChoice:
    state: PageState
    bits: bytes


def choose(slot0: Raw, slot1: Raw, volume: bytes, index: int) -> PageChoice:
    """Which content of a page counts; the rules are in the module docstring."""
    slots = (decode_slot(slot0, volume, index), decode_slot(slot1, volume, index))
    highest = max(slot.sequence for slot in slots)
    extents = f"page {index} (extents from {index * EXTENTS_PER_PAGE})"
    newest = 0 if slots[0].whole and not (slots[1].whole and _newer(slots[1], slots[0])) else 1
    kept, other = slots[newest], slots[1 - newest]
    if kept.whole and other.whole:
        if kept.previous == other.sequence:
            state = PageState(Verdict.WHOLE, newest, kept.sequence, highest, "")
            return PageChoice(state, kept.bits)
        fault = (
            f"slots 0 and 1 are at sequences {slots[0].sequence} and {slots[1].sequence}, which"
            " do not follow one another"
        )
    elif kept.whole and not other.fault:
        if all(
            sequence == kept.previous or 0 < sequence - kept.sequence < RETRY_WINDOW
            for sequence in other.sequences
        ):
            message = (
                f"{extents}: a write of slot {1 - newest} was cut short; slot {newest} is whole"
                " and is used"
            )
            state = PageState(Verdict.TORN, newest, kept.sequence, highest, message)
            return PageChoice(state, kept.bits)
        fault = f"the sectors of slot {1 - newest} do not follow those of slot {newest}"
    else:
        fault = "; ".join(
            f"slot {number} {slot.fault or 'is torn'}"
            for number, slot in enumerate(slots)
            if not slot.whole
        )
    message = f"{extents}: {fault}; it counts as all ones"
    return PageChoice(PageState(Verdict.DAMAGED, 0, 0, highest, message), ONES_PAGE)


def _newer(one: Slot, other: Slot) -> bool:
    return one.sequence > other.sequence
