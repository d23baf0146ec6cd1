"""The gate: sees every request of a host before it is answered, and tells the copier what to copy.

Here are the requests of hosts; what the copier asks, and what leaves the record, is in `eras`.

Order of a write, which is what makes the record a superset after a crash at any instant:
1. All extents it touches are durably in the record, or `Record.add` makes them so.  On an error
   the write fails and the primary is not touched.  When the record write is done the extents are
   checked again, because they may have been dropped meanwhile.
2. Its blocks are marked in the current era, it is counted in the current flight (`flights`), and
   the data go to the primary, all in one event; nothing can come between.
3. The primary answers; the flight's count falls; the host is answered.

Invariants:
1. A write in flight has its blocks in the current era, or in `taken` with a barrier that has not
   passed.  No extent of these leaves the record, so rule 3 of the design holds: no write reaches
   it as a hit, its blocks are copied, both sides have been flushed since.
2. A write that waits for one extent holds no other: where extents change hands, one that is not
   covered whole is cut at their borders (`piecewise`).  Each piece goes its own way, and the host
   is answered after the last; of many, `MOST_PIECES` begin in a turn of the loop.
3. Trim and zeroing are writes.  Whatever a discard leaves on the primary is copied like data.
4. Errors of the primary go to the host and leave the blocks dirty.  That cached writes were lost
   goes to all hosts and to the copier, whoever met it (`not_durable`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Final

from bitmapd.gate.elsewhere import Asks, Elsewhere
from bitmapd.gate.eras import Eras
from bitmapd.gate.inturns import InTurns
from bitmapd.media.base import AllocationDone, Device, Done, Scheduler, after_all
from bitmapd.media.lost import LostWrites
from bitmapd.predict.policy import Policy
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record

MOST_PIECES: Final = 64  # 10 ms: a miss with its prediction takes 170 us

# Starts a change of the primary, or a piece of it: offset and length in bytes, the completion.
Submit = Callable[[int, int, Done], None]
# Verb, offset and length in bytes, and why the primary refused a host's request.
PrimaryFailed = Callable[[str, int, int, OSError], None]
Watch = Callable[[float, str, int, int], None]  # time, W Z or T, offset and length in bytes
# Asked before a write as `Gate.write` is: what to call at its end; None if it begins anew later.
Before = Callable[[int, memoryview, Done, bool], Done | None]


class Gate(Eras):
    """See the module docstring.  It is the `Device` that the NBD server exports."""

    def __init__(
        self,
        geometry: Geometry,
        primary: Device,
        store: Record,
        policy: Policy,
        scheduler: Scheduler,
        *,
        limit_extents: int,
        elsewhere: Sequence[Elsewhere] = (),
        asks: Asks | None = None,
        piecewise: bool = False,
        owns: Callable[[int], bool] | None = None,
    ) -> None:
        """`asks` is who has to be asked before the primary is read, if anybody is.

        `piecewise`: extents change hands with another node, and so no write may wait for one
        while it holds another: one that has to wait is cut at the borders of extents.  `owns`
        tells whether an extent is ours (`Eras`)."""
        super().__init__(
            geometry,
            store,
            policy,
            scheduler,
            limit_extents=limit_extents,
            elsewhere=elsewhere,
            shared=piecewise,
            owns=owns,
        )
        self._primary = primary
        self._asks = asks
        self._extent_shift = geometry.extent_bytes.bit_length() - 1
        self._mark_shift = geometry.block_bytes.bit_length() - 1  # from bytes to an era's marks
        self.lost_writes = LostWrites()  # of the primary; hosts and copier share its flushes
        self.on_flush_error: Callable[[OSError], None] | None = None
        self.on_primary_error: PrimaryFailed | None = None  # told before the host is
        self.primary_errors = 0
        self.primary_failed_s = float("-inf")  # loop time of the latest of them
        self.watch: Watch | None = None  # is told of every change that a host asks for
        self._before_write: Before | None = None  # nearly always
        self._large = InTurns(scheduler, MOST_PIECES)
        self.writes = 0
        self.hits = 0
        self.misses = 0
        self.reads = 0
        self.written_bytes = 0

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

        submit = self._primary.read
        asks = self._asks
        if asks is not None:
            shift = self._extent_shift
            first, stop = offset_bytes >> shift, ((offset_bytes + len(buffer) - 1) >> shift) + 1
            if not asks.may_read(first, stop):
                asks.ask(
                    first, stop, _once_asked(partial(submit, offset_bytes, buffer, ended), done)
                )
                return
        submit(offset_bytes, buffer, ended)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        if self._before_write is not None:
            at_end = self._before_write(offset_bytes, buffer, done, fua)
            if at_end is None:
                return
            done = at_end
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
            self._missed(
                "write",
                offset_bytes,
                length,
                lambda at, count, landed: self._primary.write(
                    at, buffer[at - offset_bytes : at - offset_bytes + count], landed, fua
                ),
                done,
                fua,
            )
            return
        # A hit, written out: this is the path that has to be short.
        self.hits += 1
        for other in self._elsewhere:
            other.gated_hit(first, stop)
        self._policy.wrote(first, stop, now, True)
        era = self._current_era
        if era.since_s is None:
            era.since_s = now
        shift = self._mark_shift
        era.marks.add(offset_bytes >> shift, (end >> shift) + 1)
        flight = self._flight
        flight.in_flight += 1

        def landed(error: OSError | None) -> None:
            flight.in_flight -= 1
            if flight.when_empty is not None and not flight.in_flight:
                flight.when_empty()
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
            lambda at, count, landed: self._primary.zero(
                at, count, landed, fua=fua, unmap=unmap, fast=fast
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
            lambda at, count, landed: self._primary.trim(at, count, landed, fua=fua),
            done,
            fua,
        )

    def may_differ(self, first: int, stop: int) -> bool:
        """As `Eras.may_differ`; what may be another node's may have been written there."""
        if self._asks is not None:
            per = self._geometry.blocks_per_extent
            if not self._asks.may_read(first // per, (stop - 1) // per + 1):
                return True
        return super().may_differ(first, stop)

    def flush(self, done: Done) -> None:
        def flushed(error: OSError | None) -> None:
            if error is not None:
                self.not_durable(error)
            done(error)

        self._primary.flush(flushed)

    def not_durable(self, error: OSError) -> None:
        """A flush or FUA request of the primary failed, whoever asked: all hosts and the copier are
        to hear of it, since the kernel does not say it again (`media.lost`)."""
        if self.lost_writes.report(error) and self.on_flush_error is not None:
            self.on_flush_error(error)

    def _tell(self, verb: str, offset_bytes: int, length_bytes: int, error: OSError) -> None:
        """What the mirror asks of the primary is answered for where it is asked.  Of a host's
        request nobody but the host would learn that the disk has begun to fail."""
        if error.errno == errno.EOPNOTSUPP:  # not offered
            return
        self.primary_errors += 1
        self.primary_failed_s = self._scheduler.time()
        if self.on_primary_error is not None:
            self.on_primary_error(verb, offset_bytes, length_bytes, error)

    def _failed(
        self, verb: str, offset_bytes: int, length_bytes: int, error: OSError, fua: bool
    ) -> None:
        self._tell(verb, offset_bytes, length_bytes, error)
        if fua and error.errno != errno.EOPNOTSUPP:
            self.not_durable(error)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        go = partial(self._primary.allocation, offset_bytes, length_bytes, done)
        asks = self._asks
        if asks is not None:
            extents = self._geometry.extent_span(offset_bytes, length_bytes)
            if not asks.may_read(*extents):
                asks.ask(*extents, _once_asked(go, lambda error: done(error, [])))
                return
        go()

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
        """A zeroing or trim; `submit` starts it or a piece of it."""
        first, stop = self._geometry.extent_span(offset_bytes, length_bytes)
        self.writes += 1
        if self._store.covers(first, stop):
            self.hits += 1
            self._policy.wrote(first, stop, self._scheduler.time(), True)
            self._land(verb, offset_bytes, length_bytes, submit, done, fua)
        else:
            self._missed(verb, offset_bytes, length_bytes, submit, done, fua)

    def _missed(
        self,
        verb: str,
        offset_bytes: int,
        length_bytes: int,
        submit: Submit,
        done: Done,
        fua: bool,
    ) -> None:
        """A change that is not covered whole, counted already."""
        self.misses += 1
        first, stop = self._geometry.extent_span(offset_bytes, length_bytes)
        if not self._shared or stop - first == 1:
            self._bring(verb, offset_bytes, length_bytes, submit, done, fua)
            return
        per, end = self._geometry.extent_bytes, offset_bytes + length_bytes
        borders = chain([offset_bytes], range((first + 1) * per, end, per), [end])
        pieces = self._bring_pieces(verb, borders, submit, after_all(stop - first, done), fua)
        if stop - first > MOST_PIECES:
            self._large.add(pieces)
        else:
            for _ in pieces:
                pass

    def _bring_pieces(
        self, verb: str, borders: Iterable[int], submit: Submit, done: Done, fua: bool
    ) -> Iterator[None]:
        for at, border in pairwise(borders):
            self._bring(verb, at, border - at, submit, done, fua)
            yield

    def _bring(
        self,
        verb: str,
        offset_bytes: int,
        length_bytes: int,
        submit: Submit,
        done: Done,
        fua: bool,
    ) -> None:
        """Submit a change, or a piece of one, as soon as its extents are covered."""
        extents = self._geometry.extent_span(offset_bytes, length_bytes)
        now = self._scheduler.time()

        def covered(error: OSError | None) -> None:
            if error is not None:
                done(error)
            else:
                self._land(verb, offset_bytes, length_bytes, submit, done, fua)

        if self._store.covers(*extents):
            self._policy.wrote(*extents, now, True)
            covered(None)
        else:
            self._predict_and_record(*extents, now, covered)

    def _predict_and_record(self, first: int, stop: int, now: float, covered: Done) -> None:
        """Record extents [first, stop) and what the policy predicts, then go on."""
        policy, store = self._policy, self._store
        policy.wrote(first, stop, now, False)
        before = store.recorded_extents
        needed = before + store.missing(first, stop)
        extra = policy.predict(first, stop, now, self._clearing.limit_extents, needed)

        def recorded(error: OSError | None) -> None:
            dropped_meanwhile = error is None and not store.covers(first, stop)
            if not dropped_meanwhile or not store.add([(first, stop)], (), recorded):
                covered(error)

        waiting = store.add([(first, stop)], extra, recorded)
        policy.added(first, stop, now)
        for begin, end in extra:
            for run_first, run_stop in store.recorded_runs(begin, end):
                policy.added(run_first, run_stop, now)
        self._clearing.make_room_for(store.recorded_extents - before)
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
        """Mark the blocks, count the write in its flight and submit it: one event."""
        blocks = self._geometry.block_span(offset_bytes, length_bytes)
        self._current_era.mark(*blocks, self._scheduler.time())
        flight = self._flight
        flight.in_flight += 1

        def landed(error: OSError | None) -> None:
            flight.in_flight -= 1
            if flight.when_empty is not None and not flight.in_flight:
                flight.when_empty()
            if error is not None:
                self._failed(verb, offset_bytes, length_bytes, error, fua)
            done(error)

        submit(offset_bytes, length_bytes, landed)

    # -- figures ---------------------------------------------------------------------------
    @property
    def host_load(self) -> tuple[int, int]:
        """Requests of hosts and bytes written by them, since the start."""
        requests, written_bytes = self.writes + self.reads, self.written_bytes
        for other in self._elsewhere:
            theirs = other.host_load
            requests, written_bytes = max(requests, theirs[0]), max(written_bytes, theirs[1])
        return requests, written_bytes


def _once_asked(go: Callable[[], None], no: Done) -> Done:
    """Call `go` when the primary may be read, or `no` with why it may not."""
    return lambda error: go() if error is None else no(error)
