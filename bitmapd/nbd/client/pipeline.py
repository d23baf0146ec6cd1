"""One connection to an NBD server after its handshake: requests out, replies in (edge).

Callbacks on the loop, no task or future a request.

1. What is submitted in one turn of the loop leaves in one `sendmsg` (plain sockets); replies are
   parsed as many as came with one receive, their `done` called after that, then `kick`.
2. A buffer that is written belongs to the link until the reply, and a reply that comes before the
   whole request went to the kernel breaks the link.
3. The link is lost once, for one reason.  Everything in flight then ends with that error through
   `call_soon`, as `Unanswered` unless part of the request had not left this process, so that the
   server cannot carry it out; and `on_lost` hears why.  A link that was lost is never used again.
4. Time: a request that has waited `timeout_s` ends the link.  A slow line is not a dead one, so
   the clock stands while the request is still on its way and the peer takes bytes, and while data
   of reads arrive; `PATIENCE` times as long ends the link in any case.  One timer looks at the
   oldest request.
5. A TCP connection that is lost is reset, so that data which the kernel still holds are not
   delivered after the link was given up; also when this process dies, since the socket is in that
   mode from the beginning.

A server may still carry out requests that it had received when the link was lost; nothing in the
protocol says when it has finished with them.  (Our own server lets nobody in before.)
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Callable
from itertools import islice

from bitmapd.errors import Unanswered
from bitmapd.nbd.client.connect import tls_reason
from bitmapd.nbd.client.handshake import ServerExport
from bitmapd.nbd.client.replies import InFlight, ReplyParser
from bitmapd.nbd.numbers import REQUEST_MAGIC, Cmd
from bitmapd.nbd.wire import REQUEST, ProtocolError

PATIENCE = 10
TICKS = 4  # of the timer in one time-out
IOV_MAX = 1024
ROUNDS = 16  # receives in one turn of the loop
TLS_GATHER_BYTES = 64 << 10

_pack = REQUEST.pack


class Pipeline:
    """See the module docstring.  `label` begins every message."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        export: ServerExport,
        label: str,
        timeout_s: float,
        on_lost: Callable[[OSError], None],
        kick: Callable[[], None] | None,
    ) -> None:
        self.export = export
        self._loop = loop
        self._socket = connection
        self._fd = connection.fileno()
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._label = label
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._kick = kick
        self._parser = ReplyParser(export.structured, export.allocation_id)
        self._requests = self._parser.requests
        self._out: deque[bytes | memoryview] = deque()
        self._queued_bytes = 0  # of all output so far
        self._record: memoryview = memoryview(b"")  # TLS: must be offered again until it is sent
        self._next_handle = 1
        self._flush_scheduled = False
        self._deliver_scheduled = False
        self._writer_armed = False
        self._timer: asyncio.TimerHandle | None = None
        self._progress_s = loop.time()
        self._seen_data_bytes = 0  # when the timer last looked
        self._seen_taken_bytes = 0
        self.lost = False
        self._reset_on_close(True)
        loop.add_reader(self._fd, self._on_readable)

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def submit(
        self, command: int, flags: int, request: InFlight, payload: memoryview | None = None
    ) -> None:
        """Queue a request; its handle is chosen here.  The link must not be lost."""
        handle = request.handle = self._next_handle
        self._next_handle = handle + 1
        self._out.append(
            _pack(REQUEST_MAGIC, flags, command, handle, request.offset_bytes, request.length_bytes)
        )
        self._queued_bytes += REQUEST.size
        if payload is not None:
            self._out.append(payload)
            self._queued_bytes += len(payload)
        request.sent_at_bytes = self._queued_bytes
        request.submitted_s = self._loop.time()
        self._requests[handle] = request
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s / TICKS, self._check_time)

    def lose(self, error: OSError) -> None:
        """Give the link up; calling it again does nothing."""
        if self.lost:
            return
        self._release()
        sent_bytes = self._parser.sent_bytes
        requests = list(self._requests.values())
        self._requests.clear()
        for request in requests:
            kind = Unanswered if request.sent_at_bytes <= sent_bytes else OSError
            self._loop.call_soon(request.done, kind(error.errno, error.strerror))
        self._on_lost(error)

    def close(self) -> None:
        """Leave politely if nothing is in flight; otherwise the link counts as lost."""
        if self.lost:
            return
        if self._requests:
            self.lose(OSError(errno.ECANCELED, f"{self._label}: closed with requests in flight"))
            return
        # If it cannot be sent, the server sees the end of the connection instead.
        with contextlib.suppress(OSError):
            self._reset_on_close(False)
            self._socket.send(_pack(REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0))
        self._release()

    def _reset_on_close(self, reset: bool) -> None:
        if self._socket.family != socket.AF_UNIX:
            linger = struct.pack("ii", reset, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _release(self) -> None:
        self.lost = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._out.clear()
        self._record = memoryview(b"")
        self._socket.close()

    # -- output ---------------------------------------------------------------------------
    def _flush(self) -> None:
        self._flush_scheduled = False
        if self.lost:
            return
        try:
            finished = self._send_records() if self._tls else self._send_pieces()
        except OSError as error:
            self._lose_by(error)
            return
        self._arm_writer(not finished)

    def _arm_writer(self, wanted: bool) -> None:
        if wanted and not self._writer_armed:
            self._loop.add_writer(self._fd, self._on_writable)
        elif self._writer_armed and not wanted:
            self._loop.remove_writer(self._fd)
        self._writer_armed = wanted

    def _send_pieces(self) -> bool:
        """Send until everything is sent (True) or the kernel takes no more (False)."""
        out = self._out
        while out:
            try:
                sent = self._socket.sendmsg(list(islice(out, IOV_MAX)))
            except BlockingIOError:
                return False
            self._parser.sent_bytes += sent
            while sent:
                length = len(out[0])
                if length > sent:
                    out[0] = memoryview(out[0])[sent:]
                    break
                sent -= length
                out.popleft()
        return True

    def _send_records(self) -> bool:
        """TLS knows no `sendmsg`, and what it refused has to be offered again unchanged."""
        while self._out or self._record:
            if not self._record:
                self._record = self._gather()
            try:
                sent = self._socket.send(self._record)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return False
            self._parser.sent_bytes += sent
            self._record = self._record[sent:]
        return True

    def _gather(self) -> memoryview:
        out, gathered = self._out, bytearray()
        while out and len(gathered) < TLS_GATHER_BYTES:
            room = TLS_GATHER_BYTES - len(gathered)
            piece = out[0]
            gathered += piece[:room]
            if len(piece) > room:
                out[0] = memoryview(piece)[room:]
            else:
                out.popleft()
        return memoryview(gathered)

    def _on_writable(self) -> None:
        self._flush()
        if self._tls and not self.lost:
            self._on_readable()  # it may have been receiving that had to write

    # -- input ----------------------------------------------------------------------------
    def _on_readable(self) -> None:
        if self.lost:
            return
        parser, receive = self._parser, self._socket.recv_into
        try:
            for _ in range(ROUNDS):
                target = parser.buffer()
                count = receive(target)
                if count == 0:
                    raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
                parser.received(count)
                if count < len(target) and not self._tls:
                    break
            else:
                if self._tls:
                    # Decrypted bytes may be waiting, of which the kernel knows nothing.
                    self._loop.call_soon(self._on_readable)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._arm_writer(True)
        except ProtocolError as error:
            reason = f"{self._label}: the server broke the protocol: {error}"
            self.lose(OSError(errno.EPROTO, reason))
        except OSError as error:
            self._lose_by(error)
        if parser.finished:
            self._deliver()
        if self._record:
            self._flush()  # it may have been sending that had to read

    def _deliver(self) -> None:
        self._deliver_scheduled = False
        finished = self._parser.finished
        try:
            while finished:
                request = finished.popleft()
                if request.error is None:
                    request.done(None)
                else:
                    request.done(self._reply_error(request.error))
        finally:
            # A callback that raises must not cost the others their answer.
            if finished and not self._deliver_scheduled:
                self._deliver_scheduled = True
                self._loop.call_soon(self._deliver)
        if self._kick is not None:
            self._kick()

    def _reply_error(self, error: tuple[int, str]) -> OSError:
        number, text = error
        told = f" ({text})" if text else ""
        return OSError(number, f"{self._label}: the server says: {os.strerror(number)}{told}")

    def _lose_by(self, error: OSError) -> None:
        number, reason = error.errno or errno.EIO, error.strerror or str(error)
        if isinstance(error, ssl.SSLError):
            number, reason = errno.EPROTO, tls_reason(error)
        elif isinstance(error, ConnectionError):
            number = errno.ENOTCONN
        self.lose(OSError(number, f"{self._label}: connection lost: {reason}"))

    # -- time -----------------------------------------------------------------------------
    def _check_time(self) -> None:
        self._timer = None
        oldest = next(iter(self._requests.values()), None)
        if oldest is None:
            return
        now = self._loop.time()
        data = self._parser.data_bytes
        taken = self._parser.sent_bytes - self._unsent_bytes()
        if data != self._seen_data_bytes or (
            taken != self._seen_taken_bytes and taken < oldest.sent_at_bytes
        ):
            self._progress_s = now
        self._seen_data_bytes, self._seen_taken_bytes = data, taken
        limit = min(
            max(oldest.submitted_s, self._progress_s) + self._timeout_s,
            oldest.submitted_s + PATIENCE * self._timeout_s,
        )
        if now >= limit:
            reason = f"no reply to a request for {now - oldest.submitted_s:.1f} s"
            self.lose(OSError(errno.ETIMEDOUT, f"{self._label}: {reason}"))
        else:
            tick_s = self._timeout_s / TICKS
            self._timer = self._loop.call_at(min(limit, now + tick_s), self._check_time)

    def _unsent_bytes(self) -> int:
        """What the kernel holds that the peer has not taken; about, for unix sockets and TLS."""
        answer = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.TIOCOUTQ, answer)
        return answer[0]
