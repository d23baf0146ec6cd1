"""The directory of kept points: which older ones can be had, and where their maps are (pure).

It stands in two slots that are written in turn, each as one write with one checksum, salted with
the journal's UUID; the one with the higher sequence counts.

1. The directory of a sequence goes to the slot of its last bit, so the newest one is never written
   over.
2. A commit page names the sequence that was durable when it was written.  If neither slot has that
   one or a later one, the directory is lost as a whole: an older one would name points whose maps
   lack what changed since.
3. A point is WANTED before anything of its copy is made, and GOING before anything of it is taken
   away.  So a copy of which nobody knows does not exist.
4. KEPT and CHOSEN points have a change map, each in a slot of its own; the others have none.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from bitmapd.crc import crc32c
from bitmapd.receiver.places import DIRECTORY_BYTES, DIRECTORY_OFFSETS, MOST_KEPT
from bitmapd.record.pages import MAX_SEQUENCE, Raw

MAGIC: Final = b"BMPkept1"
MAX_LABEL_BYTES: Final = 255
NO_SLOT: Final = 0xFFFF

_HEAD: Final = struct.Struct("<8sQ16sI28x")
_ENTRY: Final = struct.Struct("<QQ16sQBBH4x256s")
_CRC: Final = struct.Struct("<I")
_CRC_AT: Final = DIRECTORY_BYTES - _CRC.size
_SALT: Final = b"bitmapd kept points"


class Keep(enum.Enum):
    WANTED = 1  # its copy is made once it is in the image
    KEPT = 2
    GOING = 3  # its copy is being taken away
    CHOSEN = 4  # kept, and what a promotion makes of the image


WITH_MAP: Final = (Keep.KEPT, Keep.CHOSEN)


@dataclass(frozen=True, slots=True)
class KeptPoint:
    """`slot`: of its change map, or NO_SLOT.  `size_bytes`: of the volume at that point."""

    point: int
    wall_ns: int
    generation: bytes
    size_bytes: int
    state: Keep
    slot: int = NO_SLOT
    label: str = ""

    @property
    def has_map(self) -> bool:
        return self.state in WITH_MAP


@dataclass(frozen=True, slots=True)
class Directory:
    """`points`: in order."""

    sequence: int = 0  # 0: there never was one
    points: tuple[KeptPoint, ...] = ()

    @property
    def fault(self) -> str | None:
        """Why this cannot be."""
        numbers = [kept.point for kept in self.points]
        if any(later <= earlier for earlier, later in pairwise(numbers)):
            return f"its points are {numbers}"
        slots = [kept.slot for kept in self.kept]
        if len(set(slots)) < len(slots) or any(slot >= MOST_KEPT for slot in slots):
            return f"its maps are in {slots}"
        return None

    @property
    def kept(self) -> tuple[KeptPoint, ...]:
        """Those of which there is a copy, with a map."""
        return tuple(kept for kept in self.points if kept.has_map)

    @property
    def newest(self) -> KeptPoint | None:
        """What changes now goes into the map of that one."""
        return self.kept[-1] if self.kept else None

    def before(self, point: int) -> KeptPoint | None:
        """The newest kept one that is older than this."""
        older = [kept for kept in self.kept if kept.point < point]
        return older[-1] if older else None

    def find(self, point: int) -> KeptPoint | None:
        return next((kept for kept in self.points if kept.point == point), None)


def directory_offset(sequence: int) -> int:
    """Where the directory of this sequence is written."""
    return DIRECTORY_OFFSETS[sequence % 2]


def encode_directory(directory: Directory, journal: bytes) -> bytes:
    raw = bytearray(DIRECTORY_BYTES)
    _HEAD.pack_into(raw, 0, MAGIC, directory.sequence, journal, len(directory.points))
    for number, kept in enumerate(directory.points):
        label = kept.label.encode()
        _ENTRY.pack_into(
            raw,
            _HEAD.size + number * _ENTRY.size,
            kept.point,
            kept.wall_ns,
            kept.generation,
            kept.size_bytes,
            kept.state.value,
            len(label),
            kept.slot,
            label,
        )
    _CRC.pack_into(raw, _CRC_AT, _checksum(raw, journal))
    return bytes(raw)


def decode_directory(raw: Raw, journal: bytes, slot: int) -> Directory | None:
    """None where there is no whole one."""
    if raw is None or len(raw) != DIRECTORY_BYTES:
        return None
    magic, sequence, owner, count = _HEAD.unpack_from(raw)
    if (
        magic != MAGIC
        or owner != journal
        or _CRC.unpack_from(raw, _CRC_AT) != (_checksum(raw, journal),)
    ):
        return None
    if count > MOST_KEPT or sequence % 2 != slot or not 0 < sequence <= MAX_SEQUENCE:
        return None
    try:
        points = tuple(_entry(raw, _HEAD.size + number * _ENTRY.size) for number in range(count))
    except ValueError:
        return None
    found = Directory(sequence, points)
    return found if found.fault is None else None


def _entry(raw: bytes | bytearray | memoryview, at: int) -> KeptPoint:
    """ValueError for what is none."""
    point, wall_ns, generation, size_bytes, state, length, slot, label = _ENTRY.unpack_from(raw, at)
    text = label[:length].decode()
    return KeptPoint(point, wall_ns, generation, size_bytes, Keep(state), slot, text)


def choose_directory(
    slots: Sequence[Raw], journal: bytes, durable: int
) -> tuple[Directory, tuple[str, ...]]:
    """The directory that counts, and what is worth telling.  `durable`: the sequence that the
    commit page names."""
    found = [decode_directory(raw, journal, slot) for slot, raw in enumerate(slots)]
    whole = [directory for directory in found if directory is not None]
    newest = max(whole, key=lambda directory: directory.sequence, default=Directory())
    if newest.sequence >= durable:
        return newest, ()
    return Directory(durable), (
        "the directory of kept points cannot be read: they are not known any more, and their copies"
        " are left where they are",
    )


def _checksum(raw: bytes | bytearray | memoryview, journal: bytes) -> int:
    return int(crc32c(raw[:_CRC_AT], crc32c(_SALT + journal)))
