"""gate/flights: who waits for the writes of before hears when all of them have ended."""

from __future__ import annotations

import pytest

from tests.support.mirror import BLOCK, Mirror, begun


@pytest.fixture
def mirror() -> Mirror:
    """Two extents are recorded, so that writes to them reach the primary at once."""
    mirror = Mirror()
    mirror.put(0)
    mirror.put(4)
    return mirror


def waiting(mirror: Mirror, heard: list[str], name: str) -> None:
    mirror.gate.when_landed(lambda: heard.append(name))


def test_nothing_in_flight_is_heard_of_in_the_next_turn(mirror: Mirror) -> None:
    heard: list[str] = []
    waiting(mirror, heard, "now")
    assert heard == [], "never from inside the call"
    mirror.turn()
    assert heard == ["now"]


def test_writes_of_before_are_waited_for_and_later_ones_are_not(mirror: Mirror) -> None:
    heard: list[str] = []
    mirror.write(0)
    mirror.gate.zero(BLOCK, BLOCK, lambda error: None)
    waiting(mirror, heard, "both")
    mirror.write(2)
    mirror.finish(mirror.primary, 1)
    mirror.fail(mirror.primary, 5)
    assert heard == ["both"], "an error ends a write, too"
    assert mirror.pending(mirror.primary) == ["write"]


def test_a_write_that_waits_for_the_record_is_not_in_flight(mirror: Mirror) -> None:
    heard: list[str] = []
    mirror.write(20)
    waiting(mirror, heard, "none")
    mirror.turn()
    assert heard == ["none"]


def test_each_waits_for_all_of_before_in_whatever_order_they_end(mirror: Mirror) -> None:
    heard: list[str] = []
    mirror.write(0)
    waiting(mirror, heard, "first")
    mirror.write(1)
    waiting(mirror, heard, "second")
    waiting(mirror, heard, "third")
    mirror.finish(mirror.primary, 1)
    assert heard == [], "what was submitted before the first call is still on its way"
    mirror.finish(mirror.primary, 0)
    assert heard == ["first", "second", "third"]


def test_a_barrier_waits_for_what_others_have_begun_to_wait_for(mirror: Mirror) -> None:
    heard: list[str] = []
    mirror.write(0)
    waiting(mirror, heard, "given")
    mirror.write(1)
    mirror.gate.take_era(lambda: heard.append("era"))
    mirror.write(2)
    mirror.finish(mirror.primary, 1)
    assert heard == []
    mirror.finish(mirror.primary, 0)
    assert heard == ["given", "era"]


def test_a_drain_during_a_barrier_is_heard_of(mirror: Mirror) -> None:
    heard: list[str] = []
    mirror.write(0)
    mirror.gate.take_era(lambda: heard.append("era"))
    mirror.write(1)
    waiting(mirror, heard, "given")
    mirror.finish(mirror.primary, 0)
    assert heard == ["era"]
    mirror.finish(mirror.primary, 0)
    assert heard == ["era", "given"]


def test_the_copier_copies_while_drains_come_and_go() -> None:
    mirror = begun()
    heard: list[str] = []
    for turn in range(5):
        mirror.write(turn)
        waiting(mirror, heard, str(turn))
        mirror.run(1.0)
    mirror.run(1.0)
    mirror.run(6.0)
    assert heard == ["0", "1", "2", "3", "4"]
    assert mirror.gate.in_sync
