"""Who keeps the record: what the gate, and all that asks like it, may rely on (pure).

To the gate the record is a set of extents with one question, whether extents are *covered*, and two
changes, `add` and `drop`.  `RecordStore` is the record of one appliance.  Whoever takes its place
may know more than stored bits (who may write an extent, say), but keeps to these rules.

Invariants:
1. An extent that is covered is found by whoever recovers, whatever happens next: a write to it
   needs nothing more.  It stays covered until it is dropped, or leaves with all its dirt by a
   call of the gate; neither an error nor a later page write takes that away.  Where another node's
   copy has counted, it ends with that node's link: the next write waits for the copy here.
2. `add` returns False and never calls back, and then all that was needed is covered; or it returns
   True and calls back exactly once, never inside the call.  Called back without error, what was
   needed is covered except for what was dropped meanwhile, so the caller asks `covers` again.
   With an error it may be covered or not, and may come to be covered later.
3. What `add` takes up counts as recorded when it returns, durable or not: `recorded_extents`,
   `missing` and `recorded_runs` tell of what the record should hold.  Everything covered is
   recorded.
4. `drop` ends covering and counting at once, in the same event, so no later write to the extent is
   a hit.  The stored copy may name it for longer, and a crash brings it back.  The caller has found
   it clean in this event: equal and durable on both sides, with no write to it in flight.
5. Nothing leaves the record by itself: only what the gate drops or gives away.

Extents are numbers from 0; runs and ranges are pairs [first, stop).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from bitmapd.media.base import Done

Ranges = Sequence[tuple[int, int]]


class Record(Protocol):
    """See the module docstring.  A type, and nothing at run time."""

    # -- questions ------------------------------------------------------------------------
    def covers(self, first: int, stop: int) -> bool:
        """Whether all of extents [first, stop) are covered.  Every write asks, so this is short."""

    @property
    def recorded_extents(self) -> int: ...

    def missing(self, first: int, stop: int) -> int:
        """How many of extents [first, stop) are not recorded."""

    def recorded_runs(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Maximal runs of recorded extents in [start, end), in order."""

    def covered_runs(self) -> Iterator[tuple[int, int]]:
        """Maximal runs of covered extents, in order."""

    @property
    def settled(self) -> bool:
        """Whether the stored copy is as it should be: nothing is written or waits to be."""

    # -- changes --------------------------------------------------------------------------
    def add(self, needed: Ranges, extra: Ranges, done: Done) -> bool:
        """Have `needed` covered; of `extra`, a guess, what costs nothing beside is taken along."""

    def drop(self, extents: Iterable[int]) -> None:
        """Take extents out; those that are not recorded are passed over."""

    def commit(self) -> None:
        """Begin at once what `add` has left for the end of this turn of the loop."""

    def flush_clears(self) -> None:
        """Begin to take out of the stored copy what was dropped."""

    def destage_clears(self, done: Done) -> None:
        """Call back when nothing that was dropped up to now is in the stored copy any more; with an
        error if it may be."""
