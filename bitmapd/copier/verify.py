"""Compare primary and secondary of a volume in use, and repair what differs unexpectedly.

The volume is read once in pieces.  Blocks that differ are suspects, because a write or a copy may
have come between the two reads.  A suspect that is dirty by now is explained, and will be copied.
Any other is read again, by itself, when the gate says that it cannot differ; it is *unexpected*
only if it still differs and, from before the reads until after them, the gate said so without a
settle in between.  A write that arrived meanwhile would have left its mark: marks go away only
with a settle.  A suspect in an extent that is never quiet is given up after `MAX_TRIES`.

A piece of which one side cannot be read is read again block by block.  A block that still cannot be
read is listed with its side and hides nothing behind it.  A secondary that is no longer connected
ends the run, and so does a side with more than `MAX_UNREADABLE_BLOCKS`: that is a dead medium.

Nothing is written here.  A repair marks the block at the gate, which records its extent first;
the copier does the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from bitmapd.copier.comparing import Comparison, Side
from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Scheduler
from bitmapd.record.geometry import Geometry

DEPTH = 4
PIECE_BYTES = 1 << 20
RETRY_S = 0.25
MAX_TRIES = 240  # a minute
MAX_LISTED = 1000
MAX_UNREADABLE_BLOCKS = 16384  # 1 GiB of the usual blocks


@dataclass(slots=True)
class VerifyResult:
    """Figures of one run; lists have at most `MAX_LISTED` (offset, length) runs."""

    compared_bytes: int = 0
    unexpected_bytes: int = 0
    repaired_bytes: int = 0
    rechecked_blocks: int = 0
    undecided_blocks: int = 0
    unexpected: list[tuple[int, int]] = field(default_factory=list)
    unreadable_primary: list[tuple[int, int]] = field(default_factory=list)
    unreadable_secondary: list[tuple[int, int]] = field(default_factory=list)
    unreadable_bytes: int = 0  # that were not compared, on whichever side


class Verify:
    """One comparison of the whole volume; `done(error, result)` is called once.

    `failed` is then the side whose reading ended it, if that is what did.
    """

    def __init__(
        self,
        geometry: Geometry,
        gate: Gate,
        comparison: Comparison,
        scheduler: Scheduler,
        *,
        repair: bool,
        done: Callable[[OSError | None, VerifyResult], None],
        only: Sequence[int] | None = None,
    ) -> None:
        """With `only`, these blocks are compared, those of them that do not have to wait for it."""
        self._geometry = geometry
        self._gate = gate
        self._comparison = comparison
        self._scheduler = scheduler
        self._repair = repair
        self._done = done
        self._per_piece = max(1, PIECE_BYTES // geometry.block_bytes)
        self._cursor = 0
        self._in_flight = 0
        self._suspects: deque[tuple[int, int]] = deque()  # block, tries so far
        if only is not None:
            self._cursor = geometry.blocks
            self._suspects.extend((block, MAX_TRIES) for block in only)
        self._left_out = BlockSet()
        self._singly: deque[int] = deque()  # blocks of pieces that could not be read as a whole
        self._unreadable = {side: BlockSet() for side in Side}
        self._error: OSError | None = None
        self.failed: Side | None = None  # the side that could not be read
        self._finished = False
        self._timer_set = False
        self.result = VerifyResult()

    def start(self) -> None:
        self._scheduler.call_soon(self._pump)

    def cancel(self, error: OSError) -> None:
        """End early; `done` is called with this error once nothing is in flight."""
        self._error = self._error or error
        self._scheduler.call_soon(self._pump)

    def leave_out(self, blocks: BlockSet) -> None:
        """Somebody else writes these from now on: what they hold is not judged."""
        self._left_out.update(blocks)

    @property
    def progress(self) -> float:
        """Share of the volume that has been read, 0 to 1."""
        return self._cursor / self._geometry.blocks

    def _pump(self) -> None:
        if self._finished:
            return
        while self._error is None and self._in_flight < DEPTH:
            if not (self._start_single() or self._start_piece() or self._start_recheck()):
                break
        if self._in_flight:
            return
        left = self._cursor < self._geometry.blocks or self._singly or self._suspects
        if self._error is not None or not left:
            self._finished = True
            self._list_unreadable()
            self._done(self._error, self.result)
        elif not self._timer_set:
            self._timer_set = True
            self._comparison.hurry()
            self._scheduler.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._timer_set = False
        self._pump()

    def _start_piece(self) -> bool:
        if self._cursor >= self._geometry.blocks:
            return False
        first = self._cursor
        stop = min(first + self._per_piece, self._geometry.blocks)

        if not self._compare(first, stop, partial(self._compared, first, stop)):
            return False
        self._cursor = stop
        return True

    def _start_single(self) -> bool:
        if not self._singly:
            return False
        block = self._singly[0]
        if not self._compare(block, block + 1, partial(self._compared, block, block + 1)):
            return False
        self._singly.popleft()
        return True

    def _compared(self, first: int, stop: int, differing: list[int]) -> None:
        self.result.compared_bytes += self._geometry.block_bytes_range(first, stop)[1]
        self._suspects.extend((block, 0) for block in differing)

    def _start_recheck(self) -> bool:
        """Read one suspect again that cannot differ now, if there is one."""
        for _ in range(len(self._suspects)):
            block, tries = self._suspects.popleft()
            if self._gate.is_dirty(block, block + 1) or self._left_out.any(block, block + 1):
                continue
            if not self._gate.may_differ(block, block + 1) and self._recheck(block, tries):
                return True
            self._try_later(block, tries)
        return False

    def _try_later(self, block: int, tries: int) -> None:
        if tries < MAX_TRIES:
            self._suspects.append((block, tries + 1))
        else:
            self.result.undecided_blocks += 1

    def _recheck(self, block: int, tries: int) -> bool:
        settles = self._gate.settles

        def judged(differing: list[int]) -> None:
            self.result.rechecked_blocks += 1
            if not differing or self._left_out.any(block, block + 1):
                return
            if self._gate.settles != settles or self._gate.may_differ(block, block + 1):
                self._try_later(block, tries)
            else:
                self._unexpected(block)

        return self._compare(block, block + 1, judged)

    def _compare(self, first: int, stop: int, judged: Callable[[list[int]], None]) -> bool:
        def compared(failures: list[tuple[Side, OSError]], differing: list[int]) -> None:
            for failure in failures:
                self._not_read(first, stop, *failure)
            if failures and stop - first > 1:
                self._singly.extend(range(first, stop))
            if not failures and self._error is None:
                judged(differing)
            self._in_flight -= 1
            self._pump()

        if not self._comparison.compare(first, stop, compared):
            self._comparison.when_room(self._pump)
            return False
        self._in_flight += 1
        return True

    def _not_read(self, first: int, stop: int, side: Side, error: OSError) -> None:
        blocks = self._unreadable[side]
        if stop - first == 1:
            blocks.add(first, stop)
        gone = side is Side.SECONDARY and not self._comparison.connected
        if self._error is None and (gone or blocks.count() > MAX_UNREADABLE_BLOCKS):
            self._error, self.failed = error, side

    def _list_unreadable(self) -> None:
        result = self.result
        either = BlockSet()
        for side, listed in (
            (Side.PRIMARY, result.unreadable_primary),
            (Side.SECONDARY, result.unreadable_secondary),
        ):
            either.update(self._unreadable[side])
            for first, stop in islice(self._unreadable[side].runs(), MAX_LISTED):
                listed.append(self._geometry.block_bytes_range(first, stop))
        for first, stop in either.runs():
            result.unreadable_bytes += self._geometry.block_bytes_range(first, stop)[1]

    def _unexpected(self, block: int) -> None:
        offset, length = self._geometry.block_bytes_range(block, block + 1)
        self.result.unexpected_bytes += length
        listed = self.result.unexpected
        if listed and sum(listed[-1]) == offset:
            listed[-1] = (listed[-1][0], listed[-1][1] + length)
        elif len(listed) < MAX_LISTED:
            listed.append((offset, length))
        if not self._repair:
            return
        self._in_flight += 1

        def marked(error: OSError | None) -> None:
            self._in_flight -= 1
            self._error = self._error or error
            if error is None:
                self.result.repaired_bytes += length
            self._pump()

        self._gate.mark(block, block + 1, marked)
