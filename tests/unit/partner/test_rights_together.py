"""What becomes of rights when links end, views are exchanged, and the other node is dead."""

from __future__ import annotations

import errno

import pytest

from bitmapd.partner import giving, rights
from bitmapd.partner.giving import CHANGES_S, KEEP_S, MOST_CHANGES
from bitmapd.partner.messages import Add, Ask, Free, Got, Grant, Remove, Status
from bitmapd.partner.rights import Stance
from bitmapd.partner.share import Shares
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.record.extents import bits_of
from tests.unit.partner.homes import EXTENTS, Bench

E = 3
AT = ((E, E + 1),)
BLOCKS = ((2 * E, 2 * E + 2),)


def bits(it: Bench, name: str) -> list[int]:
    value = getattr(it.rights, name)
    return [extent for extent in range(EXTENTS) if value[extent]]


# -- reads -----------------------------------------------
def test_reads_of_one_turn_ask_together() -> None:
    it = Bench()
    it.others(1, 2, 5)
    first, second = it.read(1, 3), it.read(5, 6)
    assert it.turn() == [Ask(1, ((2, 6), (10, 12)))]
    third = it.read(1, 2)  # came later, so it asks anew
    assert it.turn() == [Ask(2, ((2, 4),))]
    it.rights.status(Status(1, 0, (), True))
    assert (first, second, third) == ([None], [None], [])
    it.rights.status(Status(2, 0, (), True))
    assert third == [None]
    assert it.rights.asks == 3


def test_a_read_that_nobody_has_to_be_asked_for_any_more() -> None:
    it = Bench()
    it.others(1)
    ended = it.read(1, 2)
    it.rights.removed(Remove(((1, 2),)))
    assert ended == [None]
    assert it.turn() == []


def test_a_read_that_has_asked_waits_for_its_answer() -> None:
    it = Bench()
    it.others(1)
    ended = it.read(1, 2)
    it.turn()
    it.rights.removed(Remove(((1, 2),)))
    assert ended == []


def test_reads_beyond_the_limit_ask_when_an_answer_has_come() -> None:
    it = Bench()
    it.others(1, 2)
    it.rights.most_requests = 1
    it.read(1, 2)
    it.turn()
    it.read(2, 3)
    assert it.turn() == []
    it.rights.status(Status(1, 0, (), True))
    assert it.turn() == [Ask(2, ((4, 6),))]


def test_status_gives_up_what_is_clean() -> None:
    it = Bench()
    it.others(1)
    ended = it.read(1, 2)
    it.turn()
    it.rights.status(Status(1, 0, ((1, 2),), True))
    assert ended == [None]
    assert it.state_of(1) == "none"


def test_a_status_to_nothing_or_of_what_is_ours_is_wrong() -> None:
    it = Bench()
    it.own(0)
    it.others(1)
    ended = it.read(1, 2)
    it.turn()
    for wrong in (Status(5, 0, (), True), Status(1, 0, ((0, 1),), True)):
        with pytest.raises(PeerError) as raised:
            it.rights.status(wrong)
        assert raised.value.code is ErrorCode.ANSWER
    assert ended == []


def test_status_waits_for_writes_in_flight() -> None:
    it = Bench()
    it.own(E)
    it.rights.asked(Ask(1, ((2 * E + 1, 2 * E + 2),)))
    assert it.turn() == []
    assert it.land() == [Status(1, 0, (), True)]


def test_what_was_never_written_here_is_answered_at_once() -> None:
    it = Bench()
    it.rights.asked(Ask(1, BLOCKS))
    assert it.turn() == [Status(1, 1, (), True)]


def test_what_was_asked_about_leaves_when_it_is_clean() -> None:
    it = Bench()
    it.own(1, E)
    it.desk.clean = {E}
    it.rights.asked(Ask(1, ((2, 2 * E + 2),)))
    assert it.land() == [Status(1, 0, AT, True)]
    assert it.state_of(1) == "own"
    it.desk.clean = {1}
    it.rights.tick()
    assert it.turn() == [Remove(((1, 2),))]
    it.rights.tick()
    assert it.turn() == []


def test_nothing_is_answered_on_a_link_that_is_gone() -> None:
    it = Bench()
    it.own(E)
    it.rights.asked(Ask(1, BLOCKS))
    it.rights.cut()
    it.pair(own=AT)
    assert it.land() == []


@pytest.mark.parametrize("stance", ["nothing", "frozen"])
def test_nobody_reads_before_it_is_known_what_the_other_owns(stance: str) -> None:
    it = Bench(up=False)
    if stance == "frozen":
        it.rights.freeze()
    assert it.rights.stance is Stance(stance)
    assert not it.rights.may_read(0, 1)
    ended = it.read(0, 1)
    assert it.turn() == []
    it.pair()
    assert ended == [None]


# -- a cut -----------------------------------------------
def test_a_cut_takes_no_right_away_and_retries_nothing() -> None:
    it = Bench()
    it.own(1, 2)
    it.rights.hand_over([2])
    it.others(4)
    it.write(5)
    it.rights.guess(((6, 7),))
    ended = it.read(4, 5)
    it.turn()
    it.rights.cut()
    assert bits(it, "held") == [1, 2]  # what was being given is held again (rule 10)
    assert it.land() == []  # and is not given
    assert ("refused", ((6, 7),)) in it.desk.calls
    assert it.rights.guess(((6, 7), (1, 2))) == [(1, 2)]
    assert it.rights.held[1:4].tolist() == [1, 1, 0]
    assert it.rights.waiting == 2
    it.write(7)
    assert it.turn() == []
    with pytest.raises(PeerError):
        it.grant(1, ((5, 6),))
    it.pair(own=((1, 3),), other=((4, 5),))
    assert it.desk.sent == []
    it.rights.flush()
    assert (ended, it.served) == ([], [])
    it.grant(1, ((5, 6), (7, 8)))
    assert it.served == [5, 7]


def test_what_waits_starts_over_after_the_exchange() -> None:
    it = Bench()
    it.write(5)
    it.write(1)
    it.turn()
    it.rights.cut()
    it.rights.freeze()
    assert it.turn() == []
    own = bits_of(((1, 2),), EXTENTS)
    it.rights.thaw(Shares(own, bits_of((), EXTENTS), own), ())
    assert it.served == [1]
    assert it.turn() == [Add(1, ((5, 6),), (), ())]


def test_patience_in_a_cut_ends() -> None:
    it = Bench()
    it.rights.cut_patience_s = 5.0
    it.others(4)
    it.rights.cut()
    it.loop.advance(3)
    it.rights.tick()
    it.write(1)
    ended = it.read(4, 5)
    it.loop.advance(3)
    it.write(1)
    it.rights.tick()
    assert (it.errors, ended) == ([], [])  # none has waited for so long
    it.loop.advance(2.5)
    it.rights.tick()
    assert [error.errno for error in it.errors] == [errno.EIO]
    assert [error.errno for error in ended if error is not None] == [errno.EIO]
    assert it.rights.waiting == 1
    it.rights.cut()  # another link that came to nothing
    it.loop.advance(3)
    it.rights.expire(it.loop.time())
    assert len(it.errors) == 2
    it.pair()
    it.write(2)
    it.loop.advance(60)
    it.rights.tick()
    assert len(it.errors) == 2


def test_patience_begins_with_the_cut() -> None:
    it = Bench()
    it.rights.cut_patience_s = 5.0
    it.write(1)
    it.loop.advance(60)
    it.rights.cut()
    it.loop.advance(4)
    it.rights.tick()
    assert it.errors == []
    it.loop.advance(2)
    it.rights.tick()
    assert len(it.errors) == 1


def test_a_drain_of_another_link_gives_nothing() -> None:
    it = Bench()
    it.own(E)
    it.rights.hand_over([E])
    (old,) = it.desk.landing
    it.desk.landing = []
    it.rights.cut()
    it.pair(own=AT)
    it.rights.hand_over([E])
    old()
    assert it.state_of(E) == "giving"  # writes of this link may be in flight
    assert it.land() == [Grant(0, AT, (), (), (), False)]


def test_nobody_is_impatient_unless_told() -> None:
    it = Bench()
    it.rights.cut()
    it.write(1)
    it.loop.advance(1e6)
    it.rights.tick()
    assert it.errors == []


# -- an exchange -----------------------------------------------
def test_rights_stand_still_in_an_exchange() -> None:
    it = Bench()
    it.own(1, 2)
    it.others(4)
    it.rights.cut()
    it.rights.freeze()
    view = it.rights.view(bits_of(AT, EXTENTS), fresh=False, volatile=True)
    it.desk.clean = {1, 2}
    assert it.rights.drop([1]) == []
    it.write(5)
    it.rights.hand_over([2])
    assert it.turn() == []
    assert it.rights.view(bits_of(AT, EXTENTS), fresh=False, volatile=True) == view
    assert (view.fresh, view.volatile, view.stored) == (False, True, bits_of(AT, EXTENTS))
    it.rights.learn(((4, 6), (1, 3)))
    it.rights.owe(((6, 7),))
    assert (bits(it, "own"), bits(it, "other"), bits(it, "owed")) == ([1, 2], [4, 5], [6])
    assert ("keep", ((4, 6),)) in it.desk.calls


def test_what_was_dropped_meanwhile_leaves_after_the_exchange() -> None:
    it = Bench()
    it.own(1, 2)
    it.rights.cut()
    it.rights.freeze()
    it.rights.drop([1])
    it.rights.drop([2])
    it.desk.clean = {1, 2}
    own, nothing = bits_of(((1, 2),), EXTENTS), bits_of((), EXTENTS)
    it.rights.thaw(Shares(own, nothing, nothing), ())
    assert ("guessed", ((1, 2),)) in it.desk.calls  # the policy hears that it is still there
    assert it.turn() == [Remove(((1, 2),))]


def test_after_the_exchange_all_is_as_both_have_computed() -> None:
    it = Bench()
    it.own(1, 2)
    it.desk.copying = {2}
    it.rights.hand_over([2])
    it.land()
    it.others(4, 5)
    it.rights.cut()
    it.desk.calls.clear()
    it.pair(own=((1, 4),), other=((5, 6),), dirty=((2, 3),), copying=((3, 4), (5, 6)))
    assert (bits(it, "own"), bits(it, "held")) == ([1, 2, 3], [1, 2, 3])
    assert (bits(it, "other"), bits(it, "owed")) == ([5], [])
    assert it.rights.own_extents == 3
    assert ("forget", ((4, 5),)) in it.desk.calls
    assert ("keep", ((1, 4), (5, 6))) in it.desk.calls
    # What the other still copies, and what we do and have given away and got back.
    assert it.desk.of("take over") == [(((4, 6),), {2, 3})]


def test_free_is_said_in_an_exchange() -> None:
    it = Bench()
    it.own(1)
    it.desk.copying = {1}
    it.rights.hand_over([1])
    it.land()
    it.rights.cut()
    it.rights.freeze()
    assert it.rights.unfree == ((1, 2),)
    it.rights.freed([1])
    assert it.turn() == [Free(((1, 2),))]


def test_free_is_not_said_without_a_link() -> None:
    it = Bench()
    it.own(1)
    it.desk.copying = {1}
    it.rights.hand_over([1])
    it.land()
    it.rights.cut()
    it.rights.freed([1])
    assert it.turn() == []
    assert it.rights.unfree == ()


def test_the_embargo_of_the_other_ends_with_free() -> None:
    it = Bench()
    it.rights.free(Free(AT))
    assert it.desk.of("free") == [[E]]


# -- without the other -----------------------------------------------
def test_alone_takes_what_was_the_others_and_serves_all() -> None:
    it = Bench()
    it.own(1, 2)
    it.desk.copying = {2}
    it.rights.hand_over([2])
    it.land()
    it.others(4)
    it.write(4)
    it.write(6)
    ended = it.read(4, 5)
    it.turn()
    it.rights.cut()
    it.desk.calls.clear()
    it.rights.alone()
    assert (bits(it, "own"), bits(it, "other"), bits(it, "owed")) == ([1, 2, 4, 6], [], [])
    assert it.desk.of("take over") == [(((4, 6), (8, 10)), {2})]
    assert it.desk.of("free all") == [None]
    assert (it.served, ended) == ([4, 6], [None])
    assert it.rights.obtain(0, 2) == []
    assert it.rights.held[0]
    assert it.rights.guess(((5, 6),)) == [(5, 6)]
    assert it.rights.drop([5]) == [5]
    assert it.turn() == []


def test_the_origin_is_dirty_where_its_record_says_so() -> None:
    it = Bench(up=False)
    it.rights.adopt(AT)
    assert bits(it, "held") == [E]
    assert it.desk.of("take over") == [(BLOCKS, set())]


def test_what_is_absorbed_serves_who_waited() -> None:
    it = Bench()
    it.others(4)
    it.write(4)
    it.write(5)
    it.turn()
    it.rights.cut()
    it.rights.absorb()
    assert it.served == [4]


def test_a_node_that_is_shut_out_writes_and_copies_nothing() -> None:
    it = Bench()
    it.own(1)
    it.others(4)
    it.write(4)
    ended = it.read(4, 5)
    it.rights.stop("taken over")
    assert not it.rights.held[1]
    assert it.desk.of("take over")[-1] == ((), {1})  # under embargo: nothing of it is copied
    it.write(2)
    ended += it.read(2, 3)
    later = it.read(2, 3)
    it.loop.run_soon()
    assert [error.errno for error in it.errors] == [errno.EIO, errno.EIO]
    assert ended[0] is not None
    assert later[0] is not None


def test_in_a_split_brain_writes_wait_and_reads_go() -> None:
    it = Bench()
    it.own(1)
    it.rights.split()
    it.write(1)
    it.turn()
    assert (it.served, it.errors) == ([], [])
    assert it.rights.may_read(1, 2)
    assert it.rights.may_read(0, 8)


# -- giving everything -----------------------------------------------
def test_all_is_given_when_nothing_is_ours_owed_asked_for_or_copied() -> None:
    it = Bench()
    given: list[int] = []
    it.own(1, 2)
    it.rights.guess(((5, 6),))
    it.rights.flush()
    it.turn()
    it.desk.copying = {2}
    it.rights.give_all(lambda: given.append(1))
    assert it.land() == [Grant(0, ((1, 3),), (), ((2, 3),), (), False)]
    it.grant(1, ((5, 6),))  # a guess that comes now goes back
    assert it.land() == [Grant(0, ((5, 6),), (), (), (), False)]
    it.rights.got(Got(99))
    assert it.turn() == []
    assert given == []
    it.rights.freed([2])
    assert it.turn() == [Free(((2, 3),))]
    assert given == [1]


def test_all_is_given_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "MOST_GIVEN", 2)
    monkeypatch.setattr(giving, "MOST_GIVEN", 2)
    it = Bench()
    given: list[int] = []
    it.own(*range(7))
    assert it.rights.reserve(0)  # a write that waits for our own record keeps one here
    it.rights.give_all(lambda: given.append(1))
    for first in (1, 3, 5):
        it.rights.tick()
        assert it.land() == [Grant(0, ((first, first + 2),), (), (), (), False)]
        assert not given
        it.rights.got(Got(99))
        assert it.turn() == []
    it.rights.release(0)
    it.rights.tick()
    assert it.land() == [Grant(0, ((0, 1),), (), (), (), False)]
    it.rights.got(Got(99))
    it.turn()
    assert given == [1]


@pytest.mark.parametrize("node", [1, 2])
def test_if_both_give_all_node_1s_goes_first(node: int) -> None:
    it = Bench(node)
    it.own(0)
    it.rights.give_all(lambda: None)
    it.land()
    it.grant(0, ((1, 2),))
    assert (it.land() == [Grant(0, ((1, 2),), (), (), (), False)]) is (node == 1)
    it.rights.tick()
    it.land()
    assert it.state_of(1) == "owed"


def test_what_was_given_is_not_said_on_another_link() -> None:
    it = Bench()
    given: list[int] = []
    it.rights.give_all(lambda: given.append(1))
    it.rights.cut()
    it.turn()
    assert given == []
    it.pair(own=AT)
    it.rights.tick()
    assert it.state_of(E) == "own"


def test_all_known_ends_with_a_bye() -> None:
    it = Bench()
    it.rights.forget_all()
    assert it.rights.stance is Stance.NOTHING


# -- ping-pong -----------------------------------------------
def hot(it: Bench) -> None:
    """The extent changes hands as often as is free within a second, and has come to us last."""
    for _ in range(MOST_CHANGES // 2):
        it.write(E)
        (add,) = [m for m in it.turn() if isinstance(m, Add)]
        it.grant(add.request, AT)
        it.add(AT)
        it.land()
    it.write(E)
    (add,) = [m for m in it.turn() if isinstance(m, Add)]
    it.grant(add.request, AT)


@pytest.mark.parametrize(("round_trip_s", "keep_s"), [(1.0, KEEP_S), (0.001, 0.002)])
def test_what_changes_hands_often_is_kept_for_a_moment(round_trip_s: float, keep_s: float) -> None:
    it = Bench()
    it.rights.round_trip(round_trip_s)
    hot(it)
    it.add(AT)
    assert it.rights.held[E]  # hits go on
    assert it.land() == []
    it.loop.advance(keep_s * 0.9)
    assert it.land() == []
    it.loop.advance(keep_s * 0.2)
    assert it.land() == [Grant(it.number, AT, (), (), (), True)]


def test_what_changes_hands_often_leaves_when_it_is_clean() -> None:
    it = Bench()
    hot(it)
    it.desk.clean = {E}
    it.rights.tick()
    assert it.turn() == [Remove(AT)]


def test_what_is_kept_and_clean_is_given_at_once() -> None:
    it = Bench()
    hot(it)
    it.add(AT)
    it.desk.clean = {E}
    it.rights.tick()
    assert it.land() == [Grant(it.number, AT, (), (), (), True)]
    it.loop.advance(KEEP_S)
    assert it.land() == []


def test_what_changed_hands_long_ago_is_given_at_once() -> None:
    it = Bench()
    hot(it)
    it.loop.advance(CHANGES_S * 1.1)
    it.add(AT)
    assert it.land() == [Grant(it.number, AT, (), (), (), True)]


def test_what_changes_hands_no_more_is_forgotten() -> None:
    it = Bench()
    hot(it)
    it.loop.advance(CHANGES_S * 1.1)
    it.rights.tick()
    assert it.rights._giving._changes == {}
