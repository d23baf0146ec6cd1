"""A keeper and the node whose record it keeps: `bitmapd/partner/keeping.py`, and `node` with it."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.partner.greeting import check
from bitmapd.partner.keeping import may_lack, nobody_knows, share_with_keeper
from bitmapd.partner.messages import Grant, Hello, HelloFlag, Role
from bitmapd.partner.share import View
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.record.extents import bits_of, joined, runs_of
from tests.unit.partner.hellos import NIL, hello
from tests.unit.partner.nodes import Node, Proof, State, Station, Two

FAILED = OSError(errno.EIO, "simulated")
FRESH, VOLATILE = HelloFlag.FRESH, HelloFlag.VOLATILE
GO_ON, GONE_ON, STORED = HelloFlag.GO_ON, HelloFlag.GONE_ON, HelloFlag.STORED
SIZE = 8
SETS = st.sets(st.integers(0, SIZE - 1)).map(lambda numbers: bits_of(joined(numbers), SIZE))


class Kept(Two):
    """Node 1 with hosts, node 2 its keeper."""

    def __init__(self, one: Station | None = None, two: Station | None = None) -> None:
        super().__init__(one, two or keeper())


def keeper(**more: object) -> Station:
    station = _Keeper(2, **more)  # type: ignore[arg-type]
    lasting = station.node.lasting
    station.node = Node(2, lasting, station.rights, station.loop, station, keeps=True)
    return station


class _Keeper(Station):
    def hello(self) -> Hello:
        return replace(super().hello(), role=Role.KEEPER, primary="", secondary="")


def blank() -> Station:
    """A node 1 whose record is lost: it joins."""
    station = Station(1, paired=False)
    station.node.ledger.lasting = replace(station.node.lasting, volume=NIL, term=0)
    return station


def own(station: Station) -> tuple[tuple[int, int], ...]:
    return tuple(runs_of(station.rights.own))


# -- what two views come to -------------------------------------------------------------------


@given(SETS, SETS, SETS, st.booleans(), st.booleans())
def test_both_come_to_the_same_and_the_keeper_owns_nothing(
    owned: object, here: object, there: object, fresh: bool, everything: bool
) -> None:
    nothing = bits_of((), SIZE)
    host = View(fresh, nothing if fresh else owned, nothing, here)  # type: ignore[arg-type]
    kept = View(False, nothing, nothing, there)  # type: ignore[arg-type]
    mine = share_with_keeper(host, kept, keeps=False, everything=everything)
    its = share_with_keeper(kept, host, keeps=True, everything=everything)
    assert (mine.own, mine.other, mine.everything) == (its.other, its.own, its.everything)
    assert mine.digest(1) == its.digest(2)
    assert not its.own.any()
    assert not its.dirty.any()
    assert not (host.own & ~mine.own).any()
    assert mine.dirty == mine.own & ~host.own
    if everything:
        assert mine.own.all()
    elif fresh:
        assert mine.own == host.stored | kept.stored
    else:
        assert mine.own == host.own


@pytest.mark.parametrize(
    ("host", "kept", "result"),
    [
        ({}, FRESH | VOLATILE | GONE_ON, False),  # it has lived, and knows itself
        ({"flags": FRESH}, HelloFlag(0), False),
        ({"flags": FRESH | VOLATILE}, HelloFlag(0), False),  # what is in its memory is there
        ({"flags": FRESH | VOLATILE}, GONE_ON, True),  # the record may be a new one
        ({"flags": FRESH}, GONE_ON, False),
        ({"flags": FRESH | VOLATILE}, FRESH, False),  # the keeper has stored what it granted
        ({"flags": FRESH | VOLATILE}, FRESH | GONE_ON, True),
        ({"flags": FRESH}, FRESH | VOLATILE, False),
        ({"flags": FRESH}, FRESH | GONE_ON, False),  # its own record names what the other lacks
        ({"flags": FRESH, "volume": NIL}, HelloFlag(0), False),
        ({"flags": FRESH, "volume": NIL}, FRESH, False),
        ({"flags": FRESH, "volume": NIL}, GONE_ON, True),
        ({"flags": FRESH, "volume": NIL}, FRESH | GONE_ON, True),
    ],
)
def test_when_nobody_knows(host: dict[str, object], kept: HelloFlag, result: bool) -> None:
    here, there = hello(1, **host), hello(2, role=Role.KEEPER, flags=kept)
    assert nobody_knows(here, there) is result
    assert nobody_knows(there, here) is result


@pytest.mark.parametrize(
    ("host", "kept", "result"),
    [
        (HelloFlag(0), HelloFlag(0), True),  # in memory only
        (HelloFlag(0), STORED, False),
        (STORED, HelloFlag(0), False),
        (STORED | GO_ON, STORED, True),
        (HelloFlag(0), STORED | HelloFlag.UNSTORED, True),
    ],
)
def test_what_a_keepers_stored_record_may_lack(
    host: HelloFlag, kept: HelloFlag, result: bool
) -> None:
    assert may_lack(hello(2, role=Role.KEEPER, flags=kept), hello(1, flags=host)) is result


def test_two_keepers_are_no_pair_and_a_keeper_names_no_media() -> None:
    check(hello(1), hello(2, role=Role.KEEPER, primary="", secondary=""))
    with pytest.raises(PeerError, match="both nodes are keepers"):
        check(hello(1, role=Role.KEEPER), hello(2, role=Role.KEEPER))
    keeper = hello(2, role=Role.KEEPER, primary="", secondary="")
    with pytest.raises(PeerError, match="attach = nbd"):
        check(hello(1, flags=HelloFlag.DIRECT | HelloFlag.ON_PROMOTE), keeper)
    with pytest.raises(PeerError, match="volume size"):
        check(hello(1), hello(2, role=Role.KEEPER, volume=NIL, size_bytes=4096))


# -- together ---------------------------------------------------------------------------------


def test_a_keeper_holds_what_the_other_asks_for_and_serves_nobody() -> None:
    it = Kept()
    it.pair()
    it.own(it.one, 3)
    assert runs_of(it.two.rights.other) == ((3, 4),)
    assert (it.one.node.serves, it.two.node.serves) == (True, False)
    assert it.one.node.lasting.kept
    assert not it.two.node.lasting.kept


@pytest.mark.parametrize("lives", [True, False])
def test_a_node_that_begins_anew_has_what_the_keeper_holds_and_its_own_record(lives: bool) -> None:
    it = Kept()
    it.pair()
    it.own(it.one, 3)
    it.two.node.lost()
    if not lives:
        it.two = keeper(stored=((3, 4),))
    again = Kept(Station(1, stored=((5, 6),)), it.two)
    again.pair()
    assert own(again.one) == ((3, 4), (5, 6))
    assert again.one.node.comparisons == 0
    assert runs_of(again.two.rights.other) == ((3, 4), (5, 6))
    assert own(again.two) == ()


def test_a_node_whose_record_is_lost_has_what_the_keeper_holds() -> None:
    it = Kept()
    it.pair()
    it.own(it.one, 3)
    it.two.node.lost()
    again = Kept(blank(), it.two)
    assert again.one.node.state is State.WAITING, "it serves nobody before it knows"
    again.pair()
    assert own(again.one) == ((3, 4),)
    assert again.one.node.comparisons == 0
    assert again.one.node.lasting.volume == it.two.node.lasting.volume


def test_of_one_that_may_go_on_in_a_cut_a_lost_record_is_not_made_up_for() -> None:
    it = Kept()
    it.one.flags = GO_ON
    it.pair()
    assert it.two.node.lasting.gone_on, "durable before READY"
    it.two.node.lost()
    again = Kept(blank(), it.two)
    again.pair()
    assert again.one.rights.own.all()
    assert (again.one.node.comparisons, again.two.node.comparisons) == (1, 0)


def test_a_link_that_is_lost_after_the_keeper_said_ready_may_have_been_gone_on_without() -> None:
    it = Kept()
    it.pair()
    it.cut()
    it.one.flags = GO_ON
    it.connect()
    while not any(type(message).__name__ == "Ready" for message, _ in it.two.cable.queue):
        it.carry(most=1)
    it.two.node.lost()
    again = Kept(blank(), it.two)
    again.pair()
    assert again.one.node.comparisons == 1


def test_what_a_keeper_lacks_it_has_once_everything_is_stored() -> None:
    it = Kept()
    it.pair()
    assert it.two.node.lasting.gone_on
    it.two.destage_waits = True
    it.cut()
    assert not it.two.writes, "not before the stored record names everything"
    it.two.destages[-1](None)
    assert not it.two.write().gone_on


def test_what_could_not_be_stored_is_tried_again() -> None:
    it = Kept()
    it.pair()
    it.two.destage_waits = True
    it.cut()
    it.two.destages[-1](FAILED)
    it.two.node.tick()
    it.two.destages[-1](None)
    assert not it.two.write().gone_on


def test_a_keeper_that_stores_first_lacks_nothing_from_the_start() -> None:
    it = Kept()
    it.two.flags = STORED
    it.pair()
    assert not it.two.node.lasting.gone_on


def test_a_keeper_that_cannot_write_what_it_lacks_is_none() -> None:
    it = Kept()
    it.two.flags = HelloFlag.UNSTORED
    it.connect()
    for _ in range(10):
        it.carry(write=False)
        if it.one.writes:
            it.one.write()
        if it.two.writes:
            it.two.write(FAILED)
    assert it.two.node.state is State.WAITING
    assert it.one.node.state is not State.PAIRED


def test_a_host_whose_record_fails_says_so_before_the_keepers_copy_counts() -> None:
    """The keeper may be away when the next process begins, and the record well again."""
    it = Kept()
    it.one.flags = HelloFlag.UNSTORED | HelloFlag.RELIES
    it.two.flags = STORED
    it.connect()
    while not it.one.writes:
        it.carry(most=1, write=False)
    assert not it.one.relies
    assert it.one.write().volatile, "in its record, or beside it"
    it.carry()
    assert it.one.relies
    assert not it.two.node.lasting.volatile
    it.one.flags = HelloFlag(0)
    it.cut()
    it.connect()
    it.carry()
    assert not it.one.relies
    assert not it.one.node.lasting.volatile, "all is stored again"


def test_the_keepers_copy_does_not_count_if_that_can_be_said_nowhere() -> None:
    it = Kept()
    it.one.flags = HelloFlag.UNSTORED | HelloFlag.RELIES
    it.connect()
    for _ in range(10):
        it.carry(write=False)
        if it.one.writes:
            it.one.write(FAILED)
        if it.two.writes:
            it.two.write()
    assert it.one.node.state is not State.PAIRED
    assert not it.one.relies


def test_a_keeper_lacks_something_until_the_other_has_come_together_with_it() -> None:
    """One that is alone goes on alone if the link is lost before it says READY."""
    it = Kept()
    it.two.flags = STORED
    it.two.node.ledger.lasting = replace(it.two.node.lasting, gone_on=True)
    it.connect()
    while not any(type(message).__name__ == "Ready" for message, _ in it.two.cable.queue):
        it.carry(most=1)
    assert it.two.node.lasting.gone_on
    it.carry()
    assert it.two.node.state is State.PAIRED
    assert not it.two.node.lasting.gone_on


def test_the_record_of_one_that_relies_is_not_complete_though_the_keeper_stores_first() -> None:
    it = Kept()
    it.one.flags, it.two.flags = HelloFlag.RELIES, STORED
    it.pair()
    assert it.one.relies
    assert it.one.node.lasting.volatile
    assert not it.two.node.lasting.volatile
    it.cut()
    assert not it.one.write().volatile, "all of it is stored"


def test_a_new_record_is_not_complete_before_it_names_what_was_fetched() -> None:
    it = Kept(blank())
    it.one.destage_waits = True
    it.pair()
    assert it.one.node.lasting.kept
    assert it.one.node.lasting.volatile
    it.one.destages[-1](None)
    assert not it.one.write().volatile


# -- one ends ---------------------------------------------------------------------------------


def test_after_the_keepers_bye_the_other_goes_on_and_that_is_durable_before() -> None:
    it = Kept()
    it.two.flags = STORED
    it.pair()
    ended: list[bool] = []
    it.two.node.leave(ended.append)
    assert not it.two.cable.queue, "BYE comes after what the superblock says"
    assert it.two.write().gone_on
    it.carry()
    assert ended == [False]
    assert (it.one.node.state, it.one.node.proof) == (State.ALONE, Proof.BYE)
    assert it.two.node.lasting.gone_on


def test_a_keeper_that_cannot_write_that_says_no_bye() -> None:
    it = Kept()
    it.two.flags = STORED
    it.pair()
    it.two.node.leave(lambda given: None)
    it.two.write(FAILED)
    it.carry(write=False)
    it.one.node.lost()
    assert it.one.node.state is State.CUT


def test_a_keeper_that_has_lost_the_other_just_ends() -> None:
    it = Kept()
    it.pair()
    it.cut()
    ended: list[bool] = []
    it.two.node.leave(ended.append)
    it.carry()
    assert ended == [False]


def test_the_other_parts_from_its_keeper_without_giving_it_anything() -> None:
    it = Kept()
    it.pair()
    it.own(it.one, 3)
    ended: list[int] = []
    it.one.node.part(lambda: ended.append(1))
    it.carry()
    assert ended == [1]
    assert it.two.node.state is State.CUT, "a keeper is never alone"
    assert runs_of(it.two.rights.other) == ((3, 4),)
    again: list[int] = []
    it.one.node.part(lambda: again.append(1))
    assert again == [1]


def test_nothing_is_taken_from_a_keeper_nor_given_to_it() -> None:
    it = Kept()
    it.pair()
    it.own(it.one, 3)
    taken: list[Exception | None] = []
    given: list[bool] = []
    it.one.node.take(False, taken.append)
    it.one.node.give(given.append)
    it.carry()
    assert (taken, given) == ([None], [False])
    assert own(it.one) == ((3, 4),)
    it.two.receive(Grant(0, ((3, 4),), (), (), (), True))
    assert it.two.cable.error is not None
    assert it.two.cable.error.code is ErrorCode.KIND
    assert not it.two.rights.own.any()


@pytest.mark.parametrize("volatile", [False, True])
def test_without_its_keeper_a_node_trusts_its_own_record_if_that_is_complete(
    volatile: bool,
) -> None:
    station = Station(1, stored=((4, 5),))
    station.node.ledger.lasting = replace(station.node.lasting, kept=True, volatile=volatile)
    station.node.start()
    station.node.fenced(Proof.WORD)
    station.write()
    assert station.node.state is State.ALONE
    assert station.node.comparisons == int(volatile)
    assert station.rights.own.all() if volatile else own(station) == ((4, 5),)


def test_a_keeper_is_never_alone_whatever_it_is_told() -> None:
    station = keeper()
    station.node.start()
    station.node.fenced(Proof.WORD)
    assert station.node.state is State.WAITING
    assert not station.writes
