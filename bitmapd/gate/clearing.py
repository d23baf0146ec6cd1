"""What leaves the record, and when.

An extent leaves for one of three reasons:
- It was settled, and the policy does not want it any longer.
- It was kept for later writes, and the policy says that it was kept for long enough.
- The record names more extents than its limit allows, and the policy gives it up.

Invariants:
1. Extents leave only through `_let_go`, and each was found clean in the same event.  So no answer
   of a policy takes from the record what may differ.  What is given to another node leaves by
   another way, with its dirt, and the policy hears of it here (`left`).
2. An extent that is open elsewhere (`gate/elsewhere`) is not clean.  It is *cooled*: left to the
   gate at a barrier and, when it is closed and clean, dropped by the next tick, unless the policy
   wants it after all, clean or not.  What was cooled because the record is too large goes all the
   same, unless its limit was raised meanwhile.
3. Room for what misses bring is made after them, in the same turn of the loop and by the policy's
   order; what is over the limit for other reasons goes with the tick.

A crash brings back some of what has left: clears are lazy, and a record that names more than it has
to only means more to copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bitmapd.gate.elsewhere import Elsewhere
from bitmapd.gate.unsettled import Unsettled
from bitmapd.media.base import Scheduler
from bitmapd.predict.policy import EVICTIONS_PER_ADDITION, Policy
from bitmapd.record.holder import Record

# Where others write, one part in so many of the record's limit is kept free for misses.
COOLING_PART = 16


class Clearing:
    """See the module docstring."""

    def __init__(
        self,
        store: Record,
        policy: Policy,
        unsettled: Unsettled,
        scheduler: Scheduler,
        *,
        limit_extents: int,
        elsewhere: Sequence[Elsewhere],
    ) -> None:
        self._store = store
        self._unsettled = unsettled
        self._scheduler = scheduler
        self._elsewhere = elsewhere
        self.policy = policy
        self.limit_extents = limit_extents
        self._brought = 0  # extents that the misses of this turn have added
        self._making_room = False  # is due in this turn
        self._evicting: set[int] = set()  # cooled because the record is too large

    @property
    def excess_extents(self) -> int:
        """How many extents the record names beyond its limit; negative while there is room."""
        return self._store.recorded_extents - self.limit_extents

    @property
    def is_shedding(self) -> bool:
        """Whether the record names more than it should, and waits for barriers to lose some."""
        return bool(self._evicting) and self.excess_extents > 0

    # -- what may leave ---------------------------------------------------------------------
    def is_clean(self, extent: int) -> bool:
        """Whether a recorded extent is known to be equal and durable on both sides."""
        for other in self._elsewhere:
            if other.is_open(extent):
                return False
        # `_is_settled`, written out: a miss on a full record asks for dozens.
        return self._store.covers(extent, extent + 1) and not self._unsettled.touches(extent)

    def _is_settled(self, extent: int) -> bool:
        """Whether it is recorded, and equal and durable on both sides as far as the gate knows."""
        return self._store.covers(extent, extent + 1) and not self._unsettled.touches(extent)

    def _may_retire(self, extent: int) -> bool:
        return extent not in self._evicting and self._is_settled(extent)

    # -- when -------------------------------------------------------------------------------
    def settled(self, extents: Iterable[int], now: float) -> None:
        """These were copied and both sides flushed: those that nobody wants leave."""
        clean = [extent for extent in extents if self._is_settled(extent)]
        self._retire((extent for extent in clean if not self.policy.wants(extent, now)), now)

    def make_room_for(self, brought_extents: int) -> None:
        """A miss has brought so many; evict for it before this turn of the loop is over."""
        self._brought += brought_extents
        if not self._making_room:
            self._making_room = True
            self._scheduler.call_soon(self._make_room)

    def _make_room(self) -> None:
        """Evict for the misses of this turn of the loop.

        Their pages are on their way by now, so a disk writes while this goes on: it takes as long
        as all else of a miss together.  An extent of a write that still waits may go, too, if it
        was clean; the write looks again when it no longer waits.
        """
        self._making_room = False
        self._store.commit()  # is done already, unless the first of these misses needed no page
        most, self._brought = EVICTIONS_PER_ADDITION * self._brought, 0
        count = min(self.excess_extents, most)
        if count <= 0:
            return
        now = self._scheduler.time()
        asked: set[int] = set()

        def may_go(extent: int) -> bool:
            if not self.is_clean(extent):
                return False
            asked.add(extent)
            return True

        # The policy is not relied upon: what it names without having asked is looked at.
        victims = self.policy.victims(count, may_go, now)
        self._let_go([extent for extent in victims if extent in asked or may_go(extent)], now)

    def tick(self, now: float) -> None:
        """Once a second: cooling, the limit, lazy clears."""
        self._retire(self.policy.expired(now), now)
        excess = self.excess_extents
        if self._elsewhere:
            # Cooling takes until the barrier after the next, so it begins before the limit; but for
            # no more misses than there can be.
            left = self._unsettled.extents - self._store.recorded_extents
            excess += min(left, self.limit_extents // COOLING_PART)
            if excess <= 0:
                self._evicting.clear()  # the limit was raised
            self._take_back(now)
            self._drop_cooled(now)
            excess -= len(self._evicting)
        if excess > 0:
            victims = self.policy.victims(excess, self._may_retire, now)
            if self._elsewhere:
                victims = [extent for extent in victims if self._may_retire(extent)]
                self._evicting.update(victims)
            self._retire(victims, now)
        self._store.flush_clears()

    def drop_all_clean(self, now: float) -> None:
        """Empty the record of everything that is clean: before a clean stop."""
        recorded = [e for first, stop in self._store.recorded_runs() for e in range(first, stop)]
        self.drop_clean(recorded, now)

    # -- how --------------------------------------------------------------------------------
    def _retire(self, extents: Iterable[int], now: float) -> None:
        """Have the record lose these: at once what is closed, after cooling what is open."""
        if self._elsewhere:
            extents = [extent for extent in extents if self._is_settled(extent)]
        for other in self._elsewhere:
            other.cool(extent for extent in extents if other.is_open(extent))
        self.drop_clean(extents, now)

    def _take_back(self, now: float) -> None:
        """What hosts write while it cools is wanted again.  It is not clean, and hosts that go on
        writing keep it so; each write would go through the gate until they stop."""
        for other in self._elsewhere:
            missed = [extent for extent in other.missed() if extent not in self._evicting]
            other.warm(extent for extent in missed if self.policy.wants(extent, now))

    def _drop_cooled(self, now: float) -> None:
        """Cooled extents that are closed and clean leave, unless they are wanted again."""
        for cooled in self._elsewhere:
            closed = [extent for extent in cooled.closed() if self.is_clean(extent)]
            wanted = [e for e in closed if e not in self._evicting and self.policy.wants(e, now)]
            for other in self._elsewhere:
                other.warm(wanted)
            self.drop_clean(set(closed).difference(wanted), now)

    def drop_clean(self, extents: Iterable[int], now: float) -> None:
        self._let_go([extent for extent in extents if self.is_clean(extent)], now)

    def _let_go(self, gone: list[int], now: float) -> None:
        if gone:
            self._store.drop(gone)
            self.left(gone, now)

    def left(self, gone: list[int], now: float) -> None:
        """These have left the record, or are given to another node and leave it in this event."""
        self.policy.dropped(gone, now)
        self._evicting.difference_update(gone)
        for other in self._elsewhere:
            other.gone(gone)
