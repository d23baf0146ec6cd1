"""gate/gate: what a host sees, record before data, eras and barriers."""

from __future__ import annotations

import errno

import pytest

from bitmapd.media.buffers import aligned
from bitmapd.record.layout import EXTENTS_PER_PAGE
from tests.support.mirror import (
    BLOCK,
    EXTENT,
    PER_EXTENT,
    Answers,
    Mirror,
    copy_everything,
    number,
    settled,
)


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


# -- what a host sees -------------------------------------------------------------------------


def test_it_looks_like_the_primary_cut_to_the_volume() -> None:
    mirror = Mirror(size_bytes=2 * EXTENT + BLOCK)
    mirror.primary.size_bytes = 3 * EXTENT
    assert mirror.gate.name == "primary"
    assert mirror.gate.size_bytes == 2 * EXTENT + BLOCK
    assert mirror.gate.block_size_bytes == mirror.primary.block_size_bytes
    mirror.gate.close()
    assert mirror.primary.connected, "the primary is not the gate's to close"


def test_reads_and_flushes_go_to_the_primary_alone(mirror: Mirror) -> None:
    mirror.put(0, fill=7)
    answers: Answers = []
    buffer = aligned(BLOCK)
    mirror.record.calls.clear()
    mirror.gate.read(0, buffer, answers.append)
    mirror.gate.flush(answers.append)
    pieces: list[list[tuple[int, int]]] = []
    mirror.gate.allocation(0, BLOCK, lambda error, found: pieces.append(found))
    mirror.run()
    assert answers == [None, None]
    assert bytes(buffer) == b"\7" * BLOCK
    assert pieces == [[(BLOCK, 0)]]
    assert mirror.gate.reads == 1
    assert mirror.record.calls == []


# -- record before acknowledgement ------------------------------------------------------------


def test_a_miss_is_durable_in_the_record_before_the_primary_is_touched(mirror: Mirror) -> None:
    answers = mirror.write(5)
    mirror.turn()
    assert mirror.pending(mirror.record) == ["write"]
    assert mirror.record.fua == [True]
    assert mirror.primary.calls == []
    assert not mirror.gate.current, "nothing is dirty before the data are on their way"
    mirror.finish(mirror.record)
    assert mirror.stored() == {1}
    assert mirror.pending(mirror.primary) == ["write"]
    assert answers == []
    mirror.finish(mirror.primary)
    assert answers == [None]
    assert (mirror.gate.writes, mirror.gate.hits, mirror.gate.misses) == (1, 0, 1)
    assert mirror.gate.written_bytes == BLOCK


def test_a_hit_does_no_record_io(mirror: Mirror) -> None:
    mirror.put(4)
    mirror.record.calls.clear()
    answers = mirror.write(6, fua=True)
    assert mirror.primary.pending, "a hit reaches the primary in the same event"
    mirror.run()
    assert answers == [None]
    assert mirror.record.calls == []
    assert mirror.primary.fua == [False, True]
    assert (mirror.gate.hits, mirror.gate.misses) == (1, 1)
    assert list(mirror.gate.current.runs()) == [(4, 5), (6, 7)]


def test_a_write_over_several_extents_records_all_of_them(mirror: Mirror) -> None:
    answers = mirror.write(3, 6)
    mirror.turn()
    assert len(mirror.record.pending) == 1
    mirror.finish(mirror.record)
    assert mirror.stored() == {0, 1, 2}
    mirror.finish(mirror.primary)
    assert answers == [None]


def test_concurrent_misses_share_one_record_write(mirror: Mirror) -> None:
    answers = [mirror.write(extent * PER_EXTENT) for extent in range(6)]
    mirror.turn()
    assert len(mirror.record.pending) == 1
    mirror.run()
    assert answers == [[None]] * 6
    assert mirror.store.updates == 1


def test_a_record_error_fails_the_write_and_spares_the_primary(mirror: Mirror) -> None:
    answers = mirror.write(5)
    mirror.turn()
    mirror.fail(mirror.record, errno.EIO)
    assert number(answers) == errno.EIO
    assert mirror.primary.calls == []
    assert mirror.gate.in_sync, "nothing became dirty"


def test_a_zeroing_that_the_record_refuses_spares_the_primary(mirror: Mirror) -> None:
    answers: Answers = []
    mirror.gate.zero(0, BLOCK, answers.append)
    mirror.turn()
    mirror.fail(mirror.record, errno.ENOSPC)
    assert number(answers) == errno.ENOSPC
    assert mirror.primary.calls == []


def test_a_data_error_reaches_the_host_and_the_block_stays_dirty(mirror: Mirror) -> None:
    for block in (5, 6):  # a miss, then a hit
        answers = mirror.write(block)
        mirror.turn()
        if mirror.record.pending:
            mirror.finish(mirror.record)
        mirror.fail(mirror.primary, errno.EIO)
        assert number(answers) == errno.EIO
        assert mirror.gate.is_dirty(block, block + 1)
    assert mirror.stored() == {1}


@pytest.mark.parametrize("kind", ["zero", "trim"])
def test_zeroing_and_trimming_are_writes(mirror: Mirror, kind: str) -> None:
    for expected_hits in (0, 1):  # a miss, then a hit
        answers: Answers = []
        getattr(mirror.gate, kind)(BLOCK, 2 * BLOCK, answers.append, fua=True)
        mirror.run()
        assert answers == [None]
        assert mirror.gate.hits == expected_hits
    assert mirror.primary.asked(kind) == [(1, 2), (1, 2)]
    assert mirror.stored() == {0}
    assert list(mirror.gate.current.runs()) == [(1, 3)]
    assert mirror.gate.writes == 2


class TestAcrossPages:
    """A write over two pages of the record: the extent on the page that is done first is clean
    until the data go, so it may be dropped before the other page is done."""

    EDGE = EXTENTS_PER_PAGE  # the first extent of the second page

    @pytest.fixture
    def mirror(self) -> Mirror:
        return Mirror(EXTENTS_PER_PAGE + 8, extent_bytes=BLOCK, hollow=True)

    @pytest.fixture(params=["write", "mark"])
    def answers(self, request: pytest.FixtureRequest, mirror: Mirror) -> Answers:
        """The two record writes of a write, or a mark, are on their way."""
        if request.param == "write":
            answers = mirror.write(self.EDGE - 1, 2)
        else:
            answers = []
            mirror.gate.mark(self.EDGE - 1, self.EDGE + 1, answers.append)
        mirror.turn()
        assert len(mirror.record.pending) == 2
        return answers

    def expire(self, mirror: Mirror) -> None:
        mirror.policy.expiring = [self.EDGE - 1]
        mirror.gate.tick()
        mirror.policy.expiring = []
        mirror.turn()

    def test_what_was_dropped_and_cleared_is_recorded_again(
        self, mirror: Mirror, answers: Answers
    ) -> None:
        mirror.finish(mirror.record)
        self.expire(mirror)
        mirror.finish(mirror.record, 1)  # the clear
        assert (mirror.recorded(), mirror.stored()) == ({self.EDGE}, set())
        mirror.finish(mirror.record)  # the second page
        assert (answers, mirror.primary.calls) == ([], [])
        assert not mirror.gate.current
        mirror.run()
        assert answers == [None]
        assert mirror.stored() == {self.EDGE - 1, self.EDGE}
        assert mirror.gate.is_dirty(self.EDGE - 1, self.EDGE)

    def test_what_was_dropped_and_is_stored_still_costs_no_further_write(
        self, mirror: Mirror, answers: Answers
    ) -> None:
        mirror.finish(mirror.record)
        mirror.store.drop([self.EDGE - 1])
        mirror.finish(mirror.record)
        assert mirror.record.pending == []
        mirror.run()
        assert answers == [None]
        assert mirror.recorded() == {self.EDGE - 1, self.EDGE}
        assert mirror.gate.is_dirty(self.EDGE - 1, self.EDGE + 1)

    def test_it_waits_for_both_pages(self, mirror: Mirror, answers: Answers) -> None:
        mirror.finish(mirror.record, 1)
        assert (answers, mirror.primary.calls) == ([], [])
        mirror.fail(mirror.record, errno.EIO)
        assert number(answers) == errno.EIO
        assert not mirror.gate.current


def test_a_miss_on_an_extent_whose_clear_was_not_written_needs_no_io(mirror: Mirror) -> None:
    mirror.put(0)
    copy_everything(mirror)
    settled(mirror)
    assert mirror.recorded() == set()
    answers = mirror.write(1)
    assert mirror.primary.pending, "the stored copy never lost it"
    mirror.run()
    assert answers == [None]
    assert (mirror.gate.misses, mirror.store.updates) == (2, 1)
    assert mirror.stored() == {0}


# -- eras and barriers ------------------------------------------------------------------------


def test_the_barrier_waits_for_writes_of_the_old_era_only(mirror: Mirror) -> None:
    mirror.put(0)
    passed: list[str] = []
    mirror.write(0)  # old era: a hit in flight
    answers: Answers = []
    mirror.gate.zero(BLOCK, BLOCK, answers.append)  # old era, too
    mirror.gate.take_era(lambda: passed.append("barrier"))
    assert mirror.gate.era == 2
    new = mirror.write(2)  # new era
    mirror.turn()
    assert passed == []
    mirror.finish(mirror.primary, 2)  # the one of the new era lands
    assert (passed, new) == ([], [None])
    mirror.finish(mirror.primary)
    assert passed == [], "one of the old era is still in flight"
    another = mirror.write(3)
    mirror.finish(mirror.primary)
    assert answers == [None]
    assert passed == ["barrier"]
    assert another == [], "writes of the new era need not land for the barrier"
    assert list(mirror.gate.taken.runs()) == [(0, 2)]
    assert list(mirror.gate.current.runs()) == [(2, 4)]


def test_a_hit_is_the_last_write_of_the_old_era(mirror: Mirror) -> None:
    mirror.put(0)
    passed: list[bool] = []
    mirror.write(0)
    mirror.write(1)
    mirror.gate.take_era(lambda: passed.append(True))
    mirror.finish(mirror.primary)
    assert passed == []
    mirror.finish(mirror.primary)
    assert passed == [True]


def test_a_write_that_waits_for_the_record_belongs_to_the_era_it_lands_in(mirror: Mirror) -> None:
    answers = mirror.write(0)
    mirror.turn()
    passed: list[bool] = []
    mirror.gate.take_era(lambda: passed.append(True))
    mirror.turn()
    assert passed == [True], "its data are not on their way: nothing to wait for"
    assert not mirror.gate.taken
    mirror.run()
    assert answers == [None]
    assert list(mirror.gate.current.runs()) == [(0, 1)]


def test_the_barrier_is_never_passed_inside_the_call(mirror: Mirror) -> None:
    passed: list[bool] = []
    mirror.gate.take_era(lambda: passed.append(True))
    assert passed == []
    mirror.turn()
    assert passed == [True]


def test_eras_that_were_not_copied_add_up(mirror: Mirror) -> None:
    for block in (0, 9):
        mirror.put(block)
        mirror.gate.take_era(lambda: None)
        mirror.turn()
    assert list(mirror.gate.taken.runs()) == [(0, 1), (9, 10)]
    assert mirror.gate.dirty_blocks() == 2


def test_hot_means_written_since_the_last_barrier(mirror: Mirror) -> None:
    mirror.put(0)
    assert mirror.gate.is_hot(0, 1)
    mirror.gate.take_era(lambda: None)
    assert not mirror.gate.is_hot(0, 1)
    assert mirror.gate.is_dirty(0, 1)
    mirror.put(1)
    assert mirror.gate.is_hot(0, 4)
    assert not mirror.gate.is_hot(2, 4)


def test_idle_dirt_is_what_nobody_has_written_since_the_barrier(mirror: Mirror) -> None:
    for block in (0, 1, 2 * PER_EXTENT, 3 * PER_EXTENT):
        mirror.put(block)
    assert mirror.gate.idle_dirt(9) == []
    mirror.gate.take_era(lambda: None)
    mirror.run()
    mirror.put(3 * PER_EXTENT + 1)
    assert mirror.gate.idle_dirt(9) == [0, 2]
    assert mirror.gate.idle_dirt(1) == [0]


def test_an_empty_record_leaves_nothing_to_wait_for() -> None:
    mirror = Mirror()
    mirror.gate.take_recorded()
    mirror.loop.advance(60.0)
    assert mirror.gate.oldest_dirty_s() is None


def test_recovery_marks_every_block_of_every_recorded_extent() -> None:
    mirror = Mirror(size_bytes=3 * EXTENT - BLOCK)
    for extent in (0, 2):
        mirror.put(extent * PER_EXTENT)
    copy_everything(mirror)
    mirror.loop.advance(3.0)
    mirror.gate.settle(())  # nobody settled these extents: they stay in the record
    assert not mirror.gate.taken
    mirror.gate.take_recorded()
    assert list(mirror.gate.taken.runs()) == [(0, 4), (8, 11)]
    assert mirror.gate.oldest_dirty_s() == 0.0, "the copies of before are not settled"
    mirror.gate.take_recorded()
    assert mirror.gate.dirty_blocks() == 7


def test_everything_may_be_recorded_already_when_it_is_taken() -> None:
    mirror = Mirror()
    mirror.policy.kept = set(range(mirror.geometry.extents))
    mirror.gate.take_everything(lambda error: None)
    mirror.run()
    answers: Answers = []
    mirror.gate.take_everything(answers.append)
    assert answers == [], "never from inside the call"
    mirror.run()
    assert answers == [None]
    assert mirror.recorded() == set(range(mirror.geometry.extents))
