"""How two nodes take up a larger size (`partner/growth`): the steps, and what a cut leaves of them.

The numbers are those of the invariants there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from bitmapd.errors import BitmapdError, BusyError, UnreachableError, WrongStateError
from bitmapd.media.base import Done
from bitmapd.partner.growth import Answer
from bitmapd.partner.messages import Resize, Resized
from bitmapd.partner.node import Proof, State
from bitmapd.peer.frames import ErrorCode
from bitmapd.record.extents import joined, zeros
from tests.unit.partner.homes import EXTENTS, GEOMETRY, PER_EXTENT
from tests.unit.partner.nodes import Station, Two

BLOCK = GEOMETRY.block_bytes
LARGER = GEOMETRY.size_bytes + 3 * BLOCK
LAST = EXTENTS - 1


class Media:
    """`growth.Media`; what is asked of it is answered when the test says so."""

    def __init__(self, station: Station) -> None:
        self.station = station
        self.size_bytes = GEOMETRY.size_bytes
        self.open: deque[tuple[str, int, Callable[..., None]]] = deque()

    def look(self, size_bytes: int, answer: Answer) -> None:
        self.open.append(("look", size_bytes, answer))

    def record_end(self, done: Done) -> None:
        self.open.append(("end", 0, done))

    def enlarge(self, size_bytes: int, answer: Answer) -> None:
        self.open.append(("enlarge", size_bytes, answer))

    def grow(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        stored = self.station.was_stored
        stored.extend(zeros(-(-size_bytes // GEOMETRY.extent_bytes) - len(stored)))

    def answer(self, what: str, error: object = None) -> None:
        asked, _, answer = self.open.popleft()
        assert asked == what
        answer(error)
        self.station.loop.run_soon()


class Pair(Two):
    """Two nodes whose volume can grow; `short` if it ends within its last extent."""

    def __init__(self, *, short: bool = False) -> None:
        size = GEOMETRY.size_bytes - BLOCK if short else GEOMETRY.size_bytes
        super().__init__(Station(1, size_bytes=size), Station(2, size_bytes=size))
        self.size_bytes = size
        self.media = {station.number: self.equip(station) for station in (self.one, self.two)}
        self.ended: list[BitmapdError | None] = []
        self.pair()

    def equip(self, station: Station) -> Media:
        media = station.node.growth.media = Media(station)
        media.size_bytes = self.size_bytes
        return media

    def begin(self, station: Station, size_bytes: int = LARGER) -> None:
        station.node.growth.begin(size_bytes, self.ended.append)
        self.carry()

    def until(self, *answers: tuple[int, str]) -> None:
        for number, what in answers:
            self.media[number].answer(what)
            self.carry()


STEPS = ((2, "look"), (1, "end"), (2, "enlarge"), (1, "enlarge"))


def dirt(station: Station) -> list[object]:
    return [runs for runs, _ in station.desk.of("take over") if runs]  # type: ignore[misc]


def test_both_grow_and_the_new_part_is_the_first_ones() -> None:
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS)
    assert it.ended == [None]
    new = list(range(EXTENTS, EXTENTS + 2))
    assert [e for e in range(EXTENTS + 2) if it.one.rights.own[e]] == new
    assert [e for e in range(EXTENTS + 2) if it.two.rights.other[e]] == new
    first = EXTENTS * PER_EXTENT
    assert dirt(it.one)[-1] == ((first, first + 3),)
    assert not dirt(it.two)
    assert {it.media[1].size_bytes, it.media[2].size_bytes} == {LARGER}
    it.own(it.two, EXTENTS)  # the new part changes hands like any other


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_nobody_shows_the_size_before_both_have_it(step: int) -> None:
    """Invariant 2."""
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS[:step])
    assert {it.media[1].size_bytes, it.media[2].size_bytes} == {it.size_bytes}


def test_the_old_end_is_dirty_at_the_first_and_stays_there_meanwhile() -> None:
    """Invariant 1."""
    it = Pair(short=True)
    it.begin(it.one)
    it.until(*STEPS[:1])
    it.own(it.two, LAST)  # it comes to the first by `record_end`, and may go again
    it.media[1].answer("end")
    assert it.media[1].open[0][0] == "end"  # it is not here: once more
    it.own(it.one, LAST)
    it.until(*STEPS[1:2])
    it.two.rights.want(LAST, lambda error: True)
    it.carry()
    assert it.one.rights.held[LAST]
    assert it.one.rights.drop([LAST]) == []
    it.until(*STEPS[2:])
    assert it.ended == [None]
    at = LAST * PER_EXTENT + 1
    assert dirt(it.one)[0] == ((at, at + 4),)
    it.carry()
    assert it.two.rights.held[LAST]  # and then it goes


def test_each_node_says_why_it_cannot() -> None:
    it = Pair()
    for step, (number, what) in enumerate(STEPS):
        it.begin(it.one)
        it.until(*STEPS[:step])
        why = OSError(5, "no luck") if what == "end" else "no luck"
        it.media[number].answer(what, why)
        it.carry()
        error = it.ended.pop()
        assert isinstance(error, BitmapdError)
        assert "no luck" in error.message
        assert it.one.node.state is it.two.node.state is State.PAIRED
        assert not it.ended
    assert {it.media[1].size_bytes, it.media[2].size_bytes} == {it.size_bytes}


@pytest.mark.parametrize("step", range(len(STEPS) + 1))
def test_a_cut_in_each_step_ends_it_or_not_and_the_next_hello_makes_both_equal(step: int) -> None:
    """Invariants 3 and 4."""
    it = Pair(short=True)
    it.own(it.one, LAST)
    it.begin(it.one)
    it.until(*STEPS[: min(step, 3)])
    if step == len(STEPS):
        it.media[1].answer("enlarge")  # and RESIZE 3 is lost
    it.cut()
    for number in (1, 2):
        while it.media[number].open:
            it.media[number].answer(it.media[number].open[0][0])
    (error,) = it.ended
    grew = step >= 3  # the other had made it durable already
    assert (error is None) == grew
    assert it.media[1].size_bytes == (LARGER if grew else it.size_bytes)
    it.connect()
    it.carry()
    if grew:
        assert it.two.cable.error is not None
        assert it.two.cable.error.code is ErrorCode.SIZE
        it.until((2, "look"), (2, "enlarge"))
        assert it.two.rights.other[LAST]
        it.cut()
        it.pair()
    assert it.media[2].size_bytes == it.media[1].size_bytes
    assert it.one.node.state is State.PAIRED
    assert not grew or it.one.rights.own[EXTENTS]


def test_a_link_that_comes_back_meanwhile_is_not_the_one_that_was_asked() -> None:
    """Invariant 3: the partner may be another process by then."""
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS[:3])
    it.cut()
    it.pair()
    it.media[1].answer("enlarge")
    assert it.ended == [None]
    assert it.one.cable.closed
    assert it.one.node.state is State.CUT
    assert not [one for one in it.one.sent() if isinstance(one, Resize)]


def test_a_question_whose_link_is_lost_is_not_asked_on_another() -> None:
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS[:1])
    it.cut()
    it.pair()
    it.media[1].answer("end")
    (error,) = it.ended
    assert isinstance(error, UnreachableError)


def test_what_is_made_durable_for_an_old_link_is_not_answered_on_a_new_one() -> None:
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS[:2])
    it.cut()
    it.pair()
    it.media[2].answer("enlarge")
    assert not it.two.sent()
    it.two.receive(Resize(LARGER, 3))
    assert it.two.told("partner-protocol-error")[-1]["code"] == int(ErrorCode.ANSWER)


def test_a_node_that_is_alone_asks_nobody() -> None:
    it = Pair(short=True)
    it.two.node.leave(lambda given: None)
    it.carry()
    assert it.one.node.state is State.ALONE
    it.begin(it.one)
    it.one.rights.obtain(LAST, EXTENTS)
    it.until((1, "end"), (1, "enlarge"))
    assert it.ended == [None]
    assert it.one.rights.own[LAST : EXTENTS + 1].all()


@pytest.mark.parametrize("fresh", [False, True])
def test_who_is_smaller_grows_before_the_two_go_on(fresh: bool) -> None:
    it = Pair(short=True)
    it.cut()
    if fresh:
        it.two = Station(2, size_bytes=it.size_bytes)
        it.media[2] = it.equip(it.two)
    it.one.node.growth.take_up(it.media[1], LARGER, mine=True)
    it.connect()
    it.carry()
    assert it.two.cable.error is not None
    assert it.two.cable.error.text.endswith("which grows")
    it.media[2].answer("look", "there is no room")
    it.connect()
    it.carry()
    assert it.two.cable.error.text.endswith("which cannot grow: there is no room")
    it.connect()
    it.carry()
    assert it.two.cable.error.text.endswith("which grows")  # it is at it
    with pytest.raises(BusyError):
        it.two.node.growth.begin(LARGER, it.ended.append)
    it.until((2, "look"), (2, "enlarge"))
    assert it.two.cable.closed
    assert bool(it.two.rights.other[EXTENTS]) is not fresh
    assert (((EXTENTS, EXTENTS + 2),) in it.two.desk.of("forget")) is fresh
    it.pair()
    assert it.one.rights.own[EXTENTS]
    assert it.two.rights.other[EXTENTS]


def test_a_fresh_node_that_is_larger_is_taken_over_from_after_growing() -> None:
    it = Pair()
    it.cut()
    it.two = Station(2, size_bytes=LARGER, stored=((EXTENTS, EXTENTS + 1),))
    it.connect()
    it.carry()
    it.until((1, "look"), (1, "enlarge"))
    it.pair()
    assert joined(e for e in range(EXTENTS + 1) if it.one.rights.own[e]) == (
        (EXTENTS, EXTENTS + 1),
    )


def test_a_volume_that_cannot_grow_says_so() -> None:
    it = Pair()
    it.two.node.growth.media = None
    it.begin(it.one)
    (error,) = it.ended
    assert isinstance(error, WrongStateError)
    with pytest.raises(WrongStateError):
        it.two.node.growth.begin(LARGER, it.ended.append)
    it.two.receive(Resize(LARGER, 3))
    it.cut()
    it.one.node.growth.take_up(it.media[1], LARGER, mine=True)
    it.connect()
    it.carry()
    assert it.two.cable.error is not None
    assert "cannot be resized" in it.two.cable.error.text


def test_one_growth_at_a_time() -> None:
    it = Pair()
    it.begin(it.one)
    with pytest.raises(BusyError):
        it.one.node.growth.begin(LARGER, it.ended.append)
    it.begin(it.two)
    (error,) = it.ended
    assert error is not None
    assert "asked to grow itself" in error.message


def test_nobody_grows_without_the_other_unless_alone() -> None:
    it = Pair()
    it.cut()
    with pytest.raises(UnreachableError):
        it.one.node.growth.begin(LARGER, it.ended.append)


STOPS = WrongStateError("the volume is being stopped")


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_command_that_waits_for_the_other_can_be_given_up(step: int) -> None:
    """In each step; the one that is carried out here ends by itself."""
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS[:step])
    here = STEPS[step] == (1, "enlarge")
    it.one.node.growth.give_up(STOPS)
    assert it.ended == ([] if here else [STOPS])
    it.until(*STEPS[step : step + 1])  # the answer comes after all
    assert it.ended == ([None] if here else [STOPS])
    assert it.one.node.state is it.two.node.state is State.PAIRED
    assert it.media[1].size_bytes == it.media[2].size_bytes
    assert (it.media[1].size_bytes == LARGER) is here
    it.one.node.growth.give_up(STOPS)  # there is none
    if not here:
        it.begin(it.one)
        it.until(*STEPS)
        assert it.ended == [STOPS, None]


def test_nothing_is_asked_before_what_was_given_up_is_answered() -> None:
    it = Pair()
    it.begin(it.one)
    it.one.node.growth.give_up(STOPS)
    with pytest.raises(BusyError):
        it.begin(it.one)
    it.media[2].answer("look", "it has no room")
    it.carry()
    assert it.ended == [STOPS]
    it.begin(it.one)
    it.one.node.growth.give_up(STOPS)
    it.cut()
    it.pair()
    it.begin(it.one)
    it.media[2].open.popleft()  # of the old link
    it.until(*STEPS)
    assert it.ended == [STOPS, STOPS, None]


def test_what_has_grown_is_not_given_up() -> None:
    it = Pair()
    it.begin(it.one)
    it.until(*STEPS[:3])
    it.media[1].answer("enlarge")  # and RESIZE 3 is on its way
    it.one.node.growth.give_up(STOPS)
    assert it.ended == [None]
    it.carry()
    assert it.media[2].size_bytes == LARGER


def test_resized_without_resize() -> None:
    it = Pair()
    it.one.receive(Resized(0, ""))
    assert it.one.told("partner-protocol-error")[-1]["code"] == int(ErrorCode.ANSWER)


def test_who_was_declared_dead_does_not_grow_but_ends() -> None:
    it = Pair()
    it.cut()
    it.two.node.fenced(Proof.WORD)
    it.two.write()
    it.two.node.growth.take_up(it.media[2], LARGER, mine=True)
    it.connect()
    it.carry()
    assert it.one.node.state is State.OUTDATED
    assert not it.media[1].open
