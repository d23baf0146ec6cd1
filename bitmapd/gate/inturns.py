"""Work of many small steps, so many of them in a turn of the loop.

A discard of a TiB has a million extents, and a client may ask for hundreds of those.  Nobody
else is served while a callback runs, and a partner that hears nothing for seconds is lost.  So all
such work stands in one queue, whoever has asked for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from bitmapd.media.base import Scheduler


class InTurns:
    """Carries out what iterators do, the first to the end, then the next."""

    def __init__(self, scheduler: Scheduler, most_steps: int) -> None:
        self._scheduler = scheduler
        self._most_steps = most_steps
        self._waiting: deque[Iterator[None]] = deque()
        self._due = False

    def add(self, steps: Iterator[None]) -> None:
        """It begins at once if nothing is before it."""
        self._waiting.append(steps)
        if not self._due:
            self._go_on()

    def _go_on(self) -> None:
        self._due = True  # a step may add more
        left = self._most_steps
        while left and self._waiting:
            done = sum(1 for _ in islice(self._waiting[0], left))
            if done < left:
                self._waiting.popleft()
            left -= done
        self._due = bool(self._waiting)
        if self._due:
            self._scheduler.call_soon(self._go_on)
