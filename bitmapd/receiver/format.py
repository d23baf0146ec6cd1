"""Making a journal, and looking at one that nobody uses (edge; blocks).

A journal is made in this order, each step durable before the next: old superblocks, commit pages
and directories are taken away, the first commit page is written, then the superblocks.  A crash
leaves no journal, or the new one.  What was in it before has another salt.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from bitmapd.errors import FormatTooNewError, NotFoundError, RecordDamagedError
from bitmapd.receiver.commit import CommitPage, choose_page, encode_page, first_page, slot_offset
from bitmapd.receiver.directory import Directory, choose_directory
from bitmapd.receiver.places import (
    COMMIT_OFFSETS,
    DIRECTORY_BYTES,
    DIRECTORY_OFFSETS,
    PAGE_BYTES,
)
from bitmapd.receiver.superblock import JournalSuperblock, choose_superblock, encode_superblock
from bitmapd.record.copies import SUPERBLOCK_OFFSETS, Choice
from bitmapd.record.medium import Reader, RecordMedium


def format_journal(path: str | Path, superblock: JournalSuperblock) -> None:
    """BusyError if a process uses it.  Whatever was there is gone."""
    buffer = memoryview(mmap.mmap(-1, PAGE_BYTES))
    with RecordMedium.open(path) as medium:
        medium.lock()
        for offset_bytes in (*SUPERBLOCK_OFFSETS, *COMMIT_OFFSETS, *DIRECTORY_OFFSETS):
            medium.write(offset_bytes, buffer, os.RWF_DSYNC)
        page = first_page(superblock.journal.bytes)
        buffer[:] = encode_page(page)
        medium.write(slot_offset(page.sequence), buffer, os.RWF_DSYNC)
        buffer[:] = encode_superblock(superblock)
        for offset_bytes in SUPERBLOCK_OFFSETS:
            medium.write(offset_bytes, buffer, os.RWF_DSYNC)


def probe_journal(path: str | Path) -> JournalSuperblock | None:
    """Whose journal it is; None if there is none.  RecordDamagedError, FormatTooNewError."""
    with RecordMedium.open_read_only(path) as medium:
        choice = _probe(medium)
    return choice.superblock if choice else None


def examine_journal(path: str | Path) -> tuple[JournalSuperblock, CommitPage]:
    """What a journal that nobody uses says; NotFoundError if there is none."""
    with RecordMedium.open_read_only(path) as medium:
        choice = _probe(medium)
        if choice is None:
            raise NotFoundError(f"there is no journal on {path}", "'dmctl receive' makes one")
        reader = Reader(medium, os.preadv)
        slots = [next(reader.units(offset, 1)) for offset in COMMIT_OFFSETS]
        page, _ = choose_page(slots, choice.superblock.journal.bytes)
    return choice.superblock, page


def examine_directory(path: str | Path) -> Directory:
    """Which points a journal that nobody uses says are kept; NotFoundError if there is none."""
    superblock, page = examine_journal(path)
    slots: list[bytes | None] = []
    with RecordMedium.open_read_only(path) as medium:
        reader = Reader(medium, os.preadv)
        for offset in DIRECTORY_OFFSETS:
            units = list(reader.units(offset, DIRECTORY_BYTES // PAGE_BYTES))
            read = [bytes(unit) for unit in units if unit is not None]
            slots.append(b"".join(read) if len(read) == len(units) else None)
    return choose_directory(slots, superblock.journal.bytes, page.kept_sequence)[0]


def _probe(medium: RecordMedium) -> Choice[JournalSuperblock] | None:
    reader = Reader(medium, os.preadv)
    copies = [next(reader.units(offset, 1)) for offset in SUPERBLOCK_OFFSETS]
    try:
        return choose_superblock(*copies)
    except (RecordDamagedError, FormatTooNewError) as error:
        raise type(error)(f"{medium.name}: {error.message}", error.hint) from error
