"""How long recorded extents stay: the bookkeeping that the policies share (pure).

A `StayTable` keeps, for extents that are in the record, when each was last used and at which
*level*; a level is a length of stay.  An extent's stay ends when it was not used for as long as
its level says, or when the whole volume was not written for `IDLE_S`: an idle volume's record
shrinks to nothing.

1. Only recorded extents are named, each once per stay; a stay begins when the extent enters the
   record or is written, and ends when it is named, leaves the record or is found unwanted.
2. An extent of which no details are kept has no stay: it is named at the next occasion, or is
   unwanted as soon as it is clean.  So the table may forget whatever it likes, whenever it likes.
3. Memory: two bits for each extent of the volume (256 KiB per TiB at 1 MiB), and details of at
   most `capacity` extents, about 250 bytes each.  The least recently used one is forgotten first.
4. Each level is in order of use, so what is due stands at its front: naming costs time for what is
   named, not for what is kept.  (A plain dict would have to be searched for its front from where
   it once began.)
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from bitarray import bitarray

IDLE_S = 30.0
CAPACITY = 32768

# Ranges longer than this (a trim of a whole volume, an initial sync) are not followed extent by
# extent: nothing is learnt from them, and they leave the record as soon as they are clean.
BULK_EXTENTS = 1024

LOOKS = 256
LOOSE_BATCH = 16384
_ONE = bitarray("1")


class StayTable:
    """Levels of stay of the recorded extents; `stays_s[level]` is the level's length."""

    def __init__(self, extents: int, stays_s: Sequence[float], capacity: int = CAPACITY) -> None:
        self.stays_s = tuple(stays_s)
        self.capacity = capacity
        self.last_write_s = float("-inf")
        self.recorded = bitarray(extents)
        self._loose = bitarray(extents)  # recorded, without details, not named yet
        self._loose_any = False
        self._level: dict[int, int] = {}
        self._used: list[OrderedDict[int, float]] = [OrderedDict() for _ in self.stays_s]

    def __len__(self) -> int:
        """How many extents have a stay."""
        return len(self._level)

    def level(self, extent: int) -> int | None:
        return self._level.get(extent)

    def used_s(self, extent: int) -> float:
        """When an extent that has a stay was last used."""
        return self._used[self._level[extent]][extent]

    def enter(self, first: int, stop: int) -> None:
        """Extents are in the record now; those that have and get no stay leave soon."""
        self.recorded[first:stop] = True
        self._loose[first:stop] = True
        self._loose_any = True

    def place(self, extent: int, level: int, now_s: float) -> list[tuple[int, int, float]]:
        """Begin or renew the stay of a recorded extent.  Returns what was forgotten for it."""
        old = self._level.get(extent)
        if old is None:
            self._loose[extent] = False
        else:
            del self._used[old][extent]
        self._level[extent] = level
        self._used[level][extent] = now_s
        return self._shrink() if len(self._level) > self.capacity else []

    def admit(self, extent: int, level: int, now_s: float) -> list[tuple[int, int, float]]:
        """`enter` and `place` in one, for an extent that has no stay."""
        self.recorded[extent] = True
        self._level[extent] = level
        self._used[level][extent] = now_s
        return self._shrink() if len(self._level) > self.capacity else []

    def _shrink(self) -> list[tuple[int, int, float]]:
        forgotten = []
        while len(self._level) > self.capacity:
            _, coldest = min(next(self._by_use(used)) for used in self._used if used)
            forgotten.append((coldest, *self.forget(coldest)))
            self._loose[coldest] = True
            self._loose_any = True
        return forgotten

    def forget(self, extent: int) -> tuple[int, float]:
        """End a stay; its level and when the extent was last used."""
        level = self._level.pop(extent)
        self._loose[extent] = False  # `enter` may have set it beside the stay
        return level, self._used[level].pop(extent)

    def leave(self, extent: int) -> tuple[int, float] | None:
        """The extent is in the record no more; level and last use if it had a stay."""
        self.recorded[extent] = False
        self._loose[extent] = False
        level = self._level.pop(extent, None)
        return None if level is None else (level, self._used[level].pop(extent))

    def idle(self, now_s: float) -> bool:
        return now_s - self.last_write_s >= IDLE_S

    def wants(self, extent: int, now_s: float) -> bool:
        """Whether the extent's stay goes on."""
        level = self._level.get(extent)
        if level is None or self.idle(now_s):
            return False
        return now_s < self._used[level][extent] + self.stays_s[level]

    def due(self, now_s: float) -> list[int]:
        """Extents whose stay has ended; the caller must `forget` every one of them."""
        if self.idle(now_s):
            return list(self._level)
        found = []
        for used, stay_s in zip(self._used, self.stays_s, strict=True):
            for extent, used_s in used.items():
                if used_s + stay_s > now_s:
                    break
                found.append(extent)
        return found

    def take_loose(self) -> list[int]:
        """Name recorded extents without a stay, at most `LOOSE_BATCH` at once."""
        if not self._loose_any:
            return []
        found = list(islice(self._loose.search(_ONE), LOOSE_BATCH))
        self._loose_any = len(found) == LOOSE_BATCH
        if found:
            self._loose[found[0] : found[-1] + 1] = False
        return [extent for extent in found if extent not in self._level]

    def count(self, level: int) -> int:
        """How many extents have a stay of this level."""
        return len(self._used[level])

    def oldest(self, level: int, count: int) -> Iterator[tuple[int, float]]:
        """Up to `count` extents of this level and when each was last used, oldest first."""
        return islice(self._used[level].items(), count)

    def coldest(
        self, count: int, is_clean: Callable[[int], bool], levels: Iterable[int] | None = None
    ) -> list[int]:
        """Up to `count` extents for which `is_clean` holds, least recently used first.

        Looks at a bounded number of extents: where very many old ones are dirty the secondary is
        away, and a miss must not pay for a search through them.
        """
        looks = LOOKS + 4 * count if count > 0 else 0
        chosen = self._used if levels is None else [self._used[level] for level in levels]
        in_order = heapq.merge(*(self._by_use(used) for used in chosen))
        clean = (extent for _, extent in islice(in_order, looks) if is_clean(extent))
        return list(islice(clean, max(count, 0)))

    def _by_use(self, used: dict[int, float]) -> Iterator[tuple[float, int]]:
        return ((used_s, extent) for extent, used_s in used.items())


def as_runs(extents: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges [first, stop) that cover exactly these extents."""
    runs: list[tuple[int, int]] = []
    for extent in sorted(extents):
        if runs and runs[-1][1] == extent:
            runs[-1] = (runs[-1][0], extent + 1)
        else:
            runs.append((extent, extent + 1))
    return runs
