"""What to copy next, in which pieces, and how much at a time (pure).

`Window` counts what is in flight.  `Plan` walks round and round over the set of blocks to copy and
hands out runs:

1. A block that was handed out is not handed out again until the caller says what became of it:
   `done`, `returned` (it was not copied, for a reason that lies elsewhere) or `failed`.
2. A run consists of blocks of the set only, at most `max_blocks` of them.  Clean blocks between
   two dirty ones are not copied along.
3. A block that is dirty again already (*hot*) is passed over, for it has to be copied once more
   in any case; but in at most `max_deferrals` rounds one after another, so that how far the
   secondary lags behind stays bounded.
4. After a read error the blocks of the run are tried one by one, so that a bad sector does not
   hold back its neighbours; a single block that fails waits, from `FIRST_RETRY_S` doubling to
   `LAST_RETRY_S`.  When very many fail, the medium is gone rather than a sector, and everything
   waits.
5. A walk that found nothing is not made again before something has changed.

Memory: block sets of what is in flight, hot or failing, and one entry for each of at most
`MAX_FAILING` failing blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from bitmapd.gate.blockset import BlockSet

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
MAX_FAILING = 16384


class Plan:
    """See the module docstring; blocks are given as ranges [first, stop)."""

    def __init__(self, max_blocks: int, max_deferrals: int = 2) -> None:
        if max_blocks <= 0:
            raise ValueError(f"a run of at most {max_blocks} blocks is empty")
        self.max_blocks = max_blocks
        self._cursor = 0
        self._busy = BlockSet()  # in flight, or waiting after a failure
        self._passed = BlockSet()  # hot, passed over in this round
        # deferred[i] holds blocks that were passed over in i + 1 rounds or more.
        self._deferred = [BlockSet() for _ in range(max_deferrals)]
        self._single = BlockSet()  # to be handed out one by one
        self._retry_s: dict[int, float] = {}  # failing block -> its latest wait
        self._retries: list[tuple[float, int]] = []  # heap of (due time, block)
        self._hold_until_s = float("-inf")
        self._expected: int | None = None  # size of the set while there is nothing to find in it

    @property
    def busy_blocks(self) -> int:
        """Blocks in flight, and those that wait after a failure."""
        return self._busy.count()

    def new_round(self) -> None:
        """The set has been replenished: hot blocks are looked at anew."""
        self._passed.clear()
        self._expected = None

    def next(
        self, taken: BlockSet, now_s: float, is_hot: Callable[[int, int], bool]
    ) -> tuple[int, int] | None:
        """The next run to copy, in flight from now on; `None` if there is nothing for now."""
        self._wake_failing(now_s)
        if now_s < self._hold_until_s:
            return None
        if self._expected is not None and taken.count() == self._expected:
            return None
        self._expected = None
        begin = self._cursor
        run = self._search(taken, begin, None, is_hot) or self._search(taken, 0, begin, is_hot)
        if run is None:
            self._expected = taken.count()
            return None
        self._busy.add(*run)
        self._cursor = run[1]
        return run

    def done(self, first: int, stop: int) -> None:
        """A run was copied; its blocks leave the set."""
        self._busy.discard(first, stop)
        for blocks in self._deferred:
            blocks.discard(first, stop)
        if self._expected is not None:
            self._expected -= stop - first
        if self._single.any(first, stop):
            self._single.discard(first, stop)
            for block in range(first, stop):
                self._retry_s.pop(block, None)

    def returned(self, first: int, stop: int) -> None:
        """A run was not copied; it is handed out again."""
        self._busy.discard(first, stop)
        self._expected = None
        self._cursor = first

    def failed(self, first: int, stop: int, now_s: float) -> None:
        """The primary could not read a run."""
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

    def _wake_failing(self, now_s: float) -> None:
        while self._retries and self._retries[0][0] <= now_s:
            _, block = heapq.heappop(self._retries)
            self._busy.discard(block, block + 1)
            self._expected = None

    def _search(
        self, taken: BlockSet, start: int, end: int | None, is_hot: Callable[[int, int], bool]
    ) -> tuple[int, int] | None:
        """The first run that begins in [start, end) and may be copied now."""
        while True:
            run = taken.next_run(start, self.max_blocks)
            if run is None or (end is not None and run[0] >= end):
                return None
            first, stop = run
            busy = self._first_of(self._busy, first, stop)
            if busy is not None:
                if busy[0] == first:
                    start = busy[1]
                    continue
                stop = busy[0]
            single = self._first_of(self._single, first, stop)
            if single is not None:
                stop = max(single[0], first + 1)
            if not is_hot(first, stop):
                return first, stop
            cool = self._cool_run(first, stop, is_hot)
            if cool is not None:
                return cool
            start = stop

    @staticmethod
    def _first_of(blocks: BlockSet, first: int, stop: int) -> tuple[int, int] | None:
        """The first run of `blocks` in the range."""
        if not blocks.any(first, stop):
            return None
        return blocks.next_run(first, stop - first)

    def _cool_run(
        self, first: int, stop: int, is_hot: Callable[[int, int], bool]
    ) -> tuple[int, int] | None:
        """The first run in the range without blocks that may be passed over."""
        begin = None
        for block in range(first, stop):
            if self._may_pass(block) and is_hot(block, block + 1):
                if begin is not None:
                    return begin, block
                self._pass(block)
            elif begin is None:
                begin = block
        return None if begin is None else (begin, stop)

    def _may_pass(self, block: int) -> bool:
        if self._passed.any(block, block + 1):
            return True
        return bool(self._deferred) and not self._deferred[-1].any(block, block + 1)

    def _pass(self, block: int) -> None:
        """Pass over a hot block; counts once a round."""
        if self._passed.any(block, block + 1):
            return
        self._passed.add(block, block + 1)
        # One is left: a block that is in the last of them is not passed over.
        fewest = next(d for d in self._deferred if not d.any(block, block + 1))
        fewest.add(block, block + 1)


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
