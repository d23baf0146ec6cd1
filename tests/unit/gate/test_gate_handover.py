"""gate: an extent that goes to another node takes its dirt along, and brings it back."""

from __future__ import annotations

import pytest

from bitmapd.gate.blockset import BlockSet
from tests.support.mirror import PER_EXTENT, Answers, Mirror, settled


@pytest.fixture
def mirror() -> Mirror:
    return Mirror(piecewise=True)


def give(mirror: Mirror, *extents: int) -> list[tuple[int, int]]:
    """As the other node's side does it: out of the gate and out of the record in one event."""
    dirt = mirror.gate.give(extents)
    mirror.store.drop(extents)
    return dirt


def taken_over(
    mirror: Mirror, extent: int, dirt: list[tuple[int, int]], embargo: bool = False
) -> None:
    mirror.store.add([(extent, extent + 1)], (), lambda error: None)
    mirror.run()
    mirror.gate.take_over(dirt, [extent] if embargo else [])


def taken(mirror: Mirror) -> list[tuple[int, int]]:
    mirror.gate.take_era(lambda: None)
    mirror.turn()
    return list(mirror.gate.taken.runs())


# -- what goes along --------------------------------------------------------------------------


def test_dirt_of_this_era_and_of_earlier_ones_goes_along_by_name(mirror: Mirror) -> None:
    mirror.put(4)
    mirror.put(12)
    mirror.gate.take_era(lambda: None)
    mirror.put(6, 2)
    assert give(mirror, 1) == [(4, 5), (6, 8)]
    assert not mirror.gate.is_dirty(4, 8)
    assert list(mirror.gate.taken.runs()) == [(12, 13)], "others stay"


def test_dirt_of_neighbours_is_one_run(mirror: Mirror) -> None:
    mirror.put(6, 4)
    assert give(mirror, 2, 1) == [(6, 10)]


def test_a_clean_extent_has_no_dirt_and_leaves_no_age(mirror: Mirror) -> None:
    mirror.put(4)
    assert give(mirror, 2) == []
    assert give(mirror, 1) == [(4, 5)]
    assert mirror.gate.in_sync
    assert mirror.gate.oldest_dirty_s() is None
    assert mirror.gate.era_since_s is None


def test_what_was_copied_and_not_settled_goes_along_whole(mirror: Mirror) -> None:
    mirror.put(5)
    mirror.put(9)
    assert taken(mirror) == [(5, 6), (9, 10)]
    mirror.gate.copied(5, 6)
    extents = mirror.gate.begin_settle()
    mirror.gate.copied(9, 10)
    assert give(mirror, 1, 2) == [(4, 12)]
    assert extents == set()
    assert mirror.gate.forget_copied() == set()
    mirror.gate.unsettle({1})
    assert mirror.gate.in_sync
    assert mirror.gate.oldest_dirty_s() is None


@pytest.mark.parametrize("kind", ["hold", "suspect"])
def test_what_may_change_on_the_secondary_goes_along_whole(mirror: Mirror, kind: str) -> None:
    mirror.put(4)
    mirror.put(8)
    blocks = BlockSet([(5, 6), (9, 10)])
    getattr(mirror.gate, kind)(blocks)
    assert give(mirror, 1) == [(4, 8)]
    getattr(mirror.gate, {"hold": "release", "suspect": "trust"}[kind])(blocks)
    assert list(mirror.gate.current.runs()) == [(8, 10)], "what is not ours is not made dirty"


def test_the_policy_hears_of_what_goes(mirror: Mirror) -> None:
    mirror.put(4)
    mirror.policy.told.clear()
    give(mirror, 1)
    assert mirror.policy.told == [("dropped", 1)]


# -- copies that began before -----------------------------------------------------------------


def test_a_copy_that_ends_later_counts_only_for_what_is_ours(mirror: Mirror) -> None:
    mirror.put(7, 2)
    assert taken(mirror) == [(7, 9)]
    give(mirror, 1)
    mirror.gate.copied(7, 9)
    assert mirror.gate.begin_settle() == {2}
    mirror.gate.settle({2})
    assert mirror.gate.in_sync


def test_an_extent_given_and_returned_is_not_clean_by_a_copy_from_before(mirror: Mirror) -> None:
    mirror.put(4)
    assert taken(mirror) == [(4, 5)]
    dirt = give(mirror, 1)  # its copy is in flight
    taken_over(mirror, 1, [*dirt, (6, 7)])
    mirror.gate.copied(4, 5)
    assert settled(mirror) == set()
    assert mirror.recorded() == {1}
    assert taken(mirror) == [(4, 5), (6, 7)]


def test_a_settle_that_fails_later_does_not_reach_what_came_back(mirror: Mirror) -> None:
    mirror.put(4)
    assert taken(mirror) == [(4, 5)]
    mirror.gate.copied(4, 5)
    extents = mirror.gate.begin_settle()
    give(mirror, 1)
    taken_over(mirror, 1, [(5, 6)])
    mirror.gate.unsettle(extents)
    assert not mirror.gate.taken, "its dirt came back by name"
    assert list(mirror.gate.current.runs()) == [(5, 6)]


# -- embargo ----------------------------------------------------------------------------------


def test_nothing_is_taken_under_embargo(mirror: Mirror) -> None:
    taken_over(mirror, 1, [(4, 6)], embargo=True)
    mirror.loop.advance(3.0)
    assert not mirror.gate.wants_era
    mirror.put(7)
    mirror.put(8)
    assert mirror.gate.wants_era
    assert taken(mirror) == [(8, 9)]
    assert list(mirror.gate.current.runs()) == [(4, 6), (7, 8)]
    assert mirror.gate.oldest_dirty_s() == 0.0, "its age goes along"
    mirror.gate.free([1, 2])
    assert mirror.gate.wants_era
    assert taken(mirror) == [(4, 6), (7, 9)]


def test_a_recovery_does_not_take_what_is_under_embargo(mirror: Mirror) -> None:
    mirror.put(8)
    taken_over(mirror, 1, [], embargo=True)
    mirror.loop.advance(3.0)
    mirror.gate.take_recorded()
    assert list(mirror.gate.taken.runs()) == [(8, 12)]
    assert list(mirror.gate.current.runs()) == [(4, 9)]


def test_an_extent_under_embargo_is_not_clean(mirror: Mirror) -> None:
    taken_over(mirror, 1, [], embargo=True)
    assert not mirror.gate.is_clean(1)
    assert not mirror.gate.in_sync
    assert mirror.gate.may_differ(4, 5)
    mirror.gate.drop_all_clean()
    assert mirror.recorded() == {1}
    mirror.gate.free_all()
    assert mirror.gate.is_clean(1)
    assert mirror.gate.in_sync


def test_an_embargo_ends_when_the_extent_goes_back(mirror: Mirror) -> None:
    taken_over(mirror, 1, [(4, 5)], embargo=True)
    assert give(mirror, 1) == [(4, 5)]
    taken_over(mirror, 1, [(4, 5)])
    assert taken(mirror) == [(4, 5)]


# -- what comes unasked, and what does not come -----------------------------------------------


def test_guesses_that_come_are_told_and_room_is_made_for_them() -> None:
    mirror = Mirror(limit_extents=2, piecewise=True)
    mirror.policy.unloved = [0, 1]
    for extent in range(4):
        taken_over(mirror, extent, [])
    mirror.policy.told.clear()
    mirror.gate.guessed([(2, 3), (3, 4)])
    mirror.run()
    assert mirror.policy.told[:3] == [("added", 2, 3), ("added", 3, 4), ("victims", 2)]
    assert mirror.recorded() == {2, 3}


def test_guesses_that_are_refused_are_told(mirror: Mirror) -> None:
    mirror.gate.refused([(2, 4), (6, 7)])
    assert mirror.policy.told == [("dropped", 2, 3, 6)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_resync_takes_what_is_on_its_way_into_the_record_if_it_is_ours(shared: bool) -> None:
    mirror = Mirror(piecewise=shared)
    mirror.write(0)
    mirror.turn()
    assert mirror.pending(mirror.record) == ["write"]
    mirror.gate.take_recorded()
    assert mirror.gate.is_dirty(0, PER_EXTENT) is not shared


def test_nothing_of_a_shared_volume_is_dirty_before_it_is_ours(mirror: Mirror) -> None:
    answers: Answers = []
    mirror.gate.take_everything(answers.append)
    assert not mirror.gate.is_dirty(0, 8 * PER_EXTENT)
    mirror.run()
    assert answers == [None]
    assert list(mirror.gate.current.runs()) == [(0, 8 * PER_EXTENT)]


def test_what_is_in_doubt_until_its_extent_is_given_goes_along() -> None:
    """It is covered no more while it is being given, and ours until it has left."""
    mirror = Mirror(piecewise=True, owns=lambda extent: True)
    mirror.put(4)
    settled_dirt = BlockSet()
    settled_dirt.add(5, 6)
    mirror.gate.suspect(settled_dirt)
    taken(mirror)
    mirror.store.drop([1])
    mirror.gate.trust(settled_dirt)
    assert mirror.gate.give([1]) == [(4, 6)]


def test_an_embargo_holds_back_its_own_extent_only(mirror: Mirror) -> None:
    taken_over(mirror, 1, [], embargo=True)  # nothing of it is dirty
    taken_over(mirror, 2, [(8, 9)], embargo=True)
    mirror.put(12)
    assert mirror.gate.embargoed_extents == 2
    assert taken(mirror) == [(12, 13)]
    mirror.gate.free([1, 2])
    assert mirror.gate.embargoed_extents == 0
    assert taken(mirror) == [(8, 9), (12, 13)]
