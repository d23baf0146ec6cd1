"""Hosts reach a volume over NBD: its export, and where that listens (edge).

The order of the steps is in `attach/mode.py`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitmapd.attach.mode import DRAIN_TIMEOUT_S, Emit, EndEras, Undo, make_server, refuse_connected
from bitmapd.config import VolumeConfig
from bitmapd.errors import UsageError
from bitmapd.gate.gate import Gate
from bitmapd.media.aio import AioEngine
from bitmapd.media.kdevice import KernelDevice
from bitmapd.nbd.server.export import NbdServer
from bitmapd.net.tls import server_context
from bitmapd.net.uri import parse_uri
from bitmapd.record.geometry import Geometry
from bitmapd.record.holder import Record


class NbdMode:
    """Hosts connect to a socket; every write passes the gate."""

    elsewhere = ()
    exclusive = True
    adopted = False
    direct = ()
    server: NbdServer
    _tls: ssl.SSLContext | None

    def __init__(self, config: VolumeConfig, loop: asyncio.AbstractEventLoop, emit: Emit) -> None:
        self._config = config
        self._loop = loop
        self._emit = emit

    async def prepare(self, geometry: Geometry, opened: Undo) -> None:
        """There is nothing between the server and the primary."""

    async def begin(
        self,
        engine: AioEngine,
        gate: Gate,
        store: Record,
        may_spin: Callable[[], bool],
        opened: Undo,
        primary: KernelDevice,
    ) -> None:
        self._tls = _tls_context(self._config)
        self.server = make_server(
            self._config, self._loop, engine, gate, self._emit, tls=self._tls, may_spin=may_spin
        )
        opened.append(self.server.close_listeners)

    async def admit(self) -> None:
        _listen(self.server, self._config, self._tls)

    async def dismiss(self, end_eras: EndEras, *, force: bool) -> None:
        if not force:
            refuse_connected(self.server)
        await self.cut_off()

    async def cut_off(self) -> None:
        await self.server.drain(DRAIN_TIMEOUT_S)

    async def follow_size(self, end_eras: EndEras) -> None:
        """A server tells its size when a connection begins."""

    async def undo(self) -> None:
        """The listeners are closed already."""

    async def close_hosts(self) -> None:
        """A host that is connected may be cut off."""

    async def last_writes(self, end_eras: EndEras) -> None:
        self.server.close_listeners()
        await self.server.drain(DRAIN_TIMEOUT_S)

    async def detach(self) -> None:
        """Nothing is attached."""

    def figures(self, gate: Gate) -> dict[str, Any]:
        return {}


def _tls_context(config: VolumeConfig) -> ssl.SSLContext | None:
    """What `_listen` asks for; None for a plain export."""
    uri = parse_uri(config.listen)
    if not uri.tls:
        return None
    folder = uri.tls_certificates or config.tls_certificates
    if folder is None:
        raise UsageError(
            f"listen = {config.listen} asks for TLS, but there are no certificates",
            hint="set tls_certificates to their folder",
        )
    return server_context(Path(folder))


def _listen(server: NbdServer, config: VolumeConfig, context: ssl.SSLContext | None) -> None:
    """Begin to listen; UsageError for what would be open to others."""
    uri = parse_uri(config.listen)
    if uri.socket_path is not None:
        server.listen_unix(Path(uri.socket_path), tls=uri.tls)
    elif context is None and not config.allow_plaintext_loopback:
        raise UsageError(
            f"listen = {config.listen} would export the volume without encryption",
            hint="use nbds:// with certificates, or a unix socket, or a loopback address with"
            " allow_plaintext_loopback = true",
        )
    else:
        server.listen_tcp(uri.host or "127.0.0.1", uri.port)
