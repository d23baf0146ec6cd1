"""A node whose kernel writes for hosts, and goes on when its process has died."""

from __future__ import annotations

import pytest

from bitmapd.partner.greeting import OFFERED, REQUIRED, check, is_over
from bitmapd.partner.messages import HelloFlag
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import runs_of
from tests.unit.partner.hellos import generations, hello
from tests.unit.partner.nodes import Phase, Proof, State, Station, Two

DIRECT, WAITS = HelloFlag.DIRECT | HelloFlag.ON_PROMOTE, HelloFlag.ON_PROMOTE


def station(number: int, *, direct: bool = False, stored: Runs = ()) -> Station:
    made = Station(number, stored=stored)
    made.flags = DIRECT if direct else WAITS
    return made


def served_through_the_kernel() -> Two:
    """Node 1 owns extents 1 to 4, of which hosts write 2 and 3 past its gate."""
    it = Two(station(1, direct=True), station(2))
    it.pair()
    it.own(it.one, 1, 2, 3, 4)
    return it


def die(it: Two, direct: Runs) -> None:
    """The process of node 1 does; a new one finds what the kernel writes."""
    lasting = it.one.node.lasting
    it.cut()
    it.one = station(1, direct=True, stored=((1, 5),))
    it.one.node.ledger.lasting = lasting
    it.one.node.start(direct)


def test_what_the_kernel_writes_stays_its_nodes() -> None:
    it = served_through_the_kernel()
    die(it, ((2, 4),))
    assert (it.one.node.state, runs_of(it.one.rights.own)) == (State.WAITING, ((2, 4),))
    it.connect()
    it.carry(most=2)  # HELLO, both ways
    assert it.two.node.phase is Phase.RECORDS
    assert it.two.sent() == []  # it waits for what the kernel writes
    it.carry()
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert runs_of(it.one.rights.own) == runs_of(it.two.rights.other) == ((2, 4),)
    assert runs_of(it.two.rights.own) == runs_of(it.one.rights.other) == ((1, 2), (4, 5))
    assert it.two.died == [((1, 2), (4, 5))]
    assert it.two.node.absorbed_extents == 2
    # What either has come to own is dirty, whole; a kernel's marks of before are not known.
    assert ("take over", (((4, 8),), set())) in it.one.desk.calls
    assert ("take over", (((2, 4), (8, 10)), set())) in it.two.desk.calls


def test_a_kernel_that_has_stopped_leaves_everything() -> None:
    it = served_through_the_kernel()
    die(it, ())
    it.pair()
    assert runs_of(it.two.rights.own) == ((1, 5),)
    assert not it.one.rights.own.any()


def test_a_second_cut_takes_nothing_from_it() -> None:
    """Before READY has come, whatever is known stays known."""
    it = served_through_the_kernel()
    die(it, ((2, 4),))
    it.connect()
    it.carry(most=4)
    it.cut()
    assert runs_of(it.two.rights.own) == ((1, 2), (4, 5))
    assert runs_of(it.two.rights.other) == ((2, 4),)
    assert it.two.node.state is State.CUT
    assert runs_of(it.one.rights.own) == ((2, 4),)
    it.pair()
    assert runs_of(it.one.rights.own) == ((2, 4),)


def test_proof_that_it_has_stopped_leaves_everything_to_the_other() -> None:
    it = served_through_the_kernel()
    it.cut()
    it.two.node.fenced(Proof.FENCE)
    it.two.write()
    assert runs_of(it.two.rights.own) == ((1, 5),)


def test_a_kernel_that_was_taken_for_dead_is_stopped() -> None:
    it = served_through_the_kernel()
    it.cut()
    it.two.node.fenced(Proof.WORD)
    it.two.write()
    die(it, ((2, 4),))
    it.connect()
    it.carry()
    assert it.one.node.state is State.OUTDATED
    assert it.one.told("outdated")
    assert it.two.node.state is State.ALONE
    die(it, ())
    it.pair()
    assert runs_of(it.two.rights.own) == ((1, 5),)


def test_two_kernels_that_write_the_same_are_a_split_brain() -> None:
    it = Two(station(1, direct=True), station(2, direct=True))
    for one in (it.one, it.two):
        one.node.start(((2, 4),))
    it.connect()
    it.carry()
    assert it.one.node.state is it.two.node.state is State.SPLIT_BRAIN


def test_of_two_new_processes_the_kernel_of_one_goes_on() -> None:
    it = Two(station(1, stored=((0, 4),)), station(2, direct=True, stored=((2, 6),)))
    it.two.node.start(((2, 3),))
    it.pair()
    assert runs_of(it.one.rights.own) == ((0, 2), (3, 4))
    assert runs_of(it.two.rights.own) == ((2, 3), (4, 6))


def test_who_outlives_a_split_brain_leaves_a_kernel_its_places() -> None:
    it = served_through_the_kernel()
    it.cut()
    it.two.node.received(hello(1), 1)  # nothing is connected
    for one in (it.one, it.two):
        one.node._stop_writing("simulated")
    die(it, ((2, 3),))
    it.connect()
    it.carry()
    assert it.two.node.state is State.PAIRED
    assert runs_of(it.one.rights.own) == ((2, 3),)
    assert runs_of(it.two.rights.own) == ((0, 2), (3, 8))


def test_a_node_that_nobody_was_paired_with_has_all_that_its_record_names() -> None:
    one = Station(1, paired=False, stored=((1, 5),))
    one.node.start(((2, 3),))
    assert (one.node.state, runs_of(one.rights.own)) == (State.ALONE, ((1, 5),))


# -- HELLO ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mine", "theirs", "over"),
    [
        ("a", "a", False),
        ("ab", "b", False),  # we have gone on without it, and lived since
        ("b", "ab", True),  # it has gone on without us
        ("a", "b", True),  # nobody knows
    ],
)
def test_who_was_taken_for_dead(mine: str, theirs: str, over: bool) -> None:
    one, two = (hello(n, generations=generations(g)) for n, g in ((1, mine), (2, theirs)))
    assert is_over(one, two) is over


def test_who_is_alone_has_gone_on() -> None:
    assert is_over(hello(1), hello(2, flags=HelloFlag.ALONE))


@pytest.mark.parametrize(("mine", "theirs"), [(DIRECT, HelloFlag(0)), (HelloFlag(0), DIRECT)])
def test_one_node_serves_at_a_time(mine: HelloFlag, theirs: HelloFlag) -> None:
    check(hello(1, flags=DIRECT), hello(2, flags=WAITS))
    with pytest.raises(PeerError, match="both need serve = on-promote") as caught:
        check(hello(1, flags=mine), hello(2, flags=theirs))
    assert caught.value.code is ErrorCode.OTHER


def test_a_partner_that_does_not_know_of_it_is_refused() -> None:
    mine = hello(1, flags=DIRECT, required=REQUIRED | 64)
    with pytest.raises(PeerError, match="bits 0x40") as caught:
        check(mine, hello(2, offered=OFFERED & ~64))
    assert caught.value.code is ErrorCode.VERSION
