"""What any two that speak over a link say to one another, whatever else it is about (pure).

Their layouts are in `BYE`, `ERROR` and `pong`; only the kind of a PONG differs from one protocol to
the other.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from bitmapd.peer.frames import Kind
from bitmapd.peer.shapes import Shape


class Goodbye(enum.IntEnum):
    """Reason of a `Bye`."""

    RECONNECTING = 0
    STOPPED = 1  # cleanly: nothing of mine is in flight anywhere, and everything is given


@dataclass(frozen=True, slots=True)
class Pong:
    time_us: int  # of the ping


@dataclass(frozen=True, slots=True)
class Bye:
    reason: Goodbye


@dataclass(frozen=True, slots=True)
class Error:
    """`code` is one of `peer.frames.ErrorCode`, or one that only the sender knows."""

    code: int
    text: str


BYE: Final[Shape[Bye]] = Shape(
    Kind.BYE,
    lambda reason: Bye(Goodbye(reason)),
    struct.Struct("<B"),
    limits=(max(Goodbye),),
)
ERROR: Final[Shape[Error]] = Shape(Kind.ERROR, Error, struct.Struct("<H"), text=True)


def pong(kind: int) -> Shape[Pong]:
    return Shape(kind, Pong, struct.Struct("<Q"))
