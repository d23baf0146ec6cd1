"""The stored copy of a record that is in use: its pages, and how they are written.

A page has two slots and is written to them in turn, so one of them is whole whatever becomes of the
other.  What is to be on it, and what that means for hosts, is the owner's affair (record/store).

Invariants:
1. A page is written to the slot that does not hold the newest content, one write at a time per
   page.  Everything that asks for the page meanwhile shares the next write (group commit).
2. No two writes of a page have the same sequence.  After a failed write the slot's content is
   unknown: the same slot is written again with a higher one, and read back before it counts.
3. A batch is done when every page that it asked for has been written as it was then, or later, with
   the first error there was.
4. A page that is to have more extents (`prepare_growth`) has them as ones in every write from then
   on, whether the volume grows or not, until `grow` gives them to the owner; and the one in which
   the volume ends, too.  For a superblock that says the larger size may be on the medium although
   its write has failed, and what is new in that extent is then named by nothing else.
5. A write that is in flight for longer than `SLOW_S` is reported once (`record-slow`): it is no
   error, so nobody would hear of it.  `record-ok` ends that, and ends errors: no write is overdue,
   and what failed has been written again.
6. Pages bring their buffers along, so a write on which a host waits does not need memory that the
   system may refuse.

The device is written with FUA only; nothing here relies on a flush.  What a crash leaves: each page
in its old or its new state, or torn, in which case the other slot holds the old one (record/pages).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from bitarray import bitarray

from bitmapd.media.base import Device, Done, Scheduler
from bitmapd.media.buffers import aligned
from bitmapd.record.geometry import Geometry
from bitmapd.record.layout import (
    EXTENTS_PER_PAGE,
    PAGE_BYTES,
    Loaded,
    PageState,
    encode_page_into,
    page_count,
    page_offset,
)

Emit = Callable[..., None]

SLOW_S = 5.0

_UNREAD = bytes(PAGE_BYTES)


class Contents(Protocol):
    """The owner, who knows what belongs on a page.  Extents [first, first + len(bits))."""

    def begin_write(self, first: int, stop: int) -> bitarray:
        """What to write for extents [first, stop).  From now on a power cut brings back this or
        what was stored before."""

    def stored(self, first: int, bits: bitarray) -> None:
        """The stored copy has these bits for certain."""


class Batch:
    """One request that waits for some pages; `adds` to the record, or only clears."""

    __slots__ = ("_done", "_error", "adds", "pages")

    def __init__(self, done: Done, *, adds: bool = True) -> None:
        self.adds = adds
        self.pages = 0
        self._done = done
        self._error: OSError | None = None

    def page_done(self, error: OSError | None) -> None:
        self._error = self._error or error
        self.pages -= 1
        if self.pages == 0:
            self._done(self._error)


class _Page:
    """One page of the stored copy."""

    __slots__ = (
        "buffer",
        "end",
        "first",
        "highest",
        "index",
        "last",
        "lazy",
        "newest_slot",
        "sequence",
        "served",
        "stop",
        "suspect",
        "waiters",
        "writing",
    )

    def __init__(self, index: int, extents: int, state: PageState, buffer: memoryview) -> None:
        self.index = index
        self.first = index * EXTENTS_PER_PAGE
        self.stop = min(self.first + EXTENTS_PER_PAGE, extents)
        self.end = self.stop  # from `stop` to here it is written as ones (`prepare_growth`)
        self.last: int | None = None  # extent that is written as one as well
        self.newest_slot = state.newest_slot
        self.sequence = state.sequence
        self.highest = state.highest  # highest sequence that was ever tried
        self.waiters: list[Batch] = []  # for the next write
        self.served: list[Batch] = []  # by the write that is in flight
        self.writing = False
        self.lazy = False  # the stored copy is not what it should be
        self.suspect = False  # the last write failed
        self.buffer = buffer


def _buffers(count: int) -> list[memoryview]:
    """One for each of so many pages, and in memory: touched, so no fault has to find a place."""
    if not count:
        return []
    whole = aligned(count * PAGE_BYTES)
    buffers = [whole[at : at + PAGE_BYTES] for at in range(0, len(whole), PAGE_BYTES)]
    for buffer in buffers:
        buffer[0] = 0
    return buffers


class PageWriter:
    """See the module docstring."""

    def __init__(
        self,
        geometry: Geometry,
        loaded: Loaded,  # healed: no page of it is damaged
        device: Device,
        scheduler: Scheduler,
        emit: Emit,
        contents: Contents,
    ) -> None:
        self._volume = loaded.superblock.volume_uuid.bytes
        self._short = geometry.short_extent  # in which the volume ends, if not with it
        self._device = device
        self._scheduler = scheduler
        self._emit = emit
        self._contents = contents
        *buffers, self._expected = _buffers(len(loaded.pages) + 1)
        self._spare: list[memoryview] = []  # for pages that a larger volume will have
        self._pages = [
            _Page(index, geometry.extents, state, buffer)
            for index, (state, buffer) in enumerate(zip(loaded.pages, buffers, strict=True))
        ]
        self._ready: list[_Page] = []
        self._commit_scheduled = False
        self._idle_waiters: list[Done] = []
        self._writing: dict[_Page, float] = {}  # since when (loop time); the oldest is the first
        self._watching = False
        self._in_trouble = False  # slow or failing, and told
        self._last_error: OSError | None = None
        self.slow = False  # some write has been in flight for SLOW_S
        self.updates = 0
        self.clears = 0
        self.errors = 0

    # -- questions ------------------------------------------------------------------------
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

    # -- what to write --------------------------------------------------------------------
    def ask(self, index: int, batch: Batch) -> None:
        """Write a page for this batch, which waits for it."""
        page = self._pages[index]
        page.waiters.append(batch)
        batch.pages += 1
        self._make_ready(page)

    def outdated(self, index: int) -> None:
        """A page is not as it should be; nobody waits for it."""
        self._pages[index].lazy = True

    def flush_clears(self) -> None:
        """Begin to write the pages that are outdated."""
        for page in self._pages:
            if page.lazy and not page.writing:
                self._make_ready(page)

    def destage_clears(self, done: Done) -> None:
        """Call back when no page is as outdated as one is now; with an error if it may be."""
        batch = Batch(done, adds=False)
        for page in self._pages:
            if page.lazy:
                self.ask(page.index, batch)
            elif page.writing:
                page.served.append(batch)
                batch.pages += 1
        if not batch.pages:
            self._scheduler.call_soon(done, None)

    def when_idle(self, done: Done) -> None:
        """Call back once no page is being written; with the last error while some page needs to be
        written again because of one."""
        self._idle_waiters.append(done)
        self._scheduler.call_soon(self._check_idle)

    # -- growing --------------------------------------------------------------------------
    def prepare_growth(self, geometry: Geometry, done: Done) -> None:
        """Have the last page name what a larger volume will have on it, and call back when it does
        durably.  OSError or MemoryError, and nothing has changed, if there are no buffers for its
        further pages."""
        missing = page_count(geometry.extents) - len(self._pages) - len(self._spare)
        self._spare += _buffers(max(0, missing))
        page = self._pages[-1]
        page.end = max(page.end, min(page.first + EXTENTS_PER_PAGE, geometry.extents))
        page.last = self._short
        if page.end == page.stop and page.last is None:
            self._scheduler.call_soon(done, None)
        else:
            self.ask(page.index, Batch(done))

    def grow(self, geometry: Geometry, added: Sequence[PageState]) -> None:
        """The last page belongs to the owner up to the new end; `added` are on the medium."""
        last = self._pages[-1]
        last.stop = min(last.first + EXTENTS_PER_PAGE, geometry.extents)
        self._short = geometry.short_extent
        if last.last is not None:
            last.last, last.lazy = None, True  # it may have been dropped
        for state in added:
            self._pages.append(_Page(len(self._pages), geometry.extents, state, self._spare.pop()))

    # -- writing --------------------------------------------------------------------------
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
        batches, page.waiters = page.waiters, []
        page.served = batches
        page.writing = True
        page.lazy = False
        self._writing[page] = self._scheduler.time()
        if not self._watching:
            self._watch(SLOW_S)
        slot, sequence = 1 - page.newest_slot, page.highest + 1
        page.highest = sequence
        bits = self._contents.begin_write(page.first, page.stop)
        content = bits if page.end == page.stop else bits + bitarray("1") * (page.end - page.stop)
        if page.last is not None:
            content = content.copy()
            content[page.last - page.first] = True
        payload, previous = content.tobytes(), page.sequence
        encode_page_into(page.buffer, self._volume, page.index, sequence, previous, payload)
        if any(batch.adds for batch in batches):
            self.updates += 1
        else:
            self.clears += 1

        def written(error: OSError | None) -> None:
            if error is not None or not page.suspect:
                finished(error)
                return
            page.buffer[:] = _UNREAD
            self._device.read(page_offset(page.index, slot), page.buffer, compare)

        def compare(error: OSError | None) -> None:
            if error is None:
                expected = self._expected
                encode_page_into(expected, self._volume, page.index, sequence, previous, payload)
                if page.buffer != expected:
                    error = OSError(errno.EIO, f"page {page.index} reads back other than written")
            finished(error)

        def finished(error: OSError | None) -> None:
            if error is None:
                page.newest_slot = slot
                page.sequence = sequence
            self._finished(page, bits, batches, error)

        self._device.write(page_offset(page.index, slot), page.buffer, written, True)

    def _finished(
        self, page: _Page, bits: bitarray, batches: list[Batch], error: OSError | None
    ) -> None:
        page.writing = False
        page.served = []
        del self._writing[page]
        if error is None:
            page.suspect = False
            # The page may have grown meanwhile (`grow`); its new extents are in every write.
            self._contents.stored(page.first, bits)
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

    def _check_idle(self) -> None:
        if self._writing or self._ready:
            return
        waiters, self._idle_waiters = self._idle_waiters, []
        error = self._last_error if self.failing else None
        for done in waiters:
            done(error)

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
