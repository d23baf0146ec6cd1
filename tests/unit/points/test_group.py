"""points/group: what follows, of every state of two members; and what a member does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest

from bitmapd.gate.cycle import Void
from bitmapd.gate.withheld import Withheld
from bitmapd.points.group import (
    AWAY_S,
    FIRST,
    HEARD_S,
    LAGS,
    REMEMBERED,
    UNHEARD,
    Act,
    Decision,
    Member,
    Order,
    Seen,
    Stage,
    decide,
    newest_of_all,
)
from bitmapd.points.messages import ApplyUpTo, Message
from tests.support.sim import SimLoop

G, OLD = FIRST + 7, FIRST + 3
IDLE = Seen("a", True, "", False, "", Stage.NONE, 0, (), 0)


def said(seen: Seen) -> dict[str, Any]:
    return asdict(seen) | {"stage": seen.stage.value}


def test_what_a_member_says_comes_back_as_it_was() -> None:
    seen = replace(IDLE, label="L", stage=Stage.SENT, number=G, committed=(OLD,), applies=OLD)
    assert Seen.of("a", said(seen)) == seen
    with pytest.raises((KeyError, ValueError)):
        Seen.of("a", said(seen) | {"stage": "asleep"})


def test_the_newest_of_all_is_in_the_order_of_the_members() -> None:
    assert newest_of_all([]) == 0
    assert newest_of_all([(5, 9, 3), (9, 3), (9, 3, 7)]) == 3
    assert newest_of_all([(1, 5), (1, 6)]) == 0, "cut alone is of no group"
    assert newest_of_all([(0, 5), (0,)]) == 0


def states() -> Iterator[tuple[Seen, Seen]]:
    """Of two members with a point of the group under way, or none."""
    ones = [
        replace(IDLE, is_due=due, is_ready=ready, is_still=still)
        for due, ready, still in product((False, True), repeat=3)
    ]
    ones += [
        replace(IDLE, stage=stage, number=number, is_ready=False, committed=committed)
        for stage in (Stage.CUT, Stage.SENT, Stage.ENDED)
        for number in (G, G + 1)
        for committed in ((), (OLD,))
    ]
    ones += [replace(IDLE, committed=(OLD, G)), replace(IDLE, committed=(G,), applies=G)]
    ones += [
        replace(IDLE, stage=stage, number=G, is_ready=False, obstacle="away", away_s=AWAY_S)
        for stage in (Stage.CUT, Stage.SENT, Stage.ENDED)
    ]
    yield from product(ones, [replace(one, name="b") for one in ones])


@pytest.mark.parametrize("absent", [(), ("c",)])
def test_whatever_the_members_say_no_order_breaks_the_promise(absent: tuple[str, ...]) -> None:
    acts: set[Act] = set()
    for pair in states():
        decision = decide(pair, absent)
        has = [{seen.number, *seen.committed} for seen in pair]
        for order in decision.orders:
            acts.add(order.act)
            holders = [seen for seen in pair if seen.number == order.number]
            if order.act is Act.CUT:
                assert not absent
                assert all(seen.stage is Stage.NONE and seen.is_ready for seen in pair)
                assert all(seen.is_still for seen in pair)
            elif order.act is Act.STILL:
                assert not absent
                assert all(seen.is_ready for seen in pair), "hosts would be slow for nothing"
            elif order.act is Act.END:
                assert not absent
                assert all(order.number in numbers for numbers in has)
                assert all(seen.stage is not Stage.CUT for seen in holders)
            elif order.act is Act.APPLY:
                assert not absent
                assert all(order.number in seen.committed for seen in pair)
            else:
                assert order.act is Act.VOID
                away = any(seen.away_s for seen in holders)
                assert absent or away or not all(order.number in numbers for numbers in has)
                assert any(seen.stage in (Stage.CUT, Stage.SENT) for seen in holders)
    assert acts == ({Act.VOID} if absent else set(Act) - {Act.RELEASE})


def test_a_group_is_cut_with_the_label_of_who_has_one_and_waits_for_who_cannot() -> None:
    due = replace(IDLE, is_due=True, label="L")
    assert decide([IDLE, due], ()) == Decision((Order(Act.CUT, 0, "L"),), "", True)
    assert decide([IDLE, IDLE], ()) == Decision()
    direct = replace(IDLE, name="b", is_still=False)
    assert decide([due, direct], ()) == Decision((Order(Act.STILL),), "", True)
    assert decide([IDLE, direct], ()) == Decision()
    away = replace(IDLE, name="b", obstacle="its receiver is away", is_ready=False)
    assert decide([due, away], ()) == Decision((), "b: its receiver is away", True)
    assert decide([due], ["c"]).waits_for == "c does not answer"


def test_who_has_many_that_others_may_lack_says_end_last() -> None:
    sent = replace(IDLE, stage=Stage.SENT, number=G, is_ready=False)
    behind = replace(sent, name="b", unapplied=LAGS)
    assert decide([sent, behind], ()).orders == (Order(Act.END, G, later=("b",)),)
    ended = replace(sent, stage=Stage.ENDED)
    assert decide([ended, behind], ()).orders == ()
    done = replace(IDLE, committed=(G,))
    assert decide([done, behind], ()).orders == (Order(Act.END, G),)
    assert decide([IDLE, behind], ()).orders == (Order(Act.VOID, G),), "it is lost there"
    also = replace(behind, name="a")
    assert decide([also, behind], ()).orders == (Order(Act.END, G),), "nobody can be the first"
    few = replace(behind, unapplied=LAGS - 1)
    assert decide([sent, few], ()).orders == (Order(Act.END, G),)


def test_a_point_does_not_wait_for_a_receiver_that_went_away() -> None:
    sent = replace(IDLE, stage=Stage.SENT, number=G, is_ready=False)
    away = replace(sent, name="b", stage=Stage.CUT, obstacle="its receiver is away")
    assert decide([sent, replace(away, away_s=AWAY_S - 0.1)], ()) == Decision((), "", True)
    away = replace(away, away_s=AWAY_S)
    told = "b: its receiver is away"
    assert decide([sent, away], ()) == Decision((Order(Act.VOID, G),), told, True)
    ended = replace(away, stage=Stage.ENDED)
    done = replace(IDLE, committed=(G,))
    assert decide([done, ended], ()) == Decision((), told, True)
    behind = replace(away, stage=Stage.SENT, unapplied=LAGS)
    assert Act.VOID not in [order.act for order in decide([done, behind], ()).orders]


def test_a_leader_that_hangs_is_said_to(volume: Volume) -> None:
    member = volume.member
    assert member.waits_for == UNHEARD
    member.hear("")
    assert member.waits_for == ""
    volume.loop.advance(HEARD_S + 0.1)
    assert member.waits_for == UNHEARD
    member.hear("b does not answer")
    assert member.waits_for == "b does not answer"


# -- a member ---------------------------------------------------------------------------------


class Volume:
    """A sender and a gate that do what they are told."""

    def __init__(self) -> None:
        self.loop = SimLoop()
        self.answers = Withheld()
        self.patience_s = 0.05
        self.cut_obstacle, self.may_be_cut, self.is_due, self.label = "", True, False, ""
        self.unapplied = 0
        self.away_s = 0.0
        self.is_still = True
        self.done: list[object] = []
        self.member = Member("a", self, self, self.loop)

    def cut_now(self, number: int, wall_ns: int, label: str) -> None:
        assert self.answers.is_on, "answers are withheld from the cut on"
        self.done.append((number, wall_ns, label))

    def still(self) -> None:
        self.done.append("still")

    def give_up(self, reason: Void) -> None:
        self.done.append(reason)
        self.member.gave_up()

    def say(self, message: Message) -> None:
        self.done.append(message)

    def proceed(self) -> None:
        self.done.append("proceed")

    def withhold_answers(self) -> None:
        self.answers.begin()

    def release_answers(self) -> None:
        self.answers.release()


@pytest.fixture
def volume() -> Volume:
    return Volume()


def cut(volume: Volume) -> Member:
    assert volume.member.obey(Order(Act.CUT, G, "L"), 17)
    assert volume.done.pop() == (G, 17, "L")
    return volume.member


def test_a_member_whose_hosts_write_past_the_gate_is_still_before_it_is_cut(
    volume: Volume,
) -> None:
    volume.is_still = False
    assert not volume.member.obey(Order(Act.CUT, G))
    assert not volume.answers.is_on
    assert volume.member.obey(Order(Act.STILL))
    assert volume.done == ["still"]


def test_answers_are_withheld_from_cut_to_release(volume: Volume) -> None:
    answers: list[OSError | None] = []
    volume.answers.of(answers.append)(None)
    assert answers == [None]
    before = volume.answers.of(answers.append)
    member = cut(volume)
    volume.answers.of(answers.append)(OSError(5, "bad"))
    before(None)  # it was submitted before
    assert answers == [None, None]
    late = volume.answers.of(answers.append)
    volume.loop.advance(0.02)
    assert member.obey(Order(Act.RELEASE, G))
    assert [str(answer) for answer in answers[2:]] == ["[Errno 5] bad"]
    late(None)
    assert len(answers) == 4
    assert not member.obey(Order(Act.RELEASE, G)), "they were given"
    assert (member.cuts, member.hold_s, member.longest_hold_s) == (1, 0.02, 0.02)
    volume.loop.advance(1.0)
    assert volume.done == [], "the timer has gone"


def test_who_hears_nothing_gives_up(volume: Volume) -> None:
    member = cut(volume)
    volume.loop.advance(0.06)
    assert volume.done == [Void.GROUP]
    assert (member.stage, member.number, volume.answers.is_on) == (Stage.NONE, 0, False)
    assert not member.obey(Order(Act.RELEASE, G))


def test_end_is_said_when_the_leader_says_so_and_releases(volume: Volume) -> None:
    member = cut(volume)
    member.obey(Order(Act.END, G))
    assert member.stage is Stage.CUT, "not all of it was sent"
    assert not member.may_end()
    assert not member.may_end()
    member.obey(Order(Act.VOID, G + 1))
    member.obey(Order(Act.END, G))
    assert volume.done == ["proceed"]
    assert not volume.answers.is_on
    assert member.may_end()
    member.obey(Order(Act.VOID, G))
    assert member.stage is Stage.ENDED, "too late"
    member.has_committed()
    assert (member.stage, member.committed, member.may_end()) == (Stage.NONE, (G,), True)


def test_a_cut_that_others_lack_is_given_up(volume: Volume) -> None:
    member = cut(volume)
    assert not member.obey(Order(Act.CUT, G + 1)), "one at a time"
    assert not member.may_end()
    member.obey(Order(Act.VOID, G))
    assert volume.done == [Void.GROUP]
    volume.may_be_cut = False
    assert not member.obey(Order(Act.CUT, G + 1))
    member.has_committed()
    assert member.committed == (), "a point that was cut alone"


def test_the_receiver_hears_again_how_far_it_may_apply(volume: Volume) -> None:
    volume.member.linked()
    assert volume.done == []
    volume.member.obey(Order(Act.APPLY, OLD))
    volume.member.linked()
    assert volume.done == [ApplyUpTo(OLD)] * 2
    assert volume.member.seen().applies == OLD


def test_a_volume_is_cut_alone_only_if_the_group_cannot_be(volume: Volume) -> None:
    member = volume.member
    assert member.may_cut_alone, "nobody leads"
    member.hear("")
    assert not member.may_cut_alone
    member.hear("b does not answer")
    assert member.may_cut_alone
    member.hear("")
    volume.loop.advance(HEARD_S)
    assert member.may_cut_alone


def test_what_it_remembers_is_bounded(volume: Volume) -> None:
    assert volume.member.figures()["number"] is None
    for number in range(FIRST, FIRST + REMEMBERED + 3):
        assert volume.member.obey(Order(Act.CUT, number))
        volume.member.may_end()
        volume.member.obey(Order(Act.END, number))
        volume.member.has_committed()
    assert len(volume.member.committed) == REMEMBERED
    assert volume.member.figures()["number"] == FIRST + REMEMBERED + 2
    assert volume.member.patience_s == volume.patience_s
