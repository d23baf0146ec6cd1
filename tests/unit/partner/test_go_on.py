"""`on_cut = go-on`: hosts of one node take new places in a cut (rule 13)."""

from __future__ import annotations

import errno

import pytest

from bitmapd.partner.greeting import NIL
from bitmapd.partner.messages import HelloFlag
from bitmapd.peer.frames import ErrorCode
from bitmapd.record.extents import runs_of
from tests.unit.partner.hellos import VOLUME, generations, hello
from tests.unit.partner.nodes import Phase, Proof, State, Station, Two

FAILED = OSError(errno.EIO, "simulated")


def cut_off(*, other: tuple[int, ...] = ()) -> Two:
    """Node 1 may go on; node 2 owns these."""
    it = Two()
    it.one.flags = HelloFlag.GO_ON
    it.pair()
    it.own(it.two, *other)
    it.cut()
    return it


def write(station: Station, extent: int) -> list[OSError | None]:
    """A host's write, if it has to wait; what comes of it."""
    ended: list[OSError | None] = []
    for one in station.rights.obtain(extent, extent + 1):
        station.rights.want(one, lambda error: bool(ended.append(error)) or True)
    station.loop.run_soon()
    return ended


def test_a_new_place_is_taken_once_that_is_durable() -> None:
    it = cut_off()
    ended = write(it.one, 3)
    assert (ended, it.one.rights.own[3]) == ([], 0)
    assert it.one.write().gone_on
    assert ended == [None]
    assert it.one.rights.held[3]
    assert it.one.told("gone-on") == [{}]
    assert it.one.rights.obtain(4, 6) == [], "the next one waits for nothing"
    assert runs_of(it.one.rights.held) == ((3, 6),)


def test_nobody_goes_on_unless_that_is_chosen() -> None:
    it = cut_off()
    ended = write(it.two, 3)
    assert (ended, len(it.two.writes)) == ([], 0)


def test_nobody_goes_on_while_no_host_waits() -> None:
    it = cut_off()
    it.one.node.tick()
    assert not it.one.writes


def test_what_is_the_others_is_not_taken() -> None:
    it = cut_off(other=(3,))
    mine, theirs = write(it.one, 5), write(it.one, 3)
    it.one.write()
    assert (mine, theirs) == ([None], [])
    assert it.one.rights.obtain(3, 5) == [3]
    assert not it.one.rights.own[3]


def test_a_superblock_that_cannot_be_written_lets_hosts_wait_and_is_tried_again() -> None:
    it = cut_off()
    ended = write(it.one, 3)
    it.one.write(FAILED)
    assert ended == []
    it.one.node.tick()
    it.one.write()
    assert ended == [None]


def test_going_on_ends_with_the_next_exchange_which_tells_the_other() -> None:
    it = cut_off()
    write(it.one, 3)
    it.one.write()
    it.connect()
    it.carry(most=2, write=False)
    assert it.one.node.phase is Phase.RECORDS
    assert it.one.rights.obtain(5, 6) == [5]
    it.carry()
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert runs_of(it.two.rights.other) == ((3, 4),)
    assert not it.one.node.lasting.gone_on
    it.cut()
    ended = write(it.one, 7)
    assert ended == []
    assert it.one.write().gone_on


def test_a_link_that_comes_meanwhile_is_used() -> None:
    it = cut_off()
    ended = write(it.one, 3)
    it.connect()
    it.one.receive(hello(2))
    assert it.one.write().gone_on
    assert (ended, it.one.rights.goes_on) == ([], False)


def test_who_may_lack_something_compares_everything_when_it_takes_over() -> None:
    it = cut_off()
    it.two.node.fenced(Proof.FENCE)
    it.two.write()
    assert it.two.node.comparisons
    assert it.two.rights.own.all()


def test_who_goes_on_itself_knows_all_when_it_takes_over() -> None:
    it = cut_off(other=(3,))
    it.one.node.fenced(Proof.FENCE)
    it.one.write()
    assert not it.one.node.comparisons
    assert runs_of(it.one.rights.own) == ((3, 4),)


def test_a_clean_stop_tells_all() -> None:
    it = Two()
    it.one.flags = HelloFlag.GO_ON
    it.pair()
    it.one.node.leave(lambda _: None)
    it.carry()
    assert it.two.node.state is State.ALONE
    assert not it.two.node.comparisons


def test_it_may_have_gone_on_though_this_node_has_never_come_up_with_it() -> None:
    """The link is lost when the one that may go on has READY, and the other waits for it."""
    it = Two()
    it.pair()
    it.one.node.leave(lambda _: None)
    it.carry()
    it.one = Station(1)
    it.one.flags = HelloFlag.GO_ON | HelloFlag.FRESH
    it.one.node.start()
    it.connect()
    it.carry(most=4, write=False)
    for station in (it.one, it.two):
        while station.writes:
            station.write()
    it.one.receive(*it.two.sent())
    assert it.one.node.state is State.PAIRED
    assert (it.two.node.state, it.two.node.phase) == (State.ALONE, Phase.READY)
    it.cut()
    write(it.one, 3)
    it.one.write()
    assert it.one.rights.held[3]
    it.two.node.fenced(Proof.FENCE)
    it.two.write()
    assert it.two.node.comparisons
    assert it.two.rights.own[3]


@pytest.mark.parametrize(
    ("volume", "history", "compares"),
    [(NIL, "x", True), (VOLUME, "x", True), (VOLUME, "a", False)],
    ids=["of a node that joins", "another record", "its own"],
)
def test_what_it_has_gone_on_with_is_lost_with_its_record(
    volume: bytes, history: str, compares: bool
) -> None:
    it = cut_off()
    write(it.one, 3)
    it.one.write()
    it.two.connect()
    known = generations(history)
    theirs = hello(1, flags=HelloFlag.FRESH, incarnation=7, volume=volume, generations=known)
    it.two.receive(theirs)
    assert it.two.node.phase is Phase.RECORDS
    assert bool(it.two.node.comparisons) is compares
    assert bool(it.two.rights.own.all()) is compares


def test_what_it_has_gone_on_with_is_remembered_until_the_two_meet() -> None:
    """A new process of it may be of another mind, and its first link lost."""
    it = cut_off()
    it.two.connect()
    it.two.receive(hello(1, flags=HelloFlag.FRESH, incarnation=7))
    it.two.node.lost()
    it.two.node.fenced(Proof.FENCE)
    it.two.write()
    assert it.two.node.comparisons


def test_two_that_both_go_on_refuse_each_other() -> None:
    it = Two()
    it.one.flags = it.two.flags = HelloFlag.GO_ON
    it.connect()
    it.carry()
    errors = [station.cable.error for station in (it.one, it.two)]
    assert any(error is not None and error.code is ErrorCode.OTHER for error in errors)
    assert it.one.node.state is State.WAITING
