"""The record of one of two nodes: `bitmapd/partner/holder.py`."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence

import pytest

from bitmapd.partner.holder import Hands, PairRecord
from bitmapd.partner.messages import Add, Ask, Grant, Message, Remove, Status
from bitmapd.partner.reads import AT_REST
from bitmapd.partner.rights import Rights
from bitmapd.partner.share import Shares
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import zeros
from bitmapd.record.store import RecordStore
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain
from tests.unit.partner.homes import EXTENTS, GEOMETRY


class Parts:
    """Gate and copier, as far as they give and take."""

    embargoed_extents = 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.left: list[list[int]] = []

    def when_landed(self, call: Callable[[], None]) -> None:
        call()

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None:
        self.left.append(list(extents))
        call()

    def give(self, extents: Sequence[int]) -> list[tuple[int, int]]:
        return [(2 * extent, 2 * extent + 1) for extent in extents]

    def take_over(self, dirt: Iterable[tuple[int, int]], embargoed: Iterable[int]) -> None:
        self.calls.append(("take over", (list(dirt), list(embargoed))))

    def free(self, extents: Iterable[int]) -> None:
        self.calls.append(("free", list(extents)))

    def free_all(self) -> None:
        self.calls.append(("free all", None))

    def guessed(self, runs: Runs) -> None:
        self.calls.append(("guessed", runs))

    def refused(self, runs: Runs) -> None:
        self.calls.append(("refused", runs))

    def is_clean(self, extent: int) -> bool:
        return True

    def drop_clean(self, extents: Iterable[int]) -> None:
        self.calls.append(("drop clean", list(extents)))

    def given(self, extents: Sequence[int], free: Callable[[list[int]], None]) -> set[int]:
        self.free_later = free
        return set(extents)


class Holder:
    """A `PairRecord` with a disk, whose partner is the test."""

    def __init__(self) -> None:
        self.loop = SimLoop()
        image = blank_image(GEOMETRY)
        self.disk = SimDisk("record", len(image), image)
        loaded = load_image(image)
        self.store = RecordStore(GEOMETRY, loaded, self.disk, self.loop, lambda *a, **k: None)
        self.sent: list[Message] = []
        self.parts = Parts()
        self.hands = Hands(self.store, self._send, lambda: None)
        self.rights = Rights(GEOMETRY, 1, self.loop, self.hands)
        self.rights.most_requests = 9
        self.record = PairRecord(self.store, self.rights)
        self.hands.attach(self.parts, self.parts, self.record)
        self.pair()
        self.done: list[OSError | None] = []

    def pair(self) -> None:
        self.rights.freeze()
        self.rights.thaw(Shares(zeros(EXTENTS), zeros(EXTENTS), zeros(EXTENTS)), ())
        self.loop.run_soon()

    def pair_again(self) -> None:
        """The nodes have begun anew, and each has what it had."""
        own, other = self.rights.own.copy(), self.rights.other.copy()
        self.rights.cut()
        self.rights.freeze()
        self.rights.thaw(Shares(own, other, zeros(EXTENTS)), ())
        self.loop.run_soon()

    def _send(self, message: Message) -> int:
        self.sent.append(message)
        return len(self.sent)

    def add(self, *needed: tuple[int, int], extra: Runs = ()) -> bool:
        waits = self.record.add(needed, extra, self.done.append)
        self.loop.run_soon()
        return waits

    def grant(self, *runs: tuple[int, int], request: int = 1) -> None:
        self.rights.granted(Grant(request, runs, (), (), (), True), 1)
        self.loop.run_soon()

    def store_all(self) -> None:
        drain(self.loop, self.disk)


@pytest.mark.parametrize("stored_first", [True, False])
def test_covered_is_granted_and_stored(stored_first: bool) -> None:
    it = Holder()
    assert it.add((1, 2), extra=((4, 6),))
    assert it.sent == [Add(1, ((1, 2),), ((4, 6),), ())]
    steps = [it.store_all, lambda: it.grant((1, 2))]
    for step in steps if stored_first else reversed(steps):
        assert not it.record.covers(1, 2)
        assert it.done == []
        step()
    assert it.record.covers(1, 2)
    assert it.done == [None]
    assert list(it.record.covered_runs()) == [(1, 2)]


def test_what_waits_for_its_page_is_not_given_before() -> None:
    it = Holder()
    it.add((1, 2))
    it.rights.added(Add(1, ((1, 2),), (), ()))
    it.grant((1, 2))
    assert it.rights.held[1]
    it.store_all()
    assert it.done == [None]
    assert not it.rights.own[1]  # now it is
    assert isinstance(it.sent[-1], Grant)
    assert it.parts.calls[-1] == ("take over", ([], []))
    it.parts.free_later([1])
    assert it.hands.embargoed_extents == 2


def test_a_page_that_cannot_be_written_fails_the_write_and_keeps_the_right() -> None:
    it = Holder()
    it.add((1, 3))
    it.disk.fail_next["write"] = [errno.EIO] * 4
    it.store_all()
    assert [error.errno for error in it.done if error] == [errno.EIO]
    it.grant((1, 3))
    assert len(it.done) == 1
    assert it.rights.held[1]
    assert not it.record.covers(1, 2)


def test_a_page_that_fails_after_the_grant() -> None:
    it = Holder()
    it.add((1, 2))
    it.grant((1, 2))
    it.disk.fail_next["write"] = [errno.EIO] * 4
    it.store_all()
    assert [error.errno for error in it.done if error] == [errno.EIO]
    it.rights.hand_over([1])  # nothing has reserved it any more
    assert not it.rights.own[1]


def test_a_right_that_does_not_come_fails_the_write_once() -> None:
    it = Holder()
    it.rights.cut_patience_s = 1.0
    it.add((1, 3))
    it.rights.cut()
    it.loop.advance(2)
    it.rights.tick()
    assert [error.errno for error in it.done if error] == [errno.EIO]
    it.store_all()
    assert len(it.done) == 1


def test_what_is_ours_and_stored_needs_nothing() -> None:
    it = Holder()
    it.add((1, 2))
    it.grant((1, 2))
    it.store_all()
    it.sent.clear()
    assert not it.add((1, 2), extra=((0, 4),))
    assert it.sent == []  # a prediction sends no message of its own
    assert it.done == [None]


def test_a_grant_has_no_page_written_that_the_miss_has_written() -> None:
    it = Holder()
    it.add((1, 2))
    it.record.commit()
    it.grant((1, 2))  # while the page is being written
    it.store_all()
    assert it.done == [None]
    assert it.store.updates == 1


def test_what_counts_as_recorded() -> None:
    it = Holder()
    it.add((1, 3))
    it.grant((1, 3))
    it.add((5, 6))
    assert it.record.recorded_extents == 3
    assert it.record.missing(0, 8) == 5
    assert list(it.record.recorded_runs()) == [(1, 3)]
    assert list(it.record.recorded_runs(0, 2)) == [(1, 2)]
    assert not it.record.settled
    it.store_all()
    assert it.record.settled
    it.rights.own[7] = it.rights.held[7] = True
    assert list(it.record.recorded_runs(7)) == [(7, 8)]
    assert list(it.record.covered_runs()) == [(1, 3)]


def test_what_is_dropped_leaves_the_stored_record_unless_it_is_the_others() -> None:
    it = Holder()
    it.add((1, 3))
    it.grant((1, 3))
    it.store_all()
    it.sent.clear()
    it.record.drop([1])
    it.record.commit()
    it.record.flush_clears()
    cleared: list[OSError | None] = []
    it.record.destage_clears(cleared.append)
    it.store_all()
    assert cleared == [None]
    assert not it.store.covers(1, 2)
    assert it.store.covers(2, 3)
    assert [type(message) for message in it.sent][-1] is Remove
    it.rights.added(Add(1, ((1, 2),), (), ()))
    it.store_all()
    assert it.store.covers(1, 2)
    assert not it.record.covers(1, 2)


def test_the_gate_hears_what_rights_ask_for() -> None:
    it = Holder()
    it.hands.keep(())
    it.hands.free([1])
    it.hands.free_all()
    it.hands.guessed(((1, 2),))
    it.hands.refused(((1, 2),))
    it.hands.drop_clean([1])
    assert it.parts.calls[-5:] == [
        ("free", [1]), ("free all", None), ("guessed", ((1, 2),)), ("refused", ((1, 2),)),
        ("drop clean", [1]),
    ]  # fmt: skip
    assert it.rights.owns(1) is False


# -- counting on the partner -----------------------------------------------------------------


def relying() -> Holder:
    it = Holder()
    it.record.rely(True)
    return it


def test_what_is_granted_is_covered_while_the_partner_is_relied_on() -> None:
    it = relying()
    assert it.add((1, 2), extra=((4, 6),))
    assert it.sent == [Add(1, ((1, 2),), ((4, 6),), ())]
    assert not it.record.covers(1, 2)
    it.rights.granted(Grant(1, ((1, 2), (4, 5)), ((5, 6),), (), (), True), 1)
    assert it.done == [None]
    assert it.record.covers(1, 2)
    assert list(it.record.covered_runs()) == [(1, 2), (4, 5)]
    assert not it.disk.pending, "nothing has been written here"
    assert not it.record.settled


def test_what_was_not_stored_is_not_covered_once_nobody_is_relied_on() -> None:
    it = relying()
    it.add((1, 2))
    it.grant((1, 2))
    it.record.rely(False)
    assert not it.record.covers(1, 2)
    stored: list[OSError | None] = []
    assert it.record.destage(stored.append)
    assert not it.add((1, 2)) or it.done == [None]
    it.store_all()
    assert stored == [None]
    assert it.record.covers(1, 2)
    assert it.done == [None, None]
    assert not it.record.destage(stored.append)


def test_what_is_noted_is_stored_lazily_and_what_is_stored_is_covered_at_once() -> None:
    it = relying()
    it.hands.keep(((3, 5),))
    assert not it.disk.pending
    it.record.flush_clears()
    it.store_all()
    assert it.store.covers(3, 5)
    it.store.drop([3])
    it.hands.keep(((3, 4),))
    assert it.store.covers(3, 4), "the stored copy never lost it"


def test_what_has_to_be_stored_before_it_is_granted() -> None:
    it, stored = Holder(), list[OSError | None]()
    assert it.hands.store(((1, 2),), stored.append)
    it.store_all()
    assert stored == [None]
    assert not it.hands.store(((1, 2),), stored.append)
    it.hands.unstored()  # nobody listens
    told: list[None] = []
    it.hands.on_unstored = lambda: told.append(None)
    it.hands.unstored()
    assert told == [None]


def test_what_is_asked_about_lands_and_what_is_asked_for_is_left_by_hosts() -> None:
    it = Holder()
    it.add((2, 3))
    it.grant((2, 3))
    it.store_all()
    it.rights.asked(Ask(1, ((4, 6),)))
    it.loop.run_soon()
    assert it.sent[-1] == Status(1, AT_REST, (), True)
    assert it.parts.left == []
    it.rights.added(Add(2, ((2, 3),), (), ()))
    it.loop.run_soon()
    assert it.parts.left == [[2]]
