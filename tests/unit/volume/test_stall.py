"""volume/stall: a stop that waits for a medium is known from one that works."""

from __future__ import annotations

from bitmapd.volume.stall import Stall


def test_figures_that_stand_still_while_something_is_asked() -> None:
    stall = Stall(10.0)
    assert not stall.seen(0.0, (1, 0))
    assert not stall.seen(9.9, (1, 0))
    assert not stall.seen(10.0, (1, 1)), "something moved"
    assert not stall.seen(19.9, (1, 1))
    assert stall.seen(20.0, (1, 1))


def test_nothing_that_is_asked_has_all_the_time() -> None:
    """As a copy that waits for its share of the rate."""
    stall = Stall(10.0)
    for now_s in (0.0, 10.0, 20.0, 30.0):
        assert not stall.seen(now_s, None)
    assert not stall.seen(31.0, (1, 0))
    assert not stall.seen(35.0, None)
    assert not stall.seen(41.0, (1, 0)), "asked anew"
    assert stall.seen(51.0, (1, 0))
