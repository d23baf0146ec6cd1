"""gate/gate with a direct path: what hosts write without asking, and what may leave the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from bitmapd.copier.holding import SAVED_S
from bitmapd.copier.rounds import MARKS_SHARE, URGENT_ERA_S
from bitmapd.gate.elsewhere import Collected, Run
from bitmapd.gate.routes import DIRECT, GATE, GROWTH_HITS, URGENT_HITS
from tests.support.mirror import (
    BLOCK,
    EXTENT,
    PER_EXTENT,
    Answers,
    Mirror,
    ScriptedPolicy,
    begun,
    settled,
)


def direct(*extents: int, **options: Any) -> Mirror:
    """A mirror in which these extents are direct, equal on both sides, and kept by the policy."""
    mirror = Mirror(direct=True, **options)
    mirror.policy.kept = set(extents)
    for extent in extents:
        mirror.put(extent * PER_EXTENT)
        mirror.put(extent * PER_EXTENT)
    synchronise(mirror)
    assert mirror.routes.count_direct == len(extents)
    mirror.policy.told.clear()
    return mirror


def barrier(mirror: Mirror) -> list[str]:
    """End the era; the list has an entry once the barrier has passed."""
    passed: list[str] = []
    mirror.gate.take_era(lambda: passed.append("passed"))
    mirror.turn()
    while mirror.kernel.can_step:
        mirror.kernel.step()
    mirror.turn()
    return passed


def failed_barrier(mirror: Mirror) -> None:
    mirror.gate.take_era(lambda: None)
    mirror.kernel.give_up()
    mirror.turn()


def copy(mirror: Mirror) -> None:
    """Copy and settle what is taken."""
    for first, stop in list(mirror.gate.taken.runs()):
        mirror.gate.copied(first, stop)
    settled(mirror)


def synchronise(mirror: Mirror) -> None:
    """Until a barrier finds nothing new."""
    for _ in range(3):
        barrier(mirror)
        copy(mirror)
    assert mirror.gate.in_sync


def host_writes(mirror: Mirror, block: int, count: int = 1) -> Answers:
    answers: Answers = []
    mirror.kernel.write("write", block * BLOCK, b"\7" * (count * BLOCK), answers.append, False)
    return answers


def host_wrote(mirror: Mirror, block: int, count: int = 1) -> None:
    answers = host_writes(mirror, block, count)
    while mirror.primary.pending:
        mirror.finish(mirror.primary)
    assert answers == [None]


# -- what becomes known, and when -------------------------------------------------------------


def test_without_a_direct_path_there_is_nothing_to_ask_for() -> None:
    mirror = Mirror()
    gate = mirror.gate
    assert not gate.is_written_elsewhere
    assert not gate.wants_era
    assert not gate.era_is_urgent
    mirror.put(0)
    assert gate.wants_era


def test_blocks_written_directly_are_known_after_the_barrier() -> None:
    mirror = direct(0, 1)
    gate = mirror.gate
    assert gate.is_written_elsewhere
    assert not gate.wants_era
    host_wrote(mirror, 2, 3)
    assert (gate.writes, gate.dirty_blocks()) == (4, 0), "the gate has not seen it"
    assert gate.wants_era
    assert not gate.in_sync
    assert barrier(mirror) == ["passed"]
    assert list(gate.taken.runs()) == [(2, 5)]
    assert mirror.policy.told == [("wrote", 0, 2, True)]
    copy(mirror)
    assert not gate.in_sync, "something may have been counted and not marked yet"
    assert gate.era_is_urgent, "and as nothing has come since, asking again costs nothing"
    barrier(mirror)
    assert gate.in_sync
    assert not gate.wants_era
    assert not gate.era_is_urgent


def test_the_load_of_hosts_is_what_the_kernel_counts() -> None:
    for mirror in (direct(0), Mirror()):
        requests, written = mirror.gate.host_load
        if mirror.gate.is_written_elsewhere:
            host_wrote(mirror, 0, 2)
        else:
            mirror.put(0, 2)
        assert mirror.gate.host_load == (requests + 1, written + 2 * BLOCK)


def test_the_policy_is_told_once_of_each_recorded_extent() -> None:
    mirror = direct(0, 1)
    for block in (0, 2, 5):
        host_wrote(mirror, block)
    barrier(mirror)
    assert mirror.policy.told == [("wrote", 0, 1, True), ("wrote", 1, 2, True)]


def test_the_policy_is_not_told_of_what_has_left_the_record() -> None:
    """A barrier that failed leaves blocks to the next one that may have left the record."""
    mirror = Mirror(direct=True)
    mirror.put(0)
    failed_barrier(mirror)
    copy(mirror)
    assert mirror.recorded() == set()
    mirror.policy.told.clear()
    barrier(mirror)
    assert list(mirror.gate.taken.runs()) == [(0, 1)], "copied again for nothing, which is safe"
    assert mirror.policy.told == []


def test_a_direct_write_in_flight_holds_the_barrier_up() -> None:
    mirror = direct(0)
    host_wrote(mirror, 2)
    answers = host_writes(mirror, 0)
    passed = barrier(mirror)
    assert (answers, passed) == ([], [])
    mirror.finish(mirror.primary)
    mirror.run()
    assert (answers, passed) == ([None], ["passed"])
    assert list(mirror.gate.taken.runs()) == [(0, 1), (2, 3)]


def test_writes_through_the_gate_of_the_old_era_hold_the_copier_up() -> None:
    mirror = direct(0)
    mirror.write(1)  # it came to the gate by another way than the kernel's table
    passed = barrier(mirror)
    assert mirror.kernel.busy is None, "the barrier itself is over"
    assert passed == []
    mirror.finish(mirror.primary)
    assert passed == ["passed"]


def test_a_failed_barrier_brings_nothing_and_the_next_one_all() -> None:
    mirror = direct(0)
    host_wrote(mirror, 0)
    passed: list[str] = []
    mirror.gate.take_era(lambda: passed.append("passed"))
    for _ in range(3):
        mirror.kernel.step()
    mirror.kernel.give_up()
    mirror.turn()
    assert passed == ["passed"], "copying goes on with what is known"
    assert not mirror.gate.taken
    assert mirror.gate.wants_era
    assert mirror.told("barrier-error")
    barrier(mirror)
    assert list(mirror.gate.taken.runs()) == [(0, 1)]


def test_many_hits_that_could_have_been_direct_make_the_era_urgent() -> None:
    mirror = Mirror(direct=True)
    mirror.put(0)
    for _ in range(URGENT_HITS - 1):
        mirror.put(0)
    assert not mirror.gate.era_is_urgent
    mirror.put(0)
    assert mirror.gate.era_is_urgent


def in_one_era() -> Mirror:
    """A mirror that is copied, whose present era does not end by itself."""
    mirror = begun(direct=True)
    mirror.copier.rounds.era_interval_s = 1000.0
    mirror.run(1.0)  # the era that began with the other interval
    return mirror


def test_a_busy_gate_is_relieved_at_once_and_in_the_same_era() -> None:
    mirror = in_one_era()
    era, barriers = mirror.gate.era, mirror.path.barriers
    for _ in range(GROWTH_HITS):
        mirror.put(0)
    mirror.run(0.0)
    assert mirror.routes.loads == 0, "the first write is a miss"
    mirror.put(0)
    mirror.run(0.0)
    assert (mirror.routes.loads, mirror.routes.count_direct) == (1, 1)
    assert (mirror.gate.era, mirror.path.barriers) == (era, barriers)


def test_copying_goes_on_while_the_table_grows() -> None:
    mirror = in_one_era()
    for _ in range(1 + GROWTH_HITS):
        mirror.put(0)
    answers = host_writes(mirror, PER_EXTENT)  # in flight, so that the table waits
    mirror.loop.advance(0.0)
    while mirror.kernel.can_step:
        mirror.kernel.step()
    assert mirror.kernel.busy is not None
    assert not mirror.copier.rounds.idle
    mirror.copier.rounds.hurry()
    mirror.copier.wake()
    mirror.turn()
    assert mirror.routes.loads == 0, "and no barrier was begun, which the kernel would refuse"
    mirror.run(0.0)
    assert answers == [None]
    assert mirror.routes.loads >= 1


def test_growth_is_paid_from_what_time_has_brought() -> None:
    mirror = in_one_era()
    mirror.path.window_s_total, mirror.path.window_s_last = SAVED_S - 0.02, 0.03
    for _ in range(1 + GROWTH_HITS):
        mirror.put(0)
    mirror.run(0.9)
    assert mirror.routes.loads == 0, "20 ms were left, and 30 are expected"
    mirror.run(0.2)
    assert mirror.routes.loads == 1


def test_no_era_ends_early_for_growth_that_has_to_wait() -> None:
    mirror = in_one_era()
    mirror.path.window_s_total = mirror.path.window_s_last = SAVED_S
    barriers = mirror.path.barriers
    for _ in range(1 + URGENT_HITS):
        mirror.put(0)
    mirror.run(2 * URGENT_ERA_S)
    mirror.copier.rounds.step(running=True)
    mirror.run()
    assert (mirror.path.barriers, mirror.routes.loads) == (barriers, 0)


@pytest.mark.parametrize("trouble", ["another node waits", "it must be loaded", "no room"])
def test_what_growth_cannot_do_is_left_to_a_barrier(trouble: str) -> None:
    mirror = in_one_era()
    if trouble == "no room":
        mirror.routes._max_runs = 0
    elif trouble == "it must be loaded":
        mirror.routes.adopt([(3, 4)])
        mirror.routes.take_adopted()
    barriers = mirror.path.barriers
    if trouble == "another node waits":
        for _ in range(1 + GROWTH_HITS):
            mirror.put(PER_EXTENT)
        mirror.run(0.0)
        assert mirror.routes.is_direct(1)
    for _ in range(1 + URGENT_HITS):
        mirror.put(0)
    if trouble == "another node waits":
        mirror.path.leave([1], lambda: None)
    mirror.run(URGENT_ERA_S)
    assert mirror.path.barriers > barriers


@pytest.mark.parametrize(
    ("marks_s", "lasts_s"),
    [
        (MARKS_SHARE, 1),
        (MARKS_SHARE + 0.001, 2),
        (2 * MARKS_SHARE + 0.001, 4),
        (4 * MARKS_SHARE + 0.001, 5),
    ],
)
def test_an_era_is_longer_after_one_that_let_many_writes_wait(
    marks_s: float, lasts_s: float
) -> None:
    other = Another()
    mirror = begun(elsewhere=(other,))
    mirror.copier.rounds.longest_era_s = 5.0
    other.wants_barrier = True
    mirror.run(1.0)
    assert other.done is not None
    ended, other.done, other.marks_s = other.done, None, marks_s
    ended([])
    mirror.run(lasts_s - 1)
    assert other.done is None
    mirror.run(2.0)
    assert other.done is not None


def test_an_era_is_not_longer_while_the_record_waits_to_lose_something() -> None:
    other = Another()
    mirror = begun(elsewhere=(other,))
    mirror.copier.rounds.longest_era_s = 5.0

    def end_era() -> None:
        assert other.done is not None
        ended, other.done, other.marks_s = other.done, None, 1.0
        ended([])

    mirror.policy.kept = {0}
    mirror.put(0)
    other.wants_barrier = True
    mirror.run(1.0)
    end_era()
    mirror.run(5.0)  # it is copied
    end_era()
    other.open = {0}
    mirror.policy.unloved = [0]
    mirror.gate.limit_extents = 0
    assert mirror.gate.over_limit
    mirror.run(2.0)
    assert other.done is None, "nothing is on its way out"
    mirror.gate.tick()
    assert other.cooled == [0]
    for _ in range(3):
        mirror.run(1.0)
        end_era()
    mirror.gate.limit_extents = 1
    mirror.run(4.0)
    assert other.done is None, "the limit was raised"


def test_the_table_has_what_is_durably_recorded() -> None:
    mirror = Mirror(direct=True)
    mirror.put(0)
    mirror.put(0)
    mirror.write(2 * PER_EXTENT)  # its record write is not done
    mirror.turn()
    barrier(mirror)
    assert mirror.kernel.table == [(0, EXTENT, DIRECT), (EXTENT, 8 * EXTENT, GATE)]


# -- how old ----------------------------------------------------------------------------------


def test_the_age_of_a_direct_write_begins_when_everything_was_known() -> None:
    mirror = direct(0)
    gate = mirror.gate
    mirror.loop.advance(100.0)
    gate.tick()
    assert gate.oldest_dirty_s() is None
    mirror.loop.advance(0.5)
    host_wrote(mirror, 0)
    mirror.loop.advance(0.5)
    gate.tick()
    assert gate.oldest_dirty_s() == 100.0, "not an hour that passed without a write"
    failed_barrier(mirror)
    assert gate.oldest_dirty_s() == 100.0, "a failure makes nothing younger"
    gate.take_era(lambda: None)
    assert gate.oldest_dirty_s() == 100.0, "nor does a barrier under way"
    mirror.loop.advance(1.0)
    mirror.run()
    assert gate.oldest_dirty_s() == 100.0
    copy(mirror)
    assert gate.oldest_dirty_s() == 101.0, "when the barrier began that brought it"
    barrier(mirror)
    assert gate.oldest_dirty_s() is None


def test_a_late_barrier_makes_no_write_older() -> None:
    """Nothing was written while it was under way for a minute; then somebody writes."""
    mirror = direct(0)
    gate = mirror.gate
    barrier(mirror)
    barrier(mirror)
    gate.take_era(lambda: None)
    mirror.loop.advance(60.0)
    gate.tick()
    mirror.run()
    host_wrote(mirror, 0)
    mirror.loop.advance(0.5)
    assert gate.oldest_dirty_s() == 60.0


def test_a_direct_write_may_be_older_than_one_through_the_gate() -> None:
    mirror = direct(0)
    host_wrote(mirror, 0)
    mirror.loop.advance(1.0)
    mirror.put(PER_EXTENT)
    assert mirror.gate.oldest_dirty_s() == 0.0, "nobody knows when the other one came"
    barrier(mirror)
    assert mirror.gate.oldest_dirty_s() == 0.0


def test_a_write_through_the_gate_may_be_older_than_a_direct_one() -> None:
    mirror = direct(0)
    mirror.put(PER_EXTENT)
    mirror.loop.advance(1.0)
    for _ in range(3):
        barrier(mirror)
    mirror.gate.tick()
    host_wrote(mirror, 0)
    assert mirror.gate.oldest_dirty_s() == 0.0
    barrier(mirror)
    assert mirror.gate.oldest_dirty_s() == 0.0


# -- what may differ, and what is clean -------------------------------------------------------


def test_what_is_open_may_differ_while_something_was_written() -> None:
    mirror = direct(0)
    gate = mirror.gate
    assert not gate.may_differ(0, 1)
    assert not gate.is_clean(0), "it may be written at any time"
    host_wrote(mirror, 1)
    assert gate.may_differ(0, 1)
    assert gate.may_differ(PER_EXTENT - 1, PER_EXTENT + 1)
    assert not gate.may_differ(PER_EXTENT, 2 * PER_EXTENT), "not direct, so the gate would know"
    for _ in range(2):
        barrier(mirror)
    assert not gate.may_differ(0, 1)
    assert gate.may_differ(1, 2)


# -- leaving the record -----------------------------------------------------------------------


def test_an_open_extent_leaves_after_the_barrier_that_follows_its_move() -> None:
    mirror = direct(0, 1)
    mirror.policy.kept = set()
    mirror.policy.expiring = [0]
    mirror.gate.tick()
    mirror.policy.expiring = []
    mirror.gate.drop_all_clean()
    assert mirror.recorded() == {0, 1}
    barrier(mirror)
    assert mirror.kernel.table == [
        (0, EXTENT, GATE),
        (EXTENT, 2 * EXTENT, DIRECT),
        (2 * EXTENT, 8 * EXTENT, GATE),
    ]
    mirror.gate.tick()
    assert mirror.recorded() == {0, 1}, "what was written before the move is not known yet"
    barrier(mirror)
    mirror.gate.tick()
    assert mirror.recorded() == {1}
    assert mirror.policy.told[-1] == ("dropped", 0)


def test_settled_and_not_wanted_an_open_extent_is_cooled() -> None:
    mirror = direct(0)
    mirror.policy.kept = set()
    host_wrote(mirror, 0)
    barrier(mirror)
    copy(mirror)
    assert mirror.recorded() == {0}
    assert mirror.routes.is_cooling(0)


def test_an_extent_of_the_gate_leaves_at_once() -> None:
    mirror = Mirror(direct=True)
    mirror.put(0)
    barrier(mirror)
    copy(mirror)
    assert mirror.recorded() == set()


def cool(mirror: Mirror, extent: int) -> None:
    """Have it moved to the gate and closed."""
    mirror.policy.expiring = [extent]
    mirror.gate.tick()
    mirror.policy.expiring = []
    barrier(mirror)
    barrier(mirror)
    assert mirror.routes.closed() == [extent]


def test_a_cooled_extent_that_is_written_again_stays_until_it_is_clean() -> None:
    mirror = direct(0)
    mirror.policy.kept = set()
    cool(mirror, 0)
    host_wrote(mirror, 0)
    mirror.gate.tick()
    assert mirror.recorded() == {0}
    barrier(mirror)
    for first, stop in list(mirror.gate.taken.runs()):
        mirror.gate.copied(first, stop)
    mirror.gate.tick()
    assert mirror.recorded() == {0}, "copied, not flushed"
    settled(mirror)
    assert mirror.recorded() == set()
    assert mirror.routes.closed() == []


def test_a_cooled_extent_that_is_wanted_again_stays() -> None:
    mirror = direct(0)
    cool(mirror, 0)
    mirror.gate.tick()
    assert mirror.recorded() == {0}
    assert not mirror.routes.is_cooling(0)
    mirror.put(0)
    barrier(mirror)
    assert mirror.routes.count_direct == 1


@pytest.mark.parametrize("barriers", [1, 2])
def test_what_hosts_write_while_it_cools_is_direct_again(barriers: int) -> None:
    mirror = direct(0, 1)
    mirror.policy.expiring = [0, 1]
    mirror.gate.tick()
    mirror.policy.expiring, mirror.policy.kept = [], {0}
    for _ in range(barriers):
        barrier(mirror)
    assert mirror.routes.count_direct == 0
    host_wrote(mirror, 0)
    mirror.gate.tick()
    assert not mirror.routes.is_cooling(0), "although it is not clean"
    assert mirror.recorded() >= {0}
    barrier(mirror)
    assert mirror.routes.count_direct == 1


def test_what_nobody_wants_cools_on_though_it_is_written() -> None:
    mirror = direct(0)
    mirror.policy.kept = set()
    cool(mirror, 0)
    host_wrote(mirror, 0)
    mirror.gate.tick()
    assert mirror.routes.is_cooling(0)


def test_what_the_limit_has_cooled_cools_on_though_it_is_written() -> None:
    mirror = direct(0, 1)
    mirror.policy.unloved = [0]
    mirror.gate.limit_extents = 1
    mirror.gate.tick()
    assert mirror.routes.is_cooling(0)
    barrier(mirror)
    host_wrote(mirror, 0)
    mirror.gate.tick()
    assert mirror.routes.is_cooling(0)


def test_unsettled_extents_are_not_cooled() -> None:
    mirror = direct(0)
    host_wrote(mirror, 0)
    barrier(mirror)
    mirror.policy.expiring = [0]
    mirror.gate.tick()
    assert not mirror.routes.is_cooling(0)


# -- the limit --------------------------------------------------------------------------------


class RudePolicy(ScriptedPolicy):
    """Names every extent as a victim, whatever the gate says of it."""

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        self.told.append(("victims", count))
        return range(8)


def test_room_is_made_before_the_record_is_full() -> None:
    mirror = direct(0, 1, 2)
    mirror.policy.unloved = [2, 1]
    mirror.gate.limit_extents = 32
    mirror.gate.tick()
    assert ("victims", 1) not in mirror.policy.told
    mirror.gate.limit_extents = 3
    mirror.gate.tick()
    assert not mirror.routes.is_cooling(2), "a limit this low has nothing to spare"
    mirror.gate.limit_extents = 2
    mirror.gate.tick()
    assert mirror.routes.is_cooling(2)
    mirror.gate.tick()
    assert not mirror.routes.is_cooling(1), "one is on its way already"
    mirror.gate.limit_extents = 1
    mirror.gate.tick()
    assert mirror.routes.is_cooling(1), "never the same one twice"
    barrier(mirror)
    barrier(mirror)
    mirror.gate.tick()
    assert mirror.recorded() == {0}, "although the policy would keep them"
    mirror.gate.limit_extents = 0
    mirror.policy.unloved = [0]
    mirror.gate.tick()
    assert mirror.routes.is_cooling(0), "those that are gone count no more"


def test_no_room_is_kept_for_what_cannot_be_missed() -> None:
    mirror = direct(*range(32), extents=32)
    mirror.policy.unloved = [5]
    mirror.gate.limit_extents = 32
    mirror.gate.tick()
    assert not mirror.routes.is_cooling(5), "all of the volume is recorded, and may be"


def test_room_is_kept_for_what_can_be_missed() -> None:
    mirror = direct(*range(31), extents=64)
    mirror.policy.unloved = [5, 6]
    mirror.gate.limit_extents = 32
    mirror.gate.tick()
    assert [extent for extent in range(31) if mirror.routes.is_cooling(extent)] == [5]


def test_what_the_limit_has_cooled_is_wanted_again_once_it_is_raised() -> None:
    mirror = direct(0, 1)
    mirror.policy.unloved = [0]
    mirror.gate.limit_extents = 1
    mirror.gate.tick()
    barrier(mirror)
    mirror.gate.limit_extents = 2
    host_wrote(mirror, 0)
    mirror.gate.tick()
    assert not mirror.routes.is_cooling(0)


def test_one_part_in_sixteen_is_kept_free() -> None:
    mirror = direct(*range(8))
    mirror.gate.limit_extents = 16
    mirror.gate.tick()
    assert ("victims", 1) not in mirror.policy.told
    mirror.gate.limit_extents = 8
    mirror.gate.tick()
    assert ("victims", 1) not in mirror.policy.told, "a sixteenth of eight is none"


def test_victims_that_may_not_go_are_not_waited_for() -> None:
    mirror = direct(0, 1)
    host_wrote(mirror, 0)
    barrier(mirror)  # extent 0 is dirty, extents 2 to 7 are not recorded
    policy = RudePolicy()
    mirror.gate.set_policy(policy)
    mirror.gate.limit_extents = 0
    mirror.gate.tick()
    assert mirror.routes.is_cooling(1)
    assert not mirror.routes.is_cooling(0)
    mirror.gate.tick()
    assert policy.told[-1] == ("victims", 1), "extent 0 is still in excess"


# -- several who write elsewhere --------------------------------------------------------------


class Another:
    """An `Elsewhere` that is answered by hand."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.cooled: list[int] = []
        self.left: list[int] = []
        self.leaving: list[Callable[[], None]] = []
        self.written = self.being_written = self.wants_barrier = self.is_urgent = False
        self.can_grow = False
        self.host_load = (0, 0)
        self.held_s = (0.0, 0.0)
        self.marks_s = 0.0
        self.done: Collected | None = None
        self.grown: tuple[list[Run], Callable[[], None]] | None = None

    def is_open(self, extent: int) -> bool:
        return extent in self.open

    def cool(self, extents: Iterable[int]) -> None:
        self.cooled += extents

    def warm(self, extents: Iterable[int]) -> None:
        self.cooled = [extent for extent in self.cooled if extent not in set(extents)]

    def closed(self) -> list[int]:
        return [extent for extent in self.cooled if extent not in self.open]

    def missed(self) -> list[int]:
        return []

    def gone(self, extents: Iterable[int]) -> None:
        self.left += extents

    def leave(self, extents: Iterable[int], call: Callable[[], None]) -> None:
        self.leaving.append(call)

    def gated_hit(self, first: int, stop: int) -> None:
        """Nothing is written there that came through the gate."""

    def barrier(self, recorded: Iterable[Run], done: Collected) -> None:
        self.done = done

    def grow(self, recorded: Iterable[Run], done: Callable[[], None]) -> None:
        self.grown = (list(recorded), done)

    def when_urgent(self, call: Callable[[], None]) -> None:
        """It never is."""


def test_an_era_is_over_when_all_of_them_say_so() -> None:
    one, other = Another(), Another()
    mirror = Mirror(elsewhere=(one, other))
    mirror.put(0)
    ready: list[int] = []
    mirror.gate.take_era(lambda: ready.append(1))
    assert one.done is not None
    assert other.done is not None
    one.done([(2, 3)])
    mirror.loop.run_soon()
    assert not ready
    other.done([(4, 5)])
    mirror.loop.run_soon()
    assert ready
    assert list(mirror.gate.taken.runs()) == [(0, 1), (2, 3), (4, 5)]


def test_growth_is_over_when_all_who_can_have_grown() -> None:
    one, other, third = Another(), Another(), Another()
    one.can_grow = other.can_grow = True
    one.held_s, other.held_s = (0.5, 0.2), (0.25, 0.25)
    mirror = Mirror(elsewhere=(one, other, third))
    mirror.put(0)
    assert mirror.gate.can_grow_direct
    assert mirror.gate.held_s == (0.75, 0.25)
    done: list[int] = []
    mirror.gate.grow_direct(lambda: done.append(1))
    assert third.grown is None
    for path in (one, other):
        assert path.grown is not None
        assert path.grown[0] == [(0, 1)], "what is recorded durably"
        mirror.loop.run_soon()
        assert not done
        path.grown[1]()
        assert not done, "in a later event"
    mirror.loop.run_soon()
    assert done == [1]


def test_an_extent_is_left_when_all_of_them_have_left_it() -> None:
    one, other = Another(), Another()
    mirror = Mirror(elsewhere=(one, other), piecewise=True)
    left: list[int] = []
    mirror.gate.when_left([1], lambda: left.append(1))
    one.leaving[0]()
    mirror.loop.run_soon()
    assert not left
    other.leaving[0]()
    mirror.loop.run_soon()
    assert left


def test_what_one_of_them_does_not_know_is_as_old_as_the_latest_full_barrier() -> None:
    one, other = Another(), Another()
    mirror = Mirror(elsewhere=(one, other))
    one.written = True
    assert not mirror.gate.in_sync
    before = mirror.gate.oldest_dirty_s()
    mirror.loop.advance(3.0)
    for answers in ((None, []), ([], None), ([], [])):
        assert mirror.gate.oldest_dirty_s() == before
        mirror.gate.take_era(lambda: None)
        for elsewhere, answer in zip((one, other), answers, strict=True):
            assert elsewhere.done is not None
            elsewhere.done(answer)
        mirror.loop.run_soon()
    assert mirror.gate.oldest_dirty_s() == before + 3.0


def test_an_extent_leaves_when_none_of_them_may_write_it() -> None:
    one, other = Another(), Another()
    mirror = Mirror(elsewhere=(one, other))
    gate = mirror.gate
    mirror.store.add([(0, 1)], (), lambda error: None)
    mirror.run()
    one.open, other.open = {0}, {0}
    assert not gate.is_clean(0)
    one.open.clear()
    assert not gate.is_clean(0)
    other.open.clear()
    assert gate.is_clean(0)
    gate.drop_all_clean()
    assert (one.left, other.left) == ([0], [0])


# -- what is given to another node ------------------------------------------------------------
def shared(*extents: int) -> tuple[Mirror, set[int]]:
    """One whose extents are given away, and those that are."""
    gone: set[int] = set()
    mirror = direct(*extents, piecewise=True, owns=lambda extent: extent not in gone)
    return mirror, gone


def give(mirror: Mirror, gone: set[int], extent: int) -> list[Run]:
    dirt = mirror.gate.give([extent])
    gone.add(extent)
    mirror.store.drop([extent])
    return dirt


def test_an_extent_is_left_once_hosts_cannot_write_it_past_the_gate() -> None:
    mirror, gone = shared(1, 2)
    left: list[str] = []
    mirror.gate.when_left([1, 5], lambda: left.append("left"))
    mirror.turn()
    assert left == []
    assert mirror.gate.era_is_urgent
    host_wrote(mirror, 1 * PER_EXTENT)
    barrier(mirror)
    assert left == ["left"]
    assert not mirror.kernel.may_be_direct() & {1}
    # What was written last may be in the era that no barrier has ended.
    assert give(mirror, gone, 1) == [(PER_EXTENT, 2 * PER_EXTENT)]
    assert give(mirror, gone, 5) == []


def test_one_that_is_not_direct_is_left_at_once() -> None:
    mirror, _ = shared(1)
    left: list[str] = []
    mirror.gate.when_left([4], lambda: left.append("left"))
    mirror.turn()
    assert left == ["left"]


def test_what_the_next_barrier_brings_of_it_is_not_copied_here() -> None:
    mirror, gone = shared(1, 2)
    mirror.gate.when_left([1], lambda: None)
    barrier(mirror)
    give(mirror, gone, 1)
    era = mirror.kernel.era
    era.marks[era.current].update({PER_EXTENT, 2 * PER_EXTENT})  # before the table was changed
    era.written_bytes += 2 * BLOCK
    barrier(mirror)
    assert list(mirror.gate.taken.runs()) == [(2 * PER_EXTENT, 2 * PER_EXTENT + 1)]
