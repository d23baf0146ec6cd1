"""record/odds: what becomes of predictions, and what is learnt from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.predict.odds import FEW, LIFE_S, PRIOR, SAMPLE, WATCH_EVERY, Odds


def test_what_comes_true_within_its_time_raises_the_odds() -> None:
    odds = Odds(2)
    odds.watch([5, 6], 1, 0.0)
    odds.settle(LIFE_S)
    odds.written(5)
    assert odds.of[1] > PRIOR
    assert odds.of[0] == PRIOR
    assert len(odds) == 1


def test_what_does_not_come_true_lowers_the_odds() -> None:
    odds = Odds(2)
    odds.watch([5], 1, 0.0)
    odds.settle(LIFE_S + 0.1)
    assert odds.of[1] < PRIOR
    assert len(odds) == 0
    lowered = odds.of[1]
    odds.written(5)  # too late
    assert odds.of[1] == lowered


def test_only_what_is_due_is_settled() -> None:
    odds = Odds(1)
    odds.watch([1], 0, 0.0)
    odds.watch([2], 0, 3.0)
    odds.settle(LIFE_S + 1)
    assert len(odds) == 1
    odds.written(2)
    assert len(odds) == 0


def test_a_candidate_is_watched_once_at_a_time() -> None:
    odds = Odds(2)
    odds.watch([7], 0, 0.0)
    odds.watch([7], 1, 1.0)
    odds.written(7)
    assert odds.of[0] > PRIOR
    assert odds.of[1] == PRIOR


def test_while_few_are_watched_every_miss_is() -> None:
    odds = Odds(1)
    for extent in range(FEW - 1):
        odds.watch([extent], 0, 0.0)
    assert all(odds.due() for _ in range(3 * WATCH_EVERY))


def test_else_the_candidates_of_every_fourth_miss_are_watched() -> None:
    odds = Odds(1)
    for extent in range(FEW):
        odds.watch([extent], 0, 0.0)
    due = [odds.due() for _ in range(3 * WATCH_EVERY)]
    assert due.count(True) == 3
    assert due[WATCH_EVERY - 1]


@pytest.mark.parametrize("count", range(40))
def test_some_candidates_of_a_kind_stand_for_all(count: int) -> None:
    odds = Odds(1)
    odds.watch(range(count), 0, 0.0)
    assert min(count, SAMPLE // 2) <= len(odds) <= SAMPLE


def test_a_full_table_watches_nobody_else() -> None:
    odds = Odds(1, capacity=3)
    odds.watch(range(10), 0, 0.0)
    assert len(odds) == 3
    odds.written(0)
    odds.watch([9], 0, 0.0)
    assert len(odds) == 3


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_the_odds_approach_the_share_that_comes_true(share: float) -> None:
    odds = Odds(1)
    for number in range(4000):
        odds.watch([number], 0, float(number))
        if number % 100 < share * 100:
            odds.written(number)
        odds.settle(number + LIFE_S + 0.5)
    assert odds.of[0] == pytest.approx(share, abs=0.05)


def test_old_outcomes_are_forgotten() -> None:
    odds = Odds(1)
    for number in range(20_000):
        odds.watch([0], 0, float(number))
        if number < 15_000:
            odds.written(0)
        else:
            odds.settle(number + LIFE_S + 0.5)
    assert odds.of[0] < 0.05


def test_odds_are_restored_if_they_fit() -> None:
    odds = Odds(2)
    odds.restore([0.5])
    assert odds.of == [PRIOR, PRIOR]
    odds.restore([0.5, 0.125])
    assert odds.of == [0.5, 0.125]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("watch"), st.integers(0, 30), st.integers(0, 3)),
            st.tuples(st.just("written"), st.integers(0, 30), st.just(0)),
            st.tuples(st.just("settle"), st.integers(0, 8), st.just(0)),
        ),
        max_size=60,
    )
)
def test_odds_stay_odds(events: list[tuple[str, int, int]]) -> None:
    odds, now_s = Odds(4, capacity=8), 0.0
    for event, number, kind in events:
        if event == "watch":
            odds.watch(range(number, number + 3), kind, now_s)
        elif event == "written":
            odds.written(number)
        else:
            now_s += number
            odds.settle(now_s)
        assert len(odds) <= 8
        assert all(0 <= chance <= 1 for chance in odds.of)
    odds.settle(now_s + LIFE_S + 1)
    assert len(odds) == 0
