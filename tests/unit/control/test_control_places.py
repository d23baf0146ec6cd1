"""control/places: who has a place, and who may run what.  Names end in the invariant."""

from __future__ import annotations

import pytest

from bitmapd.control.places import Places
from bitmapd.errors import BusyError


def test_the_one_that_was_idle_for_longest_goes_1() -> None:
    places: Places[str] = Places(3, lasting=2, stops=1)
    assert [places.enter(key) for key in "abc"] == [None, None, None]
    places.begin("a", "wait")
    places.end("a")  # idle again, after b and c
    assert [places.enter(key) for key in "def"] == ["b", "c", "a"]
    places.begin("d", "wait")
    assert places.running("d")
    assert places.enter("g") == "e", "who is at work stays"
    places.leave("d")
    assert not places.running("d")
    assert places.enter("h") is None


def test_no_place_is_left_when_all_are_at_work_1() -> None:
    places: Places[str] = Places(2, lasting=1, stops=1)
    for key, verb in (("a", "wait"), ("b", "status")):
        places.enter(key)
        places.begin(key, verb)
    with pytest.raises(BusyError, match="2 control connections are at work"):
        places.enter("c")
    places.end("b")
    assert places.enter("c") == "b"
    places.end("b")  # gone meanwhile
    places.leave("b")


def test_each_kind_of_verb_has_a_bound_of_its_own_2() -> None:
    places: Places[int] = Places(10, lasting=2, stops=1)
    for key in range(8):
        places.enter(key)
    places.begin(0, "wait")
    places.begin(1, "events")
    with pytest.raises(BusyError, match="2 commands wait at the control socket"):
        places.begin(2, "verify")
    places.begin(2, "stop")
    with pytest.raises(BusyError, match="1 commands wait for the stop"):
        places.begin(3, "stop")
    for key, verb in ((4, "ping"), (5, "status"), (6, "ping")):
        places.begin(key, verb)
    places.end(0)
    places.begin(3, "verify")
