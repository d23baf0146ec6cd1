"""When to poll a busy connection for a moment instead of going back to the event loop (pure).

A client that keeps one request in flight sends the next one some microseconds after its answer.
Asking the socket again at once finds it there for about a third of the price of a turn of the
event loop.  Polling that finds nothing is wasted, so it is tried only while it succeeds:

1. After n failures in a row the next 2^n - 1 opportunities (at most MAX_PASSED) are passed up; one
   success makes polling the rule again.
2. One attempt lasts at most SPIN_S, or DEVICE_SPIN_S while the device has a request of the client:
   waking up costs about as long as a fast disk takes.  The second operation of a miss does not
   renew that: with a device of 60 to 140 us it was no faster, on two busy processors, and took up
   to three times the processor time.  A run of successes lasts at most RUN_S, after which timers
   and other connections have their turn.
3. There is no polling with a single processor, where the client could not run meanwhile, nor
   where it is not wanted.
"""

from __future__ import annotations

SPIN_S = 40e-6
DEVICE_SPIN_S = 200e-6
RUN_S = 500e-6
MAX_PASSED = 255


class SpinPolicy:
    """Counts successes and failures of polling; one for a server."""

    __slots__ = ("_allowed", "_failures", "_passes")

    def __init__(self, processors: int, *, enabled: bool = True) -> None:
        self._allowed = enabled and processors > 1
        self._failures = 0
        self._passes = 0

    def wanted(self) -> bool:
        """Asked at each opportunity; True means poll now, and tell how it went."""
        if not self._allowed:
            return False
        if self._passes:
            self._passes -= 1
            return False
        return True

    def worked(self) -> None:
        self._failures = 0

    def failed(self) -> None:
        self._failures = min(self._failures + 1, MAX_PASSED.bit_length())
        self._passes = (1 << self._failures) - 1
