"""The end of a point: from END until what was sent may leave the record.

What a flush of both sides is to a copier, this is to a sender: the receiver has the point, the
primary was flushed after the last read for it, and the superblock names it; in this order, and only
then is what was sent settled.

Invariants:
1. The primary's flush begins after END, and nothing is read from then on until the point is closed.
2. The superblock is written after COMMITTED and after the flush; nothing is settled before it is
   durable.  So a receiver that lacks a point against which something was cleared is known by it.
3. A flush of the primary that failed, whoever asked for it, or a superblock that cannot be written
   takes all of it back: it is dirty again, whatever the receiver has.

One at a time.  A crash leaves all of it in the record, or the clears that were not written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from bitmapd.copier.passes import Passes
from bitmapd.gate.cycle import CutGate
from bitmapd.media.base import Device, Done


class Ledger(Protocol):
    """What remembers committed points over a crash: the superblock of the record."""

    def commit(self, point: int, cut_ns: int, done: Done) -> None:
        """Calls back, never from inside, when this point is durably the newest one.  `cut_ns`: Unix
        time of its cut."""


class Closing:
    """See the module docstring.  `closed(error)` is called when it is over: with the error of the
    superblock, if there was one; `flushed` when the primary was flushed, or could not be."""

    def __init__(
        self,
        gate: CutGate,
        primary: Device,
        ledger: Ledger,
        passes: Passes,
        closed: Callable[[OSError | None], None],
        flushed: Callable[[], None],
    ) -> None:
        self._gate = gate
        self._primary = primary
        self._ledger = ledger
        self._passes = passes
        self._closed = closed
        self._flushed = flushed
        self._point = 0
        self._cut_ns = 0
        self._committed = False
        self._flushing = False
        self._failures = 0  # of flushes of the primary
        self._failures_before = 0  # those when the flush of this point began
        self.storing = False

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, whatever the receiver does."""
        return not (self._flushing or self.storing)

    def begin(self, point: int, cut_ns: int) -> None:
        """END is said, of a point that was cut at this Unix time."""
        self._point, self._cut_ns = point, cut_ns
        self._committed = False
        self._failures_before = self._failures
        self._flushing = True
        self._primary.flush(self._was_flushed)

    def give_up(self) -> None:
        """The point is open again."""
        self._point, self._committed = 0, False

    def committed(self) -> None:
        """The receiver has it."""
        self._committed = True
        self._store()

    def not_flushed(self) -> None:
        """A flush of the primary failed: what was read before may be gone."""
        self._failures += 1

    def _was_flushed(self, error: OSError | None) -> None:
        self._flushing = False
        if error is not None:
            self._gate.not_durable(error)
        self._store()
        self._flushed()

    def _store(self) -> None:
        if self._committed and self._point and not self._flushing and not self.storing:
            self.storing = True
            extents = self._gate.begin_settle()
            self._passes.settle_began()
            self._ledger.commit(self._point, self._cut_ns, partial(self._was_stored, extents))

    def _was_stored(self, extents: set[int], error: OSError | None) -> None:
        self.storing = False
        self._point = 0
        if error is None and self._failures == self._failures_before:
            self._gate.settle(extents)
        else:
            self._gate.unsettle(extents)
            self._passes.settle_failed(extents)
        self._closed(error)
