"""copier/plan: which run is copied next, and how much is in flight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.copier import plan as plan_module
from bitmapd.copier.plan import FIRST_RETRY_S, LAST_RETRY_S, Plan, Window
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


def test_hot_blocks_are_passed_over_in_a_bounded_number_of_rounds() -> None:
    plan = Plan(8, max_deferrals=2)
    taken = blocks((0, 4))

    def hot(first: int, stop: int) -> bool:
        return first <= 2 < stop

    assert drain(plan, taken, is_hot=hot) == [(0, 2), (3, 4)]
    assert plan.next(taken, 0, hot) is None
    taken.add(0, 1)
    assert drain(plan, taken, is_hot=hot) == [(0, 1)]
    plan.new_round()
    assert drain(plan, taken, is_hot=hot) == []
    plan.new_round()
    taken.add(1, 2)
    assert drain(plan, taken, is_hot=hot) == [(1, 3)]
    # Having been copied, it is passed over again.
    plan.new_round()
    taken.add(2, 3)
    assert drain(plan, taken, is_hot=hot) == []


def test_hot_block_that_cooled_is_copied() -> None:
    plan = Plan(8)
    taken = blocks((0, 4))
    assert drain(plan, taken, is_hot=lambda first, stop: True) == []
    plan.new_round()
    assert drain(plan, taken) == [(0, 4)]


def test_hot_run_at_the_front_does_not_hide_what_follows() -> None:
    plan = Plan(2)
    taken = blocks((0, 6))
    assert drain(plan, taken, is_hot=lambda first, stop: first < 4) == [(4, 6)]


def test_deferral_can_be_switched_off() -> None:
    assert drain(Plan(4, 0), blocks((0, 4)), is_hot=lambda first, stop: True) == [(0, 4)]


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
        self.plan = Plan(3, max_deferrals=2)
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
            plan.new_round()
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
    plan.new_round()
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
