"""Hosts of one of two appliances, which stop when the partner takes over as planned (edge).

They are cut off once what they had asked for is answered.  They are let in again where they were if
the takeover comes to nothing, and at this node by a takeover of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from bitmapd.attach.mode import DRAIN_TIMEOUT_S, Mode


class VolumeHosts:
    """`partner.handover.Hosts`.  `serve` begins to listen, after the server has been drained."""

    def __init__(
        self,
        mode: Mode,
        loop: asyncio.AbstractEventLoop,
        serve: Callable[[], Coroutine[None, None, None]],
    ) -> None:
        self._mode = mode
        self._loop = loop
        self._serve = serve
        self._tasks: set[asyncio.Task[None]] = set()
        self.are_served = True

    def stop(self, force: bool, done: Callable[[str | None], None]) -> None:
        connected = self._mode.server.stats.connections
        if connected and not force:
            self._loop.call_soon(done, f"{connected} hosts are connected at the partner")
            return
        self.are_served = False
        self._begin(self._stop(done))

    async def _stop(self, done: Callable[[str | None], None]) -> None:
        await self._mode.server.drain(DRAIN_TIMEOUT_S)
        done(None)

    def go_on(self) -> None:
        if not self.are_served:
            self.are_served = True
            self._begin(self._serve())

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            what = {"message": "hosts cannot be served", "exception": error}
            self._loop.call_exception_handler(what)
