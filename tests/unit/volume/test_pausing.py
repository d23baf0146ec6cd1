"""volume/pausing: a pause is the record's, and what needs copying is refused meanwhile.

Names end in the invariant of the module that they hold.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from bitmapd.copier.engine import CopyState
from bitmapd.errors import BitmapdError, UnreachableError, WrongStateError
from bitmapd.record.geometry import KIB, MIB
from bitmapd.record.layout import RecordFlag
from tests.support.local import LocalVolume
from tests.support.serving import BrokenRecord, Served, nothing, run, serving


def test_a_pause_outlives_the_session_and_ends_with_resume_1(local: LocalVolume) -> None:
    async def pause() -> None:
        async with serving(local) as served:
            await served.volume.pause()
            assert local.superblock.paused, "when it returns"
            await served.write(3 * MIB, b"p" * 64 * KIB)
            answer = await served.volume.stop(False)
            assert (answer["clean"], answer["paused"]) == (False, True)
            assert served.named("stopped")[0]["paused"] is True

    async def still_paused() -> None:
        async with serving(local) as served:
            assert served.volume.state == "paused"
            assert served.volume.status()["paused"] is True
            assert "dmctl resume vol0" in served.named("paused")[0]["message"]

    async def resume() -> None:
        async with serving(local) as served:
            await served.volume.resume()
            assert not local.superblock.paused
            await served.in_sync()

    before = local.secondary.read_bytes()
    run(pause())
    run(still_paused())
    assert local.secondary.read_bytes() == before
    assert 3 in local.recorded()
    run(resume())
    assert local.differing() == set()


def test_nothing_is_under_way_after_a_pause_2(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"u" * 8 * MIB)
            served.volume.copier.wake()
            while served.volume.copier.idle:
                await asyncio.sleep(0)
            await served.volume.pause()
            assert served.volume.copier.idle
            held = local.secondary.read_bytes()
            await asyncio.sleep(0.2)  # two eras
            assert local.secondary.read_bytes() == held
            await served.volume.resume()

    run(test())


def test_a_clean_volume_may_be_paused(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.volume.pause()
            await served.volume.pause()
            assert len(served.named("paused")) == 1
            assert (await served.volume.stop(False))["clean"] is True

    run(test())
    assert local.superblock.flags & RecordFlag.CLEAN
    assert local.superblock.paused


def test_a_record_that_cannot_be_written_3(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying does what was asked for, and the error says what the next start will find."""

    async def test() -> None:
        async with serving(local) as served:
            await served.volume.pause()
            await served.write(0, b"b" * 4096)
            broken = ReadOnly(served)
            with pytest.raises(BitmapdError, match="copying goes on, but after a start"):
                await served.volume.resume()
            assert served.volume.copier.state is CopyState.RUNNING
            broken.mend()
            await served.volume.pause()
            await served.volume.resume()
            broken = ReadOnly(served)
            with pytest.raises(BitmapdError, match="copying stands still, but after a start"):
                await served.volume.pause()
            assert served.volume.state == "paused"
            broken.mend()
            await served.volume.resume()
            await served.in_sync()

    run(test())


class ReadOnly(BrokenRecord):
    """Also the superblocks cannot be written."""

    def __init__(self, served: Served) -> None:
        super().__init__(served, served.volume._parts.session._medium.fd)


def test_changes_come_one_after_the_other_4(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            await asyncio.gather(volume.pause(), volume.resume(), volume.pause(), volume.resume())
            assert volume.copier.state is CopyState.RUNNING
            assert not local.superblock.paused
            await asyncio.gather(volume.resume(), volume.pause())
            assert volume.copier.state is CopyState.PAUSED
            assert local.superblock.paused

    run(test())


def test_none_any_more_at_the_end_4(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.volume.stop(False)
            for change in (served.volume.pause, served.volume.resume):
                with pytest.raises(WrongStateError, match="is being stopped"):
                    await change()

    run(test())


def test_a_pause_ends_the_copying_of_a_stop(local: LocalVolume) -> None:
    local.config = dataclasses.replace(local.config, copy_rate_bytes_per_s=64 * KIB)

    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"q" * 8 * MIB)
            stop = asyncio.ensure_future(served.volume.stop(False))
            done, _ = await asyncio.wait([stop], timeout=0.5)
            assert not done, "two megabytes at this rate take longer"
            await served.volume.pause()
            assert (await stop)["clean"] is False

    run(test())
    assert local.superblock.paused
    assert local.differing() <= local.recorded()


# -- what needs copying ----------------------------------------------------------------------


def test_what_needs_copying_is_refused(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            await volume.pause()
            for refused in (
                volume.wait("in-sync"),
                volume.resync(False),
                volume.resync(True),
                volume.verify(True, nothing),
            ):
                with pytest.raises(WrongStateError, match="'vol0' is paused") as caught:
                    await refused
                assert caught.value.hint == "dmctl resume vol0"
            assert (await volume.verify(False, nothing))["unexpected_bytes"] == 0
            await volume.wait("started")

    run(test())


def test_who_waits_for_in_sync_hears_of_a_pause(local: LocalVolume) -> None:
    local.config = dataclasses.replace(local.config, era_interval_s=600.0)

    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"w" * 4096)
            waiting = asyncio.ensure_future(served.volume.wait("in-sync"))
            await asyncio.sleep(0)
            await served.volume.pause()
            with pytest.raises(WrongStateError, match="is paused"):
                await waiting

    run(test())


@pytest.mark.parametrize(
    ("become", "kind", "said"),
    [
        ("paused", WrongStateError, "the volume was paused"),
        ("stopped", WrongStateError, "the volume was stopped"),
        ("link-down", UnreachableError, "the secondary went away"),
    ],
)
def test_a_repair_that_is_not_copied_says_so(
    local: LocalVolume, become: str, kind: type[BitmapdError], said: str
) -> None:
    """It found what differs, and the record names that, but nothing will copy it for now."""
    local.scribble(local.secondary, 5 * MIB)
    local.config = dataclasses.replace(local.config, copy_rate_bytes_per_s=4 * KIB, predictor="lru")

    async def test() -> None:
        async with serving(local, now=True) as served:
            await served.write(0, b"r" * 5 * MIB)  # the rate lets four of them pass at once
            repair = asyncio.ensure_future(served.volume.verify(True, nothing))
            await served.event("unexpected-difference")
            assert not repair.done()
            if become == "paused":
                await served.volume.pause()
            elif become == "stopped":
                await served.volume.stop(True)
            else:
                local.secondary.rename(local.secondary.with_suffix(".away"))
                served.volume.copier.reconnect()
            with pytest.raises(kind, match=said):
                await repair

    run(test())
    assert 5 in local.recorded()
