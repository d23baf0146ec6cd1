"""What two nodes are to one another: states and events of docs/partner-protocol.md, "States"."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from bitmapd.errors import BusyError, UnreachableError, WrongStateError
from bitmapd.partner import messages
from bitmapd.partner.messages import Free, HelloFlag, Ready, Record, Take
from bitmapd.partner.node import EXCHANGE_TIMEOUT_S, HELLO_TIMEOUT_S
from bitmapd.partner.split import Conflicts
from bitmapd.peer.frames import ErrorCode
from bitmapd.peer.words import Bye, Error, Goodbye
from bitmapd.record.extents import each, runs_of
from tests.unit.partner.hellos import NIL, generations, hello
from tests.unit.partner.nodes import Lasting, Phase, Proof, State, Station, Two

FAILED = OSError(errno.EIO, "simulated")


def met() -> Two:
    it = Two()
    it.pair()
    return it


# -- the beginning ----------------------------------------------
def test_the_origin_needs_nobody() -> None:
    one = Station(1, paired=False, stored=((2, 4),))
    one.node.start()
    assert (one.node.state, one.node.proof, one.node.serves) == (State.ALONE, Proof.NEVER, True)
    assert runs_of(one.rights.held) == ((2, 4),)


@pytest.mark.parametrize(("number", "paired"), [(1, True), (2, True), (2, False)])
def test_any_other_has_to_meet_its_partner(number: int, paired: bool) -> None:
    it = Station(number, paired=paired, stored=((2, 4),))
    it.node.start()
    assert (it.node.state, it.node.serves) == (State.WAITING, False)
    assert not it.rights.own.any()


def test_the_first_pairing_is_durable_at_node_1_before_node_2_counts_as_one() -> None:
    it = Two(Station(1, paired=False, stored=((2, 4),)), Station(2, paired=False))
    it.connect()
    it.carry(write=False)
    assert len(it.one.writes) == 1
    assert not it.two.writes
    assert it.one.write() == Lasting(False, 3, generations("a"), it.one.node.lasting.volume)
    it.carry(write=False)
    assert it.one.node.state is State.ALONE  # node 2 has not said READY
    assert len(it.two.writes) == 1
    it.two.write()
    it.carry()
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert runs_of(it.one.rights.own) == runs_of(it.two.rights.other) == ((2, 4),)


def test_two_fresh_nodes_share_what_their_records_name() -> None:
    it = Two(Station(1, stored=((0, 3),)), Station(2, stored=((2, 5),)))
    it.pair()
    assert runs_of(it.one.rights.own) == ((0, 3),)
    assert runs_of(it.two.rights.own) == ((3, 5),)
    assert (it.one.node.absorbed_extents, it.two.node.absorbed_extents) == (3, 2)
    assert not it.one.node.comparisons
    assert it.one.told("records-exchanged") == [
        {"own_extents": 3, "partner_extents": 2, "dirty_extents": 3}
    ]


def test_what_was_in_memory_only_makes_node_1_compare_everything() -> None:
    it = Two()
    it.two.flags = HelloFlag.VOLATILE
    it.pair()
    assert it.one.rights.own.all()
    assert it.one.node.comparisons == 1
    assert not it.two.node.comparisons


def test_that_everything_counts_is_known_before_ready() -> None:
    it = Two()
    it.two.flags = HelloFlag.VOLATILE
    it.connect()
    it.two.receive(hello(1, flags=HelloFlag.FRESH), Record((), (), (), ()))
    assert it.two.node.phase is Phase.READY
    assert it.two.rights.other.all()


# -- the exchange -----------------------------------------------
def test_that_nobody_knows_what_differs_is_durable_until_all_of_it_is_stored() -> None:
    """Of two new processes one has a new record.  The next ones would not see that it was new."""
    it = Two(two=Station(2, paired=False))
    it.two.node.ledger.lasting = replace(it.two.node.lasting, volume=NIL)
    it.one.destage_waits = it.two.destage_waits = True
    it.pair()
    assert it.one.rights.own.all()
    for station in (it.one, it.two):
        assert station.node.lasting.volatile
        station.destages[-1](None)
        assert not station.write().volatile


def test_knowledge_grows_before_ready_and_rights_change_after_it() -> None:
    it = met()
    it.own(it.two, 5)
    it.one.desk.sent.clear()
    it.cut()
    it.connect()
    it.one.receive(hello(2, last_paired=0))
    assert it.one.node.phase is Phase.RECORDS
    it.one.receive(Record(((5, 6),), ((6, 7),), (), ()))
    assert it.one.node.phase is Phase.READY
    assert runs_of(it.one.rights.other) == ((5, 7),)
    assert it.one.node.state is State.CUT
    assert isinstance(it.one.sent()[-1], Ready)


def test_a_grant_that_was_lost_is_the_givers_again_and_dirty() -> None:
    it = met()
    it.own(it.one, 4)
    it.one.rights.hand_over([4])
    it.one.land()
    it.cut()
    assert runs_of(it.one.rights.owed) == ((4, 5),)
    it.one.desk.calls.clear()
    it.pair()
    assert runs_of(it.one.rights.held) == ((4, 5),)
    assert (((8, 10),), set()) in it.one.desk.of("take over")


def test_free_counts_in_the_exchange() -> None:
    it = met()
    it.own(it.one, 5, 6)
    it.cut()
    it.connect()
    it.one.receive(hello(2), Record((), (), (), ((5, 7),)), Free(((5, 6),)))
    ready = next(m for m in it.one.sent() if isinstance(m, Ready))
    it.one.desk.calls.clear()
    it.one.receive(ready)
    assert it.one.node.phase is Phase.UP
    assert it.one.desk.of("take over") == [((), {6})]


def test_an_embargo_comes_along() -> None:
    it = met()
    it.own(it.one, 6)
    it.one.desk.copying = {6}
    it.own(it.two, 6)
    it.cut()
    it.connect()
    it.two.desk.calls.clear()
    it.carry()
    assert it.two.desk.of("take over")[0] == ((), {6})


def test_results_that_differ_end_the_connection() -> None:
    it = met()
    it.cut()
    it.connect()
    it.one.receive(hello(2), Record((), (), (), ()), Ready(1))
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.DIGEST
    assert it.one.node.state is State.CUT


def test_results_that_differ_once_ours_is_stored() -> None:
    it = Two()
    it.one.node.ledger.lasting = Lasting(False, 2, generations("a"), it.one.node.lasting.volume)
    it.connect()
    it.one.receive(hello(2, flags=HelloFlag.FRESH), Record((), (), (), ()), Ready(1))
    it.one.write()
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.DIGEST


def test_without_a_superblock_there_is_no_pair() -> None:
    it = Two(Station(1, paired=False), Station(2, paired=False))
    it.connect()
    it.carry(write=False)
    it.one.write(FAILED)
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.INTERNAL
    assert it.one.node.lasting.never_paired


def test_a_superblock_that_comes_late_says_nothing_on_another_link() -> None:
    it = Two(Station(1, paired=False), Station(2, paired=False))
    it.connect()
    it.carry(write=False)
    it.cut()
    it.connect()
    it.one.write()
    assert all(isinstance(message, messages.Hello) for message in it.one.sent())


def test_both_own_the_same() -> None:
    it = met()
    it.own(it.one, 4)
    it.cut()
    it.connect()
    it.one.receive(hello(2), Record(((3, 6),), (), (), ()))
    assert it.one.node.state is State.SPLIT_BRAIN
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.BOTH_OWN
    assert len(it.one.told("split-brain")) == 1
    assert not it.one.rights.held[4]


@pytest.mark.parametrize(
    ("phase", "timeout_s"),
    [
        (Phase.HELLO, HELLO_TIMEOUT_S),
        (Phase.RECORDS, EXCHANGE_TIMEOUT_S),
        (Phase.READY, EXCHANGE_TIMEOUT_S),
    ],
)
def test_time_outs(phase: Phase, timeout_s: float) -> None:
    it = met()
    it.cut()
    it.connect()
    steps = {Phase.HELLO: 0, Phase.RECORDS: 1, Phase.READY: 2}[phase]
    it.one.receive(*(hello(2), Record((), (), (), ()))[:steps])
    assert it.one.node.phase is phase
    it.one.loop.advance(timeout_s - 0.01)
    assert not it.one.cable.closed
    it.one.loop.advance(0.02)
    assert it.one.cable.error is not None
    assert phase.value in it.one.cable.error.text
    assert (it.one.node.phase, it.one.node.state) == (Phase.CLOSED, State.CUT)


def test_a_link_that_is_up_has_no_time_out() -> None:
    it = met()
    it.one.loop.advance(1000)
    assert not it.one.cable.closed


def test_what_is_not_allowed_ends_the_connection_and_changes_nothing() -> None:
    it = met()
    it.one.receive(hello(2))
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.KIND
    assert it.one.told("partner-protocol-error")[0]["code"] == int(ErrorCode.KIND)
    it.one.receive(Ready(1))  # nobody is there any more
    it.one.node.refuse(it.one.cable.error)
    assert len(it.one.told("partner-protocol-error")) == 1


def test_who_is_not_the_partner_is_refused() -> None:
    it = Station(1)
    it.connect()
    it.receive(hello(2, name="another"))
    assert it.cable.error is not None
    assert it.cable.error.code is ErrorCode.OTHER
    assert it.node.state is State.WAITING


def test_a_link_that_ends_while_hello_is_looked_at() -> None:
    it = met()
    it.cut()
    it.connect()

    def changed() -> None:
        it.one.on_change = lambda: None
        it.one.node.lost()

    it.one.sent()
    it.one.on_change = changed
    it.one.receive(hello(2))
    assert it.one.sent() == []


def test_another_link_takes_the_place_of_this_one() -> None:
    it = met()
    old = it.one.cable
    it.one.connect()
    assert old.closed
    assert (it.one.node.state, it.one.node.phase) == (State.CUT, Phase.HELLO)


# -- a cut ------------------------------------------------------
def test_a_cut_and_what_comes_after() -> None:
    it = met()
    it.own(it.one, 1)
    it.cut()
    assert it.one.node.state is State.CUT
    assert it.one.node.serves
    assert it.one.rights.held[1]
    it.one.connect()
    it.one.node.lost()  # it comes to nothing
    assert it.one.node.state is State.CUT
    it.pair()
    assert it.one.node.exchanges == 2
    assert runs_of(it.one.rights.own) == ((1, 2),)


def test_a_fresh_partner_is_the_proof_that_its_old_process_is_dead() -> None:
    """What that had is ours, before RECORD is sent."""
    it = met()
    it.own(it.two, 5)
    it.own(it.one, 1)
    it.cut()
    it.two = Station(2, stored=((6, 7),))
    it.connect()
    it.carry()
    assert runs_of(it.one.rights.own) == ((1, 2), (5, 7))
    assert it.one.died == [((5, 6),)]
    assert it.one.node.absorbed_extents == 2
    assert not it.two.rights.own.any()


# -- alone ------------------------------------------------------
def alone() -> Two:
    it = met()
    it.own(it.two, 5)
    it.cut()
    it.one.node.fenced(Proof.FENCE)
    it.one.write()
    return it


def test_alone_after_proof_once_that_is_durable() -> None:
    it = met()
    it.own(it.two, 5)
    it.cut()
    it.one.node.fenced(Proof.FENCE)
    it.one.node.fenced(Proof.FENCE)
    assert it.one.node.going_alone
    assert it.one.node.state is State.CUT
    assert not it.one.rights.own[5]
    it.one.connect()
    assert it.one.cable.closed  # not now
    lasting = it.one.write()
    assert (lasting.term, lasting.generations) == (4, (b"n" * 16, *generations("a")[:3]))
    assert (it.one.node.state, it.one.node.proof) == (State.ALONE, Proof.FENCE)
    assert runs_of(it.one.rights.own) == ((5, 6),)
    assert it.one.told("takeover") == [
        {"proof": "fence", "extents": 1, "compares_everything": False}
    ]
    assert not it.one.writes


def test_alone_is_not_begun_when_it_cannot_be_stored() -> None:
    it = met()
    it.cut()
    it.one.node.fenced(Proof.WORD)
    it.one.write(FAILED)
    assert it.one.node.state is State.CUT
    assert len(it.one.told("takeover-failed")) == 1
    it.one.node.fenced(Proof.WORD)
    it.one.node.shut_out("simulated")
    it.one.write()
    assert it.one.node.state is State.OUTDATED


def test_who_knows_nothing_compares_everything() -> None:
    it = Station(2)
    it.node.fenced(Proof.WORD)
    it.write()
    assert it.rights.own.all()
    assert it.node.comparisons == 1


def test_who_has_never_met_its_partner_does_not_take_over() -> None:
    it = Station(2, paired=False)
    with pytest.raises(WrongStateError):
        it.node.fenced(Proof.WORD)


def test_nobody_takes_over_in_an_exchange() -> None:
    it = met()
    it.cut()
    it.connect()
    it.one.receive(*it.two.sent())  # HELLO
    for step in (it.one.node.hold_off, lambda: it.one.node.fenced(Proof.WORD)):
        with pytest.raises(BusyError):
            step()
    assert it.one.node.phase is Phase.RECORDS


def test_one_that_accepts_a_connection_and_says_nothing_can_be_fenced() -> None:
    """The kernel of a process that stands still goes on to accept."""
    it = met()
    it.cut()
    it.one.connect()
    it.one.node.fenced(Proof.FENCE)
    assert it.one.cable.closed
    it.one.write()
    assert (it.one.node.state, it.one.node.proof) == (State.ALONE, Proof.FENCE)


def test_while_it_is_being_fenced_nothing_is_agreed_with_the_other() -> None:
    it = met()
    it.cut()
    it.one.node.hold_off()
    it.connect()
    assert it.one.cable.closed
    assert not it.one.sent()
    it.one.node.let_in()
    it.cut()
    it.pair()


@pytest.mark.parametrize("state", [State.PAIRED, State.ALONE])
def test_there_is_nobody_to_fence(state: State) -> None:
    it = met() if state is State.PAIRED else alone()
    with pytest.raises(WrongStateError):
        it.one.node.hold_off()
    it = Two(Station(1, paired=False), Station(2, paired=False))
    with pytest.raises(WrongStateError, match="never met"):
        it.two.node.hold_off()


def test_who_is_paired_needs_no_proof() -> None:
    it = met()
    it.one.node.fenced(Proof.WORD)
    assert not it.one.writes


def test_alone_a_fresh_partner_joins() -> None:
    it = alone()
    it.two = Station(2)
    it.connect()
    it.carry()
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert it.two.node.lasting.generations == it.one.node.lasting.generations
    assert runs_of(it.two.rights.other) == ((5, 6),)


@pytest.mark.parametrize("said_ready", [False, True])
def test_alone_until_ready_is_said(said_ready: bool) -> None:
    it = alone()
    it.one.connect()
    it.one.receive(hello(2, flags=HelloFlag.FRESH, generations=it.one.node.lasting.generations))
    if said_ready:
        it.one.receive(Record((), (), ((7, 8),), ()))
    it.one.node.lost()
    assert it.one.node.state is (State.CUT if said_ready else State.ALONE)
    assert runs_of(it.one.rights.owed) == (((7, 8),) if said_ready else ())
    assert it.one.rights.obtain(0, 1) == ([0] if said_ready else [])


# -- outdated, split brain --------------------------------------
def test_who_was_declared_dead_stops() -> None:
    it = alone()
    it.own(it.two)
    it.connect()
    it.carry()
    assert it.two.node.state is State.OUTDATED
    assert not it.two.rights.held[5]
    assert len(it.two.told("outdated")) == 1
    assert it.one.node.state is State.ALONE
    it.two.connect()
    assert it.two.cable.error is not None
    assert it.two.cable.error.code is ErrorCode.OLD_TERM
    it.two.node.lost()
    assert it.two.node.state is State.OUTDATED


def test_who_has_gone_on_refuses_who_lived() -> None:
    it = alone()
    it.one.connect()
    it.one.receive(hello(2))
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.OLD_TERM
    assert it.one.node.state is State.ALONE


def test_who_is_shut_out_hangs_up() -> None:
    it = met()
    it.one.node.shut_out("simulated")
    it.one.node.shut_out("again")
    assert it.one.told("outdated") == [{"message": "simulated"}]
    assert it.one.cable.closed
    assert it.one.node.state is State.OUTDATED
    assert not it.one.node.serves


def both_alone() -> Two:
    """Each was told that the other is dead; node 1 owned 2, node 2 owned 5, both know of both."""
    it = met()
    it.own(it.one, 2)
    it.own(it.two, 5)
    it.cut()
    for station, letter in ((it.one, b"x"), (it.two, b"y")):
        station.new_generation = lambda letter=letter: letter * 16  # type: ignore[misc]
        station.node.fenced(Proof.WORD)
        station.write()
        assert station.node.state is State.ALONE
    assert it.one.rights.drop([2]) == [2]  # it is clean, and has been written alone all the same
    return it


def split() -> Two:
    it = both_alone()
    it.one.rights.want(6, lambda error: True)
    it.connect()
    it.carry()
    for station in (it.one, it.two):
        assert station.node.state is State.SPLIT_BRAIN
        assert not station.cable.closed
        assert station.node.phase is Phase.SPLIT
        station.node.lost()
    return it


def test_two_that_went_on_alone_write_nothing_and_say_where_they_may_have() -> None:
    it = split()
    for station, own, other in ((it.one, 3, 2), (it.two, 2, 3)):
        assert station.node.conflicts == Conflicts(own, other, 2, ((2, 3), (5, 6)))
        assert len(station.told("split-brain")) == 1
        assert not station.rights.held.any()
        assert station.rights.may_read(0, 8)
        embargoed = station.desk.of("take over")[-1]
        assert isinstance(embargoed, tuple)
        assert 5 in embargoed[1]


def test_what_waits_is_read_and_not_written_in_a_split_brain() -> None:
    it = both_alone()
    it.connect()
    it.one.rights.freeze()
    went: list[object] = []
    it.one.rights.ask(0, 1, went.append)
    it.one.receive(*it.two.sent())
    assert it.one.node.state is State.SPLIT_BRAIN
    assert went == [None]
    it.one.rights.want(7, lambda error: went.append(error) is None)
    it.one.loop.run_soon()
    assert went == [None]


def test_they_say_so_again_and_tell_it_once() -> None:
    it = split()
    it.one.node.conflicts = None
    it.connect()
    it.carry()
    assert it.one.node.conflicts is not None
    assert len(it.one.told("split-brain")) == 1


def test_one_that_does_not_say_where_is_not_waited_for() -> None:
    it = both_alone()
    it.connect()
    it.one.receive(*it.two.sent())
    assert it.one.node.phase is Phase.SPLIT
    it.one.loop.advance(EXCHANGE_TIMEOUT_S + 1)
    assert (it.one.node.phase, it.one.node.conflicts) == (Phase.CLOSED, None)
    assert it.one.node.state is State.SPLIT_BRAIN


def test_who_hears_of_a_split_brain_by_an_error_alone_stops_as_well() -> None:
    it = both_alone()
    it.connect()
    it.two.receive(Error(int(ErrorCode.SPLIT_BRAIN), "both"))
    assert it.two.node.state is State.SPLIT_BRAIN
    fresh = Station(2)
    fresh.node.start()
    fresh.connect()
    fresh.receive(Error(int(ErrorCode.SPLIT_BRAIN), "both"))
    assert fresh.node.state is State.WAITING  # it owns nothing that it could have written


@pytest.mark.parametrize("anew", [1, 2])
def test_once_one_begins_anew_the_other_goes_on_and_compares_everything(anew: int) -> None:
    it = split()
    stays = it.two if anew == 1 else it.one
    waited: list[object] = []
    stays.rights.want(7, lambda error: waited.append(error) is None)
    fresh = Station(anew, stored=((2, 3), (5, 6)))
    fresh.node.ledger.lasting = (it.one if anew == 1 else it.two).node.ledger.lasting
    fresh.node.start()
    it = Two.__new__(Two)
    it.one, it.two = (fresh, stays) if anew == 1 else (stays, fresh)
    it.connect()
    stays.receive(*fresh.sent())
    assert stays.node.state is State.ALONE
    assert stays.rights.own.all()
    assert waited == [None]
    fresh.receive(*stays.sent())
    it.carry()
    assert stays.node.state is fresh.node.state is State.PAIRED
    assert (stays.node.comparisons, stays.node.conflicts) == (1, None)
    assert len(stays.told("split-brain-ended")) == 1
    assert stays.died[-1:] != [()]
    assert fresh.rights.other.all()
    assert stays.rights.owned_alone == stays.rights.own


def test_one_that_dies_again_before_it_has_joined_leaves_the_other_at_work() -> None:
    it = split()
    it.two = Station(2)
    it.two.node.start()
    it.connect()
    it.one.receive(*it.two.sent())
    it.one.node.lost()
    assert (it.one.node.state, bool(it.one.rights.held.all())) == (State.ALONE, True)
    it.two = Station(2)
    it.two.node.start()
    it.pair()


def test_two_that_own_the_same_say_where() -> None:
    it = met()
    it.own(it.one, 2)
    it.cut()
    it.two.rights.adopt(((2, 4),))
    it.connect()
    it.carry()
    assert it.one.node.state is it.two.node.state is State.SPLIT_BRAIN
    for station in (it.one, it.two):
        station.node.lost()
    it.connect()  # neither has begun anew, so it is one still
    it.carry()
    for station, own, other in ((it.one, 1, 2), (it.two, 2, 1)):
        assert station.node.phase is Phase.SPLIT
        assert station.node.conflicts == Conflicts(own, other, 1, ((2, 3),))
    it.two = Station(2)
    it.two.node.start()
    it.one.node.lost()
    it.connect()
    it.one.receive(*it.two.sent())
    assert it.one.node.state is State.CUT  # it had not been alone
    it.two.receive(*it.one.sent())
    it.carry()
    assert it.one.node.state is State.PAIRED


def test_a_refusal_is_told() -> None:
    it = met()
    it.one.receive(Error(99, "no room"))
    assert it.one.told("partner-refused") == [{"code": 99, "message": "the partner says: no room"}]
    assert (it.one.cable.closed, it.one.node.state) == (True, State.CUT)


# -- a clean stop -----------------------------------------------
def test_a_clean_stop_gives_everything_and_says_so_last() -> None:
    it = met()
    it.own(it.two, 5)
    it.two.desk.dirt[5] = ((10, 11),)
    left: list[bool] = []
    it.two.node.leave(left.append)
    it.one.desk.calls.clear()
    it.carry(write=False)
    assert left == [True]
    assert (it.two.node.state, it.two.cable.closed) == (State.WAITING, True)
    assert it.one.desk.of("take over")[0] == (((10, 11),), set())
    assert it.one.node.state is State.CUT
    it.one.write()
    assert (it.one.node.state, it.one.node.proof) == (State.ALONE, Proof.BYE)
    assert it.one.rights.obtain(0, 8) == []


def test_who_has_left_may_come_back() -> None:
    it = met()
    it.two.node.leave(lambda _: None)
    it.carry()
    it.two = Station(2)
    it.pair()


def test_a_stop_without_a_link_gives_nothing() -> None:
    it = met()
    it.own(it.two, 5)
    left: list[bool] = []
    it.cut()
    it.two.node.leave(left.append)
    assert left == [False]


def test_a_link_that_ends_while_all_is_given() -> None:
    it = met()
    it.own(it.two, 5)
    left: list[bool] = []
    it.two.node.leave(left.append)
    it.cut()
    assert left == [False]
    assert it.two.rights.held[5]


@pytest.mark.parametrize("phase", [Phase.HELLO, Phase.RECORDS, Phase.READY, Phase.UP])
def test_a_bye_that_says_no_more(phase: Phase) -> None:
    it = met()
    if phase is not Phase.UP:
        it.cut()
        it.connect()
    steps = [Phase.HELLO, Phase.RECORDS, Phase.READY].index(phase) if phase is not Phase.UP else 0
    it.one.receive(*(hello(2), Record((), (), (), ()))[:steps])
    assert it.one.node.phase is phase
    it.one.receive(Bye(Goodbye.RECONNECTING))
    assert it.one.cable.closed
    assert it.one.node.state is State.CUT
    assert not it.one.writes


# -- every message reaches the rights ---------------------------
def test_what_two_hosts_do_goes_back_and_forth() -> None:
    it = met()
    it.own(it.one, 4)
    it.own(it.two, 4)
    ended: list[OSError | None] = []
    it.one.rights.ask(4, 5, ended.append)
    it.carry()
    assert ended == [None]
    it.two.desk.copying = {4}
    it.own(it.one, 4)
    it.two.rights.freed([4])
    it.carry()
    assert ("free", [4]) in it.one.desk.calls
    it.one.rights.drop([4])
    it.carry()
    assert not it.two.rights.other.any()
    assert not it.one.rights.own.any()


# -- a planned takeover -----------------------------------------
class Front:
    """Hosts at a node."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.done: list[object] = []
        self.on = True

    def stop(self, force: bool, done: object) -> None:
        self.force = force
        self.done.append(done)

    def go_on(self) -> None:
        self.on = True

    def stopped(self, reason: str | None = None) -> None:
        self.on = reason is not None
        self.done.pop()(reason)  # type: ignore[operator]


def test_a_planned_takeover_takes_everything() -> None:
    it = met()
    it.own(it.two, 3, 5)
    it.two.desk.copying = {5}
    hosts, outcome = Front(), list[Exception | None]()
    it.two.node.serve(hosts)
    it.one.node.take(True, outcome.append)
    it.carry()
    assert hosts.force
    assert outcome == []
    assert it.two.rights.own.any()  # hosts are still being answered
    hosts.stopped()
    it.carry()
    assert runs_of(it.one.rights.own) == ((3, 4), (5, 6))
    assert outcome == []  # a copy of the other is under way
    it.two.rights.freed([5])
    it.carry()
    assert outcome == [None]
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert list(each(runs_of(it.two.rights.other))) == [3, 5]
    it.two.node.take(False, outcome.append)  # and back
    it.carry()
    assert outcome == [None, None]
    assert runs_of(it.two.rights.own) == ((3, 4), (5, 6))


def test_hosts_that_are_connected_there() -> None:
    it = met()
    it.own(it.two, 5)
    hosts, outcome = Front(), list[Exception | None]()
    it.two.node.serve(hosts)
    it.one.node.take(False, outcome.append)
    it.carry()
    hosts.stopped("2 hosts are connected")
    it.carry()
    assert [type(error) for error in outcome] == [BusyError]
    assert "2 hosts" in str(outcome[0])
    assert it.two.rights.held[5]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_cut_makes_a_takeover_void(stopped: bool) -> None:
    it = met()
    it.own(it.two, 5)
    it.two.desk.copying = {5}
    hosts, outcome = Front(), list[Exception | None]()
    it.two.node.serve(hosts)
    it.one.node.take(True, outcome.append)
    it.carry()
    if stopped:
        hosts.stopped()
        it.two.loop.run_soon()
    it.cut()
    assert type(outcome[0]).__name__ == "UnreachableError"
    assert hosts.on
    if not stopped:
        hosts.stopped()  # too late
    it.pair()
    it.carry()
    assert len(outcome) == 1
    assert it.two.rights.own[5] != it.one.rights.own[5]  # one of the two has it


def test_nobody_to_take_from() -> None:
    it = alone()
    outcome: list[Exception | None] = []
    it.one.node.take(False, outcome.append)
    it.one.loop.run_soon()
    assert outcome == [None]
    with pytest.raises(WrongStateError):
        it.two.node.take(False, outcome.append)


def test_one_takeover_at_a_time() -> None:
    it = met()
    outcome: list[Exception | None] = []
    it.two.node.serve(Front())
    it.one.node.take(False, outcome.append)
    with pytest.raises(BusyError):
        it.one.node.take(False, outcome.append)
    it.carry()
    with pytest.raises(BusyError):
        it.two.node.take(False, outcome.append)
    it.two.receive(Take(True))  # again, before TAKEN
    assert it.two.cable.error is not None
    assert it.two.cable.error.code is ErrorCode.ANSWER
    it.two.node.lost()


def test_two_takeovers_that_cross_are_both_refused() -> None:
    it = met()
    outcome: list[Exception | None] = []
    it.one.node.take(False, outcome.append)
    it.two.node.take(False, outcome.append)
    it.carry()
    assert [type(error) for error in outcome] == [BusyError, BusyError]


def test_taken_without_take() -> None:
    it = met()
    it.one.receive(messages.Taken(0, ""))
    assert it.one.cable.error is not None
    assert it.one.cable.error.code is ErrorCode.ANSWER


def test_who_stops_is_not_taken_from_and_does_not_take() -> None:
    it = met()
    it.own(it.two, 5)
    it.two.desk.copying = {5}
    outcome: list[Exception | None] = []
    left: list[bool] = []
    it.two.node.serve(Front())
    it.one.node.take(False, outcome.append)
    it.carry()
    it.two.node.leave(left.append)  # while it gives
    it.carry()
    assert [type(error) for error in outcome] == [BusyError]
    with pytest.raises(BusyError):
        it.two.node.take(False, outcome.append)
    it.one.node.take(False, outcome.append)
    it.carry()
    assert [type(error) for error in outcome] == [BusyError, BusyError]
    it.two.rights.freed([5])
    it.carry()
    assert left == [True]


def test_who_takes_leaves_without_giving() -> None:
    it = met()
    left: list[bool] = []
    it.one.node.take(False, lambda error: None)
    it.one.node.leave(left.append)
    assert left == [False]


# -- a node that serves hosts no longer -------------------------
def test_everything_is_given_unasked() -> None:
    it = met()
    it.own(it.two, 3, 5)
    it.two.desk.copying = {5}
    given: list[bool] = []
    it.two.node.give(given.append)
    it.carry()
    assert runs_of(it.one.rights.own) == ((3, 4), (5, 6))
    assert given == []  # a copy of its own is under way
    it.two.rights.freed([5])
    it.carry()
    assert given == [True]
    assert it.one.node.state is it.two.node.state is State.PAIRED


def test_one_giving_is_the_answer_to_a_takeover_that_comes_meanwhile() -> None:
    it = met()
    it.own(it.two, 5)
    it.two.desk.copying = {5}
    hosts, outcome, given = Front(), list[Exception | None](), list[bool]()
    it.two.node.serve(hosts)
    it.two.node.give(given.append)
    it.carry()
    it.one.node.take(False, outcome.append)
    it.carry()
    assert hosts.done == []  # they are out already
    with pytest.raises(BusyError):
        it.two.node.give(given.append)
    it.two.rights.freed([5])
    it.carry()
    assert (outcome, given) == ([None], [True])


def test_a_takeover_under_way_is_the_giving() -> None:
    it = met()
    it.own(it.two, 5)
    hosts, outcome, given = Front(), list[Exception | None](), list[bool]()
    it.two.node.serve(hosts)
    it.one.node.take(False, outcome.append)
    it.carry()
    it.two.node.give(given.append)
    it.carry()
    assert (outcome, given) == ([], [])
    hosts.stopped()
    it.carry()
    assert (outcome, given) == ([None], [True])


def test_a_cut_ends_the_giving_and_lets_nobody_in_again() -> None:
    it = met()
    it.own(it.two, 5)
    it.two.desk.copying = {5}
    hosts, given = Front(), list[bool]()
    hosts.on = False
    it.two.node.serve(hosts)
    it.two.node.give(given.append)
    it.carry()
    it.cut()
    it.two.loop.run_soon()
    assert given == [False]
    assert not hosts.on
    it.two.node.give(given.append)
    it.two.loop.run_soon()
    assert given == [False, False]
    it.pair()
    it.carry()
    assert it.two.rights.own[5] != it.one.rights.own[5]  # one of the two has it


def test_who_takes_or_leaves_does_not_give() -> None:
    it = met()
    it.own(it.two, 5)
    it.two.desk.copying = {5}
    given: list[bool] = []
    it.one.node.take(False, lambda error: None)
    with pytest.raises(BusyError):
        it.one.node.give(given.append)
    it.carry()
    it.two.node.leave(lambda left: None)
    with pytest.raises(BusyError):
        it.two.node.give(given.append)
    assert given == []


# -- the lead ---------------------------------------------------


def leads(it: Two) -> tuple[bool, bool]:
    return it.one.node.lead.is_here, it.two.node.lead.is_here


def test_node_1_leads_until_another_does_and_both_agree() -> None:
    it = Two()
    it.pair()
    assert leads(it) == (True, False)
    it.one.node.take_lead()
    it.carry()
    assert leads(it) == (True, False)
    it.two.node.take_lead()
    it.carry()
    assert leads(it) == (False, True)
    it.cut()
    it.pair()  # the claim goes with HELLO
    assert leads(it) == (False, True)
    it.one.node.take_lead()
    it.carry()
    assert leads(it) == (True, False)


def test_leads_that_cross_leave_it_with_node_1() -> None:
    it = Two()
    it.pair()
    it.two.node.take_lead()
    it.one.node.take_lead()
    it.carry()
    assert leads(it) == (True, False)
    it.two.node.take_lead()
    it.carry()
    assert leads(it) == (False, True)


def test_a_takeover_moves_the_lead_and_it_stays() -> None:
    it = Two()
    it.pair()
    outcome: list[Exception | None] = []
    it.two.node.take(False, outcome.append)
    it.carry()
    assert outcome == [None]
    assert leads(it) == (False, True)
    it.cut()
    it.one.node.fenced(Proof.WORD)
    it.one.write()
    assert it.one.node.lead.is_here
    it.one.node.take_lead()  # it has it
    it.two = Station(2)
    it.pair()
    assert leads(it) == (True, False)


def test_the_lead_is_not_moved_behind_the_other_ones_back() -> None:
    it = Two()
    it.pair()
    it.cut()
    with pytest.raises(UnreachableError):
        it.two.node.take_lead()
    assert leads(it) == (True, False)


def test_a_node_that_joins_a_partner_that_has_begun_anew_too_has_everything_compared() -> None:
    """What its predecessor wrote alone may be in no record: its own is a new one."""
    joins = Station(2, paired=False)
    joins.node.ledger.lasting = replace(joins.node.lasting, volume=NIL)
    it = Two(Station(1, stored=((3, 4),)), joins)
    it.pair()
    assert it.one.rights.own.all()
    assert it.one.node.comparisons == 1
