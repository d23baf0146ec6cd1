"""Which writes are on their way to the primary, and when those of before have ended (pure).

A count of all of them would never reach zero while hosts are busy.  So writes are counted in
*flights*: each counts itself in and out of the one that is current when it is submitted.  Whoever
has to know that nothing of before is in flight any more ends the current one, and waits for it and
for all before it; writes that come later count elsewhere and hold up nobody.

Invariants:
1. A call comes once every write submitted before its `end` has ended, whatever else is waited for
   meanwhile: flights land in the order in which they were ended.
2. It comes exactly once, never from inside `end` or the completion of a write.

A crash ends all of them; what they wrote is in the record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from bitmapd.media.base import Scheduler


class Flight:
    """Writes that were submitted between two calls of `Flights.end`.

    A write that hits counts itself in and out without a call to here.
    """

    __slots__ = ("in_flight", "when_empty")

    def __init__(self) -> None:
        self.in_flight = 0
        self.when_empty: Callable[[], None] | None = None  # set when it is current no longer


class Flights:
    """See the module docstring."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.current = Flight()
        self._ended: deque[tuple[Flight, Callable[[], None]]] = deque()  # oldest first

    def end(self, landed: Callable[[], None]) -> Flight:
        """Call back once every write of now has ended.  Returns the flight that begins."""
        ended, self.current = self.current, Flight()
        ended.when_empty = self._land
        self._ended.append((ended, landed))
        self._land()
        return self.current

    def _land(self) -> None:
        while self._ended and not self._ended[0][0].in_flight:
            self._scheduler.call_soon(self._ended.popleft()[1])
