"""Owners of connections between two nodes, for tests with real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

from bitmapd.net.uri import PartnerUri
from bitmapd.peer.connection import Connection
from bitmapd.peer.frames import Frame, Kind, Part
from bitmapd.peer.transport import PeerTransport, Settings

HELLO = Part(Kind.HELLO, 0, 0, b"hello")


class Node:
    """Greets, and remembers everything.  `greets`: whether it says HELLO."""

    def __init__(self, settings: Settings, greets: bool = True) -> None:
        self.transport = PeerTransport(asyncio.get_running_loop(), settings, self)
        self.connections: list[Connection] = []  # that are there
        self.got: list[Frame] = []
        self.losses: list[str] = []
        self.failures: list[str] = []
        self.pings = 0
        self.drains = 0
        self._greets = greets
        self._changed = asyncio.Event()

    # -- Owner ----------------------------------------------------------------------------------
    def connected(self, connection: Connection) -> None:
        self.connections.append(connection)
        if self._greets:
            connection.send([HELLO])
        self._changed.set()

    def frames(self, connection: Connection, frames: list[Frame]) -> None:
        if frames[0].kind == Kind.HELLO:
            connection.link.greeted()
        self.got += frames
        self._changed.set()

    def ping_due(self, connection: Connection) -> None:
        self.pings += 1
        connection.send([Part(Kind.PING, 0, 0, b"")])

    def drained(self, connection: Connection) -> None:
        self.drains += 1
        self._changed.set()

    def lost(self, connection: Connection, reason: str) -> None:
        self.connections.remove(connection)
        self.losses.append(reason)
        self._changed.set()

    def failed(self, reason: str) -> None:
        self.failures.append(reason)
        self._changed.set()

    # -- for tests ------------------------------------------------------------------------------
    async def until(self, there: Callable[[], object]) -> None:
        while not there():
            self._changed.clear()
            await self._changed.wait()

    async def greeted(self) -> Connection:
        await self.until(lambda: any(one.link.is_greeted for one in self.connections))
        return next(one for one in self.connections if one.link.is_greeted)

    @property
    def kinds(self) -> list[int]:
        return [frame.kind for frame in self.got]

    def close(self) -> None:
        self.transport.close()
        for connection in self.connections:
            connection.close()
        self.connections.clear()


def unix_pair(folder: Path, timeout_s: float = 2.0) -> tuple[Settings, Settings]:
    uri = PartnerUri(socket_path=str(folder / "peer"))
    return (
        Settings(dial=None, listen=uri, timeout_s=timeout_s),
        Settings(dial=uri, listen=None, timeout_s=timeout_s),
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
