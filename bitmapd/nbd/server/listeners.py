"""Where the export listens, and how fast it accepts.

1. Nothing is offered over TCP without TLS unless the address is a loopback one.
2. A few connections are accepted in one turn of the loop.  When more are there, the listener rests
   for a multiple of the time that they took: accepting takes a fixed part of the thread at most,
   however many connect, and the requests of hosts have the rest.
3. A socket file that is in the way is removed only when nobody answers on it, and at the end only
   if it is ours.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmapd.errors import UsageError, refused
from bitmapd.nbd.server.places import Peer, origin_of_address
from bitmapd.net.sockets import UnixListener, listen_tcp, listen_unix, peer_credentials
from bitmapd.net.uri import MAX_SOCKET_PATH_BYTES

_BACKLOG = 128
_ACCEPTS = 4  # in one turn of the loop
_REST_FACTOR = 4  # of the time that they took
_ACCEPT_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Listener:
    sock: socket.socket
    tls: bool
    unix: UnixListener | None = None


class Listeners:
    """`accepted(sock, peer, tls)` gets each connection, `report` what kept one out."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        accepted: Callable[[socket.socket, Peer, bool], None],
        report: Callable[[Peer, str], None],
    ) -> None:
        self._loop = loop
        self._accepted = accepted
        self._report = report
        self._open: list[_Listener] = []

    def unix(self, path: Path, mode: int, *, tls: bool) -> None:
        """Raises a BitmapdError if the path cannot be used."""
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes",
                hint="choose a shorter --run-dir or socket path",
            )
        unix = listen_unix(path, mode, _BACKLOG)
        self._begin(_Listener(unix.sock, tls, unix))

    def tcp(self, host: str, port: int, *, tls: bool) -> list[tuple[str, int]]:
        """All addresses of the host; returns those and the ports.  Raises a BitmapdError."""
        try:
            found = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        if not tls:
            for _, address in addresses:
                if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
                    raise UsageError(
                        f"refusing to listen on {address[0]} without TLS",
                        hint="configure tls-certificates, or listen on a unix socket",
                    )
        opened: list[_Listener] = []
        try:
            for family, address in addresses:
                sock = listen_tcp(family, address, _BACKLOG, v6_only=True)
                opened.append(_Listener(sock, tls))
        except OSError as error:
            for listener in opened:
                listener.sock.close()
            raise refused(error, f"cannot listen on {host}:{port}") from error
        for listener in opened:
            self._begin(listener)
        return [listener.sock.getsockname()[:2] for listener in opened]

    def close(self) -> None:
        for listener in self._open:
            self._loop.remove_reader(listener.sock.fileno())
            if listener.unix is not None:
                listener.unix.unlink()
            listener.sock.close()
        self._open.clear()

    def _begin(self, listener: _Listener) -> None:
        self._open.append(listener)
        self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _accept(self, listener: _Listener) -> None:
        begun_s = self._loop.time()
        for _ in range(_ACCEPTS):
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                # Out of descriptors or memory: the backlog stays readable, so look away a while.
                nobody = Peer("listener", "listener")
                self._report(nobody, f"cannot accept a client: {error.strerror}")
                self._rest(listener, _ACCEPT_PAUSE_S)
                return
            try:
                peer = _peer(sock, address)
            except OSError:  # it has gone already
                sock.close()
                continue
            self._accepted(sock, peer, listener.tls)
        self._rest(listener, (self._loop.time() - begun_s) * _REST_FACTOR)

    def _rest(self, listener: _Listener, pause_s: float) -> None:
        self._loop.remove_reader(listener.sock.fileno())
        self._loop.call_later(pause_s, self._accept_again, listener)

    def _accept_again(self, listener: _Listener) -> None:
        if listener in self._open:
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)


def _peer(sock: socket.socket, address: Any) -> Peer:
    if sock.family == socket.AF_UNIX:
        pid, uid = peer_credentials(sock)
        return Peer(f"uid {uid}:pid {pid}", f"uid {uid}")
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return Peer(f"{host}:{address[1]}", origin_of_address(address[0]), is_remote=True)
