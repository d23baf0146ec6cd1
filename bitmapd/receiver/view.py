"""A look at one point while later ones are applied: an overlay over the image (pure but for the
`Device`s).

The image moves on, the view does not.  What a later point is about to overwrite is first copied to
the overlay, and what somebody writes to the view goes there, too.  A block that is in the overlay
is read from it, any other one from the image.

| who | block in the overlay | block not in the overlay |
| --- | --- | --- |
| reads the view | reads the overlay | reads the image |
| writes to the view | writes the overlay | copies it first, unless it is written as a whole |
| applies a point (`preserve`) | goes on | copies it first |

Invariants:
1. An image block is overwritten only when the view has it in its overlay, or has ended.
2. Operations on one block take turns, in the order of asking.  So nobody reads a block of the image
   that is being overwritten, and what a writer of the view has put there is not copied over.
3. The view holds up no point for good: when the overlay is full or fails, or a copy takes longer
   than `PATIENCE_S`, the view ends, and the point is applied.  A writer of the view who finds no
   room gets ENOSPC, and the view goes on.
4. What is asked of a view that has ended gets an error, also what was on its way: it may have been
   overwritten under its hands.

Nothing of it is durable: a crash ends the view, and the overlay with it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from bitmapd.media.base import AllocationDone, Device, Done, Scheduler, Timer
from bitmapd.media.buffers import aligned
from bitmapd.receiver.steps import Step, Steps, run
from bitmapd.record.extents import joined, zeros
from bitmapd.record.geometry import MIB, Geometry

PATIENCE_S: Final = 5.0  # of whoever applies a point, for one copy
_PAGE_BYTES: Final = 4096  # what the address of a buffer is a multiple of


class _Turn:
    """Of an operation on the blocks from `first` up to `stop`."""

    __slots__ = ("begin", "begun", "first", "stop")

    def __init__(self, first: int, stop: int) -> None:
        self.first, self.stop = first, stop
        self.begin: Done | None = None  # None: it has begun

    def meets(self, other: _Turn) -> bool:
        return self.first < other.stop and other.first < self.stop


class View:
    """An `Export` of the image at this moment, which has to be between two points.  `on_end` hears
    why it ended by itself: ENOSPC if the overlay is full."""

    def __init__(
        self,
        geometry: Geometry,
        image: Device,
        overlay: Device,
        limit_bytes: int,
        scheduler: Scheduler,
        on_end: Callable[[OSError], None],
    ) -> None:
        """`overlay` has room for all blocks of the volume, at their offsets."""
        self.size_bytes = geometry.size_bytes
        self.block_size_bytes = max(image.block_size_bytes, overlay.block_size_bytes)
        self.limit_bytes = limit_bytes
        self.has_ended = False
        self._geometry = geometry
        self._image = image
        self._overlay = overlay
        self._scheduler = scheduler
        self._on_end = on_end
        self._there = zeros(geometry.blocks)  # in the overlay
        self._taken = 0  # blocks in the overlay, or on their way to it
        self._turns: list[_Turn] = []
        self._appliers: dict[Done, Timer] = {}  # who waits for a copy
        self._when_idle: list[Callable[[], None]] = []

    @property
    def overlay_bytes(self) -> int:
        """How much of the limit is used."""
        return self._taken * self._geometry.block_bytes

    def end(self) -> None:
        """Nothing is read or written any more, and nobody waits for it."""
        self.has_ended = True
        appliers, self._appliers = self._appliers, {}
        for done, timer in appliers.items():
            timer.cancel()
            self._scheduler.call_soon(done, None)

    def when_idle(self, call: Callable[[], None]) -> None:
        """When nothing is in flight, so that the overlay may be closed."""
        self._when_idle.append(call)
        self._look()

    # -- who applies a point --------------------------------------------------------------------
    def preserve(self, blocks: Sequence[int], done: Done) -> None:
        """These, in order of place, are about to be overwritten.  Always ends well."""
        mine = (block for block in blocks if block < len(self._there))  # the volume may have grown
        runs = joined({block for block in mine if not self._there[block]})
        if self.has_ended or not runs:
            self._scheduler.call_soon(done, None)
            return
        self._appliers[done] = self._scheduler.call_later(PATIENCE_S, self._fail, _late())
        run(self._preserving(runs), lambda error, _: self._preserved(done, error))

    def _preserving(self, runs: Sequence[tuple[int, int]]) -> Steps[None]:
        for first, stop in runs:
            turn = _Turn(first, stop)
            yield partial(self._take, turn)
            try:
                yield from self._save(first, stop)
            finally:
                self._give(turn)

    def _preserved(self, done: Done, error: OSError | None) -> None:
        timer = self._appliers.pop(done, None)
        if timer is None:
            return  # it did not wait any longer
        timer.cancel()
        if error is not None:
            self._fail(error)
        done(None)

    def _fail(self, error: OSError) -> None:
        self.end()
        self._on_end(error)

    def _save(self, first: int, stop: int) -> Steps[None]:
        """Have what is not yet in the overlay copied to it, within a turn."""
        wanted = [block for block in range(first, stop) if not self._there[block]]
        self._reserve(len(wanted))
        try:
            for start, end in joined(wanted):
                yield from self._copy(start, end)
        except OSError:
            self._taken -= sum(not self._there[block] for block in wanted)
            raise

    def _reserve(self, blocks: int) -> None:
        if (self._taken + blocks) * self._geometry.block_bytes > self.limit_bytes:
            raise OSError(errno.ENOSPC, "the overlay of the view is full")
        self._taken += blocks

    def _copy(self, first: int, stop: int) -> Steps[None]:
        step = max(1, MIB // self._geometry.block_bytes)
        for start in range(first, stop, step):
            end = min(start + step, stop)
            offset, length = self._geometry.block_bytes_range(start, end)
            buffer = aligned(length)
            yield partial(self._image.read, offset, buffer)
            yield partial(self._overlay.write, offset, buffer)
            self._there[start:end] = True

    # -- turns ----------------------------------------------------------------------------------
    def _take(self, turn: _Turn, done: Done) -> None:
        turn.begin = done
        self._turns.append(turn)
        self._next()

    def _give(self, turn: _Turn) -> None:
        self._turns.remove(turn)
        self._next()
        self._look()

    def _next(self) -> None:
        for at, turn in enumerate(self._turns):
            before = self._turns[:at]
            if turn.begin and not any(turn.meets(other) for other in before):
                begin, turn.begin = turn.begin, None
                self._scheduler.call_soon(begin, None)

    def _look(self) -> None:
        if not self._turns:
            calls, self._when_idle = self._when_idle, []
            for call in calls:
                call()

    def _do(self, offset_bytes: int, length_bytes: int, steps: Steps[None], done: Done) -> None:
        """Carry out what somebody asks of the view, when its turn has come."""
        block = self._geometry.block_bytes
        first, stop = offset_bytes // block, -(-(offset_bytes + length_bytes) // block)

        def in_turn() -> Steps[None]:
            turn = _Turn(first, stop)
            yield partial(self._take, turn)
            try:
                if not self.has_ended:
                    yield from steps
            finally:
                self._give(turn)

        def ended(error: OSError | None, _: None) -> None:
            done(error if not self.has_ended else OSError(errno.EIO, "the view has ended"))

        run(in_turn(), ended)

    # -- `Export` -------------------------------------------------------------------------------
    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self._do(offset_bytes, len(buffer), self._reading(offset_bytes, buffer), done)

    def _reading(self, offset_bytes: int, buffer: memoryview) -> Steps[None]:
        for start, end, device in self._parts(offset_bytes, offset_bytes + len(buffer)):
            part = buffer[start - offset_bytes : end - offset_bytes]
            if (start - offset_bytes) % _PAGE_BYTES:
                whole = aligned(len(part))
                yield partial(device.read, start, whole)
                part[:] = whole
            else:
                yield partial(device.read, start, part)

    def _parts(self, offset_bytes: int, end_bytes: int) -> Iterator[tuple[int, int, Device]]:
        """Where to read a range: contiguous parts of one device each."""
        block = self._geometry.block_bytes
        while offset_bytes < end_bytes:
            first = offset_bytes // block
            there = self._there[first]
            other = self._there.find(not there, first)
            end = end_bytes if other < 0 else min(end_bytes, other * block)
            yield offset_bytes, end, self._overlay if there else self._image
            offset_bytes = end

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        step = partial(self._overlay.write, offset_bytes, buffer)
        self._do(offset_bytes, len(buffer), self._changing(offset_bytes, len(buffer), step), done)

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        step = partial(self._overlay.zero, offset_bytes, length_bytes, unmap=unmap, fast=fast)
        self._do(offset_bytes, length_bytes, self._changing(offset_bytes, length_bytes, step), done)

    def _changing(self, offset_bytes: int, length_bytes: int, step: Step) -> Steps[None]:
        """A write: the blocks at its ends are copied first, unless it has them as a whole."""
        block = self._geometry.block_bytes
        end_bytes = offset_bytes + length_bytes
        first, stop = offset_bytes // block, -(-end_bytes // block)
        whole_first = -(-offset_bytes // block)
        whole_stop = stop if end_bytes == self.size_bytes else end_bytes // block
        for torn in sorted({*range(first, min(whole_first, stop)), *range(whole_stop, stop)}):
            yield from self._save(torn, torn + 1)
        missing = self._there.count(0, first, stop)
        self._reserve(missing)
        try:
            yield step
        except OSError:
            self._taken -= missing
            raise
        self._there[first:stop] = True

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        """What is trimmed may stay."""
        self._scheduler.call_soon(done, None)

    def flush(self, done: Done) -> None:
        """Nothing of a view is to outlive anything."""
        self._scheduler.call_soon(done, None)

    def allocation(self, offset_bytes: int, length_bytes: int, done: AllocationDone) -> None:
        self._scheduler.call_soon(done, None, [(length_bytes, 0)])


def _late() -> OSError:
    return OSError(errno.ETIMEDOUT, f"a copy to the overlay took longer than {PATIENCE_S:g} s")
