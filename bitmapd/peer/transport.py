"""How two nodes reach one another: who listens, who dials, who may come in.

| address | who may come in |
| --- | --- |
| `tls://HOST:PORT` | whose certificate our CA has signed, carries the partner's name, and is the pinned one if one is; TLS 1.3, both ways |
| `unix:///PATH` | the same user, or root: by the credentials of the socket, both ways |

1. A connection that has not authenticated itself and said its first frame is *arriving*: at most
   four are, for 5 s each.  When a fifth comes the oldest has to go: those that say nothing do not
   keep out the one that does.
2. One connection is accepted in a turn of the loop, so that hosts have the rest of it.
3. A second connection of the other is handed to the owner like the first: who comes in is the
   partner, and only the owner knows which of two is alive.
4. It is dialled only while there is no connection, and later and later (`backoff`); or sought, which
   ends with the first connection.

A crash leaves the file of a unix socket, which the next process replaces.
"""  # noqa: E501

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bitmapd.errors import UsageError, refused
from bitmapd.net.sockets import UnixListener, listen_tcp, listen_unix, peer_credentials
from bitmapd.net.tls import certificate_fault, node_context
from bitmapd.net.uri import PartnerUri
from bitmapd.peer.backoff import Backoff
from bitmapd.peer.connection import FAREWELL_S, Connection, Owner
from bitmapd.peer.link import TIMEOUT_S

MOST_ARRIVING: Final = 4
ARRIVAL_S: Final = 5.0
CONNECT_S: Final = 2.0
TLS_S: Final = 5.0
SEEK_S: Final = 5.0
_ACCEPT_PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """`dial`: only one of two nodes does.  `seek`: the other one does so now and then until it has
    met somebody, for two that both wait to be dialled would never find out.  `name`: of the other,
    in its certificate; needed with TLS, as is the folder of `certificates`.  `fingerprint`: SHA-256
    of the certificate, or None."""

    dial: PartnerUri | None
    listen: PartnerUri | None
    name: str | None = None
    certificates: Path | None = None
    fingerprint: str | None = None
    timeout_s: float = TIMEOUT_S
    seek: PartnerUri | None = None
    seek_s: float = SEEK_S


@dataclass(frozen=True, slots=True)
class _Arrival:
    task: asyncio.Task[None]
    timer: asyncio.TimerHandle


class PeerTransport:
    """See the module docstring.  `start` raises a BitmapdError that says what is wrong."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        owner: Owner,
        soon: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """`soon` calls back when what is sent is to leave; else the loop does, in its next turn."""
        self.listening: tuple[str, int] | None = None  # where over TCP
        self._loop = loop
        self._settings = settings
        self._owner = owner
        self._soon = soon or loop.call_soon
        self._arriving: dict[Connection, _Arrival] = {}  # oldest first
        self._established: set[Connection] = set()
        self._backoff = Backoff(random.random)
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._has_met = False
        self._dialling: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._unix: UnixListener | None = None
        self._contexts: dict[bool, ssl.SSLContext] = {}

    def start(self) -> None:
        settings = self._settings
        dialled = settings.dial or settings.seek
        for uri, accepts in ((settings.listen, True), (dialled, False)):
            if uri is None or uri.socket_path is not None:
                continue
            if settings.certificates is None or settings.name is None:
                raise UsageError(
                    f"{uri} needs certificates and the partner's name",
                    hint="set partner_certificates and partner_name",
                )
            self._contexts[accepts] = node_context(settings.certificates, accepts=accepts)
        if settings.listen is not None:
            self._listen(settings.listen)
        self.dial(True)

    def dial(self, on: bool) -> None:
        """Whether the other is to be dialled while it is not there; at first it is."""
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None
        if on and self._settings.dial is not None:
            self._dialling = self._loop.create_task(self._dial(self._settings.dial))
        elif on and self._settings.seek is not None:
            self._dialling = self._loop.create_task(self._seek(self._settings.seek))

    def close(self) -> None:
        """Nobody comes in any more; connections that the owner has are its own to close."""
        self.dial(False)
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            if self._unix is not None:
                self._unix.unlink()
            self._listener.close()
            self._listener = None
        for connection in list(self._arriving):
            self._drop(connection, "the node stops")

    # -- what connections say -------------------------------------------------------------------
    def vet(self, transport: asyncio.Transport) -> str | None:
        connection: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if connection is None:
            return None  # its credentials were checked before
        settings = self._settings
        return certificate_fault(connection, settings.name or "", settings.fingerprint)

    def established(self, connection: Connection) -> None:
        self._forget_arrival(connection)
        self._established.add(connection)
        self._nobody.clear()
        self._has_met = True

    def ended(self, connection: Connection, reason: str) -> None:
        if connection.link.is_greeted:
            self._backoff.succeeded()
        if connection.failed:
            self._backoff.erred(self._loop.time())
        if connection in self._established:
            self._established.remove(connection)
            if not self._established:
                self._nobody.set()
        else:
            self._forget_arrival(connection)
            self._owner.failed(reason)

    # -- dialling -------------------------------------------------------------------------------
    async def _dial(self, uri: PartnerUri) -> None:
        while True:
            await self._nobody.wait()
            try:
                await self._connect(uri)
            except (OSError, UnicodeError) as error:
                self._owner.failed(f"cannot reach {uri}: {_reason(error)}")
            await self._nobody.wait()
            await asyncio.sleep(self._backoff.next_s(self._loop.time()))

    async def _seek(self, uri: PartnerUri) -> None:
        """Nobody is missed: who cannot be reached is reported to nobody."""
        while True:
            await asyncio.sleep(self._settings.seek_s)
            if self._has_met:  # perhaps to part again, while this slept
                return
            with contextlib.suppress(OSError, UnicodeError):
                await self._connect(uri)

    async def _connect(self, uri: PartnerUri) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await self._connected_socket(uri)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"no answer within {CONNECT_S:g} s") from None
        try:
            fault = self._tune(sock)
            if fault is not None:
                raise PermissionError(errno.EPERM, fault)
            connection = self._connection(str(uri), dialled=True)
            tls: dict[str, Any] = {}
            if uri.socket_path is None:
                tls = {"ssl": self._contexts[False], "server_hostname": self._settings.name}
                tls |= {"ssl_handshake_timeout": TLS_S, "ssl_shutdown_timeout": FAREWELL_S}
            await self._loop.create_connection(lambda: connection, sock=sock, **tls)
        except BaseException:
            sock.close()
            raise

    async def _connected_socket(self, uri: PartnerUri) -> socket.socket:
        if uri.socket_path is not None:
            return await self._try(socket.AF_UNIX, uri.socket_path)
        found = await self._loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        for number, (family, _, _, _, address) in enumerate(found, 1):
            try:
                return await self._try(family, address)
            except OSError:
                if number == len(found):
                    raise
        raise OSError(errno.EHOSTUNREACH, "it has no address")

    async def _try(self, family: int, address: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await self._loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock

    def _connection(self, peer: str, *, dialled: bool) -> Connection:
        timeout_s = self._settings.timeout_s
        return Connection(
            self._loop, self._owner, self, peer, timeout_s, self._soon, dialled=dialled
        )

    def _tune(self, sock: socket.socket) -> str | None:
        """Why the other end of a unix socket may not be there, None if it may."""
        if sock.family == socket.AF_UNIX:
            pid, uid = peer_credentials(sock)
            if uid in (0, os.geteuid()):
                return None
            return f"process {pid} is of user {uid}, and only user {os.geteuid()} or root may be"
        timeout_ms = max(1, round(self._settings.timeout_s * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        return None

    # -- accepting ------------------------------------------------------------------------------
    def _listen(self, uri: PartnerUri) -> None:
        if uri.socket_path is not None:
            self._unix = listen_unix(Path(uri.socket_path))
            self._listener = self._unix.sock
        else:
            try:
                family, _, _, _, address = socket.getaddrinfo(
                    uri.host, uri.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )[0]
                self._listener = listen_tcp(family, address)
            except OSError as error:
                raise refused(
                    error, f"cannot listen on {uri}", hint="check partner_listen"
                ) from error
            self.listening = self._listener.getsockname()[:2]
        self._loop.add_reader(self._listener.fileno(), self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the backlog stays readable, so look away a while.
            self._owner.failed(f"cannot accept a connection: {error.strerror}")
            self._loop.remove_reader(listener.fileno())
            self._loop.call_later(_ACCEPT_PAUSE_S, self._accept_again, listener)
            return
        sock.setblocking(False)
        is_unix = sock.family == socket.AF_UNIX
        peer = "a process on this host" if is_unix else f"{address[0]} port {address[1]}"
        try:
            fault = self._tune(sock)
        except OSError as error:  # it has gone already
            fault = error.strerror
        if fault is not None:
            sock.close()
            self._owner.failed(f"{peer} is refused: {fault}")
            return
        if len(self._arriving) >= MOST_ARRIVING:
            self._drop(next(iter(self._arriving)), "it said nothing, and others wait")
        connection = self._connection(peer, dialled=False)
        silent = f"it said nothing for {ARRIVAL_S:g} s"
        self._arriving[connection] = _Arrival(
            self._loop.create_task(self._arrive(connection, sock, is_unix)),
            self._loop.call_later(ARRIVAL_S, self._drop, connection, silent),
        )

    def _accept_again(self, listener: socket.socket) -> None:
        if listener is self._listener:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def _arrive(self, connection: Connection, sock: socket.socket, is_unix: bool) -> None:
        tls: dict[str, Any] = {}
        if not is_unix:
            tls = {"ssl": self._contexts[True]}
            tls |= {"ssl_handshake_timeout": TLS_S, "ssl_shutdown_timeout": FAREWELL_S}
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock, **tls)
        except OSError as error:
            sock.close()
            if connection in self._arriving:
                self.ended(connection, f"{connection.peer} is refused: {_reason(error)}")

    def _drop(self, connection: Connection, why: str) -> None:
        arrival = self._forget_arrival(connection)
        if arrival is not None:
            arrival.task.cancel()
            self._owner.failed(f"{connection.peer} is refused: {why}")
            connection.discard()

    def _forget_arrival(self, connection: Connection) -> _Arrival | None:
        arrival = self._arriving.pop(connection, None)
        if arrival is not None:
            arrival.timer.cancel()
        return arrival


def _reason(error: OSError | UnicodeError) -> str:
    """OpenSSL's reason is a word; a system call's error has a text."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
