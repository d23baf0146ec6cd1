"""The direct path: what hosts write without asking the gate, and how it becomes known (pure).

The kernel marks every write of the direct path, and those of the gate too, in the era it was
begun in.  A barrier ends the era, waits until no write of it is in flight, and brings its blocks.

1. Between two barriers nothing is known of open extents (`routes.Routes`), so they are neither
   clean nor dropped.
2. `written` compares the kernel's counters of completed writes with those read before the latest
   barrier began.  They only grow, on each processor, so equal counters mean that no write was
   completed since; one that is in flight belongs to the next barrier.
3. Eras are collected without a gap: a barrier that fails is followed by one that brings the blocks
   of both eras.
4. One barrier at a time.

bitmapd's death loses nothing here: the kernel goes on marking, the record names every extent that
is direct, and the next process begins with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitmapd.attach.routes import Routes, Run, Segment
from bitmapd.record.geometry import Geometry

Emit = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Counters:
    """Of the device under both paths, since it was made; monotone."""

    writes: int
    written_bytes: int
    discards: int
    reads: int = 0  # by hosts


@dataclass(frozen=True, slots=True)
class Landed:
    """What a barrier brought: runs of blocks [first, stop) of the eras up to `era`."""

    runs: Sequence[Run]
    era: int
    window_s: float
    skipped: bool = False


BarrierDone = Callable[[OSError | None, Landed | None], None]


class Kernel(Protocol):
    """The kernel's side, reached through the wiring helper."""

    def counters(self) -> Counters: ...

    def host_counters(self) -> Counters:
        """What hosts asked for, whatever way it took."""

    def barrier(
        self, segments: Sequence[Segment] | None, since_era: int, done: BarrierDone
    ) -> None:
        """Calls `done` once, on the loop's thread, never from inside; see the module's rules."""


class DirectPath:
    """See the module docstring."""

    def __init__(
        self,
        geometry: Geometry,
        kernel: Kernel,
        routes: Routes,
        emit: Emit,
        *,
        since_era: int,
    ) -> None:
        self._geometry = geometry
        self._kernel = kernel
        self._emit = emit
        self._since_era = since_era
        self._seen: Counters | None = None
        self._busy = False
        self.routes = routes
        self.barriers = 0
        self.skipped = 0
        self.failures = 0
        self.window_s_total = 0.0
        self.window_s_last = 0.0
        self.window_s_max = 0.0
        self.on_ended: Callable[[], None] = lambda: None

    @property
    def counters(self) -> Counters:
        return self._kernel.counters()

    @property
    def host_counters(self) -> Counters:
        return self._kernel.host_counters()

    @property
    def collected_era(self) -> int:
        """The latest era whose blocks are known."""
        return self._since_era - 1

    @property
    def tried(self) -> int:
        """Barriers that have ended, one way or the other."""
        return self.barriers + self.failures

    @property
    def written(self) -> bool:
        """Whether something may have been written since the latest barrier began."""
        seen, now = self._seen, self._kernel.counters()
        return seen is None or (seen.writes, seen.discards) != (now.writes, now.discards)

    @property
    def wants_barrier(self) -> bool:
        routes = self.routes
        return routes.wants_change or routes.settling or self.written

    def barrier(
        self,
        recorded: Iterable[Run],
        done: Callable[[Sequence[Run]], None],
    ) -> None:
        """End the era; `done` gets the blocks that were written, or nothing if it failed.

        `recorded`: runs of extents that are durably recorded now.  What failed is told as an
        event; its blocks come with the next barrier.
        """
        if self._busy:
            raise RuntimeError("a barrier is under way")
        self._busy = True
        seen = self._kernel.counters()
        table = self.routes.propose(recorded)
        geometry = self._geometry
        segments = (
            None if table is None else table.segments(geometry.extent_bytes, geometry.size_bytes)
        )

        def ended(error: OSError | None, landed: Landed | None) -> None:
            self._busy = False
            if landed is None:
                self.failures += 1
                self.routes.failed()
                reason = "no reason" if error is None else error.strerror or str(error)
                self._emit(
                    "barrier-error", message=f"a barrier failed and is tried again: {reason}"
                )
                done(())
                self.on_ended()
                return
            self._seen = seen
            self._since_era = landed.era + 1
            self.barriers += 1
            self.skipped += landed.skipped
            self.window_s_total += landed.window_s
            self.window_s_last = landed.window_s
            self.window_s_max = max(self.window_s_max, landed.window_s)
            per = geometry.blocks_per_extent
            blocks = geometry.blocks
            runs = [(first, min(stop, blocks)) for first, stop in landed.runs if first < blocks]
            self.routes.landed(
                {
                    extent
                    for first, stop in runs
                    for extent in range(first // per, (stop - 1) // per + 1)
                }
            )
            done(runs)
            self.on_ended()

        self._kernel.barrier(segments, self._since_era, ended)
