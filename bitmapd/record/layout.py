"""A stored record as a whole (pure): superblock and pages put together.

The one module the others import for the format; `superblock` (with `pair_state`) and `pages` hold
its two parts.

1. A record that cannot be trusted in some place holds *more* extents than it was given, never
   fewer: a page that is damaged counts as all ones, and bits beyond the last extent do not exist.
2. Nothing relies on a damaged page before both of its slots were written anew (`healed`): what was
   unreadable may become readable again, and then says something older than ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from bitarray import bitarray

from bitmapd.errors import BitmapdError, RecordDamagedError
from bitmapd.record.copies import SUPERBLOCK_BYTES, SUPERBLOCK_OFFSETS
from bitmapd.record.geometry import Geometry
from bitmapd.record.pages import (
    EXTENTS_PER_PAGE,
    HEAL_JUMP,
    MAX_SEQUENCE,
    ONES_PAGE,
    PAGE_BYTES,
    PAGES_OFFSET,
    PageState,
    Raw,
    Verdict,
    choose,
    encode_page,
    encode_page_into,
    page_bits,
    page_count,
    page_offset,
    record_size_bytes,
)
from bitmapd.record.pair_state import PairFlag, PairState, PartnerAck, RecordOn
from bitmapd.record.superblock import (
    NO_FLAGS,
    Incompatible,
    InitialSync,
    RecordFlag,
    Superblock,
    SuperblockChoice,
    choose_superblock,
    decode_superblock,
    encode_superblock,
    require_writable,
)

__all__ = [
    "EXTENTS_PER_PAGE",
    "NO_FLAGS",
    "ONES_PAGE",
    "PAGES_OFFSET",
    "PAGE_BYTES",
    "SUPERBLOCK_BYTES",
    "SUPERBLOCK_OFFSETS",
    "Incompatible",
    "InitialSync",
    "Loaded",
    "PageState",
    "PairFlag",
    "PairState",
    "PartnerAck",
    "Raw",
    "RecordFlag",
    "RecordOn",
    "Superblock",
    "SuperblockChoice",
    "Verdict",
    "all_ones",
    "assemble",
    "choose",
    "choose_superblock",
    "decode_superblock",
    "encode_page",
    "encode_page_into",
    "encode_superblock",
    "healed",
    "page_bits",
    "page_count",
    "page_offset",
    "record_size_bytes",
    "require_writable",
    "with_superblock",
]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A record as it was found; `bits` has one bit an extent, little bit order."""

    superblock: Superblock
    bits: bitarray
    pages: tuple[PageState, ...]
    warnings: tuple[str, ...]  # damage beside the pages, which have messages of their own
    notes: tuple[str, ...] = ()  # what a crash leaves behind
    stale_copy: int = 0  # of the superblock: the next update begins with it

    @property
    def damaged(self) -> tuple[int, ...]:
        """Pages that count as all ones."""
        return self._pages(Verdict.DAMAGED)

    @property
    def torn(self) -> tuple[int, ...]:
        return self._pages(Verdict.TORN)

    @property
    def messages(self) -> tuple[str, ...]:
        """Everything worth telling, superblock first."""
        pages = tuple(page.message for page in self.pages if page.message)
        return self.warnings + self.notes + pages

    @property
    def heal_sequence(self) -> int:
        """Sequence to heal damaged pages with: above all that may be on the medium, also in
        places that cannot be read now."""
        highest = max(page.highest for page in self.pages) + HEAL_JUMP
        if highest >= MAX_SEQUENCE:
            raise RecordDamagedError(
                "the record's sequence numbers are used up",
                hint="create the record anew with a full or checksum sync",
            )
        return highest

    def _pages(self, verdict: Verdict) -> tuple[int, ...]:
        return tuple(index for index, page in enumerate(self.pages) if page.verdict is verdict)


def assemble(choice: SuperblockChoice, slots: Iterable[tuple[Raw, Raw]]) -> Loaded:
    """`slots` yields the two slots of each page in order, `page_count` pairs."""
    superblock = choice.superblock
    volume = superblock.volume_uuid.bytes
    bits = bitarray(endian="little")
    pages: list[PageState] = []
    for index, (slot0, slot1) in enumerate(slots):
        page = choose(slot0, slot1, volume, index)
        bits.frombytes(page.bits)
        pages.append(page.state)
    if len(pages) != superblock.page_count:
        raise BitmapdError(f"{len(pages)} pages of {superblock.page_count} were given")
    del bits[superblock.geometry.extents :]
    return Loaded(superblock, bits, tuple(pages), choice.warnings, choice.notes, choice.stale_copy)


def healed(loaded: Loaded, sequence: int) -> Loaded:
    """`loaded` after both slots of every damaged page were written with `page_bits`: slot 0 with
    `sequence`, then slot 1 with `sequence + 1` and previous `sequence`."""
    state = PageState(Verdict.WHOLE, 1, sequence + 1, sequence + 1, "")
    return dataclasses.replace(
        loaded,
        pages=tuple(state if page.damaged else page for page in loaded.pages),
    )


def with_superblock(loaded: Loaded, superblock: Superblock) -> Loaded:
    """`loaded` after its superblock was replaced on the medium."""
    return dataclasses.replace(loaded, superblock=superblock)


def all_ones(geometry: Geometry) -> bitarray:
    bits = bitarray(geometry.extents, endian="little")
    bits.setall(True)
    return bits
