"""Connecting to an NBD server: name, socket, TLS, handshake (edge).

`connect` is a coroutine because it happens once for each connection; requests have no part in it.
A name is resolved here and never later, so nothing on the data path waits for a resolver.  The
addresses of a name are tried in turn; a certificate that is not accepted ends the attempt, as it
may mean that somebody else answers.  Every socket that is not returned is closed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from bitmapd.nbd.client.handshake import ClientHandshake, ClientState, ServerExport
from bitmapd.net.tls import client_context
from bitmapd.net.uri import NbdUri

# Of a unix socket, whose default holds back large writes by a third; TCP tunes itself.
SEND_BUFFER_BYTES = 1 << 20
HANDSHAKE_RECEIVE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """`hostname` None: the certificate has to be signed by the CA, whatever its name."""

    certificates: Path
    hostname: str | None


def tls_reason(error: ssl.SSLError) -> str:
    """What went wrong, without OpenSSL's file names and numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not accepted: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")


async def connect(
    loop: asyncio.AbstractEventLoop, uri: NbdUri, tls: TlsSettings | None, timeout_s: float
) -> tuple[socket.socket, ServerExport]:
    """A socket ready for requests.  Raises OSError, ProtocolError, BitmapdError (certificates)
    or TimeoutError; `timeout_s` is for each address that the name has."""
    # Bad certificates show before anything is said to anybody.
    context = None if tls is None else client_context(tls.certificates, tls.hostname)
    hostname = None if tls is None else tls.hostname
    error: OSError = OSError(errno.EHOSTUNREACH, "the name has no address")
    for family, address in await _addresses(loop, uri):
        try:
            async with asyncio.timeout(timeout_s):
                return await _connect_one(
                    loop, family, address, uri.export, context, hostname, timeout_s
                )
        except ssl.SSLError:
            raise
        except OSError as problem:  # also a time-out; the next address may do better
            error = problem
    raise error


async def _connect_one(
    loop: asyncio.AbstractEventLoop,
    family: socket.AddressFamily,
    address: object,
    export_name: str,
    context: ssl.SSLContext | None,
    hostname: str | None,
    timeout_s: float,
) -> tuple[socket.socket, ServerExport]:
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.setblocking(False)
        await _connect_socket(loop, connection, address)
        _tune(connection, timeout_s)
        return await _shake_hands(loop, connection, export_name, context, hostname)
    except BaseException:
        connection.close()
        raise


async def _addresses(
    loop: asyncio.AbstractEventLoop, uri: NbdUri
) -> list[tuple[socket.AddressFamily, object]]:
    if uri.socket_path is not None:
        return [(socket.AF_UNIX, uri.socket_path)]
    try:
        found = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(errno.EHOSTUNREACH, f"cannot resolve {uri.host}: {error.strerror}") from error
    except UnicodeError as error:
        raise OSError(errno.EHOSTUNREACH, f"{uri.host} is not a host name") from error
    return [(family, address) for family, _, _, _, address in found]


async def _connect_socket(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, address: object
) -> None:
    number = connection.connect_ex(address)  # type: ignore[arg-type]
    if number == errno.EINPROGRESS:
        await _ready(loop, connection, writing=True)
        number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


def _tune(connection: socket.socket, timeout_s: float) -> None:
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(timeout_s * 1000))
    )


async def _ready(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, *, writing: bool
) -> None:
    future = loop.create_future()

    def ready() -> None:
        if not future.done():
            future.set_result(None)

    add, remove = (
        (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    )
    add(connection.fileno(), ready)
    try:
        await future
    finally:
        remove(connection.fileno())


async def _shake_hands(
    loop: asyncio.AbstractEventLoop,
    connection: socket.socket,
    export_name: str,
    context: ssl.SSLContext | None,
    hostname: str | None,
) -> tuple[socket.socket, ServerExport]:
    handshake = ClientHandshake(export_name, context is not None)
    try:
        while handshake.export is None:
            await _send(loop, connection, handshake.data_to_send())
            if handshake.state is ClientState.TLS and context is not None:
                connection = await _start_tls(loop, connection, context, hostname)
                handshake.tls_started()
                continue
            data = await _receive(loop, connection)
            if not data:
                raise ConnectionResetError(
                    errno.ECONNRESET, "the server closed the connection during the handshake"
                )
            handshake.receive(data)
    except BaseException:
        connection.close()
        raise
    return connection, handshake.export


async def _start_tls(
    loop: asyncio.AbstractEventLoop,
    connection: socket.socket,
    context: ssl.SSLContext,
    hostname: str | None,
) -> ssl.SSLSocket:
    secure = context.wrap_socket(
        connection, server_hostname=hostname, do_handshake_on_connect=False
    )
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                await _ready(loop, secure, writing=False)
            except ssl.SSLWantWriteError:
                await _ready(loop, secure, writing=True)
    except BaseException:
        secure.close()
        raise


async def _send(loop: asyncio.AbstractEventLoop, connection: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[connection.send(rest) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            await _ready(loop, connection, writing=True)
        except ssl.SSLWantReadError:
            await _ready(loop, connection, writing=False)
        except BrokenPipeError:
            return  # the peer may have said why before it hung up; receiving will tell


async def _receive(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bytes:
    while True:
        try:
            return connection.recv(HANDSHAKE_RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            await _ready(loop, connection, writing=False)
        except ssl.SSLWantWriteError:
            await _ready(loop, connection, writing=True)
