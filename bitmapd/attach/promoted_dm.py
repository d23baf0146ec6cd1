"""Hosts reach one of two appliances through device-mapper, as long as it is promoted (edge).

Gate and copier work on the primary, promoted or not (`dm_mode`).  The kernel's layers are made when
hosts are let in, and taken down before they may be served elsewhere.

1. Layers that are found alive stay: an earlier process has died, hosts go on writing what is direct
   (`direct`), and what they ask of the gate waits until this process may serve.  Any other rest of
   a stack is removed; a device that hosts have open answers with errors from then on, until they
   close it.  It is not given back to them: what they hold in memory may be out of date.
2. While the layers exist device-mapper has the primary exclusively, and this process does without.
3. What is open when they go counts as written, whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from bitmapd.attach.dm_mode import (
    Mark,
    attachment,
    close_direct,
    direct_extents,
    direct_path,
    direct_status,
    exchange,
    of_layers,
    present_geometry,
    serve_kernel,
    settle,
)
from bitmapd.attach.kernel import KernelAttachment
from bitmapd.attach.mode import DRAIN_TIMEOUT_S, Emit, EndEras, Undo, make_server
from bitmapd.config import VolumeConfig
from bitmapd.errors import BitmapdError, BusyError
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.gate import Gate
from bitmapd.gate.promoted import PromotedPath
from bitmapd.gate.routes import Run
from bitmapd.media.aio import AioEngine
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import completion
from bitmapd.nbd.server.export import NbdServer
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record


class PromotedDm:
    """See the module docstring; a `Mode` and its `Door`."""

    server: NbdServer

    def __init__(
        self,
        config: VolumeConfig,
        loop: asyncio.AbstractEventLoop,
        emit: Emit,
        on_barrier: Callable[[], None],
    ) -> None:
        """`on_barrier` is called after every barrier, once the gate knows what it brought."""
        self._config = config
        self._loop = loop
        self._emit = emit
        self._on_barrier = on_barrier
        self._kernel: KernelAttachment | None = None  # with layers
        self._gate: Gate | None = None  # from `begin` on
        self.path = PromotedPath()
        self.adopted = False
        self.direct: list[Run] = []  # extents that the layers which were found have direct

    @property
    def elsewhere(self) -> tuple[PromotedPath]:
        return (self.path,)

    @property
    def exclusive(self) -> bool:
        return not self.adopted

    # -- start --------------------------------------------------------------------------------
    async def prepare(self, geometry: Geometry, opened: Undo) -> None:
        self._geometry = geometry
        self._kernel = kernel = self._attachment(geometry)
        opened.append(self._let_go)
        segments = await kernel.look(owns=True)
        if segments is None:
            await kernel.sever()
            self._let_go()
        else:
            found = of_layers(geometry, segments)
            if found != geometry:
                kernel.close()
                self._kernel = kernel = self._attachment(found)
            await kernel.prepare()
            self.adopted = True
            self.direct = direct_extents(found, segments)
            self._begin_path(kernel, found).routes.adopt(self.direct)

    def _attachment(self, geometry: Geometry) -> KernelAttachment:
        return attachment(self._loop, self._config, geometry, self._emit)

    def _begin_path(self, kernel: KernelAttachment, geometry: Geometry) -> DirectPath:
        path = direct_path(kernel, geometry, self._emit, self._on_barrier)
        self.path.begin(path)
        return path

    def _let_go(self) -> None:
        """Of the helpers; the layers stay as they are."""
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            kernel.close()

    async def begin(
        self,
        engine: AioEngine,
        gate: Gate,
        store: Record,
        may_spin: Callable[[], bool],
        opened: Undo,
        primary: KernelDevice,
    ) -> None:
        self.server = make_server(
            self._config, self._loop, engine, gate, self._emit, tls=None, may_spin=may_spin
        )
        self._gate = gate
        self._primary = primary
        self._covers = store.covers
        self._mark: Mark = lambda *blocks: completion(partial(gate.mark, *blocks))

    @property
    def _present_geometry(self) -> Geometry:
        """The volume may have grown since `prepare`."""
        gate, first = self._gate, self._geometry
        return first if gate is None else present_geometry(first, gate)

    # -- hosts come and go --------------------------------------------------------------------
    async def admit(self) -> None:
        if self._kernel is None:
            await self._primary.lend()
            geometry = self._present_geometry
            self._kernel = kernel = self._attachment(geometry)
            try:
                await kernel.close_hosts()  # whoever has it open since they were cut off keeps it
                await kernel.prepare()
                await self._serve(kernel, self._begin_path(kernel, geometry))
            except BaseException:
                await self._remove(kernel.sever)
                await self._is_down()
                raise
        elif self.path.path is not None:
            await self._serve(self._kernel, self.path.path)

    async def _serve(self, kernel: KernelAttachment, path: DirectPath) -> None:
        await serve_kernel(kernel, path, self.server, covers=self._covers, mark=self._mark)

    async def dismiss(self, end_eras: EndEras, *, force: bool) -> None:
        if self._kernel is None:
            return
        try:
            await self._kernel.close_hosts()
        except BusyError:
            if not force:
                raise
            await self.cut_off()
        else:
            await self.last_writes(end_eras)
            await self._remove(self._kernel.detach)
            await self._is_down()

    async def cut_off(self) -> None:
        if self._kernel is not None:
            await self._kernel.sever()
            await self._is_down()

    async def _remove(self, remove: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What is left of layers that no host can write."""
        try:
            await remove()
        except BitmapdError as error:
            self._emit("detach-error", message=error.message)

    async def _is_down(self) -> None:
        """No host can write any more: the gate is to know what was written."""
        self._let_go()
        unknown = self.path.end()
        if self._gate is None:
            return
        geometry = self._present_geometry
        blocks = (geometry.extent_blocks(*run) for run in unknown)
        self._gate.take_over(blocks, ())
        await self.server.drain(DRAIN_TIMEOUT_S)
        try:
            await self._primary.take_back()
        except BitmapdError as error:
            self._emit("detach-error", message=error.message)

    # -- a larger size ------------------------------------------------------------------------
    async def follow_size(self, end_eras: EndEras) -> None:
        path, before = self.path.path, self._kernel
        if path is None or before is None or self._gate is None:
            return
        geometry = present_geometry(path.geometry, self._gate)
        if path.geometry == geometry:
            return

        async def unless_held_up(enough: Callable[[], bool]) -> None:
            await end_eras(lambda: enough() or self.path.is_held_up())

        await close_direct(path, unless_held_up, self._config.name)
        self._kernel = kernel = self._attachment(geometry)
        await exchange(path, before, kernel, geometry, self.server, self._serve)

    # -- stop ---------------------------------------------------------------------------------
    async def undo(self) -> None:
        """Layers that were found alive stay, and others are made by `admit` only."""
        self._let_go()

    async def close_hosts(self) -> None:
        if self._kernel is not None:
            await self._kernel.close_hosts()

    async def last_writes(self, end_eras: EndEras) -> None:
        if self.path.path is not None:
            await settle(self.path.path, end_eras)

    async def detach(self) -> None:
        if self._kernel is not None:
            await self._remove(self._kernel.detach)
            self._let_go()
        if self._gate is not None:
            await self.server.drain(DRAIN_TIMEOUT_S)

    def figures(self, gate: Gate) -> dict[str, Any]:
        return {} if self.path.path is None else direct_status(self.path.path, gate)
