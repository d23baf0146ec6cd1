"""volume: start, recovery, hosts and stop, on real files, a real record and a real loop."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import shutil
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bitmapd.errors import (
    BitmapdError,
    BusyError,
    ForeignRecordError,
    NotFoundError,
    UnreachableError,
    UsageError,
    WrongStateError,
)
from bitmapd.record.geometry import KIB, MIB
from bitmapd.record.layout import InitialSync, RecordFlag, page_offset
from bitmapd.volume import volume as volume_module
from tests.support.cli import check_status
from tests.support.local import LocalVolume
from tests.support.mirror import ScriptedPolicy
from tests.support.rawnbd import READ, WRITE, RawNbd
from tests.support.serving import BrokenRecord, Served, nothing, run, serving

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
            assert result == {"clean": True, "record_extents": 0, "paused": False}
            assert served.volume.copier.copied_bytes == 0

    run(test())
    assert local.superblock.flags & RecordFlag.CLEAN
    assert local.superblock.session == 1


@pytest.mark.parametrize("kind", [InitialSync.FULL, InitialSync.CHECKSUM])
def test_an_initial_sync_copies_everything_or_what_differs(
    make_local: Callable[..., LocalVolume], kind: InitialSync
) -> None:
    local = make_local(initial=kind)
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


def test_an_initial_sync_that_was_interrupted_goes_on(
    make_local: Callable[..., LocalVolume],
) -> None:
    local = make_local(initial=InitialSync.CHECKSUM)
    local.scribble(local.secondary, 6 * MIB)
    unlimited = local.config
    local.config = dataclasses.replace(unlimited, copy_rate_bytes_per_s=64 * KIB)

    async def begin() -> None:
        async with serving(local, now=True) as served:
            await served.volume.pause()  # half-way: the limit lets four megabytes pass at once

    async def go_on() -> None:
        async with serving(local) as served:
            assert served.named("recovery-started")[0]["reason"] == "initial"
            await served.volume.resume()
            await served.in_sync()
            assert served.volume.copier.transfers.sent_bytes == 64 * KIB

    run(begin())
    assert local.superblock.initial_sync is InitialSync.CHECKSUM
    assert local.recorded() >= {6, 7}
    local.config = unlimited
    run(go_on())
    assert local.differing() == set()


def test_a_start_after_an_unclean_end_copies_what_the_record_names(local: LocalVolume) -> None:
    async def leave_behind() -> None:
        async with serving(local) as served:
            await served.volume.pause()
            assert served.volume.state == "paused"
            await served.write(2 * MIB, b"x" * 64 * KIB)
            await served.write(5 * MIB, b"y" * 64 * KIB)
            result = await served.volume.stop(True)
            assert result["clean"] is False
            assert result["record_extents"] >= 2
            assert served.events[-1]["event"] == "stopped"

    async def recover(extents: int) -> None:
        async with serving(local) as served:
            await served.volume.resume()
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
def test_hosts_write_and_read_over_nbd(make_local: Callable[..., LocalVolume], where: str) -> None:
    local = make_local()
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
            await served.volume.pause()
            await served.volume.resume()
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
            while not served.volume._parts.store.settled:
                await asyncio.sleep(0.01)
            assert local.recorded() == set()
            assert served.volume.status()["record_clears_total"] == 1

    run(test())


def test_a_record_that_fails_fails_misses_alone(local: LocalVolume) -> None:
    local.config = dataclasses.replace(local.config, predictor="lru")  # a miss is one extent

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


def test_a_stop_that_hosts_refuse_while_it_is_hurried_goes_on_copying(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(local) as served:
            asked, answer = asyncio.Event(), asyncio.Event()

            async def close_hosts() -> None:
                asked.set()
                await answer.wait()
                raise BusyError("/dev/mapper/vol0 is in use")

            with monkeypatch.context() as patch:
                patch.setattr(served.volume._parts.mode, "close_hosts", close_hosts)
                stop = asyncio.ensure_future(served.volume.stop(False))
                await asked.wait()
                served.volume.hurry()
                answer.set()
                with pytest.raises(BusyError):
                    await stop
            await served.write(0, b"q" * MIB)
            await served.in_sync()
            await served.write(0, b"r" * MIB)
            assert (await served.volume.stop(False))["clean"] is True, "nobody has said 'now'"

    run(test())


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
            assert any("cannot end the session cleanly" in message for message in said)

    run(test())
    assert not local.superblock.flags & RecordFlag.CLEAN
    assert 0 in local.recorded()
