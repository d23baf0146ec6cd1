"""A volume and its receiver as real processes: whatever dies, the receiver has a point.

The host writes numbered pieces one after the other, so a point is a prefix of them: it has all up
to a number, and none beyond.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmctl.cli.partnerkeys import make_partner_keys
from tests.support.needs import need
from tests.support.peers import free_port
from tests.support.sites import Sites, Writer, newest
from tests.support.volumes import MIB, wait_gone

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    with Sites(short_path) as made:
        made.create()
        yield made


@pytest.fixture(params=["unix", "tls"])
def either(request: pytest.FixtureRequest, short_path: Path) -> Iterator[Sites]:
    """Over a unix socket, and over TLS with certificates for both ends."""
    if request.param == "unix":
        made = Sites(short_path)
    else:
        need("openssl")
        keys, port = short_path / "keys", free_port()
        make_partner_keys(keys, ["near-node", "far-node"])
        made = Sites(
            short_path,
            listen=f"receiver+tls://127.0.0.1:{port}/vol0",
            secondary=f"receiver+tls://127.0.0.1:{port}/vol0",
            near_options=(
                "--partner-certificates", str(keys / "near-node"), "--partner-name", "far-node",
            ),
            far_options=("--certificates", str(keys / "far-node"), "--sender-name", "near-node"),
        )  # fmt: skip
    with made:
        made.create()
        yield made


def recovered(sites: Sites) -> int:
    """Kill the receiver, start it again so that all it has committed is in the image, and see which
    prefix that is."""
    sites.far.kill()
    sites.far.start()
    sites.far.stop()
    return newest(sites.image)


def test_the_receiver_has_a_prefix_when_the_volume_dies_in_mid_write(either: Sites) -> None:
    either.start()
    writer = Writer(either.near)
    writer.more(300)
    told = writer.answered
    number = either.points()["number"]
    either.point(number + 1)  # cut after that, at the earliest
    writer.more(100)
    either.near.kill()
    last = writer.stop()
    found = recovered(either)
    assert told <= found <= last + 1  # the last one may have been carried out and not answered
    either.far.start()
    either.near.start()
    either.near.wait_in_sync()
    assert newest(either.near.primary) >= last
    either.near.stop()
    either.far.stop()
    assert either.equal()


def test_a_receiver_that_dies_delays_no_host_and_goes_on_where_it_was(sites: Sites) -> None:
    sites.start()
    writer = Writer(sites.near)
    writer.more(300)
    before = sites.points()["number"]
    sites.far.kill()
    writer.more(300)  # hosts go on
    sites.near.until(lambda status: status["state"] == "link-down")
    assert sites.near.status()["points"]["number"] >= before
    sites.far.start()
    sites.point(sites.points()["number"])
    writer.more(100)
    last = writer.stop()
    sites.near.wait_in_sync()
    sites.near.stop()
    sites.far.stop()
    assert newest(sites.image) == last
    assert sites.equal()


def test_a_receiver_that_stands_still_delays_no_host(sites: Sites) -> None:
    """The volume dies while its receiver is stopped: the last point is there all the same."""
    sites.start()
    writer = Writer(sites.near)
    writer.more(200)
    told = writer.answered
    number = sites.points()["number"]
    sites.point(number + 1)
    os.kill(sites.far.pid, signal.SIGSTOP)
    try:
        writer.more(2000)
        sites.near.kill()
    finally:
        os.kill(sites.far.pid, signal.SIGCONT)
    last = writer.stop()
    assert told <= recovered(sites) <= last + 1


def test_both_sites_die_and_nothing_is_lost_that_was_answered(sites: Sites) -> None:
    sites.start()
    writer = Writer(sites.near)
    writer.more(300)
    sites.near.kill()
    last = writer.stop()
    found = recovered(sites)
    sites.far.start()
    sites.near.start()
    sites.near.wait_in_sync()
    sites.near.stop()
    sites.far.stop()
    assert found <= newest(sites.image)
    assert newest(sites.near.primary) >= last
    assert sites.equal()


def test_a_point_on_demand_has_what_was_written_before_and_nothing_of_later(sites: Sites) -> None:
    sites.start()
    sites.near.dmctl("set", "vol0", "point-interval=1h")
    writer = Writer(sites.near)
    writer.more(100)
    writer_stopped = writer.stop()
    answer = json.loads(sites.near.dmctl("--json", "point", "vol0", "--label", "quiet", "--wait"))
    assert answer["committed"]
    assert answer["label"] == "quiet"
    again = Writer(sites.near, first=writer_stopped + 1)
    again.more(100)
    sites.near.kill()
    again.stop()
    assert recovered(sites) == writer_stopped


def test_a_point_larger_than_memory_waits_for_the_link_in_a_file(short_path: Path) -> None:
    spool = ("--spool", str(short_path), "--spool-limit", "1MiB")
    with Sites(short_path, near_options=spool) as sites:
        sites.create()
        sites.start()
        sites.near.dmctl("set", "vol0", "point-interval=1h", "copy-rate=1MiB", "compress=off")
        content = os.urandom(8 * MIB)
        sites.near.write(0, content)
        before = sites.points()["number"]
        sites.near.dmctl("point", "vol0")  # hosts wait for nothing of it any more
        points = sites.points()
        assert points["spool_file_bytes"] > points["spool_bytes"]
        assert points["void_total"]["spool"] == 0
        sites.near.dmctl("set", "vol0", "copy-rate=1GiB")
        sites.point(before)
        sites.far.kill()
        sites.far.start()  # applies what it has
        assert sites.image.read_bytes()[: len(content)] == content


def test_a_spool_that_is_gone_keeps_no_volume_from_starting(short_path: Path) -> None:
    spool = short_path / "spool"
    spool.mkdir()
    with Sites(short_path, near_options=("--spool", str(spool))) as sites:
        sites.create()
        spool.rmdir()
        sites.start()
        assert sites.near.status()["last_error"]["code"] == "spool-error"
        assert str(spool) in sites.near.status()["last_error"]["message"]
        assert sites.points()["spool_file_limit_bytes"] is None


def test_what_is_said_of_points(sites: Sites) -> None:
    sites.start()
    status = sites.near.status()
    assert status["points"]["number"] == status["receiver"]["committed"] >= 1
    assert status["receiver"]["connected"]
    assert status["receiver"]["role"] == "receiver"
    sites.near.dmctl("status", "vol0", "--check", "--max-point-age", "1min")
    assert sites.near.dmctl_process("status", "vol0", "--max-point-age", "1min").returncode == 2
    sites.near.dmctl("set", "vol0", "point-interval=1h", "compress=off", "spool-limit=8MiB")
    points = sites.points()
    assert (points["interval_seconds"], points["spool_limit_bytes"]) == (3600.0, 8 * MIB)
    sites.near.write(0, b"x" * 4096)
    late = sites.near.dmctl_process("status", "vol0", "--check", "--max-point-age", "1ms")
    assert late.returncode == 101
    sites.far.kill()
    sites.near.until(lambda status: not status["receiver"]["connected"])
    assert sites.near.refused("point", "vol0")["code"] == "unreachable"
    assert sites.near.refused("verify", "vol0")["code"] == "unreachable"
    os.truncate(sites.near.primary, sites.size_bytes + MIB)
    assert sites.near.refused("resize", "vol0")["code"] == "unreachable"


def test_the_age_of_the_newest_point_outlives_the_process_that_cut_it(sites: Sites) -> None:
    """When the other site is away and this one starts again, somebody wants to know just that."""
    sites.start()
    sites.near.dmctl("set", "vol0", "point-interval=1h")
    began_s = time.time()
    sites.near.write(0, b"x" * 4096)
    sites.near.dmctl("point", "vol0", "--wait")
    assert sites.points()["age_from_clock"] is False
    sites.near.write(4096, b"y" * 4096)
    sites.near.kill()
    sites.far.kill()
    sites.near.start()
    points = sites.points()
    assert points["age_from_clock"] is True
    assert 0 <= points["age_seconds"] <= time.time() - began_s + 1  # whole seconds are stored
    sites.far.start()
    cut_s = sites.far.status()["receiver"]["committed_timestamp_seconds"]
    assert began_s <= cut_s <= time.time()


def test_verify_finds_what_the_image_has_lost_while_hosts_write(sites: Sites) -> None:
    """Only sums come over the link; a difference is repaired by the next point."""
    sites.start()
    writer = Writer(sites.near)
    writer.more(300)
    found = json.loads(sites.near.dmctl("--json", "verify", "vol0"))
    assert found["compared_bytes"] == sites.size_bytes
    assert found["unexpected_bytes"] == found["undecided_blocks"] == 0
    place = 40 * MIB + 12288  # the host writes to the first 8 MiB
    with sites.image.open("r+b") as image:
        image.seek(place)
        image.write(b"rot")
    done = sites.near.dmctl_process("--json", "verify", "vol0")
    assert done.returncode == 101
    assert json.loads(done.stdout)["unexpected"] == [[40 * MIB, 65536]]
    wire = sites.points()["wire_bytes_total"]
    found = json.loads(sites.near.dmctl("--json", "verify", "vol0", "--repair"))
    assert found["repaired_bytes"] == 65536
    last = writer.stop()
    sites.near.wait_in_sync()
    assert sites.points()["wire_bytes_total"] - wire < 16 * MIB
    sites.near.stop()
    sites.far.stop()
    assert newest(sites.image) == last
    assert sites.equal()


def test_verify_without_a_point_is_refused(sites: Sites) -> None:
    sites.near.start()
    refused = sites.near.refused("verify", "vol0")
    assert refused["code"] == "unreachable"
    assert sites.near.status()["points"]["committed_total"] == 0


def test_verify_ends_when_the_receiver_dies(sites: Sites) -> None:
    sites.start()
    os.kill(sites.far.pid, signal.SIGSTOP)
    with sites.near.control() as control:
        control.send("verify", repair=False)
        assert control.line()["event"]["progress"] < 0.5  # what was asked for is not answered
        sites.near.write(0, b"hosts go on".ljust(4096, b"."))
        sites.far.kill()
        while "event" in (answer := control.line()):
            pass
    assert answer["error"]["code"] == "unreachable"


def test_a_volume_with_a_plain_secondary_has_no_points(short_path: Path) -> None:
    from tests.support.volumes import Volume

    with Volume(short_path, 8 * MIB) as volume:
        volume.create()
        volume.start()
        status = volume.status()
        assert status["points"] is None
        assert status["receiver"] is None
        assert "none (secondary is not a receiver)" in volume.dmctl("status", "vol0", "-v")
        assert volume.refused("point", "vol0")["code"] == "wrong-state"
        assert volume.refused("wait", "vol0", "--for", "point")["code"] == "wrong-state"
        changed = volume.refused("set", "vol0", "point-interval=1s")
        assert "receiver" in changed["message"]


def test_a_receiver_of_another_volume_is_sent_nothing(sites: Sites) -> None:
    sites.start()
    sites.near.stop()
    before = sites.image.read_bytes()
    number, uuid = sites.far.status()["receiver"]["committed"], sites.near.status()["uuid"]
    sites.near.dmctl("remove", "vol0", "--yes")
    for path in (sites.near.primary, sites.near.record):
        path.unlink()
    sites.near.create()
    sites.near.start()
    status = sites.near.until(lambda status: status["last_error"] is not None)
    said = status["last_error"]["message"]
    assert f"this is the receiver of volume {uuid}" in said
    assert "make another one for this volume ('dmctl receive')" in said
    assert not sites.near.status()["receiver"]["connected"]
    assert sites.far.status()["receiver"]["committed"] == number
    assert sites.image.read_bytes() == before


def test_a_volume_comes_in_by_itself_once_the_image_is_large_enough(sites: Sites) -> None:
    os.truncate(sites.image, sites.size_bytes - MIB)
    sites.far.start()
    sites.near.start()
    for site in (sites.near, sites.far):
        status = site.until(lambda status: status["last_error"] is not None)
        assert (
            f"the image has {sites.size_bytes - MIB} bytes, the volume {sites.size_bytes}: enlarge"
            " the image, and the volume comes in by itself"
        ) in status["last_error"]["message"]
    assert sites.near.status()["state"] == "link-down"
    assert "enlarge the image" in sites.near.dmctl("events", "vol0", "--now")
    os.truncate(sites.image, sites.size_bytes)
    sites.point(0)
    sites.near.wait_in_sync()
    sites.near.stop()
    sites.far.stop()
    assert sites.equal()


def test_a_point_is_waited_for_at_the_receiver_too(sites: Sites) -> None:
    sites.far.start()
    words = ("wait", "vol0", "--for", "point", "--newer-than")
    assert sites.far.dmctl_process(*words, "0", "--timeout", "300ms").returncode == 40
    sites.near.start()
    sites.far.dmctl(*words, "0", "--timeout", "60s")
    sites.near.wait_in_sync()
    number = sites.far.status()["receiver"]["committed"]
    assert number >= 1
    with sites.far.control() as control:
        control.send("wait", **{"for": "point", "newer_than": number})
        assert "event" in control.line()  # that it lives, and waits
        assert sites.far.status()["receiver"]["committed"] == number
        sites.near.write(0, b"newer".ljust(4096, b"."))
        while "event" in (answer := control.line()):
            pass
    assert answer["result"] == {"state": "receiving"}
    assert sites.far.status()["receiver"]["committed"] > number
    sites.far.dmctl(*words, str(number))  # it is there
    assert sites.far.refused("wait", "vol0", "--for", "in-sync")["code"] == "wrong-state"


def test_start_alone_no_waits_for_the_receivers_word_after_a_crash(short_path: Path) -> None:
    with Sites(short_path, 8 * MIB, "--start-alone", "no") as sites:
        sites.create()
        sites.start()
        pid = sites.near.pid
        sites.near.kill()
        sites.far.stop()
        wait_gone(pid)
        assert sites.near.refused("start", "vol0")["code"] == "unreachable"
        sites.near.dmctl("start", "vol0", "--force")
        assert sites.near.status()["state"] == "link-down"
        sites.near.kill()
        assert sites.near.refused("start", "vol0")["code"] == "unreachable"
        assert sites.near.refused("start", "--all", "--force")["code"] == "usage"
        assert sites.far.refused("start", "vol0", "--force")["code"] == "wrong-state"
        sites.far.start()
        sites.near.start()
        sites.near.stop()
        sites.far.stop()
        sites.near.start()  # it was stopped cleanly


def test_what_does_not_fit_the_journal_is_told_and_the_last_point_stays(short_path: Path) -> None:
    with Sites(short_path, 128 * MIB, "--point-interval", "1h", journal_bytes=64 * MIB) as sites:
        sites.create()
        sites.start()
        number = sites.points()["number"]
        for at in range(0, 96 * MIB, MIB):
            sites.near.write(at, os.urandom(MIB))
        sites.near.dmctl("set", "vol0", "point-interval=100ms")
        sites.near.until(lambda status: status["state"] == "journal-full")
        done = sites.near.dmctl_process("status", "vol0", "--check")
        assert done.returncode == 13
        sites.near.write(0, b"hosts go on".ljust(4096, b"."))
        assert sites.points()["number"] == number
        sites.near.dmctl("stop", "vol0", "--now")
