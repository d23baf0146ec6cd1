"""Settling: flushes both sides, so that what was copied before counts as equal from then on.

A copy that was written may sit in a cache of the secondary, and what it was read from in one of the
primary.  Only when both have been flushed since does the gate hear that an extent is settled.  An
error of either may mean that a cache is gone, so it takes back everything since the last settle.

Invariants:
1. `Gate.settle` is called only if both flushes, submitted after `begin_settle`, succeeded, and no
   device has failed meanwhile (`take_back`).
2. What was taken back is to be copied again: it is in `taken`, in the pass and in the ages, as if
   it had never been copied.
3. After an error of the secondary at most half of what it took back is at risk at a time, then
   twice as much after each settle that succeeds (`most_in_flight_bytes`).
4. After a failed flush of the primary nothing is settled for `SETTLE_INTERVAL_S`: copied again
   soon, but not in a circle.

One settle at a time.  A crash before the gate has settled leaves all of it in the record.
"""

from __future__ import annotations

import math
from typing import Protocol

from bitmapd.copier.ages import Ages
from bitmapd.copier.passes import Passes
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Device, Scheduler, Target

SETTLE_INTERVAL_S = 5.0
# A server that answers from its page cache begins to write when it is flushed.  With one flush at
# the end of a GiB its disk idles while the primary's works, and the other way round: 0.8 of
# nbdcopy's speed, with one for so many bytes 1.0.
SETTLE_BYTES = 256 << 20
# An error of the secondary takes back what was copied since the last settle.  So after one, less is
# copied between two settles: half of what was at risk, then twice as much after each that succeeds.
BATCH_BYTES = 64 << 20


class SettlingOwner(Protocol):
    """What the owner hears; never from inside a call of one of the methods."""

    def not_flushed(self, device: Device, error: OSError) -> None:
        """A flush failed; `take_back` has to be called in the same event."""

    def settled(self) -> None:
        """Both sides hold what was copied before; the gate has been told."""

    def pass_done(self) -> None:
        """Everything of the pass is durable; comes before `settled`."""

    def proceed(self) -> None:
        """A settle is over, however it ended."""


class Settling:
    """See the module docstring."""

    def __init__(
        self,
        gate: Gate,
        primary: Device,
        secondary: Target,
        scheduler: Scheduler,
        ages: Ages,
        passes: Passes,
        *,
        owner: SettlingOwner,
        block_bytes: int,
    ) -> None:
        self._gate = gate
        self._primary = primary
        self._secondary = secondary
        self._scheduler = scheduler
        self._ages = ages
        self._passes = passes
        self._owner = owner
        self._block_bytes = block_bytes
        self._extents: set[int] = set()  # of the settle under way
        self._unanswered = 0  # flushes of it
        self._next_s = 0.0
        self._hold_until_s = float("-inf")
        self._failures = 0
        self._batch_bytes = 0  # copied since the last settle began
        self._batch_limit_bytes: int | None = None  # after an error: so much at risk at a time

    @property
    def under_way(self) -> bool:
        return self._unanswered > 0

    def may_begin(self, now_s: float) -> bool:
        """Whether there is something to settle, and nothing against it."""
        return not self.under_way and self._gate.has_copied and now_s >= self._hold_until_s

    def is_due(self, now_s: float) -> bool:
        """Whether a settle should not wait until nothing is left to copy."""
        return now_s >= self._next_s or self._batch_bytes >= SETTLE_BYTES

    def put_off(self, now_s: float) -> None:
        """The next settle is not due before the interval is over."""
        self._next_s = now_s + SETTLE_INTERVAL_S

    # -- a settle -------------------------------------------------------------------------
    def begin(self, now_s: float) -> None:
        self.put_off(now_s)
        failures = self._failures
        self._batch_bytes = 0
        self._extents = self._gate.begin_settle()
        self._ages.settle_began()
        self._passes.settle_began()
        self._unanswered = 2

        def flushed(device: Device, error: OSError | None) -> None:
            if error is not None:
                self._owner.not_flushed(device, error)
            self._unanswered -= 1
            if not self._unanswered:
                self._flushed(failures)

        self._secondary.flush(lambda error: flushed(self._secondary, error))
        self._primary.flush(lambda error: flushed(self._primary, error))

    def _flushed(self, failures: int) -> None:
        extents, self._extents = self._extents, set()
        if failures == self._failures:
            self._gate.settle(extents)
            self._ages.settled()
            self._risk_more()
            if self._passes.ended(nothing_copied=not self._gate.has_copied):
                self._owner.pass_done()
            self._owner.settled()
        else:
            self._gate.unsettle(extents)
            self._ages.settle_failed(self._gate.taken)
            self._passes.settle_failed(extents)
        self._owner.proceed()

    # -- errors ---------------------------------------------------------------------------
    def take_back(self) -> None:
        """A device failed: what was copied and not flushed, or is being flushed, does not count."""
        self._failures += 1
        self._passes.again(self._gate.forget_copied())
        self._ages.forgotten(self._gate.taken)

    def hold(self) -> None:
        """The primary could not be flushed: settle nothing for a while."""
        self._hold_until_s = self._scheduler.time() + SETTLE_INTERVAL_S

    def given(self, extents: set[int]) -> None:
        """These are no longer ours to settle, nor to copy again."""
        self._extents = self._extents - extents

    # -- how much is at risk --------------------------------------------------------------
    @property
    def most_in_flight_bytes(self) -> float:
        """After an error, what was copied has to be settled before more may be lost with it."""
        if self._batch_limit_bytes is None:
            return math.inf
        if self.under_way:
            return 0
        return self._batch_limit_bytes - (self._batch_bytes if self._gate.has_copied else 0)

    def copied(self, length_bytes: int) -> None:
        """So much more is on the secondary and not flushed."""
        self._batch_bytes += length_bytes

    def risk_less(self, in_flight_bytes: int) -> None:
        """After an error of the secondary has taken back what was copied since the last settle."""
        at_risk = min(self._batch_bytes + in_flight_bytes, BATCH_BYTES)
        self._batch_limit_bytes = max(at_risk // 2, self._block_bytes)
        self._batch_bytes = 0

    def _risk_more(self) -> None:
        if self._batch_limit_bytes is not None:
            twice = 2 * self._batch_limit_bytes
            self._batch_limit_bytes = twice if twice <= BATCH_BYTES else None
