"""The superblock: whose record this is (pure).

It stands in two copies, written one after the other; docs/format.md has the offsets.

1. A newer format is told from damage, and refused; of two copies one counts (`copies`).
2. A copy with a valid checksum that contradicts itself is damaged.
3. `sequence` grows with every update, and an update is complete only when both copies are
   durable.  A crash in between leaves the old or the new superblock, so nothing may rely on
   a change before its update is complete (`updates.py` has the order).
4. `session` grows with every start of the volume: a record that was restored from a copy is known
   by its lower number.
5. A pause is an incompatible feature and not a flag: a program that does not know of it would copy
   over the secondary that the pause protects, so it has to refuse the record.  A pair is one, too,
   and so are consistent points: it would clear what the last committed point lacks.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from bitmapd.crc import crc32c
from bitmapd.errors import FormatTooNewError, RecordDamagedError, UsageError
from bitmapd.record.copies import (
    SUPERBLOCK_BYTES,
    Choice,
    Seal,
    choose_copy,
)
from bitmapd.record.geometry import Geometry
from bitmapd.record.pages import MAX_SEQUENCE, PAGES_OFFSET, Raw, page_count
from bitmapd.record.pair_state import NO_STATE, STATE_BYTES, PairState, decode_pair, encode_pair
from bitmapd.record.points_state import NO_STATE as NO_POINTS
from bitmapd.record.points_state import STATE_BYTES as POINTS_BYTES
from bitmapd.record.points_state import PointsState, decode_points, encode_points

MAGIC: Final = b"\x93bitmapd-record\n"
FORMAT_VERSION: Final = 1


class Incompatible(enum.IntFlag):
    """Features that a program has to know to use the record at all."""

    PAUSED = 1  # nothing is copied to the secondary until `dmctl resume`
    PAIR = 2  # a partner writes the same media; the superblock has a `PairState`
    POINTS = 4  # the secondary is a receiver; the superblock has a `PointsState`


# A bit that is not in these masks is unknown.
KNOWN_INCOMPATIBLE: Final = int(Incompatible.PAUSED | Incompatible.PAIR | Incompatible.POINTS)
KNOWN_COMPATIBLE_READ_ONLY: Final = 0
KNOWN_COMPATIBLE: Final = 0
MAX_GENERATIONS: Final = 4
MAX_NAME_BYTES: Final = 64
MAX_IDENTITY_BYTES: Final = 255

_SUPERBLOCK: Final = struct.Struct("<16sIIQQQ16sQQ16s16s16s16sQIIIIQQQQQBBB5x64s256s256s")
_PAIR_OFFSET: Final = _SUPERBLOCK.size
_POINTS_OFFSET: Final = _PAIR_OFFSET + STATE_BYTES
_SEAL: Final = Seal("the record", MAGIC, int(crc32c(b"bitmapd superblock")), FORMAT_VERSION)
_U32: Final = (1 << 32) - 1
_U63: Final = (1 << 63) - 1
_U64: Final = (1 << 64) - 1
_NIL: Final = bytes(16)


class RecordFlag(enum.IntFlag):
    CLEAN = 1  # stopped cleanly: the record was empty and both media were flushed
    SYNC_SKIPPED = 2  # the administrator said that both media were equal at the start


NO_FLAGS: Final = RecordFlag(0)


class InitialSync(enum.IntEnum):
    """What copying the extents of the present record means until the first sync is done."""

    NONE = 0  # an ordinary recovery
    FULL = 1  # everything is copied
    CHECKSUM = 2  # everything is compared, differences are copied


@dataclass(frozen=True, slots=True)
class Superblock:
    """Whose record this is; times are Unix seconds.  An instance can always be encoded."""

    volume_uuid: UUID
    name: str
    geometry: Geometry
    generations: tuple[UUID, ...]  # current first, then up to three older ones
    primary: str
    primary_size_bytes: int
    secondary: str
    secondary_size_bytes: int
    created_s: int
    updated_s: int
    sequence: int = 1  # grows with every update of the superblock
    session: int = 0  # grows with every start of the volume
    flags: RecordFlag = NO_FLAGS
    initial_sync: InitialSync = InitialSync.NONE
    version: int = FORMAT_VERSION
    incompatible: int = 0
    compatible_read_only: int = 0
    compatible: int = 0
    pair: PairState | None = None  # see `with_pair`
    points: PointsState | None = None  # see `with_points`

    def __post_init__(self) -> None:
        _fits_text("volume name", self.name, MAX_NAME_BYTES)
        _fits_text("identity of the primary", self.primary, MAX_IDENTITY_BYTES)
        _fits_text("identity of the secondary", self.secondary, MAX_IDENTITY_BYTES)
        if not self.name:
            raise UsageError("the volume has no name")
        if not 1 <= len(self.generations) <= MAX_GENERATIONS:
            raise UsageError(
                f"{len(self.generations)} data generations; a record holds 1 to {MAX_GENERATIONS}"
            )
        for value in (self.volume_uuid, *self.generations):
            if value.bytes == _NIL:
                raise UsageError("the nil UUID names neither a volume nor a data generation")
        for label, number, limit in (
            ("sequence", self.sequence, MAX_SEQUENCE),
            ("session", self.session, _U63),
            ("size of the primary", self.primary_size_bytes, _U63),
            ("size of the secondary", self.secondary_size_bytes, _U63),
            ("time of creation", self.created_s, _U63),
            ("time of update", self.updated_s, _U63),
            ("flags", int(self.flags), _U32),
            ("version", self.version, _U32),
            ("incompatible features", self.incompatible, _U64),
            ("read-only compatible features", self.compatible_read_only, _U64),
            ("compatible features", self.compatible, _U64),
        ):
            if not 0 <= number <= limit:
                raise UsageError(f"{label} {number} is outside 0..{limit}")
        pair = self.pair
        if (pair is not None) is not bool(self.incompatible & Incompatible.PAIR):
            raise UsageError("the state of a pair goes with the feature that says that it is one")
        if (self.points is not None) is not bool(self.incompatible & Incompatible.POINTS):
            raise UsageError("the state of points goes with the feature that says there are some")

    @property
    def clean(self) -> bool:
        return bool(self.flags & RecordFlag.CLEAN)

    @property
    def paused(self) -> bool:
        return bool(self.incompatible & Incompatible.PAUSED)

    @property
    def demoted(self) -> bool:
        """Whether the volume gave its role away, and lets no host in."""
        return self.points is not None and self.points.demoted

    @property
    def page_count(self) -> int:
        return page_count(self.geometry.extents)

    def with_pair(self, pair: PairState | None) -> Superblock:
        """The same for this node of a pair, or for a volume of one node."""
        rest = self.incompatible & ~Incompatible.PAIR
        feature = 0 if pair is None else Incompatible.PAIR
        return dataclasses.replace(self, pair=pair, incompatible=int(rest | feature))

    def with_points(self, points: PointsState | None) -> Superblock:
        """The same for a volume with a receiver, or without."""
        rest = self.incompatible & ~Incompatible.POINTS
        feature = 0 if points is None else Incompatible.POINTS
        return dataclasses.replace(self, points=points, incompatible=int(rest | feature))

    def updated(self, now_s: int, above: int = 0, **changes: Any) -> Superblock:
        """The superblock that follows this one, and whatever was tried with a sequence up to
        `above`.

        Unknown compatible feature bits go: what belongs to them is not carried along.
        """
        return dataclasses.replace(
            self,
            sequence=max(self.sequence, above) + 1,
            updated_s=now_s,
            compatible=self.compatible & KNOWN_COMPATIBLE,
            **changes,
        )


SuperblockChoice = Choice[Superblock]


def as_ids(generations: Sequence[UUID]) -> tuple[bytes, ...]:
    """`MAX_GENERATIONS` times 16 bytes, current first, nil where there is none."""
    ids = tuple(value.bytes for value in generations)
    return ids + (_NIL,) * (MAX_GENERATIONS - len(ids))


def from_ids(ids: Iterable[bytes]) -> tuple[UUID, ...]:
    """The generations of `as_ids`."""
    return tuple(UUID(bytes=value) for value in ids if value != _NIL)


def encode_superblock(superblock: Superblock) -> bytes:
    name = superblock.name.encode()
    primary = superblock.primary.encode()
    secondary = superblock.secondary.encode()
    raw = bytearray(SUPERBLOCK_BYTES)
    _SUPERBLOCK.pack_into(
        raw,
        0,
        MAGIC,
        superblock.version,
        superblock.flags,
        superblock.incompatible,
        superblock.compatible_read_only,
        superblock.compatible,
        superblock.volume_uuid.bytes,
        superblock.sequence,
        superblock.session,
        *as_ids(superblock.generations),
        superblock.geometry.size_bytes,
        superblock.geometry.extent_bytes,
        superblock.geometry.block_bytes,
        superblock.page_count,
        superblock.initial_sync,
        PAGES_OFFSET,
        superblock.created_s,
        superblock.updated_s,
        superblock.primary_size_bytes,
        superblock.secondary_size_bytes,
        len(name),
        len(primary),
        len(secondary),
        name,
        primary,
        secondary,
    )
    raw[_PAIR_OFFSET : _PAIR_OFFSET + STATE_BYTES] = encode_pair(superblock.pair)
    raw[_POINTS_OFFSET : _POINTS_OFFSET + POINTS_BYTES] = encode_points(superblock.points)
    _SEAL.close(raw)
    return bytes(raw)


def has_magic(raw: Raw) -> bool:
    return _SEAL.has_magic(raw)


def decode_superblock(raw: Raw) -> Superblock:
    """RecordDamagedError for what is not a superblock, FormatTooNewError for one of a newer
    program."""
    return _parse_superblock(_SEAL.opened(raw, KNOWN_INCOMPATIBLE)[1])


def _parse_superblock(raw: bytes | bytearray | memoryview) -> Superblock:
    (
        _magic,
        version,
        flags,
        incompatible,
        compatible_read_only,
        compatible,
        volume,
        sequence,
        session,
        *rest,
    ) = _SUPERBLOCK.unpack_from(raw)
    generations = rest[:MAX_GENERATIONS]
    (
        size_bytes,
        extent_bytes,
        block_bytes,
        pages,
        initial_sync,
        pages_offset,
        created_s,
        updated_s,
        primary_size_bytes,
        secondary_size_bytes,
        name_length,
        primary_length,
        secondary_length,
        name,
        primary,
        secondary,
    ) = rest[MAX_GENERATIONS:]
    if name_length > MAX_NAME_BYTES:
        raise RecordDamagedError(f"the superblock contradicts itself: name of {name_length} bytes")
    pair = bytes(raw[_PAIR_OFFSET : _PAIR_OFFSET + STATE_BYTES])
    is_pair = bool(incompatible & Incompatible.PAIR)
    if not is_pair and pair != NO_STATE:
        raise RecordDamagedError("the superblock contradicts itself: a pair's state without a pair")
    points = bytes(raw[_POINTS_OFFSET : _POINTS_OFFSET + POINTS_BYTES])
    has_points = bool(incompatible & Incompatible.POINTS)
    if not has_points and points != NO_POINTS:
        raise RecordDamagedError("the superblock contradicts itself: a state of points without any")
    try:
        superblock = Superblock(
            volume_uuid=UUID(bytes=volume),
            name=name[:name_length].decode(),
            geometry=Geometry(size_bytes, extent_bytes, block_bytes),
            generations=from_ids(generations),
            primary=primary[:primary_length].decode(),
            primary_size_bytes=primary_size_bytes,
            secondary=secondary[:secondary_length].decode(),
            secondary_size_bytes=secondary_size_bytes,
            created_s=created_s,
            updated_s=updated_s,
            sequence=sequence,
            session=session,
            flags=RecordFlag(flags),
            initial_sync=InitialSync(initial_sync),
            version=version,
            incompatible=incompatible,
            compatible_read_only=compatible_read_only,
            compatible=compatible,
            pair=decode_pair(pair) if is_pair else None,
            points=decode_points(points) if has_points else None,
        )
    except (UsageError, ValueError) as error:
        raise RecordDamagedError(f"the superblock contradicts itself: {error}") from error
    if pages != superblock.page_count or pages_offset != PAGES_OFFSET:
        raise RecordDamagedError(
            f"the superblock contradicts itself: {pages} pages at byte {pages_offset}, but the"
            f" volume needs {superblock.page_count} at byte {PAGES_OFFSET}"
        )
    return superblock


def choose_superblock(first: Raw, second: Raw) -> SuperblockChoice | None:
    """The superblock that counts; None if there never was a record here (both copies readable,
    neither has the magic)."""
    return choose_copy(
        _SEAL,
        first,
        second,
        decode_superblock,
        lambda superblock: ("volumes", superblock.volume_uuid),
        "the record cannot be trusted: create it anew with a full or checksum sync",
    )


def require_writable(superblock: Superblock) -> None:
    """FormatTooNewError if this program may read the record but must not change it."""
    unknown = superblock.compatible_read_only & ~KNOWN_COMPATIBLE_READ_ONLY
    if unknown:
        raise FormatTooNewError(
            f"the record of volume {superblock.name!r} uses features {unknown:#x} that this"
            " program does not know: it can be read, not written",
            hint="use the program that wrote it, or a newer one",
        )


def _fits_text(label: str, text: str, limit: int) -> None:
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{label} {text!r} is not valid text") from None
    if length > limit:
        raise UsageError(f"{label} {text!r} has {length} bytes; at most {limit} fit")
    if "\0" in text:
        raise UsageError(f"{label} {text!r} contains a zero byte")
