"""A planned move between two sites: nothing is lost, and never do both serve."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sites import Sites, Writer, newest
from tests.support.volumes import MIB

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    with Sites(short_path, 64 * MIB, "--extent-size", "64KiB") as made:
        made.create()
        yield made


def switchover(sites: Sites, *more: str) -> None:
    sites.near.dmctl("switchover", "vol0", "--journal", str(sites.near_journal), *more)


def test_the_places_are_exchanged_under_load_and_nothing_is_lost_or_copied(sites: Sites) -> None:
    sites.start()
    sites.near.until(lambda status: status["record_bytes"] < 8 * MIB)  # of the first copy
    writer = Writer(sites.near)
    writer.more(300)
    switchover(sites)
    told = writer.stop()
    status = sites.far.status()
    assert status["state"] in ("copying", "in-sync", "resyncing", "link-down", "alone")
    assert sites.near.status()["state"] == "receiving"
    assert newest(sites.image) in (told, told + 1)  # the last one may have had no answer
    later = Writer(sites.far, first=told + 1)
    later.more(100)
    last = later.stop()
    sites.far.dmctl("set", "vol0", "point-interval=300ms")
    sites.far.wait_in_sync()
    sent = sites.far.status()["points"]["sent_bytes_total"]
    assert sent <= 24 * MIB  # what was written since, and prediction
    # And back: the far site has its journal.
    sites.far.dmctl("switchover", "vol0")
    assert sites.far.status()["state"] == "receiving"
    sites.near.wait_in_sync()
    sites.near.stop()
    sites.far.stop()
    assert newest(sites.near.primary) == last
    assert sites.equal()


def test_a_receiver_that_is_away_or_silent_leaves_the_volume_as_it_was(sites: Sites) -> None:
    sites.start()
    words = ("switchover", "vol0", "--journal", str(sites.near_journal))
    assert sites.near.refused("switchover", "vol0")["code"] == "usage"  # no journal
    os.kill(sites.far.pid, signal.SIGSTOP)
    try:
        sites.near.write(0, b"w" * 4096)
        assert sites.near.refused(*words, "--timeout", "2s")["code"] == "time-out"
        sites.near.write(0, b"x" * 4096)  # hosts are let in again
    finally:
        os.kill(sites.far.pid, signal.SIGCONT)
    sites.far.kill()
    sites.near.until(lambda status: not status["receiver"]["connected"])
    assert sites.near.refused(*words)["code"] == "unreachable"
    sites.near.write(4096, b"y" * 4096)
    sites.far.start()
    sites.near.wait_in_sync()
    switchover(sites)
    sites.near.stop()
    sites.far.stop()
    assert sites.image.read_bytes()[:8192] == b"x" * 4096 + b"y" * 4096


def test_between_demoted_and_taken_neither_serves_until_somebody_is_asked(sites: Sites) -> None:
    sites.start()
    sites.near.write(0, b"z" * 4096)
    with sites.near.host():
        assert sites.near.refused("demote", "vol0")["code"] == "busy"
    assert json.loads(sites.near.dmctl("--json", "demote", "vol0"))["demoted"]
    assert sites.near.status()["state"] == "demoted"
    refused = sites.near.refused("start", "vol0")
    assert refused["code"] == "wrong-state"
    assert "switchover" in refused["hint"]
    sites.far.kill()
    words = ("switchover", "vol0", "--journal", str(sites.near_journal), "--timeout", "5s")
    assert sites.near.refused(*words)["code"] == "unreachable"
    assert sites.near.refused("promote", "vol0")["code"] == "unreachable"
    sites.far.start()
    sites.near.dmctl("promote", "vol0")  # the other says that it has not taken it
    assert sites.near.read(0, 4096) == b"z" * 4096
    sites.point(0)
    sites.near.dmctl("demote", "vol0")
    sites.far.kill()
    sites.near.dmctl("promote", "vol0", "--force")  # an administrator's word
    sites.near.write(0, b"a" * 4096)


def test_a_site_that_was_promoted_meanwhile_has_taken_it(sites: Sites) -> None:
    sites.start()
    sites.near.write(0, b"z" * 4096)
    sites.near.dmctl("demote", "vol0")
    sites.far.dmctl("promote", "vol0")
    assert sites.near.refused("promote", "vol0")["code"] == "wrong-state"
    assert sites.near.refused("start", "vol0")["code"] == "wrong-state"
    switchover(sites)  # goes on with what is left to do
    assert sites.near.status()["state"] == "receiving"
    sites.far.dmctl("set", "vol0", "point-interval=300ms")
    sites.point(0, sites.far)
    sites.near.stop()
    sites.far.stop()
    assert sites.equal()
    assert sites.near.refused("switchover", "vol0")["code"] == "wrong-state"  # it is a receiver


def test_a_retired_primary_is_marked_and_never_serves_by_itself(sites: Sites) -> None:
    sites.start()
    sites.near.write(0, b"z" * 4096)
    sites.near.kill()
    sites.far.dmctl("promote", "vol0", "--force")
    sites.near.dmctl("demote", "vol0")  # its record names something; the other one has moved on
    sites.far.stop()
    assert "given its role away" in sites.near.refused("start", "vol0")["message"]
    sites.near.dmctl("promote", "vol0", "--force")
    sites.near.kill()
    tail = sites.near.refused("demote", "vol0")  # nobody can be asked
    assert tail["code"] == "wrong-state"
    sites.near.dmctl("demote", "vol0", "--force")
