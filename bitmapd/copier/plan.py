"""What to copy next, in which pieces, and how much at a time (pure).

`Window` counts what is in flight.  `Plan` hands out runs of the set of blocks to copy.

The idea: a sweep goes round and round over the set and never begins anew, so between two visits of
a block every other one is copied at most once.  A block that is dirty again already (*hot*) has to
be copied once more in any case, so the sweep passes it over.  But then a block that is written all
the time would never be copied.  So what was passed over is remembered, and becomes *due*; due
blocks have a share of the link that is their own.

1. A block that was handed out is not handed out again until the caller says what became of it:
   `done`, `returned` (it was not copied, for a reason that lies elsewhere) or `failed`; or that it
   was not even begun (`put_back`).
2. A run consists of blocks of the set only, at most `max_blocks` of them.  Clean blocks between
   two dirty ones are not copied along.
3. A block that was passed over is due after `HOT_PERIOD_S` and the round that is under way then,
   until it is copied; and due again a period later if it was written in it, without waiting for
   the sweep.
4. While both have something to copy, one block in `DUE_SHARE` is a due one, and the others are the
   sweep's.  So with S bytes in the set and what joins it counted in, at R bytes/s, a block is
   copied within DUE_SHARE * S / R + HOT_PERIOD_S + one round; and a hot one again after
   max(HOT_PERIOD_S + one round, DUE_SHARE * H / R), where H is what is hot.  Neither depends on how
   often anything is written.
5. What was in flight and does not count is due.
6. After an error of its own the blocks of a run are tried one by one, so that a bad sector does
   not hold back its neighbours; a single block that fails waits, from `FIRST_RETRY_S` doubling to
   `LAST_RETRY_S`.  When very many fail, the medium is gone rather than a sector, and everything
   waits.
7. What was given away is handed out no more, and was never passed over nor in error if it comes
   back.
8. A walk that found nothing is not made again before something has changed.

Memory: block sets of what is in flight, hot, due or failing, and one entry for each of at most
`MAX_FAILING` failing blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from bitmapd.gate.blockset import BlockSet

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
MAX_FAILING = 16384
HOT_PERIOD_S = 5.0
DUE_SHARE = 4

IsHot = Callable[[int, int], bool]
Run = tuple[int, int]  # blocks [first, stop)


class Plan:
    """See the module docstring; blocks are given as ranges [first, stop)."""

    def __init__(self, max_blocks: int) -> None:
        if max_blocks <= 0:
            raise ValueError(f"a run of at most {max_blocks} blocks is empty")
        self.max_blocks = max_blocks
        self._cursor = 0  # of the sweep
        self._busy = BlockSet()  # in flight, or waiting after a failure
        self._hot = BlockSet()  # passed over, or due lately; due after a period if dirty
        self._hot_since_s = 0.0
        self._due = BlockSet()  # to be copied, hot or not
        self._due_cursor = 0
        self._credit = 0  # blocks that the sweep is ahead of its share; due blocks' turn from 0 on
        self._before = (0, 0, 0)  # both cursors and the credit, before the latest run
        self._single = BlockSet()  # to be handed out one by one
        self._retry_s: dict[int, float] = {}  # failing block -> its latest wait
        self._retries: list[tuple[float, int]] = []  # heap of (due time, block)
        self._hold_until_s = float("-inf")
        self._expected: int | None = None  # size of the set while there is nothing to find in it

    @property
    def busy_blocks(self) -> int:
        """Blocks in flight, and those that wait after a failure."""
        return self._busy.count()

    def new_round(self, taken: BlockSet, now_s: float) -> None:
        """The set has been replenished: everything that was written has joined it."""
        self._expected = None
        if self._hot and now_s - self._hot_since_s >= HOT_PERIOD_S:
            hot, self._hot = self._hot, BlockSet()
            hot.intersect(taken)  # the others were not written again
            self._due.update(hot)

    def next(self, taken: BlockSet, now_s: float, is_hot: IsHot) -> Run | None:
        """The next run to copy, in flight from now on; `None` if there is nothing for now."""
        self._wake_failing(now_s)
        if now_s < self._hold_until_s:
            return None
        if self._expected is not None and taken.count() == self._expected:
            return None
        self._expected = None
        self._before = (self._cursor, self._due_cursor, self._credit)
        for due in (self._credit >= 0, self._credit < 0):
            run = self._next_due() if due else self._next_swept(taken, now_s, is_hot)
            if run is not None:
                self._busy.add(*run)
                if self._due.any(*run):
                    self._remember(*run, now_s)
                return run
        self._expected = taken.count()
        return None

    def put_back(self, first: int, stop: int) -> None:
        """The run that was handed out last was not begun: as if it had not been asked for."""
        self._busy.discard(first, stop)
        self._cursor, self._due_cursor, self._credit = self._before

    def done(self, first: int, stop: int) -> None:
        """A run was copied; its blocks leave the set."""
        self._busy.discard(first, stop)
        self._due.discard(first, stop)
        if self._expected is not None:
            self._expected -= stop - first
        if self._single.any(first, stop):
            self._single.discard(first, stop)
            for block in range(first, stop):
                self._retry_s.pop(block, None)

    def returned(self, first: int, stop: int) -> None:
        """A run was not copied; it is handed out again."""
        self._busy.discard(first, stop)
        self._due.add(first, stop)
        self._expected = None

    def failed(self, first: int, stop: int, now_s: float) -> None:
        """A run was not copied, for a reason of its own."""
        self._expected = None
        self._single.add(first, stop)
        if stop - first > 1:
            self._busy.discard(first, stop)
            return
        wait_s = min(2 * self._retry_s.get(first, FIRST_RETRY_S / 2), LAST_RETRY_S)
        if first not in self._retry_s and len(self._retry_s) >= MAX_FAILING:
            self._busy.discard(first, stop)
            self._hold_until_s = now_s + LAST_RETRY_S
            return
        self._retry_s[first] = wait_s
        heapq.heappush(self._retries, (now_s + wait_s, first))

    def given(self, gone: BlockSet) -> None:
        """These have left the set for good; what is in flight there stays so until `released`."""
        self._expected = None
        for first, stop in gone.runs():
            for blocks in (self._hot, self._due, self._single):
                blocks.discard(first, stop)
        for block in [block for block in self._retry_s if gone.any(block, block + 1)]:
            del self._retry_s[block]
        for _, block in self._retries:
            if gone.any(block, block + 1):
                self._busy.discard(block, block + 1)
        self._retries = [at for at in self._retries if not gone.any(at[1], at[1] + 1)]
        heapq.heapify(self._retries)

    def released(self, first: int, stop: int) -> None:
        """A run is in flight no longer, and was given away meanwhile."""
        self._busy.discard(first, stop)
        self._expected = None

    def _wake_failing(self, now_s: float) -> None:
        while self._retries and self._retries[0][0] <= now_s:
            _, block = heapq.heappop(self._retries)
            self._busy.discard(block, block + 1)
            self._expected = None

    # -- the two ways ---------------------------------------------------------------------
    def _next_due(self) -> Run | None:
        for run in self._free_runs(self._due, self._due_cursor):
            self._due_cursor = run[1]
            # With nothing else to copy the debt grows no further: a cold block that comes then is
            # not to wait for it.
            ahead = self._credit - (DUE_SHARE - 1) * (run[1] - run[0])
            self._credit = max(ahead, -DUE_SHARE * self.max_blocks)
            return run
        return None

    def _next_swept(self, taken: BlockSet, now_s: float, is_hot: IsHot) -> Run | None:
        for first, stop in self._free_runs(taken, self._cursor):
            run: Run | None = (first, stop)
            if is_hot(first, stop):
                run = self._cool_run(first, stop, now_s, is_hot)
            if run is not None:
                self._cursor = run[1]
                self._credit = min(self._credit + run[1] - run[0], self.max_blocks)
                return run
        return None

    def _free_runs(self, blocks: BlockSet, cursor: int) -> Iterator[Run]:
        """Once round: runs of `blocks` that may be handed out, from the cursor on."""
        for at, end in ((cursor, None), (0, cursor)):
            start = at
            while (run := blocks.next_run(start, self.max_blocks)) is not None:
                first, stop = run
                if end is not None and first >= end:
                    break
                busy = self._first_of(self._busy, first, stop)
                if busy is not None and busy[0] == first:
                    start = busy[1]
                    continue
                if busy is not None:
                    stop = busy[0]
                single = self._first_of(self._single, first, stop)
                if single is not None:
                    stop = max(single[0], first + 1)
                yield first, stop
                start = stop

    @staticmethod
    def _first_of(blocks: BlockSet, first: int, stop: int) -> Run | None:
        """The first run of `blocks` in the range."""
        if not blocks.any(first, stop):
            return None
        return blocks.next_run(first, stop - first)

    # -- hot blocks -----------------------------------------------------------------------
    def _cool_run(self, first: int, stop: int, now_s: float, is_hot: IsHot) -> Run | None:
        """The first run in the range without blocks that are passed over."""
        begin = None
        for block in range(first, stop):
            if is_hot(block, block + 1):
                self._remember(block, block + 1, now_s)
                if begin is not None:
                    return begin, block
            elif begin is None:
                begin = block
        return None if begin is None else (begin, stop)

    def _remember(self, first: int, stop: int, now_s: float) -> None:
        """Look at these again when a period is over."""
        if not self._hot:
            self._hot_since_s = now_s
        self._hot.add(first, stop)


class Window:
    """What may be in flight at once, counted in bytes.

    Eight copies of a megabyte keep a link busy, eight of 64 KiB do not: over 50 ms that is 10 MB/s.
    So small copies are many at a time, large ones few.
    """

    def __init__(self, limit_bytes: int = 8 << 20, limit_copies: int = 64) -> None:
        if limit_bytes <= 0 or limit_copies <= 0:
            raise ValueError(f"window of {limit_bytes} bytes, {limit_copies} copies is empty")
        self._limit_bytes = limit_bytes
        self._limit_copies = limit_copies
        self.bytes = 0
        self.copies = 0

    def may_start(self, length_bytes: int) -> bool:
        """Whether a copy of this length may start; one alone always may."""
        return not self.copies or (
            self.copies < self._limit_copies and self.bytes + length_bytes <= self._limit_bytes
        )

    def started(self, length_bytes: int) -> None:
        self.copies += 1
        self.bytes += length_bytes

    def ended(self, length_bytes: int) -> None:
        self.copies -= 1
        self.bytes -= length_bytes
