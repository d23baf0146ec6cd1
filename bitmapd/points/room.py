"""Whether the receiver's journal has room for the open point (pure).

What is sent stays in the journal until its point is applied, also what was sent twice.  So an open
point may fill it, and can then be neither committed nor applied.

1. A point of which nothing was sent is not begun before all of it fits.
2. While more of it might be sent twice than there is room for, nothing is copied ahead: the cut is
   next, and then each block comes once.
3. One that is stuck all the same, with no credit left and none to come, is *hopeless* after
   `FULL_S`: it has to be dropped, and sent anew.  So has one that rule 1 holds back while the
   receiver keeps sendings of it that count no more.

Where the receiver writes into its image at once, before point 1 and in a catch-up that it was asked
to take so, nothing has to fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bitmapd.gate.cycle import CutGate
from bitmapd.points.codec import PAGE_BYTES
from bitmapd.points.spool import Spool
from bitmapd.points.uplink import Uplink

FULL_S: Final = 10.0
DESCRIBED_BYTES: Final = 64 << 10  # by a page of the journal, or more


class Room:
    """See the module docstring."""

    def __init__(
        self,
        gate: CutGate,
        spool: Spool,
        uplink: Uplink,
        block_bytes: int,
        emit: Callable[..., None],
    ) -> None:
        self._gate = gate
        self._spool = spool
        self._uplink = uplink
        self._block_bytes = block_bytes
        self._emit = emit
        self._told = False
        self._full_since_s = 0.0

    @property
    def is_full(self) -> bool:
        """Whether it was too small for the open point, which is not committed yet."""
        return self._told

    @property
    def is_tight(self) -> bool:
        """Whether what is left would not fit if more of it were sent twice."""
        if self._uplink.is_in_place:
            return False
        gate = self._gate
        # What was written again counts twice here; that seldom matters, and without it a copy of
        # the set has to be made: 1.5 ms for a TiB.
        if self._fits(gate.dirty_blocks()):
            return False
        current = gate.current
        return not self._fits(current.count() + gate.taken.minus(current).count())

    def _fits(self, blocks: int) -> bool:
        left_bytes = min(blocks * self._block_bytes, self._gate.changes.most_bytes)
        left_bytes += self._spool.all_bytes
        pages_bytes = left_bytes // DESCRIBED_BYTES * PAGE_BYTES
        return left_bytes + pages_bytes <= self._uplink.credit_bytes

    def refuses(self, now_s: float) -> bool:
        """Whether a point is not to be begun."""
        refuses = not self._uplink.entries and self.is_tight
        if refuses:
            self._tell(now_s)
        return refuses

    def is_hopeless(self, now_s: float) -> bool:
        """Whether the open point, which lacks credit, has to be dropped."""
        self._tell(now_s)
        uplink = self._uplink
        if uplink.is_in_place or uplink.applied < uplink.point - 1:
            self._full_since_s = now_s  # what is applied makes room
        return now_s >= self._full_since_s + FULL_S

    def _tell(self, now_s: float) -> None:
        if not self._told:
            self._told = True
            self._full_since_s = now_s
            self._emit("journal-full", message="the receiver's journal has no room for this point")

    def next_point(self) -> None:
        """Another one is open: the last was committed, or dropped."""
        self._told = False
