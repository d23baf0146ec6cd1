"""What may wait for a medium runs on other threads than the loop, where hosts are served."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from bitmapd.media.base import Done
from bitmapd.media.kdevice import KernelDevice
from bitmapd.record.geometry import MIB
from bitmapd.volume import sides
from tests.support.local import LocalVolume
from tests.support.serving import Served, serving


class Watch:
    """Which calls that open, close, measure or identify a medium were made by which thread."""

    def __init__(self, local: LocalVolume, monkeypatch: pytest.MonkeyPatch) -> None:
        self._media = {str(local.primary): "primary", str(local.secondary): "secondary"}
        self._media[str(local.record)] = "record"
        self.on_loop: set[tuple[str, str]] = set()
        self.elsewhere: set[tuple[str, str]] = set()
        self._loop_thread = threading.get_ident()
        for owner, name in (
            (KernelDevice, "_open"),
            (KernelDevice, "_close_left"),
            (KernelDevice, "refresh_size"),
        ):
            self._watch(monkeypatch, owner, name, lambda device: str(device.name))
        self._watch(monkeypatch, sides, "identify", str)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, which: Any) -> None:
        really = getattr(owner, name)

        def call(subject: Any, *rest: Any) -> Any:
            on_loop = threading.get_ident() == self._loop_thread
            medium = self._media.get(which(subject), "none")
            (self.on_loop if on_loop else self.elsewhere).add((name, medium))
            return really(subject, *rest)

        monkeypatch.setattr(owner, name, call)


def fail_once(served: Served) -> None:
    """The next write to the secondary fails."""
    engine, secondary = served.volume._parts.engine, served.volume._parts.secondary
    really = engine.write

    def write(fd: int, at: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        if isinstance(secondary, KernelDevice) and fd == secondary.fd:
            engine.write = really  # type: ignore[method-assign]
            engine.loop.call_soon(done, OSError(errno.ENODEV, "gone"))
        else:
            really(fd, at, buffer, done, fua)

    engine.write = write  # type: ignore[method-assign]


def test_a_secondary_that_goes_and_comes_back_is_looked_at_by_threads(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> Watch:
        async with serving(local) as served:
            watch = Watch(local, monkeypatch)  # from here on hosts are served
            fail_once(served)
            await served.write(MIB, b"s" * 65536)
            await served.event("link-up")
            await served.in_sync()
            for path in (local.primary, local.secondary, local.record):
                os.truncate(path, path.stat().st_size + 64 * MIB)
            assert (await served.volume.resize())["changed"]
            await served.in_sync()
        return watch

    watch = asyncio.run(run())
    assert watch.on_loop == set()
    assert watch.elsewhere >= {
        ("_open", "secondary"),
        ("identify", "secondary"),
        ("_close_left", "primary"),
        ("_close_left", "record"),
        ("_close_left", "secondary"),
        ("refresh_size", "primary"),
        ("refresh_size", "secondary"),
    }
    assert local.primary.read_bytes() == local.secondary.read_bytes()


def test_media_are_opened_by_threads(local: LocalVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> Watch:
        watch = Watch(local, monkeypatch)
        async with serving(local):
            return watch

    watch = asyncio.run(run())
    assert {medium for name, medium in watch.elsewhere if name == "_open"} == {
        "primary",
        "secondary",
        "record",
    }
    assert not {call for call in watch.on_loop if call[0] != "identify"}


def test_what_hangs_is_closed_by_a_thread_and_waited_for_by_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    order: list[str] = []
    hangs, closing = threading.Event(), threading.Event()

    async def run() -> None:
        from bitmapd.media.aio import AioEngine
        from bitmapd.media.waiting import completion

        engine = AioEngine(asyncio.get_running_loop())
        device = await engine.call(lambda: KernelDevice(path, engine, aside=True))
        really = os.close

        def close(fd: int) -> None:
            closing.set()
            hangs.wait(30)
            order.append("closed")
            really(fd)

        monkeypatch.setattr("bitmapd.media.kdevice.os.close", close)
        device.close()
        assert not device.connected
        await asyncio.to_thread(closing.wait, 30)
        again = asyncio.ensure_future(completion(device.open))
        done, _ = await asyncio.wait([again], timeout=0.1)
        assert not done
        hangs.set()
        await again
        order.append("opened")
        monkeypatch.undo()
        device.close()
        idle = asyncio.Event()
        engine.when_idle(idle.set)
        await idle.wait()
        engine.close()

    asyncio.run(run())
    assert order == ["closed", "opened"]
