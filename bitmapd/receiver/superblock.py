"""The superblock of a journal: whose it is, and what it belongs to (pure).

It stands in two copies, as that of a record does (`record/copies`).  A journal that was just made
belongs to no volume yet: its first sender brings the volume's UUID, sizes and generation, and
nothing but superblocks and commit pages is there before that.

1. `journal` is the salt of everything else in it, so what an older journal has left on the same
   medium is not taken for a part of this one.
2. `term` and `generations` are those that this receiver follows.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from bitmapd.crc import crc32c
from bitmapd.errors import RecordDamagedError, UsageError
from bitmapd.record.copies import SUPERBLOCK_BYTES, Choice, Seal, choose_copy
from bitmapd.record.geometry import Geometry
from bitmapd.record.pages import MAX_SEQUENCE, Raw
from bitmapd.record.superblock import MAX_GENERATIONS, as_ids, from_ids

MAGIC: Final = b"\x93bitmapd-points\n"
FORMAT_VERSION: Final = 1
KNOWN_INCOMPATIBLE: Final = 0
MAX_NAME_BYTES: Final = 64
MAX_IDENTITY_BYTES: Final = 255

_SUPERBLOCK: Final = struct.Struct("<16sIIQQQ16s16sQ64sQIIQQQQQBB6x64s256s")
_GENERATIONS: Final = struct.Struct("16s16s16s16s")
_SEAL: Final = Seal("the journal", MAGIC, int(crc32c(b"bitmapd journal")), FORMAT_VERSION)
_NIL: Final = bytes(16)
_U63: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Line:
    """Of which data this receiver has points; `generations`: current first, up to four."""

    volume: UUID
    geometry: Geometry
    generations: tuple[UUID, ...]
    term: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.generations) <= MAX_GENERATIONS:
            raise UsageError(f"{len(self.generations)} generations; a journal holds 1 to 4")
        if _NIL in (self.volume.bytes, *(value.bytes for value in self.generations)):
            raise UsageError("the nil UUID names neither a volume nor a generation")
        if not 0 <= self.term <= _U63:
            raise UsageError(f"term {self.term} is outside 0..{_U63}")


@dataclass(frozen=True, slots=True)
class JournalSuperblock:
    """Times are Unix seconds.  An instance can always be encoded.  `line` is None until the first
    sender has come."""

    journal: UUID
    name: str
    journal_bytes: int
    image: str  # what it is known by
    image_bytes: int
    created_s: int
    updated_s: int
    line: Line | None = None
    sequence: int = 1
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for label, text, limit in (
            ("name of the receiver", self.name, MAX_NAME_BYTES),
            ("identity of the image", self.image, MAX_IDENTITY_BYTES),
        ):
            if len(text.encode(errors="surrogatepass")) > limit or not text.isprintable():
                raise UsageError(f"{label} {text!r} has control characters or over {limit} bytes")
        if not self.name:
            raise UsageError("the receiver has no name")
        if self.journal.bytes == _NIL:
            raise UsageError("the nil UUID names no journal")
        for label, number, limit in (
            ("sequence", self.sequence, MAX_SEQUENCE),
            ("size of the journal", self.journal_bytes, _U63),
            ("size of the image", self.image_bytes, _U63),
            ("time of creation", self.created_s, _U63),
            ("time of update", self.updated_s, _U63),
        ):
            if not 0 <= number <= limit:
                raise UsageError(f"{label} {number} is outside 0..{limit}")

    def updated(self, now_s: int, **changes: Any) -> JournalSuperblock:
        """The superblock that follows this one."""
        return dataclasses.replace(self, sequence=self.sequence + 1, updated_s=now_s, **changes)


def encode_superblock(superblock: JournalSuperblock) -> bytes:
    line = superblock.line
    name, image = superblock.name.encode(), superblock.image.encode()
    raw = bytearray(SUPERBLOCK_BYTES)
    _SUPERBLOCK.pack_into(
        raw,
        0,
        MAGIC,
        superblock.version,
        0,
        0,
        0,
        0,
        superblock.journal.bytes,
        _NIL if line is None else line.volume.bytes,
        superblock.sequence,
        b"" if line is None else b"".join(as_ids(line.generations)),
        *((0, 0, 0) if line is None else dataclasses.astuple(line.geometry)),
        superblock.journal_bytes,
        superblock.image_bytes,
        0 if line is None else line.term,
        superblock.created_s,
        superblock.updated_s,
        len(name),
        len(image),
        name,
        image,
    )
    _SEAL.close(raw)
    return bytes(raw)


def has_magic(raw: Raw) -> bool:
    return _SEAL.has_magic(raw)


def decode_superblock(raw: Raw) -> JournalSuperblock:
    """RecordDamagedError for what is no superblock of a journal, FormatTooNewError for one of a
    newer program."""
    prefix, raw = _SEAL.opened(raw, KNOWN_INCOMPATIBLE)
    (
        *_,
        journal,
        volume,
        sequence,
        generations,
        size_bytes,
        extent_bytes,
        block_bytes,
        journal_bytes,
        image_bytes,
        term,
        created_s,
        updated_s,
        name_length,
        image_length,
        name,
        image,
    ) = _SUPERBLOCK.unpack_from(raw)
    try:
        line = None
        if volume != _NIL:
            geometry = Geometry(size_bytes, extent_bytes, block_bytes)
            values = from_ids(_GENERATIONS.unpack(generations))
            line = Line(UUID(bytes=volume), geometry, values, term)
        return JournalSuperblock(
            journal=UUID(bytes=journal),
            name=name[:name_length].decode(),
            journal_bytes=journal_bytes,
            image=image[:image_length].decode(),
            image_bytes=image_bytes,
            created_s=created_s,
            updated_s=updated_s,
            line=line,
            sequence=sequence,
            version=prefix.version,
        )
    except (UsageError, ValueError) as error:
        raise RecordDamagedError(f"the superblock contradicts itself: {error}") from error


def choose_superblock(first: Raw, second: Raw) -> Choice[JournalSuperblock] | None:
    """The superblock that counts; None if there never was a journal here."""
    return choose_copy(
        _SEAL,
        first,
        second,
        decode_superblock,
        lambda superblock: ("journals", superblock.journal),
        "the journal cannot be trusted: remove the receiver and make it anew",
    )
