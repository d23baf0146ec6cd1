"""volume: waiting, pausing, resync, verify, settings, a larger size."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import changed
from bitmapd.copier.engine import CopyState
from bitmapd.errors import (
    BitmapdError,
    BusyError,
    NoSpaceError,
    UsageError,
    WrongStateError,
)
from bitmapd.media.waiting import completion
from bitmapd.record.geometry import KIB, MIB, Geometry
from bitmapd.volume.assemble import limit_extents
from bitmapd.volume.resize import Medium, larger_geometry
from tests.support.local import LocalVolume
from tests.support.loops import loop_device, sparse_file
from tests.support.serving import Served, nothing, run, serving

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
            await served.volume.pause()
            await served.write(0, b"p" * 4096)
            with pytest.raises(WrongStateError) as caught:
                await served.volume.resync(False)
            assert caught.value.hint == "dmctl resume vol0"
            await served.volume.resume()
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
    local.config = dataclasses.replace(local.config, predictor="lru")  # a miss is one extent

    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            await served.write(0, b"p" * 4096)
            await served.in_sync()
            local.scribble(local.secondary, 300 * KIB)
            recorded = volume.status()["record_extents"]
            assert recorded >= 1, "kept for a while, because it was written"
            sent = volume.copier.transfers.sent_bytes
            answer = await volume.resync(True)
            assert answer == {"extents": recorded, "state": "resyncing"}
            assert (await volume.resync(True))["extents"] == 0, "one at a time"
            await served.in_sync()
            assert volume.copier.transfers.sent_bytes - sent == 64 * KIB
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
                "unreadable_bytes": 0,
                "unreadable": [],
            }
            assert shares[-1] == 1.0
            assert served.named("unexpected-difference")[0]["offset_bytes"] == 5 * MIB
            repaired = await volume.verify(True, nothing)
            assert repaired["repaired_bytes"] == 64 * KIB
            assert local.differing() == set(), "it is copied when the command returns"
            assert (await volume.verify(False, nothing))["unexpected_bytes"] == 0

    run(test())


class Held:
    """A verify that cannot end: an extent that is copied and not settled differs."""

    def __init__(self, served: Served) -> None:
        served.volume.copier.pause()
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
            with pytest.raises(WrongStateError, match="the volume is being stopped"):
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
            assert volume.copier.rounds.era_interval_s == 3.0
            assert volume.copier.throttle.rate_bytes_per_s == MIB
            assert volume.status()["record_limit_bytes"] == 200 * MIB
            assert volume.gate._policy.name == "lru"
            assert volume.gate._policy.victims(9, lambda extent: True, 1e9), "told what there is"
            assert served.named("settings-changed")

    run(test())


def test_a_limit_of_the_whole_volume_names_its_short_last_extent(local: LocalVolume) -> None:
    geometry = Geometry(100 * MIB + 4096, MIB, 64 << 10)
    assert limit_extents(local.config, geometry, None) == geometry.extents == 101
    config = changed(local.config, {"record_limit": "100MiB"})
    assert limit_extents(config, geometry, None) == 100


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
    ("primary", "secondary", "record", "kind", "said", "hint"),
    [
        (7 * MIB, 8 * MIB, MIB, WrongStateError, "cannot shrink", "its size back"),
        (9 * MIB, 8 * MIB, MIB, NoSpaceError, "secondary s has", "enlarge"),
        (40000 * MIB, 40000 * MIB, 64 * KIB, NoSpaceError, "record r has", "enlarge"),
        (9 * MIB + 512, 10 * MIB, MIB, WrongStateError, "4096 bytes of secondary s", "9441280"),
        (9 * MIB + 100, 10 * MIB, MIB, WrongStateError, "512 bytes of primary p", "9437696"),
    ],
)
def test_sizes_that_cannot_be_taken_up(
    primary: int, secondary: int, record: int, kind: type[BitmapdError], said: str, hint: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        larger_geometry(
            Geometry(8 * MIB),
            Medium("p", primary, 512),
            Medium("s", secondary, 4096),
            Medium("r", record),
        )
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("size_bytes", [8 * MIB + 512, 8 * MIB + 100])
def test_a_size_that_is_no_multiple_of_the_blocks_changes_nothing(
    tmp_path: Path, short_path: Path, size_bytes: int
) -> None:
    """Taken up, its last block could never be copied, and the volume cannot shrink again."""
    with loop_device(sparse_file(tmp_path / "image", 10 * MIB), 4096) as device:
        local = LocalVolume(tmp_path, short_path, secondary=device)

        async def test() -> None:
            async with serving(local) as served:
                os.truncate(local.primary, size_bytes)
                with pytest.raises(WrongStateError, match="no multiple"):
                    await served.volume.resize()
                assert served.volume.gate.size_bytes == 8 * MIB

        run(test())
        assert local.superblock.geometry.size_bytes == 8 * MIB
