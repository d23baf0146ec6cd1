"""gate/gate: what rides along with a miss, and what makes room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.support.mirror import (
    PER_EXTENT,
    Mirror,
    ScriptedPolicy,
    copy_everything,
    settled,
)


@pytest.fixture
def mirror() -> Mirror:
    return Mirror()


def full_and_half_dirty() -> Mirror:
    """Extents 0 and 1 fill the record; 0 is clean, 1 is not."""
    mirror = Mirror(limit_extents=2)
    for extent in (0, 1):
        mirror.put(extent * PER_EXTENT)
    mirror.policy.kept = {0, 1}
    copy_everything(mirror)
    settled(mirror)
    mirror.put(PER_EXTENT)
    return mirror


def test_predictions_ride_along_with_the_miss(mirror: Mirror) -> None:
    mirror.policy.predictions = [(2, 4), (7, 8)]
    mirror.put(4)
    assert mirror.store.updates == 1
    assert mirror.stored() == {1, 2, 3, 7}
    assert mirror.policy.told == [
        ("wrote", 1, 2, False),
        ("predict", 1, 2, 100, 1),
        ("added", 1, 2),
        ("added", 2, 4),
        ("added", 7, 8),
    ]
    mirror.put(8)
    assert mirror.policy.told[-1] == ("wrote", 2, 3, True)


def test_a_full_record_makes_room_from_clean_extents_only() -> None:
    mirror = full_and_half_dirty()
    mirror.policy.unloved = [1, 0]
    updates = mirror.store.updates
    mirror.put(2 * PER_EXTENT)
    assert mirror.recorded() == {1, 2}
    assert mirror.stored() == {0, 1, 2}, "the page was on its way by then"
    assert (mirror.store.updates, mirror.store.clears) == (updates + 1, 0)
    mirror.put(3 * PER_EXTENT)
    assert mirror.recorded() == {1, 2, 3}, "dirty extents stay whatever the limit says"
    assert mirror.stored() == {1, 2, 3}, "the clear rode along with the next page"
    assert (mirror.store.updates, mirror.store.clears) == (updates + 2, 0)
    assert mirror.gate.over_limit


def test_room_is_made_while_the_disk_writes_the_page() -> None:
    mirror = full_and_half_dirty()
    mirror.policy.unloved = [0]
    answers = mirror.write(2 * PER_EXTENT)
    mirror.loop.run_soon()
    assert mirror.record.pending
    assert mirror.recorded() == {1, 2}
    mirror.run()
    assert answers == [None]
    updates = mirror.store.updates
    mirror.put(0)
    assert mirror.store.updates == updates, "what was evicted last is still in the stored copy"


def test_a_write_that_waits_looks_again_at_what_was_evicted_meanwhile() -> None:
    mirror = full_and_half_dirty()
    mirror.policy.unloved = [0]
    mirror.policy.unloved = [0]
    answers = mirror.write(0, 3 * PER_EXTENT)  # extent 0 is clean, 2 is missing
    mirror.loop.run_soon()
    assert mirror.record.pending
    assert mirror.recorded() == {1, 2}
    mirror.run()
    assert answers == [None]
    assert mirror.recorded() == mirror.stored() == {0, 1, 2}


def test_a_miss_evicts_twice_what_it_brings_and_the_tick_the_rest() -> None:
    mirror = Mirror(extents=16)
    for extent in range(10):
        mirror.put(extent * PER_EXTENT)
    mirror.policy.kept = set(range(10))
    copy_everything(mirror)
    settled(mirror)
    mirror.gate.limit_extents = 3
    mirror.policy.unloved = list(range(10))
    mirror.put(12 * PER_EXTENT)
    assert mirror.recorded() == {*range(2, 10), 12}
    mirror.policy.predictions = [(14, 16)]
    mirror.put(13 * PER_EXTENT)
    assert mirror.recorded() == {8, 9, 12, 13, 14, 15}
    mirror.gate.tick()
    assert mirror.recorded() == {12, 13, 14, 15}


def test_what_the_policy_names_without_asking_is_looked_at() -> None:
    mirror = full_and_half_dirty()
    mirror.policy.victims = lambda count, is_clean, now_s: [1, 2, 0]  # type: ignore[method-assign]
    mirror.put(2 * PER_EXTENT)
    assert mirror.recorded() == {1, 2}


def test_a_miss_never_evicts_itself() -> None:
    mirror = Mirror(limit_extents=1)
    mirror.policy.unloved = [0, 1]
    answers = mirror.write(0, 2 * PER_EXTENT)
    mirror.run()
    assert answers == [None]
    assert mirror.stored() == {0, 1}
    assert mirror.primary.asked("write") == [(0, 2 * PER_EXTENT)]


def test_a_miss_that_needs_no_io_does_not_evict_itself_either() -> None:
    mirror = Mirror(limit_extents=0)
    mirror.put(0)
    copy_everything(mirror)
    settled(mirror)
    mirror.policy.unloved = [0]
    mirror.write(1)
    assert mirror.primary.pending
    assert mirror.recorded() == {0}, "its data are on their way to the primary"


def test_tick_enforces_a_limit_that_was_lowered(mirror: Mirror) -> None:
    mirror.policy.kept = set(range(8))
    for extent in range(4):
        mirror.put(extent * PER_EXTENT)
    copy_everything(mirror)
    settled(mirror)
    mirror.policy.unloved = [3, 0, 1, 2]
    mirror.gate.limit_extents = 2
    assert mirror.gate.over_limit
    mirror.gate.tick()
    mirror.run()
    assert mirror.stored() == {1, 2}
    assert not mirror.gate.over_limit


def test_cooling_takes_clean_extents_and_leaves_dirty_ones(mirror: Mirror) -> None:
    mirror.policy.kept = set(range(8))
    for extent in (0, 1, 2):
        mirror.put(extent * PER_EXTENT)
    copy_everything(mirror)
    settled(mirror)
    mirror.put(0)
    mirror.policy.expiring = [0, 1, 2]
    mirror.gate.tick()
    mirror.run()
    assert mirror.stored() == {0}
    assert mirror.store.clears == 1, "one lazy write for all of them"
    assert mirror.policy.told[-1] == ("dropped", 1, 2)


def test_another_policy_takes_over(mirror: Mirror) -> None:
    other = ScriptedPolicy()
    mirror.gate.set_policy(other)
    mirror.put(0)
    assert other.told[0] == ("wrote", 0, 1, False)
    assert mirror.policy.told == []


class RudePolicy(ScriptedPolicy):
    """Names every extent as a victim, clean or not."""

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        return range(8)


def test_a_miss_that_needs_no_record_write_keeps_its_own_extents() -> None:
    """Its extents were given up and are still in the stored copy: nothing has to be waited for, and
    until its blocks are marked they look clean."""
    mirror = Mirror(limit_extents=1)
    mirror.policy.kept = {0, 1}
    mirror.put(0)
    mirror.put(PER_EXTENT)
    mirror.copier.start()
    mirror.run(1.0)
    mirror.run(1.0)
    assert mirror.gate.in_sync
    mirror.policy.unloved = [0]
    mirror.gate.tick()  # extent 0 leaves the record; its page is not written yet
    assert mirror.recorded() == {1}
    assert mirror.stored() == {0, 1}
    mirror.gate.set_policy(RudePolicy())
    answers = mirror.write(0, fill=2)
    mirror.run()
    assert answers == [None]
    assert mirror.recorded() == {0}, "the other one, which is clean, goes"
    assert 0 in mirror.stored()
