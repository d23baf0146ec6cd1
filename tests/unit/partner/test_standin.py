"""`record_fallback`: the partner's copy counts while this node's record cannot be written."""

from __future__ import annotations

import errno
from functools import partial

import pytest

from bitmapd.partner.messages import HelloFlag
from tests.unit.partner.nodes import Proof, State, Station, Two
from tests.unit.partner.test_holder import Holder

FAILED = OSError(errno.EIO, "simulated")
FAILING = HelloFlag.UNSTORED | HelloFlag.RELIES


def fail(station: Station) -> None:
    """From now on HELLO says that the record cannot be written."""
    station.flags = FAILING


def waiter(station: Station, extent: int) -> list[OSError | None]:
    """A host's write whose page was not written, and which may wait."""
    ended: list[OSError | None] = []
    station.rights.want_anew(extent, lambda error: bool(ended.append(error)) or True)
    return ended


def test_who_waits_looks_again_once_the_partner_counts() -> None:
    it = Two()
    it.pair()
    it.own(it.one, 3)
    fail(it.one)
    assert it.one.node.stand_in.unwritten()
    ended = waiter(it.one, 3)
    it.one.loop.run_soon()
    assert it.one.node.state is State.CUT, "the nodes begin anew"
    assert (ended, it.one.relies) == ([], False)
    it.two.node.lost()
    it.connect()
    it.carry()
    assert it.one.node.state is State.PAIRED
    assert (ended, it.one.relies) == ([None], True)
    assert it.two.node.lasting.volatile, "before anything counts in its memory alone"
    assert not it.one.node.lasting.volatile, "it could not be written there"
    assert it.one.told("record-fallback")
    assert it.one.node.stand_in.counts
    assert it.two.told("partner-record-failing") == [{}]
    assert it.two.node.stand_in.partner_fails


def test_the_flag_goes_and_the_own_record_counts_once_it_can_be_written_again() -> None:
    it = Two()
    fail(it.one)
    it.pair()
    it.one.flags = HelloFlag(0)
    it.one.node.stand_in.record_is(failing=True)
    assert it.one.node.state is State.PAIRED, "as it was said"
    it.one.node.stand_in.record_is(failing=False)
    assert (it.one.node.state, it.one.node.stand_in.counts) == (State.CUT, False)
    it.two.node.lost()
    it.connect()
    it.carry()
    assert not it.one.relies
    assert not it.two.node.lasting.volatile
    assert it.two.told("partner-record-ok") == [{}]


@pytest.mark.parametrize("trouble", ["off", "told and in vain", "alone", "waiting"])
def test_what_can_have_no_help_fails(trouble: str) -> None:
    it = Two()
    if trouble == "off":
        it.one.node.stand_in.on = False
        it.pair()
    elif trouble == "told and in vain":
        fail(it.one)
        it.two.flags = HelloFlag.UNSTORED
        it.pair()
        assert not it.one.relies
    elif trouble == "alone":
        it.one.node.fenced(Proof.WORD)
        it.one.write()
    before = it.one.node.state
    assert not it.one.node.stand_in.unwritten()
    it.one.loop.run_soon()
    assert it.one.node.state is before


def test_without_a_link_it_waits_for_the_partner_or_the_record() -> None:
    it = Two()
    it.pair()
    it.own(it.one, 3)
    it.cut()
    assert it.one.node.stand_in.unwritten()
    ended = waiter(it.one, 3)
    assert it.one.rights.waiting == 1
    it.one.node.stand_in.record_is(failing=True)
    assert ended == []
    it.one.node.stand_in.record_is(failing=False)
    assert ended == [None]


def test_without_a_link_it_waits_no_longer_than_a_host_may() -> None:
    it = Two()
    it.pair()
    it.own(it.one, 3)
    it.cut()
    it.one.rights.cut_patience_s = 2.0
    ended = waiter(it.one, 3)
    it.one.loop.advance(1.9)
    it.one.rights.tick()
    assert ended == []
    it.one.loop.advance(0.2)
    it.one.rights.tick()
    assert [error.errno for error in ended if error] == [errno.EIO]


def test_who_is_shut_out_waits_for_nothing() -> None:
    it = Two()
    it.pair()
    it.one.node.shut_out("fenced")
    ended = waiter(it.one, 3)
    it.one.loop.run_soon()
    assert [error.errno for error in ended if error] == [errno.EIO]


def test_what_is_asked_for_meanwhile_is_asked_back() -> None:
    """It waits for the nodes to begin anew, and holds nothing."""
    it = Two()
    it.pair()
    it.own(it.one, 3)
    it.cut()
    ended = waiter(it.one, 3)
    fail(it.one)
    it.connect()
    it.carry(most=2)
    it.two.rights.want(3, lambda error: True)
    it.carry()
    assert ended == [None]
    assert it.two.rights.own[3]


# -- the record of the pair -------------------------------------------------------------------


def failing(*, helps: bool) -> Holder:
    it = Holder()
    it.record.on_unwritten = partial(bool, helps)
    it.disk.fail_next["write"] = [errno.EIO]
    it.add((1, 2))
    return it


def test_a_write_whose_page_fails_waits_for_the_partner_to_stand_in() -> None:
    it = failing(helps=True)
    it.grant((1, 2))
    it.disk.finish()
    it.loop.run_soon()
    assert it.done == []
    assert it.rights.held[1], "the right has come, and stays"
    it.record.rely(True)
    it.pair_again()
    assert it.done == [None]
    assert it.record.covers(1, 2)


def test_one_that_still_waits_for_the_right_looks_again_with_it() -> None:
    it = failing(helps=True)
    it.disk.finish()
    it.loop.run_soon()
    assert it.done == []
    assert it.rights.waiting == 1, "one request of a host"
    it.grant((1, 2))
    assert it.done == [None]
    assert not it.record.covers(1, 2), "so it is added once more"


def test_a_page_that_fails_once_the_partner_counts_is_no_error() -> None:
    it = failing(helps=False)
    it.grant((1, 2))
    it.record.rely(True)
    it.store_all()
    assert it.done == [None]


def test_a_page_that_fails_where_nobody_stands_in_fails_the_write() -> None:
    it = failing(helps=False)
    it.grant((1, 2))
    it.disk.finish()
    it.loop.run_soon()
    assert [error.errno for error in it.done if error] == [errno.EIO]
