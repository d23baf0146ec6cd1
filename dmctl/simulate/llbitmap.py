"""md's lockless bitmap: a byte a chunk, and neighbours that are infected (pure).

Source: md-llbitmap.c of Linux 6.18.  What is modelled, for a mirror on devices with 512-byte
blocks:
1. Chunks begin at 64 KiB and double until there are no more than 127 Ki of them.  The states of
   512 chunks are one block of the bitmap, which is written as a whole; those of 4,096 (3,072 of
   the first) are one page, which is cleaned as a whole.
2. A write makes its chunks dirty in memory.  If another chunk of the block is dirty already, the
   whole block is made dirty: infected.  Blocks with new dirty chunks are written, and waited for,
   before any write of the batch goes out (plug).
3. The daemon's timer is set for 30 s when a chunk becomes dirty and none is set.  The daemon cleans
   every page that was not written for 5 s and has nothing in flight, and sets the timer again if
   it left one out, or if some page was cleaned before.
4. Cleaning happens in memory.  On disk a chunk stays dirty until its block is written for another
   reason, so a power cut after an idle hour still finds everything dirty that ever was.

A page that is in flight when the daemon comes is left out here; the daemon would wait for it.
"""

from __future__ import annotations

from dmctl.simulate.model import NEVER_S, BatchModel, Link
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

MIN_CHUNK_BYTES = 64 << 10
MAX_CHUNKS = 127 << 10
BLOCK_CHUNKS = 512
PAGE_BLOCKS = 8
HEADER_BLOCKS = 2  # the super block's 1 KiB in front of the states
BLOCK_BYTES = 512
DAEMON_S = 30.0
IDLE_S = 5.0


def chunk_bytes(size_bytes: int) -> int:
    """Of an array of this size."""
    size = MIN_CHUNK_BYTES
    while -(-size_bytes // size) > MAX_CHUNKS:
        size *= 2
    return size


class LocklessBitmap(BatchModel):
    """See the module docstring."""

    def __init__(self, trace: Trace, params: Params) -> None:
        super().__init__(trace, params, chunk_bytes(trace.size_bytes))
        self.chunks = -(-trace.size_bytes // self.unit_bytes)
        self._dirty: dict[int, set[int]] = {}  # block -> dirty chunks, in memory
        self._disk: dict[int, set[int]] = {}  # block -> chunks that a power cut leaves dirty
        self._unwritten: dict[int, None] = {}  # blocks with chunks that have become dirty
        self._expires_s: dict[int, float] = {}  # page -> when it is idle
        self._in_flight: dict[int, int] = {}  # page -> writes
        self._link = Link(params)

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(
            chunk in self._disk.get(chunk // BLOCK_CHUNKS, ())
            for chunk in range(first_unit, stop_unit)
        )

    def elapse(self, until_s: float) -> None:
        while self.due_s <= until_s:
            now_s, self.due_s = self.due_s, NEVER_S
            self._land(now_s)
            self._daemon(now_s)
        self._land(until_s)

    def _land(self, until_s: float) -> None:
        for _, first, stop in self._link.arrived(until_s):
            for page in _pages(first, stop):
                self._in_flight[page] -= 1

    def submit(self, now_s: float, first: int, stop: int) -> None:
        self._land(now_s)
        for write in range(first, stop):
            low, high = self.first[write], self.stop[write]
            for chunk in range(low, high):
                self._soil(chunk, now_s)
            for page in _pages(low, high):
                self._expires_s[page] = now_s + IDLE_S
                self._in_flight[page] = self._in_flight.get(page, 0) + 1
        if self._unwritten:
            self._unplug(now_s, range(first, stop))
        for write in range(first, stop):
            length = self.trace.end_byte[write] - self.trace.first_byte[write]
            low, high = self.first[write], self.stop[write]
            durable_s = self._link.send(now_s, length, low, high)
            for chunk in range(low, high):
                self.watch.written(chunk, durable_s)

    def _soil(self, chunk: int, now_s: float) -> None:
        block = chunk // BLOCK_CHUNKS
        dirty = self._dirty.setdefault(block, set())
        if chunk in dirty:
            return
        if dirty:
            low = block * BLOCK_CHUNKS
            dirty.update(range(low, min(low + BLOCK_CHUNKS, self.chunks)))
        else:
            dirty.add(chunk)
        self._unwritten[block] = None
        if self.due_s == NEVER_S:
            self.due_s = now_s + DAEMON_S

    def _unplug(self, now_s: float, writes: range) -> None:
        for block in self._unwritten:
            old = self._disk.get(block, set())
            self._disk[block] = set(self._dirty[block])
            for chunk in old - self._dirty[block]:
                self.watch.removed(chunk, now_s)
        # Blocks of one plug go out together, and are waited for together.
        self.meter.waited_updates += 1
        self.meter.wrote_record(len(self._unwritten), BLOCK_BYTES)
        self.meter.waited(writes, self.params.record_latency_s)
        self._unwritten.clear()
        self._count(now_s)

    def _daemon(self, now_s: float) -> None:
        again = False
        for page, expires_s in list(self._expires_s.items()):
            if now_s < expires_s or self._in_flight.get(page):
                again = True
                continue
            first = page * PAGE_BLOCKS - HEADER_BLOCKS
            for block in range(max(first, 0), first + PAGE_BLOCKS):
                self._dirty.pop(block, None)
            self._expires_s[page] = NEVER_S
        if again:
            self.due_s = now_s + DAEMON_S
        self._count(now_s)

    def _count(self, now_s: float) -> None:
        self.meter.stored.set(now_s, sum(map(len, self._disk.values())))
        self.meter.record.set(now_s, sum(map(len, self._dirty.values())))


def _pages(first: int, stop: int) -> range:
    """Pages that hold the states of chunks [first, stop)."""
    per_page = PAGE_BLOCKS * BLOCK_CHUNKS
    header = HEADER_BLOCKS * BLOCK_CHUNKS
    return range((first + header) // per_page, (stop - 1 + header) // per_page + 1)
