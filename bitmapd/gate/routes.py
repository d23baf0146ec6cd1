"""Which extents hosts write directly, and which through the gate (pure).

The kernel's table is a copy of the record: an extent in the record may be *direct*, every other one
goes through the gate.  What is direct can be written without bitmapd's knowledge, so:

1. Only extents that are durably recorded are proposed, and an extent that is *open* is never
   dropped from the record.  Open is: direct in the table that is in force, direct in a table that
   may be in force (a barrier under way, or one whose outcome is not known), or moved to the gate at
   the last barrier (*leaving*): what was written to it before the move becomes known only with the
   blocks of the next one.
2. A barrier that failed leaves the union of both tables open and has the next one load a table.
3. An extent that the record is to lose is *cooled* first: moved to the gate at the next barrier.
   After the barrier after that it is *closed*, and the gate drops it when it is clean.
4. The table has at most `max_segments` segments.  When the runs do not fit, those that were
   written lately stay, and of these the longest.
5. A table that only *grows* needs no barrier: it has every extent of the one in force and more, so
   nothing leaves, and what was written and is not known stays so until the next barrier.  What
   comes into it is open from the moment it is asked for.  A table that has to lose something waits
   for a barrier, and so does any while it is not known which one is in force.

A table is changed only when that helps: something has to be cooled, or the gate has had writes to
recorded extents that could have been direct.  When not all of them fit, one that goes in pushes
another one out, so then it takes many such writes.

A volume has a million extents and more, so all sets of them are sets of bits (`BlockSet`), and
what is said of many is said in runs.

A crash loses all of it.  A restarted bitmapd counts every recorded extent as direct until its
first barrier has loaded a table of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bitmapd.gate.blockset import BlockSet

Segment = tuple[int, int, str]  # first byte, end byte, "direct" or "gate"
Run = tuple[int, int]  # extents [first, stop)

DIRECT = "direct"
GATE = "gate"
MAX_SEGMENTS = 2000
# Writes through the gate that could have been direct, before a barrier is worth having for them.
URGENT_HITS = 64
# And before it is worth having the table grow, which ends no era.
GROWTH_HITS = 16


@dataclass(frozen=True, slots=True)
class Table:
    """The runs of extents that are direct, in ascending order."""

    runs: tuple[Run, ...]

    def extents(self) -> BlockSet:
        return BlockSet(self.runs)

    def segments(self, extent_bytes: int, size_bytes: int) -> list[Segment]:
        """Segments that cover the volume exactly once."""
        segments: list[Segment] = []
        end = 0
        for first, stop in self.runs:
            begin = first * extent_bytes
            if begin > end:
                segments.append((end, begin, GATE))
            end = min(stop * extent_bytes, size_bytes)
            segments.append((begin, end, DIRECT))
        if end < size_bytes:
            segments.append((end, size_bytes, GATE))
        return segments


EMPTY = Table(())


class Routes:
    """See the module docstring."""

    def __init__(self, *, max_segments: int = MAX_SEGMENTS, growth_hits: int = GROWTH_HITS) -> None:
        self._growth_hits = growth_hits
        self._max_runs = max(1, (max_segments - 1) // 2)
        self._table = EMPTY
        self._direct = BlockSet()
        self._pending: Table | None = None
        self._maybe = BlockSet()  # direct in a table that may be in force
        self._adopted = BlockSet()  # direct before this process began
        self._leaving = BlockSet()
        self._open = BlockSet()  # direct, maybe and leaving
        self._cooling = BlockSet()
        self._written = BlockSet()  # by the last barrier's blocks
        self._gated = BlockSet()  # recorded extents that the gate saw written since
        self._gated_hits = 0
        self._must_load = False  # it is not known which table is in force
        self._wants_back = False  # what `gate_all` took out
        self._full = False  # the table has not room for all that is recorded
        self._gating = False
        self._sealed = False
        self._last = False  # the barrier under way began after `seal`
        self.loads = 0
        self.moved = 0
        # Called now and then while the table may be worth changing (`urgent`, `can_grow`).
        self.on_urgent: Callable[[], None] = lambda: None

    # -- what the gate asks -----------------------------------------------------------------
    def is_open(self, extent: int) -> bool:
        """Whether it may have been written without the gate's knowledge since the last blocks."""
        return self._open.any(extent, extent + 1)

    def is_direct(self, extent: int) -> bool:
        """Whether hosts may write it past the gate now."""
        return self._direct.any(extent, extent + 1) or self._maybe.any(extent, extent + 1)

    @property
    def open_runs(self) -> list[Run]:
        return list(self._open.runs())

    def is_cooling(self, extent: int) -> bool:
        return self._cooling.any(extent, extent + 1)

    def cool(self, extents: Iterable[int]) -> None:
        """Have these moved to the gate, so that the record can lose them."""
        for extent in extents:
            self._cooling.add(extent, extent + 1)

    def warm(self, extents: Iterable[int]) -> None:
        """They are wanted after all."""
        for extent in extents:
            self._cooling.discard(extent, extent + 1)

    def closed(self) -> list[int]:
        """Cooling extents that the gate alone has written since their last blocks were known."""
        closed = self._cooling.minus(self._open)
        return [extent for run in closed.runs() for extent in range(*run)]

    def missed(self) -> list[int]:
        """Cooling extents that hosts have written through the gate since the latest barrier."""
        both = BlockSet()
        if self._gated.meets(self._cooling):
            both.update(self._gated)
            both.intersect(self._cooling)
        return [extent for run in both.runs() for extent in range(*run)]

    def gone(self, extents: Iterable[int]) -> None:
        """These have left the record."""
        for extent in extents:
            self._cooling.discard(extent, extent + 1)
            self._gated.discard(extent, extent + 1)

    def gated_hit(self, first: int, stop: int) -> None:
        """A write to recorded extents [first, stop) came through the gate."""
        self._gated_hits += 1
        self._gated.add(first, stop)
        if self._gated_hits % self._growth_hits == 0:
            self.on_urgent()

    def adopt(self, extents: Iterable[Run]) -> None:
        """A table of an earlier process is in force, and these runs are direct in it."""
        self._adopted.update(BlockSet(extents))
        self._maybe.update(self._adopted)
        self._open.update(self._adopted)
        self._must_load = True

    def take_adopted(self) -> list[Run]:
        """Runs of the extents that were adopted; empty ever after."""
        adopted, self._adopted = self._adopted, BlockSet()
        return list(adopted.runs())

    def seal(self) -> None:
        """Hosts cannot reach the volume any more.

        The blocks of the next barrier that begins are the last ones.  It loads a table without
        direct extents, so that the record can be emptied while the kernel's layers still exist.
        """
        self._sealed = True

    def unseal(self) -> None:
        """Hosts are about to reach it again; a barrier that began before has passed by then."""
        self._sealed = False
        self._must_load = True

    @property
    def is_sealed(self) -> bool:
        return self._sealed

    def gate_all(self, *, wanted: bool = True) -> None:
        """Have the next barrier move everything to the gate, and nothing back until told so; then
        the next one does, or growth."""
        self._gating = wanted
        self._wants_back = not wanted

    @property
    def is_gating(self) -> bool:
        return self._gating

    @property
    def is_still(self) -> bool:
        """Whether nothing is direct, and all that was written when it was is known."""
        return not self._open

    @property
    def all_gated(self) -> bool:
        """Whether no host can write past the gate."""
        return not self._direct and not self._maybe

    # -- growth -----------------------------------------------------------------------------
    @property
    def can_grow(self) -> bool:
        """Whether a larger table is worth having, and needs no barrier."""
        if self._gated_hits < self._growth_hits or self._full or self._must_load or self._pending:
            return False
        return not self._sealed and not self._gating and self._misplaced

    def grow(self, recorded: Iterable[Run]) -> Table | None:
        """The table in force with all of these runs, or None if it has no room for them.

        What comes in is open until `grew`, or the barrier after `failed`.
        """
        grown = BlockSet(self._without_cooling(recorded))
        grown.update(self._direct)
        runs = tuple(grown.runs())
        self._full = len(runs) > self._max_runs
        if self._full:
            return None
        self._pending = Table(runs)
        self._maybe.update(grown)
        self._open.update(grown)
        return self._pending

    def grew(self) -> None:
        """The table that `grow` has made is in force."""
        if self._pending is None:
            raise RuntimeError("no table was asked for")
        direct = self._pending.extents()
        self.moved += direct.count() - self._direct.count()
        self.loads += 1
        self._table, self._direct, self._pending = self._pending, direct, None
        self._maybe = BlockSet()
        self._wants_back = False
        self._gated_hits = 0

    # -- barriers ---------------------------------------------------------------------------
    @property
    def count_direct(self) -> int:
        return self._direct.count()

    @property
    def wants_change(self) -> bool:
        """Whether a barrier should load a table."""
        if self._sealed or self._gating:
            return not self.all_gated
        if self._must_load or self._wants_back or self._cooling.meets(self._direct):
            return True
        if self._full and self._gated_hits < URGENT_HITS:
            return False
        return self._misplaced

    @property
    def _misplaced(self) -> bool:
        """Whether the gate saw writes that could have been direct."""
        return bool(self._gated.minus(self._direct).minus(self._cooling))

    @property
    def urgent(self) -> bool:
        """Whether a barrier for the table's sake should not wait for the end of the era."""
        return self._gated_hits >= URGENT_HITS and self._misplaced

    @property
    def settling(self) -> bool:
        """Whether another barrier is needed before extents that were moved are closed."""
        return bool(self._leaving or (self._sealed and not self.all_gated))

    def propose(self, recorded: Iterable[Run]) -> Table | None:
        """The table for the barrier that begins now, or None to keep the one in force.

        `recorded`: runs of extents that are durably recorded, ascending.  What is proposed is open
        until `landed` or `failed` was called.
        """
        self._last = self._sealed
        if not self.wants_change:
            return None
        runs = [] if self._sealed or self._gating else self._without_cooling(recorded)
        self._full = len(runs) > self._max_runs
        if self._full:
            written, gated = self._written, self._gated
            runs.sort(
                key=lambda run: (
                    not (written.any(*run) or gated.any(*run)),
                    run[0] - run[1],
                )
            )
            runs = sorted(runs[: self._max_runs])
        table = Table(tuple(runs))
        self._pending = table
        proposed = table.extents()
        self._maybe.update(proposed)
        self._open.update(proposed)
        return table

    def _without_cooling(self, recorded: Iterable[Run]) -> list[Run]:
        if not self._cooling:
            return list(recorded)
        return list(BlockSet(recorded).minus(self._cooling).runs())

    def landed(self, written: Iterable[Run]) -> None:
        """The barrier has passed, with the table that was proposed for it, if one was.

        `written`: runs of the extents of the blocks it collected.
        """
        self._leaving = BlockSet()
        if self._pending is not None:
            direct, before = self._pending.extents(), self._direct
            gone, come = before.minus(direct), direct.minus(before)
            self.moved += gone.count() + come.count()
            before.update(self._maybe)
            self._leaving = before.minus(direct)
            self.loads += 1
            self._table, self._direct, self._pending = self._pending, direct, None
            self._maybe = BlockSet()
            self._must_load = self._wants_back = False
        if self._last:
            self._leaving = BlockSet()
        self._open = BlockSet()
        for part in (self._direct, self._maybe, self._leaving):
            self._open.update(part)
        self._written = BlockSet(written)
        self._gated = BlockSet()
        self._gated_hits = 0

    def failed(self) -> None:
        """The barrier's outcome is not known, or it did not take place."""
        if self._pending is not None:
            self._pending = None
            self._must_load = True
