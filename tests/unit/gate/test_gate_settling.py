"""gate/gate: what may be cleared and when, how old what is dirty is, marks, growing."""

from __future__ import annotations

import dataclasses
import errno

import pytest

from bitmapd.gate.blockset import BlockSet
from tests.support.mirror import (
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


# -- settling ---------------------------------------------------------------------------------


def test_an_extent_leaves_the_record_after_copy_and_settle(mirror: Mirror) -> None:
    mirror.put(0)
    copy_everything(mirror)
    assert mirror.gate.has_copied
    assert not mirror.gate.in_sync
    extents = mirror.gate.begin_settle()
    assert extents == {0}
    assert not mirror.gate.has_copied
    assert not mirror.gate.in_sync, "not flushed yet"
    assert not mirror.gate.is_clean(0)
    mirror.gate.settle(extents)
    assert mirror.gate.in_sync
    assert mirror.gate.settles == 1
    assert mirror.recorded() == set()
    assert mirror.stored() == {0}, "clears are lazy"
    mirror.gate.tick()
    mirror.run()
    assert mirror.stored() == set()
    assert mirror.policy.told[-1] == ("dropped", 0)


def test_an_extent_that_the_policy_wants_stays_and_is_clean(mirror: Mirror) -> None:
    mirror.policy.kept = {0}
    mirror.put(0)
    copy_everything(mirror)
    settled(mirror)
    assert mirror.recorded() == {0}
    assert mirror.gate.is_clean(0)
    assert not mirror.gate.is_clean(1), "what is not recorded is not called clean"


@pytest.mark.parametrize("where", ["current", "taken", "copied"])
def test_an_extent_dirtied_again_survives_the_settle(mirror: Mirror, where: str) -> None:
    mirror.put(0)
    copy_everything(mirror)
    extents = mirror.gate.begin_settle()
    mirror.put(1)
    if where != "current":
        mirror.gate.take_era(lambda: None)
        mirror.turn()
    if where == "copied":
        mirror.gate.copied(1, 2)
    mirror.gate.settle(extents)
    assert mirror.recorded() == {0}
    assert not mirror.gate.in_sync


def test_a_write_in_flight_keeps_its_extent(mirror: Mirror) -> None:
    mirror.put(0)
    copy_everything(mirror)
    extents = mirror.gate.begin_settle()
    mirror.write(1)
    mirror.gate.settle(extents)
    mirror.gate.drop_all_clean()
    assert mirror.recorded() == {0}


def test_a_failed_flush_takes_whole_extents_back(mirror: Mirror) -> None:
    mirror.put(5)
    copy_everything(mirror)
    mirror.gate.unsettle(mirror.gate.begin_settle())
    assert list(mirror.gate.taken.runs()) == [(4, 8)]
    assert not mirror.gate.may_differ(0, 4)
    assert mirror.stored() == {1}


def test_a_lost_secondary_takes_back_what_was_not_flushed(mirror: Mirror) -> None:
    mirror.put(5)
    copy_everything(mirror)
    mirror.gate.forget_copied()
    assert not mirror.gate.has_copied
    assert list(mirror.gate.taken.runs()) == [(4, 8)]


def test_only_clean_extents_are_dropped_before_a_stop(mirror: Mirror) -> None:
    mirror.policy.kept = {0, 1, 2}
    for extent in (0, 1, 2):
        mirror.put(extent * PER_EXTENT)
    copy_everything(mirror)
    settled(mirror)
    mirror.put(PER_EXTENT)
    mirror.gate.drop_all_clean()
    assert mirror.recorded() == {1}
    mirror.gate.drop_all_clean()
    assert mirror.policy.told[-1] == ("dropped", 0, 2)


def test_may_differ_until_both_sides_are_flushed(mirror: Mirror) -> None:
    assert not mirror.gate.may_differ(0, 32)
    mirror.put(5)
    assert mirror.gate.may_differ(5, 6)
    assert not mirror.gate.may_differ(6, 8)
    copy_everything(mirror)
    assert not mirror.gate.is_dirty(5, 6)
    assert mirror.gate.may_differ(6, 8), "copied and not flushed: by extents"
    extents = mirror.gate.begin_settle()
    assert mirror.gate.may_differ(5, 6)
    mirror.gate.settle(extents)
    assert not mirror.gate.may_differ(5, 6)


# -- how old ----------------------------------------------------------------------------------


def test_the_oldest_dirty_write_is_followed_through_every_stage(mirror: Mirror) -> None:
    gate = mirror.gate
    assert gate.oldest_dirty_s() is None
    mirror.loop.advance(10.0)
    mirror.put(0)
    mirror.loop.advance(1.0)
    mirror.put(1)  # not older than the first
    assert gate.oldest_dirty_s() == 10.0
    gate.take_era(lambda: None)
    mirror.turn()
    assert gate.oldest_dirty_s() == 10.0
    mirror.put(8)  # at 11 s, in the new era
    gate.copied(0, 2)
    assert gate.oldest_dirty_s() == 10.0, "copied, not flushed"
    extents = gate.begin_settle()
    gate.settle(extents)
    assert gate.oldest_dirty_s() == 11.0
    gate.take_era(lambda: None)
    gate.copied(8, 9)
    settled(mirror)
    assert gate.oldest_dirty_s() is None


def test_a_settle_does_not_make_later_copies_young(mirror: Mirror) -> None:
    gate = mirror.gate
    mirror.put(0)
    copy_everything(mirror)
    first = gate.begin_settle()
    mirror.loop.advance(5.0)
    mirror.put(9)
    copy_everything(mirror)
    gate.settle(first)
    assert gate.oldest_dirty_s() == 0.0, "not later than the oldest that may be behind"
    settled(mirror)
    assert gate.oldest_dirty_s() is None


def test_a_failed_flush_keeps_the_age(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.loop.advance(4.0)
    copy_everything(mirror)
    extents = mirror.gate.begin_settle()
    mirror.gate.unsettle(extents)
    assert mirror.gate.oldest_dirty_s() == 0.0
    mirror.gate.unsettle(())
    assert mirror.gate.oldest_dirty_s() == 0.0


# -- marking, growing -------------------------------------------------------------------------


def test_a_mark_records_before_it_makes_dirty(mirror: Mirror) -> None:
    answers: Answers = []
    mirror.gate.mark(3, 5, answers.append)
    mirror.turn()
    assert not mirror.gate.current
    mirror.finish(mirror.record)
    assert answers == [None]
    assert mirror.stored() == {0, 1}
    assert list(mirror.gate.current.runs()) == [(3, 5)]
    assert mirror.policy.told == [("added", 0, 2)]
    assert mirror.gate.oldest_dirty_s() == 0.0
    mirror.loop.advance(1.0)
    mirror.gate.mark(6, 7, answers.append)
    assert answers == [None, None], "recorded already: nothing to wait for"
    assert mirror.gate.oldest_dirty_s() == 0.0
    assert mirror.primary.calls == []


def test_a_mark_that_cannot_be_recorded_marks_nothing(mirror: Mirror) -> None:
    answers: Answers = []
    mirror.gate.mark(3, 4, answers.append)
    mirror.turn()
    mirror.fail(mirror.record, errno.EIO)
    assert number(answers) == errno.EIO
    assert not mirror.gate.current


def test_a_mark_that_is_being_recorded_cannot_be_dropped(mirror: Mirror) -> None:
    answers: Answers = []
    mirror.gate.mark(3, 4, answers.append)
    mirror.turn()
    mirror.policy.expiring = [0]
    mirror.gate.tick()
    mirror.run()
    assert answers == [None]
    assert mirror.stored() == {0}
    assert mirror.gate.is_dirty(3, 4)


def test_a_failed_flush_reports_the_age_of_the_oldest(mirror: Mirror) -> None:
    mirror.put(0)
    copy_everything(mirror)
    extents = mirror.gate.begin_settle()
    mirror.loop.advance(5.0)
    mirror.put(9)
    mirror.gate.take_era(lambda: None)
    mirror.gate.unsettle(extents)
    assert mirror.gate.oldest_dirty_s() == 0.0


@pytest.mark.parametrize("dirty", [False, True])
def test_a_volume_that_grew_has_its_new_part_to_copy(dirty: bool) -> None:
    mirror = Mirror(size_bytes=2 * EXTENT - 512)
    if dirty:
        mirror.put(0)
    mirror.loop.advance(2.0)
    mirror.gate.grow(dataclasses.replace(mirror.geometry, size_bytes=3 * EXTENT))
    assert mirror.gate.size_bytes == 3 * EXTENT
    assert list(mirror.gate.current.runs())[-1] == (7, 12), "the last block was a short one"
    assert mirror.gate.oldest_dirty_s() == (0.0 if dirty else 2.0)


def test_what_is_held_is_not_clean_and_is_copied_when_released(mirror: Mirror) -> None:
    mirror.put(5)
    copy_everything(mirror)
    blocks, others = BlockSet(), BlockSet()
    blocks.add(5, 6)
    others.add(6, 7)
    mirror.gate.hold(blocks)
    mirror.gate.hold(others)
    settled(mirror)
    assert mirror.recorded() == {1}
    assert mirror.gate.dirty_blocks() == 0
    assert not mirror.gate.in_sync
    mirror.loop.advance(3.0)
    mirror.gate.release(blocks)
    assert mirror.gate.is_dirty(5, 6)
    assert mirror.gate.oldest_dirty_s() == 3.0
    mirror.gate.release(others)
    copy_everything(mirror)
    settled(mirror)
    assert mirror.gate.in_sync
    assert mirror.recorded() == set()
