"""Demand paging with a perfect link: the bounds that policies without prediction have (pure).

Both hold a fixed number of extents, take one in only when it is written, and may give up any
other at once: nothing is ever in flight.  `lru` gives up the one that was written least recently,
`belady` the one that is written again last, which needs knowledge of the future and cannot be
done better without prediction.

The extents of a batch, or of one write, that are missing cost one update together.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict

from dmctl.simulate.model import BatchModel
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

UPDATE_BYTES = 4096


class Paging(BatchModel):
    """What both have in common."""

    def __init__(self, trace: Trace, params: Params, limit_units: int | None = None) -> None:
        super().__init__(trace, params, params.extent_bytes)
        self.slots = limit_units or params.units(params.extent_bytes)
        self.limit_units = self.slots
        self.faults = 0

    def submit(self, now_s: float, first: int, stop: int) -> None:
        waited = []
        for write in range(first, stop):
            faults = self.faults
            for extent in range(self.first[write], self.stop[write]):
                self.touch(extent)
            if self.faults != faults:
                waited.append(write)
        if waited:
            latency_s = self.params.record_latency_s
            self.meter.waited_updates += 1
            self.meter.wrote_record(1, UPDATE_BYTES)
            self.meter.waited(waited, latency_s)
            self.meter.both(now_s, self.count())

    def touch(self, extent: int) -> None:
        """The extent is written; a fault if it was not held."""
        raise NotImplementedError

    def count(self) -> int:
        raise NotImplementedError


class Lru(Paging):
    """Least recently used goes first."""

    def __init__(self, trace: Trace, params: Params, limit_units: int | None = None) -> None:
        super().__init__(trace, params, limit_units)
        self._held: OrderedDict[int, None] = OrderedDict()

    def touch(self, extent: int) -> None:
        if extent in self._held:
            self._held.move_to_end(extent)
            return
        self.faults += 1
        if len(self._held) == self.slots:
            self._held.popitem(last=False)
        self._held[extent] = None

    def count(self) -> int:
        return len(self._held)

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(extent in self._held for extent in range(first_unit, stop_unit))


class Belady(Paging):
    """What is used last in future goes first."""

    def __init__(self, trace: Trace, params: Params, limit_units: int | None = None) -> None:
        super().__init__(trace, params, limit_units)
        self._next = _next_uses(self.first, self.stop)
        self._at = 0
        self._held: set[int] = set()
        self._by_use: list[tuple[int, int]] = []  # (-next use, extent) of each touch

    def touch(self, extent: int) -> None:
        following = self._next[self._at]
        self._at += 1
        if extent not in self._held:
            self.faults += 1
            if len(self._held) == self.slots:
                # Entries of uses that are over are behind all that are still to come.
                _, victim = heapq.heappop(self._by_use)
                self._held.remove(victim)
            self._held.add(extent)
        heapq.heappush(self._by_use, (-following, extent))

    def count(self) -> int:
        return len(self._held)

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(extent in self._held for extent in range(first_unit, stop_unit))


def _next_uses(first: array[int], stop: array[int]) -> array[int]:
    """For each touch of an extent, in order, the number of the touch that comes next."""
    touched = [e for low, high in zip(first, stop, strict=True) for e in range(low, high)]
    following = array("q", bytes(8 * len(touched)))
    latest: dict[int, int] = {}
    for at in range(len(touched) - 1, -1, -1):
        following[at] = latest.get(touched[at], len(touched))
        latest[touched[at]] = at
    return following
