"""The gate as the copier and the record see it: eras, what is dirty, and what may leave (pure).

Hosts write all the time, so what is to be copied is taken era by era: the blocks that were written
in one are in `taken` from its end on, and may be copied once its writes have landed.  Here is all
of the gate that does not depend on how hosts ask; `gate.Gate` puts their requests in front of it.

Invariants:
1. A block whose content on the primary may differ from what the secondary durably holds is in one
   of the stages that `unsettled` tells of, and its extent is in the record.
2. `take_era` calls back once no write of that era or of an earlier one is in flight: what `taken`
   holds then may be read from the primary.
3. An extent leaves the record only through `clearing`, which takes none that invariant 1 names.
4. An extent that is open elsewhere (`gate/elsewhere`) may be dirty without being in any of these
   stages: its blocks are taken at the next barrier.  It is not clean.

A crash loses what is dirty; the record names every extent of it, and `take_recorded` marks all
their blocks at the next start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.clearing import Clearing
from bitmapd.gate.elsewhere import Elsewhere, Run
from bitmapd.gate.flights import Flights
from bitmapd.gate.unsettled import Unsettled
from bitmapd.media.base import Done, Scheduler
from bitmapd.predict.policy import Policy
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record


class Eras:
    """See the module docstring."""

    def __init__(
        self,
        geometry: Geometry,
        store: Record,
        policy: Policy,
        scheduler: Scheduler,
        *,
        limit_extents: int,
        elsewhere: Sequence[Elsewhere] = (),
        shared: bool = False,
        owns: Callable[[int], bool] | None = None,
    ) -> None:
        """`shared`: extents are given to another node and come back.  `owns` then tells which are
        ours now, covered or not; without it those that are covered are."""
        self._geometry = geometry
        self._elsewhere = tuple(elsewhere)
        self._store = store
        self._policy = policy
        self._scheduler = scheduler
        self.era = 1
        self._shared = shared
        self._owns = owns
        self._unsettled = Unsettled(geometry, self._is_ours if shared else None)
        self._current_era = self._unsettled.current_era  # at hand for writes that hit
        self._flights = Flights(scheduler)
        self._flight = self._flights.current  # at hand, too
        self._clearing = Clearing(
            store,
            policy,
            self._unsettled,
            scheduler,
            limit_extents=limit_extents,
            elsewhere=self._elsewhere,
        )
        # Loop time up to which every completed write elsewhere is known.
        self._known_until = scheduler.time()
        self.settles = 0

    # -- eras -----------------------------------------------------------------------------
    def take_era(self, ready: Callable[[], None]) -> None:
        """Move the era's blocks into `taken`, begin a new era, call back after the barrier.

        To be called only while no copy is in flight: a block that is copied now and written now
        would else be taken out of `taken` by a copy that read it too early.  One call at a time.
        """
        self._take_era(self._elsewhere, ready)

    def _take_era(self, others: Sequence[Elsewhere], ready: Callable[[], None]) -> None:
        """`others`: all who may have written elsewhere what is not known."""
        self._current_era = self._unsettled.take_era()
        self.era += 1
        begun = self._scheduler.time()
        missing = list(others)  # those whose blocks have not come
        waiting = 1 + len(missing)

        def ended() -> None:
            nonlocal waiting
            waiting -= 1
            if waiting:
                return
            if not missing:
                # A late one: what was quiet meanwhile is known up to a later time.
                self._known_until = max(self._known_until, begun)
            ready()

        def brought(other: Elsewhere, runs: Sequence[tuple[int, int]] | None) -> None:
            if runs is not None:
                self._take_from_elsewhere(runs)
                missing.remove(other)
            self._scheduler.call_soon(ended)

        for other in others:
            other.barrier(self._may_be_direct(), partial(brought, other))
        self.when_landed(ended)

    def when_landed(self, call: Callable[[], None]) -> None:
        """Call back once every write that was submitted up to now has ended."""
        self._flight = self._flights.end(call)

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None:
        """Call back once every write to these extents that was submitted up to now has ended, and
        nobody writes them elsewhere any more.  They are covered no longer."""
        missing = len(self._elsewhere)

        def left() -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self.when_landed(call)

        if not missing:
            self.when_landed(call)
        for other in self._elsewhere:
            other.leave(extents, left)

    def _take_from_elsewhere(self, runs: Sequence[tuple[int, int]]) -> None:
        """Blocks that were written there, or by the gate and seen there.  What has been given to
        another node meanwhile was dirty whole."""
        if self._shared:
            runs = [part for run in runs for part in self._ours(*run)]
        if not runs:
            return
        self._unsettled.take(runs, self._known_until)
        self._tell_policy(runs)

    def _tell_policy(self, runs: Sequence[Run]) -> None:
        """Of blocks that were written elsewhere."""
        now, per, end = self._scheduler.time(), self._geometry.blocks_per_extent, 0
        for first, stop in runs:
            extent, extent_stop = max(first // per, end), (stop - 1) // per + 1
            if extent < extent_stop:
                if self._store.covers(extent, extent_stop):
                    self._policy.wrote(extent, extent_stop, now, True)
                end = extent_stop

    def when_urgent(self, call: Callable[[], None]) -> None:
        """Have `call` called when `era_is_urgent` may have become true by writes of hosts."""
        for other in self._elsewhere:
            other.when_urgent(call)

    @property
    def is_written_elsewhere(self) -> bool:
        """Whether somebody else may write this primary at all."""
        return bool(self._elsewhere)

    @property
    def wants_era(self) -> bool:
        """Whether there is something that ending the era would bring to the copier."""
        if self._unsettled.wants_era:
            return True
        return any(other.wants_barrier for other in self._elsewhere)

    @property
    def marks_s(self) -> float:
        """For how long hosts have waited for what the latest barrier has brought from elsewhere:
        each block once, when it was first written in its era."""
        return max((other.marks_s for other in self._elsewhere), default=0.0)

    @property
    def era_is_urgent(self) -> bool:
        """Whether somebody who writes elsewhere should not have to wait for the end of the era."""
        return any(other.is_urgent for other in self._elsewhere)

    @property
    def can_grow_direct(self) -> bool:
        """Whether hosts write much through here that they could write elsewhere."""
        return any(other.can_grow for other in self._elsewhere)

    def grow_direct(self, done: Callable[[], None]) -> None:
        """Have hosts write elsewhere what is durably recorded.  Neither an era may end nor another
        growth begin before `done` is called, in a later event."""
        growing = [other for other in self._elsewhere if other.can_grow]
        left = len(growing)

        def grown() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._scheduler.call_soon(done)

        for other in growing:
            other.grow(self._may_be_direct(), grown)

    def _may_be_direct(self) -> Iterable[Run]:
        """Runs of extents that hosts may write elsewhere."""
        return self._store.covered_runs()

    @property
    def held_s(self) -> tuple[float, float]:
        """For how long the writes of hosts were held elsewhere: in all, and the latest time."""
        held = [other.held_s for other in self._elsewhere]
        return sum(total_s for total_s, _ in held), max((last_s for _, last_s in held), default=0.0)

    def take_recorded(self) -> None:
        """Mark every block of every recorded extent as to be copied: recovery, or a resync.  Of a
        shared volume without what is on its way into the record, since it is not ours yet."""
        recorded = self._store.covered_runs() if self._shared else self._store.recorded_runs()
        runs = (self._geometry.extent_blocks(*extents) for extents in recorded)
        self._unsettled.take(runs, self._scheduler.time())

    def take_everything(self, done: Done) -> None:
        """Have the whole volume copied: the secondary may have lost any of it.

        Marked before it is recorded, so that nothing of it is clean and leaves the record again;
        of a shared volume only when all of it is recorded and so ours.
        """
        if self._shared:
            self.mark(0, self._geometry.blocks, done)
            return
        now, everything = self._scheduler.time(), (0, self._geometry.extents)
        self._unsettled.take([(0, self._geometry.blocks)], now)
        self._policy.added(*everything, now)
        if not self._store.add([everything], (), done):
            self._scheduler.call_soon(done, None)

    def mark(self, first: int, stop: int, done: Done) -> None:
        """Have blocks [first, stop) copied although nobody wrote them: repair, or a resync."""
        per = self._geometry.blocks_per_extent

        def recorded(error: OSError | None) -> None:
            if error is None:
                self._current_era.mark(first, stop, self._scheduler.time())
            done(error)

        self._record(first // per, (stop - 1) // per + 1, recorded)

    def _record(self, first: int, stop: int, done: Done) -> None:
        """Put extents [first, stop) into the record; in it when `done` is called without error."""
        store = self._store

        def recorded(error: OSError | None) -> None:
            dropped_meanwhile = error is None and not store.covers(first, stop)
            if not dropped_meanwhile or not store.add([(first, stop)], (), recorded):
                done(error)

        waiting = store.add([(first, stop)], (), recorded)
        self._policy.added(first, stop, self._scheduler.time())
        if not waiting:
            done(None)

    # -- what is dirty, and what becomes of it ----------------------------------------------
    @property
    def current(self) -> BlockSet:
        """Blocks that were written in this era."""
        return self._current_era.blocks

    @property
    def taken(self) -> BlockSet:
        """Blocks of earlier eras that wait to be copied."""
        return self._unsettled.taken

    def idle_dirt(self, most: int) -> list[int]:
        """At most so many extents with blocks of earlier eras that wait to be copied, of which
        nothing was written since the last barrier."""
        found: list[int] = []
        at, per = 0, self._geometry.blocks_per_extent
        while len(found) < most and (run := self.taken.next_run(at)) is not None:
            first, at = self._geometry.extent_blocks(run[0] // per, run[0] // per + 1)
            if not self.is_hot(first, at):
                found.append(first // per)
        return found

    def is_hot(self, first: int, stop: int) -> bool:
        """Whether some of these blocks were written again since the last barrier."""
        return self._current_era.blocks.any(first, stop)

    def is_dirty(self, first: int, stop: int) -> bool:
        """Whether some of blocks [first, stop) wait to be copied."""
        return self._unsettled.is_dirty(first, stop)

    def may_differ(self, first: int, stop: int) -> bool:
        """Whether blocks [first, stop) are dirty, or copied and not flushed on both sides, or may
        have been written directly since the last barrier."""
        if self._unsettled.any(first, stop):
            return True
        per = self._geometry.blocks_per_extent
        extents = range(first // per, (stop - 1) // per + 1)
        return any(
            any(map(other.is_open, extents)) and other.being_written for other in self._elsewhere
        )

    def copied(self, first: int, stop: int) -> None:
        """Blocks [first, stop) of `taken` are on the secondary, perhaps in its volatile cache."""
        self._unsettled.copied(first, stop)

    @property
    def has_copied(self) -> bool:
        """Whether something was copied and waits for a settle."""
        return self._unsettled.has_copied

    def begin_settle(self) -> set[int]:
        """Extents with blocks copied since the last call; both sides are to be flushed now."""
        return self._unsettled.begin_settle()

    def settle(self, extents: Iterable[int]) -> None:
        """Both sides have been flushed since `begin_settle` returned these extents."""
        self.settles += 1
        self._unsettled.settled()
        self._clearing.settled(extents, self._scheduler.time())

    def unsettle(self, extents: Iterable[int]) -> None:
        """A flush failed, so anything copied to these extents may be lost: copy them again."""
        self._unsettled.unsettle(extents)

    def forget_copied(self) -> set[int]:
        """What was copied and not flushed may be gone: have it copied again.  Its extents."""
        return self._unsettled.forget_copied()

    def hold(self, blocks: BlockSet) -> None:
        """Treat these blocks as not clean until `release`, which has them copied once more."""
        self._unsettled.hold(blocks)

    def release(self, blocks: BlockSet) -> None:
        self._unsettled.release(blocks, self._scheduler.time())

    def suspect(self, blocks: BlockSet) -> None:
        """Treat these blocks as not clean until `trust`, which has them copied once more; they do
        not keep the volume from being in sync."""
        self._unsettled.suspect(blocks)

    def trust(self, blocks: BlockSet) -> None:
        self._unsettled.trust(blocks, self._scheduler.time())

    @property
    def suspect_blocks(self) -> int:
        """Blocks that may yet change on the secondary without our doing."""
        return self._unsettled.suspect_blocks

    # -- what leaves the record -------------------------------------------------------------
    @property
    def limit_extents(self) -> int:
        """How many extents the record should name at most."""
        return self._clearing.limit_extents

    @limit_extents.setter
    def limit_extents(self, limit: int) -> None:
        self._clearing.limit_extents = limit

    @property
    def over_limit(self) -> bool:
        """Whether the record names more than it should, so that copying is urgent."""
        return self._clearing.excess_extents > 0

    @property
    def is_shedding(self) -> bool:
        """Whether it does, and waits for barriers to lose some."""
        return self._clearing.is_shedding

    def is_clean(self, extent: int) -> bool:
        """Whether a recorded extent is known to be equal and durable on both sides."""
        return self._clearing.is_clean(extent)

    def tick(self) -> None:
        """Once a second: cooling, the limit, lazy clears."""
        now = self._scheduler.time()
        if not any(other.written for other in self._elsewhere):
            self._known_until = now
        self._clearing.tick(now)

    def drop_all_clean(self) -> None:
        """Empty the record of everything that is clean: before a clean stop."""
        self._clearing.drop_all_clean(self._scheduler.time())

    def drop_clean(self, extents: Iterable[int]) -> None:
        """Have those of these extents that are clean leave the record at once, wanted or not."""
        self._clearing.drop_clean(extents, self._scheduler.time())

    # -- what changes hands -----------------------------------------------------------------
    def _ours(self, first: int, stop: int) -> Iterator[Run]:
        """Blocks [first, stop) without those of extents that are another node's."""
        per = self._geometry.blocks_per_extent
        for extent in range(first // per, (stop - 1) // per + 1):
            if self._is_ours(extent):
                begin, end = self._geometry.extent_blocks(extent, extent + 1)
                yield max(first, begin), min(stop, end)

    def _is_ours(self, extent: int) -> bool:
        # One that is being given is covered no more, and is ours until it has left with its dirt.
        if self._owns is not None:
            return self._owns(extent)
        return self._store.covers(extent, extent + 1)

    def give(self, extents: Iterable[int]) -> list[Run]:
        """These extents are another node's from now on.  Returns their dirt as runs of blocks,
        sorted, that do not touch.

        No write to them is in flight (`when_landed`); the caller takes them out of the record in
        this event.  Copies may be in flight: the other node has to keep an embargo until they
        have ended and cannot land late.
        """
        gone, now = list(extents), self._scheduler.time()
        # What was written elsewhere last is not known yet.
        unknown = [e for e in gone if any(other.is_open(e) for other in self._elsewhere)]
        self._unsettled.take_over(
            (self._geometry.extent_blocks(e, e + 1) for e in unknown), (), now
        )
        self._clearing.left(gone, now)
        return list(self._unsettled.give(gone).runs())

    def take_over(self, dirt: Iterable[Run], embargoed: Iterable[int]) -> None:
        """Extents have become ours, and these runs of blocks of them are dirty.

        `embargoed`: extents on which a copy of the other node may still land, or one that we began
        when they were ours before.  They are not clean and nothing of them is copied until `free`.
        """
        self._unsettled.take_over(dirt, embargoed, self._scheduler.time())

    def free(self, extents: Iterable[int]) -> None:
        """End the embargo on these extents; others are passed over."""
        self._unsettled.free(extents)

    def free_all(self) -> None:
        """End every embargo: the other node cannot write any more."""
        self._unsettled.free_all()

    def guessed(self, runs: Iterable[Run]) -> None:
        """Runs of extents have come into the record for which no write waits."""
        now, brought = self._scheduler.time(), 0
        for first, stop in runs:
            self._policy.added(first, stop, now)
            brought += stop - first
        self._clearing.make_room_for(brought)

    @property
    def embargoed_extents(self) -> int:
        """How many extents must not be copied yet."""
        return self._unsettled.embargoed_extents

    def refused(self, runs: Iterable[Run]) -> None:
        """Runs of extents that the policy predicted do not come into the record."""
        extents = [extent for first, stop in runs for extent in range(first, stop)]
        self._policy.dropped(extents, self._scheduler.time())

    # -- changes while in use ---------------------------------------------------------------
    @property
    def policy(self) -> Policy:
        return self._policy

    def set_policy(self, policy: Policy) -> None:
        """Exchange the policy; the new one has been told what is recorded."""
        self._policy = self._clearing.policy = policy

    def prepare_growth(self, done: Done) -> None:
        """Have the last extent recorded if it is short, so that what a larger volume has in it is
        recorded too.  It stays so until `grow`, or the end of the session."""
        first = self._geometry.short_extent
        if first is None:
            self._scheduler.call_soon(done, None)
            return
        self._unsettled.keep(first)
        self._record(first, first + 1, done)

    def grow(self, geometry: Geometry, *, mine: bool = True) -> None:
        """The volume is larger from now on; the new part is in the record and is to be copied.
        Without `mine` whoever calls says of which part of it that is true (`take_over`)."""
        self._geometry = geometry
        self._unsettled.grow(geometry, self._scheduler.time(), mine=mine)

    # -- figures --------------------------------------------------------------------------
    def dirty_blocks(self) -> int:
        """Blocks that are not on the secondary yet; a block in both sets counts once per set."""
        return self._unsettled.count_dirty()

    @property
    def in_sync(self) -> bool:
        """Whether nothing waits to be copied or flushed."""
        if self._unsettled:
            return False
        return not any(other.written for other in self._elsewhere)

    @property
    def era_since_s(self) -> float | None:
        """Loop time of the oldest write of this era, or earlier; None if nothing was written."""
        since_s = self._current_era.since_s
        if any(other.written for other in self._elsewhere):
            return self._known_until if since_s is None else min(since_s, self._known_until)
        return since_s

    def oldest_dirty_s(self) -> float | None:
        """Loop time of the oldest write that may not be durable on the secondary."""
        oldest_s = self._unsettled.oldest_s
        if any(other.written for other in self._elsewhere):
            return self._known_until if oldest_s is None else min(oldest_s, self._known_until)
        return oldest_s
