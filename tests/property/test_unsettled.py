"""gate/unsettled: in whatever order things happen, what is not durable is known to be so,
and no younger than it is.

The model knows of every block which version the primary has, which one was copied, and which one is
durable on the secondary; errors lose all that is not.  Extents go to another node and come back;
the other one writes them, copies what it may, and has copies in flight when it gives them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.gate.blockset import BlockSet
from bitmapd.gate.unsettled import Unsettled
from bitmapd.record.geometry import Geometry

BLOCK = 4096
PER_EXTENT = 4
BLOCKS = 3 * PER_EXTENT - 1  # the last extent is a short one


@dataclass
class Copy:
    """One that is in flight: what it has read."""

    run: tuple[int, int]
    versions: list[int]
    counts: bool = True  # no error has revoked it

    def touches(self, extent: int) -> bool:
        return self.run[0] < (extent + 1) * PER_EXTENT and self.run[1] > extent * PER_EXTENT


@dataclass
class Theirs:
    """An extent that is the other node's."""

    dirty: set[int]
    copies: list[Copy] = field(default_factory=list)


class Sides:
    """Both sides of a mirror, and what is thought of them.  One step is one second."""

    def __init__(self) -> None:
        geometry = Geometry(BLOCKS * BLOCK, PER_EXTENT * BLOCK, BLOCK)
        self.away: dict[int, Theirs] = {}
        self.unsettled = Unsettled(geometry, lambda extent: extent not in self.away)
        self.now_s = 0.0
        self.written_s: list[list[float]] = [[] for _ in range(BLOCKS)]  # of every version
        self.readable = [0] * BLOCKS  # the oldest version that a copy may have read
        self.cached = [0] * BLOCKS
        self.durable = [0] * BLOCKS
        self.flushing: tuple[set[int], list[int]] | None = None
        self.failed = False  # since the settle began
        self.held: list[BlockSet] = []
        self.copies: list[Copy] = []
        self.embargoed: dict[int, list[Copy]] = {}  # those of the other node that may land

    def ours(self, first: int, stop: int) -> list[int]:
        return [block for block in range(first, stop) if block // PER_EXTENT not in self.away]

    def write(self, first: int, stop: int) -> None:
        for block in self.ours(first, stop):
            self.written_s[block].append(self.now_s)
            self.unsettled.current_era.mark(block, block + 1, self.now_s)

    def take_era(self, first: int, stop: int) -> None:
        while self.copies:
            self.land(first, stop)
        wanted = self.unsettled.wants_era or bool(self.unsettled.taken)
        assert self.unsettled.take_era() is self.unsettled.current_era
        assert wanted == bool(self.unsettled.taken)
        assert self.embargoed or not self.unsettled.current_era.blocks
        self.readable = [len(times_s) for times_s in self.written_s]

    def copy(self, first: int, stop: int) -> None:
        """A copy begins, or the one that began first lands."""
        run = self.unsettled.taken.next_run(first, stop - first)
        busy = any(run and run[0] < c.run[1] and c.run[0] < run[1] for c in self.copies)
        if run is None or busy:
            self.land(first, stop)
        else:
            self.copies.append(Copy(run, self.readable[slice(*run)]))
            if first % 2:
                self.land(first, stop)

    def put(self, copy: Copy) -> None:
        for block, version in zip(range(*copy.run), copy.versions, strict=True):
            self.cached[block] = version
            self.durable[block] = min(self.durable[block], version)

    def land(self, first: int, stop: int) -> None:
        if self.copies:
            copy = self.copies.pop(0)
            self.put(copy)
            if copy.counts:
                self.unsettled.copied(*copy.run)

    def begin(self, first: int, stop: int) -> None:
        if self.flushing is None:
            self.flushing = self.unsettled.begin_settle(), self.cached.copy()
            self.failed = False

    def end(self, first: int, stop: int) -> None:
        if self.flushing is None:
            return
        (extents, flushed), self.flushing = self.flushing, None
        assert extents.isdisjoint(self.away)
        if self.failed:
            self.unsettled.unsettle(extents)
            return
        self.durable = [
            max(durable, min(pair))
            for durable, *pair in zip(self.durable, flushed, self.cached, strict=True)
        ]
        self.unsettled.settled()

    def lose(self, first: int, stop: int) -> None:
        self.cached = self.durable.copy()
        assert self.unsettled.forget_copied().isdisjoint(self.away)
        for copy in self.copies:
            copy.counts = False
        self.failed = True

    def hold(self, first: int, stop: int) -> None:
        blocks = BlockSet()
        blocks.add(first, stop)
        self.held.append(blocks)
        (self.unsettled.hold if first % 2 else self.unsettled.suspect)(blocks)

    def release(self, first: int, stop: int) -> None:
        if self.held:
            blocks = self.held.pop(0)
            if next(blocks.runs())[0] % 2:
                self.unsettled.release(blocks, self.now_s)
            else:
                self.unsettled.trust(blocks, self.now_s)
            for run in blocks.runs():
                assert all(self.unsettled.is_dirty(b, b + 1) for b in self.ours(*run))

    # -- the other node ---------------------------------------------------------------------
    def give(self, first: int, stop: int) -> None:
        extent = first // PER_EXTENT
        if extent in self.away:
            return
        blocks = range(extent * PER_EXTENT, min((extent + 1) * PER_EXTENT, BLOCKS))
        owed = {b for b in blocks if self.durable[b] < len(self.written_s[b])}
        owed |= {b for held in self.held for run in held.runs() for b in range(*run)} & set(blocks)
        dirt = self.unsettled.give([extent])
        self.away[extent] = Theirs({b for run in dirt.runs() for b in range(*run)})
        assert owed <= self.away[extent].dirty <= set(blocks)
        # What they still have in flight there they know themselves.
        self.away[extent].copies = self.embargoed.pop(extent, [])

    def they_write(self, first: int, stop: int) -> None:
        for block in set(range(first, stop)) - set(self.ours(first, stop)):
            self.written_s[block].append(self.now_s)
            self.away[block // PER_EXTENT].dirty.add(block)

    def they_copy(self, first: int, stop: int) -> None:
        """A copy of theirs begins where none of ours is in flight; or all of them have landed and
        are settled."""
        for extent, theirs in self.away.items():
            if any(copy.touches(extent) for copy in self.copies):
                continue  # it is under embargo there
            if theirs.copies:
                for copy in theirs.copies:
                    self.put(copy)
                    for block, version in zip(range(*copy.run), copy.versions, strict=True):
                        self.durable[block] = version
                        if version == len(self.written_s[block]):
                            theirs.dirty.discard(block)
                theirs.copies = []
            else:
                theirs.copies = [
                    Copy((block, block + 1), [len(self.written_s[block])]) for block in theirs.dirty
                ]

    def take_over(self, first: int, stop: int) -> None:
        extent = first // PER_EXTENT
        theirs = self.away.pop(extent, None)
        if theirs is None:
            return
        embargo = bool(theirs.copies) or any(copy.touches(extent) for copy in self.copies)
        if embargo:
            self.embargoed[extent] = theirs.copies
        for block in theirs.dirty:  # how old it is does not go along
            times_s = self.written_s[block]
            times_s[:] = [self.now_s] * len(times_s)
        dirt = sorted((block, block + 1) for block in theirs.dirty)
        self.unsettled.take_over(dirt, [extent] if embargo else [], self.now_s)

    def free(self, first: int, stop: int) -> None:
        for extent, copies in list(self.embargoed.items()):
            while copies:
                self.put(copies.pop())
            if not any(copy.touches(extent) for copy in self.copies):
                del self.embargoed[extent]
                self.unsettled.free([extent])

    # -- judging ----------------------------------------------------------------------------
    def check(self) -> None:
        unsettled = self.unsettled
        for block, times_s in enumerate(self.written_s):
            if block // PER_EXTENT in self.away:
                assert not unsettled.is_dirty(block, block + 1), "it is not ours"
            elif self.durable[block] < len(times_s):
                assert unsettled.any(block, block + 1)
                assert unsettled.oldest_s is not None
                assert unsettled.oldest_s <= times_s[self.durable[block]]
        for extent in self.embargoed:
            span = extent * PER_EXTENT, min((extent + 1) * PER_EXTENT, BLOCKS)
            assert not unsettled.taken.any(*span), "it would be copied under embargo"
            assert unsettled.any(*span)
        for blocks in self.held:
            assert all(unsettled.any(*run) for run in blocks.runs())
        touched = [
            unsettled.any(first, first + PER_EXTENT) for first in range(0, BLOCKS, PER_EXTENT)
        ]
        assert [unsettled.touches(extent) for extent in range(len(touched))] == touched
        unsuspected = bool(unsettled) or bool(unsettled.suspect_blocks)
        assert unsuspected == any(touched)
        dirty = sum(unsettled.is_dirty(block, block + 1) for block in range(BLOCKS))
        assert dirty <= unsettled.count_dirty() <= 2 * dirty


# Most steps are those that go forward, or few blocks would become durable before an error.
ROUND = ("write", "take_era", "copy", "begin", "end")
RARE = ("lose", "hold", "release")
PAIR = ("give", "they_write", "they_copy", "take_over", "free")
moves = st.sampled_from([*ROUND, *ROUND, *ROUND, *RARE, *PAIR, "take_over"])
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
    while sides.copies:
        sides.land(0, BLOCKS)
    for extent in list(sides.away):
        sides.take_over(extent * PER_EXTENT, BLOCKS)
    sides.free(0, BLOCKS)
    sides.check()
    sides.end(0, BLOCKS)
    sides.take_era(0, BLOCKS)
    while sides.unsettled.taken:
        sides.copy(0, BLOCKS)
        sides.land(0, BLOCKS)
    assert not sides.unsettled.count_dirty()
    sides.begin(0, BLOCKS)
    assert not sides.unsettled.has_copied
    sides.end(0, BLOCKS)
    assert sides.durable == [len(times_s) for times_s in sides.written_s]
    assert not sides.unsettled
