"""What each extent is to this node (pure): the bits that all of `rights` works on.

| state | bits | meaning |
| --- | --- | --- |
| none | - | neither this node's nor, as far as it knows, the other's |
| own | `own`, `held` | this node may write here |
| giving | `own` | the other waits: no new writes here, those in flight have to land |
| other | `other` | in the record of the other node |
| owed | `owed` | given, and the other has not said that it has it |

Invariants:
1. `own` is disjoint from `other` and `owed`; `held` is a part of `own`.
2. The bitmaps stay the same objects for as long as the process lives, so whoever asks often keeps
   them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Protocol

from bitarray import bitarray

from bitmapd.media.base import Done
from bitmapd.partner.messages import Message
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Run, Runs
from bitmapd.record.extents import unset, zeros
from bitmapd.record.geometry import Geometry


class Stance(Enum):
    """What a place may be used for that this node does not own."""

    NOTHING = "nothing"  # not even what is owned counts: the process has met nobody yet
    CUT = "cut"  # no link: a right is waited for
    FROZEN = "frozen"  # views are being exchanged: rights do not change
    UP = "up"  # a right is asked for
    ALONE = "alone"  # everything is ours
    SPLIT = "split"  # both may have written: everything is read, nothing is written


class Home(Protocol):
    """The appliance around these rights; nothing here calls back from inside a call."""

    def send(self, message: Message) -> int:
        """Returns the sequence of its (last) frame."""

    def push(self) -> None:
        """What was sent leaves now, before whatever else this turn has to do."""

    def when_landed(self, call: Callable[[], None]) -> None:
        """Call back when every write of hosts that was submitted until now has ended."""

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None:
        """Likewise, of those to these extents; and no host writes them past us any more."""

    def keep(self, runs: Runs) -> None:
        """They have become ours or the other's: they belong into the stored record."""

    def store(self, runs: Runs, done: Done) -> bool:
        """Have them in the stored record, and call back when they are; or with an error.  False,
        and no call, if they are."""

    def unstored(self) -> None:
        """The stored record does not take what has to be in there before it is granted."""

    def forget(self, runs: Runs) -> None:
        """They are in nobody's record any more."""

    def give(self, extents: Sequence[int]) -> tuple[Runs, set[int]]:
        """What of them is dirty, as runs of blocks, leaves this node; and of which extents a copy
        is still under way (`Rights.freed` tells when it has ended)."""

    def take_over(self, dirt: Runs, embargoed: Iterable[int]) -> None:
        """These blocks are dirty, and these extents must not be copied until `free`."""

    def free(self, extents: Iterable[int]) -> None: ...

    def free_all(self) -> None: ...

    def guessed(self, runs: Runs) -> None:
        """They have come into the record as the policy had predicted."""

    def refused(self, runs: Runs) -> None:
        """They have not."""

    def drop_clean(self, extents: Iterable[int]) -> None:
        """Those of them that are clean leave the record now (by `Rights.drop`)."""


class Claims:
    """See the module docstring.  `node` is 1 or 2."""

    def __init__(self, geometry: Geometry, node: int) -> None:
        self.geometry = geometry
        self.node = node
        self._stance = Stance.NOTHING
        self.goes_on = False  # what is nobody's may be taken in this cut
        self._knows = False
        size = geometry.extents
        self.own, self.held = zeros(size), zeros(size)
        self.other, self.owed = zeros(size), zeros(size)
        self.own_extents = 0
        self.owned_alone: bitarray | None = None  # since this node went alone

    @property
    def stance(self) -> Stance:
        return self._stance

    @stance.setter
    def stance(self, stance: Stance) -> None:
        self._stance = stance
        self.goes_on = False
        # Every read of a host asks, and a member of an enum takes long to be looked up.
        self._knows = stance not in (Stance.NOTHING, Stance.FROZEN, Stance.SPLIT)

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on; what has come is nobody's yet."""
        more = zeros(geometry.extents - self.geometry.extents)
        self.geometry = geometry
        for bits in (self.own, self.held, self.other, self.owed, self.owned_alone):
            if bits is not None:
                bits.extend(more)

    def gain(self, runs: Iterable[Run]) -> None:
        """These are ours from now on."""
        for first, stop in runs:
            self.own_extents += stop - first - self.own.count(True, first, stop)
            self.own[first:stop] = self.held[first:stop] = True
            self.other[first:stop] = self.owed[first:stop] = False
            if self.owned_alone is not None:
                self.owned_alone[first:stop] = True

    def be_alone(self) -> None:
        """Nobody else writes any more, it is believed."""
        self.stance = Stance.ALONE
        if self.owned_alone is None:
            self.owned_alone = self.own.copy()

    def lose(self, extent: int) -> None:
        self.own_extents -= 1
        self.own[extent] = self.held[extent] = False

    def become(self, own: bitarray, other: bitarray) -> None:
        """All of it, anew."""
        self.own[:], self.held[:], self.other[:] = own, own, other
        self.owed.setall(False)
        self.own_extents = own.count()
        self.owned_alone = None

    def know(self, runs: Runs, bits: bitarray) -> Runs:
        """What of them is not ours goes into these bits, `other` or `owed`, too; returns it."""
        found: list[Run] = []
        for first, stop in runs:
            found += unset(self.own, first, stop)
        for first, stop in found:
            bits[first:stop] = True
        return tuple(found)

    def check_removal(self, runs: Runs) -> None:
        """PeerError if the other has removed from its record what cannot be in there."""
        for first, stop in runs:
            for bits in (self.own, self.owed):
                at = bits.find(True, first, stop)
                if at >= 0:
                    raise PeerError(ErrorCode.ANSWER, f"extent {at} was removed by the other node")

    def is_others(self, extent: int) -> bool:
        """As far as this node knows."""
        return bool(self.other[extent] or self.owed[extent])

    def may_take(self, extent: int) -> bool:
        """Whether nobody has to be asked for one that is not ours."""
        if self.stance is Stance.ALONE:
            return True
        return self.goes_on and not self.is_others(extent)

    def nobodys(self, extents: Iterable[int]) -> list[int]:
        return [e for e in extents if not (self.own[e] or self.is_others(e))]

    def may_read(self, first: int, stop: int) -> bool:
        """Whether nobody has to be asked before extents [first, stop) are read."""
        if not self._knows:
            return self._stance is Stance.SPLIT
        if stop - first == 1:
            return not (self.other[first] or self.owed[first])
        return not (
            self.other.find(True, first, stop) >= 0 or self.owed.find(True, first, stop) >= 0
        )

    def blocks(self, extents: Runs) -> Runs:
        return tuple(self.geometry.extent_blocks(*run) for run in extents)
