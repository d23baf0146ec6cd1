"""What counts only in the partner's memory (rule 14): `bitmapd/partner/reliance.py`."""

from __future__ import annotations

import errno

import pytest

from bitmapd.partner.messages import HelloFlag, Ready
from tests.unit.partner.nodes import Phase, Proof, State, Station, Two

FAILED = OSError(errno.EIO, "simulated")


def relying(*numbers: int, paired: bool = True) -> Two:
    """A pair of which these have `record_on = partner`."""
    it = Two()
    for station in (it.one, it.two):
        if station.number in numbers:
            station.flags = HelloFlag.RELIES
        station.destage_waits = True
    if paired:
        it.pair()
    return it


def destage(station: Station, error: OSError | None = None) -> None:
    """The stored record names all now."""
    done = station.destages[-1]
    station.destages.clear()
    done(error)
    station.loop.run_soon()


def is_flagged(it: Two) -> tuple[bool, bool]:
    return it.one.node.lasting.volatile, it.two.node.lasting.volatile


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
def test_the_flag_is_in_both_superblocks_before_either_counts_on_memory(
    numbers: tuple[int, ...],
) -> None:
    it = relying(*numbers, paired=False)
    it.connect()
    it.carry(write=False)
    for station in (it.one, it.two):
        assert station.node.phase is Phase.READY
        assert not any(isinstance(m, Ready) for m, _ in station.cable.queue)
        assert station.writes[0][0].volatile
    it.one.write()
    it.carry(write=False)
    assert not it.one.relies
    it.carry()
    assert is_flagged(it) == (True, True)
    assert (it.one.relies, it.two.relies) == (1 in numbers, 2 in numbers)


def test_nobody_sets_a_flag_where_nobody_counts_on_memory() -> None:
    it = relying()
    assert is_flagged(it) == (False, False)
    assert not it.one.relies
    assert not it.one.writes


def test_with_the_link_goes_reliance_at_once_and_the_flag_after_the_destage() -> None:
    it = relying(1)
    it.cut()
    assert not it.one.relies
    assert (len(it.one.destages), len(it.one.writes)) == (1, 0)
    destage(it.one)
    assert it.one.told("record-destaged") == []
    assert it.one.write().volatile is False
    assert is_flagged(it) == (False, True)
    assert it.one.told("record-destaged") == [{}]


def test_what_is_stored_already_needs_no_destage() -> None:
    it = relying(1)
    it.one.destage_waits = False
    it.cut()
    assert it.one.write().volatile is False


def test_a_destage_that_failed_leaves_the_flag_and_is_tried_again() -> None:
    it = relying(1)
    it.cut()
    destage(it.one, FAILED)
    assert not it.one.writes
    it.one.node.tick()
    it.one.node.tick()  # one at a time
    assert len(it.one.destages) == 1
    destage(it.one)
    it.one.write(FAILED)
    assert it.one.node.lasting.volatile
    it.one.node.tick()
    destage(it.one)
    it.one.write()
    assert not it.one.node.lasting.volatile
    it.one.node.tick()
    assert not it.one.destages


def test_an_exchange_that_has_begun_keeps_the_flag() -> None:
    it = relying(1)
    it.cut()
    it.connect()
    it.carry(most=2, write=False)  # HELLO both ways
    assert it.one.node.phase is Phase.RECORDS
    destage(it.one)
    assert not it.one.writes
    it.cut()  # and one that has come to nothing lets it go
    destage(it.one)
    assert it.one.write().volatile is False


def test_an_old_destage_says_nothing_of_a_later_one() -> None:
    it = relying(1)
    it.cut()
    old = it.one.destages[-1]
    it.connect()
    it.carry(most=2, write=False)
    it.cut()
    old(None)
    assert not it.one.writes
    destage(it.one)
    assert it.one.writes


def test_a_flag_from_before_stays_until_all_is_stored() -> None:
    it = Two()
    it.one.destage_waits = it.two.destage_waits = True
    it.two.node.ledger.lasting = relying(2).two.node.lasting
    it.one.node.ledger.lasting = relying(2).two.node.lasting
    it.pair()
    assert it.one.node.comparisons  # both were fresh
    assert is_flagged(it) == (True, True)
    assert not it.one.relies
    destage(it.one)
    it.one.write()
    assert is_flagged(it) == (False, True)


def test_a_process_that_has_met_nobody_lets_the_flag_stand() -> None:
    it = relying(1)
    again = Station(1)
    again.node.ledger.lasting = it.one.node.lasting
    again.connect()
    again.node.lost()
    again.node.tick()
    assert not again.destages
    assert not again.writes


def test_one_that_takes_over_knowing_nothing_clears_it_once_everything_is_recorded() -> None:
    again = Station(1)
    again.destage_waits = True
    again.node.ledger.lasting = relying(1).one.node.lasting
    again.node.fenced(Proof.WORD)
    assert again.write().volatile
    assert again.node.state is State.ALONE
    destage(again)
    assert again.write().volatile is False


def test_who_leaves_clears_its_flag_and_then_has_left() -> None:
    it = relying(1, 2)
    left: list[bool] = []
    it.one.node.leave(left.append)
    it.carry(write=False)
    it.one.loop.run_soon()
    assert (left, it.one.relies) == ([], False)
    destage(it.one)
    it.one.connect()
    assert it.one.cable.closed, "it says nothing more"
    it.one.write()
    assert left == [True]
    assert is_flagged(it) == (False, True)


def test_who_stops_with_the_partner_away_waits_for_the_destage() -> None:
    it = relying(1)
    it.cut()
    left: list[bool] = []
    it.one.node.leave(left.append)
    assert left == []
    destage(it.one)
    it.one.write()
    assert left == [False]


def test_who_ends_without_giving_anything_leaves_a_record_that_stands_for_itself() -> None:
    it = relying(1)
    over: list[bool] = []
    it.one.node.finish(lambda: over.append(True))
    assert it.one.cable.closed
    assert (over, it.one.relies) == ([], False)
    destage(it.one)
    it.one.write()
    assert over == [True]


def test_an_exchange_ends_the_waiting_for_a_flag_that_stays() -> None:
    it = relying(1)
    it.cut()
    left: list[bool] = []
    it.one.node.leave(left.append)
    it.connect()
    it.carry(most=2, write=False)
    assert left == [False]
