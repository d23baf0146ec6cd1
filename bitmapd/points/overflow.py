"""What the spool's memory has no room for, in a file (pure but for the device it is given).

What was read for a point is in memory first, since hosts wait for it; from there it makes room for
more.  Blocks that came last, and will leave last, go out about a MiB at a time, one write for all
of them; they come back likewise, oldest first, when little is left in memory to be sent.

Invariants:
1. A block leaves memory when the file has it, not before: a write that fails costs no content.
2. What the file has of a block counts until newer content of it comes (`forget`).
3. A place is used again when nothing in it counts any more and nothing is in flight there.
4. One write and one read are in flight at most.  Nobody waits for either: while the file is slow,
   full or broken there is as much room as memory has.
5. What comes back has the sum of what went out, or is lost.  The owner hears which blocks are lost.

After an error the file is not written for `RETRY_S`.  Nothing of it is durable or need be: a crash
loses it, and the record names all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from xxhash import xxh3_64_intdigest

from bitmapd.gate.blockset import BlockSet
from bitmapd.media.base import Device
from bitmapd.media.buffers import aligned
from bitmapd.points.spool import Spool, Spooled

BATCH_BYTES: Final = 1 << 20
PAGE_BYTES: Final = 4096
RETRY_S: Final = 60.0


class OverflowOwner(Protocol):
    """What the owner hears; never from inside a call."""

    def spool_failed(self, error: OSError, lost: BlockSet) -> None:
        """The file has failed; these blocks were in it, and are nowhere else."""

    def proceed(self) -> None:
        """A read or write of it has ended."""


@dataclass(frozen=True, slots=True)
class _Part:
    mask: int
    at: int  # in its batch
    length: int
    sum64: int


@dataclass(slots=True, eq=False)
class _Batch:
    place_bytes: int
    size_bytes: int
    parts: dict[int, _Part] = field(default_factory=dict)  # those that count, by block
    is_read: bool = False  # a read is in flight


class Overflow:
    """See the module docstring.  Memory is emptied from three eighths of its limit on, since it is
    read ahead up to a half, and filled up to an eighth."""

    def __init__(
        self, spool: Spool, device: Device, now_s: Callable[[], float], owner: OverflowOwner
    ) -> None:
        self._spool = spool
        self._device = device
        self._now_s = now_s
        self._owner = owner
        self.limit_bytes = device.size_bytes // BATCH_BYTES * BATCH_BYTES
        self.held_bytes = 0
        self.written_bytes = 0
        self._free = deque(range(0, self.limit_bytes, BATCH_BYTES))
        self._batches: dict[int, _Batch] = {}  # by place, oldest first
        self._where: dict[int, _Batch] = {}  # by block
        self._writing = self._reading = False
        self._retry_s = float("-inf")

    def __len__(self) -> int:
        """How many blocks it has."""
        return len(self._where)

    @property
    def idle(self) -> bool:
        return not (self._writing or self._reading)

    @property
    def works(self) -> bool:
        """Whether there is more room than memory has."""
        return self._now_s() >= self._retry_s

    def proceed(self) -> None:
        """Do what the state of memory asks for; called after whatever may have changed it."""
        held, limit = self._spool.held_bytes, self._spool.limit_bytes
        if 8 * held > 3 * limit and self._free and not self._writing and self.works:
            blocks = self._spool.last(min(BATCH_BYTES, limit // 8))
            # What would have to come back at once stays: a memory of a few blocks is none.
            if 8 * (held - sum(len(spooled.raw) for spooled in blocks)) >= limit:
                self._write(blocks)
        elif 8 * held < limit and self._batches and not self._reading:
            self._read(next(iter(self._batches.values())))

    def forget(self, block: int) -> None:
        """Newer content of it has come."""
        batch = self._where.pop(block, None)
        if batch is not None:
            self.held_bytes -= batch.parts.pop(block).length
            self._reuse(batch)

    def _reuse(self, batch: _Batch) -> None:
        if not batch.parts and not batch.is_read:
            del self._batches[batch.place_bytes]
            self._free.append(batch.place_bytes)

    # -- out ------------------------------------------------------------------------------------
    def _write(self, blocks: list[Spooled]) -> None:
        size_bytes = sum(len(spooled.raw) for spooled in blocks)
        size_bytes += -size_bytes % PAGE_BYTES
        buffer, at = aligned(size_bytes), 0
        batch = _Batch(self._free.popleft(), size_bytes)
        for spooled in blocks:
            length = len(spooled.raw)
            buffer[at : at + length] = spooled.raw
            sum64 = xxh3_64_intdigest(spooled.raw)
            batch.parts[spooled.block] = _Part(spooled.mask, at, length, sum64)
            at += length
        self._writing = True
        self._device.write(batch.place_bytes, buffer, partial(self._written, batch, blocks))

    def _written(self, batch: _Batch, blocks: list[Spooled], error: OSError | None) -> None:
        self._writing = False
        if error is not None:
            self._free.append(batch.place_bytes)
            self._failed(error, BlockSet())
            return
        self._batches[batch.place_bytes] = batch
        self.written_bytes += batch.size_bytes
        for spooled in blocks:
            if self._spool.holds(spooled):
                self._spool.drop(spooled.block)
                self._where[spooled.block] = batch
                self.held_bytes += len(spooled.raw)
            else:  # sent meanwhile, or newer content has come
                del batch.parts[spooled.block]
        self._reuse(batch)
        self._owner.proceed()

    # -- back -----------------------------------------------------------------------------------
    def _read(self, batch: _Batch) -> None:
        batch.is_read = self._reading = True
        buffer = aligned(batch.size_bytes)
        self._device.read(batch.place_bytes, buffer, partial(self._was_read, batch, buffer))

    def _was_read(self, batch: _Batch, buffer: memoryview, error: OSError | None) -> None:
        batch.is_read = self._reading = False
        lost = BlockSet()
        back: list[Spooled] = []
        for block, part in list(batch.parts.items()):
            raw = bytes(buffer[part.at : part.at + part.length])
            if error is None and xxh3_64_intdigest(raw) == part.sum64:
                back.append(Spooled(block, part.mask, raw))
            else:
                lost.add(block, block + 1)
            del self._where[block], batch.parts[block]
            self.held_bytes -= part.length
        self._reuse(batch)
        for spooled in back:
            self._spool.put(spooled.block, spooled.mask, spooled.raw)
        if lost:
            self._failed(error or OSError("what came back is not what went out"), lost)
        else:
            self._owner.proceed()

    def _failed(self, error: OSError, lost: BlockSet) -> None:
        self._retry_s = self._now_s() + RETRY_S
        self._owner.spool_failed(error, lost)
        self._owner.proceed()
