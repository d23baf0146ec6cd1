"""`partner_record`: what a survivor that knows nothing makes of the other's stored record."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from bitmapd.partner.messages import HelloFlag
from bitmapd.partner.otherrecord import why_not
from bitmapd.record.extents import runs_of
from bitmapd.record.pair_state import PairFlag, PairState
from bitmapd.record.superblock import Superblock
from tests.support.records import GENERATION, VOLUME, superblock
from tests.unit.partner.homes import GEOMETRY
from tests.unit.partner.nodes import Lasting, Proof, State, Station, Two

OTHER = UUID(int=77)
MINE = Lasting(False, 4, (b"n" * 16, GENERATION.bytes, bytes(16), bytes(16)), VOLUME.bytes)
THEIRS = PairState(2, VOLUME)


def block(pair: PairState | None = THEIRS, **changes: object) -> Superblock:
    return replace(superblock(GEOMETRY), **changes).with_pair(pair)  # type: ignore[arg-type]


def test_the_partners_record_counts() -> None:
    assert why_not(block(), MINE, 1, GEOMETRY) is None


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (block(None), "of no pair"),
        (block(PairState(1, VOLUME)), "a node 1"),
        (block(PairState(2, OTHER)), "another pair"),
        (block(PairState(2, None, PairFlag.NEVER_PAIRED)), "another pair"),
        (block(geometry=replace(GEOMETRY, size_bytes=4096)), "4096 bytes"),
        (block(generations=(OTHER,)), "another history"),
        (block(replace(THEIRS, flags=PairFlag.VOLATILE)), "in the memory"),
    ],
)
def test_any_other_one_does_not(found: Superblock, why: str) -> None:
    assert why in (why_not(found, MINE, 1, GEOMETRY) or "")


def waiting(station: Station) -> Station:
    station.reads_late = True
    station.node.start()
    station.node.fenced(Proof.FENCE)
    station.write()
    return station


def test_who_knows_nothing_takes_what_either_record_names() -> None:
    it = waiting(Station(1, stored=((1, 2),)))
    assert it.node.going_alone, "until it has been read"
    it.read(((3, 5),))
    assert it.node.state is State.ALONE
    assert runs_of(it.rights.own) == ((1, 2), (3, 5))
    assert it.node.comparisons == 0
    assert it.told("takeover")[0]["compares_everything"] is False


def test_without_the_others_record_everything_is_compared() -> None:
    it = waiting(Station(1, stored=((1, 2),)))
    it.read(None)
    assert it.rights.own.all()
    assert it.node.comparisons == 1


def test_a_record_of_its_own_that_lacks_something_is_not_made_whole_by_the_others() -> None:
    it = Station(1)
    it.node.ledger.lasting = replace(it.node.lasting, volatile=True)
    waiting(it)
    assert it.readings == []
    assert it.node.comparisons == 1


def test_who_may_lack_what_the_other_has_gone_on_with_finds_it_there() -> None:
    it = Two()
    it.one.flags = HelloFlag.GO_ON
    it.pair()
    it.own(it.one, 2)
    it.cut()
    it.two.reads_late = True
    it.two.node.fenced(Proof.FENCE)
    it.two.write()
    it.two.read(((6, 7),))
    assert runs_of(it.two.rights.own) == ((2, 3), (6, 7))
    assert it.two.node.comparisons == 0


def test_who_knows_all_reads_nothing() -> None:
    it = Two()
    it.pair()
    it.cut()
    it.one.reads_late = True
    it.one.node.fenced(Proof.FENCE)
    it.one.write()
    assert it.one.node.state is State.ALONE
    assert it.one.readings == []
    it.one.node.fenced(Proof.FENCE)


def test_who_is_shut_out_while_it_reads_does_not_go_on() -> None:
    it = waiting(Station(1))
    it.node.shut_out("fenced")
    it.read(((3, 4),))
    assert it.node.state is State.OUTDATED
    assert not it.node.going_alone
