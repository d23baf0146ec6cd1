"""The other site is lost, and comes back: promote and failback as an administrator gives them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sites import Sites, Writer, newest
from tests.support.volumes import MIB, Volume, make_file

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    """With small extents, so that a record of a tenth of the volume names few."""
    with Sites(short_path, 64 * MIB, "--extent-size", "64KiB") as made:
        made.create()
        yield made


def failback(sites: Sites, *more: str) -> None:
    sites.near.dmctl("failback", "vol0", "--journal", str(sites.near_journal), "--yes", *more)


def test_the_promoted_site_has_a_point_and_the_old_one_follows_with_its_differences(
    sites: Sites, tmp_path: Path
) -> None:
    sites.start()
    sites.near.until(lambda status: status["record_bytes"] < 8 * MIB)  # of the first copy
    writer = Writer(sites.near)
    writer.more(300)
    told = writer.answered
    sites.point(sites.points()["number"] + 1)
    writer.more(100)
    sites.near.kill()
    last = writer.stop()

    answer = json.loads(sites.far.dmctl("--json", "promote", "vol0"))
    assert answer["consistent"]
    sites.far.stop("--now")
    found = newest(sites.image)
    assert told <= found <= last + 1
    sites.far.start()
    assert sites.far.status()["state"] == "alone"
    later = Writer(sites.far, slots=500, first=1_000_000)
    later.more(100)

    refused = sites.near.refused("start", "vol0")
    assert refused["code"] == "wrong-state"
    assert "failback" in refused["hint"]
    tail = tmp_path / "tail"
    failback(sites, "--save", str(tail))
    assert tail.stat().st_size == sites.size_bytes
    with tail.open("rb") as saved, sites.near.primary.open("rb") as primary:
        assert saved.seek(0) == primary.seek(0)
    later.more(100)
    final = later.stop()
    sites.far.dmctl("set", "vol0", "point-interval=300ms")
    sites.far.wait_in_sync()
    status = sites.far.status()
    assert status["receiver"]["connected"]
    # Both wrote into the first 8 MiB; prediction adds some.
    assert status["points"]["sent_bytes_total"] <= 24 * MIB
    sites.far.stop()
    sites.near.stop()
    assert sites.equal()
    assert final >= 1_000_100


def test_of_what_both_records_name_only_pieces_that_differ_are_sent(sites: Sites) -> None:
    """The process that was promoted dies as well, so that its record is all that it knows."""
    sites.start()
    sites.near.until(lambda status: status["record_bytes"] < 8 * MIB)
    sites.near.dmctl("set", "vol0", "point-interval=1h")
    for number in range(20):
        sites.near.write(number * MIB + 8192, os.urandom(4096))
    sites.near.kill()
    sites.far.dmctl("promote", "vol0")
    sites.far.dmctl("set", "vol0", "point-interval=1h")
    for number in range(10, 30):
        sites.far.write(number * MIB + 16384, os.urandom(4096))
    sites.far.kill()
    sites.far.start()
    failback(sites)
    sites.far.dmctl("set", "vol0", "point-interval=300ms")
    sites.point(0, sites.near)  # the receiver itself says when it has one
    assert sites.near.status()["receiver"]["consistent"] == "yes"
    sites.far.wait_in_sync()
    points = sites.far.status()["points"]
    assert points["sent_bytes_total"] == 40 * 4096
    assert points["equal_bytes_total"] < points["compared_bytes_total"]
    sites.far.stop()
    sites.near.stop()
    assert sites.equal()


def test_an_old_primary_serves_by_force_only_and_what_it_wrote_then_is_not_lost_unasked(
    sites: Sites, tmp_path: Path
) -> None:
    sites.start()
    sites.near.kill()
    sites.far.dmctl("promote", "vol0")
    sites.far.write(0, b"there".ljust(4096, b"."))
    refused = sites.near.refused("start", "vol0")
    assert refused["code"] == "wrong-state"
    assert "start vol0 --force" in refused["hint"]
    sites.near.dmctl("start", "vol0", "--force")
    assert sites.near.status()["state"] == "split-brain"
    assert "start-forced" in sites.near.dmctl("events", "vol0", "--now")
    here = b"here".ljust(4096, b".")
    sites.near.write(1 * MIB, here)
    sites.near.stop("--now")
    assert sites.near.refused("start", "vol0")["code"] == "wrong-state", "it was for one start"
    assert sites.near.refused("failback", "vol0", "--journal", str(sites.near_journal))
    tail = tmp_path / "tail"
    failback(sites, "--save", str(tail))
    assert tail.read_bytes()[MIB : MIB + 4096] == here
    sites.far.dmctl("set", "vol0", "point-interval=300ms")
    sites.far.wait_in_sync()
    sites.far.stop()
    sites.near.stop()
    assert sites.equal()
    assert sites.image.read_bytes()[:4096].startswith(b"there")


def test_places_are_exchanged_back_without_a_loss(sites: Sites) -> None:
    sites.start()
    sites.near.stop()
    sites.far.dmctl("promote", "vol0")
    failback(sites)
    writer = Writer(sites.far)
    writer.more(200)
    last = writer.stop()
    sites.far.stop()  # sends what is left
    sites.near.dmctl("promote", "vol0")
    assert sites.near.status()["points"]["interval_seconds"] == 0.3  # as it was set there
    sites.far.refused("start", "vol0")
    sites.far.dmctl("failback", "vol0", "--yes")  # it has a journal
    sites.near.wait_in_sync()
    sites.near.stop()
    sites.far.stop()
    assert newest(sites.near.primary) == newest(sites.image) == last
    assert sites.equal()


def test_promote_is_refused_while_the_sender_is_there_and_forced_it_is_a_split_brain(
    sites: Sites,
) -> None:
    sites.start()
    refused = sites.far.refused("promote", "vol0")
    assert refused["code"] == "wrong-state"
    assert sites.far.status()["state"] == "receiving"
    for which in (("--point", "77"), ("--label", "none")):
        assert sites.far.refused("promote", "vol0", *which, "--force")["code"] == "wrong-state"
        sites.far.until(lambda status: status["receiver"]["connected"])  # it receives as before
    sites.far.dmctl("promote", "vol0", "--force")
    assert sites.far.refused("promote", "vol0")["code"] == "wrong-state"
    sites.near.until(lambda status: status["state"] == "split-brain")
    before = sites.near.primary.read_bytes()
    sites.near.write(0, b"n" * 4096)
    sites.far.write(0, b"f" * 4096)
    assert not sites.near.status()["receiver"]["connected"]
    assert sites.near.primary.read_bytes()[:4096] == b"n" * 4096
    assert sites.image.read_bytes()[:4096] == b"f" * 4096
    assert before[4096:] == sites.near.primary.read_bytes()[4096:]


@pytest.mark.parametrize("whose", ["image", "journal", "other"])
def test_the_record_is_not_made_on_what_another_one_has(sites: Sites, whose: str) -> None:
    """Nothing tells a volume's primary, or an image, from a medium that is free."""
    sites.start()
    sites.point(0)
    sites.near.kill()
    path = {"image": sites.image, "journal": sites.journal}.get(whose)
    if path is None:
        path = make_file(sites.folder / "far" / "other", 8 * MIB)
        path.write_bytes(os.urandom(8 * MIB))
        other = [make_file(sites.folder / "far" / name, 8 * MIB) for name in ("s", "r")]
        words = zip(("primary", "secondary", "record"), (path, *other), strict=True)
        sites.far.dmctl("create", "other", *(f"--{key}={value}" for key, value in words))
    before = path.read_bytes()
    refused = sites.far.refused("promote", "vol0", "--record", str(path))
    assert refused["code"] == "busy"
    assert path.read_bytes() == before
    sites.far.dmctl("promote", "vol0")


def test_no_other_disk_is_promoted(sites: Sites) -> None:
    """What the journal has would be written upon it."""
    sites.start()
    sites.point(0)
    sites.near.kill()
    sites.far.stop("--now")
    image = sites.image.with_suffix(".away")
    sites.image.rename(image)
    other = os.urandom(sites.far.size_bytes)
    sites.image.write_bytes(other)
    for more in ((), ("--force",)):
        assert sites.far.refused("promote", "vol0", *more)["exit_status"] == 22
    assert sites.image.read_bytes() == other
    image.rename(sites.image)
    sites.far.dmctl("promote", "vol0")


def test_what_was_written_past_a_stopped_old_primary_is_not_taken_for_equal(sites: Sites) -> None:
    sites.start()
    sites.point(0)
    sites.near.stop("--now")
    sites.far.dmctl("promote", "vol0")
    with sites.near.primary.open("r+b") as primary:
        primary.write(os.urandom(MIB))  # as a mount does; the fingerprint has this place
    journal = ("failback", "vol0", "--journal", str(sites.near_journal), "--yes")
    refused = sites.near.refused(*journal)
    assert refused["exit_status"] == 22
    assert "--resync-all" in refused["hint"]
    sites.near.refused("start", "vol0", "--resync-all")
    failback(sites)
    sites.far.wait_in_sync()
    sites.far.stop()
    sites.near.stop()
    assert sites.equal()


def test_what_has_never_had_a_point_is_not_promoted(sites: Sites) -> None:
    sites.far.start()
    assert sites.far.refused("promote", "vol0")["code"] == "wrong-state"
    assert sites.far.status()["state"] == "receiving"
    with Volume(sites.folder / "near", 8 * MIB, name="plain") as plain:
        plain.create()
        assert plain.refused("promote", "plain")["code"] == "wrong-state"
        assert plain.refused("failback", "plain", "--yes")["code"] == "wrong-state"


def test_failback_is_refused_unless_the_other_site_is_newer(sites: Sites) -> None:
    sites.start()
    words = ("failback", "vol0", "--journal", str(sites.near_journal), "--yes")
    assert "is running" in sites.near.refused(*words)["message"]
    sites.near.stop()
    assert "was not promoted" in sites.near.refused(*words)["message"]
    assert sites.near.refused("failback", "vol0", "--yes")["code"] == "usage"
    sites.far.stop()
    assert sites.near.refused(*words)["code"] == "unreachable"
    sites.far.start()
    sites.near.start()  # nothing was changed
