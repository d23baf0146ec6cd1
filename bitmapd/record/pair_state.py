"""What a record says about the pair that its volume belongs to (pure).

Two nodes serve one volume, each with a record of its own.  This is the part of a superblock that
outlives a process of either: which node this is, whether it went on without the other, and what its
stored bits are worth.  It stands in a place of its own, and counts only with the incompatible
feature PAIR: a program that does not know of pairs would write past the partner.

1. A record keeps its volume's UUID for ever; `volume` is the pair's.  They are the same at the node
   that the volume was made at.  One that joins has none until then, and needs no new format for it.
2. A node without the pair's UUID has never been paired.
3. What is not in this module is zero; anything else is damage, never guessed at.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from bitmapd.errors import UsageError

_STATE: Final = struct.Struct("<16sBBBB4sQ16sQ")
_NIL: Final = bytes(16)
_ZERO: Final = bytes(4)
_U64: Final = (1 << 64) - 1

STATE_BYTES: Final = _STATE.size
NO_STATE: Final = bytes(STATE_BYTES)


class PairFlag(enum.IntFlag):
    VOLATILE = 1  # the stored bits may lack what only the partner's memory holds
    ALONE = 2  # went on without the partner, which was proven unable to write
    GONE_ON = 4  # took places while it did not know of the partner; of a keeper: may lack places
    NEVER_PAIRED = 8  # no exchange with a partner was ever finished
    KEPT = 16  # the partner is a keeper: nobody else writes


NO_PAIR_FLAGS: Final = PairFlag(0)
_KNOWN_FLAGS: Final = sum(PairFlag)


class RecordOn(enum.IntEnum):
    """Where an extent has to be recorded before a host's write to it is submitted."""

    BOTH = 0
    PARTNER = 1
    LOCAL = 2


class PartnerAck(enum.IntEnum):
    """How far the partner has to be with an extent to say that it has recorded it."""

    MEMORY = 0
    STORED = 1


@dataclass(frozen=True, slots=True)
class PairState:
    """One node's part in a pair.  An instance can always be encoded."""

    node: int  # 1 or 2
    volume: UUID | None  # the pair's; None: waits to join
    flags: PairFlag = NO_PAIR_FLAGS
    record_on: RecordOn = RecordOn.BOTH
    partner_ack: PartnerAck = PartnerAck.MEMORY
    term: int = 0  # grows with every step to going on alone
    machine: bytes = _NIL  # the partner's machine id; nil: unknown
    partner_session: int = 0  # the last one of the partner that this node knows of

    def __post_init__(self) -> None:
        if self.node not in (1, 2):
            raise UsageError(f"node {self.node} of a pair; there are 1 and 2")
        if self.volume is not None and self.volume.bytes == _NIL:
            raise UsageError("the nil UUID names no pair")
        if not 0 <= self.flags <= _KNOWN_FLAGS:
            raise UsageError(f"the pair's flags {int(self.flags):#x} are not known")
        if self.volume is None and not self.flags & PairFlag.NEVER_PAIRED:
            raise UsageError(f"node {self.node} has no UUID of the pair; only one that joins may")
        if len(self.machine) != len(_NIL):
            raise UsageError(f"the machine id has {len(self.machine)} bytes; it needs 16")
        for label, number in (("term", self.term), ("partner's session", self.partner_session)):
            if not 0 <= number <= _U64:
                raise UsageError(f"{label} {number} is outside 0..{_U64}")

    @property
    def never_paired(self) -> bool:
        return bool(self.flags & PairFlag.NEVER_PAIRED)

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "volume_uuid": None if self.volume is None else str(self.volume),
            **{str(flag.name).lower(): flag in self.flags for flag in PairFlag},
            "record_on": self.record_on.name.lower(),
            "partner_ack": self.partner_ack.name.lower(),
            "term": self.term,
            "machine": None if self.machine == _NIL else self.machine.hex(),
            "partner_session": self.partner_session,
        }


def encode_pair(pair: PairState | None) -> bytes:
    """`STATE_BYTES` bytes; zeros for a volume of one node."""
    if pair is None:
        return NO_STATE
    return _STATE.pack(
        _NIL if pair.volume is None else pair.volume.bytes,
        pair.node,
        pair.flags,
        pair.record_on,
        pair.partner_ack,
        _ZERO,
        pair.term,
        pair.machine,
        pair.partner_session,
    )


def decode_pair(raw: bytes) -> PairState:
    """Of `STATE_BYTES` bytes; UsageError or ValueError for what `encode_pair` would not give."""
    volume, node, flags, record_on, partner_ack, zero, term, machine, session = _STATE.unpack(raw)
    if zero != _ZERO:
        raise UsageError("bytes of the pair's state that have to be zero are not")
    return PairState(
        node=node,
        volume=None if volume == _NIL else UUID(bytes=volume),
        flags=PairFlag(flags),
        record_on=RecordOn(record_on),
        partner_ack=PartnerAck(partner_ack),
        term=term,
        machine=machine,
        partner_session=session,
    )
