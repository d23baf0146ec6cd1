"""recovery: when a volume counts as in sync, and a record device that answers late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bitmapd.errors import BitmapdError
from bitmapd.media.buffers import aligned
from bitmapd.media.waiting import completion
from bitmapd.record import tool
from bitmapd.record.geometry import MIB
from bitmapd.record.layout import InitialSync
from tests.support.local import LocalVolume
from tests.support.serving import Served, run, serving


class Door:
    """Superblock writes wait while it is closed, each on the thread that makes it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.loop_thread = threading.get_ident()

    def pass_(self) -> None:
        if threading.get_ident() == self.loop_thread:
            raise AssertionError("a superblock is written on the loop")
        self.arrived.release()
        self._open.wait()

    def open(self) -> None:
        self._open.set()


@contextmanager
def late_superblocks() -> Iterator[Door]:
    """A record device that answers writes of superblocks only when told."""
    door = Door()
    write = tool.RecordMedium.write

    def late(medium: tool.RecordMedium, offset: int, view: memoryview, flags: int = 0) -> None:
        door.pass_()
        write(medium, offset, view, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.RecordMedium, "write", late)
        try:
            yield door
        finally:
            door.open()
            door.arrived.release()  # a test that failed may still wait


async def arrived(door: Door) -> None:
    await asyncio.get_running_loop().run_in_executor(None, door.arrived.acquire)


async def read(served: Served) -> None:
    await completion(lambda done: served.volume.gate.read(0, aligned(4096), done))


def test_hosts_are_served_while_the_superblock_is_written(
    make_local: Callable[..., LocalVolume],
) -> None:
    """At the end of the initial copy, for a pause, and for a larger size."""
    local = make_local(initial=InitialSync.FULL)

    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            with late_superblocks() as door:
                await arrived(door)  # of the end of the pass
                await read(served)
                await served.write(MIB, b"w" * 4096)
                pausing = asyncio.ensure_future(volume.pause())
                await read(served)
                assert not pausing.done()
                door.open()
                await pausing
            assert volume.status()["paused"]
            await volume.resume()

    run(test())
    assert local.superblock.initial_sync is InitialSync.NONE
    assert not local.superblock.paused
    assert local.superblock.sequence == 6, "begun, copied, paused, resumed, clean"


def test_a_stop_waits_for_the_end_of_the_pass_to_be_kept(
    make_local: Callable[..., LocalVolume],
) -> None:
    local = make_local(initial=InitialSync.FULL)

    async def test() -> None:
        async with serving(local) as served:
            with late_superblocks() as door:
                await arrived(door)
                stopping = asyncio.ensure_future(served.volume.stop(False))
                await read(served)
                assert not stopping.done()
                door.open()
                assert (await stopping)["clean"]

    run(test())
    assert local.superblock.clean
    assert local.superblock.initial_sync is InitialSync.NONE


def test_in_sync_is_reported_when_a_kill_would_not_copy_everything_again(
    make_local: Callable[..., LocalVolume],
) -> None:
    """Whatever is on the medium at that moment is what a start after a kill finds."""
    local = make_local(initial=InitialSync.FULL)
    found: list[tuple[InitialSync, set[int]]] = []

    async def test() -> None:
        served = Served(local)
        emit = served._emit

        def look(event: str, **fields: object) -> None:
            if event == "in-sync":
                found.append((local.superblock.initial_sync, local.recorded()))
            emit(event, **fields)

        served.volume._told._emit_event = look
        await served.volume.start()
        await served.in_sync()
        await served.volume.stop(False)

    run(test())
    assert found == [(InitialSync.NONE, set())]


def test_it_is_not_in_sync_before(make_local: Callable[..., LocalVolume]) -> None:
    local = make_local(initial=InitialSync.FULL)

    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            with late_superblocks() as door:
                await arrived(door)
                assert local.recorded() == set(), "cleared before the superblock"
                assert volume.gate.in_sync
                assert volume.state == volume.status()["state"] == "copying"
                assert not served.named("in-sync")
                door.open()
                await served.in_sync()
            assert volume.state == "in-sync"
            assert local.superblock.initial_sync is InitialSync.NONE

    run(test())


def test_what_cannot_be_kept_is_tried_again(make_local: Callable[..., LocalVolume]) -> None:
    local = make_local(initial=InitialSync.FULL)

    async def test() -> None:
        async with serving(local) as served:
            with pytest.MonkeyPatch.context() as patch:

                def refuse(*_: object) -> None:
                    raise BitmapdError("cannot write: Input/output error")

                patch.setattr(tool.RecordMedium, "write", refuse)
                assert "cannot write" in (await served.event("record-error"))["message"]
                await read(served)
                assert not served.named("in-sync")
            await served.in_sync()

    run(test())
    assert local.superblock.initial_sync is InitialSync.NONE
