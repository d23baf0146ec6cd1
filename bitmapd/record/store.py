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
   an `add` of the extent costs nothing: the stored copy never lost it.
3. A page is written to the slot that does not hold the newest content, one write at a time per
   page.  Everything that asks for the page meanwhile shares the next write (group commit).
4. After a failed write the slot's content is unknown: the same slot is written again with a higher
   sequence number, and read back before the page counts as durable again.
5. A write that is in flight for longer than `SLOW_S` is reported once (`record-slow`): it is no
   error, so nobody would hear of it.  `record-ok` ends that, and ends errors: no write is overdue,
   and what failed has been written again.

What a crash leaves: each page in its old or its new state, or torn, in which case the other slot
holds the old one (record/layout.py).  In every case all of `durable` at that moment is in it.

The record device is written with FUA only; nothing here relies on a flush.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence

from bitarray import bitarray

from bitmapd.media.base import Device, Done, Scheduler
from bitmapd.media.buffers import aligned
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Ranges
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    Loaded,
    PageState,
    all_ones,
    encode_page_into,
    page_offset,
)

Emit = Callable[..., None]

SLOW_S = 5.0


class _Page:
    """One page of the stored copy."""

    __slots__ = (
        "buffer",
        "end",
        "first",
        "highest",
        "index",
        "lazy",
        "newest_slot",
        "sequence",
        "served",
        "stop",
        "suspect",
        "waiters",
        "writing",
    )

    def __init__(self, index: int, extents: int, state: PageState) -> None:
        self.index = index
        self.first = index * EXTENTS_PER_PAGE
        self.stop = min(self.first + EXTENTS_PER_PAGE, extents)
        self.end = self.stop  # from `stop` to here it is written as ones (`prepare_growth`)
        self.newest_slot = state.newest_slot
        self.sequence = state.sequence
        self.highest = state.highest  # highest sequence that was ever tried
        self.waiters: list[_Batch] = []  # for the next write
        self.served: list[_Batch] = []  # by the write that is in flight
        self.writing = False
        self.lazy = False
        self.suspect = False
        self.buffer: memoryview | None = None


class _Batch:
    """One request that waits for some pages; `adds` to the record, or only clears."""

    __slots__ = ("adds", "done", "error", "pages")

    def __init__(self, done: Done, *, adds: bool = True) -> None:
        self.done = done
        self.adds = adds
        self.pages = 0
        self.error: OSError | None = None

    def page_done(self, error: OSError | None) -> None:
        self.error = self.error or error
        self.pages -= 1
        if self.pages == 0:
            self.done(self.error)


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
        self._geometry = geometry
        self._volume = loaded.superblock.volume_uuid.bytes
        self._device = device
        self._scheduler = scheduler
        self._emit = emit
        self._wanted = loaded.bits.copy()
        self._durable = loaded.bits.copy()
        self._covered = loaded.bits.copy()
        self._pages = [
            _Page(index, geometry.extents, state) for index, state in enumerate(loaded.pages)
        ]
        self._ready: list[_Page] = []
        self._commit_scheduled = False
        self._idle_waiters: list[Done] = []
        self._writing: dict[_Page, float] = {}  # since when (loop time); the oldest is the first
        self._watching = False
        self._in_trouble = False  # slow or failing, and told
        self.slow = False  # some write has been in flight for SLOW_S
        self._last_error: OSError | None = None
        self.recorded_extents = self._wanted.count()
        self.updates = 0
        self.clears = 0
        self.errors = 0

    # -- questions ------------------------------------------------------------------------
    def covers(self, first: int, stop: int) -> bool:
        """Whether extents [first, stop) are in the record and durably so."""
        if stop - first == 1:
            return bool(self._covered[first])
        return self._covered.find(False, first, stop) < 0

    def is_wanted(self, extent: int) -> bool:
        return bool(self._wanted[extent])

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

    @property
    def failing(self) -> bool:
        """Whether the last write of some page failed."""
        return any(page.suspect for page in self._pages)

    @property
    def write_age_s(self) -> float:
        """How long the oldest write that is in flight has been so; 0 if there is none."""
        oldest = next(iter(self._writing.values()), None)
        return 0.0 if oldest is None else self._scheduler.time() - oldest

    @property
    def settled(self) -> bool:
        """Whether nothing is being written or waits to be."""
        return not self._writing and not self._ready and not any(p.lazy for p in self._pages)

    # -- changes --------------------------------------------------------------------------
    def add(self, needed: Ranges, extra: Ranges, done: Done) -> bool:
        """Put extents into the record and call back when `needed` are durable there.

        Extents of `extra` ride along where their page is written anyway and are ignored where it is
        not.  Returns False, and never calls back, if no write is needed.
        """
        batch = _Batch(done)
        asked: set[int] = set()
        for first, stop in needed:
            for page in self._pages_of(first, stop):
                low, high = max(first, page.first), min(stop, page.stop)
                self._want(low, high)
                if self._durable.find(False, low, high) < 0:
                    self._covered[low:high] = True
                elif page.index not in asked:
                    asked.add(page.index)
                    page.waiters.append(batch)
                    batch.pages += 1
                    self._make_ready(page)
        for first, stop in extra:
            index = first // EXTENTS_PER_PAGE
            if index == (stop - 1) // EXTENTS_PER_PAGE:  # nearly always, and there are many
                if index in asked:
                    self._want(first, stop)
                continue
            for page in self._pages_of(first, stop):
                if page.index in asked:
                    self._want(max(first, page.first), min(stop, page.stop))
        return bool(asked)

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
                self._pages[extent // EXTENTS_PER_PAGE].lazy = True

    def flush_clears(self) -> None:
        """Begin to write the pages whose stored copy holds more than it should."""
        for page in self._pages:
            if page.lazy and not page.writing:
                self._make_ready(page)

    def destage_clears(self, done: Done) -> None:
        """Call back when nothing that was dropped up to now is in the stored copy any more; with an
        error if a page could not be written.  What comes meanwhile is not waited for."""
        batch = _Batch(done, adds=False)
        for page in self._pages:
            if page.lazy:
                page.waiters.append(batch)
                self._make_ready(page)
            elif page.writing:
                page.served.append(batch)
            else:
                continue
            batch.pages += 1
        if not batch.pages:
            self._scheduler.call_soon(done, None)

    def when_idle(self, done: Done) -> None:
        """Call back once no page is being written; with the last error while some page needs to be
        written again because of one."""
        self._idle_waiters.append(done)
        self._scheduler.call_soon(self._check_idle)

    def prepare_growth(self, geometry: Geometry, done: Done) -> None:
        """Have the last page name what a larger volume will have on it, and call back when it does
        durably.  Every later write of the page names it as well.

        Nothing of that shows before `grow`, and a load cuts it off until the superblock says the
        larger size.  So it need not be taken back, and may be asked for again with any size.
        """
        page = self._pages[-1]
        page.end = max(page.end, min(page.first + EXTENTS_PER_PAGE, geometry.extents))
        if page.end == page.stop:
            self._scheduler.call_soon(done, None)
            return
        batch = _Batch(done)
        batch.pages = 1
        page.waiters.append(batch)
        self._make_ready(page)

    def grow(self, geometry: Geometry, added: Sequence[PageState]) -> None:
        """The volume has more extents from now on, and all of them are recorded.

        `prepare_growth` has called back without error for this size.  `added` are the pages that
        it needs besides the present ones; both slots of each were written as ones.
        """
        old = self._geometry.extents
        self._geometry = geometry
        for bits in (self._wanted, self._durable, self._covered):
            bits.extend(all_ones(geometry)[old:])
        self.recorded_extents += geometry.extents - old
        last = self._pages[-1]
        last.stop = min(last.first + EXTENTS_PER_PAGE, geometry.extents)
        for state in added:
            self._pages.append(_Page(len(self._pages), geometry.extents, state))

    # -- writing pages --------------------------------------------------------------------
    def _pages_of(self, first: int, stop: int) -> Sequence[_Page]:
        return self._pages[first // EXTENTS_PER_PAGE : (stop - 1) // EXTENTS_PER_PAGE + 1]

    def _want(self, first: int, stop: int) -> None:
        self.recorded_extents += self.missing(first, stop)
        self._wanted[first:stop] = True

    def _make_ready(self, page: _Page) -> None:
        if page not in self._ready:
            self._ready.append(page)
        if not self._commit_scheduled:
            self._commit_scheduled = True
            self._scheduler.call_soon(self.commit)

    def commit(self) -> None:
        """Begin the writes that are due; called by the loop, or earlier at the end of a batch."""
        self._commit_scheduled = False
        if not self._ready:
            return
        ready, self._ready = self._ready, []
        for page in ready:
            if page.writing:
                self._ready.append(page)  # comes up again when the write under way is done
            else:
                self._write(page)

    def _write(self, page: _Page) -> None:
        low, high = page.first, page.stop
        bits = self._wanted[low:high]
        batches, page.waiters = page.waiters, []
        page.served = batches
        page.writing = True
        page.lazy = False
        self._writing[page] = self._scheduler.time()
        if not self._watching:
            self._watch(SLOW_S)
        if page.buffer is None:
            page.buffer = aligned(PAGE_BYTES)
        slot, sequence = 1 - page.newest_slot, page.highest + 1
        # From here on a power cut may bring back either content.
        self._durable[low:high] &= bits
        page.highest = sequence
        content = bits if page.end == high else bits + bitarray("1") * (page.end - high)
        encode_page_into(
            page.buffer, self._volume, page.index, sequence, page.sequence, content.tobytes()
        )
        if any(batch.adds for batch in batches):
            self.updates += 1
        else:
            self.clears += 1

        def written(error: OSError | None) -> None:
            if error is None and page.suspect:
                self._read_back(page, slot, finished)
            else:
                finished(error)

        def finished(error: OSError | None) -> None:
            self._finished(page, slot, sequence, bits, batches, error)

        self._device.write(page_offset(page.index, slot), page.buffer, written, True)

    def _read_back(self, page: _Page, slot: int, done: Done) -> None:
        expected = page.buffer
        found = aligned(PAGE_BYTES)

        def compare(error: OSError | None) -> None:
            if error is None and found != expected:
                error = OSError(errno.EIO, f"page {page.index} reads back other than written")
            done(error)

        self._device.read(page_offset(page.index, slot), found, compare)

    def _finished(
        self,
        page: _Page,
        slot: int,
        sequence: int,
        bits: bitarray,
        batches: list[_Batch],
        error: OSError | None,
    ) -> None:
        page.writing = False
        page.served = []
        del self._writing[page]
        if error is None:
            page.suspect = False
            page.newest_slot = slot
            page.sequence = sequence
            # The page may have grown meanwhile (`grow`); its new extents are in every write.
            low, high = page.first, page.first + len(bits)
            self._durable[low:high] = bits
            self._covered[low:high] = self._wanted[low:high] & bits
        else:
            page.suspect = True
            page.lazy = True
            self.errors += 1
            self._last_error = error
            self._emit(
                "record-error",
                device=self._device.name,
                page=page.index,
                message=f"cannot write the record: {error.strerror or error}",
            )
            self._in_trouble = True
        if self._in_trouble:
            self._check_trouble_is_over()
        for batch in batches:
            batch.page_done(error)
        if self._ready:
            self.commit()
        if self._idle_waiters:
            self._check_idle()

    # -- watching the device --------------------------------------------------------------
    def _watch(self, delay_s: float) -> None:
        self._watching = True
        self._scheduler.call_later(delay_s, self._check_slow)

    def _check_slow(self) -> None:
        self._watching = False
        if not self._writing:
            return
        rest_s = SLOW_S - self.write_age_s
        if rest_s <= 0 and not self.slow:
            self.slow = self._in_trouble = True
            self._emit(
                "record-slow",
                device=self._device.name,
                page=next(iter(self._writing)).index,
                message=f"a write to the record has not been answered for {SLOW_S:.0f} s",
            )
        # A rest that rounding has left, of 1e-16 s, would not move a clock on.
        self._watch(max(rest_s, 0.001) if rest_s > 0 else SLOW_S)

    def _check_trouble_is_over(self) -> None:
        self.slow = self.slow and self.write_age_s >= SLOW_S
        if not self.slow and not self.failing:
            self._in_trouble = False
            self._emit("record-ok", device=self._device.name)

    def _check_idle(self) -> None:
        if self._writing or self._ready:
            return
        waiters, self._idle_waiters = self._idle_waiters, []
        error = self._last_error if self.failing else None
        for done in waiters:
            done(error)
