"""Writes that may land late: what a lost connection, or a process that died, has left on its way.

A server goes on with what it had received when its client is gone, and so does a disk behind a
transport.  Such a write lands on top of whatever was copied to the same place meanwhile, and brings
old content back to a secondary that seemed equal.  What can be known of it:

- A write that was answered, with success or an error, is over.
- A write that never left this machine as a whole will never be carried out (`Target.lands_late`).
- Nothing that may land does so later than `bound_s` after the next connection is there.  No server
  says when it has finished with a connection that it lost, so this is the administrator's word
  (`late_writes` in the configuration), and the only thing here that is believed.

So the places in question are *suspect*: they are copied as usual, once more `QUIET_S` after the
secondary is back, and a last time when the bound is over.

Invariants:
1. From the error of a write to its last copy a suspect place is not clean, so its extent stays in
   the record.  What lands late finds its place recorded.
2. For the first `QUIET_S` a suspect place keeps the volume from being in sync: nearly all that
   lands late does so by then.  Later ones are named by the record and by `suspect_blocks`.
3. Time runs only from when the secondary is there: what a network holds back is held back until
   then.  It runs whether or not copying is paused, and whatever becomes of the connection later.
4. What is in doubt when it is given away, or is lost after that, is nothing to the gate; its place
   is free when the doubt is over (`Leaving`).
5. After a process that died everything that is recorded is suspect, since nobody remembers what was
   on its way; until `QUIET_S` are over nothing is copied, so that most is copied only once.

Order: a place that ceases to be suspect is marked to be copied in the same event, hence recorded
until that copy was settled.

A crash loses the list.  The record names all its places, and what starts next suspects the lot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.copier.leaving import Leaving
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Scheduler
from bitmapd.record.geometry import Geometry

QUIET_S = 10.0


class _Doubt:
    """Where one loss may land."""

    __slots__ = ("blocks", "extents", "given")

    def __init__(self) -> None:
        self.blocks = BlockSet()  # of ours; the gate holds or suspects them
        self.extents = BlockSet()  # that have such blocks
        self.given: set[int] = set()  # extents that were ours


class LateWrites:
    """See the module docstring.  `proceed` is called when copies that had to wait may begin."""

    def __init__(
        self,
        geometry: Geometry,
        gate: Gate,
        scheduler: Scheduler,
        leaving: Leaving,
        proceed: Callable[[], None],
        *,
        bound_s: float,
    ) -> None:
        self._geometry = geometry
        self._gate = gate
        self._scheduler = scheduler
        self._leaving = leaving
        self._proceed = proceed
        self.bound_s = bound_s
        self._lost: _Doubt | None = None  # since the secondary went away
        self._inherited: _Doubt | None = None  # of a predecessor, until the secondary is there
        self._doubts: list[_Doubt] = []  # all of them that are not over
        self._copy_after_s = float("-inf")

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on."""
        self._geometry = geometry

    def lost(self, first: int, stop: int) -> None:
        """A write of these blocks ended in an error, and may yet be carried out."""
        if self._lost is None:
            self._lost = self._new()
            self._gate.hold(self._lost.blocks)
        self._add(self._lost, first, stop)

    def predecessor_died(self) -> None:
        """Another process copied before this one: whatever waits to be copied is suspect."""
        if self._gate.taken and self.bound_s:
            self._inherited = self._new()
            self._gate.suspect(self._inherited.blocks)
            for run in self._gate.taken.runs():
                self._add(self._inherited, *run)
            self._copy_after_s = float("inf")

    def other_node_died(self, extents: Iterable[tuple[int, int]]) -> None:
        """Another node copied these runs of extents, which are ours now."""
        if not self.bound_s:
            return
        if self._inherited is None:
            self._inherited = self._new()
            self._gate.suspect(self._inherited.blocks)
            self._copy_after_s = float("inf")
        for run in extents:
            self._add(self._inherited, *self._geometry.extent_blocks(*run))

    def _new(self) -> _Doubt:
        doubt = _Doubt()
        self._doubts.append(doubt)
        return doubt

    def _add(self, doubt: _Doubt, first: int, stop: int) -> None:
        per = self._geometry.blocks_per_extent
        extents = first // per, (stop - 1) // per + 1
        doubt.blocks.add(first, stop)
        doubt.extents.add(*extents)
        if self._leaving:
            self._give(doubt, {extent for extent in range(*extents) if self._leaving.waits(extent)})

    def _give(self, doubt: _Doubt, extents: set[int]) -> None:
        """These of its extents are not ours."""
        for extent in extents:
            doubt.extents.discard(extent, extent + 1)
            doubt.blocks.discard(*self._geometry.extent_blocks(extent, extent + 1))
        self._leaving.may_land(extents - doubt.given)
        doubt.given |= extents

    def given(self, extents: set[int]) -> None:
        """These are ours no longer."""
        for doubt in self._doubts:
            self._give(doubt, {e for e in extents if doubt.extents.any(e, e + 1)})

    def may_copy(self, now_s: float) -> bool:
        """Whether nothing that a process which died had sent is waited for."""
        return now_s >= self._copy_after_s

    def arrived(self) -> None:
        """The secondary is there: what may land late does so within the bound from now on."""
        now_s, quiet_s = self._scheduler.time(), min(QUIET_S, self.bound_s)
        if self._inherited is not None:
            inherited, self._inherited = self._inherited, None
            self._copy_after_s = now_s + quiet_s
            self._scheduler.call_later(quiet_s, self._proceed)
            self._scheduler.call_later(self.bound_s, self._over, inherited)
        if self._lost is not None:
            lost, self._lost = self._lost, None
            self._scheduler.call_later(quiet_s, self._quiet, lost, now_s + self.bound_s)

    def _quiet(self, lost: _Doubt, until_s: float) -> None:
        rest_s = until_s - self._scheduler.time()
        if rest_s > 0:
            self._gate.suspect(lost.blocks)
            self._scheduler.call_later(rest_s, self._over, lost)
        else:
            self._end(lost)
        self._gate.release(lost.blocks)
        self._proceed()

    def _over(self, suspect: _Doubt) -> None:
        self._end(suspect)
        self._gate.trust(suspect.blocks)
        self._proceed()

    def _end(self, doubt: _Doubt) -> None:
        self._doubts.remove(doubt)
        self._leaving.cannot_land(doubt.given)
