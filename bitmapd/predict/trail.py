"""The trail: in which order extents came into use, for as long as memory allows (pure).

An extent is put down each time it comes into use: when it is missed, and when it is written again
after a pause.  What stands near one another on the trail was used at the same time; when one of
them is missed again, the others are likely to follow, in this or another order.  So journals that
wrap around, nightly jobs and checkpoints are recognised without looking for periods.

1. An extent counts where it stands last; older places of it are passed over.
2. `CAPACITY` places are kept, the oldest are overwritten: 8 bytes each and an entry in a
   dictionary, about 4 MiB when full.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

CAPACITY = 32768


class Trail:
    """Places are numbered from 0 on and never used again."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._ring = array("q", [-1]) * capacity
        self._end = 0  # number of the next place
        self._place: dict[int, int] = {}

    def __len__(self) -> int:
        """How many extents stand on the trail."""
        return len(self._place)

    def put(self, extent: int) -> None:
        slot = self._end % self._capacity
        old = self._ring[slot]
        if self._place.get(old) == self._end - self._capacity:
            del self._place[old]
        self._ring[slot] = extent
        self._place[extent] = self._end
        self._end += 1

    def place(self, extent: int) -> int | None:
        """Where the extent stands."""
        return self._place.get(extent)

    def between(self, first: int, stop: int) -> list[int]:
        """The extents whose last place is in [first, stop), in order."""
        first, stop = max(first, self._end - self._capacity, 0), min(stop, self._end)
        if first >= stop:
            return []
        ring, begin, end = self._ring, first % self._capacity, stop % self._capacity
        part = ring[begin:end] if begin < end else ring[begin:] + ring[:end]
        place = self._place
        return [extent for number, extent in enumerate(part, first) if place[extent] == number]

    def latest(self, count: int) -> list[int]:
        """The extents that came into use last, oldest first, at most `count`."""
        found: list[int] = []
        for number in range(self._end - 1, max(self._end - self._capacity, 0) - 1, -1):
            if len(found) == count:
                break
            extent = self._ring[number % self._capacity]
            if self._place[extent] == number:
                found.append(extent)
        return found[::-1]

    def restore(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self.put(extent)
