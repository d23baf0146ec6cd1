"""The table of docs/partner-protocol.md, "Rights": one extent at one node, event by event."""

from __future__ import annotations

import pytest

from bitmapd.partner.messages import Add, Ask, Free, Got, Grant, Remove, Status
from bitmapd.peer.frames import ErrorCode, PeerError
from tests.unit.partner.homes import Bench

E = 3  # the extent
AT = ((E, E + 1),)
STATES = ("none", "own", "giving", "other", "owed")


def bench(state: str, node: int = 1) -> Bench:
    made = Bench(node)
    made.state(state, E)
    made.turn()
    return made


# -- hosts -----------------------------------------------
@pytest.mark.parametrize("state", STATES)
def test_a_host_writes(state: str) -> None:
    it = bench(state)
    assert bool(it.rights.held[E]) is (state == "own")
    assert it.rights.obtain(E, E + 1) == ([] if state == "own" else [E])
    if state == "own":
        return
    it.write(E)
    assert it.rights.is_pending(E)
    assert it.rights.waiting == it.rights.pending_extents == 1
    sent = it.turn()
    if state == "giving":  # it waits until it has been given, and asks then
        assert sent == []
        sent = it.land()[1:]
    assert sent == [Add(1, AT, (), ())]
    assert it.served == []  # asked is not granted


@pytest.mark.parametrize("state", STATES)
def test_a_host_reads(state: str) -> None:
    it = bench(state)
    free = state in ("none", "own", "giving")
    assert it.rights.may_read(E, E + 1) is free
    assert it.rights.may_read(E, E + 2) is free
    if not free:
        ended = it.read(E, E + 1)
        assert it.turn() == [Ask(1, ((2 * E, 2 * E + 2),))]
        assert ended == []
        it.rights.status(Status(1, 0, (), True))
        assert ended == [None]
        assert it.rights.waiting == 0


# -- ADD -----------------------------------------------
@pytest.mark.parametrize("state", ["none", "other"])
def test_what_nobody_else_uses_is_granted_at_once_and_known_first(state: str) -> None:
    it = bench(state)
    assert it.add(AT) == [Grant(it.number, AT, (), (), (), True)]
    assert it.state_of(E) == "other"
    assert ("keep", AT) in it.desk.calls


def test_what_is_own_is_given_when_its_writes_have_landed() -> None:
    it = bench("own")
    it.desk.dirt[E] = ((2 * E, 2 * E + 1),)
    it.desk.copying = {E}
    assert it.add(AT) == []
    assert it.state_of(E) == "giving"
    assert not it.rights.held[E]
    assert it.land() == [Grant(it.number, AT, (), AT, ((2 * E, 2 * E + 1),), True)]
    assert it.state_of(E) == "owed"
    assert it.rights.handovers == 1
    assert it.rights.unfree == AT


def test_what_is_being_given_already_answers_the_request() -> None:
    it = bench("giving")
    assert it.add(AT) == []
    assert it.land() == [Grant(it.number, AT, (), (), (), True)]


def test_what_is_asked_for_twice_ends_the_connection() -> None:
    it = bench("own")
    it.add(AT)
    with pytest.raises(PeerError) as raised:
        it.add(AT)
    assert raised.value.code is ErrorCode.ANSWER
    assert it.state_of(E) == "giving"


def test_the_grant_on_its_way_is_the_answer() -> None:
    """A right is granted once (rule 15)."""
    it = bench("owed")
    assert it.add(AT) == [Grant(it.number, (), (), (), (), True)]
    assert it.state_of(E) == "owed"
    assert it.add((), AT) == [Grant(it.number, (), (), (), (), True)]


@pytest.mark.parametrize("node", [1, 2])
def test_of_two_adds_that_cross_node_1s_goes_first(node: int) -> None:
    it = bench("none", node)
    it.write(E)
    assert it.turn() == [Add(1, AT, (), ())]
    answer = it.add(AT)
    if node == 2:
        assert answer == [Grant(1, AT, (), (), (), True)]
        return
    assert answer == []
    assert it.grant(1, AT) == []
    assert it.served == [E]  # whoever waited goes first (rule 6)
    assert it.state_of(E) == "giving"
    assert it.land() == [Grant(1, AT, (), (), (), True)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("wish", ["", "want", "guess"])
def test_a_guess_takes_nothing(state: str, wish: str) -> None:
    it = bench(state)
    if wish == "want":
        it.write(E)
    elif wish == "guess":
        it.rights.guess(AT)
    it.turn()
    asked = wish == "want" and state in ("none", "other", "owed")
    asked |= wish == "guess" and state == "none"
    (answer,) = it.add((), AT)
    assert isinstance(answer, Grant)
    if state == "owed":
        assert (answer.granted, answer.refused) == ((), ())
    elif state in ("own", "giving") or asked:
        assert (answer.granted, answer.refused) == ((), AT)
    else:
        assert (answer.granted, answer.refused) == (AT, ())
        assert it.state_of(E) == "other"


def test_an_add_removes_before_it_asks() -> None:
    it = bench("other")
    it.add((), (), AT)
    assert it.state_of(E) == "none"
    assert ("forget", AT) in it.desk.calls


def test_an_add_is_checked_as_a_whole() -> None:
    it = Bench()
    it.own(0)
    it.others(1)
    with pytest.raises(PeerError) as raised:
        it.rights.added(Add(9, ((2, 3),), (), ((0, 2),)))
    assert raised.value.code is ErrorCode.ANSWER
    assert it.state_of(1) == "other"
    with pytest.raises(PeerError) as raised:
        it.rights.added(Add(9, AT, AT, ()))
    assert raised.value.code is ErrorCode.RUNS
    assert it.state_of(E) == "none"


def test_request_numbers_grow() -> None:
    it = Bench()
    it.add(AT)
    for message in (Add(1, ((5, 6),), (), ()), Ask(1, ((0, 1),))):
        with pytest.raises(PeerError) as raised:
            it.rights.added(message) if isinstance(message, Add) else it.rights.asked(message)
        assert raised.value.code is ErrorCode.ANSWER


def test_so_many_requests_at_a_time_and_no_more() -> None:
    it = Bench()
    it.own(E)
    for number in range(1, 64):
        it.rights.asked(Ask(number, ((2 * E, 2 * E + 1),)))
    it.rights.added(Add(64, AT, (), ()))
    with pytest.raises(PeerError) as raised:
        it.rights.asked(Ask(65, ((0, 1),)))
    assert raised.value.code is ErrorCode.BUSY
    assert len(it.land()) == 64
    it.rights.asked(Ask(66, ((0, 1),)))


# -- GRANT -----------------------------------------------
@pytest.mark.parametrize("state", ["none", "other", "owed"])
def test_what_was_wanted_comes(state: str) -> None:
    it = bench(state)
    it.write(E)
    it.turn()
    dirt = ((2 * E + 1, 2 * E + 2),)
    # Only what was the other's may have been owed there, and only for that GOT is waited for.
    assert it.grant(1, AT, embargo=AT, dirt=dirt) == ([] if state == "none" else [Got(7)])
    assert it.state_of(E) == "own"
    assert it.served == [E]
    assert it.rights.own_extents == 1
    assert it.desk.of("take over")[-1] == (dirt, {E})
    assert ("keep", AT) in it.desk.calls
    assert not it.rights.is_pending(E)


@pytest.mark.parametrize("state", ["own", "giving"])
def test_what_is_own_cannot_be_granted(state: str) -> None:
    it = bench(state)
    with pytest.raises(PeerError) as raised:
        it.grant(0, AT)
    assert raised.value.code is ErrorCode.ANSWER
    assert it.state_of(E) == state


def test_what_was_not_asked_for_is_not_granted() -> None:
    it = bench("none")
    it.write(5)
    it.turn()
    for wrong in (lambda: it.grant(1, AT), lambda: it.grant(2, ()), lambda: it.grant(1, (), AT)):
        with pytest.raises(PeerError) as raised:
            wrong()
        assert raised.value.code is ErrorCode.ANSWER
    assert it.state_of(E) == "none"
    assert it.rights.is_pending(5)


def test_what_comes_unasked_is_ours() -> None:
    it = bench("other")
    assert it.grant(0, AT, last=False) == [Got(7)]
    assert it.state_of(E) == "own"


def test_answers_come_in_parts() -> None:
    it = Bench()
    it.write(1)
    it.write(2)
    it.turn()
    it.grant(1, ((1, 2),), last=False)
    assert it.served == [1]
    it.grant(1, ((2, 3),))
    assert it.served == [1, 2]
    with pytest.raises(PeerError):
        it.grant(1, ())


def test_what_comes_back_waits_for_an_old_copy_of_ours() -> None:
    """Embargo without that the other says so: the copy that is still under way is ours."""
    it = bench("own")
    it.desk.copying = {E}
    it.add(AT)
    it.land()
    it.write(E)
    it.turn()
    it.grant(1, AT)
    assert it.desk.of("take over")[-1] == ((), {E})
    assert it.rights.unfree == ()  # it is ours now, so nobody else waits for it
    it.rights.free(Free(AT))  # of the other: our own copy is not over by that
    assert it.desk.of("free")[-1] == []
    it.rights.freed([E])
    assert it.desk.of("free")[-1] == [E]
    assert it.turn() == []  # nothing to say: it is ours


def test_a_guess_that_is_granted_and_one_that_is_refused() -> None:
    it = Bench()
    it.write(1)
    assert it.rights.guess(((2, 4),)) == [(2, 4)]
    assert it.turn() == [Add(1, ((1, 2),), ((2, 4),), ())]
    it.grant(1, ((1, 3),), ((3, 4),))
    assert ("guessed", ((2, 3),)) in it.desk.calls
    assert ("refused", ((3, 4),)) in it.desk.calls
    assert ("forget", ((3, 4),)) in it.desk.calls
    assert it.rights.refused_guesses == 1
    assert (it.state_of(2), it.state_of(3)) == ("own", "none")


def test_a_refused_guess_that_a_write_waits_for_is_asked_for_again() -> None:
    it = Bench()
    it.rights.guess(((1, 2), (E, E + 1)))
    it.rights.flush()
    assert it.turn() == [Add(1, (), ((1, 2), (E, E + 1)), ())]
    it.write(1)
    assert it.rights.guess(((1, 2),)) == [(1, 2)]
    assert it.turn() == []  # it is asked for already
    assert it.grant(1, (), ((1, 2), (E, E + 1))) == [Add(2, ((1, 2),), (), ())]
    assert it.desk.of("forget")[-1] == ((E, E + 1),)


def test_a_guess_of_this_turn_becomes_a_need() -> None:
    it = Bench()
    it.rights.guess(AT)
    it.write(E)
    it.write(E)
    assert it.turn() == [Add(1, AT, (), ())]
    it.grant(1, AT)
    assert it.served == [E, E]


def test_what_is_the_others_is_not_guessed() -> None:
    it = Bench()
    it.others(1)
    it.own(2)
    it.owed(3)
    assert it.rights.guess(((1, 5),)) == [(2, 3), (4, 5)]
    assert it.turn() == []  # a guess goes only with what is needed, or is flushed by the caller
    it.rights.flush()
    assert it.turn() == [Add(1, (), ((4, 5),), ())]


# -- what is given and what is not -----------------------------------------------
def test_what_waits_for_its_own_page_is_given_after_it_was_submitted() -> None:
    """Rule 6: a granted extent serves whoever waited for it."""
    it = Bench()
    it.write(E, submitted=False)
    it.write(E, submitted=False)
    it.turn()
    it.add(AT)
    it.grant(1, AT)
    assert it.desk.landing == []
    assert it.state_of(E) == "own"
    assert it.rights.drop([E]) == []  # nor does it leave the record
    it.rights.hand_over([E])
    it.rights.release(E)
    assert it.desk.landing == []
    it.rights.release(E)
    assert it.state_of(E) == "giving"
    assert it.land() == [Grant(1, AT, (), (), (), True)]


def test_what_has_been_served_is_released_even_if_nobody_asks() -> None:
    it = Bench()
    it.write(E, submitted=False)
    it.turn()
    it.grant(1, AT)
    it.rights.release(E)
    assert it.rights.drop([E]) == [E]


def test_one_add_for_several_is_answered_when_each_is_free() -> None:
    it = Bench()
    it.own(1)
    assert it.add(((1, 3),)) == [Grant(1, ((2, 3),), (), (), (), False)]
    assert it.land() == [Grant(1, ((1, 2),), (), (), (), True)]


def test_got_ends_what_is_owed_up_to_that_grant() -> None:
    it = Bench()
    it.own(1, 2)
    it.rights.hand_over([1])
    it.desk.send(Got(0))
    for call in it.desk.landing:
        call()
    it.desk.landing = []
    it.rights.hand_over([2])
    for call in it.desk.landing:
        call()
    it.rights.got(Got(2))
    assert (it.state_of(1), it.state_of(2)) == ("other", "owed")
    it.rights.got(Got(3))
    assert it.state_of(2) == "other"


def test_got_of_what_has_come_back_changes_nothing() -> None:
    it = bench("owed")
    it.write(E)
    it.turn()
    it.grant(1, AT)
    it.rights.got(Got(99))
    assert it.state_of(E) == "own"
    assert not it.rights.other[E]


@pytest.mark.parametrize("state", STATES)
def test_remove(state: str) -> None:
    it = bench(state)
    if state in ("own", "giving", "owed"):
        with pytest.raises(PeerError) as raised:
            it.rights.removed(Remove(AT))
        assert raised.value.code is ErrorCode.ANSWER
        assert it.state_of(E) == state
    else:
        it.rights.removed(Remove(AT))
        assert it.state_of(E) == "none"
        assert ("forget", AT) in it.desk.calls


def test_what_is_asked_for_stays_stored_when_the_other_removes_it() -> None:
    it = bench("other")
    it.write(E)
    it.turn()
    it.rights.removed(Remove(AT))
    assert it.desk.of("forget") == [()]


# -- drop -----------------------------------------------
@pytest.mark.parametrize("state", STATES)
def test_drop(state: str) -> None:
    it = bench(state)
    assert it.rights.drop([E]) == ([E] if state == "own" else [])
    assert it.turn() == ([Remove(AT)] if state == "own" else [])
    assert it.state_of(E) == ("none" if state == "own" else state)


def test_what_is_dropped_is_given_if_the_other_waits_for_it() -> None:
    it = Bench()
    it.write(E, submitted=False)
    it.turn()
    it.add(AT)
    it.grant(1, AT)
    it.rights._wants.reserved.clear()  # as if it had been kept for another reason
    assert it.rights.drop([E]) == []
    assert it.land() == [Grant(1, AT, (), (), (), True)]


def test_a_grant_that_follows_makes_the_removal_untrue() -> None:
    """REMOVE must not speak of an older ownership than the GRANT in front of it."""
    it = bench("own")
    it.rights.drop([E])
    it.rights.added(Add(1, AT, (), ()))
    assert it.turn() == [Grant(1, AT, (), (), (), True)]


# -- the order on the wire -----------------------------------------------
def test_got_free_and_remove_go_first() -> None:
    it = Bench()
    it.own(1, 2)
    it.others(5)
    it.desk.copying = {2}
    it.add(((2, 3),))
    it.land()
    it.rights.granted(Grant(0, ((5, 6),), (), (), (), False), 8)
    it.rights.freed([2])
    it.rights.drop([1])
    it.rights.added(Add(it.number + 1, ((7, 8),), (), ()))
    assert it.turn() == [
        Got(8),
        Free(((2, 3),)),
        Remove(((1, 2),)),
        Grant(it.number + 1, ((7, 8),), (), (), (), True),
    ]


def test_an_add_takes_removals_along_and_goes_behind_got_and_free() -> None:
    it = Bench()
    it.own(1, 2)
    it.others(5)
    it.desk.copying = {2}
    it.add(((2, 3),))
    it.land()
    it.rights.granted(Grant(0, ((5, 6),), (), (), (), False), 8)
    it.rights.freed([2])
    it.rights.drop([1])
    it.write(E)
    assert it.turn() == [Got(8), Free(((2, 3),)), Add(1, AT, (), ((1, 2),))]
    assert it.rights.messages == 1


def test_one_add_for_all_misses_of_a_turn() -> None:
    it = Bench()
    for extent in (1, 2, 5):
        it.write(extent)
    assert it.turn() == [Add(1, ((1, 3), (5, 6)), (), ())]


def test_no_more_requests_than_the_other_takes() -> None:
    it = Bench()
    it.rights.most_requests = 1
    it.write(1)
    it.turn()
    it.write(2)
    it.write(4)
    assert it.turn() == []
    assert it.grant(1, ((1, 2),)) == [Add(2, ((2, 3), (4, 5)), (), ())]
    it.others(6)
    it.read(6, 7)
    assert it.turn() == []
    it.rights.granted(Grant(2, ((2, 3), (4, 5)), (), (), (), True), 8)
    (ask,) = it.turn()
    assert isinstance(ask, Ask)
    it.write(7)
    assert it.turn() == []
    it.rights.status(Status(ask.request, 0, (), True))
    assert it.turn() == [Add(4, ((7, 8),), (), ())]


def test_what_need_not_be_said_now_gathers_while_the_link_is_full() -> None:
    it = Bench()
    it.own(1, 2)
    it.rights.has_room = lambda: False
    for extent in (1, 2):
        it.rights.drop([extent])
        it.write(extent + 3)
        assert it.turn() == []
    assert it.add(AT) == [Remove(((1, 3),)), Grant(it.number, AT, (), (), (), True)]
    it.rights.has_room = lambda: True
    it.rights.flush()
    assert it.turn() == [Add(1, ((4, 6),), (), ())]
