"""Hosts of one of two appliances: let in when this node is to serve them, and sent away (edge).

With `serve = on-promote` they are let in by a takeover at this node only, or go on where their
kernel has outlived the process that served them.  They are cut off when the partner takes over as
planned, or when this node is demoted, once what they had asked for is answered.  If a takeover of
the partner comes to nothing they are let in again where they were; not by a node that stops, which
ends its link, too.

One thing after the other: whoever lets hosts in waits until those of before have been sent away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from bitmapd.attach.mode import Door, EndEras
from bitmapd.errors import BitmapdError, UnreachableError


class VolumeHosts:
    """`partner.handover.Hosts`.  `on_change(are_served)` is called after every change."""

    def __init__(
        self,
        door: Door,
        loop: asyncio.AbstractEventLoop,
        on_change: Callable[[bool], None],
        end_eras: EndEras,
        is_stopping: Callable[[], bool],
        *,
        are_served: bool,
    ) -> None:
        self._is_stopping = is_stopping
        self._door = door
        self._loop = loop
        self._on_change = on_change
        self._end_eras = end_eras
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._taken_from = False  # they were served, and `stop` has ended that
        self.are_served = are_served
        on_change(are_served)

    async def admit(self) -> None:
        """Let them in.  A BitmapdError if it cannot be listened for them."""
        async with self._turn:
            await self._admit()
            self._taken_from = False

    async def _admit(self) -> None:
        if not self.are_served and not self._is_stopping():
            await self._door.admit()
            self._become(True)

    async def dismiss(self, *, force: bool) -> None:
        """Send them away, once they are answered.  BusyError if some are connected, without
        `force`."""
        async with self._turn:
            self._taken_from = False
            if self.are_served:
                await self._end(force=force)

    async def follow_size(self) -> None:
        """Have them see the size of the volume.  UnreachableError if they go on with the old."""
        async with self._turn:
            if self.are_served:
                await self._door.follow_size(self._end_eras)

    def begin_to_follow_size(self, failed: Callable[[BitmapdError], None]) -> None:
        async def follow() -> None:
            try:
                await self.follow_size()
            except UnreachableError as error:
                failed(error)

        self._begin(follow())

    # -- a takeover of the partner --------------------------------------------------------------
    def stop(self, force: bool, done: Callable[[str | None], None]) -> None:
        self._begin(self._stop(force, done))

    async def _stop(self, force: bool, done: Callable[[str | None], None]) -> None:
        async with self._turn:
            if self.are_served:
                try:
                    await self._end(force=force)
                except BitmapdError as error:
                    done(f"{error.message} at the partner")
                    return
                self._taken_from = True
        done(None)

    def go_on(self) -> None:
        self._begin(self._go_on())

    async def _go_on(self) -> None:
        async with self._turn:
            taken_from, self._taken_from = self._taken_from, False
            if taken_from:
                await self._admit()

    # -- a split brain --------------------------------------------------------------------------
    def cut_off(self) -> None:
        """Whoever writes past the gate cannot be made to wait."""
        if self.are_served and not self._turn.locked():
            self._begin(self._cut_off())

    async def _cut_off(self) -> None:
        async with self._turn:
            if self.are_served:
                await self._door.cut_off()
                self._become(False)

    # -- all ------------------------------------------------------------------------------------
    async def _end(self, *, force: bool) -> None:
        await self._door.dismiss(self._end_eras, force=force)
        self._become(False)

    def _become(self, are_served: bool) -> None:
        self.are_served = are_served
        self._on_change(are_served)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            what = {"message": "hosts cannot be served", "exception": error}
            self._loop.call_exception_handler(what)
