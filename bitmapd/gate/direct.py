"""The direct path: what hosts write without asking the gate, and how it becomes known (pure).

The kernel marks every write of the direct path in the era it was begun in; those of the gate are
no part of that.  A barrier ends the era, waits until no write of it is in flight, and brings its
blocks.

1. Between two barriers nothing is known of open extents (`routes.Routes`), so they are neither
   clean nor dropped.
2. `written` compares the kernel's counters with those read before the latest two barriers.  They
   only grow, on each processor.  Kernels count a write when it ends or, before 6.3, when it begins:
   one that began before the latest reading may have been marked after that barrier's roll-over.  It
   would have been held up by the barrier before if it had begun before that one's reading, so
   three equal readings mean that nothing is unknown.  The helper has the kernel count when it finds
   that it does not, and says so with its answer; so a barrier that failed leaves all in doubt.
3. Eras are collected without a gap: a barrier that fails is followed by one that brings the blocks
   of both eras.  One that is put off, since the kernel is busy with earlier eras, is not an error,
   and otherwise like one that failed.
4. One barrier at a time, and none while the table grows (`grow`), which is a change of the table
   without an end of the era: it brings nothing, and what is open stays so.
5. Hosts write directly only to what is recorded.  So if the kernel's marks cannot be read, every
   block of the record counts as written.
6. A write that was in flight when this process began may be marked in an era before the first one
   that is collected.  So the first barrier that lands counts every block as written that was
   direct before.
7. The kernel's devices may be smaller than the volume, which has grown since they were made: what
   lies beyond them goes into no table.  They are exchanged for larger ones (`let_go`, `go_on`) when
   nothing is direct and nothing that was is unknown; no barrier begins meanwhile, since it would
   wait for writes that wait for the new ones.

bitmapd's death loses nothing here: the kernel goes on marking, the record names every extent that
is direct, and the next process begins with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitmapd.gate.elsewhere import Collected
from bitmapd.gate.routes import Routes, Run, Segment
from bitmapd.record.geometry import Geometry

Emit = Callable[..., None]


class PutOffError(OSError):
    """A barrier has to wait until the kernel is done with earlier eras; nothing was done."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Of the device under the direct path, since it was made; monotone.

    Bytes and not writes tell whether something was written: an empty flush counts as a write.
    `lapses`: how often the kernel was found not to count; between two readings that differ in it
    anything may have been written.
    """

    written_bytes: int
    discards: int
    lapses: int = 0


@dataclass(frozen=True, slots=True)
class HostCounters:
    """Of the volume's own devices.

    `in_flight`: writes that have begun and not ended.  It is a sum of counters that go up on one
    processor and down on another, so it may be wrong for a moment.
    """

    writes: int
    written_bytes: int
    discards: int
    reads: int
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Landed:
    """What a barrier brought: runs of blocks [first, stop) of the eras up to `era`.

    `damage`: why the kernel's marks cannot be read, although nothing of these eras is in flight.
    """

    runs: Sequence[Run]
    era: int
    window_s: float
    skipped: bool = False
    damage: str = ""


BarrierDone = Callable[[OSError | None, Landed | None], None]
# The seconds for which writes were held.
SwapDone = Callable[[OSError | None, float], None]


class Kernel(Protocol):
    """The kernel's side, reached through the wiring helper."""

    def counters(self) -> Counters: ...

    def host_counters(self) -> HostCounters:
        """What hosts asked for, whatever way it took."""

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        """Calls `done` once, on the loop's thread, never from inside; see the module's rules."""

    def swap(self, segments: Sequence[Segment], done: SwapDone) -> None:
        """Put a table in force and end no era; `done` as with `barrier`."""


class DirectPath:
    """See the module docstring; an `Elsewhere`."""

    def __init__(
        self,
        geometry: Geometry,
        kernel: Kernel,
        routes: Routes,
        emit: Emit,
        *,
        since_era: int,
        mark_s: float = 0.0,
    ) -> None:
        """`mark_s`: what a host waits for at its first write to a block in an era."""
        self.geometry = geometry
        self._kernel = kernel
        self._emit = emit
        self._since_era = since_era
        self._seen: Counters | None = None  # read before the latest barrier
        self._seen_before: Counters | None = None  # and before the one before it
        self._busy = False
        self.routes = routes
        self.barriers = 0
        self.skipped = 0
        self.failures = 0
        self.put_off = 0
        self._is_put_off = False
        self.window_s_total = 0.0
        self.window_s_last = 0.0
        self.window_s_max = 0.0
        self.mark_s = mark_s
        self.marks_s = 0.0
        self.is_closing = False  # nothing becomes direct again, whoever asks for it
        self._hosts: HostCounters | None = None  # while the devices are exchanged
        self.on_ended: Callable[[], None] = lambda: None
        self._leaving: list[tuple[list[int], Callable[[], None]]] = []

    @property
    def counters(self) -> Counters:
        return self._kernel.counters()

    @property
    def host_counters(self) -> HostCounters:
        return self._hosts or self._kernel.host_counters()

    @property
    def host_load(self) -> tuple[int, int]:
        hosts = self.host_counters
        return hosts.writes + hosts.discards + hosts.reads, hosts.written_bytes

    # -- extents ----------------------------------------------------------------------------
    def is_open(self, extent: int) -> bool:
        return self.routes.is_open(extent)

    def cool(self, extents: Iterable[int]) -> None:
        self.routes.cool(extents)

    def warm(self, extents: Iterable[int]) -> None:
        self.routes.warm(extents)

    def closed(self) -> list[int]:
        return self.routes.closed()

    def missed(self) -> list[int]:
        return self.routes.missed()

    def gone(self, extents: Iterable[int]) -> None:
        self.routes.gone(extents)

    def leave(self, extents: Iterable[int], call: Callable[[], None]) -> None:
        direct = [extent for extent in extents if self.routes.is_direct(extent)]
        self.routes.cool(direct)
        self._leaving.append((direct, call))
        self.look_who_left()
        if direct:
            self.routes.on_urgent()

    def look_who_left(self, *, gone: bool = False) -> None:
        """Tell whoever waits for what the table in force has no longer; all of them once the table
        itself is `gone`."""
        is_direct, waiting = self.routes.is_direct, self._leaving
        self._leaving = []
        for extents, call in waiting:
            if gone or not any(map(is_direct, extents)):
                call()
            else:
                self._leaving.append((extents, call))

    def gated_hit(self, first: int, stop: int) -> None:
        self.routes.gated_hit(first, stop)

    # -- eras -------------------------------------------------------------------------------
    def when_urgent(self, call: Callable[[], None]) -> None:
        self.routes.on_urgent = call

    @property
    def is_urgent(self) -> bool:
        """Also when ending the era holds up nobody and makes it known that nothing was written, and
        when another node waits."""
        if self._hosts is not None:
            return False
        return self.routes.urgent or self.at_rest or bool(self._leaving)

    # -- growth -----------------------------------------------------------------------------
    @property
    def can_grow(self) -> bool:
        """Not while another node waits for what only a barrier takes out of the table."""
        free = not self._busy and not self._leaving and self._hosts is None
        return free and self.routes.can_grow

    def grow(self, recorded: Iterable[Run], done: Callable[[], None]) -> None:
        """Have hosts write past the gate what they write through it and is recorded durably."""
        if self._busy:
            raise RuntimeError("a barrier is under way")
        table = self.routes.grow(self._reachable(recorded))
        if table is None:
            done()
            return
        self._busy = True

        def ended(error: OSError | None, window_s: float) -> None:
            self._busy = False
            if error is None:
                self.routes.grew()
                self._held(window_s)
            else:
                self.routes.failed()
                self._not_landed(error)
            done()

        geometry = self.geometry
        self._kernel.swap(table.segments(geometry.extent_bytes, geometry.size_bytes), ended)

    @property
    def held_s(self) -> tuple[float, float]:
        return self.window_s_total, self.window_s_last

    def _held(self, window_s: float) -> None:
        self.window_s_total += window_s
        self.window_s_last = window_s
        self.window_s_max = max(self.window_s_max, window_s)

    # -- larger devices ---------------------------------------------------------------------
    def let_go(self) -> None:
        """Of the kernel's devices.  All is still and stays so (`is_closing`), until `go_on`."""
        if not self.is_still:
            raise RuntimeError("hosts write past the gate")
        self._hosts = self._kernel.host_counters()

    def go_on(self, geometry: Geometry, kernel: Kernel, *, since_era: int, mark_s: float) -> None:
        """With others."""
        self.geometry, self._kernel, self._since_era = geometry, kernel, since_era
        self.mark_s = mark_s
        self._seen = self._seen_before = self._hosts = None
        self.is_closing = False
        self.routes.gate_all(wanted=False)

    # -- no direct writes (`cycle.Direct`) ----------------------------------------------------
    def still(self, *, wanted: bool) -> None:
        wanted = wanted or self.is_closing
        if wanted is not self.routes.is_gating:
            self.routes.gate_all(wanted=wanted)

    @property
    def is_still(self) -> bool:
        return not self._busy and self.routes.is_still

    @property
    def is_busy(self) -> bool:
        return self._busy

    @property
    def collected_era(self) -> int:
        """The latest era whose blocks are known."""
        return self._since_era - 1

    @property
    def tried(self) -> int:
        """Barriers that have ended, one way or the other."""
        return self.barriers + self.failures + self.put_off

    @property
    def written(self) -> bool:
        """Whether something may have been written that no barrier has brought."""
        return not self._seen == self._seen_before == self._kernel.counters()

    @property
    def being_written(self) -> bool:
        """Whether hosts write now, or `written`: kernels since 6.3 count a write when it ends.

        Good enough to put off a judgement, and not to make one that data depend on.
        """
        return self.written or self.host_counters.in_flight > 0

    @property
    def at_rest(self) -> bool:
        """Whether nothing was written since the latest barrier; one more would make that known."""
        return self._seen != self._seen_before and self._seen == self._kernel.counters()

    @property
    def wants_barrier(self) -> bool:
        routes = self.routes
        if self._hosts is not None:
            return False
        return routes.wants_change or routes.settling or self.written

    def barrier(self, recorded: Iterable[Run], done: Collected) -> None:
        """End the era; `done` gets the blocks that were written, or None if it failed.

        `recorded`: runs of extents that are durably recorded now.  What failed is told as an
        event; its blocks come with the next barrier.
        """
        if self._busy:
            raise RuntimeError("a barrier is under way")
        if self._hosts is not None:
            done(())
            return
        self._busy = True
        seen = self._kernel.counters()
        recorded = self._reachable(recorded)
        table = self.routes.propose(recorded)
        geometry = self.geometry
        segments = (
            None if table is None else table.segments(geometry.extent_bytes, geometry.size_bytes)
        )

        def ended(error: OSError | None, landed: Landed | None) -> None:
            self._busy = False
            if landed is None:
                self._seen = None  # how far it came, and what it found, is not known
                self.routes.failed()
                self._not_landed(error)
                done(None)
                self.on_ended()
                return
            self._is_put_off = False
            self._seen_before, self._seen = self._seen, seen
            self._since_era = landed.era + 1
            self.marks_s = self.mark_s * sum(stop - first for first, stop in landed.runs)
            self.barriers += 1
            self.skipped += landed.skipped
            self._held(landed.window_s)
            per = geometry.blocks_per_extent
            blocks = geometry.blocks
            runs = [(first, min(stop, blocks)) for first, stop in landed.runs if first < blocks]
            if landed.damage:
                self._emit("era-damaged", message=f"all of the record is copied: {landed.damage}")
                runs = [geometry.extent_blocks(*run) for run in recorded]
            if adopted := self.routes.take_adopted():
                runs = merged([*runs, *(geometry.extent_blocks(*run) for run in adopted)])
            self.routes.landed((first // per, (stop - 1) // per + 1) for first, stop in runs)
            done(runs)
            self.look_who_left()
            self.on_ended()

        self._kernel.barrier(segments, self._since_era, ended)

    def _reachable(self, recorded: Iterable[Run]) -> list[Run]:
        extents = self.geometry.extents
        return [(first, min(stop, extents)) for first, stop in recorded if first < extents]

    def _not_landed(self, error: OSError | None) -> None:
        reason = "no reason" if error is None else error.strerror or str(error)
        if not isinstance(error, PutOffError):
            self.failures += 1
            self._emit("barrier-error", message=f"a barrier failed and is tried again: {reason}")
            return
        self.put_off += 1
        if not self._is_put_off:
            self._emit("barrier-put-off", message=reason)
        self._is_put_off = True


def merged(runs: Iterable[Run]) -> list[Run]:
    """The same blocks as ascending runs that do not touch."""
    found: list[Run] = []
    for first, stop in sorted(runs):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((first, stop))
    return found
