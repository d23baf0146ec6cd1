"""gate/unsettled: in whatever order things happen, what is not durable is known to be so,
and no younger than it is.

The model knows of every block which version the primary has, which one was copied, and which one is
durable on the secondary; errors lose all that is not.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.unsettled import Unsettled
from bitmapd.record.geometry import Geometry

BLOCK = 4096
PER_EXTENT = 4
BLOCKS = 3 * PER_EXTENT - 1  # the last extent is a short one


class Sides:
    """Both sides of a mirror, and what is thought of them.  One step is one second."""

    def __init__(self) -> None:
        geometry = Geometry(BLOCKS * BLOCK, PER_EXTENT * BLOCK, BLOCK)
        self.unsettled = Unsettled(geometry)
        self.now_s = 0.0
        self.written_s: list[list[float]] = [[] for _ in range(BLOCKS)]  # of every version
        self.readable = [0] * BLOCKS  # the oldest version that a copy may have read
        self.cached = [0] * BLOCKS
        self.durable = [0] * BLOCKS
        self.flushing: tuple[set[int], list[int]] | None = None
        self.failed = False  # since the settle began
        self.held: list[BlockSet] = []

    def write(self, first: int, stop: int) -> None:
        for block in range(first, stop):
            self.written_s[block].append(self.now_s)
        self.unsettled.current_era.mark(first, stop, self.now_s)

    def take_era(self, first: int, stop: int) -> None:
        assert self.unsettled.take_era() is self.unsettled.current_era
        assert not self.unsettled.current_era.blocks
        self.readable = [len(times_s) for times_s in self.written_s]

    def copy(self, first: int, stop: int) -> None:
        run = self.unsettled.taken.next_run(first, stop - first)
        if run is not None:
            for block in range(*run):
                self.cached[block] = self.readable[block]
            self.unsettled.copied(*run)

    def begin(self, first: int, stop: int) -> None:
        if self.flushing is None:
            self.flushing = self.unsettled.begin_settle(), self.cached.copy()
            self.failed = False

    def end(self, first: int, stop: int) -> None:
        if self.flushing is None:
            return
        (extents, flushed), self.flushing = self.flushing, None
        if self.failed:
            self.unsettled.unsettle(extents)
            return
        self.durable = [max(pair) for pair in zip(self.durable, flushed, strict=True)]
        self.unsettled.settled()

    def lose(self, first: int, stop: int) -> None:
        self.cached = self.durable.copy()
        self.unsettled.forget_copied()
        self.failed = True

    def hold(self, first: int, stop: int) -> None:
        blocks = BlockSet()
        blocks.add(first, stop)
        self.held.append(blocks)
        self.unsettled.hold(blocks)

    def release(self, first: int, stop: int) -> None:
        if self.held:
            blocks = self.held.pop(0)
            self.unsettled.release(blocks, self.now_s)
            assert all(self.unsettled.is_dirty(*run) for run in blocks.runs())

    def check(self) -> None:
        unsettled = self.unsettled
        for block, times_s in enumerate(self.written_s):
            if self.durable[block] < len(times_s):
                assert unsettled.any(block, block + 1)
                assert unsettled.oldest_s is not None
                assert unsettled.oldest_s <= times_s[self.durable[block]]
        for blocks in self.held:
            assert all(unsettled.any(*run) for run in blocks.runs())
        touched = [
            unsettled.any(first, first + PER_EXTENT) for first in range(0, BLOCKS, PER_EXTENT)
        ]
        assert [unsettled.touches(extent) for extent in range(len(touched))] == touched
        assert bool(unsettled) == any(touched)
        dirty = sum(unsettled.is_dirty(block, block + 1) for block in range(BLOCKS))
        assert dirty <= unsettled.count_dirty() <= 2 * dirty


# Most steps are those that go forward, or few blocks would become durable before an error.
ROUND = ("write", "take_era", "copy", "begin", "end")
moves = st.sampled_from([*ROUND, *ROUND, *ROUND, "lose", "hold", "release"])
runs = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 6))


@given(st.lists(st.tuples(moves, runs), min_size=20, max_size=80))
def test_what_is_not_durable_is_known(steps: list[tuple[str, tuple[int, int]]]) -> None:
    sides = Sides()
    for move, (first, count) in steps:
        sides.now_s += 1.0
        getattr(sides, move)(first, min(first + count, BLOCKS))
        sides.check()
    while sides.held:
        sides.release(0, BLOCKS)
    sides.end(0, BLOCKS)
    sides.take_era(0, BLOCKS)
    while sides.unsettled.taken:
        sides.copy(0, BLOCKS)
    assert not sides.unsettled.count_dirty()
    sides.begin(0, BLOCKS)
    assert not sides.unsettled.has_copied
    sides.end(0, BLOCKS)
    assert sides.durable == [len(times_s) for times_s in sides.written_s]
    assert not sides.unsettled
