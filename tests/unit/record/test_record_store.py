"""record/store: what is covered, what a record write costs, what an error leaves."""

from __future__ import annotations

import errno
from random import Random
from typing import Any

import pytest

from bitmapd.record import page_writer
from bitmapd.record.geometry import KIB, Geometry
from bitmapd.record.layout import EXTENTS_PER_PAGE, PAGE_BYTES, encode_page, page_offset
from bitmapd.record.page_writer import SLOW_S
from bitmapd.record.pages import decode_slot
from bitmapd.record.store import RecordStore
from bitmapd.volume.resize import new_page_states
from tests.support.records import VOLUME, blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain

EDGE = EXTENTS_PER_PAGE  # the first extent of the second page
EXTENTS = EDGE + 40
GEOMETRY = Geometry(EXTENTS * 64 * KIB, 64 * KIB, 64 * KIB)


class Rig:
    """A store on a simulated record device."""

    def __init__(self, image: bytes | None = None, geometry: Geometry = GEOMETRY) -> None:
        image = image or blank_image(geometry)
        self.loop = SimLoop()
        self.disk = SimDisk("record", len(image), image)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[OSError | None] = []
        self.store = RecordStore(
            geometry,
            load_image(image),
            self.disk,
            self.loop,
            lambda event, **fields: self.events.append((event, fields)),
        )

    def add(self, *needed: tuple[int, int], extra: tuple[tuple[int, int], ...] = ()) -> bool:
        waiting = self.store.add(needed, extra, self.answers.append)
        self.loop.run_soon()
        return waiting

    def put(self, *needed: tuple[int, int]) -> None:
        """In the record, durably."""
        self.add(*needed)
        drain(self.loop, self.disk)

    def finish(self, index: int = 0) -> None:
        self.disk.finish(index)
        self.loop.run_soon()

    def fail(self, number: int = errno.EIO, index: int = 0) -> None:
        self.disk.fail_next = {self.disk.pending[index].kind: [number]}
        self.finish(index)
        self.disk.fail_next = {}

    @property
    def places(self) -> list[tuple[str, int]]:
        """Kind and offset of what is at the device now."""
        return [(op.kind, op.offset_bytes) for op in self.disk.pending]

    def stored(self) -> set[int]:
        bits = load_image(bytes(self.disk.durable)).bits
        return {extent for extent in range(len(bits)) if bits[extent]}

    def recorded(self) -> set[int]:
        return {e for first, stop in self.store.recorded_runs() for e in range(first, stop)}


@pytest.fixture
def rig() -> Rig:
    return Rig()


# -- questions --------------------------------------------------------------------------------


def test_it_begins_with_what_was_loaded(rig: Rig) -> None:
    rig.put((3, 5), (EDGE - 1, EDGE + 2))
    store = Rig(bytes(rig.disk.durable)).store
    assert store.recorded_extents == 5
    assert store.covers(3, 5)
    assert store.covers(EDGE - 1, EDGE + 2)
    assert not store.covers(3, 6)
    assert store.missing(2, 6) == 2
    assert store.recorded[4]
    assert not store.recorded[5]
    assert store.settled
    assert not store.failing
    assert list(store.recorded_runs()) == [(3, 5), (EDGE - 1, EDGE + 2)]
    assert list(store.recorded_runs(4, EDGE)) == [(4, 5), (EDGE - 1, EDGE)]


def test_a_run_may_end_with_the_volume(rig: Rig) -> None:
    rig.put((EXTENTS - 2, EXTENTS))
    assert list(rig.store.recorded_runs()) == [(EXTENTS - 2, EXTENTS)]


def test_covered_runs_are_durable(rig: Rig) -> None:
    rig.put((3, 5), (EXTENTS - 2, EXTENTS))
    rig.add((5, 7))
    assert list(rig.store.recorded_runs()) == [(3, 7), (EXTENTS - 2, EXTENTS)]
    assert list(rig.store.covered_runs()) == [(3, 5), (EXTENTS - 2, EXTENTS)]
    rig.finish()
    assert list(rig.store.covered_runs()) == [(3, 7), (EXTENTS - 2, EXTENTS)]


def test_the_record_that_is_handed_out_is_a_copy(rig: Rig) -> None:
    rig.store.recorded.setall(True)
    assert rig.store.recorded.count() == 0


# -- adding -----------------------------------------------------------------------------------


def test_nothing_is_covered_before_it_is_durable(rig: Rig) -> None:
    assert rig.add((5, 6))
    assert rig.store.recorded[5]
    assert not rig.store.covers(5, 6)
    assert rig.disk.pending[0].fua, "nothing here relies on a flush"
    assert not rig.store.settled
    rig.finish()
    assert rig.answers == [None]
    assert rig.store.covers(5, 6)
    assert rig.stored() == {5}
    assert rig.store.settled


def test_one_write_whatever_number_of_extents_rides_along(rig: Rig) -> None:
    rig.add((5, 6), extra=((10, 20), (EDGE, EDGE + 5), (30, 31)))
    assert len(rig.disk.pending) == 1
    rig.finish()
    assert rig.stored() == {5, *range(10, 20), 30}, "what needs another page does not ride along"
    assert rig.recorded() == rig.stored()
    assert rig.store.updates == 1


def test_extras_alone_are_never_written(rig: Rig) -> None:
    rig.put((5, 6))
    assert not rig.add((5, 6), extra=((7, 9),))
    assert rig.disk.pending == []
    assert rig.recorded() == {5}


def test_an_add_over_two_pages_waits_for_both(rig: Rig) -> None:
    rig.add((EDGE - 1, EDGE + 1))
    assert len(rig.disk.pending) == 2
    rig.finish(1)
    assert rig.answers == []
    rig.finish()
    assert rig.answers == [None]
    assert rig.store.updates == 2


def test_an_add_that_asks_twice_for_a_page_waits_once(rig: Rig) -> None:
    rig.add((1, 2), (5, 6))
    rig.finish()
    assert rig.answers == [None]
    assert rig.stored() == {1, 5}


def test_the_error_of_either_page_is_the_answer(rig: Rig) -> None:
    rig.add((EDGE - 1, EDGE + 1))
    rig.fail(errno.ENOSPC)
    rig.finish()
    (error,) = rig.answers
    assert error is not None
    assert error.errno == errno.ENOSPC


def test_what_asks_for_a_page_meanwhile_shares_the_next_write(rig: Rig) -> None:
    rig.add((1, 2))
    for extent in (2, 3, 4):
        assert rig.add((extent, extent + 1))
    assert len(rig.disk.pending) == 1, "one write at a time per page"
    rig.finish()
    assert rig.answers == [None]
    assert len(rig.disk.pending) == 1
    rig.finish()
    assert rig.answers == [None] * 4
    assert rig.store.updates == 2


def test_pages_are_written_at_the_same_time(rig: Rig) -> None:
    rig.add((1, 2))
    rig.add((EDGE, EDGE + 1))
    assert [offset for _, offset in rig.places] == [page_offset(0, 1), page_offset(1, 1)]


def test_a_batch_can_be_committed_before_the_loop_comes_round(rig: Rig) -> None:
    rig.store.add([(1, 2)], (), rig.answers.append)
    rig.store.commit()
    assert len(rig.disk.pending) == 1
    rig.loop.run_soon()
    assert len(rig.disk.pending) == 1, "what the loop had planned has nothing left to do"


def test_the_two_slots_take_turns(rig: Rig) -> None:
    for extent in (1, 2, 3):
        rig.put((extent, extent + 1))
    offsets = [offset for kind, offset, _ in rig.disk.history if kind == "write"]
    assert offsets == [page_offset(0, 1), page_offset(0, 0), page_offset(0, 1)]


def test_every_outcome_of_a_power_cut_holds_what_was_covered(rig: Rig) -> None:
    rig.put((1, 2))
    rig.store.drop([1])
    rig.add((2, 3))
    found = set()
    for seed in range(40):
        loaded = load_image(rig.disk.crash(Random(seed)))
        assert not loaded.damaged
        found.add(tuple(extent for extent in range(4) if loaded.bits[extent]))
    assert found == {(1,), (2,)}, "the old page or the new one, never less"


# -- dropping ---------------------------------------------------------------------------------


def test_a_drop_counts_at_once_and_is_written_lazily(rig: Rig) -> None:
    rig.put((5, 8))
    rig.store.drop([5, 6, 9])
    assert rig.store.recorded_extents == 1
    assert not rig.store.covers(5, 6)
    rig.loop.run_soon()
    assert rig.disk.pending == []
    assert not rig.store.settled
    rig.store.flush_clears()
    rig.loop.run_soon()
    assert len(rig.disk.pending) == 1
    rig.finish()
    assert rig.stored() == {7}
    assert (rig.store.updates, rig.store.clears) == (1, 1)
    rig.store.flush_clears()
    rig.loop.run_soon()
    assert rig.disk.pending == [], "nothing is left to clear"


def test_clears_ride_along_with_the_next_miss_of_their_page(rig: Rig) -> None:
    rig.put((5, 8))
    rig.store.drop([5, 6])
    rig.put((9, 10))
    assert rig.stored() == {7, 9}
    assert (rig.store.updates, rig.store.clears) == (2, 0)
    assert rig.store.settled


def test_a_revoked_clear_costs_nothing_until_it_is_on_its_way(rig: Rig) -> None:
    rig.put((5, 7))
    rig.store.drop([5])
    assert not rig.add((5, 6))
    assert rig.store.covers(5, 7)
    rig.store.drop([5])
    rig.store.flush_clears()
    rig.loop.run_soon()
    assert rig.add((5, 6)), "the clear may be on the medium already"
    assert not rig.store.covers(5, 6)
    assert rig.store.covers(6, 7), "what both contents have stays covered"
    rig.finish()
    rig.finish()
    assert rig.store.covers(5, 7)


def test_clears_wait_for_a_page_that_is_being_written(rig: Rig) -> None:
    rig.put((5, 6))
    rig.add((6, 7))
    rig.store.drop([5])
    rig.store.flush_clears()
    rig.loop.run_soon()
    assert len(rig.disk.pending) == 1
    rig.finish()
    assert rig.disk.pending == [], "left to the next call"
    rig.store.flush_clears()
    rig.loop.run_soon()
    rig.finish()
    assert rig.stored() == {6}


def test_a_drop_of_what_is_being_added_wins(rig: Rig) -> None:
    rig.add((5, 6))
    rig.store.drop([5])
    rig.finish()
    assert rig.answers == [None]
    assert not rig.store.covers(5, 6), "whoever relies on it asks again"


# -- errors -----------------------------------------------------------------------------------


def test_a_failed_write_is_told_and_covers_nothing(rig: Rig) -> None:
    rig.put((1, 2))
    rig.add((5, 6))
    rig.fail()
    assert isinstance(rig.answers[1], OSError)
    assert rig.store.failing
    assert rig.store.errors == 1
    assert not rig.store.covers(5, 6)
    assert rig.store.covers(1, 2), "the other slot has it whatever became of the write"
    ((event, fields),) = rig.events
    assert event == "record-error"
    assert (fields["device"], fields["page"]) == ("record", 0)
    assert fields["message"] == "cannot write the record: simulated EIO"


def test_the_same_slot_is_written_again_and_read_back(rig: Rig) -> None:
    rig.add((5, 6))
    rig.fail()
    rig.add((6, 7))
    assert rig.places == [("write", page_offset(0, 1))]
    rig.finish()
    assert rig.places == [("read", page_offset(0, 1))]
    assert len(rig.answers) == 1
    rig.finish()
    assert rig.answers[1] is None
    assert not rig.store.failing
    assert rig.stored() == {5, 6}
    rig.add((7, 8))
    assert rig.places == [("write", page_offset(0, 0))]
    rig.finish()
    assert rig.disk.pending == [], "no read-back once it has worked again"


def test_a_page_that_reads_back_differently_is_an_error(rig: Rig) -> None:
    rig.add((5, 6))
    rig.fail()
    rig.add((6, 7))
    rig.finish()
    rig.disk.visible[page_offset(0, 1) + PAGE_BYTES - 1] ^= 1
    rig.finish()
    error = rig.answers[1]
    assert error is not None
    assert "page 0 reads back other than written" in str(error)
    assert rig.store.failing
    assert not rig.store.covers(6, 7)


def test_a_page_that_cannot_be_read_back_is_an_error(rig: Rig) -> None:
    rig.add((5, 6))
    rig.fail()
    rig.add((6, 7))
    rig.finish()
    rig.fail(errno.ENXIO)
    error = rig.answers[1]
    assert error is not None
    assert error.errno == errno.ENXIO
    assert rig.store.failing


def test_a_failed_page_is_mended_by_the_next_flush_of_clears(rig: Rig) -> None:
    rig.add((5, 6))
    rig.fail()
    rig.store.flush_clears()
    drain(rig.loop, rig.disk)
    assert not rig.store.failing
    assert rig.stored() == {5}, "what was asked for stays wanted"
    assert rig.store.covers(5, 6)


def test_a_clear_that_is_on_its_way_is_waited_for(rig: Rig) -> None:
    rig.put((1, 3))
    rig.store.drop([1])
    rig.store.flush_clears()
    rig.loop.run_soon()
    rig.store.destage_clears(rig.answers.append)
    rig.loop.run_soon()
    before = len(rig.answers)
    drain(rig.loop, rig.disk)
    assert rig.answers[before:] == [None]
    assert rig.stored() == {2}


def test_no_two_writes_of_a_page_have_the_same_sequence(rig: Rig) -> None:
    """One that failed may be there in part: with the same sequence as its repetition, whose power
    cut leaves the other part, both would pass for one whole page."""
    sequences = []
    for extent, fails in ((1, False), (2, True), (3, True), (4, False), (5, True), (6, False)):
        rig.add((extent, extent + 1))
        rig.store.flush_clears()
        rig.loop.run_soon()
        (write,) = [op for op in rig.disk.pending if op.kind == "write"]
        sequences.append(decode_slot(write.data, VOLUME.bytes, 0).sequence)
        if fails:
            rig.fail()
        else:
            drain(rig.loop, rig.disk)
    assert sequences == sorted(set(sequences))


def test_who_waited_behind_a_failed_write_gets_the_next_one(rig: Rig) -> None:
    rig.add((1, 2))
    rig.add((2, 3))
    rig.fail()
    assert len(rig.answers) == 1
    drain(rig.loop, rig.disk)
    assert rig.answers[1] is None
    assert rig.store.covers(1, 3)


def test_an_answer_may_ask_for_the_page_again(rig: Rig) -> None:
    """As the gate does when an extent was dropped meanwhile."""
    later: list[OSError | None] = []
    rig.store.add([(1, 2)], (), lambda error: rig.add((3, 4)) and later.append(error))
    rig.loop.run_soon()
    rig.add((2, 3))
    rig.finish()
    assert later == [None]
    assert len(rig.disk.pending) == 1
    rig.finish()
    assert rig.answers == [None, None]
    assert rig.store.covers(1, 4)


# -- a device that does not answer ------------------------------------------------------------


def test_a_write_that_is_not_answered_is_told_of_once(rig: Rig) -> None:
    rig.add((5, 6))
    rig.loop.advance(SLOW_S - 0.5)
    assert (rig.events, rig.store.slow, rig.store.write_age_s) == ([], False, SLOW_S - 0.5)
    rig.loop.advance(1.0)
    ((event, fields),) = rig.events
    assert (event, fields["device"], fields["page"]) == ("record-slow", "record", 0)
    assert fields["message"] == "a write to the record has not been answered for 5 s"
    assert rig.store.slow
    assert not rig.store.failing
    assert rig.answers == [], "it may still arrive"
    rig.loop.advance(10 * SLOW_S)
    assert len(rig.events) == 1
    rig.finish()
    assert [event for event, _ in rig.events] == ["record-slow", "record-ok"]
    assert (rig.answers, rig.store.slow, rig.store.write_age_s) == ([None], False, 0.0)


def test_writes_that_follow_one_another_are_not_slow(rig: Rig) -> None:
    for extent in range(10):
        rig.add((extent, extent + 1))
        rig.loop.advance(SLOW_S - 1)
        rig.finish()
    rig.loop.advance(10 * SLOW_S)
    assert rig.events == []
    rig.add((20, 21))
    rig.loop.advance(SLOW_S)
    assert rig.store.slow, "watched again after a pause"


def test_all_is_well_when_nothing_is_overdue(rig: Rig) -> None:
    rig.add((5, 6))
    rig.loop.advance(1)
    rig.add((EDGE, EDGE + 1))
    rig.loop.advance(SLOW_S)
    rig.finish()  # the first; the second is overdue as well
    assert rig.store.slow
    rig.finish()
    assert [event for event, _ in rig.events] == ["record-slow", "record-ok"]
    rig.add((5, 7))
    rig.loop.advance(SLOW_S - 1)
    rig.add((EDGE, EDGE + 2))
    rig.loop.advance(1)
    rig.finish()
    assert not rig.store.slow, "the second has been in flight for a second only"
    rig.loop.advance(SLOW_S)
    assert rig.store.slow, "and is watched on"


def test_a_slow_write_that_fails_is_mended_before_all_is_well(rig: Rig) -> None:
    rig.add((5, 6))
    rig.loop.advance(SLOW_S)
    rig.fail()
    assert [event for event, _ in rig.events] == ["record-slow", "record-error"]
    assert not rig.store.slow
    rig.put((5, 6))
    assert [event for event, _ in rig.events][2:] == ["record-ok"]


# -- coming to rest ---------------------------------------------------------------------------


def test_idle_comes_after_everything_that_is_due(rig: Rig) -> None:
    idle: list[OSError | None] = []
    rig.add((1, 2))
    rig.add((2, 3))
    rig.store.when_idle(idle.append)
    rig.loop.run_soon()
    assert idle == []
    rig.finish()
    assert idle == []
    rig.finish()
    assert idle == [None]


def test_idle_is_never_told_inside_the_call(rig: Rig) -> None:
    idle: list[OSError | None] = []
    rig.store.when_idle(idle.append)
    rig.store.when_idle(idle.append)
    assert idle == []
    rig.loop.run_soon()
    assert idle == [None, None]


def test_idle_tells_of_an_error_until_it_is_mended(rig: Rig) -> None:
    idle: list[OSError | None] = []
    rig.add((1, 2))
    rig.store.when_idle(idle.append)
    rig.fail(errno.ENOSPC)
    assert idle[0] is not None
    assert idle[0].errno == errno.ENOSPC
    rig.store.when_idle(idle.append)
    rig.loop.run_soon()
    assert idle[1] is idle[0]
    rig.store.flush_clears()
    rig.store.when_idle(idle.append)
    drain(rig.loop, rig.disk)
    assert idle[2] is None


# -- growing ----------------------------------------------------------------------------------


SMALL = Geometry(40 * 64 * KIB, 64 * KIB, 64 * KIB)


def growing() -> Rig:
    """A volume of 40 extents whose second page, of a larger one, was written as ones."""
    ones = b"\xff" * ((EXTENTS - EDGE) // 8)
    slots = [encode_page(VOLUME.bytes, 1, 2, 1, ones), encode_page(VOLUME.bytes, 1, 1, 0, ones)]
    return Rig(blank_image(SMALL)[: page_offset(1, 0)] + b"".join(slots), SMALL)


def stored_if(rig: Rig, geometry: Geometry) -> set[int]:
    """What a start would find if the superblock said that geometry."""
    superblocks = blank_image(geometry)[: page_offset(0, 0)]
    found = load_image(superblocks + bytes(rig.disk.durable[page_offset(0, 0) :]))
    assert not found.damaged
    return {extent for extent in range(geometry.extents) if found.bits[extent]}


@pytest.mark.parametrize("in_flight", [False, True])
def test_every_extent_of_a_larger_volume_is_recorded(in_flight: bool) -> None:
    """`in_flight`: the last page is being written when the volume grows."""
    rig = growing()
    rig.put((39, 40))
    rig.store.prepare_growth(GEOMETRY, rig.answers.append)
    drain(rig.loop, rig.disk)
    assert rig.answers == [None, None]
    assert rig.recorded() == {39}, "nothing of it shows yet"
    assert stored_if(rig, SMALL) == {39}
    assert stored_if(rig, GEOMETRY) == {39, *range(40, EXTENTS)}
    if in_flight:
        rig.add((38, 39))
    rig.store.grow(GEOMETRY, new_page_states(SMALL, GEOMETRY))
    expected = {*range(39, EXTENTS)} | ({38} if in_flight else set())
    assert rig.recorded() == expected
    assert rig.store.recorded_extents == len(expected)
    assert rig.store.covers(39, EXTENTS)
    if in_flight:
        rig.finish()
        assert rig.store.covers(38, EXTENTS)
    rig.store.drop([EDGE, 40])
    rig.store.flush_clears()
    drain(rig.loop, rig.disk)
    assert stored_if(rig, GEOMETRY) == rig.recorded() == expected - {EDGE, 40}


def test_growth_that_failed_can_be_prepared_again(rig: Rig) -> None:
    """Whatever the page says meanwhile, the extents of the largest size are on it."""
    rig = growing()
    rig.store.prepare_growth(GEOMETRY, rig.answers.append)
    rig.loop.run_soon()
    rig.fail()
    assert isinstance(rig.answers[0], OSError)
    rig.add((3, 4))
    drain(rig.loop, rig.disk)
    assert stored_if(rig, GEOMETRY) == {3, *range(40, EXTENTS)}
    assert rig.recorded() == {3}
    assert rig.store.recorded_extents == 1
    less = Geometry(50 * 64 * KIB, 64 * KIB, 64 * KIB)
    rig.store.prepare_growth(less, rig.answers.append)
    drain(rig.loop, rig.disk)
    assert rig.answers[-1] is None
    assert stored_if(rig, GEOMETRY) == {3, *range(40, EXTENTS)}
    rig.store.grow(less, new_page_states(SMALL, less))
    assert rig.recorded() == {3, *range(40, 50)}
    rig.store.drop(range(40, 50))
    rig.store.flush_clears()
    drain(rig.loop, rig.disk)
    assert stored_if(rig, less) == {3}


def test_growth_inside_the_last_extent_names_it_until_the_volume_has_grown(rig: Rig) -> None:
    """The superblock may say the new size although its write has failed."""
    short, last = Geometry(EXTENTS * 64 * KIB - 512, 64 * KIB, 64 * KIB), EXTENTS - 1
    rig = Rig(geometry=short)
    rig.store.prepare_growth(GEOMETRY, rig.answers.append)
    assert rig.answers == []
    drain(rig.loop, rig.disk)
    assert rig.answers == [None]
    assert rig.recorded() == set()
    rig.put((last - 1, EXTENTS))
    rig.store.drop([last])
    rig.store.flush_clears()
    drain(rig.loop, rig.disk)
    assert rig.recorded() == {last - 1}
    assert stored_if(rig, GEOMETRY) == {last - 1, last}, "also once it was dropped"
    rig.store.grow(GEOMETRY, ())
    rig.store.flush_clears()
    drain(rig.loop, rig.disk)
    assert stored_if(rig, GEOMETRY) == {last - 1}


# -- memory -----------------------------------------------------------------------------------


def test_writes_of_pages_need_no_buffers_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host waits for them.  Neither the first write of a page nor a repeated one, which is read
    back, nor the first of a page that came with a larger volume asks for memory then."""
    rig = growing()
    rig.store.prepare_growth(GEOMETRY, rig.answers.append)
    drain(rig.loop, rig.disk)

    def refuse(length_bytes: int) -> memoryview:
        raise OSError(errno.ENOMEM, "cannot allocate memory")

    monkeypatch.setattr(page_writer, "aligned", refuse)
    rig.add((5, 6))
    rig.fail()
    rig.add((6, 7))
    drain(rig.loop, rig.disk)
    rig.store.grow(GEOMETRY, new_page_states(SMALL, GEOMETRY))
    rig.store.drop([EDGE])
    rig.store.flush_clears()
    drain(rig.loop, rig.disk)
    assert rig.store.settled
    assert not rig.store.failing
    assert stored_if(rig, GEOMETRY) == {5, 6, *range(40, EXTENTS)} - {EDGE}


@pytest.mark.interpreted
def test_growth_without_memory_is_refused_and_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = growing()

    def refuse(length_bytes: int) -> memoryview:
        raise OSError(errno.ENOMEM, "cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(page_writer, "aligned", refuse)
        with pytest.raises(OSError, match="cannot allocate memory"):
            rig.store.prepare_growth(GEOMETRY, rig.answers.append)
    rig.put((3, 4))
    assert stored_if(rig, GEOMETRY) == {3, *range(EDGE, EXTENTS)}, "the last page is as before"
    rig.store.prepare_growth(GEOMETRY, rig.answers.append)
    drain(rig.loop, rig.disk)
    assert rig.answers == [None, None]


def test_a_read_that_brings_nothing_is_no_proof(rig: Rig) -> None:
    """A page is read back into the buffer that it was written from."""
    rig.add((5, 6))
    rig.fail()
    rig.add((6, 7))
    rig.finish()
    (read,) = rig.disk.pending
    rig.disk.pending.clear()
    read.done(None)
    assert rig.store.failing
    assert isinstance(rig.answers[1], OSError)


# -- without waiting --------------------------------------------------------------------------


def test_what_is_noted_counts_and_is_written_when_somebody_asks(rig: Rig) -> None:
    rig.store.note([(EDGE - 2, EDGE + 2)])
    rig.loop.run_soon()
    assert rig.places == []
    assert rig.recorded() == {EDGE - 2, EDGE - 1, EDGE, EDGE + 1}
    assert not rig.store.covers(EDGE, EDGE + 1)
    assert rig.store.destage(rig.answers.append)
    assert len(rig.places) == 2, "each page once, at once"
    rig.finish()
    assert rig.answers == []
    rig.finish()
    assert rig.answers == [None]
    assert rig.store.covers(EDGE - 2, EDGE + 2)
    assert rig.stored() == rig.recorded()
    assert not rig.store.destage(rig.answers.append)
    assert rig.answers == [None]


def test_a_destage_tells_of_its_error(rig: Rig) -> None:
    rig.store.note([(1, 2), (EDGE, EDGE + 1)])
    rig.store.destage(rig.answers.append)
    rig.fail()
    rig.finish()
    assert [error.errno for error in rig.answers if error] == [errno.EIO]
    assert rig.store.destage(rig.answers.append), "one page still lacks something"


def test_what_is_noted_rides_along_and_is_covered_at_once_if_it_never_left(rig: Rig) -> None:
    rig.store.note([(1, 2)])
    rig.put((2, 3))
    assert rig.store.covers(1, 3)
    rig.store.drop([1])
    rig.store.note([(1, 2)])
    assert rig.store.covers(1, 2)
