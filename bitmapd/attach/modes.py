"""The two modes of `attach`: hosts reach a volume over NBD, or through device-mapper (edge).

`Mode` has the steps in the order in which a volume takes them; it does not ask which mode it has.
In both, an NBD server in front of the gate answers what hosts ask of it.

                nbd                                  dm
    prepare     -                                    era device on the primary, made or found alive
    begin       listen                               kernel connected to the server; tables
    close_hosts -                                    device taken from hosts; refused while in use
    last_writes what was received is answered        barriers bring what was written directly
    detach      -                                    layers removed

1. Hosts write nothing before `begin`, unless the layers were found alive (`adopted`).
2. After `last_writes` no host can write, and the gate knows of every write; what the kernel could
   not be asked about is open and therefore stays in the record.
3. `undo` ends a start that failed at any step, and leaves alone what was found alive.
4. dm only: `close_direct`, `hold_hosts` and `hand_over` leave the layers to the next `prepare`;
   what hosts write meanwhile waits in the kernel.

A crash ends the connections of nbd mode.  In dm mode the layers stay, and what needs the gate waits
for the next `prepare`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from bitmapd.attach.direct import DirectPath
from bitmapd.attach.kernel import SECTOR_BYTES, KernelAttachment
from bitmapd.attach.listen import listen, tls_context
from bitmapd.attach.routes import Routes
from bitmapd.attach.serve import direct_status, serve_kernel
from bitmapd.config import VolumeConfig
from bitmapd.errors import BitmapdError, UnreachableError
from bitmapd.gate.gate import Gate
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import BufferPool
from bitmapd.media.identity import identify
from bitmapd.media.waiting import completion
from bitmapd.nbd.server import NbdServer
from bitmapd.nbd.uri import parse_uri
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore

HOST_POOL_BYTES = 32 << 20
DRAIN_TIMEOUT_S = 5.0
LEAVE_TIMEOUT_S = 60.0  # for the requests that are under way when a volume grows
LAST_BARRIERS = 5  # attempts to learn what hosts wrote last

Emit = Callable[..., None]
Undo = list[Callable[[], None]]  # what to call, last first, if the start fails
# Have eras end until the condition holds.
EndEras = Callable[[Callable[[], bool]], Awaitable[None]]


class Mode(Protocol):
    """See the module docstring for the order of calls."""

    @property
    def server(self) -> NbdServer:
        """From `begin` on."""

    @property
    def direct(self) -> DirectPath | None:
        """How hosts write past the gate, if they can; from `prepare` on."""

    @property
    def exclusive(self) -> bool:
        """Whether nobody else has claimed the device that `prepare` names."""

    @property
    def adopted(self) -> bool:
        """Whether the kernel served hosts before this start, and does whatever becomes of it."""

    async def prepare(self, geometry: Geometry, opened: Undo) -> str:
        """The device that gate and copier are to work on."""

    async def begin(
        self,
        engine: AioEngine,
        gate: Gate,
        store: RecordStore,
        may_spin: Callable[[], bool],
        opened: Undo,
    ) -> None: ...

    async def undo(self) -> None:
        """After what `opened` names was called."""

    async def close_hosts(self) -> None:
        """BusyError while a host has the volume open; nothing has changed then."""

    async def last_writes(self, end_eras: EndEras) -> None: ...

    async def detach(self, release_device: Callable[[], None]) -> None:
        """`release_device` closes the one that `prepare` named, if that has to be now."""

    def figures(self, gate: Gate) -> dict[str, Any]:
        """Of the status, in place of the gate's own."""


def _make_server(
    config: VolumeConfig,
    loop: asyncio.AbstractEventLoop,
    engine: AioEngine,
    gate: Gate,
    emit: Emit,
    *,
    tls: ssl.SSLContext | None,
    may_spin: Callable[[], bool],
) -> NbdServer:
    server = NbdServer(
        loop,
        gate,
        BufferPool(loop, HOST_POOL_BYTES),
        engine.kick,
        export_name=parse_uri(config.listen).export,
        description=f"bitmapd volume {config.name}",
        tls=tls,
        emit=emit,
        cork=engine.cork,
        may_spin=may_spin,
    )
    engine.after_reap.append(server.flush_replies)
    return server


class NbdMode:
    """Hosts connect to a socket; every write passes the gate."""

    direct = None
    exclusive = True
    adopted = False
    server: NbdServer

    def __init__(self, config: VolumeConfig, loop: asyncio.AbstractEventLoop, emit: Emit) -> None:
        self._config = config
        self._loop = loop
        self._emit = emit

    async def prepare(self, geometry: Geometry, opened: Undo) -> str:
        return self._config.primary

    async def begin(
        self,
        engine: AioEngine,
        gate: Gate,
        store: RecordStore,
        may_spin: Callable[[], bool],
        opened: Undo,
    ) -> None:
        config = self._config
        tls = tls_context(config)
        self.server = _make_server(
            config, self._loop, engine, gate, self._emit, tls=tls, may_spin=may_spin
        )
        opened.append(self.server.close_listeners)
        listen(self.server, config, tls)

    async def undo(self) -> None:
        """The listeners are closed already."""

    async def close_hosts(self) -> None:
        """A host that is connected may be cut off."""

    async def last_writes(self, end_eras: EndEras) -> None:
        self.server.close_listeners()
        await self.server.drain(DRAIN_TIMEOUT_S)

    async def detach(self, release_device: Callable[[], None]) -> None:
        """Nothing is attached."""

    def figures(self, gate: Gate) -> dict[str, Any]:
        return {}


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

    @property
    def direct(self) -> DirectPath:
        return self._direct

    @property
    def adopted(self) -> bool:
        return self._prepared and self._kernel.adopted

    async def prepare(self, geometry: Geometry, opened: Undo) -> str:
        config = self._config
        logical = identify(config.primary).logical_block_bytes or SECTOR_BYTES
        kernel = KernelAttachment(self._loop, config, geometry, logical, self._emit)
        opened.append(kernel.close)
        await kernel.prepare()
        self._kernel = kernel
        self._prepared = True
        # Everything recorded is copied anyway, so eras that have ended need not be collected.
        since_era = kernel.current_era
        self._direct = DirectPath(geometry, kernel, Routes(), self._emit, since_era=since_era)
        self._direct.on_ended = self._on_barrier
        return kernel.era_device

    async def begin(
        self,
        engine: AioEngine,
        gate: Gate,
        store: RecordStore,
        may_spin: Callable[[], bool],
        opened: Undo,
    ) -> None:
        self.server = _make_server(
            self._config, self._loop, engine, gate, self._emit, tls=None, may_spin=may_spin
        )
        await serve_kernel(
            self._kernel,
            self._direct,
            self.server,
            covers=store.covers,
            mark=lambda *blocks: completion(partial(gate.mark, *blocks)),
        )

    async def undo(self) -> None:
        if self._prepared and not self._kernel.adopted:
            # Nothing was written through it: leave the primary as it was found.
            with contextlib.suppress(BitmapdError):
                await self._kernel.detach()
            self._kernel.close()

    async def close_hosts(self) -> None:
        await self._kernel.close_hosts()

    async def last_writes(self, end_eras: EndEras) -> None:
        routes = self._direct.routes
        routes.seal()
        for _ in range(LAST_BARRIERS):
            if not routes.settling:
                return
            await self._one_barrier(end_eras)
        # What stays open stays in the record.

    async def _one_barrier(self, end_eras: EndEras) -> None:
        direct = self._direct
        tried = direct.tried
        await end_eras(lambda: direct.tried > tried)

    async def detach(self, release_device: Callable[[], None]) -> None:
        release_device()
        try:
            await self._kernel.detach()
        except BitmapdError as error:
            self._emit("detach-error", message=error.message)
        await self.server.drain(DRAIN_TIMEOUT_S)
        self._kernel.close()

    def figures(self, gate: Gate) -> dict[str, Any]:
        return direct_status(self._direct, gate)

    # -- for another one to take over ---------------------------------------------------------
    async def close_direct(self, end_eras: EndEras) -> None:
        """Have every write pass the gate.  After UnreachableError everything is as it was."""
        routes = self._direct.routes
        routes.gate_all()
        for _ in range(LAST_BARRIERS):
            if routes.all_gated:
                return
            await self._one_barrier(end_eras)
        routes.gate_all(wanted=False)
        raise UnreachableError(
            "the kernel's table cannot be changed: no barrier passes",
            hint=f"see 'barrier-error' in 'dmctl events {self._config.name}'",
        )

    async def hold_hosts(self) -> None:
        """What was received is answered; what the kernel sends from now on waits in it."""
        self._kernel.stay_disconnected()
        await self.server.drain(LEAVE_TIMEOUT_S)

    def hand_over(self) -> None:
        """Let go of the layers as they are."""
        self._kernel.close()
