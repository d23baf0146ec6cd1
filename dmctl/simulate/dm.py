"""Two records of device-mapper: the disk log of dm-mirror, and dm-era (pure).

`MirrorLog` (dm-log.c, dm-region-hash.c): regions of 2 MiB.
1. If a write of a batch goes to a clean region, the header and the whole bitset are written and
   flushed before the batch goes out.
2. A write is acknowledged when every leg has it.  Then a region without writes in flight is clean
   at once, and the log is written again: nothing stays for the next write.
3. So the next batch begins when the one before is over; on a slow link it begins late.

`Era` (dm-era-target.c): the blocks written since the last checkpoint.
1. The first write to a block in an era waits for a commit of the metadata, one for all such writes
   of the batch: about five blocks of 4 KiB and two flushes (the number is an estimate).
2. The checkpoint at the end of each copy cycle begins an empty era and commits.  Blocks of an era
   count until they were copied.  No block leaves an era before its end.
"""

from __future__ import annotations

from dmctl.simulate.eras import EraPlan
from dmctl.simulate.model import NEVER_S, BatchModel, Link
from dmctl.simulate.params import Params
from dmctl.simulate.trace import Trace

REGION_BYTES = 2 << 20
LOG_HEADER_BYTES = 1024
SECTOR_BYTES = 512

COMMIT_WRITES = 5
COMMIT_FLUSHES = 2
METADATA_BYTES = 4096


class MirrorLog(BatchModel):
    """See the module docstring."""

    def __init__(self, trace: Trace, params: Params) -> None:
        super().__init__(trace, params, REGION_BYTES)
        regions = -(-trace.size_bytes // REGION_BYTES)
        self.log_bytes = LOG_HEADER_BYTES + -(-regions // 8 // SECTOR_BYTES) * SECTOR_BYTES
        self._dirty: set[int] = set()
        self._link = Link(params)
        self._over_s = NEVER_S  # when the legs have the batch that is in flight

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(region in self._dirty for region in range(first_unit, stop_unit))

    def elapse(self, until_s: float) -> None:
        if self._over_s > until_s:
            return
        self._link.arrived(self._over_s)
        for region in self._dirty:
            self.watch.removed(region, self._over_s)
        self._dirty.clear()
        self.meter.wrote_record(1, self.log_bytes)
        self.meter.both(self._over_s, 0)
        self._over_s = NEVER_S

    def submit(self, now_s: float, first: int, stop: int) -> None:
        if self._over_s != NEVER_S:
            now_s = max(now_s, self._over_s)
            self.elapse(now_s)
        self.clock_s = now_s
        for write in range(first, stop):
            self._dirty.update(range(self.first[write], self.stop[write]))
        self.meter.waited_updates += 1
        self.meter.wrote_record(1, self.log_bytes)
        self.meter.waited(range(first, stop), self.params.record_latency_s)
        self.meter.both(now_s, len(self._dirty))
        for write in range(first, stop):
            length = self.trace.end_byte[write] - self.trace.first_byte[write]
            low, high = self.first[write], self.stop[write]
            self._over_s = self._link.send(now_s, length, low, high)
            for region in range(low, high):
                self.watch.written(region, self._over_s)


class Era(BatchModel):
    """See the module docstring."""

    def __init__(self, trace: Trace, params: Params, plan: EraPlan) -> None:
        super().__init__(trace, params, params.block_bytes)
        self._plan = plan
        self._current: set[int] = set()
        self._era_of: dict[int, int] = {}  # blocks that are not copied -> last era of a write
        self._ended = self._settled = 0  # how many eras have
        self._marked: dict[int, set[int]] = {}  # blocks of the eras that are being copied
        self.due_s = plan.eras[0].ended_s

    def covers(self, first_unit: int, stop_unit: int) -> bool:
        return all(block in self._era_of for block in range(first_unit, stop_unit))

    def elapse(self, until_s: float) -> None:
        eras = self._plan.eras
        while self.due_s <= until_s:
            now_s = self.due_s
            if self._settled < self._ended and eras[self._settled].settled_s <= now_s:
                self._settle(now_s)
            else:
                self._checkpoint()
            ends = eras[self._ended].ended_s if self._ended < len(eras) else NEVER_S
            settles = eras[self._settled].settled_s if self._settled < self._ended else NEVER_S
            self.due_s = min(ends, settles)

    def _checkpoint(self) -> None:
        self._marked[self._ended], self._current = self._current, set()
        self._ended += 1
        self.meter.wrote_record(COMMIT_WRITES, METADATA_BYTES, COMMIT_FLUSHES)

    def _settle(self, now_s: float) -> None:
        for block in self._marked.pop(self._settled):
            if self._era_of[block] == self._settled:
                del self._era_of[block]
                self.watch.removed(block, now_s)
        self._settled += 1
        self.meter.both(now_s, len(self._era_of))

    def submit(self, now_s: float, first: int, stop: int) -> None:
        era = self._ended
        durable_s = self._plan.eras[era].settled_s
        waiting: list[int] = []
        new: set[int] = set()
        for write in range(first, stop):
            unmarked = [
                block
                for block in range(self.first[write], self.stop[write])
                if block not in self._current
            ]
            if unmarked:
                waiting.append(write)
            new.update(unmarked)
            for block in range(self.first[write], self.stop[write]):
                self._era_of[block] = era
                self.watch.written(block, durable_s)
        if new:
            self._current |= new
            self.meter.waited_updates += 1
            self.meter.wrote_record(COMMIT_WRITES, METADATA_BYTES, COMMIT_FLUSHES)
            self.meter.waited(waiting, self.params.record_latency_s)
            self.meter.both(now_s, len(self._era_of))
