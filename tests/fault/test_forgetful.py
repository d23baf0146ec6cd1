"""A secondary that forgets what it confirmed is found out when it comes back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.nbdpeers import Peer, nbdkit, qemu_nbd
from tests.support.served import served_volume
from tests.support.volumes import KIB, MIB, Volume, make_file, noise

SIZE = 32 * MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]

Serve = Callable[[Path, Path], AbstractContextManager[Peer]]


def cow(folder: Path, backing: Path) -> AbstractContextManager[Peer]:
    return nbdkit(folder, "--filter=cow", "file", f"file={backing}")


def unsafe(folder: Path, backing: Path) -> AbstractContextManager[Peer]:
    return nbdkit(folder, "--filter=cache", "file", f"file={backing}", "cache=unsafe")


def snapshot(folder: Path, backing: Path) -> AbstractContextManager[Peer]:
    return qemu_nbd(folder, "--snapshot", "--shared=8", backing)


FORGETFUL = {"nbdkit cow": cow, "nbdkit cache=unsafe": unsafe, "qemu-nbd snapshot": snapshot}


@pytest.mark.parametrize("how", ["while the volume runs", "while it is stopped"])
@pytest.mark.parametrize("kind", FORGETFUL)
def test_a_server_that_forgot_gets_everything_again(short_path: Path, kind: str, how: str) -> None:
    """At once if it forgot under our eyes; after a clean stop somebody has to say so."""
    backing = make_file(short_path / "far", SIZE)
    before = noise(1, 2 * MIB)
    with backing.open("r+b") as file:
        file.write(before)
    with (
        FORGETFUL[kind](short_path, backing) as server,
        served_volume(short_path, SIZE, server, backing, SKIP) as volume,
    ):
        volume.make_media()
        with volume.primary.open("r+b") as file:
            file.write(before)
        volume.create()
        volume.start()
        volume.write(5 * MIB, noise(2, 3 * MIB))
        volume.write(20 * MIB + 8 * KIB, noise(3, 4 * KIB))
        volume.wait_in_sync()
        if how == "while it is stopped":
            volume.stop()
            server.kill()
            server.start()
            volume.start()
        else:
            server.kill()
            server.start()
        code = "secondary-changed" if how == "while it is stopped" else "secondary-forgot"
        with volume.events() as events:
            told = events.wait(code)
            if code == "secondary-changed":
                assert {offset // MIB for offset, _ in told["places"]} <= {5, 6, 7, 20}
                assert volume.status()["state"] == "paused"
                volume.dmctl("resume", volume.name)
            else:
                assert told["offset_bytes"] // MIB in {5, 6, 7, 20}
            events.wait("in-sync")
        assert volume.ask("status")["last_error"]["code"] == code
        volume.dmctl("verify", volume.name)
        volume.stop()
        assert volume.recorded() == set()


def test_a_secondary_that_was_used_on_its_own_is_not_overwritten(short_path: Path) -> None:
    """It was written where the primary had been: that may be all there is of it."""
    with Volume(short_path, 128 * MIB, options=SKIP) as volume:
        volume.create()
        volume.start()
        volume.write(5 * MIB, noise(1, 3 * MIB))
        volume.wait_in_sync()
        volume.stop()
        with volume.secondary.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(noise(2, 3 * MIB))
        used = volume.secondary.read_bytes()
        volume.start()
        with volume.events() as events:
            events.wait("secondary-changed")
        volume.write(20 * MIB, noise(3, MIB))
        volume.stop()
        volume.start()
        assert volume.status()["state"] == "paused"
        volume.kill()
        assert volume.secondary.read_bytes() == used
        volume.start()
        volume.dmctl("resume", volume.name)
        volume.wait_in_sync()
        volume.dmctl("verify", volume.name)


def test_a_crash_on_the_way_leaves_everything_in_the_record(short_path: Path) -> None:
    """What was found out is in the record before much of it was copied."""
    backing = make_file(short_path / "far", SIZE)
    with (
        cow(short_path, backing) as server,
        Volume(
            short_path,
            SIZE,
            options=[*SKIP, "--copy-rate", "1MiB/s"],
            secondary_target=str(server.uri()),
            media={"secondary": backing},
        ) as volume,
    ):
        volume.create()
        volume.start()
        volume.write(5 * MIB, noise(2, 1 * MIB))
        volume.wait_in_sync()
        server.kill()
        server.start()
        with volume.events() as events:
            events.wait("secondary-forgot")
        volume.until(lambda status: status["record_extents"] == SIZE // MIB)
        volume.kill()
        assert 5 in volume.recorded()
        volume.start()
        volume.dmctl("set", volume.name, "copy-rate=none")
        volume.wait_in_sync()
        volume.dmctl("verify", volume.name)


def test_one_that_remembers_is_copied_nothing(short_path: Path) -> None:
    backing = make_file(short_path / "far", SIZE)
    with (
        nbdkit(short_path, "file", f"file={backing}") as server,
        served_volume(short_path, SIZE, server, backing, SKIP) as volume,
    ):
        volume.create()
        volume.start()
        volume.write(5 * MIB, noise(2, 3 * MIB))
        volume.wait_in_sync()
        copied = volume.status()["copied_bytes_total"]
        with volume.events() as events:
            server.kill()
            server.start()
            events.wait("link-up")
        volume.wait_in_sync()
        assert volume.status()["copied_bytes_total"] == copied
        volume.stop()
        volume.start()
        volume.wait_in_sync()
        assert volume.status()["copied_bytes_total"] == 0
        with volume.events() as events:
            events.wait("in-sync")
        assert all(event["event"] != "secondary-forgot" for event in events.seen)


def test_after_a_crash_a_difference_may_be_the_primarys(short_path: Path) -> None:
    """The primary was overwritten in place meanwhile: the secondary is the last good copy, and only
    what the record names may be copied over it."""
    size = 128 * MIB
    with Volume(short_path, size, options=SKIP) as volume:
        volume.create()
        volume.start()
        content = noise(1, 3 * MIB)
        volume.write(5 * MIB, content)
        volume.wait_in_sync()
        volume.stop()
        volume.start()
        volume.write(100 * MIB, noise(99, MIB))
        volume.wait_in_sync()
        volume.kill()
        assert volume.recorded().isdisjoint({5, 6, 7})
        with volume.primary.open("r+b") as file:
            file.write(bytes(size))
        volume.start()
        volume.wait_in_sync()
        with volume.events() as events:
            events.wait("in-sync")
        assert all(event["event"] != "secondary-forgot" for event in events.seen)
        volume.kill()
        assert volume.secondary.read_bytes()[5 * MIB : 8 * MIB] == content
