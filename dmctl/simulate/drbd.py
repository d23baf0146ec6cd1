"""DRBD's activity log: an LRU of 4 MiB extents, kept on disk as a ring of transactions (pure).

Source: drbd_actlog.c and lru_cache.c of DRBD 9.3.  What is modelled:
1. A write whose only extent is active goes ahead.  Others are queued to one submitter, which
   builds a transaction of at most 64 changes out of all that is queued, writes it (one flushed
   4 KiB block), and then lets go the writes that are ready.
2. A slot in use is not given up: it is used from the arrival of a write until the write is durable
   on the other side.  Then it goes to the front of the LRU list, whose tail is the victim.
3. No free slot and nothing idle: the log is *starving*.  Everything, hits too, waits until a slot
   is released.  That is a stall.
4. A slot is overwritten in place, so giving up an extent costs no write; no extent is ever given up
   for being idle.
5. A write of more than 32 extents (a discard) comes in pieces of 32, or of as many as there are
   slots.
6. On persistent memory (`PmemLog`) a change is a store of one cache line by the submitter; there
   are no transactions.

Left out: protocol A blocks when the send buffer is full; bitmap writes at eviction, which a
connected node that is in sync does not need.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from dmctl.simulate.model import BatchModel, Link
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

EXTENT_BYTES = 4 << 20
DEFAULT_SLOTS = 1237
TRANSACTION_BYTES = 4096
CHANGES = 64
PIECE_EXTENTS = 32
CACHE_LINE_BYTES = 64
PMEM_LATENCY_S = 1e-6


@dataclass(slots=True)
class _Piece:
    """Part of a write; extents before `next` are held by it."""

    write: int
    first: int
    stop: int
    next: int


class ActivityLog(BatchModel):
    """See the module docstring."""

    def __init__(self, trace: Trace, params: Params, slots: int) -> None:
        super().__init__(trace, params, EXTENT_BYTES)
        self.limit_units = slots
        self._slots = slots
        self._idle: OrderedDict[int, None] = OrderedDict()  # the victim is the first
        self._used: dict[int, int] = {}
        self._link = Link(params)

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(e in self._idle or e in self._used for e in range(first_unit, stop_unit))

    def elapse(self, until_s: float) -> None:
        for _, first, stop in self._link.arrived(until_s):
            for extent in range(first, stop):
                self._used[extent] -= 1
                if not self._used[extent]:
                    del self._used[extent]
                    self._idle[extent] = None

    def submit(self, now_s: float, first: int, stop: int) -> None:
        now_s = max(now_s, self.clock_s)
        self.elapse(now_s)
        queue: list[_Piece] = []
        for write in range(first, stop):
            low, high = self.first[write], self.stop[write]
            if high - low == 1 and (low in self._used or low in self._idle):
                self._hold(low)
                self._send(now_s, write, low, high)
                continue
            step = min(PIECE_EXTENTS, self._slots)
            for start in range(low, high, step):
                queue.append(_Piece(write, start, min(start + step, high), start))
        if queue:
            self.clock_s = self._work(now_s, queue)

    def _work(self, now_s: float, queue: list[_Piece]) -> float:
        """The submitter; when it has finished (stalls take time)."""
        arrived_s, waiting_s = now_s, 0.0
        waits: dict[int, float] = {}
        while queue:
            changed: set[int] = set()
            ready = 0
            for piece in queue:
                while piece.next < piece.stop and self._activate(piece.next, now_s, changed):
                    piece.next += 1
                if piece.next < piece.stop:
                    break
                ready += 1
            if changed:
                waiting_s += self._commit(now_s, len(changed))
            for piece in queue[:ready]:
                self._send(now_s, piece.write, piece.first, piece.stop)
                if waiting_s:
                    waits[piece.write] = waiting_s + now_s - arrived_s
            del queue[:ready]
            if not ready and not changed:
                # Starving: until something that is in flight is durable on the other side.
                free_s = self._link.pending[0][0]
                self.meter.stalls += 1
                self.meter.stall_s += free_s - now_s
                now_s = free_s
                self.elapse(now_s)
        for write, wait_s in waits.items():
            self.meter.waited((write,), wait_s)
        return now_s

    def _activate(self, extent: int, now_s: float, changed: set[int]) -> bool:
        """Hold one extent; false if this transaction has no room, or no slot can be had."""
        if extent not in self._used and extent not in self._idle:
            if len(changed) == CHANGES:
                return False
            if len(self._used) + len(self._idle) == self._slots:
                if not self._idle:
                    return False
                victim, _ = self._idle.popitem(last=False)
                self.watch.removed(victim, now_s)
            changed.add(extent)
            self._idle[extent] = None
        self._hold(extent)
        return True

    def _hold(self, extent: int) -> None:
        self._idle.pop(extent, None)
        self._used[extent] = self._used.get(extent, 0) + 1

    def _send(self, now_s: float, write: int, first: int, stop: int) -> None:
        trace, size = self.trace, self.unit_bytes
        start = max(trace.first_byte[write], first * size)
        end = min(trace.end_byte[write], stop * size)
        durable_s = self._link.send(now_s, end - start, first, stop)
        for extent in range(first, stop):
            self.watch.written(extent, durable_s)

    def _commit(self, now_s: float, changes: int) -> float:
        """Write a transaction; how long it takes."""
        self.meter.waited_updates += 1
        self.meter.wrote_record(1, TRANSACTION_BYTES)
        self.meter.both(now_s, len(self._used) + len(self._idle))
        return self.params.record_latency_s


class PmemLog(ActivityLog):
    """The activity log on persistent memory."""

    def _commit(self, now_s: float, changes: int) -> float:
        self.meter.waited_updates += changes
        self.meter.wrote_record(changes, CACHE_LINE_BYTES, flushes=0)
        self.meter.both(now_s, len(self._used) + len(self._idle))
        return changes * PMEM_LATENCY_S
