"""The record store on a disk that forgets, tears and fails, against its own promises.

`STORE_WALKS` is the number of random walks.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from random import Random

import pytest
from bitarray import bitarray
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bitmapd.errors import BitmapdError
from bitmapd.record import tool
from bitmapd.record.geometry import KIB, Geometry
from bitmapd.record.layout import EXTENTS_PER_PAGE, record_size_bytes
from bitmapd.record.pages import PAGE_BYTES, PAGES_OFFSET, decode_slot
from bitmapd.record.store import RecordStore
from bitmapd.record.updates import SuperblockUpdates
from bitmapd.volume.resize import new_page_states
from tests.support.machines import examples, machine_settings
from tests.support.records import VOLUME, SimMedium, blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, SimOp

# Small extents, so that everything happens near the edges of pages.
EXTENT = 64 * KIB
EXTENTS = EXTENTS_PER_PAGE + 40
GEOMETRY = Geometry(EXTENTS * EXTENT - 512, EXTENT, EXTENT)

# What it may become: inside the last extent, on the last page, up to its edge, on further pages.
LARGER = [
    Geometry(size_bytes, EXTENT, EXTENT)
    for size_bytes in (
        EXTENTS * EXTENT,
        (EXTENTS + 9) * EXTENT - 512,
        2 * EXTENTS_PER_PAGE * EXTENT,
        (2 * EXTENTS_PER_PAGE + 7) * EXTENT,
        (3 * EXTENTS_PER_PAGE + 5) * EXTENT,
    )
]

# Few places, so that additions, drops and page writes meet: around the page boundaries and ends.
PLACES = (
    *(0, 1, 2, EXTENTS_PER_PAGE - 1, EXTENTS_PER_PAGE, EXTENTS_PER_PAGE + 1, EXTENTS - 1),
    *(EXTENTS, EXTENTS + 8, 2 * EXTENTS_PER_PAGE, 3 * EXTENTS_PER_PAGE + 1),
)
ranges = st.tuples(st.sampled_from(PLACES), st.integers(1, 3))
seeds = st.integers(0, 1 << 30)


class StoreMachine(RuleBasedStateMachine):
    """Judges what a power cut leaves, after every step and after every effect of a growth.

    Covered extents are found; the superblock is the last one that was durable or one of an update
    that failed since; and if that says a larger size, everything new is in the record.  No two
    writes of a page have the same sequence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimLoop()
        self.rng = Random(0)
        self.first_boot()

    def first_boot(self) -> None:
        """A new volume, with room on the record device for what it may become."""
        image = blank_image(GEOMETRY)
        self.boot(image.ljust(record_size_bytes(LARGER[-1].extents), b"\xa5"))

    def boot(self, image: bytes) -> None:
        self.loop = SimLoop()
        self.disk = SimDisk("record", len(image), image)
        self.medium = SimMedium(self.disk, self.judge)
        loaded = load_image(image)
        assert not loaded.damaged, loaded.messages
        self.geometry = loaded.superblock.geometry
        self.updates = SuperblockUpdates(self.medium, loaded)
        self.tried = [loaded.superblock]  # any of them may be in force after a power cut
        self.store = RecordStore(
            self.geometry, loaded, self.disk, self.loop, lambda *args, **kwargs: None
        )
        self.growth: Geometry | None = None  # what is being prepared
        self.prepared = False
        self.kept: int | None = None  # named until the volume has grown
        self.waiting = 0
        self.drops: dict[int, int] = {}  # how often an extent was dropped
        self.used: dict[tuple[int, int], SimOp] = {}  # page and sequence: its write

    def present(self, place: tuple[int, int]) -> tuple[int, int]:
        first = min(place[0], self.geometry.extents - 1)
        return first, min(first + place[1], self.geometry.extents)

    # -- the record in use ----------------------------------------------------------------
    @rule(needed=ranges, extra=st.lists(ranges, max_size=2))
    def add(self, needed: tuple[int, int], extra: list[tuple[int, int]]) -> None:
        needed = self.present(needed)
        kept = {extent: self.drops.get(extent, 0) for extent in range(*needed)}
        store = self.store

        def done(error: OSError | None) -> None:
            self.waiting -= 1
            for extent, drops in kept.items():
                if error is None and self.drops.get(extent, 0) == drops:
                    assert store.covers(extent, extent + 1), "acknowledged and not covered"

        if store.add([needed], [self.present(place) for place in extra], done):
            self.waiting += 1
            assert not store.covers(*needed)
        else:
            assert store.covers(*needed)

    @rule(victims=st.lists(ranges, min_size=1, max_size=4))
    def drop(self, victims: list[tuple[int, int]]) -> None:
        for extent in {extent for place in victims for extent in range(*self.present(place))}:
            self.store.drop([extent])
            self.drops[extent] = self.drops.get(extent, 0) + 1
            assert not self.store.covers(extent, extent + 1)

    @rule(turn=st.booleans())
    def flush_clears(self, turn: bool) -> None:
        self.store.flush_clears()
        if turn:
            self.loop.run_soon()

    @rule()
    def destage_clears(self) -> None:
        """What was dropped up to now and not added since is not stored when it calls back."""
        wanted = self.store.recorded
        gone = [e for e in self.drops if not wanted[e]]
        drops = dict(self.drops)
        disk, kept = self.disk, self.kept

        def done(error: OSError | None) -> None:
            self.waiting -= 1
            if error is not None:
                return
            stored = load_image(bytes(disk.durable)).bits
            for extent in set(gone) - {kept, self.kept}:  # kept for a growth, then or since
                if drops[extent] == self.drops[extent] and not self.store.recorded[extent]:
                    assert not stored[extent], f"{extent} is still stored"

        self.waiting += 1
        self.store.destage_clears(done)

    @rule()
    def turn(self) -> None:
        self.loop.run_soon()

    @precondition(lambda self: self.disk.pending)
    @rule(place=st.integers(0, 3), fail=st.booleans(), harm=st.booleans())
    def finish(self, place: int, fail: bool, harm: bool) -> None:
        index = place % len(self.disk.pending)
        self.disk.luck = self.rng if harm else None  # carried out in part
        if fail:
            self.disk.fail_next = {self.disk.pending[index].kind: [errno.EIO]}
        self.disk.finish(index)
        self.disk.fail_next = {}

    # -- its superblock and its size --------------------------------------------------------
    def update(self, fates: list[float | None], **changes: object) -> bool:
        """Whether the superblock is durable with these changes."""
        tried = self.updates.superblock.updated(1, above=self.tried[-1].sequence, **changes)
        self.tried.append(tried)
        self.medium.fates = list(fates)
        try:
            self.tried = [self.updates.update(1, **changes)]
        except BitmapdError:
            return False
        finally:
            self.medium.fates = []
        return True

    @rule(fates=st.lists(st.sampled_from([None, 0.0, 0.5, 1.0]), max_size=2))
    def update_superblock(self, fates: list[float | None]) -> None:
        self.update(fates, session=self.updates.superblock.session + 1)

    @precondition(lambda self: self.growth is None)
    @rule(size=st.sampled_from(LARGER), fate=st.sampled_from([None, None, 0.0, 0.5, 1.0]))
    def prepare_growth(self, size: Geometry, fate: float | None) -> None:
        if size.size_bytes <= self.geometry.size_bytes:
            return
        self.medium.fates = [fate]
        try:
            tool.add_pages(self.medium, self.updates.superblock, size)
        except BitmapdError:
            return
        finally:
            self.medium.fates = []
        self.growth, self.prepared = size, False
        self.waiting += 1

        def done(error: OSError | None) -> None:
            self.waiting -= 1
            self.prepared = error is None
            if error is not None:
                self.growth = None

        self.store.prepare_growth(size, done)
        self.kept = self.geometry.short_extent

    @precondition(lambda self: self.growth is not None and self.prepared)
    @rule(fates=st.lists(st.sampled_from([None, None, 0.0, 0.5, 1.0]), max_size=2))
    def grow(self, fates: list[float | None]) -> None:
        size, self.growth, self.prepared = self.growth, None, False
        assert size is not None
        if not self.update(fates, geometry=size, primary_size_bytes=size.size_bytes):
            return
        old, self.geometry, self.kept = self.geometry, size, None
        self.store.grow(size, new_page_states(old, size))
        assert self.store.covers(old.extents, size.extents) or old.extents == size.extents

    # -- judging --------------------------------------------------------------------------
    def judge(self) -> bytes:
        """What a power cut leaves now."""
        image = self.disk.crash(self.rng)
        found = load_image(image)
        assert not found.damaged, found.messages
        assert found.superblock in self.tried, "a superblock that nobody asked for"
        extents = self.geometry.extents
        promised = bitarray(extents, endian="little")
        promised.setall(False)
        for first, stop in self.store.covered_runs():
            promised[first:stop] = True
        lost = promised & ~found.bits[:extents]
        assert not lost.any(), f"covered, and gone after a power cut: {lost.find(True)}"
        assert found.bits[extents:].all(), "new extents are not in the record"
        if found.superblock.geometry != self.geometry and (last := self.geometry.short_extent):
            assert found.bits[last], "what is new at the old end is not in the record"
        return image

    @rule(seed=seeds)
    def crash(self, seed: int) -> None:
        self.rng = Random(seed)
        self.boot(self.judge())

    @invariant()
    def judged(self) -> None:
        self.judge()

    @invariant()
    def sequences_are_used_once(self) -> None:
        for op in self.disk.pending:
            if op.kind == "write":
                index = (op.offset_bytes - PAGES_OFFSET) // (2 * PAGE_BYTES)
                sequence = decode_slot(op.data, VOLUME.bytes, index).sequence
                assert self.used.setdefault((index, sequence), op) is op, f"{sequence} again"

    @invariant()
    def counted(self) -> None:
        recorded = self.store.recorded
        assert len(recorded) == self.geometry.extents
        assert self.store.recorded_extents == recorded.count()
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
        assert self.update([])
        stored = load_image(bytes(self.disk.durable))
        assert stored.superblock.geometry == self.geometry
        expected = self.store.recorded
        if self.kept is not None:
            expected[self.kept] = True
        assert stored.bits == expected


# -- many steps, by a plain random walk ---------------------------------------------------
# A growth that fails, is asked for again and meets the writes of clears takes more steps than
# Hypothesis reaches.


def walk(seed: int, steps: int) -> None:
    """Take so many steps at random, judge after each, and settle everything in the end."""
    rng = Random(seed)
    machine = StoreMachine()
    machine.rng = rng
    weights = [weight * rng.choice([0.2, 1, 1, 2]) for weight in ACTIONS.values()]
    for _ in range(steps):
        (action,) = rng.choices(list(ACTIONS), weights)
        action(machine, rng)
        machine.judged()
        machine.sequences_are_used_once()
        machine.counted()
    machine.teardown()


def _place(rng: Random) -> tuple[int, int]:
    return rng.choice(PLACES), rng.randint(1, 3)


def _finish(machine: StoreMachine, rng: Random) -> None:
    if machine.disk.pending:
        machine.finish(rng.randrange(4), rng.random() < 0.15, rng.random() < 0.5)


def _prepare_growth(machine: StoreMachine, rng: Random) -> None:
    if machine.growth is None:
        machine.prepare_growth(rng.choice(LARGER), rng.choice(FATES))


def _grow(machine: StoreMachine, rng: Random) -> None:
    if machine.growth is not None and machine.prepared:
        machine.grow(rng.choices(FATES, k=2))


FATES = (None, None, None, 0.0, 0.5, 1.0)
ACTIONS: dict[Callable[[StoreMachine, Random], None], float] = {
    lambda machine, rng: machine.add(_place(rng), [_place(rng)]): 6,
    lambda machine, rng: machine.drop([_place(rng)]): 6,
    lambda machine, rng: machine.flush_clears(rng.random() < 0.7): 4,
    lambda machine, rng: machine.destage_clears(): 2,
    lambda machine, rng: machine.turn(): 8,
    _finish: 16,
    lambda machine, rng: machine.update_superblock(rng.choices(FATES, k=2)): 1,
    _prepare_growth: 2,
    _grow: 2,
    lambda machine, rng: machine.crash(rng.getrandbits(30)): 0.5,
    lambda machine, rng: machine.first_boot(): 0.5,
}


@pytest.mark.parametrize("seed", range(examples(int(os.environ.get("STORE_WALKS", "100")))))
def test_walk(seed: int) -> None:
    walk(seed, 400)


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
