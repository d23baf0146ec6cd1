"""The gate: sees every request of a host before it is answered, and says what may be cleared.

Order of a write, which is what makes the record a superset after a crash at any instant:
1. All extents it touches are durably in the record, or `RecordStore.add` makes them so.  On an
   error the write fails and the primary is not touched.  When the record write is done the
   extents are checked again, because they may have been dropped meanwhile.
2. Its blocks are marked in `current`, it is counted as in flight in its era, and the data go to
   the primary, all in one event; nothing can come between.
3. The primary answers; the era's count falls; the host is answered.

Invariants:
1. A block whose content on the primary may differ from what the secondary durably holds is in
   `current`, in `taken`, in `_held`, or its extent is in `_copied` (copied, not flushed) or being
   settled.
2. A write in flight has its blocks in `current`, or in `taken` with a barrier that has not passed.
3. An extent leaves the record only through `_drop_clean`, which takes none that invariant 1 or 2
   names.  So rule 3 of the design holds: no write reaches it as a hit, its blocks are copied,
   both sides have been flushed since.
4. Trim and zeroing are writes.  Whatever a discard leaves on the primary is copied like data.
5. Errors of the primary go to the host and leave the blocks dirty.
6. With a direct path (`attach.direct`), an extent that is open there may be dirty without being in
   any of these sets.  It is not clean and is not dropped; one that the record is to lose is cooled,
   and dropped when it is closed.

A crash loses `current` and `taken`; the record names every extent they touched, and `take_recorded`
marks all their blocks at the next start.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence

from bitmapd.attach.direct import DirectPath
from bitmapd.gate.blockset import BlockSet
from bitmapd.media.base import AllocationDone, Device, Done, Scheduler
from bitmapd.record.geometry import Geometry
from bitmapd.record.policy import EVICTIONS_PER_ADDITION, Policy
from bitmapd.record.store import RecordStore

Submit = Callable[[Done], None]
# Verb, offset and length in bytes, and why the primary refused a host's request.
PrimaryFailed = Callable[[str, int, int, OSError], None]
Watch = Callable[[float, str, int, int], None]  # time, W Z or T, offset and length in bytes

# With a direct path one part in so many of the record's limit is kept free for misses.
COOLING_PART = 16


class _Era:
    """Writes in flight that began in one era."""

    __slots__ = ("in_flight", "when_landed")

    def __init__(self) -> None:
        self.in_flight = 0
        self.when_landed: Callable[[], None] | None = None


class Gate:
    """See the module docstring.  It is the `Device` that the NBD server exports."""

    def __init__(
        self,
        geometry: Geometry,
        primary: Device,
        store: RecordStore,
        policy: Policy,
        scheduler: Scheduler,
        *,
        limit_extents: int,
        direct: DirectPath | None = None,
    ) -> None:
        self._geometry = geometry
        self._direct = direct
        self._primary = primary
        self._store = store
        self._policy = policy
        self._scheduler = scheduler
        self._extent_shift = geometry.extent_bytes.bit_length() - 1
        self._block_shift = geometry.block_bytes.bit_length() - 1
        self.limit_extents = limit_extents
        self.era = 1
        self.current = BlockSet()
        self.taken = BlockSet()
        self._in_flight = _Era()
        self._copied: set[int] = set()
        self._settling: set[int] = set()
        self._held: list[BlockSet] = []  # may change on the secondary without our doing
        self._current_since: float | None = None
        self._taken_since: float | None = None
        # Loop time up to which every completed write of the direct path is known.
        self._known_until = scheduler.time()
        self._brought = 0  # extents that the misses of this turn have added
        self._making_room = False  # is due in this turn
        self._evicting: set[int] = set()  # cooled because the record is too large
        self._settling_since: float | None = None
        self.on_flush_error: Callable[[OSError], None] | None = None
        self.on_primary_error: PrimaryFailed | None = None  # told before the host is
        self.primary_errors = 0
        self.watch: Watch | None = None  # is told of every change that a host asks for
        self.writes = 0
        self.hits = 0
        self.misses = 0
        self.reads = 0
        self.written_bytes = 0
        self.settles = 0

    # -- Device: what the host sees --------------------------------------------------------
    @property
    def name(self) -> str:
        return self._primary.name

    @property
    def size_bytes(self) -> int:
        return self._geometry.size_bytes

    @property
    def block_size_bytes(self) -> int:
        return self._primary.block_size_bytes

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self.reads += 1

        def ended(error: OSError | None) -> None:
            if error is not None:
                self._tell("read", offset_bytes, len(buffer), error)
            done(error)

        self._primary.read(offset_bytes, buffer, ended)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        length = len(buffer)
        end = offset_bytes + length - 1
        shift = self._extent_shift
        first, stop = offset_bytes >> shift, (end >> shift) + 1
        now = self._scheduler.time()
        self.writes += 1
        self.written_bytes += length
        if self.watch is not None:
            self.watch(now, "W", offset_bytes, length)
        if not self._store.covers(first, stop):
            self._miss(
                first,
                stop,
                now,
                lambda error: (
                    done(error)
                    if error is not None
                    else self._land(
                        "write",
                        offset_bytes,
                        length,
                        lambda landed: self._primary.write(offset_bytes, buffer, landed, fua),
                        done,
                        fua,
                    )
                ),
            )
            return
        # A hit, written out: this is the path that has to be short.
        self.hits += 1
        if self._direct is not None:
            self._direct.routes.gated_hit(first, stop)
        self._policy.wrote(first, stop, now, True)
        if self._current_since is None:
            self._current_since = now
        shift = self._block_shift
        self.current.add(offset_bytes >> shift, (end >> shift) + 1)
        era = self._in_flight
        era.in_flight += 1

        def landed(error: OSError | None) -> None:
            era.in_flight -= 1
            if era.when_landed is not None and not era.in_flight:
                era.when_landed()
            if error is not None:
                self._failed("write", offset_bytes, length, error, fua)
            done(error)

        self._primary.write(offset_bytes, buffer, landed, fua)

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        if self.watch is not None:
            self.watch(self._scheduler.time(), "Z", offset_bytes, length_bytes)
        self._change(
            "zero",
            offset_bytes,
            length_bytes,
            lambda landed: self._primary.zero(
                offset_bytes, length_bytes, landed, fua=fua, unmap=unmap, fast=fast
            ),
            done,
            fua,
        )

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        if self.watch is not None:
            self.watch(self._scheduler.time(), "T", offset_bytes, length_bytes)
        self._change(
            "trim",
            offset_bytes,
            length_bytes,
            lambda landed: self._primary.trim(offset_bytes, length_bytes, landed, fua=fua),
            done,
            fua,
        )

    def flush(self, done: Done) -> None:
        def flushed(error: OSError | None) -> None:
            if error is not None:
                self._not_durable(error)
            done(error)

        self._primary.flush(flushed)

    def _tell(self, verb: str, offset_bytes: int, length_bytes: int, error: OSError) -> None:
        """What the mirror asks of the primary is answered for where it is asked.  Of a host's
        request nobody but the host would learn that the disk has begun to fail."""
        if error.errno == errno.EOPNOTSUPP:  # not offered
            return
        self.primary_errors += 1
        if self.on_primary_error is not None:
            self.on_primary_error(verb, offset_bytes, length_bytes, error)

    def _failed(
        self, verb: str, offset_bytes: int, length_bytes: int, error: OSError, fua: bool
    ) -> None:
        self._tell(verb, offset_bytes, length_bytes, error)
        if fua:
            self._not_durable(error)

    def _not_durable(self, error: OSError) -> None:
        """The kernel reports the loss of cached data once, to whoever asks first; the copier's own
        next flush would succeed although what it has read may be gone."""
        if self.on_flush_error is not None:
            self.on_flush_error(error)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        self._primary.allocation(offset_bytes, length_bytes, done)

    def close(self) -> None:
        """Nothing to release: the primary belongs to the volume."""

    # -- writing --------------------------------------------------------------------------
    def _change(
        self,
        verb: str,
        offset_bytes: int,
        length_bytes: int,
        submit: Submit,
        done: Done,
        fua: bool,
    ) -> None:
        """A change of the primary of any kind; `submit` starts it and is given the completion."""
        first, stop = self._geometry.extent_span(offset_bytes, length_bytes)
        now = self._scheduler.time()
        self.writes += 1

        def covered(error: OSError | None) -> None:
            if error is not None:
                done(error)
            else:
                self._land(verb, offset_bytes, length_bytes, submit, done, fua)

        if self._store.covers(first, stop):
            self.hits += 1
            self._policy.wrote(first, stop, now, True)
            covered(None)
        else:
            self._miss(first, stop, now, covered)

    def _miss(self, first: int, stop: int, now: float, covered: Done) -> None:
        """Record extents [first, stop) and what the policy predicts, then go on."""
        self.misses += 1
        policy, store = self._policy, self._store
        policy.wrote(first, stop, now, False)
        before = store.recorded_extents
        needed = before + store.missing(first, stop)
        extra = policy.predict(first, stop, now, self.limit_extents, needed)

        def recorded(error: OSError | None) -> None:
            dropped_meanwhile = error is None and not store.covers(first, stop)
            if not dropped_meanwhile or not store.add([(first, stop)], (), recorded):
                covered(error)

        waiting = store.add([(first, stop)], extra, recorded)
        policy.added(first, stop, now)
        for begin, end in extra:
            for run_first, run_stop in store.recorded_runs(begin, end):
                policy.added(run_first, run_stop, now)
        self._brought += store.recorded_extents - before
        if not self._making_room:
            self._making_room = True
            self._scheduler.call_soon(self._make_room)
        if not waiting:
            covered(None)

    def _land(
        self,
        verb: str,
        offset_bytes: int,
        length_bytes: int,
        submit: Submit,
        done: Done,
        fua: bool,
    ) -> None:
        """Mark the blocks, count the write in its era and submit it: one event."""
        if self._current_since is None:
            self._current_since = self._scheduler.time()
        self.current.add(*self._geometry.block_span(offset_bytes, length_bytes))
        era = self._in_flight
        era.in_flight += 1

        def landed(error: OSError | None) -> None:
            era.in_flight -= 1
            if era.when_landed is not None and not era.in_flight:
                era.when_landed()
            if error is not None:
                self._failed(verb, offset_bytes, length_bytes, error, fua)
            done(error)

        submit(landed)

    # -- eras -----------------------------------------------------------------------------
    def take_era(self, ready: Callable[[], None]) -> None:
        """Move `current` into `taken`, begin a new era, call back after the barrier.

        To be called only while no copy is in flight: a block that is copied now and written now
        would else be taken out of `taken` by a copy that read it too early.  One call at a time.
        """
        old, self._in_flight = self._in_flight, _Era()
        self.era += 1
        if self.taken:
            self.taken.update(self.current)
        else:
            self.taken = self.current
        self.current = BlockSet()
        if self._taken_since is None:
            self._taken_since = self._current_since
        self._current_since = None

        def landed() -> None:
            if old.in_flight:
                old.when_landed = lambda: self._scheduler.call_soon(ready)
            else:
                self._scheduler.call_soon(ready)

        if self._direct is None:
            landed()
            return
        begun = self._scheduler.time()

        def collected(runs: Sequence[tuple[int, int]] | None) -> None:
            if runs is not None:
                self._take_direct(runs)
                self._known_until = begun
            landed()

        self._direct.barrier(self._store.covered_runs(), collected)

    def _take_direct(self, runs: Sequence[tuple[int, int]]) -> None:
        """Blocks that the kernel saw written, by hosts directly or by the gate."""
        if not runs:
            return
        now, per, end = self._scheduler.time(), self._geometry.blocks_per_extent, 0
        for first, stop in runs:
            self.taken.add(first, stop)
            extent, extent_stop = max(first // per, end), (stop - 1) // per + 1
            if extent < extent_stop:
                if self._store.covers(extent, extent_stop):
                    self._policy.wrote(extent, extent_stop, now, True)
                end = extent_stop
        if self._taken_since is None or self._known_until < self._taken_since:
            self._taken_since = self._known_until

    def when_urgent(self, call: Callable[[], None]) -> None:
        """Have `call` called when `era_is_urgent` may have become true by writes of hosts."""
        if self._direct is not None:
            self._direct.routes.on_urgent = call

    @property
    def has_direct(self) -> bool:
        return self._direct is not None

    @property
    def wants_era(self) -> bool:
        """Whether there is something that ending the era would bring to the copier."""
        return bool(self.current) or (self._direct is not None and self._direct.wants_barrier)

    @property
    def era_is_urgent(self) -> bool:
        """Whether the kernel's table should be changed before the era is over, or ending it holds
        up nobody and makes it known that nothing was written."""
        direct = self._direct
        return direct is not None and (direct.routes.urgent or direct.at_rest)

    def take_recorded(self) -> None:
        """Mark every block of every recorded extent as to be copied: recovery, or a resync."""
        for first, stop in self._store.recorded_runs():
            self.taken.add(*self._geometry.extent_blocks(first, stop))
        if self.taken and self._taken_since is None:
            self._taken_since = self._scheduler.time()

    def mark(self, first: int, stop: int, done: Done) -> None:
        """Have blocks [first, stop) copied although nobody wrote them: repair, or a resync."""
        per = self._geometry.blocks_per_extent
        extents = (first // per, (stop - 1) // per + 1)

        def recorded(error: OSError | None) -> None:
            dropped_meanwhile = error is None and not self._store.covers(*extents)
            if dropped_meanwhile and self._store.add([extents], (), recorded):
                return
            if error is None:
                if self._current_since is None:
                    self._current_since = self._scheduler.time()
                self.current.add(first, stop)
            done(error)

        waiting = self._store.add([extents], (), recorded)
        self._policy.added(*extents, self._scheduler.time())
        if not waiting:
            recorded(None)

    def is_hot(self, first: int, stop: int) -> bool:
        """Whether some of these blocks were written again since the last barrier."""
        return self.current.any(first, stop)

    def copied(self, first: int, stop: int) -> None:
        """Blocks [first, stop) of `taken` are on the secondary, perhaps in its volatile cache."""
        self.taken.discard(first, stop)
        per = self._geometry.blocks_per_extent
        self._copied.update(range(first // per, (stop - 1) // per + 1))
        if not self.taken:
            if self._settling_since is None:
                self._settling_since = self._taken_since
            self._taken_since = None

    # -- settling -------------------------------------------------------------------------
    def begin_settle(self) -> set[int]:
        """Extents with blocks copied since the last call; both sides are to be flushed now."""
        self._settling, self._copied = self._copied, set()
        return self._settling

    def settle(self, extents: Iterable[int]) -> None:
        """Both sides have been flushed since `begin_settle` returned these extents."""
        now = self._scheduler.time()
        self.settles += 1
        self._settling = set()
        if not self._copied:
            self._settling_since = None
        clean = [extent for extent in extents if self._is_settled(extent)]
        self._retire((extent for extent in clean if not self._policy.wants(extent, now)), now)

    def unsettle(self, extents: Iterable[int]) -> None:
        """A flush failed, so anything copied to these extents may be lost: copy them again."""
        self._take_again(extents)
        self._settling = set()

    def forget_copied(self) -> set[int]:
        """What was copied and not flushed may be gone: have it copied again.  Its extents."""
        extents, self._copied = self._copied, set()
        self._take_again(extents)
        return extents

    def hold(self, blocks: BlockSet) -> None:
        """Treat these blocks as not clean until `release`, which has them copied once more."""
        self._held.append(blocks)

    def release(self, blocks: BlockSet) -> None:
        self._held = [held for held in self._held if held is not blocks]
        # Into `current`, not `taken`: a copy that is in flight now must not count for this.
        self.current.update(blocks)
        if self._current_since is None:
            self._current_since = self._scheduler.time()

    def _take_again(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self.taken.add(*self._geometry.extent_blocks(extent, extent + 1))
        if self._settling_since is not None:  # older than what was taken since
            self._taken_since, self._settling_since = self._settling_since, None

    def is_clean(self, extent: int) -> bool:
        """Whether a recorded extent is known to be equal and durable on both sides."""
        if self._direct is not None and self._direct.routes.is_open(extent):
            return False
        return self._is_settled(extent)

    def _is_settled(self, extent: int) -> bool:
        """Whether it is recorded, and equal and durable on both sides as far as the gate knows.

        `_has_differences` for one extent, written out: a miss on a full record asks for dozens."""
        if extent in self._copied or extent in self._settling:
            return False
        if not self._store.covers(extent, extent + 1):
            return False
        first = extent << self._extent_shift - self._block_shift
        stop = first + (1 << self._extent_shift - self._block_shift)
        if self.current.any(first, stop) or self.taken.any(first, stop):
            return False
        return not self._held or not any(held.any(first, stop) for held in self._held)

    def is_dirty(self, first: int, stop: int) -> bool:
        """Whether some of blocks [first, stop) wait to be copied."""
        return self.current.any(first, stop) or self.taken.any(first, stop)

    def may_differ(self, first: int, stop: int) -> bool:
        """Whether blocks [first, stop) are dirty, or copied and not flushed on both sides, or may
        have been written directly since the last barrier."""
        if self._has_differences(first, stop):
            return True
        direct, per = self._direct, self._geometry.blocks_per_extent
        return (
            direct is not None
            and any(map(direct.routes.is_open, range(first // per, (stop - 1) // per + 1)))
            and direct.being_written
        )

    def _has_differences(self, first: int, stop: int) -> bool:
        per = self._geometry.blocks_per_extent
        extents = range(first // per, (stop - 1) // per + 1)
        return (
            self.is_dirty(first, stop)
            or any(held.any(first, stop) for held in self._held)
            or not self._copied.isdisjoint(extents)
            or not self._settling.isdisjoint(extents)
        )

    def _drop_clean(self, extents: Iterable[int], now: float) -> None:
        self._let_go([extent for extent in extents if self.is_clean(extent)], now)

    def _let_go(self, gone: list[int], now: float) -> None:
        if gone:
            self._store.drop(gone)
            self._policy.dropped(gone, now)
            if self._direct is not None:
                self._direct.routes.gone(gone)
                self._evicting.difference_update(gone)

    def _retire(self, extents: Iterable[int], now: float) -> None:
        """Have the record lose these: at once what is closed, after cooling what is open."""
        if self._direct is None:
            self._drop_clean(extents, now)
            return
        settled = [extent for extent in extents if self._is_settled(extent)]
        routes = self._direct.routes
        routes.cool(extent for extent in settled if routes.is_open(extent))
        self._drop_clean(settled, now)

    def _drop_cooled(self, direct: DirectPath, now: float) -> None:
        """Cooled extents that are closed and clean leave, unless they are wanted again."""
        closed = [extent for extent in direct.routes.closed() if self.is_clean(extent)]
        wanted = [e for e in closed if e not in self._evicting and self._policy.wants(e, now)]
        direct.routes.warm(wanted)
        self._drop_clean(set(closed).difference(wanted), now)

    def _make_room(self) -> None:
        """Evict for the misses of this turn of the loop.

        Their pages are on their way by now, so a disk writes while this goes on: it takes as long
        as all else of a miss together.  An extent of a write that still waits may go, too, if it
        was clean; the write looks again when it no longer waits.
        """
        self._making_room = False
        self._store.commit()  # is done already, unless the first of these misses needed no page
        most, self._brought = EVICTIONS_PER_ADDITION * self._brought, 0
        count = min(self._store.recorded_extents - self.limit_extents, most)
        if count <= 0:
            return
        now = self._scheduler.time()
        asked: set[int] = set()

        def may_go(extent: int) -> bool:
            if not self.is_clean(extent):
                return False
            asked.add(extent)
            return True

        # The policy is not relied upon: what it names without having asked is looked at.
        victims = self._policy.victims(count, may_go, now)
        self._let_go([extent for extent in victims if extent in asked or may_go(extent)], now)

    def tick(self) -> None:
        """Once a second: cooling, the limit, lazy clears."""
        now = self._scheduler.time()
        self._retire(self._policy.expired(now), now)
        excess = self._store.recorded_extents - self.limit_extents
        if self._direct is not None:
            if not self._direct.written:
                self._known_until = now
            self._drop_cooled(self._direct, now)
            # Cooling takes until the barrier after the next, so it begins before the limit.
            excess += self.limit_extents // COOLING_PART - len(self._evicting)
        if excess > 0:
            victims = self._policy.victims(excess, self._may_retire, now)
            if self._direct is not None:
                victims = [extent for extent in victims if self._may_retire(extent)]
                self._evicting.update(victims)
            self._retire(victims, now)
        self._store.flush_clears()

    def _may_retire(self, extent: int) -> bool:
        return extent not in self._evicting and self._is_settled(extent)

    @property
    def policy(self) -> Policy:
        return self._policy

    def set_policy(self, policy: Policy) -> None:
        """Exchange the policy; the new one has been told what is recorded."""
        self._policy = policy

    def grow(self, geometry: Geometry) -> None:
        """The volume is larger from now on; the new part is in the record and is to be copied."""
        first = self._geometry.size_bytes // geometry.block_bytes
        self._geometry = geometry
        self.current.add(first, geometry.blocks)
        if self._current_since is None:
            self._current_since = self._scheduler.time()

    def drop_all_clean(self) -> None:
        """Empty the record of everything that is clean: before a clean stop."""
        now = self._scheduler.time()
        recorded = [e for first, stop in self._store.recorded_runs() for e in range(first, stop)]
        self._drop_clean(recorded, now)

    # -- figures --------------------------------------------------------------------------
    def dirty_blocks(self) -> int:
        """Blocks that are not on the secondary yet; a block in both sets counts once per set."""
        return self.current.count() + self.taken.count()

    @property
    def host_load(self) -> tuple[int, int]:
        """Requests of hosts and bytes written by them, since the start."""
        if self._direct is None:
            return self.writes + self.reads, self.written_bytes
        hosts = self._direct.host_counters
        return hosts.writes + hosts.discards + hosts.reads, hosts.written_bytes

    @property
    def over_limit(self) -> bool:
        """Whether the record names more than it should, so that copying is urgent."""
        return self._store.recorded_extents > self.limit_extents

    @property
    def has_copied(self) -> bool:
        """Whether something was copied and waits for a settle."""
        return bool(self._copied)

    @property
    def in_sync(self) -> bool:
        """Whether nothing waits to be copied or flushed."""
        if self.current or self.taken or self._copied or self._settling or self._held:
            return False
        return self._direct is None or not self._direct.written

    def oldest_dirty_s(self) -> float | None:
        """Loop time of the oldest write that may not be durable on the secondary."""
        stages = (self._settling_since, self._taken_since, self._current_since)
        oldest = next((since for since in stages if since is not None), None)
        if self._direct is not None and self._direct.written:
            return self._known_until if oldest is None else min(oldest, self._known_until)
        return oldest
