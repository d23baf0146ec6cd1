"""The record in use: the volatile copy, the stored copy, and what is known of their difference.

Three bitmaps over the extents, one bit each:

- `wanted`: what the record should hold.
- `durable`: what the stored copy holds for certain, whatever happens next.  While a page is being
  written it may come back from a power cut as the old page or as the new one, so a bit is durable
  during that time only if both have it.
- `covered` = wanted and durable: a write to these extents needs no record I/O.

Invariants:
1. `add` calls back without error only when every extent it was given is durable in the stored
   copy, unless it was dropped meanwhile: whoever relies on it asks `covers` again.
2. `drop` takes `covered` away at once, so no later write to the extent passes as a hit; the stored
   copy follows lazily, with the next write of that page or with `flush_clears`.  Until then
   an `add` of the extent costs nothing: the stored copy never lost it.  With `note` it follows in
   the same way the other way round; what was noted is covered once it is there.
3. When the write of a page begins, `durable` loses what is not on it; when it ends well, it gains
   what is.  What was added or dropped in between is neither.

How pages are written, and what an error leaves, is the affair of record/page_writer.  A crash
leaves each page in its old or its new state: all of `durable` is in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bitarray import bitarray

from bitmapd.media.base import Device, Done, Scheduler
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Ranges
from bitmapd.record.layout import EXTENTS_PER_PAGE, Loaded, PageState, all_ones
from bitmapd.record.page_writer import Batch, Emit, PageWriter


class RecordStore:
    """See the module docstring.  A `Record` (record/holder)."""

    def __init__(
        self,
        geometry: Geometry,
        loaded: Loaded,  # healed: no page of it is damaged
        device: Device,
        scheduler: Scheduler,
        emit: Emit,
    ) -> None:
        self._wanted = loaded.bits.copy()
        self._durable = loaded.bits.copy()
        self._covered = loaded.bits.copy()
        self._pages = PageWriter(geometry, loaded, device, scheduler, emit, self)
        self.recorded_extents = self._wanted.count()

    # -- questions ------------------------------------------------------------------------
    def covers(self, first: int, stop: int) -> bool:
        """Whether extents [first, stop) are in the record and durably so."""
        if stop - first == 1:
            return bool(self._covered[first])
        return self._covered.find(False, first, stop) < 0

    @property
    def covered(self) -> bitarray:
        """What `covers` asks: the live bits, for readers that ask them for each write."""
        return self._covered

    def missing(self, first: int, stop: int) -> int:
        """How many of extents [first, stop) are not in the record."""
        return stop - first - self._wanted.count(True, first, stop)

    @property
    def recorded(self) -> bitarray:
        """The record as it should be; a copy."""
        return self._wanted.copy()

    def recorded_runs(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Maximal runs of recorded extents in [start, end), in order."""
        limit = len(self._wanted) if end is None else end
        stop = start
        while (first := self._wanted.find(True, stop, limit)) >= 0:
            stop = self._wanted.find(False, first, limit)
            if stop < 0:
                stop = limit
            yield first, stop

    def covered_runs(self) -> Iterator[tuple[int, int]]:
        """Maximal runs of extents that are recorded and durably so, in order."""
        stop, limit = 0, len(self._covered)
        while (first := self._covered.find(True, stop)) >= 0:
            stop = self._covered.find(False, first)
            if stop < 0:
                stop = limit
            yield first, stop

    # -- changes --------------------------------------------------------------------------
    def add(self, needed: Ranges, extra: Ranges, done: Done) -> bool:
        """Put extents into the record and call back when `needed` are durable there.

        Extents of `extra` ride along where their page is written anyway and are ignored where it is
        not.  Returns False, and never calls back, if no write is needed.
        """
        batch = Batch(done)
        asked: set[int] = set()
        for first, stop in needed:
            for index, low, high in _by_page(first, stop):
                self._want(low, high)
                if self._durable.find(False, low, high) < 0:
                    self._covered[low:high] = True
                elif index not in asked:
                    asked.add(index)
                    self._pages.ask(index, batch)
        for first, stop in extra:
            index = first // EXTENTS_PER_PAGE
            if index == (stop - 1) // EXTENTS_PER_PAGE:  # nearly always, and there are many
                if index in asked:
                    self._want(first, stop)
                continue
            for index, low, high in _by_page(first, stop):
                if index in asked:
                    self._want(low, high)
        return bool(asked)

    def note(self, runs: Ranges) -> None:
        """Put extents into the record; the stored copy follows lazily, as after `drop`."""
        for first, stop in runs:
            for index, low, high in _by_page(first, stop):
                self._want(low, high)
                if self._durable.find(False, low, high) < 0:
                    self._covered[low:high] = True
                else:
                    self._pages.outdated(index)

    def destage(self, done: Done) -> bool:
        """Write all pages that lack something of the record, at once; call back when none does,
        with the first error there was.  Returns False, and never calls back, if none does now."""
        batch, lacking, at = Batch(done), self._wanted & ~self._durable, 0
        while (at := lacking.find(True, at)) >= 0:
            self._pages.ask(at // EXTENTS_PER_PAGE, batch)
            at = (at // EXTENTS_PER_PAGE + 1) * EXTENTS_PER_PAGE
        self._pages.commit()
        return bool(batch.pages)

    def drop(self, extents: Iterable[int]) -> None:
        """Take extents out of the record; the stored copy follows lazily.

        The caller has made sure that they are clean: durable and equal on both sides, with no
        write to them in flight.
        """
        for extent in extents:
            if self._wanted[extent]:
                self._wanted[extent] = False
                self._covered[extent] = False
                self.recorded_extents -= 1
                self._pages.outdated(extent // EXTENTS_PER_PAGE)

    def prepare_growth(self, geometry: Geometry, done: Done) -> None:
        """Have the last page name what a larger volume will have on it, and the extent in which the
        volume ends now, and call back when it does durably.  Every later write of the page names
        them as well, also if that extent is dropped.

        Nothing of that shows before `grow`, and a load cuts it off until the superblock says the
        larger size.  So it need not be taken back, and may be asked for again with any size.
        """
        self._pages.prepare_growth(geometry, done)

    def grow(self, geometry: Geometry, added: Sequence[PageState]) -> None:
        """The volume has more extents from now on, and all of them are recorded.

        `prepare_growth` has called back without error for this size.  `added` are the pages that
        it needs besides the present ones; both slots of each were written as ones.
        """
        old = len(self._wanted)
        for bits in (self._wanted, self._durable, self._covered):
            bits.extend(all_ones(geometry)[old:])
        self.recorded_extents += geometry.extents - old
        self._pages.grow(geometry, added)

    def _want(self, first: int, stop: int) -> None:
        self.recorded_extents += self.missing(first, stop)
        self._wanted[first:stop] = True

    # -- what the pages hold (page_writer.Contents) -----------------------------------------
    def begin_write(self, first: int, stop: int) -> bitarray:
        bits = self._wanted[first:stop]
        self._durable[first:stop] &= bits
        return bits

    def stored(self, first: int, bits: bitarray) -> None:
        stop = first + len(bits)
        self._durable[first:stop] = bits
        self._covered[first:stop] = self._wanted[first:stop] & bits

    # -- the pages themselves -----------------------------------------------------------------
    def commit(self) -> None:
        """Begin the writes that are due; called by the loop, or earlier at the end of a batch."""
        self._pages.commit()

    def flush_clears(self) -> None:
        """Begin to write the pages whose stored copy is not as it should be."""
        self._pages.flush_clears()

    def destage_clears(self, done: Done) -> None:
        """Call back when nothing that was dropped up to now is in the stored copy any more, but for
        what `prepare_growth` keeps there; with an error if a page could not be written.  What comes
        meanwhile is not waited for."""
        self._pages.destage_clears(done)

    def when_idle(self, done: Done) -> None:
        """Call back once no page is being written; with the last error while some page needs to be
        written again because of one."""
        self._pages.when_idle(done)

    @property
    def settled(self) -> bool:
        """Whether nothing is being written or waits to be."""
        return self._pages.settled

    @property
    def failing(self) -> bool:
        """Whether the last write of some page failed."""
        return self._pages.failing

    @property
    def slow(self) -> bool:
        """Whether some write of a page has been in flight for too long."""
        return self._pages.slow

    @property
    def write_age_s(self) -> float:
        """How long the oldest write that is in flight has been so; 0 if there is none."""
        return self._pages.write_age_s

    @property
    def updates(self) -> int:
        """Writes of pages that added something."""
        return self._pages.updates

    @property
    def clears(self) -> int:
        """Writes of pages that nobody waited for."""
        return self._pages.clears

    @property
    def errors(self) -> int:
        return self._pages.errors


def _by_page(first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The pages of extents [first, stop), and the part on each: (index, first, stop)."""
    for index in range(first // EXTENTS_PER_PAGE, (stop - 1) // EXTENTS_PER_PAGE + 1):
        start = index * EXTENTS_PER_PAGE
        yield index, max(first, start), min(stop, start + EXTENTS_PER_PAGE)
