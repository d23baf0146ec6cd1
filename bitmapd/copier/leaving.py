"""Extents that were given away while something of ours may still land there (pure).

Another node takes over an extent at once, and its hosts write there.  But a copy that is in flight,
or one that was lost and may be carried out late, would put old content on top of what the other
node copies.  So it has to know when that is over.

1. An extent waits as long as one of its *reasons* lasts: a transfer in flight, a loss in doubt.
2. Whoever ends a reason and begins another for the same extent begins first.
3. `free` is called once for each extent that waits, when nothing of ours is left that could land,
   and never from inside a call of one of the methods.

A crash forgets; whoever takes over then knows that something may land late (`late`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.media.base import Scheduler

Free = Callable[[list[int]], None]


class Leaving:
    """See the module docstring."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._reasons: dict[int, int] = {}  # extent -> how many
        self._free: dict[int, Free] = {}

    def __bool__(self) -> bool:
        """Whether any extent waits."""
        return bool(self._reasons)

    def waits(self, extent: int) -> bool:
        """Whether it was given away and something of ours may land there."""
        return extent in self._reasons

    def may_land(self, extents: Iterable[int]) -> None:
        """There is one more reason for each of these, which have been given away."""
        for extent in extents:
            self._reasons[extent] = self._reasons.get(extent, 0) + 1

    def tell(self, extents: Iterable[int], free: Free) -> set[int]:
        """Those that wait; `free` will be called for them, and nobody else's for the same ones."""
        waiting = {extent for extent in extents if extent in self._reasons}
        self._free.update(dict.fromkeys(waiting, free))
        return waiting

    def cannot_land(self, extents: Iterable[int]) -> None:
        """One reason of each is over."""
        over: dict[Free, list[int]] = {}
        for extent in extents:
            self._reasons[extent] -= 1
            if not self._reasons[extent]:
                del self._reasons[extent]
                over.setdefault(self._free.pop(extent), []).append(extent)
        for free, gone in over.items():
            self._scheduler.call_soon(free, gone)
