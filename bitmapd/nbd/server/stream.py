"""The socket of one client, plain or with TLS: what is watched, received, sent and closed.

1. No call waits for the client.  BLOCKED stands for what a call could not do, and the socket is
   watched for the moment at which it can.
2. Each step of a TLS handshake is carried out by the `TlsWorker`, which is never in the way of the
   loop.  As long as a step is there, the socket is neither watched nor read nor closed here: its
   number could be another client's by the time the step uses it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bitmapd.nbd.server.outbox import Outbox
from bitmapd.nbd.server.tls_worker import Step, TlsWorker

BLOCKED = -1
# IOV_MAX of Linux: the most pieces that one sendmsg takes.
MAX_PIECES = 1024
TLS_JOIN_BYTES = 16 << 10


class Stream:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        readable: Callable[[], object],
        writable: Callable[[], object],
    ) -> None:
        self.reads = False  # whether it is watched
        self.is_plain = True
        self.is_secure = False  # TLS has been established, the client's certificate verified
        self._writes = False
        self._loop = loop
        self._sock = sock
        self._readable = readable
        self._writable = writable
        self._secure: ssl.SSLSocket | None = None
        self._worker: TlsWorker | None = None
        self._step: Step | None = None  # that was handed to the worker
        self._closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def pending(self) -> bool:
        """Whether TLS holds bytes that do not make the socket readable."""
        return self._secure is not None and self._secure.pending() > 0

    # -- watching -----------------------------------------------------------------------
    def watch_reads(self, wanted: bool) -> None:
        if wanted and not self.reads:
            self._loop.add_reader(self._sock.fileno(), self._readable)
        elif self.reads and not wanted:
            self._loop.remove_reader(self._sock.fileno())
        self.reads = wanted

    def watch_writes(self, wanted: bool) -> None:
        if wanted and not self._writes:
            self._loop.add_writer(self._sock.fileno(), self._writable)
        elif self._writes and not wanted:
            self._loop.remove_writer(self._sock.fileno())
        self._writes = wanted

    # -- bytes --------------------------------------------------------------------------
    def receive_into(self, view: memoryview) -> int:
        """Bytes received, 0 at the end of the stream, or BLOCKED; raises OSError."""
        try:
            return self._sock.recv_into(view)
        except (BlockingIOError, ssl.SSLWantReadError, InterruptedError):
            return BLOCKED
        except ssl.SSLWantWriteError:
            self.watch_writes(True)
            return BLOCKED

    def send(self, out: Outbox) -> int:
        """Bytes sent of what waits there, or BLOCKED; raises OSError."""
        try:
            if self._secure is None:
                return self._sock.sendmsg(out.pieces(MAX_PIECES))
            return self._secure.send(out.joined(TLS_JOIN_BYTES))
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self.watch_writes(True)
            return BLOCKED

    # -- TLS ----------------------------------------------------------------------------
    def start_tls(
        self,
        context: ssl.SSLContext,
        worker: TlsWorker,
        origin: str,
        ended: Callable[[Exception | None], None],
    ) -> None:
        """`ended`: TLS is established, or why it failed; not called after `close`."""
        self.watch_reads(False)
        self.watch_writes(False)
        self.is_plain = False
        secure, failure = None, None
        try:
            secure = context.wrap_socket(
                self._sock, server_side=True, do_handshake_on_connect=False
            )
        except OSError as error:
            # A connection that was reset meanwhile.  The socket, by now in the hands of `ssl`, is
            # closed with the last reference to this error, whose frames hold it.
            failure = OSError(error.errno, error.strerror)
        if secure is None:
            ended(failure)
            return
        self._sock = self._secure = secure
        self._worker = worker
        self._step = Step(origin, secure.do_handshake, lambda error: self._stepped(error, ended))
        self.continue_tls()

    def continue_tls(self) -> None:
        """What the handshake waits for is there."""
        self.watch_reads(False)
        self.watch_writes(False)
        if self._worker is not None and self._step is not None:
            self._worker.submit(self._step)

    def _stepped(self, error: Exception | None, ended: Callable[[Exception | None], None]) -> None:
        if self._closed:
            self._sock.close()
        elif isinstance(error, ssl.SSLWantReadError):
            self.watch_reads(True)
        elif isinstance(error, ssl.SSLWantWriteError):
            self.watch_writes(True)
        else:
            self._worker = self._step = None
            self.is_secure = error is None
            ended(error)

    def certificate_name(self) -> str | None:
        """The common name of the client's certificate."""
        if self._secure is None:
            return None
        certificate: Any = self._secure.getpeercert() or {}
        for relative_name in certificate.get("subject", ()):
            for kind, value in relative_name:
                if kind == "commonName":
                    return str(value)
        return None

    def close(self) -> None:
        self._closed = True
        self.watch_reads(False)
        self.watch_writes(False)
        worker, step = self._worker, self._step
        if worker is not None and step is not None and not worker.withdraw(step):
            # The client hears of it now; the method of `ssl` would touch what the worker uses.
            with suppress(OSError):
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
            return
        if self._secure is not None and self.is_secure:
            # A best effort: the client's own notice is not waited for.
            with suppress(OSError, ValueError):
                self._secure.unwrap()
        self._sock.close()
