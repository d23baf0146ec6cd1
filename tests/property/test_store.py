"""The record store on a disk that forgets, tears and fails, against its own promises."""

from __future__ import annotations

import errno
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bitmapd.record.geometry import KIB, Geometry
from bitmapd.record.layout import EXTENTS_PER_PAGE
from bitmapd.record.store import RecordStore
from tests.support.machines import machine_settings
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop

# Two pages and a bit, with small extents so that everything happens near the edges.
EXTENTS = 2 * EXTENTS_PER_PAGE + 40
GEOMETRY = Geometry(EXTENTS * 64 * KIB - 512, 64 * KIB, 64 * KIB)

# Few places, so that additions, drops and page writes meet: around the first page boundary and at
# the end.
places = st.sampled_from(
    [0, 1, 2, EXTENTS_PER_PAGE - 1, EXTENTS_PER_PAGE, EXTENTS_PER_PAGE + 1, EXTENTS - 1]
)
ranges = st.builds(
    lambda first, length: (first, min(first + length, EXTENTS)), places, st.integers(1, 3)
)


class StoreMachine(RuleBasedStateMachine):
    """`promised` holds every extent that must be found after a crash at this moment."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimLoop()
        self.boot(blank_image(GEOMETRY))

    def boot(self, image: bytes) -> None:
        self.disk = SimDisk("record", len(image), image)
        self.loaded = load_image(image)
        assert not self.loaded.damaged
        self.store = RecordStore(
            GEOMETRY, self.loaded, self.disk, self.loop, lambda *args, **kwargs: None
        )
        self.waiting = 0
        self.drops: dict[int, int] = {}  # how often an extent was dropped

    @rule(needed=ranges, extra=st.lists(ranges, max_size=2))
    def add(self, needed: tuple[int, int], extra: list[tuple[int, int]]) -> None:
        kept = {extent: self.drops.get(extent, 0) for extent in range(*needed)}

        def done(error: OSError | None) -> None:
            self.waiting -= 1
            for extent, drops in kept.items():
                if error is None and self.drops.get(extent, 0) == drops:
                    assert self.store.covers(extent, extent + 1), "acknowledged and not covered"

        if self.store.add([needed], extra, done):
            self.waiting += 1
            assert not self.store.covers(*needed)
        else:
            assert self.store.covers(*needed)

    @rule(victims=st.lists(places, min_size=1, max_size=4))
    def drop(self, victims: list[int]) -> None:
        self.store.drop(victims)
        for extent in victims:
            self.drops[extent] = self.drops.get(extent, 0) + 1
            assert not self.store.covers(extent, extent + 1)

    @rule(turn=st.booleans())
    def flush_clears(self, turn: bool) -> None:
        self.store.flush_clears()
        if turn:
            self.loop.run_soon()

    @rule()
    def turn(self) -> None:
        self.loop.run_soon()

    @precondition(lambda self: self.disk.pending)
    @rule(data=st.data(), fail=st.booleans())
    def finish(self, data: st.DataObject, fail: bool) -> None:
        index = data.draw(st.integers(0, len(self.disk.pending) - 1))
        if fail:
            self.disk.fail_next = {self.disk.pending[index].kind: [errno.EIO]}
        self.disk.finish(index)
        self.disk.fail_next = {}

    @rule(seed=st.integers(0, 1 << 30))
    def crash(self, seed: int) -> None:
        promised = [e for e in range(EXTENTS) if self.store.covers(e, e + 1)]
        image = self.disk.crash(Random(seed))
        found = load_image(image)
        assert not found.damaged, found.messages
        lost = [extent for extent in promised if not found.bits[extent]]
        assert not lost, f"covered, and gone after a power cut: {lost}"
        self.boot(image)

    @invariant()
    def counted(self) -> None:
        assert self.store.recorded_extents == self.store.recorded.count()
        assert self.store.recorded_extents == sum(b - a for a, b in self.store.recorded_runs())

    def teardown(self) -> None:
        """With a disk that works again, everything that waits ends and the store is settled."""
        self.loop.run_soon()
        for _ in range(6):
            while self.disk.pending:
                self.disk.finish(0)
                self.loop.run_soon()
            self.store.flush_clears()
            self.loop.run_soon()
        assert self.waiting == 0
        assert self.store.settled
        assert not self.store.failing
        stored = load_image(bytes(self.disk.durable)).bits
        assert stored == self.store.recorded


StoreMachine.TestCase.settings = machine_settings(60, 50)
TestStore = StoreMachine.TestCase


def test_concurrent_misses_share_one_write() -> None:
    loop = SimLoop()
    image = blank_image(GEOMETRY)
    disk = SimDisk("record", len(image), image)
    store = RecordStore(GEOMETRY, load_image(image), disk, loop, lambda *a, **k: None)
    answers: list[OSError | None] = []
    for extent in range(16):
        assert store.add([(extent, extent + 1)], [(extent + 100, extent + 110)], answers.append)
    loop.run_soon()
    assert len(disk.pending) == 1
    disk.finish()
    assert answers == [None] * 16
    assert store.updates == 1
    assert store.covers(0, 16)
    assert store.covers(100, 125)


def test_a_hit_and_a_revoked_clear_cost_no_write() -> None:
    loop = SimLoop()
    image = blank_image(GEOMETRY)
    disk = SimDisk("record", len(image), image)
    store = RecordStore(GEOMETRY, load_image(image), disk, loop, lambda *a, **k: None)
    store.add([(5, 6)], [], lambda error: None)
    loop.run_soon()
    disk.finish()
    store.drop([5])
    assert not store.covers(5, 6)
    assert not store.add([(5, 6)], [], lambda error: None)
    assert store.covers(5, 6)
    loop.run_soon()
    assert not disk.pending


def test_a_failed_page_is_read_back_before_it_counts() -> None:
    loop = SimLoop()
    image = blank_image(GEOMETRY)
    disk = SimDisk("record", len(image), image)
    events: list[str] = []
    store = RecordStore(
        GEOMETRY, load_image(image), disk, loop, lambda event, **fields: events.append(event)
    )
    answers: list[OSError | None] = []
    disk.fail_next = {"write": [errno.EIO]}
    store.add([(5, 6)], [], answers.append)
    loop.run_soon()
    disk.finish()
    assert isinstance(answers[0], OSError)
    assert events == ["record-error"]
    assert store.failing
    store.add([(6, 7)], [], answers.append)
    loop.run_soon()
    disk.finish()
    assert disk.pending[0].kind == "read"
    assert len(answers) == 1
    disk.finish()
    assert answers[1] is None
    assert store.covers(5, 7)
    assert not store.failing


def test_an_extent_that_is_being_cleared_is_written_again() -> None:
    """The clear may be on the medium already, so the old content is no promise any more."""
    loop = SimLoop()
    image = blank_image(GEOMETRY)
    disk = SimDisk("record", len(image), image)
    store = RecordStore(GEOMETRY, load_image(image), disk, loop, lambda *a, **k: None)
    store.add([(5, 7)], [], lambda error: None)
    loop.run_soon()
    disk.finish()
    store.drop([5])
    store.flush_clears()
    loop.run_soon()
    assert [op.kind for op in disk.pending] == ["write"]
    answers: list[OSError | None] = []
    assert store.add([(5, 6)], [], answers.append)
    assert not store.covers(5, 6)
    assert store.covers(6, 7)
    disk.finish()
    assert not answers
    disk.finish()
    assert answers == [None]
    assert store.covers(5, 7)
    assert (store.updates, store.clears) == (2, 1)
