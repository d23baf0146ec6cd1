"""`partner_ack = stored`: nothing is granted before this node's stored record names it."""

from __future__ import annotations

import errno

import pytest

from bitmapd.partner.messages import Grant, HelloFlag, Message, Ready
from bitmapd.peer.words import Bye, Goodbye
from tests.unit.partner.homes import Bench
from tests.unit.partner.nodes import Phase, State, Station, Two

FAILED = OSError(errno.EIO, "simulated")


def bench(node: int = 1) -> Bench:
    it = Bench(node)
    it.rights.store_first(True)
    return it


def store(it: Bench, error: OSError | None = None) -> list[Message]:
    """What waits for the stored record is there."""
    storing, it.desk.storing = it.desk.storing, []
    for _, done in storing:
        done(error)
    return it.turn()


def test_what_is_nobodys_is_granted_once_it_is_stored() -> None:
    it = bench()
    assert it.add(((1, 3),), ((5, 6),)) == []
    assert it.desk.storing[0][0] == ((1, 3), (5, 6))
    assert it.rights.other[1], "known at once"
    assert store(it) == [Grant(1, ((1, 3), (5, 6)), (), (), (), True)]


def test_what_is_stored_is_granted_at_once() -> None:
    it = bench()
    it.desk.store_waits = False
    assert it.add(((1, 2),)) == [Grant(1, ((1, 2),), (), (), (), True)]


def test_what_is_ours_is_given_once_it_is_stored() -> None:
    it = bench()
    it.own(4)
    assert it.add(((4, 5),)) == []
    assert it.land() == []
    assert it.desk.storing[0][0] == ((4, 5),)
    (grant,) = store(it)
    assert grant == Grant(1, ((4, 5),), (), (), (), True)
    assert it.rights.owed[4]


def test_a_guess_that_a_host_of_ours_wants_meanwhile_is_refused() -> None:
    it = bench()
    it.add((), ((2, 4),))
    it.write(2)
    it.turn()
    assert store(it) == [Grant(1, ((3, 4),), ((2, 3),), (), (), True)]


def test_a_guess_that_has_become_ours_meanwhile_is_refused() -> None:
    it = bench()
    it.add((), ((2, 3),))
    it.grant(0, ((2, 3),))
    assert store(it) == [Grant(1, (), ((2, 3),), (), (), True)]
    assert it.rights.held[2]


def test_node_1_goes_first_while_what_the_other_asks_for_is_stored() -> None:
    it = bench(1)
    it.add(((2, 3),))
    it.write(2)
    it.turn()
    assert store(it) == [], "its own GRANT is on its way"
    it.grant(1, ((2, 3),))
    assert it.served == [2]
    it.land()
    (grant,) = store(it)
    assert isinstance(grant, Grant)
    assert (grant.request, grant.granted) == (1, ((2, 3),))


def test_node_2_grants_first() -> None:
    it = bench(2)
    it.add(((2, 3),))
    it.write(2)
    it.turn()
    assert store(it) == [Grant(1, ((2, 3),), (), (), (), True)]


def test_what_came_and_is_given_again_is_granted_once() -> None:
    it = bench(1)
    it.add(((2, 3),))
    storing = it.desk.storing.pop()
    it.write(2)
    it.turn()
    it.grant(1, ((2, 3),))
    it.land()
    assert len(store(it)) == 1
    storing[1](None)
    assert it.turn() == []


def test_what_is_stored_after_the_link_has_gone_is_granted_to_nobody() -> None:
    it = bench()
    it.own(4)
    it.add(((1, 2), (4, 5)))
    it.land()
    it.rights.cut()
    assert store(it) == []
    assert it.rights.held[4]


@pytest.mark.parametrize("extent", [1, 4])
def test_a_record_that_does_not_take_it_begins_anew(extent: int) -> None:
    it = bench()
    it.own(4)
    it.add(((extent, extent + 1),))
    it.land()
    assert store(it, FAILED) == []
    assert it.desk.of("unstored") == [None]


def test_an_error_after_the_link_has_gone_is_no_reason_to_begin_anew() -> None:
    it = bench()
    it.own(4)
    it.add(((1, 2), (4, 5)))
    it.land()
    it.rights.cut()
    store(it, FAILED)
    assert it.desk.of("unstored") == []


# -- of nodes ---------------------------------------------------------------------------------


def stored_pair() -> Two:
    it = Two()
    it.one.flags = HelloFlag.RELIES | HelloFlag.STORED
    return it


def test_ready_waits_until_what_it_stands_for_is_stored() -> None:
    it = stored_pair()
    it.two.destage_waits = True
    it.connect()
    it.carry()
    assert it.two.node.phase is Phase.READY
    assert it.one.node.phase is Phase.READY, "it waits for the other"
    it.two.destages.pop()(None)
    it.carry()
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert it.one.relies
    assert not it.two.relies
    assert not it.one.node.lasting.volatile, "nothing is in memory only"


def test_a_record_that_fails_then_ends_the_connection() -> None:
    it = stored_pair()
    it.two.destage_waits = True
    it.connect()
    it.carry()
    it.two.destages.pop()(FAILED)
    assert it.two.cable.closed


def test_what_is_stored_for_a_link_that_has_gone_says_nothing() -> None:
    it = stored_pair()
    it.two.destage_waits = True
    it.connect()
    it.carry()
    done = it.two.destages.pop()
    it.cut()
    it.two.connect()
    done(None)
    assert not any(isinstance(message, Ready) for message in it.two.sent())


def test_the_first_pairing_waits_for_both() -> None:
    it = Two(Station(1, paired=False), Station(2, paired=False))
    for station in (it.one, it.two):
        station.flags = HelloFlag.STORED
        station.destage_waits = True
    it.connect()
    it.carry()
    it.one.destages.pop()(None)
    it.carry()  # node 1's READY is there first
    it.two.destages.pop()(None)
    it.carry()
    assert it.one.node.state is it.two.node.state is State.PAIRED


def test_nodes_begin_anew_when_the_record_fails_and_when_it_is_well() -> None:
    it = stored_pair()
    it.pair()
    it.two.node.stand_in.record_is(failing=False)
    assert it.two.node.phase is Phase.UP
    it.two.node.stand_in.record_is(failing=True)
    assert it.two.sent()[-1] == Bye(Goodbye.RECONNECTING)
    assert it.two.node.state is State.CUT
    it.two.node.stand_in.record_is(failing=True)  # there is no link to end
    it.two.node.begin_anew()
    it.cut()
    it.two.flags = HelloFlag.UNSTORED
    it.pair()
    assert not it.one.relies, "its own record counts"
    it.two.node.stand_in.record_is(failing=True)
    assert it.two.node.phase is Phase.UP
    it.two.node.stand_in.record_is(failing=False)
    assert it.two.node.phase is Phase.CLOSED


def test_a_record_that_cannot_be_written_is_no_reason_to_part() -> None:
    """The flag then stands in the other superblock alone."""
    it = Two()
    it.one.flags = HelloFlag.RELIES | HelloFlag.UNSTORED
    it.pair()
    assert it.one.relies
    assert (it.one.node.lasting.volatile, it.two.node.lasting.volatile) == (False, True)
