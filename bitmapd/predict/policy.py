"""What a prediction policy is: the seam between the gate and the predictors (pure).

A policy says which extents ride along with a miss, which clean extents are worth keeping, and
which go first when the record is over its limit.  It is fed by explicit events and never reads
a clock, so the gate and a simulator run the same code.

1. A policy only ever *adds* extents to the record beyond need, or gives up extents that the gate
   knows to be clean.  No answer of a policy can break the superset rule.
2. Time is seconds of a monotonic clock, given with every event; it never goes back.
3. State is bounded: a policy holds details only for extents that are in the record or that it
   chose to remember, up to a limit of its own.

Protocol of calls: `wrote` for every write in order of arrival (before the data are written);
then, if the write was a miss, `predict`.  `added` after extents have entered the record, for
whatever reason; `dropped` after they have left.  `wants` is asked when an extent has become clean
(its blocks are durable on both sides): true keeps it, false drops it.  `expired` is called about
once a second and names extents that have been kept long enough; those that are dirty at that
moment are skipped by the gate and come up again through `wants`.  `victims` is called when the
record is over its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from bitmapd.record.hints import Hints

# How many extents are evicted at most for each that misses have brought: a record that is overfull
# of what is dirty shrinks, and no miss has to wait for a search through it.
EVICTIONS_PER_ADDITION = 2


class Policy(Protocol):
    """See the module docstring for the order of calls."""

    @property
    def name(self) -> str: ...

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        """A write to extents [first, stop) arrived; `hit` if all were in the record."""

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        """Extra ranges [first, stop) to record with this miss; those that matter most.

        In extents: `limit` of the record, and `recorded` once this miss is.  What goes beyond the
        limit is evicted soon afterwards, with what `victims` names.  Ranges may overlap one
        another and what is recorded already; they lie inside the volume.
        """

    def added(self, first: int, stop: int, now_s: float) -> None:
        """Extents [first, stop) have entered the record."""

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        """These extents have left the record."""

    def wants(self, extent: int, now_s: float) -> bool:
        """Whether a recorded extent that has just become clean should stay."""

    def expired(self, now_s: float) -> Sequence[int]:
        """Recorded extents that are no longer worth keeping; each is named once."""

    def hints(self) -> Hints | None:
        """What was learnt, for the next session; none if nothing was."""

    def recall(self, hints: Hints) -> bool:
        """Before the first event: go on from what was learnt before, when the volume may have been
        smaller.  False if it does not fit this policy; then nothing has changed."""

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        """Up to `count` recorded extents for which `is_clean` holds, least useful first."""
