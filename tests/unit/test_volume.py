"""volume: start, recovery, stop and commands, on real files, a real record and a real loop."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bitmapd import volume as volume_module
from bitmapd.config import changed
from bitmapd.copier.engine import CopyState
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    DifferencesError,
    ForeignRecordError,
    NoSpaceError,
    NotFoundError,
    UnreachableError,
    UsageError,
    WrongStateError,
)
from bitmapd.media.buffers import aligned
from bitmapd.nbd.client import NbdTarget
from bitmapd.nbd.uri import format_uri, parse_uri
from bitmapd.record.geometry import KIB, MIB, Geometry
from bitmapd.record.layout import InitialSync, RecordFlag, page_offset
from bitmapd.resize import Names, larger_geometry
from bitmapd.volume import Volume, check_verify, completion
from tests.support.cli import check_status
from tests.support.local import LocalVolume
from tests.support.mirror import ScriptedPolicy
from tests.support.nbdcerts import make_certificates
from tests.support.nbdpeers import nbdkit, short_folder
from tests.support.rawnbd import READ, WRITE, RawNbd

WAIT_S = 30.0
Test = Callable[[], Coroutine[Any, Any, None]]


class Served:
    """A volume that runs, and what it tells."""

    def __init__(self, local: LocalVolume) -> None:
        self.local = local
        self.events: list[dict[str, Any]] = []
        self.told = asyncio.Event()
        self.volume = Volume(local.config, local.paths, asyncio.get_running_loop(), self._emit)

    def _emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})
        self.told.set()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    async def event(self, name: str) -> dict[str, Any]:
        """The first event of that name, now or later."""
        while not self.named(name):
            self.told.clear()
            await self.told.wait()
        return self.named(name)[0]

    async def write(self, offset: int, data: bytes) -> None:
        """As a host, acknowledged."""
        buffer = aligned(len(data))
        buffer[:] = data
        await completion(lambda done: self.volume.gate.write(offset, buffer, done))

    async def in_sync(self) -> None:
        await self.volume.wait("in-sync")


@asynccontextmanager
async def serving(local: LocalVolume, *, now: bool = False) -> AsyncIterator[Served]:
    """The volume from start to stop; stopped in any case."""
    served = Served(local)
    await served.volume.start()
    try:
        yield served
    finally:
        if not served.volume._stopping:
            await served.volume.stop(now)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WAIT_S):
            await test

    asyncio.run(limited())


@pytest.fixture
def local(tmp_path: Path, short_path: Path) -> LocalVolume:
    return LocalVolume(tmp_path, short_path)


@pytest.fixture
def make(tmp_path: Path, short_path: Path) -> Callable[..., LocalVolume]:
    return lambda **options: LocalVolume(tmp_path, short_path, **options)


async def nothing(_: dict[str, Any]) -> None:
    """Somebody who is told of progress and does not care."""


# -- recovery ---------------------------------------------------------------------------------


def test_a_clean_start_copies_nothing(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            status = served.volume.status()
            check_status(status)
            assert status["state"] == "in-sync"
            assert status["last_recovery"] == {
                "reason": "clean",
                "extents": 0,
                "bytes_total": 0,
                "bytes_copied": 0,
                "seconds": 0.0,
            }
            assert [event["event"] for event in served.events[:2]] == [
                "recovery-started",
                "recovery-finished",
            ]
            result = await served.volume.stop(False)
            assert result == {"clean": True, "record_extents": 0}
            assert served.volume.copier.copied_bytes == 0

    run(test())
    assert local.superblock.flags & RecordFlag.CLEAN
    assert local.superblock.session == 1


@pytest.mark.parametrize("kind", [InitialSync.FULL, InitialSync.CHECKSUM])
def test_an_initial_sync_copies_everything_or_what_differs(
    make: Callable[..., LocalVolume], kind: InitialSync
) -> None:
    local = make(initial=kind)
    local.scribble(local.secondary, 3 * MIB + 100 * KIB)

    async def test() -> None:
        async with serving(local) as served:
            assert served.volume.state == "resyncing"
            resync = served.volume.status()["resync"]
            assert resync["total_bytes"] == 8 * MIB
            await served.in_sync()
            status = served.volume.status()
            assert status["last_recovery"]["reason"] == "initial"
            assert status["last_recovery"]["extents"] == 8
            assert status["last_recovery"]["bytes_total"] == 8 * MIB
            assert status["last_recovery"]["bytes_copied"] == 8 * MIB
            sent = 8 * MIB if kind is InitialSync.FULL else 64 * KIB
            assert status["sent_bytes_total"] == sent
            assert status["resync"] is None

    run(test())
    assert local.differing() == set()
    assert local.superblock.initial_sync is InitialSync.NONE
    assert local.recorded() == set()


def test_an_initial_sync_that_was_interrupted_goes_on(make: Callable[..., LocalVolume]) -> None:
    local = make(initial=InitialSync.CHECKSUM)
    local.scribble(local.secondary, 6 * MIB)
    unlimited = local.config
    local.config = dataclasses.replace(unlimited, copy_rate_bytes_per_s=64 * KIB)

    async def begin() -> None:
        async with serving(local, now=True) as served:
            served.volume.pause()  # half-way: the limit lets four megabytes pass at once

    async def go_on() -> None:
        async with serving(local) as served:
            assert served.named("recovery-started")[0]["reason"] == "initial"
            await served.in_sync()
            assert served.volume.copier.sent_bytes == 64 * KIB

    run(begin())
    assert local.superblock.initial_sync is InitialSync.CHECKSUM
    assert local.recorded() >= {6, 7}
    local.config = unlimited
    run(go_on())
    assert local.differing() == set()


def test_a_start_after_an_unclean_end_copies_what_the_record_names(local: LocalVolume) -> None:
    async def leave_behind() -> None:
        async with serving(local) as served:
            served.volume.pause()
            assert served.volume.state == "paused"
            await served.write(2 * MIB, b"x" * 64 * KIB)
            await served.write(5 * MIB, b"y" * 64 * KIB)
            result = await served.volume.stop(True)
            assert result["clean"] is False
            assert result["record_extents"] >= 2
            assert served.events[-1]["event"] == "stopped"

    async def recover(extents: int) -> None:
        async with serving(local) as served:
            await served.in_sync()
            recovery = served.volume.status()["last_recovery"]
            assert recovery["reason"] == "crash"
            assert recovery["extents"] == extents
            assert recovery["bytes_total"] == recovery["bytes_copied"] == extents * MIB
            assert served.volume.status()["copied_bytes_total"] == extents * MIB

    run(leave_behind())
    assert not local.superblock.flags & RecordFlag.CLEAN
    recorded = local.recorded()
    assert local.differing() == {2, 5}
    assert recorded >= {2, 5}
    run(recover(len(recorded)))
    assert local.differing() == set()


def test_a_damaged_page_is_copied_as_ones(local: LocalVolume) -> None:
    for slot in (0, 1):
        local.scribble(local.record, page_offset(0, slot) + 100, b"\xff" * 600)
    local.scribble(local.secondary, 7 * MIB)

    async def test() -> None:
        async with serving(local) as served:
            assert served.volume.status()["last_error"]["code"] == "record-damaged"
            await served.in_sync()
            assert served.volume.status()["last_recovery"]["bytes_copied"] == 8 * MIB

    run(test())
    assert local.differing() == set()


# -- starts that fail -------------------------------------------------------------------------


async def start_refused(local: LocalVolume, kind: type[BitmapdError]) -> BitmapdError:
    """A start that fails, and lets go of everything."""
    session = local.superblock.session
    with pytest.raises(kind) as caught:
        await Served(local).volume.start()
    assert local.superblock.session == session, "refused before anything was written"
    assert not local.paths.nbd_socket(local.name).exists()
    return caught.value


def test_another_secondary_is_refused_at_the_start(local: LocalVolume) -> None:
    kept = local.secondary.with_suffix(".kept")
    local.secondary.rename(kept)
    shutil.copy(kept, local.secondary)
    before = local.secondary.read_bytes()
    local.scribble(local.primary, 0)

    async def test() -> None:
        error = await start_refused(local, ForeignRecordError)
        assert "the record was made for" in error.message
        os.replace(kept, local.secondary)
        async with serving(local):
            pass

    run(test())
    assert local.secondary.read_bytes() == before, "the one that was refused was not written"


def test_a_secondary_that_has_shrunk_is_refused(local: LocalVolume) -> None:
    os.truncate(local.secondary, 8 * MIB - 512)

    async def test() -> None:
        error = await start_refused(local, ForeignRecordError)
        assert f"has {8 * MIB - 512} bytes" in error.message

    run(test())


def test_a_primary_that_is_gone_is_refused(local: LocalVolume) -> None:
    local.primary.rename(local.primary.with_suffix(".kept"))
    run(_as_test(start_refused(local, NotFoundError)))


async def _as_test(wanted: Awaitable[Any]) -> None:
    await wanted


def test_a_volume_that_runs_is_busy(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local):
            with pytest.raises(BusyError):
                await Served(local).volume.start()

    run(test())


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("nbds://127.0.0.1/vol0", "there are no certificates"),
        ("nbd://127.0.0.1/vol0", "without encryption"),
    ],
)
def test_an_export_that_anybody_could_read_is_refused(
    local: LocalVolume, listen: str, said: str
) -> None:
    # Past the configuration's own judgement, which says so earlier.
    local.config = dataclasses.replace(local.config, listen=listen)

    async def test() -> None:
        with pytest.raises(UsageError) as caught:
            await Served(local).volume.start()
        assert said in caught.value.message
        assert caught.value.hint is not None
        local.config = dataclasses.replace(
            local.config, listen=local.paths.default_listen(local.name)
        )
        async with serving(local):  # the attempt has let go of everything
            pass

    run(test())


# -- hosts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_hosts_write_and_read_over_nbd(make: Callable[..., LocalVolume], where: str) -> None:
    local = make()
    if where == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        listen = f"nbd://127.0.0.1:{port}/vol0"
        local.config = dataclasses.replace(
            local.config, listen=listen, allow_plaintext_loopback=True
        )

    def host() -> bytes:
        if where == "tcp":
            with socket.create_connection(("127.0.0.1", port)) as sock:
                return sock.recv(8)
        with RawNbd(local.paths.nbd_socket("vol0"), "vol0") as nbd:
            assert nbd.size_bytes == 8 * MIB
            nbd.call(WRITE, MIB, 4096, b"z" * 4096)
            return nbd.call(READ, MIB, 4096)

    async def test() -> None:
        async with serving(local) as served:
            if where == "tcp":
                assert await asyncio.to_thread(host) == b"NBDMAGIC"
                assert served.volume.status()["device"] == listen
                return
            assert await asyncio.to_thread(host) == b"z" * 4096
            await served.in_sync()
            status = served.volume.status()
            assert (status["writes_total"], status["misses_total"]) == (1, 1)
            assert status["written_bytes_total"] == 4096
            assert status["record_updates_total"] == 1

    run(test())
    if where == "unix":
        assert local.primary.read_bytes()[MIB : MIB + 4096] == b"z" * 4096
        assert local.differing() == set()


def test_a_missing_secondary_does_not_keep_hosts_from_working(local: LocalVolume) -> None:
    away = local.secondary.with_suffix(".away")
    local.secondary.rename(away)

    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            assert volume.state == "link-down"
            assert "cannot open the secondary" in served.named("link-down")[0]["message"]
            assert volume.status()["last_error"]["code"] == "link-down"
            await served.write(6 * MIB, b"w" * 64 * KIB)
            status = volume.status()
            assert status["dirty_bytes"] >= 64 * KIB
            assert status["record_bytes"] >= MIB
            with pytest.raises(UnreachableError):
                await volume.verify(False, nothing)
            away.rename(local.secondary)
            await served.event("link-up")
            await served.in_sync()
            assert volume.state == "in-sync"

    run(test())
    assert local.differing() == set()


def test_a_secondary_that_comes_back_as_another_one_is_not_written(local: LocalVolume) -> None:
    away = local.secondary.with_suffix(".away")
    local.secondary.rename(away)

    async def test() -> None:
        async with serving(local, now=True) as served:
            shutil.copy(away, local.secondary)
            await served.write(6 * MIB, b"w" * 64 * KIB)
            copier = served.volume.copier
            while copier.last_error is None or copier.last_error.errno != errno.ENODEV:
                await asyncio.sleep(0.05)
            assert served.volume.state == "link-down"
            served.volume.pause()
            served.volume.resume()
            assert served.volume.state == "link-down"

    run(test())
    assert local.secondary.read_bytes() == away.read_bytes()
    assert local.recorded() >= {6}


def test_the_record_empties_itself_when_everything_is_copied(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"a" * 4096)
            assert served.volume.state == "copying"
            assert served.volume.status()["lag_seconds"] >= 0.0
            await served.in_sync()
            assert served.named("in-sync")
            assert served.volume.status()["lag_seconds"] == 0.0

    run(test())
    assert local.recorded() == set()


def test_the_stored_record_shrinks_while_the_volume_runs(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_module, "TICK_S", 0.02)

    async def test() -> None:
        async with serving(local) as served:
            served.volume.gate.set_policy(ScriptedPolicy())  # wants to keep nothing
            await served.write(0, b"a" * 4096)
            assert local.recorded() == {0}
            await served.in_sync()
            while not served.volume._store.settled:
                await asyncio.sleep(0.01)
            assert local.recorded() == set()
            assert served.volume.status()["record_clears_total"] == 1

    run(test())


class BrokenRecord:
    """The record's file is open for reading only, so that every write to it fails."""

    def __init__(self, served: Served) -> None:
        self._fd = served.volume._record.fd
        self._kept = os.dup(self._fd)
        read_only = os.open(served.local.record, os.O_RDONLY | os.O_DIRECT)
        os.dup2(read_only, self._fd)
        os.close(read_only)

    def mend(self) -> None:
        os.dup2(self._kept, self._fd)
        os.close(self._kept)


def test_a_record_that_fails_fails_misses_alone(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"a" * 4096)
            broken = BrokenRecord(served)
            await served.write(4096, b"b" * 4096)  # a hit
            with pytest.raises(OSError, match="Bad file descriptor") as caught:
                await served.write(6 * MIB, b"c" * 4096)
            assert caught.value.errno == errno.EBADF
            assert served.volume.state == "degraded"
            status = served.volume.status()
            assert status["last_error"]["code"] == "record-error"
            assert status["record_errors_total"] >= 1
            broken.mend()
            await served.write(6 * MIB, b"d" * 4096)
            assert served.volume.state != "degraded"

    run(test())
    assert local.primary.read_bytes()[6 * MIB : 6 * MIB + 4096] == b"d" * 4096
    assert local.superblock.flags & RecordFlag.CLEAN


# -- stopping ---------------------------------------------------------------------------------


def test_a_stop_copies_what_is_left(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            served.volume.pause()
            await served.write(0, b"q" * 3 * MIB)
            assert (await served.volume.stop(False))["clean"] is True
            with pytest.raises(WrongStateError):
                await served.volume.stop(False)

    run(test())
    assert local.differing() == set()
    assert local.superblock.flags & RecordFlag.CLEAN


def test_a_stop_that_copies_can_be_hurried(local: LocalVolume) -> None:
    local.config = dataclasses.replace(local.config, copy_rate_bytes_per_s=64 * KIB)

    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"q" * 8 * MIB)
            stop = asyncio.ensure_future(served.volume.stop(False))
            done, _ = await asyncio.wait([stop], timeout=0.5)
            assert not done, "two megabytes at this rate take longer"
            served.volume.hurry()
            assert (await stop)["clean"] is False

    run(test())
    assert local.differing() <= local.recorded()
    assert local.recorded()


def test_a_stop_does_not_wait_for_a_secondary_that_is_away(local: LocalVolume) -> None:
    away = local.secondary.with_suffix(".away")
    local.secondary.rename(away)

    async def test() -> None:
        async with serving(local) as served:
            await served.write(MIB, b"q" * 4096)
            assert (await served.volume.stop(False))["clean"] is False

    run(test())
    assert 1 in local.recorded()


def test_a_stop_with_a_failing_record_is_not_clean(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"q" * 4096)
            BrokenRecord(served)
            assert (await served.volume.stop(False))["clean"] is False
            said = [event["message"] for event in served.named("record-error")]
            assert any("cannot end the session in order" in message for message in said)

    run(test())
    assert not local.superblock.flags & RecordFlag.CLEAN
    assert 0 in local.recorded()


# -- commands ---------------------------------------------------------------------------------


def test_waiting(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.volume.wait("started")
            await served.volume.wait("in-sync")
            with pytest.raises(UsageError):
                await served.volume.wait("stopped")

    run(test())


def test_pause_and_resume(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            served.volume.pause()
            await served.write(0, b"p" * 4096)
            with pytest.raises(WrongStateError) as caught:
                await served.volume.resync(False)
            assert caught.value.hint == "dmctl resume vol0"
            served.volume.resume()
            assert served.volume.copier.state is CopyState.RUNNING
            await served.in_sync()

    run(test())
    assert local.differing() == set()


def test_resync_of_what_is_in_sync_does_nothing(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            for checksum in (False, True):
                answer = await served.volume.resync(checksum)
                assert answer == {"extents": 0, "state": "in-sync"}
            assert served.volume.copier.copied_bytes == 0

    run(test())


def test_resync_hurries_what_is_not_in_sync(local: LocalVolume) -> None:
    local.config = dataclasses.replace(local.config, era_interval_s=600.0)

    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"p" * 4096)
            assert (await served.volume.resync(False))["state"] == "copying"
            await served.in_sync()
            await served.write(0, b"r" * 4096)
            await served.volume.resync(False)
            await served.in_sync()

    run(test())


def test_resync_with_checksum_sends_what_differs_in_the_record(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            await served.write(0, b"p" * 4096)
            await served.in_sync()
            local.scribble(local.secondary, 300 * KIB)
            recorded = volume.status()["record_extents"]
            assert recorded >= 1, "kept for a while, because it was written"
            sent = volume.copier.sent_bytes
            answer = await volume.resync(True)
            assert answer == {"extents": recorded, "state": "resyncing"}
            assert (await volume.resync(True))["extents"] == 0, "one at a time"
            await served.in_sync()
            assert volume.copier.sent_bytes - sent == 64 * KIB
            assert volume.status()["last_recovery"]["reason"] == "clean", "that was the start's"

    run(test())
    assert local.differing() == set()


def test_verify_and_repair(local: LocalVolume) -> None:
    local.scribble(local.secondary, 5 * MIB)

    async def test() -> None:
        shares: list[float] = []

        async def progress(fields: dict[str, Any]) -> None:
            shares.append(fields["progress"])

        async with serving(local) as served:
            volume = served.volume
            found = await volume.verify(False, progress)
            assert found == {
                "compared_bytes": 8 * MIB,
                "unexpected_bytes": 64 * KIB,
                "repaired_bytes": 0,
                "undecided_blocks": 0,
                "unexpected": [[5 * MIB, 64 * KIB]],
            }
            assert shares[-1] == 1.0
            assert served.named("unexpected-difference")[0]["offset_bytes"] == 5 * MIB
            with pytest.raises(DifferencesError) as caught:
                check_verify(found, "vol0")
            assert caught.value.hint == "dmctl verify vol0 --repair"
            repaired = await volume.verify(True, nothing)
            assert repaired["repaired_bytes"] == 64 * KIB
            check_verify(repaired, "vol0")
            assert local.differing() == set(), "it is copied when the command returns"
            assert (await volume.verify(False, nothing))["unexpected_bytes"] == 0

    run(test())


class Held:
    """A verify that cannot end: an extent that is copied and not settled differs."""

    def __init__(self, served: Served) -> None:
        served.volume.pause()
        gate = served.volume.gate
        gate.take_era(lambda: None)
        for first, stop in list(gate.taken.runs()):
            gate.copied(first, stop)
        served.local.scribble(served.local.secondary, 500 * KIB)
        self.task = asyncio.ensure_future(served.volume.verify(False, nothing))

    async def begun(self) -> None:
        await asyncio.wait([self.task], timeout=0.2)
        assert not self.task.done()


def test_one_verify_at_a_time_and_a_stop_ends_it(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"v" * 4096)
            held = Held(served)
            await held.begun()
            with pytest.raises(BusyError):
                await served.volume.verify(False, nothing)
            await served.volume.stop(True)
            with pytest.raises(UnreachableError, match="the volume is being stopped"):
                await held.task

    run(test())


def test_a_verify_ends_with_whoever_asked_for_it(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"v" * 4096)
            held = Held(served)
            await held.begun()
            held.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held.task
            again = asyncio.ensure_future(served.volume.verify(False, nothing))
            await asyncio.wait([again], timeout=0.1)
            again.cancel()
            with pytest.raises(asyncio.CancelledError):
                await again

    run(test())


# -- settings ---------------------------------------------------------------------------------


def test_settings_change_while_it_runs(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            await served.write(0, b"s" * 4096)
            volume.reconfigure(
                changed(
                    local.config,
                    {
                        "predictor": "lru",
                        "era_interval": "3s",
                        "copy_rate": "1MiB",
                        "record_limit": "200MiB",
                    },
                )
            )
            assert volume.copier.era_interval_s == 3.0
            assert volume.copier.throttle.rate_bytes_per_s == MIB
            assert volume.status()["record_limit_bytes"] == 200 * MIB
            assert volume.gate._policy.name == "lru"
            assert volume.gate._policy.victims(9, lambda extent: True, 1e9), "told what there is"
            assert served.named("settings-changed")

    run(test())


def test_the_limit_follows_the_speed_of_copying(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            volume.reconfigure(changed(local.config, {"resync_target": "10s"}))
            assert volume.status()["record_limit_bytes"] == int(1100e6) // MIB * MIB
            volume.copier.meter.begin(0.0)
            volume.copier.meter.add(1.0, 20 * MIB)
            volume.reconfigure(volume.config)
            assert volume.status()["record_limit_bytes"] == 200 * MIB
            volume.reconfigure(changed(volume.config, {"resync_target": "1s"}))
            assert volume.status()["record_limit_bytes"] == 64 * MIB, "never below 64 extents"

    run(test())


def test_completion_raises_the_error_and_minds_no_late_answer() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()

        def twice(done: Callable[[OSError | None], None]) -> None:
            loop.call_soon(done, OSError(errno.EIO, "first"))
            loop.call_soon(done, None)

        with pytest.raises(OSError, match="first"):
            await completion(twice)

    run(test())


# -- size -------------------------------------------------------------------------------------


def test_a_larger_volume_is_taken_up_while_it_runs(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            assert await volume.resize() == {"size_bytes": 8 * MIB, "changed": False}
            os.truncate(local.secondary, 11 * MIB)
            os.truncate(local.primary, 11 * MIB)
            local.scribble(local.primary, 10 * MIB)
            assert await volume.resize() == {"size_bytes": 11 * MIB, "changed": True}
            assert served.named("resized")[0]["size_bytes"] == 11 * MIB
            assert volume.gate.size_bytes == volume.status()["size_bytes"] == 11 * MIB
            await served.write(10 * MIB + 64 * KIB, b"n" * 4096)
            await served.in_sync()

    run(test())
    assert local.primary.read_bytes() == local.secondary.read_bytes()
    assert local.superblock.geometry.size_bytes == 11 * MIB
    assert local.superblock.secondary_size_bytes == 11 * MIB


@pytest.mark.parametrize(
    ("primary", "secondary", "record", "kind", "said"),
    [
        (7 * MIB, 8 * MIB, MIB, WrongStateError, "cannot shrink"),
        (9 * MIB, 8 * MIB, MIB, NoSpaceError, "secondary s has"),
        (40000 * MIB, 40000 * MIB, 64 * KIB, NoSpaceError, "record r has"),
    ],
)
def test_sizes_that_cannot_be_taken_up(
    primary: int, secondary: int, record: int, kind: type[BitmapdError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        larger_geometry(Geometry(8 * MIB), primary, secondary, record, Names("p", "s", "r"))
    assert caught.value.hint is not None


# -- a server as secondary --------------------------------------------------------------------


def behind(local: LocalVolume, folder: Path, **settings: Any) -> LocalVolume:
    """A volume whose secondary is what `local` exports."""
    folder.mkdir()
    listen = local.config.listen
    made = LocalVolume(folder, local.paths.run_dir, "front", secondary=listen, **settings)
    made.primary.write_bytes(local.primary.read_bytes()[: made.geometry.size_bytes])
    return made


def test_a_volume_may_be_the_secondary_of_another(local: LocalVolume, tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(local) as back:
            front = behind(local, tmp_path / "front")
            async with serving(front) as served:
                await served.write(3 * MIB, b"f" * 64 * KIB)
                await served.in_sync()
                found = await served.volume.verify(False, nothing)
                assert found["unexpected_bytes"] == 0
                assert back.volume.gate.writes >= 1
                for one in (local, front):
                    os.truncate(one.primary, 9 * MIB)
                os.truncate(local.secondary, 9 * MIB)
                await back.volume.resize()
                assert (await served.volume.resize())["changed"]
                await served.event("link-up")
                await served.write(8 * MIB, b"g" * 64 * KIB)
                await served.in_sync()
                await back.in_sync()
            assert front.primary.read_bytes() == local.primary.read_bytes()

    run(test())
    assert local.differing() == set()


def test_a_server_that_is_away_does_not_keep_a_volume_from_starting(
    local: LocalVolume, tmp_path: Path
) -> None:
    async def test() -> None:
        front = behind(local, tmp_path / "front")
        async with serving(front, now=True) as served:
            assert served.volume.state == "link-down"
            await served.write(3 * MIB, b"f" * 64 * KIB)
            os.truncate(front.primary, 9 * MIB)
            with pytest.raises(UnreachableError):
                await served.volume.resize()
            async with serving(local) as back:
                await served.event("link-up")
                await served.in_sync()
                assert back.volume.gate.writes >= 1

    run(test())
    assert local.primary.read_bytes()[3 * MIB : 3 * MIB + 64 * KIB] == b"f" * 64 * KIB


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while it copies"])
def test_a_stop_in_a_hurry_waits_for_no_server(
    make: Callable[..., LocalVolume], tmp_path: Path, late: bool
) -> None:
    """A server that takes requests and does not answer them."""
    with short_folder() as folder, nbdkit(folder, "memory", f"{8 * MIB}") as server:
        local = make(secondary=format_uri(server.uri()))

        async def test() -> None:
            async with serving(local) as served:
                server.signal(signal.SIGSTOP)
                await served.write(3 * MIB, b"f" * 64 * KIB)
                served.volume.copier.wake()
                while served.volume.copier.idle:
                    await asyncio.sleep(0.01)
                stop = asyncio.ensure_future(served.volume.stop(not late))
                if late:
                    await asyncio.wait([stop], timeout=0.3)
                    assert not stop.done()
                    served.volume.hurry()
                assert (await stop)["clean"] is False

        try:
            run(test())
        finally:
            server.signal(signal.SIGCONT)
    assert 3 in local.recorded()


def test_an_export_with_tls(make: Callable[..., LocalVolume], tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path) / "good"
    local = make(tls_certificates=str(certificates))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    local.config = dataclasses.replace(local.config, listen=f"nbds://127.0.0.1:{port}/vol0")

    async def test() -> None:
        async with serving(local) as served:
            uri = parse_uri(local.config.listen)
            target = NbdTarget(asyncio.get_running_loop(), uri, tls_certificates=certificates)
            await completion(target.open)
            assert target.size_bytes == 8 * MIB
            assert served.volume.status()["connections"] == 1
            target.close()

    run(test())
