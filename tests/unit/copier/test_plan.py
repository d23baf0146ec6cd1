"""copier/plan: which run is copied next, and how much is in flight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.copier import plan as plan_module
from bitmapd.copier.plan import (
    DUE_SHARE,
    FIRST_RETRY_S,
    HOT_PERIOD_S,
    LAST_RETRY_S,
    Plan,
    Window,
)
from bitmapd.gate.blockset import BlockSet


def cold(first: int, stop: int) -> bool:
    return False


def blocks(*ranges: tuple[int, int]) -> BlockSet:
    made = BlockSet()
    for first, stop in ranges:
        made.add(first, stop)
    return made


def drain(plan: Plan, taken: BlockSet, now_s: float = 0.0, is_hot=cold) -> list[tuple[int, int]]:
    """Copy everything that may be copied, one run after another."""
    runs = []
    while (run := plan.next(taken, now_s, is_hot)) is not None:
        runs.append(run)
        plan.done(*run)
        taken.discard(*run)
    return runs


def test_runs_are_cut_and_bridge_nothing() -> None:
    taken = blocks((3, 4), (5, 15), (100, 102))
    assert drain(Plan(4), taken) == [(3, 4), (5, 9), (9, 13), (13, 15), (100, 102)]
    assert not taken


def test_walk_is_cyclic() -> None:
    plan = Plan(2)
    taken = blocks((10, 12), (20, 22))
    assert plan.next(taken, 0, cold) == (10, 12)
    taken.add(0, 2)
    assert plan.next(taken, 0, cold) == (20, 22)
    assert plan.next(taken, 0, cold) == (0, 2)
    assert plan.next(taken, 0, cold) is None


def test_a_block_in_flight_is_not_handed_out_again() -> None:
    plan = Plan(8)
    taken = blocks((4, 6))
    assert plan.next(taken, 0, cold) == (4, 6)
    assert plan.busy_blocks == 2
    taken.add(0, 12)
    assert plan.next(taken, 0, cold) == (6, 12)
    assert plan.next(taken, 0, cold) == (0, 4)
    assert plan.next(taken, 0, cold) is None
    plan.returned(4, 6)
    assert plan.next(taken, 0, cold) == (4, 6)


def test_what_was_returned_comes_next() -> None:
    plan = Plan(4)
    taken = blocks((0, 12))
    assert plan.next(taken, 0, cold) == (0, 4)
    assert plan.next(taken, 0, cold) == (4, 8)
    plan.returned(0, 4)
    assert plan.next(taken, 0, cold) == (0, 4)


class CountingSet(BlockSet):
    """Counts walks."""

    __slots__ = ("walks",)

    def __init__(self) -> None:
        super().__init__()
        self.walks = 0

    def next_run(self, start: int, limit: int | None = None) -> tuple[int, int] | None:
        self.walks += 1
        return super().next_run(start, limit)


def test_fruitless_walk_is_not_repeated_until_something_changed() -> None:
    plan = Plan(4)
    taken = CountingSet()
    taken.add(0, 8)
    assert plan.next(taken, 0, cold) == (0, 4)
    assert plan.next(taken, 0, cold) == (4, 8)
    assert plan.next(taken, 0, cold) is None
    walks = taken.walks
    plan.done(0, 4)
    taken.discard(0, 4)
    assert plan.next(taken, 0, cold) is None
    assert taken.walks == walks
    # A failed flush puts copied blocks back: nobody tells the plan.
    taken.add(0, 4)
    assert plan.next(taken, 0, cold) == (0, 4)


def test_a_hot_block_is_passed_over_for_a_period_and_then_once_a_period() -> None:
    plan = Plan(8)
    taken = blocks((0, 4))

    def hot(first: int, stop: int) -> bool:
        return first <= 2 < stop

    copied_s = []
    for second in range(30):
        plan.new_round(taken, float(second))
        runs = drain(plan, taken, float(second), hot)
        if second == 0:
            assert runs == [(0, 2), (3, 4)]
        elif runs:
            assert runs == [(2, 3)]
            copied_s.append(second)
        taken.add(2, 3)
    assert copied_s == [5, 10, 15, 20, 25]


def test_a_block_that_was_not_written_again_is_not_due() -> None:
    plan = Plan(8)
    taken = blocks((0, 2), (7, 8))
    assert drain(plan, taken, 0.0, lambda first, stop: True) == []
    plan.new_round(taken, 1.0)
    assert drain(plan, taken, 1.0) == [(0, 2), (7, 8)]
    taken.add(7, 8)
    taken.add(20, 21)
    plan.new_round(taken, HOT_PERIOD_S)
    assert plan.next(taken, HOT_PERIOD_S, cold) == (7, 8)
    assert drain(plan, taken, HOT_PERIOD_S) == [(20, 21)]


def with_due(due: tuple[int, int], more: tuple[int, int]) -> tuple[Plan, BlockSet]:
    """A plan of runs of four, some blocks of which are due, and others are the sweep's."""
    plan, taken = Plan(4), blocks(due)
    assert drain(plan, taken, 0.0, lambda first, stop: True) == []
    taken.add(*more)
    plan.new_round(taken, HOT_PERIOD_S)
    return plan, taken


def firsts(plan: Plan, taken: BlockSet, count: int) -> list[int]:
    """Where the next runs begin; from 1000 on everything is hot."""
    runs = [plan.next(taken, HOT_PERIOD_S, lambda first, stop: stop > 1000) for _ in range(count)]
    return [run[0] for run in runs if run is not None]


def test_due_blocks_and_the_sweep_have_their_shares() -> None:
    plan, taken = with_due((1000, 1200), (0, 200))
    due = [first for first in firsts(plan, taken, 40) if first >= 1000]
    assert len(due) == 40 // DUE_SHARE
    assert len(firsts(plan, taken, 100)) == 60, "and all of the link if the other has nothing"


def test_the_sweep_saves_up_no_turns_for_due_blocks() -> None:
    plan, taken = Plan(4), blocks((0, 400))
    assert len(firsts(plan, taken, 50)) == 50, "the sweep is alone"
    taken.add(1000, 1200)
    plan.returned(1000, 1200)
    turns = [first >= 1000 for first in firsts(plan, taken, 20)]
    assert sum(turns) <= 20 // DUE_SHARE + 1


def test_due_blocks_do_not_pay_for_having_been_alone() -> None:
    plan, taken = with_due((1000, 1200), (0, 4))
    assert len(firsts(plan, taken, 40)) == 40
    taken.add(4, 204)
    turns = [first >= 1000 for first in firsts(plan, taken, 11)]
    assert True in turns[: DUE_SHARE + 1]


def test_a_run_that_was_not_begun_is_handed_out_again_as_if_nothing_had_been() -> None:
    plan = Plan(4)
    taken = blocks((0, 40))
    drain(plan, taken, 0.0, lambda first, stop: first >= 8)
    taken.add(0, 8)
    plan.new_round(taken, HOT_PERIOD_S)
    order = []
    for _ in range(10):
        for _ in range(3):
            run = plan.next(taken, HOT_PERIOD_S, cold)
            assert run is not None
            plan.put_back(*run)
        assert plan.next(taken, HOT_PERIOD_S, cold) == run
        order.append(run)
    assert sorted(order) == [(at, at + 4) for at in range(0, 40, 4)]


def test_no_error_begins_the_sweep_anew() -> None:
    """Blocks at the front whose copies come to nothing keep nothing behind them from its turn."""
    plan = Plan(4)
    taken = blocks((0, 400))
    turns = 0
    while taken.any(396, 400):
        run = plan.next(taken, 0.0, cold)
        assert run is not None
        if run[0] < 8:
            plan.returned(*run)
        else:
            plan.done(*run)
            taken.discard(*run)
        turns += 1
    assert turns < 2 * 100


def test_hot_block_that_cooled_is_copied() -> None:
    plan = Plan(8)
    taken = blocks((0, 4))
    assert drain(plan, taken, is_hot=lambda first, stop: True) == []
    plan.new_round(taken, 1.0)
    assert drain(plan, taken) == [(0, 4)]


def test_hot_run_at_the_front_does_not_hide_what_follows() -> None:
    plan = Plan(2)
    taken = blocks((0, 6))
    assert drain(plan, taken, is_hot=lambda first, stop: first < 4) == [(4, 6)]


def test_bad_block_does_not_hold_back_its_neighbours() -> None:
    plan = Plan(4)
    taken = blocks((0, 6))
    run = plan.next(taken, 0, cold)
    assert run == (0, 4)
    plan.failed(*run, 0.0)
    copied = []
    while (run := plan.next(taken, 0.0, cold)) is not None:
        if run[0] <= 2 < run[1]:
            assert run == (2, 3)
            plan.failed(*run, 0.0)
        else:
            copied.append(run)
            plan.done(*run)
            taken.discard(*run)
    assert sorted(copied) == [(0, 1), (1, 2), (3, 4), (4, 6)]
    assert plan.next(taken, FIRST_RETRY_S - 0.01, cold) is None
    assert plan.next(taken, FIRST_RETRY_S, cold) == (2, 3)
    plan.done(2, 3)
    taken.discard(2, 3)
    taken.add(0, 4)
    # No trace of the failures is left.
    assert drain(plan, taken, FIRST_RETRY_S) == [(3, 4), (0, 3)]


def test_run_stops_before_a_block_that_is_tried_alone() -> None:
    plan = Plan(8)
    taken = blocks((2, 4))
    run = plan.next(taken, 0, cold)
    assert run is not None
    plan.failed(*run, 0.0)
    taken.add(0, 2)
    assert plan.next(taken, 0, cold) == (0, 2)


def test_waits_after_errors_double_up_to_a_limit() -> None:
    plan = Plan(1)
    taken = blocks((7, 8))
    now = 0.0
    waits = []
    for _ in range(9):
        assert plan.next(taken, now, cold) == (7, 8)
        plan.failed(7, 8, now)
        before = now
        while plan.next(taken, now, cold) is None:
            now += 0.5
        plan.returned(7, 8)
        waits.append(now - before)
    assert waits[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S]
    assert waits[-1] == LAST_RETRY_S


def test_medium_that_is_gone_makes_everything_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "MAX_FAILING", 3)
    plan = Plan(1)
    taken = blocks((0, 10))
    tried = []
    while (run := plan.next(taken, 0.0, cold)) is not None:
        tried.append(run)
        plan.failed(*run, 0.0)
    assert len(tried) == 4
    assert plan.next(taken, LAST_RETRY_S - 1, cold) is None
    assert drain(plan, taken, LAST_RETRY_S)
    assert not taken


def test_a_plan_of_empty_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Plan(0)


class Journal:
    """What a plan was told, and what must then hold of what it hands out."""

    def __init__(self) -> None:
        self.plan = Plan(3)
        self.taken = BlockSet()
        self.hot: set[int] = set()
        self.in_flight: list[tuple[int, int]] = []
        self.waiting: dict[int, float] = {}  # failing block -> when it may be tried again
        self.wait_s: dict[int, float] = {}
        self.now_s = 0.0

    def is_hot(self, first: int, stop: int) -> bool:
        return any(first <= block < stop for block in self.hot)

    def next(self) -> None:
        run = self.plan.next(self.taken, self.now_s, self.is_hot)
        if run is None:
            idle = set(range(64)) - {
                b for first, stop in self.in_flight for b in range(first, stop)
            }
            left = {b for b in idle if self.taken.any(b, b + 1)}
            waiting = {b for b, due_s in self.waiting.items() if due_s > self.now_s}
            assert left <= self.hot | waiting
            return
        first, stop = run
        assert 0 < stop - first <= 3
        assert self.taken.count_in(first, stop) == stop - first
        assert all(stop <= low or high <= first for low, high in self.in_flight)
        assert all(self.waiting.get(b, 0) <= self.now_s for b in range(first, stop))
        self.in_flight.append(run)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "next", "done", "failed", "returned", "round", "heat", "time"]),
            st.integers(0, 63),
            st.integers(1, 6),
        ),
        max_size=120,
    )
)
def test_any_order_of_events(steps: list[tuple[str, int, int]]) -> None:
    journal = Journal()
    plan = journal.plan
    for what, where, much in steps:
        if what == "add":
            journal.taken.add(where, min(where + much, 64))
        elif what == "next":
            journal.next()
        elif what == "round":
            journal.hot.clear()
            plan.new_round(journal.taken, journal.now_s)
        elif what == "heat":
            journal.hot.update(range(where, where + much))
        elif what == "time":
            journal.now_s += much
        elif journal.in_flight:
            run = journal.in_flight.pop(where % len(journal.in_flight))
            if what == "done":
                plan.done(*run)
                journal.taken.discard(*run)
                for block in range(*run):
                    journal.wait_s.pop(block, None)
            elif what == "failed":
                plan.failed(*run, journal.now_s)
                if run[1] - run[0] == 1:
                    wait_s = min(2 * journal.wait_s.get(run[0], 0.5 * FIRST_RETRY_S), LAST_RETRY_S)
                    journal.wait_s[run[0]] = wait_s
                    journal.waiting[run[0]] = journal.now_s + wait_s
            else:
                plan.returned(*run)
    for run in journal.in_flight:
        plan.returned(*run)
    plan.new_round(journal.taken, journal.now_s)
    drain(plan, journal.taken, journal.now_s + 1000)
    assert not journal.taken


def test_small_copies_are_many_large_ones_few() -> None:
    window = Window(limit_bytes=100, limit_copies=5)
    assert window.may_start(1000)
    window.started(60)
    assert window.may_start(40)
    assert not window.may_start(41)
    window.ended(60)
    for _ in range(5):
        assert window.may_start(1)
        window.started(1)
    assert not window.may_start(1)
    assert (window.copies, window.bytes) == (5, 5)


@pytest.mark.parametrize(("size", "copies"), [(0, 1), (1, 0)])
def test_empty_window_is_refused(size: int, copies: int) -> None:
    with pytest.raises(ValueError, match="empty"):
        Window(size, copies)
