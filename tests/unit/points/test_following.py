"""points/following: when barriers come for cuts and for the kernel's table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bitmapd.copier.holding import HELD_SHARE, SAVED_S
from bitmapd.copier.rounds import URGENT_ERA_S
from bitmapd.gate.withheld import Withheld
from bitmapd.points.following import AGAIN_S, HELD_S, QUIET_S, Following
from tests.support.sim import SimLoop


class Path:
    """A direct path whose state a test sets, and the gate over it."""

    def __init__(self) -> None:
        self.is_still = self.is_busy = self.is_urgent = self.is_cutting = False
        self.wants_barrier = True
        self.answers = Withheld()
        self.host_load = (0, 0)
        self.wanted: list[bool] = []
        self.barriers: list[Callable[[bool], None]] = []
        self.urgent: Callable[[], None] = lambda: None
        self.can_grow_direct = False
        self.held_s = (0.0, 0.0)
        self.growths: list[Callable[[], None]] = []

    def still(self, *, wanted: bool) -> None:
        self.wanted.append(wanted)

    def when_urgent(self, call: Callable[[], None]) -> None:
        self.urgent = call

    def follow(self, done: Callable[[bool], None]) -> None:
        self.barriers.append(done)

    def grow_direct(self, done: Callable[[], None]) -> None:
        self.growths.append(done)


class Case:
    def __init__(self) -> None:
        self.path, self.loop, self.looks = Path(), SimLoop(), 0
        self.following = Following(self.path, self.path, self.loop, self.look)  # type: ignore

    def look(self) -> None:
        self.looks += 1

    def step(self, *, wants_cut: bool = False) -> int:
        """How many barriers were begun up to now."""
        self.following.step(self.loop.time(), wants_cut=wants_cut)
        return len(self.path.barriers)

    def may_cut(self) -> bool:
        """If so, it is cut."""
        may = self.following.may_cut(self.loop.time())
        if may:
            self.following.cut(self.loop.time())
        return may

    def busy(self) -> None:
        """Hosts write all the time."""
        load = self.path.host_load
        self.path.host_load = (load[0] + 1, load[1] + 4096)


@pytest.fixture
def case() -> Case:
    made = Case()
    made.busy()
    return made


def test_a_cut_is_made_when_all_is_still_and_not_before(case: Case) -> None:
    assert not case.may_cut()
    assert case.following.under_way
    assert case.step(wants_cut=True) == 1
    case.path.barriers[0](True)
    assert (case.following.under_way, case.looks) == (False, 1)
    assert not case.may_cut()  # what was written before the first one's drain is not known
    case.path.barriers[1](True)
    assert case.path.wanted == [True, True]
    case.path.is_still = True
    assert case.may_cut()
    assert case.path.wanted[-1] is False  # from the next barrier on
    assert len(case.path.barriers) == 2


def test_a_cut_that_is_not_wanted_any_more_leaves_nothing_gated(case: Case) -> None:
    case.may_cut()
    case.step()
    assert case.path.wanted == [True]  # the barrier under way goes on as it was asked for
    case.path.barriers[0](True)
    case.step()
    assert case.path.wanted == [True, False]


def test_for_the_cut_of_a_group_all_is_still_and_stays_so_for_a_while(case: Case) -> None:
    case.following.hold(case.loop.time())
    assert case.step() == 1
    case.path.barriers[0](True)
    assert case.step() == 2
    case.path.barriers[1](True)
    case.path.is_still = True
    assert case.following.is_still
    case.path.is_urgent = True
    assert case.step() == 2
    assert case.path.wanted == [True] * 3
    case.loop.advance(HELD_S)
    assert case.step() == 3
    assert case.path.wanted[-1] is False


def test_after_the_cut_of_a_group_the_table_follows_once_answers_are_given(case: Case) -> None:
    case.following.hold(case.loop.time())
    case.path.is_still = case.path.is_urgent = True
    case.path.answers.begin()
    case.following.cut(case.loop.time())
    assert case.path.wanted == [False]
    assert case.step() == 0
    case.path.answers.release()
    assert case.step() == 1
    assert case.path.wanted == [False] * 3, "held after the cut"


def test_after_a_barrier_that_failed_the_next_waits(case: Case) -> None:
    case.may_cut()
    case.path.barriers[0](False)
    assert not case.may_cut()
    assert len(case.path.barriers) == 1
    case.loop.advance(AGAIN_S)
    assert not case.may_cut()
    assert len(case.path.barriers) == 2


def test_a_barrier_of_a_round_is_waited_for(case: Case) -> None:
    case.path.is_busy = True
    assert not case.may_cut()
    assert not case.path.barriers


def test_urgent_ones_are_apart_and_more_so_in_a_cut(case: Case) -> None:
    case.path.is_urgent = True
    assert case.step() == 1
    case.path.barriers[0](True)
    assert case.step() == 1
    case.loop.advance(URGENT_ERA_S)
    case.busy()
    assert case.step() == 2
    case.path.barriers[1](True)
    case.path.is_still = True
    assert case.may_cut()
    case.path.is_cutting = True
    for begun, wait_s in ((3, URGENT_ERA_S), (4, URGENT_ERA_S), (5, 2 * URGENT_ERA_S)):
        case.loop.advance(wait_s)
        case.busy()
        assert case.step() == begun
        case.path.barriers[-1](True)
        case.loop.advance(wait_s / 2)
        case.busy()
        assert case.step() == begun


def test_who_waits_for_the_table_has_it_looked_at(case: Case) -> None:
    case.path.is_urgent = True
    case.step()
    case.path.urgent()
    case.path.urgent()
    case.loop.advance(URGENT_ERA_S)
    assert case.looks == 1
    case.path.urgent()
    case.following.stop()
    case.following.stop()
    case.loop.advance(URGENT_ERA_S)
    assert case.looks == 1


def test_when_hosts_are_quiet_what_is_left_gets_known(case: Case) -> None:
    assert case.step() == 0
    case.loop.advance(QUIET_S)
    case.busy()
    assert case.step() == 0
    case.loop.advance(QUIET_S)
    assert case.step() == 1
    case.path.barriers[0](True)
    assert case.step() == 1
    case.path.wants_barrier = False
    case.loop.advance(QUIET_S)
    assert case.step() == 1


def test_a_barrier_that_is_asked_for_comes_once(case: Case) -> None:
    case.following.hurry()
    assert case.step() == 1
    case.path.barriers[0](True)
    assert case.step() == 1
    case.path.wants_barrier = False
    case.following.hurry()
    assert case.step() == 1
    case.path.wants_barrier = True
    assert case.step() == 1


# -- growth of the table, which ends no era ------------------------------------------------------


def test_the_table_grows_at_once_where_that_is_enough(case: Case) -> None:
    case.path.can_grow_direct = case.path.is_urgent = True
    case.path.urgent()
    case.loop.advance(0.0)
    assert case.looks == 1
    assert case.step() == 0
    assert len(case.path.growths) == 1
    assert case.following.under_way
    assert case.step() == 0, "one at a time"
    assert len(case.path.growths) == 1
    case.path.can_grow_direct = case.path.is_urgent = False
    case.path.growths[0]()
    assert not case.following.under_way
    assert case.looks == 2


def test_growth_is_paid_from_time(case: Case) -> None:
    case.path.can_grow_direct, case.path.held_s = True, (2 * SAVED_S, 0.1)
    case.path.is_urgent = True
    assert case.step() == 0, "a barrier would hold writes, too"
    assert case.path.growths == []
    case.loop.advance((SAVED_S + 0.1) / HELD_SHARE + 0.001)
    assert case.looks == 1
    case.step()
    assert len(case.path.growths) == 1


def test_growth_waits_for_its_turn_while_a_cut_is_read(case: Case) -> None:
    case.path.is_still = True
    assert case.may_cut()
    case.path.can_grow_direct = case.path.is_cutting = True
    case.loop.advance(1.0)
    case.step()
    assert len(case.path.growths) == 1, "the first one since the cut"
    case.path.growths[0]()
    case.loop.advance(0.9)
    case.step()
    assert len(case.path.growths) == 1
    case.loop.advance(0.11)
    case.step()
    assert len(case.path.growths) == 2


def test_what_a_cut_took_out_comes_back_though_it_is_not_paid_for(case: Case) -> None:
    """With a slow table the two barriers of a cut alone use up what `holding` allows."""
    path = case.path
    path.is_still = True
    assert case.may_cut()
    path.can_grow_direct, path.held_s = True, (2 * SAVED_S, 0.1)
    path.is_cutting = True
    case.step()
    assert len(path.growths) == 1, "what has no block to be read"
    path.growths[0]()
    path.is_cutting = False
    case.loop.advance(URGENT_ERA_S)
    case.step()
    assert len(path.growths) == 2, "the rest, when it was read"
    path.growths[1]()
    case.loop.advance(URGENT_ERA_S)
    case.step()
    assert len(path.growths) == 2, "what comes then is paid for"


@pytest.mark.parametrize("of_a_group", [False, True])
def test_so_does_what_was_moved_for_a_cut_that_is_not_made(case: Case, *, of_a_group: bool) -> None:
    path = case.path
    if of_a_group:
        case.following.hold(case.loop.time())
        case.step()
        case.loop.advance(HELD_S)
    else:
        assert not case.may_cut()
    path.barriers[0](True)
    path.can_grow_direct, path.held_s = True, (2 * SAVED_S, 0.1)
    case.loop.advance(URGENT_ERA_S)
    case.step()
    assert len(path.growths) == 1


def test_a_cut_comes_before_growth_and_waits_for_one(case: Case) -> None:
    case.path.can_grow_direct = True
    case.step(wants_cut=True)
    assert case.path.growths == []
    case.step()
    case.path.is_busy = True
    assert not case.may_cut()
    assert case.path.barriers == []
    case.path.is_busy = False
    case.path.growths[0]()
    assert not case.may_cut()
    assert len(case.path.barriers) == 1


def test_nothing_grows_while_answers_are_withheld_or_a_group_is_still(case: Case) -> None:
    case.path.can_grow_direct = True
    case.path.answers.begin()
    case.step()
    case.path.answers.release()
    case.following.hold(case.loop.time())
    case.step()
    assert case.path.growths == []
