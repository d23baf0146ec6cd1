"""The two modes of `attach`: hosts reach a volume over NBD, or through device-mapper (edge).

`Mode` has the steps in the order in which a volume takes them; it does not ask which mode it has.
In both, an NBD server in front of the gate answers what hosts ask of it.

                nbd                                  dm
    prepare     -                                    era device on the primary, made or found alive
    begin       server made                          server made
    admit       listen                               kernel connected to the server; tables
    (again)     listen                               device given to hosts, if it was taken
    close_hosts -                                    device taken from hosts; refused while in use
    last_writes what was received is answered        barriers bring what was written directly
    detach      -                                    layers removed

One of two appliances lets hosts in and sends them away again as often as it is told to (`Door`).

1. Hosts write nothing before `admit`, unless the layers were found alive (`adopted`).
2. After `last_writes` no host can write, and the gate knows of every write; what the kernel could
   not be asked about is open and therefore stays in the record.
3. `undo` ends a start that failed at any step, and leaves alone what was found alive.

A crash ends the connections of nbd mode.  In dm mode the layers stay, and what needs the gate waits
for the next `prepare`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from bitmapd.config import VolumeConfig
from bitmapd.errors import BusyError
from bitmapd.gate.elsewhere import Elsewhere
from bitmapd.gate.gate import Gate
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import BufferPool
from bitmapd.media.kdevice import KernelDevice
from bitmapd.nbd.server.export import NbdServer
from bitmapd.net.uri import parse_uri
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record

HOST_POOL_BYTES = 32 << 20
DRAIN_TIMEOUT_S = 5.0

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
    def elsewhere(self) -> tuple[Elsewhere, ...]:
        """How hosts write past the gate, if they can; from `prepare` on."""

    @property
    def exclusive(self) -> bool:
        """Whether device-mapper has not claimed the primary; from `prepare` on."""

    @property
    def adopted(self) -> bool:
        """Whether the kernel served hosts before this start, and does whatever becomes of it."""

    async def prepare(self, geometry: Geometry, opened: Undo) -> None: ...

    async def begin(
        self,
        engine: AioEngine,
        gate: Gate,
        store: Record,
        may_spin: Callable[[], bool],
        opened: Undo,
        primary: KernelDevice,
    ) -> None:
        """Make the server; nobody is let in yet."""

    async def admit(self) -> None:
        """Let hosts in; also once more after `close_hosts`, whatever became of that, and in nbd
        mode after the server was drained."""

    async def undo(self) -> None:
        """After what `opened` names was called."""

    async def close_hosts(self) -> None:
        """BusyError while a host has the volume open; nothing has changed then."""

    async def last_writes(self, end_eras: EndEras) -> None: ...

    async def detach(self) -> None: ...

    async def follow_size(self, end_eras: EndEras) -> None:
        """Have hosts see the size that the gate has, if that has grown since they were let in.
        After UnreachableError they go on with the size that they have."""

    def figures(self, gate: Gate) -> dict[str, Any]:
        """Of the status, in place of the gate's own."""


class Door(Protocol):
    """The mode of one of two appliances, from `Mode.begin` on."""

    @property
    def direct(self) -> Sequence[tuple[int, int]]:
        """Runs of extents that hosts' kernel went on writing before this process began."""

    async def admit(self) -> None: ...

    async def dismiss(self, end_eras: EndEras, *, force: bool) -> None:
        """Send hosts away, until `admit`: what was received is answered, and the gate knows of
        every write.  BusyError if they are connected, or have the volume open, without `force`;
        nothing has changed then."""

    async def cut_off(self) -> None:
        """No host can write any more, whatever it has open."""

    async def follow_size(self, end_eras: EndEras) -> None:
        """As that of the `Mode`."""


def refuse_connected(server: NbdServer) -> None:
    """BusyError if hosts are."""
    if connected := server.stats.connections:
        raise BusyError(f"{connected} hosts are connected", hint="disconnect them, or give --force")


def make_server(
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
        busy_poll=config.busy_poll,
        lost_writes=gate.lost_writes,
    )
    engine.after_reap.append(server.flush_replies)
    return server
