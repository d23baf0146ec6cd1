"""What a record says about the consistent points of its volume (pure).

A volume with points is copied to a receiver, which has one point after another.  This is the part
of a superblock that tells a sender how far that has come, and whether it may serve.  It stands in a
place of its own, and counts only with the incompatible feature POINTS: a program that does not know
of points would clear extents that the last committed point lacks.

1. `committed` is durable before any extent is cleared for that point.  So a receiver that lacks it
   has gone back, and nothing is sent to it.
2. What is not in this module is zero; anything else is damage, never guessed at.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from bitmapd.errors import UsageError

_STATE: Final = struct.Struct("<QQ16sII")
_NIL: Final = bytes(16)
_U64: Final = (1 << 64) - 1
_U32: Final = (1 << 32) - 1

STATE_BYTES: Final = _STATE.size
NO_STATE: Final = bytes(STATE_BYTES)


class PointsFlag(enum.IntFlag):
    DEMOTED = 1  # gave its role away at this term: serves no host


NO_POINTS_FLAGS: Final = PointsFlag(0)
_KNOWN_FLAGS: Final = sum(PointsFlag)


@dataclass(frozen=True, slots=True)
class PointsState:
    """An instance can always be encoded."""

    term: int = 0  # grows with every promotion
    committed: int = 0  # the newest point that the receiver is known to have; 0: none
    receiver: UUID | None = None  # its journal; None: not known yet
    flags: PointsFlag = NO_POINTS_FLAGS
    cut_s: int = 0  # Unix time of that point's cut, for people; 0: not known

    def __post_init__(self) -> None:
        if self.receiver is not None and self.receiver.bytes == _NIL:
            raise UsageError("the nil UUID names no receiver")
        if not 0 <= self.flags <= _KNOWN_FLAGS:
            raise UsageError(f"the points' flags {int(self.flags):#x} are not known")
        for label, number, most in (
            ("term", self.term, _U64),
            ("committed point", self.committed, _U64),
            ("time of its cut", self.cut_s, _U32),
        ):
            if not 0 <= number <= most:
                raise UsageError(f"{label} {number} is outside 0..{most}")

    @property
    def demoted(self) -> bool:
        return PointsFlag.DEMOTED in self.flags

    def to_json(self) -> dict[str, Any]:
        return {
            "term": self.term,
            "committed": self.committed,
            "cut_s": self.cut_s,
            "receiver_uuid": None if self.receiver is None else str(self.receiver),
            **{str(flag.name).lower(): flag in self.flags for flag in PointsFlag},
        }


def encode_points(points: PointsState | None) -> bytes:
    """`STATE_BYTES` bytes; zeros for a volume without points."""
    if points is None:
        return NO_STATE
    receiver = _NIL if points.receiver is None else points.receiver.bytes
    return _STATE.pack(points.term, points.committed, receiver, points.flags, points.cut_s)


def decode_points(raw: bytes) -> PointsState:
    """Of `STATE_BYTES` bytes; UsageError or ValueError for what `encode_points` would not give."""
    term, committed, receiver, flags, cut_s = _STATE.unpack(raw)
    return PointsState(
        term=term,
        committed=committed,
        receiver=None if receiver == _NIL else UUID(bytes=receiver),
        flags=PointsFlag(flags),
        cut_s=cut_s,
    )
