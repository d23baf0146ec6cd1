"""Hosts reach a volume through device-mapper, and write past the gate what is recorded (edge).

Hosts can write from `admit` on.  What they can write directly is in the record by then: if the
layers were found alive, with a table of an earlier process, whatever is direct in it.  The order of
the steps is in `attach/mode.py`.

1. Gate and copier work on the primary itself.  The gate marks what passes it, and a barrier waits
   for that, too, since it suspends the layer above the gate: the era device would mark it a second
   time, commit that, and cut its discards into pieces of one block.
2. The layers may be smaller than the volume, which takes a larger size up before hosts see it.
   Then every write passes the gate until nothing that did not is unknown, and hosts' writes wait in
   the kernel while it gets a new era device and longer tables (`exchange`).  If this process dies
   or fails meanwhile, they wait for the next one, which serves the layers as it finds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from bitmapd.attach.kernel import SECTOR_BYTES, KernelAttachment
from bitmapd.attach.mode import DRAIN_TIMEOUT_S, Emit, EndEras, Undo, make_server
from bitmapd.config import VolumeConfig
from bitmapd.errors import BitmapdError, UnreachableError
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.gate import Gate
from bitmapd.gate.routes import DIRECT, Routes, Run, Segment
from bitmapd.media.aio import AioEngine
from bitmapd.media.identity import identify
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import completion
from bitmapd.nbd.server.export import NbdServer
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record

LEAVE_TIMEOUT_S = 60.0  # for the requests that are under way when a volume grows
LAST_BARRIERS = 5  # attempts to learn what hosts wrote last

Covers = Callable[[int, int], bool]  # whether the record has all of extents [first, stop)
Mark = Callable[[int, int], Awaitable[None]]  # record and copy blocks [first, stop)


class DmMode:
    """Hosts have a block device; what is recorded they write past the gate."""

    exclusive = False  # device-mapper has claimed it already
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
        self._prepared = False
        self._admitted = self._closed = False

    @property
    def elsewhere(self) -> tuple[DirectPath]:
        return (self._direct,)

    @property
    def adopted(self) -> bool:
        return self._prepared and self._kernel.adopted

    async def prepare(self, geometry: Geometry, opened: Undo) -> None:
        self._kernel = kernel = self._attachment(geometry)
        opened.append(self._let_go)
        there = of_layers(geometry, await kernel.look(owns=False))
        if there != geometry:
            kernel.close()
            self._kernel = kernel = self._attachment(there)
        await kernel.prepare()
        self._prepared = True
        self._direct = direct_path(kernel, there, self._emit, self._on_barrier)

    def _let_go(self) -> None:
        """The layers stay as they are."""
        self._kernel.close()

    def _attachment(self, geometry: Geometry) -> KernelAttachment:
        return attachment(self._loop, self._config, geometry, self._emit)

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
        self._covers = store.covers
        self._mark: Mark = lambda *blocks: completion(partial(gate.mark, *blocks))

    async def _serve(self, kernel: KernelAttachment, path: DirectPath) -> None:
        await serve_kernel(kernel, path, self.server, covers=self._covers, mark=self._mark)

    async def admit(self) -> None:
        if not self._admitted:
            await self._serve(self._kernel, self._direct)
            self._admitted = True
        elif self._closed:
            # The helper carries this out behind a barrier that is under way.
            self._direct.routes.unseal()
            await self._kernel.attach()
            self._closed = False

    async def undo(self) -> None:
        if self._prepared and not self._kernel.adopted:
            # Nothing was written through it: leave the primary as it was found.
            with contextlib.suppress(BitmapdError):
                await self._kernel.detach()
            self._kernel.close()

    async def close_hosts(self) -> None:
        await self._kernel.close_hosts()
        self._closed = True

    async def last_writes(self, end_eras: EndEras) -> None:
        await settle(self._direct, end_eras)

    async def detach(self) -> None:
        try:
            await self._kernel.detach()
        except BitmapdError as error:
            self._emit("detach-error", message=error.message)
        await self.server.drain(DRAIN_TIMEOUT_S)
        self._kernel.close()

    def figures(self, gate: Gate) -> dict[str, Any]:
        return direct_status(self._direct, gate)

    async def follow_size(self, end_eras: EndEras) -> None:
        path, before = self._direct, self._kernel
        geometry = present_geometry(path.geometry, self._gate)
        if path.geometry == geometry:
            return
        await close_direct(path, end_eras, self._config.name)
        self._kernel = kernel = self._attachment(geometry)
        await exchange(path, before, kernel, geometry, self.server, self._serve)


def attachment(
    loop: asyncio.AbstractEventLoop, config: VolumeConfig, geometry: Geometry, emit: Emit
) -> KernelAttachment:
    logical = identify(config.primary).logical_block_bytes or SECTOR_BYTES
    return KernelAttachment(loop, config, geometry, logical, emit)


def direct_path(
    kernel: KernelAttachment, geometry: Geometry, emit: Emit, on_barrier: Callable[[], None]
) -> DirectPath:
    """From now on: everything recorded is copied anyway, so eras that have ended need not be
    collected."""
    path = DirectPath(
        geometry, kernel, Routes(), emit, since_era=kernel.current_era, mark_s=kernel.mark_s
    )
    path.on_ended = on_barrier
    return path


def direct_extents(geometry: Geometry, segments: Iterable[Segment]) -> list[Run]:
    """Of a table: where hosts write directly."""
    per = geometry.extent_bytes
    return [(first // per, -(-end // per)) for first, end, kind in segments if kind == DIRECT]


async def settle(path: DirectPath, end_eras: EndEras) -> None:
    """Learn what hosts wrote last, once they can write no more; what stays open stays in the
    record."""
    path.routes.seal()
    for _ in range(LAST_BARRIERS):
        if not path.routes.settling:
            return
        await _one_barrier(path, end_eras)


# -- a larger size --------------------------------------------------------------------------------
def of_layers(geometry: Geometry, segments: list[Segment] | None) -> Geometry:
    """Of layers that were found alive with these segments; of those to be made without."""
    size_bytes = segments[-1][1] if segments else geometry.size_bytes
    return dataclasses.replace(geometry, size_bytes=min(size_bytes, geometry.size_bytes))


def present_geometry(geometry: Geometry, gate: Gate) -> Geometry:
    """As large as the volume is now."""
    return dataclasses.replace(geometry, size_bytes=gate.size_bytes)


async def close_direct(path: DirectPath, end_eras: EndEras, name: str) -> None:
    """Have every write pass the gate, and learn of all that did not.  After UnreachableError
    everything is as it was."""
    path.is_closing = True
    path.routes.gate_all()
    for _ in range(LAST_BARRIERS):
        if path.is_still:
            return
        await _one_barrier(path, end_eras)
    if path.is_still:
        return
    path.is_closing = False
    path.routes.gate_all(wanted=False)
    raise UnreachableError(
        "the kernel's table cannot be changed: no barrier passes",
        hint=f"see 'barrier-error' in 'dmctl events {name}'",
    )


async def exchange(
    path: DirectPath,
    before: KernelAttachment,
    kernel: KernelAttachment,
    geometry: Geometry,
    server: NbdServer,
    serve: Callable[[KernelAttachment, DirectPath], Awaitable[None]],
) -> None:
    """The layers below a path for those of `kernel`, which have this geometry, after
    `close_direct`."""
    path.let_go()
    try:
        before.stay_disconnected()
        await server.drain(LEAVE_TIMEOUT_S)
        before.close()
        await kernel.prepare()
        path.go_on(geometry, kernel, since_era=kernel.current_era, mark_s=kernel.mark_s)
        await serve(kernel, path)
    except Exception as error:
        # Hosts' writes wait: this process must not live on without serving them.
        what = {"message": "hosts cannot be served", "exception": error}
        server.loop.call_exception_handler(what)
        raise


async def _one_barrier(path: DirectPath, end_eras: EndEras) -> None:
    tried = path.tried
    await end_eras(lambda: path.tried > tried)


async def serve_kernel(
    kernel: KernelAttachment, direct: DirectPath, server: NbdServer, *, covers: Covers, mark: Mark
) -> None:
    geometry = direct.geometry
    await kernel.connect(server)
    in_force = direct_extents(geometry, await kernel.attach())
    if not in_force:
        return
    direct.routes.adopt(in_force)
    missing = [run for run in in_force if not covers(*run)]
    if missing:
        kernel.emit(
            "record-damaged",
            message="hosts write directly to extents that the record does not name; added",
        )
    for run in missing:
        await mark(*geometry.extent_blocks(*run))


def direct_status(direct: DirectPath, gate: Gate) -> dict[str, Any]:
    """What hosts did, whatever way it took, and what following the record in the table costs."""
    hosts, routes = direct.host_counters, direct.routes
    writes = hosts.writes + hosts.discards
    return {
        "writes_total": writes,
        "hits_total": max(0, writes - gate.misses),
        "written_bytes_total": hosts.written_bytes,
        "direct_extents": routes.count_direct,
        "gate_writes_total": gate.writes,
        "barriers_total": direct.barriers,
        "barriers_skipped_total": direct.skipped,
        "barrier_errors_total": direct.failures,
        "barriers_put_off_total": direct.put_off,
        "suspended_seconds_total": round(direct.window_s_total, 6),
        "suspended_seconds_max": round(direct.window_s_max, 6),
        "table_loads_total": routes.loads,
        "table_moves_total": routes.moved,
    }
