"""The seam between one connection and the server it belongs to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from bitmapd.media.base import Export
from bitmapd.media.lost import LostWrites
from bitmapd.nbd.numbers import Cmd
from bitmapd.nbd.server.tls_worker import TlsWorker

ConnectionT_contra = TypeVar("ConnectionT_contra", contravariant=True)


@dataclass(slots=True)
class ServerStats:
    """Counters since the start; `connections` is the number of open ones."""

    connections: int = 0
    connections_total: int = 0
    refused_total: int = 0
    requests: list[int] = field(default_factory=lambda: [0] * len(Cmd))
    read_bytes: int = 0
    written_bytes: int = 0
    errors: int = 0

    def by_command(self) -> dict[str, int]:
        return {command.name.lower(): self.requests[command] for command in Cmd}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Times in seconds."""

    in_flight: int = 256
    handshake_timeout_s: float = 30.0
    message_timeout_s: float = 30.0
    # Without any progress, for a client that is in another one's way.
    contended_timeout_s: float = 10.0


class Hub(Protocol[ConnectionT_contra]):
    """What a connection needs of the server it belongs to."""

    loop: asyncio.AbstractEventLoop
    export: Export
    limits: ConnectionLimits
    stats: ServerStats
    lost_writes: LostWrites

    def readable(self, connection: ConnectionT_contra) -> None: ...

    def writable(self, connection: ConnectionT_contra) -> None: ...

    def tls_worker(self) -> TlsWorker: ...

    def mark(self, connection: ConnectionT_contra) -> None:
        """Have `flush` called at the end of the batch."""

    def take(self, connection: ConnectionT_contra, length_bytes: int) -> memoryview | None:
        """A buffer, or None and a `resume` when it is this connection's turn."""

    def give(self, buffer: memoryview) -> None: ...

    def others_wait(self, connection: ConnectionT_contra) -> bool:
        """Whether this connection, if it makes no progress, is in another one's way."""

    def wants_in(self, connection: ConnectionT_contra) -> None:
        """Have `enter` called once no request of a dead connection is under way."""

    def closed(self, connection: ConnectionT_contra, reason: str | None) -> None: ...

    def refused(self, connection: ConnectionT_contra, reason: str) -> None: ...

    def orphan_finished(self, connection: ConnectionT_contra) -> None: ...
