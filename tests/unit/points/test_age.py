"""How old the newest committed point is: by this process's clock, or by Unix time."""

from __future__ import annotations

from bitmapd.points.age import PointAge

NOW_NS = 1_767_225_600_500_000_000


class Clocks:
    def __init__(self, before_s: int) -> None:
        self.now_s, self.wall_ns = 100.0, NOW_NS
        self.age = PointAge(lambda: self.now_s, lambda: self.wall_ns, before_s)


def test_what_an_earlier_process_cut_is_told_by_unix_time() -> None:
    clocks = Clocks(1_767_225_540)
    assert (clocks.age.seconds, clocks.age.is_from_clock) == (60.5, True)
    clocks.wall_ns += 2 * 10**9
    assert clocks.age.seconds == 62.5


def test_what_this_process_cut_is_told_by_its_own_clock() -> None:
    clocks = Clocks(1_767_225_540)
    clocks.age.committed(90.0)
    clocks.wall_ns -= 10**12  # somebody has set it
    assert (clocks.age.seconds, clocks.age.is_from_clock) == (10.0, False)


def test_a_clock_that_was_set_back_makes_no_point_of_the_future() -> None:
    assert Clocks(1_767_225_700).age.seconds == 0.0


def test_nobody_knows_before_there_is_a_point() -> None:
    clocks = Clocks(0)
    assert (clocks.age.seconds, clocks.age.is_from_clock) == (None, False)
