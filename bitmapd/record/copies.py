"""What superblocks have in common, whatever they are of (pure): a seal, and two copies.

A superblock is 4096 bytes.  It begins with magic, version, flags and three words of feature bits
and ends with a checksum, in every version of every format: so a newer one is told from damage, and
is refused instead of guessed at.  It stands in two copies that are written one after the other.

1. One bad copy is a warning, two bad ones are damage, and two without a trace of the magic mean
   that there is nothing here.
2. Of two valid copies the one with the higher sequence counts; the other one is *stale*, and the
   next update begins with it.  Copies of different things, or that differ at one sequence, are
   refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

from bitmapd.crc import crc32c
from bitmapd.errors import FormatTooNewError, RecordDamagedError
from bitmapd.record.pages import Raw

SUPERBLOCK_BYTES: Final = 4096
SUPERBLOCK_OFFSETS: Final = (0, 65536)

_PREFIX: Final = struct.Struct("<16sIIQQQ")
_CRC: Final = struct.Struct("<I")


class Prefix(NamedTuple):
    """What every superblock begins with."""

    magic: bytes
    version: int
    flags: int
    incompatible: int
    compatible_read_only: int
    compatible: int


@dataclass(frozen=True, slots=True)
class Seal:
    """Of one format.  `what` names the thing in messages, such as "the record"."""

    what: str
    magic: bytes
    seed: int
    version: int

    def close(self, raw: bytearray) -> None:
        """Write the checksum of what is in place."""
        _CRC.pack_into(raw, SUPERBLOCK_BYTES - 4, crc32c(raw[:-4], self.seed))

    def has_magic(self, raw: Raw) -> bool:
        return raw is not None and bytes(raw[: len(self.magic)]) == self.magic

    def opened(
        self, raw: Raw, known_incompatible: int
    ) -> tuple[Prefix, bytes | bytearray | memoryview]:
        """RecordDamagedError for what is no such superblock, FormatTooNewError for a newer one."""
        if raw is None:
            raise RecordDamagedError("the superblock cannot be read")
        if len(raw) != SUPERBLOCK_BYTES:
            raise RecordDamagedError(f"the superblock is cut short after {len(raw)} bytes")
        if not self.has_magic(raw):
            raise RecordDamagedError("there is no superblock")
        (stored,) = _CRC.unpack_from(raw, SUPERBLOCK_BYTES - 4)
        actual = crc32c(raw[:-4], self.seed)
        if stored != actual:
            raise RecordDamagedError(
                f"the superblock's checksum is {stored:08x} and should be {actual:08x}"
            )
        prefix = Prefix(*_PREFIX.unpack_from(raw))
        hint = "use the program that wrote it, or a newer one"
        if prefix.version > self.version:
            raise FormatTooNewError(
                f"{self.what} has format version {prefix.version}; this program knows"
                f" {self.version}",
                hint=hint,
            )
        unknown = prefix.incompatible & ~known_incompatible
        if unknown:
            raise FormatTooNewError(
                f"{self.what} uses features {unknown:#x} that this program does not know", hint=hint
            )
        if prefix.version < 1:
            raise RecordDamagedError(
                f"the superblock contradicts itself: format version {prefix.version}"
            )
        return prefix, raw


class Copy(Protocol):
    """What two copies are compared by."""

    @property
    def sequence(self) -> int: ...

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Copy)


@dataclass(frozen=True, slots=True)
class Choice(Generic[C]):
    superblock: C
    warnings: tuple[str, ...]  # something is damaged
    notes: tuple[str, ...] = ()  # what a crash leaves behind
    stale_copy: int = 0  # the copy to be written first: the other one holds what counts


def choose_copy(
    seal: Seal,
    first: Raw,
    second: Raw,
    decode: Callable[[Raw], C],
    owner: Callable[[C], tuple[str, UUID]],
    hint: str,
) -> Choice[C] | None:
    """The superblock that counts; None if there never was one here (both copies readable, neither
    has the magic).  `owner` says whose it is, as a kind in the plural and a UUID; `hint` what to do
    when both copies are bad."""
    valid: list[C] = []
    faults: list[str] = []
    bad = 0
    for number, (label, raw) in enumerate((("A", first), ("B", second))):
        try:
            valid.append(decode(raw))
        except RecordDamagedError as error:
            faults.append(f"superblock copy {label}: {error.message}")
            bad = number
    if not valid:
        if not (first is None or second is None or seal.has_magic(first) or seal.has_magic(second)):
            return None
        raise RecordDamagedError(
            "both copies of the superblock are bad: " + "; ".join(faults), hint=hint
        )
    if len(valid) == 1:
        return Choice(valid[0], tuple(faults), stale_copy=bad)
    one, other = valid
    (kind, one_uuid), (_, other_uuid) = owner(one), owner(other)
    if one_uuid != other_uuid:
        raise RecordDamagedError(
            f"the two copies of the superblock belong to different {kind}, {one.name!r} (uuid"
            f" {one_uuid}) and {other.name!r} (uuid {other_uuid})"
        )
    if one == other:
        return Choice(one, ())
    if one.sequence == other.sequence:
        raise RecordDamagedError(
            f"the two copies of the superblock differ at the same sequence {one.sequence}"
        )
    newest = max(one, other, key=lambda copy: copy.sequence)
    oldest = min(one.sequence, other.sequence)
    return Choice(
        newest,
        (),
        (
            f"superblock copies are at sequences {newest.sequence} and {oldest}: an update was"
            " interrupted; the newer one is used",
        ),
        stale_copy=int(newest is one),
    )
