"""md's write-intent bitmap: one bit a chunk of 64 MiB, cleared by a daemon every 5 s (pure).

Source: md-bitmap.c.  What is modelled, for an internal bitmap and write-behind legs:
1. A chunk that was clean has its bit set, and its page is written and waited for before any write
   of the batch goes out (plug).
2. The chunk's counter ages only while nothing is in flight to it, and in flight is what is not
   durable on the slowest leg.  A pass of the daemon takes a chunk from "used" to "aged", the
   next one clears its bit, one more has the page written.  Writes in between start over, free
   of charge while the bit is set.
3. There is no limit.  One page of 4 KiB holds the bits of 32,768 chunks.

Every leg holds a copy of the bitmap; a page counts as one write here.
"""

from __future__ import annotations

from dmctl.simulate.model import BatchModel, Link
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

CHUNK_BYTES = 64 << 20
DAEMON_S = 5.0
PAGE_BYTES = 4096
CHUNKS_PER_PAGE = PAGE_BYTES * 8


class _Page:
    """`image` is in memory, `disk` what a power cut leaves."""

    __slots__ = ("dirty", "disk", "image", "pending")

    def __init__(self) -> None:
        self.image: set[int] = set()
        self.disk: set[int] = set()
        self.dirty = self.pending = False  # bits set, bits cleared: since it was written


class IntentBitmap(BatchModel):
    """See the module docstring."""

    def __init__(self, trace: Trace, params: Params, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(trace, params, chunk_bytes)
        self.due_s = DAEMON_S
        self._pages: dict[int, _Page] = {}
        self._age: dict[int, int] = {}  # 2 used, 1 aged; not in it: clean
        self._in_flight: dict[int, int] = {}
        self._link = Link(params)

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(chunk in self._page(chunk).disk for chunk in range(first_unit, stop_unit))

    def _page(self, chunk: int) -> _Page:
        return self._pages.setdefault(chunk // CHUNKS_PER_PAGE, _Page())

    def elapse(self, until_s: float) -> None:
        while self.due_s <= until_s:
            self._land(self.due_s)
            self._daemon(self.due_s)
            self.due_s += DAEMON_S
        self._land(until_s)

    def _land(self, until_s: float) -> None:
        for _, first, stop in self._link.arrived(until_s):
            for chunk in range(first, stop):
                self._in_flight[chunk] -= 1
                if not self._in_flight[chunk]:
                    del self._in_flight[chunk]

    def submit(self, now_s: float, first: int, stop: int) -> None:
        self._land(now_s)
        soiled = False
        for write in range(first, stop):
            for chunk in range(self.first[write], self.stop[write]):
                if chunk not in self._age:
                    page = self._page(chunk)
                    page.image.add(chunk)
                    page.dirty = soiled = True
                self._age[chunk] = 2
                self._in_flight[chunk] = self._in_flight.get(chunk, 0) + 1
        if soiled:
            self._unplug(now_s, range(first, stop))
        for write in range(first, stop):
            length = self.trace.end_byte[write] - self.trace.first_byte[write]
            low, high = self.first[write], self.stop[write]
            durable_s = self._link.send(now_s, length, low, high)
            for chunk in range(low, high):
                self.watch.written(chunk, durable_s)

    def _unplug(self, now_s: float, writes: range) -> None:
        for page in self._pages.values():
            if page.dirty:
                self.meter.waited_updates += 1
                self._write(page, now_s)
        self.meter.waited(writes, self.params.record_latency_s)
        self._count(now_s)

    def _write(self, page: _Page, now_s: float) -> None:
        for chunk in page.disk - page.image:
            self.watch.removed(chunk, now_s)
        page.disk = set(page.image)
        page.dirty = page.pending = False
        self.meter.wrote_record(1, PAGE_BYTES)

    def _daemon(self, now_s: float) -> None:
        due = [page for page in self._pages.values() if page.pending]
        for chunk, age in list(self._age.items()):
            if chunk in self._in_flight:
                continue
            if age == 2:
                self._age[chunk] = 1
            else:
                del self._age[chunk]
                page = self._page(chunk)
                page.image.discard(chunk)
                page.pending = True
        for page in due:  # with what was cleared just now
            self._write(page, now_s)
        self._count(now_s)

    def _count(self, now_s: float) -> None:
        self.meter.stored.set(now_s, sum(len(page.disk) for page in self._pages.values()))
        self.meter.record.set(now_s, len(self._age))
