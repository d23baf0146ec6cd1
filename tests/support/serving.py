"""A volume that runs in the loop of the test, on the files of a `LocalVolume`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

from bitmapd.config import Paths
from bitmapd.control.events import EventLog
from bitmapd.daemon import Daemon
from bitmapd.lastresort import LastResort
from bitmapd.media.buffers import aligned
from bitmapd.media.waiting import completion
from bitmapd.volume.volume import Volume
from tests.support.local import LocalVolume

WAIT_S = 60.0


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


async def nothing(_: dict[str, Any]) -> None:
    """Somebody who is told of progress and does not care."""


class BrokenRecord:
    """The record's file is open for reading only, so that every write to it fails."""

    def __init__(self, served: Served, fd: int | None = None) -> None:
        self._fd = served.volume._parts.record.fd if fd is None else fd
        self._kept = os.dup(self._fd)
        read_only = os.open(served.local.record, os.O_RDONLY | os.O_DIRECT)
        os.dup2(read_only, self._fd)
        os.close(read_only)

    def mend(self) -> None:
        os.dup2(self._kept, self._fd)
        os.close(self._kept)


def process_of(paths: Paths, volume: Any) -> Daemon:
    """Of a volume that is there; it does not run, its verbs can be called."""
    log = EventLog("vol0", wall_clock=time.time, clock=time.monotonic)
    process = Daemon(paths, "vol0", log, LastResort(Mock(), Mock()))
    process.volume = volume
    return process
