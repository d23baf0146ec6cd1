"""The secondary and the link to it: what it may be, and what may befall it.

In all of it the host's writes succeed, the record names whatever differs, and in the end both sides
are equal byte by byte without anybody having done anything.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.faulty import resize, small_filesystem
from tests.support.loops import loop_device
from tests.support.nbdcerts import make_certificates
from tests.support.nbdpeers import nbdkit, qemu_nbd
from tests.support.volumes import KIB, MIB, Volume, make_file, noise

SIZE = 32 * MIB
SKIP = ["--initial-sync", "skip", "--era-interval", "100ms"]


# They would fill the record of so small a volume at once.
NO_PREDICTIONS = ("--predictor", "lru")
# These servers are killed with what they had received, or answer again within a second.
LATE = "3s"


@contextmanager
def mirrored(folder: Path, target: str | None, backing: Path, *options: str) -> Iterator[Volume]:
    """A volume that runs and is in sync; both sides hold zeros."""
    volume = Volume(
        folder,
        SIZE,
        options=[*SKIP, "--late-writes", LATE, *options],
        secondary_target=target,
        media={"secondary": backing},
    )
    with volume:
        volume.create()
        volume.start()
        yield volume


def scatter(volume: Volume, seed: int, count: int = 24, length: int = 64 * KIB) -> int:
    """Writes in as many extents, many at a time; how many bytes."""
    extents = volume.size_bytes // MIB
    with volume.host() as host:
        for number in range(count):
            offset = (number * 7 + seed) % extents * MIB + number % 8 * 64 * KIB
            host.submit(rawnbd.WRITE, offset, length, noise(seed + number, length))
        while host.in_flight:
            assert host.reply().error == 0
        host.call(rawnbd.FLUSH)
        host.disconnect()
    return count * length


def end_equal(volume: Volume) -> None:
    """Comes into sync, stops with an empty record, and both sides are the same."""
    volume.wait_in_sync()
    volume.until(lambda status: status["suspect_bytes"] == 0)
    volume.wait_in_sync()
    volume.stop()
    assert volume.recorded() == set()
    assert volume.differing() == set()


def file_server(folder: Path, backing: Path, *filters: str) -> list[object]:
    options = [word for word in filters if word.startswith("-")]
    parameters = [word for word in filters if not word.startswith("-")]
    return [*options, "file", f"file={backing}", *parameters]


# -- what it may be -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "block device", "nbdkit", "nbdkit TLS", "qemu-nbd"])
def test_whatever_the_secondary_is_it_becomes_equal(short_path: Path, kind: str) -> None:
    backing = make_file(short_path / "far", SIZE)
    with ExitStack() as stack:
        target: str | None = None
        options: list[str] = []
        if kind == "block device":
            backing = Path(stack.enter_context(loop_device(backing)))
        elif kind == "nbdkit":
            server = stack.enter_context(nbdkit(short_path, *file_server(short_path, backing)))
            target = str(server.uri())
        elif kind == "nbdkit TLS":
            keys = make_certificates(short_path / "keys") / "good"
            tls = ["--tls=require", f"--tls-certificates={keys}", "--tls-verify-peer"]
            server = stack.enter_context(
                nbdkit(short_path, *file_server(short_path, backing, *tls), tcp=True)
            )
            target = f"nbds://localhost:{server.port}/"
            options = ["--tls-certificates", str(keys)]
        elif kind == "qemu-nbd":
            server = stack.enter_context(qemu_nbd(short_path, str(backing)))
            target = str(server.uri())
        with mirrored(short_path, target, backing, *options) as volume:
            scatter(volume, 1)
            with volume.host() as host:
                host.call(rawnbd.WRITE_ZEROES, 3 * MIB, 2 * MIB)
                host.call(rawnbd.TRIM, 5 * MIB, 2 * MIB)
                host.call(rawnbd.WRITE, SIZE - 4096, 4096, noise(9, 4096), rawnbd.FUA)
                host.disconnect()
            end_equal(volume)
            last = volume.secondary.read_bytes()[-4096:] if kind != "block device" else None
            assert last in (None, noise(9, 4096))


# -- what may befall it -------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        ["--filter=error", "error-pwrite=EIO", "error-pwrite-rate=10%"],
        ["--filter=delay", "wdelay=30ms"],
        ["--filter=rate", "rate=40M"],
    ],
    ids=["errors", "delay", "rate"],
)
def test_case_03_a_bad_link_costs_time_only(short_path: Path, trouble: list[str]) -> None:
    backing = make_file(short_path / "far", SIZE)
    with (
        nbdkit(short_path, *file_server(short_path, backing, *trouble)) as server,
        mirrored(short_path, str(server.uri()), backing) as volume,
    ):
        scatter(volume, 1, count=12)
        volume.write(8 * MIB, noise(77, 2 * MIB))
        assert volume.ask("status")["writes_total"] == 12 + 2
        end_equal(volume)


def command(pause: Path, letter: bytes) -> None:
    """Have nbdkit's pause filter pause or resume; returns when it has."""
    with socket.socket(socket.AF_UNIX) as switch:
        switch.connect(str(pause))
        switch.sendall(letter)
        assert switch.recv(1) == letter.upper()


def test_case_03_a_pause_is_waited_for(short_path: Path) -> None:
    backing = make_file(short_path / "far", SIZE)
    pause = short_path / "pause"
    server_options = file_server(short_path, backing, "--filter=pause", f"pause-control={pause}")
    with (
        nbdkit(short_path, *server_options) as server,
        mirrored(short_path, str(server.uri()), backing) as volume,
    ):
        command(pause, b"p")
        written = scatter(volume, 1)
        figures = volume.until(lambda status: status["dirty_bytes"] >= written)
        assert figures["copied_bytes_total"] == 0
        assert figures["state"] == "copying"
        later = volume.until(lambda status: status["lag_seconds"] > figures["lag_seconds"] + 0.2)
        assert later["record_extents"] >= 24
        command(pause, b"r")
        end_equal(volume)


@pytest.mark.parametrize("volatile", [False, True], ids=["safe", "volatile cache"])
def test_case_03_a_server_killed_in_mid_copy_comes_back(short_path: Path, volatile: bool) -> None:
    """With the cache filter the server loses whatever it was not told to flush, however much.

    The pause filter below that one keeps flushes from ending: nothing that was copied is ever
    confirmed, whenever it is that the copier settles.
    """
    backing = make_file(short_path / "far", SIZE)
    pause = short_path / "pause"
    cache = ["--filter=cache", "--filter=pause", "cache=writeback", f"pause-control={pause}"]
    options = file_server(short_path, backing, *(cache if volatile else []))
    with (
        nbdkit(short_path, *options) as server,
        mirrored(short_path, str(server.uri()), backing, *NO_PREDICTIONS) as volume,
        volume.events() as events,
    ):
        if volatile:
            command(pause, b"p")
        volume.ask("set", copy_rate="6MiB")
        volume.write(0, noise(5, 15 * MIB))
        volume.until(lambda status: status["copied_bytes_total"] > 0)
        server.kill()
        events.wait("link-down")
        figures = volume.ask("status")
        assert figures["state"] == "link-down"
        assert figures["last_error"]["code"] == "link-down"
        lost_all = backing.read_bytes() == bytes(SIZE)
        assert lost_all == volatile
        # Hosts notice nothing, and the record grows.
        scatter(volume, 3)
        assert volume.read(0, MIB)[: 64 * KIB] != bytes(64 * KIB)
        assert volume.ask("status")["record_extents"] > figures["record_extents"]
        assert volume.differing() <= volume.recorded()
        volume.ask("set", copy_rate="none")
        server.start()
        events.wait("link-up")
        end_equal(volume)


def test_case_03_a_full_secondary_is_gone_on_with_when_it_has_room(short_path: Path) -> None:
    with small_filesystem(short_path / "small", 6) as far:
        backing = make_file(far / "far", SIZE)
        with (
            mirrored(short_path, None, backing) as volume,
            volume.events() as events,
        ):
            volume.write(0, noise(1, 12 * MIB))
            told = events.wait("secondary-error")
            assert "No space left" in told["message"]
            volume.until(lambda status: status["state"] == "no-space")
            assert volume.dmctl_process("status", "--check").returncode == 13
            scatter(volume, 2)
            assert volume.read(0, MIB) == volume.primary.read_bytes()[:MIB]
            resize(far, 64)
            end_equal(volume)
        assert "link-down" not in {event["event"] for event in events.seen}


def test_case_03_a_server_that_does_not_answer_delays_no_stop_and_no_start(
    short_path: Path,
) -> None:
    """Its time-out is longer than anybody wants to wait; what was under way stays recorded."""
    backing = make_file(short_path / "far", SIZE)
    with (
        nbdkit(short_path, *file_server(short_path, backing)) as server,
        mirrored(short_path, str(server.uri()), backing) as volume,
    ):
        server.stop()
        scatter(volume, 1)
        volume.dmctl("stop", volume.name, "--now", "--timeout", "15s")
        assert len(volume.recorded()) >= 24
        volume.dmctl("start", volume.name, "--timeout", "25s")
        assert volume.ask("status")["state"] == "link-down"
        scatter(volume, 2)
        # Not SIGCONT: nbdkit 1.32 may abort when it answers clients that have left meanwhile.
        server.kill()
        server.start()
        end_equal(volume)


def test_case_12_after_a_long_cut_only_what_was_written_is_copied(short_path: Path) -> None:
    backing = make_file(short_path / "far", SIZE)
    with (
        nbdkit(short_path, *file_server(short_path, backing)) as server,
        mirrored(short_path, str(server.uri()), backing) as volume,
        volume.events() as events,
    ):
        scatter(volume, 1)
        volume.wait_in_sync()
        before = volume.ask("status")
        assert before["lag_seconds"] == 0.0
        server.kill()
        written = scatter(volume, 5, count=16)
        events.wait("link-down")
        figures = volume.until(lambda status: status["lag_seconds"] > 1.0)
        assert figures["dirty_bytes"] == written
        assert "link-down" in volume.dmctl("status")
        assert volume.dmctl_process("status", "--check").returncode == 101
        assert volume.dmctl_process("verify", volume.name).returncode == 15
        server.start()
        events.wait("link-up")
        volume.wait_in_sync()
        after = volume.ask("status")
        copied = after["copied_bytes_total"] - before["copied_bytes_total"]
        # The copies that were lost with the link are made again, nothing else.
        assert written <= copied <= 2 * written
        assert after["lag_seconds"] == 0.0
        assert after["dirty_bytes"] == 0
        end_equal(volume)


def test_case_12_a_crash_during_the_cut_copies_the_record_only(short_path: Path) -> None:
    """The volume starts without its secondary, and hosts are served."""
    backing = make_file(short_path / "far", SIZE)
    with (
        nbdkit(short_path, *file_server(short_path, backing)) as server,
        mirrored(short_path, str(server.uri()), backing, *NO_PREDICTIONS) as volume,
    ):
        server.kill()
        scatter(volume, 1, count=6)
        volume.kill()
        recorded = volume.recorded()
        assert volume.differing() <= recorded
        assert len(recorded) < SIZE // MIB // 2
        volume.start()
        assert volume.ask("status")["state"] == "link-down"
        volume.write(20 * MIB, noise(3, 64 * KIB))
        with volume.events() as events:
            server.start()
            events.wait("link-up")
            recovered = events.wait("recovery-finished")
        assert recovered["reason"] == "crash"
        assert recovered["bytes_total"] == len(recorded) * MIB
        end_equal(volume)


def test_case_03_a_place_that_cannot_be_written_holds_back_itself_only(short_path: Path) -> None:
    """The server refuses one page for ever; whatever else is written becomes durable there."""
    backing = make_file(short_path / "far", SIZE)
    bad = 5 * MIB
    protected = ["--filter=protect", f"protect={bad}-{bad + 4095}"]
    with (
        nbdkit(short_path, *file_server(short_path, backing, *protected)) as server,
        mirrored(short_path, str(server.uri()), backing) as volume,
    ):
        volume.write(0, noise(1, 16 * MIB))
        volume.until(lambda status: status["dirty_bytes"] == 64 * KIB)
        volume.write(20 * MIB, noise(2, MIB))
        volume.until(lambda status: status["dirty_bytes"] == 64 * KIB)
        assert volume.differing() == {5}
        volume.dmctl("stop", volume.name, "--timeout", "60s")
        assert volume.differing() <= volume.recorded() <= {4, 5, 6}
        assert volume.differing() == {5}
