"""What a node can be to the other, and what it needs around it (pure)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from bitarray import bitarray

from bitmapd.media.base import Done
from bitmapd.partner.messages import Hello, Message
from bitmapd.peer.frames import PeerError
from bitmapd.peer.payloads import Runs


class State(Enum):
    WAITING = "waiting"
    PAIRED = "paired"
    CUT = "cut"
    ALONE = "alone"
    OUTDATED = "outdated"
    SPLIT_BRAIN = "split-brain"


class Phase(Enum):
    """Of the connection."""

    CLOSED = "closed"
    HELLO = "hello"
    RECORDS = "records"
    READY = "ready"
    UP = "up"
    SPLIT = "split"  # both have gone on alone, and say where


class Proof(Enum):
    """Why the other node can write no more."""

    NEVER = "never"  # there has never been another
    BYE = "bye"
    HELLO = "hello"
    FENCE = "fence"
    WORD = "word"


@dataclass(frozen=True, slots=True)
class Lasting:
    """What the superblock has to say durably about the pair."""

    never_paired: bool
    term: int
    generations: tuple[bytes, ...]
    volume: bytes  # UUID; nil while this node waits to join
    volatile: bool = False  # what counts may be in the memory of a node only (`reliance`)
    gone_on: bool = False  # took places in a cut that the other does not know of; of a keeper: the
    # other may have done so, or what is known stands in memory only (`keeping`)
    kept: bool = False  # the partner that was met last is a keeper


class Wire(Protocol):
    """One connection."""

    def send(self, message: Message) -> int: ...

    def close(self, error: PeerError | None) -> None:
        """After ERROR was sent, if there is one.  `Node.lost` is not called for it."""


class Surroundings(Protocol):
    """What a node asks of the appliance it is in."""

    def store(self, lasting: Lasting, done: Done) -> None:
        """Write the superblock; call back, later, when it is durable.  Where it cannot be written
        and all that is new is the flag VOLATILE of a keeper's host, that is durable elsewhere, and
        stands until a superblock is."""

    def rely(self, on: bool) -> None:
        """Whether what the other holds of this node's record counts, stored here or not."""

    def destage(self, done: Done) -> bool:
        """Have the stored record name all that is known, and call back when it does; with an error
        if it may not.  False, and no call, if it does so already."""

    def new_generation(self) -> bytes: ...

    def hello(self) -> Hello:
        """Sizes, names and identities; what the node itself knows is filled in by it."""

    def stored(self) -> bitarray:
        """What the stored record names: what this process found, and what it has learnt since and
        may have said READY for."""

    def partner_record(self, done: Callable[[bitarray | None], None]) -> None:
        """Read what the other node's stored record names; call back, later, with that, or with None
        if it cannot be reached or does not count (`otherrecord`)."""

    def other_died(self, extents: Runs) -> None:
        """These were its own, or may have been, and are ours now: what it had sent to the secondary
        may yet land there."""

    def changed(self) -> None:
        """`state` or `phase` has changed."""

    def emit(self, event: str, **fields: object) -> None: ...
