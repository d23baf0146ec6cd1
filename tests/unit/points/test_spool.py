"""What was read and not sent; what was sent; when what comes next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitmapd.points.pieces import digest
from bitmapd.points.schedule import FIRST_PAUSE_S, LAST_PAUSE_S, Next, Schedule
from bitmapd.points.sent import Line, Sent
from bitmapd.points.spool import Spool


def test_what_came_first_leaves_first_and_what_came_last_counts() -> None:
    spool = Spool(100)
    spool.put(5, 1, b"old")
    spool.put(3, 1, b"three")
    spool.put(5, 3, b"newer")
    assert (len(spool), spool.held_bytes) == (2, 10)
    assert [(s.block, s.mask, s.raw) for s in spool.first(100, 9)] == [
        (5, 3, b"newer"),
        (3, 1, b"three"),
    ]
    spool.drop(5)
    assert (len(spool), spool.held_bytes) == (1, 5)


def test_what_leaves_at_once_is_bounded_and_never_nothing() -> None:
    spool = Spool(100)
    for block in range(5):
        spool.put(block, 1, bytes(10))
    assert [s.block for s in spool.first(25, 9)] == [0, 1]
    assert [s.block for s in spool.first(30, 9)] == [0, 1, 2]
    assert [s.block for s in spool.first(1, 9)] == [0]
    assert [s.block for s in spool.first(100, 4)] == [0, 1, 2, 3]
    assert Spool(1).first(10, 10) == []


@given(st.lists(st.tuples(st.integers(0, 70), st.booleans()), max_size=60))
def test_the_table_of_what_was_sent_is_a_dictionary(steps: list[tuple[int, bool]]) -> None:
    sent, model = Sent(), dict[int, Line]()
    for stamp, (block, put) in enumerate(steps, 1):
        if put:
            sent.put(block, stamp, 2**64 - 1, stamp * 7)
            model[block] = (block, stamp, 2**64 - 1, stamp * 7)
        elif block in model:
            sent.drop(block)
            del model[block]
    assert list(sent.lines()) == [model[block] for block in sorted(model)]
    assert len(sent) == len(model)
    assert sent.digest() == digest(model.values())
    assert all(sent.get(block) == model.get(block) for block in range(80))


def test_the_next_cut_comes_an_interval_after_the_last() -> None:
    schedule = Schedule(30.0, 1000)
    assert schedule.due_s < 0
    schedule.cut(5.0)
    assert schedule.due_s == 35.0
    schedule.hurry()
    assert schedule.due_s < 0
    schedule.cut(6.0)
    assert schedule.due_s == 36.0


def test_after_cuts_that_were_given_up_the_next_waits_longer_and_longer() -> None:
    schedule = Schedule(0.0, 1000)
    waits = []
    for _ in range(7):
        schedule.cut(100.0)
        schedule.gave_up(100.0)
        schedule.hurry()  # not that
        waits.append(schedule.due_s - 100.0)
    assert waits == [FIRST_PAUSE_S, 2, 4, 8, 16, LAST_PAUSE_S, LAST_PAUSE_S]
    schedule.committed()
    schedule.gave_up(100.0)
    assert schedule.due_s == 100.0 + FIRST_PAUSE_S


def test_much_is_more_than_half_the_spool_or_more_than_the_link_carries() -> None:
    schedule = Schedule(10.0, 1000)
    assert not schedule.is_much(500, None)
    assert schedule.is_much(501, None)
    assert not schedule.is_much(500, 50.0)
    assert schedule.is_much(501, 50.0)
    assert schedule.is_much(301, 30.0)
    schedule.end_rounds()
    assert not schedule.is_much(501, None), "once is enough before a cut"
    schedule.cut(0.0)
    assert schedule.is_much(501, None)


def test_rounds_go_on_as_long_as_they_help() -> None:
    schedule = Schedule(30.0, 1000)
    assert not schedule.copies_ahead
    schedule.begin_round(10_000)
    assert schedule.copies_ahead
    assert schedule.after_round(9_000, None) is Next.ROUND
    assert schedule.after_round(9_001, None) is Next.CANNOT_KEEP_UP
    assert schedule.after_round(500, None) is Next.CUT
    assert schedule.after_round(501, None) is Next.ROUND
    assert schedule.after_round(500, 500 / 15) is Next.CUT
    assert schedule.after_round(500, 499 / 15) is Next.ROUND, "it would take too long to send"
    schedule.begin_round(1_000)
    assert schedule.after_round(901, None) is Next.CUT, "rounds do not help, and it fits"
    schedule.end_rounds()
    assert not schedule.copies_ahead
    assert schedule.after_round(1_001, None) is Next.CANNOT_KEEP_UP
