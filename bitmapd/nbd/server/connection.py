"""One client of the export: what was received from it and what is to be sent.

    HANDSHAKE -> (TLS -> HANDSHAKE) -> ADMISSION -> SERVING -> LEAVING -> CLOSED

Receiving: everything that one `recv_into` brings into the staging buffer is parsed at once; each
request goes to the export as soon as it is complete.  A payload that is not there in full is
received directly into its buffer.  Sending: answers pile up until `flush`, which hands all of them
to one `sendmsg`.

1. Every buffer taken from the pool is given back exactly once: when its answer was sent or dropped,
   after the device is done with it, or when its payload never arrives.
2. Nothing is read from a client that does not take its answers, that has MAX_IN_FLIGHT requests
   under way, or for which the pool has no buffer.  So a client's memory is the staging buffer, its
   buffers in the pool, and a bounded number of small answers.
3. After the end of the stream or DISC the requests that were received are carried out and answered
   (LEAVING).  A connection that breaks leaves its requests at the device; the hub counts them as
   orphans and lets nobody in until they are done, so a client that comes back is not overtaken by
   its own old writes.
4. A half-received request is never carried out.
5. Nothing a client sends raises out of here.
"""

from __future__ import annotations

import socket
import ssl
from enum import Enum, auto
from functools import partial

from bitmapd.nbd.numbers import REQUEST_MAGIC, Cmd
from bitmapd.nbd.server.handshake import HandshakeState, ServerHandshake
from bitmapd.nbd.server.hub import Hub
from bitmapd.nbd.server.outbox import Outbox
from bitmapd.nbd.server.patience import Transfer
from bitmapd.nbd.server.places import Peer, Standing
from bitmapd.nbd.server.requests import (
    MAX_SKIPPED_PAYLOAD_BYTES,
    Refusal,
    Replies,
    Rules,
)
from bitmapd.nbd.server.service import Service
from bitmapd.nbd.server.stream import BLOCKED, Stream
from bitmapd.nbd.wire import REQUEST, REQUEST_BYTES, ProtocolError

STAGING_BYTES = 128 << 10
HANDSHAKE_READ_BYTES = 4096
PAYLOAD_READS = 16

_READ, _WRITE, _DISC = int(Cmd.READ), int(Cmd.WRITE), int(Cmd.DISC)


class Phase(Enum):
    HANDSHAKE = auto()
    TLS = auto()
    ADMISSION = auto()
    SERVING = auto()
    LEAVING = auto()
    CLOSED = auto()


class Connection:
    """See the module docstring.  All methods are called on the loop's thread."""

    def __init__(
        self,
        hub: Hub[Connection],
        sock: socket.socket,
        peer: Peer,
        handshake: ServerHandshake,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.peer = peer
        self.phase = Phase.HANDSHAKE
        self.was_let_in = False
        self.opened_s = hub.loop.time()
        self._hub = hub
        self._stream = Stream(
            hub.loop, sock, partial(hub.readable, self), partial(hub.writable, self)
        )
        self._tls = tls
        self._handshake = handshake
        self._rules: Rules
        self._replies = Replies(structured=False)
        # What was received and not yet parsed is staging[pos:end].
        self._staging = bytearray()
        self._view = memoryview(self._staging)
        self._pos = 0
        self._end = 0
        self._payload: tuple[int, int, int, memoryview] | None = None  # handle, flags, offset, all
        self._payload_rest = self._view
        self._skip_bytes = 0
        self._skip_reply = b""
        self._stalled = False
        self._draining = False
        self._message = Transfer()  # the one that has arrived in part
        self._out = Outbox()
        self._service = Service(hub, self._replies, self._out, self._answered)
        self._blocked = False
        self._taking = Transfer()  # of answers, while it is blocked
        self._marked = False
        self._update_reader()
        self._emit_handshake()

    # -- what the hub asks --------------------------------------------------------------
    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def in_flight(self) -> int:
        """Requests that are at the device."""
        return self._service.in_flight

    @property
    def spins(self) -> bool:
        """Whether polling the socket makes sense."""
        stream = self._stream
        return stream.reads and self.phase is Phase.SERVING and stream.is_plain

    @property
    def standing(self) -> Standing:
        """GONE is not known here: who waits at the door is not read."""
        if self.was_let_in:
            return Standing.LET_IN
        if self.peer.is_trusted or self._stream.is_secure:
            return Standing.VERIFIED
        if self.phase is Phase.TLS:
            return Standing.SECURING
        silent = self._handshake.state is HandshakeState.CLIENT_FLAGS
        return Standing.SILENT if silent else Standing.TALKING

    @property
    def certificate_name(self) -> str | None:
        """The common name of the client's certificate."""
        return self._stream.certificate_name()

    def overdue(self, now_s: float) -> str | None:
        """Why the connection has to be dropped, if it has been too slow."""
        limits = self._hub.limits
        if self.phase in (Phase.HANDSHAKE, Phase.TLS):
            if now_s - self.opened_s > limits.handshake_timeout_s:
                return f"no handshake within {limits.handshake_timeout_s:g} s"
            return None
        contended = self._hub.others_wait(self)
        # A client on this machine may be stopped as long as it is in nobody's way.
        if not self.peer.is_remote and not contended:
            return None
        whole_s = limits.message_timeout_s
        silence_s = min(whole_s, limits.contended_timeout_s) if contended else whole_s
        remaining = self._skip_bytes if self._payload is None else len(self._payload_rest)
        reason = self._message.overdue(now_s, remaining, whole_s, silence_s)
        if reason is not None:
            return f"a request did not arrive in full: {reason}"
        reason = self._taking.overdue(now_s, self._out.waiting_bytes, whole_s, silence_s)
        if reason is not None:
            return f"answers were not taken: {reason}"
        return None

    # -- receiving ----------------------------------------------------------------------
    def receive(self) -> bool:
        """Take in what the socket has; False if it had nothing, or nothing is wanted."""
        if not self._stream.reads:
            return False
        if self.phase is Phase.SERVING:
            return self._receive_requests() if self._payload is None else self._receive_payload()
        if self.phase is Phase.HANDSHAKE:
            return self._receive_handshake()
        if self.phase is Phase.TLS:
            self._stream.continue_tls()
        return False

    def _recv_into(self, view: memoryview) -> int:
        """Bytes received, 0 at the end of the stream or of the connection, or BLOCKED."""
        try:
            return self._stream.receive_into(view)
        except OSError as error:
            reason = f"receiving failed: {error.strerror or error}" if self.was_let_in else None
            self.close(reason)
            return 0

    def _receive_handshake(self) -> bool:
        scratch = bytearray(HANDSHAKE_READ_BYTES)
        count = self._recv_into(memoryview(scratch))
        if count == BLOCKED:
            return False
        if count == 0:
            self.close()
            return False
        try:
            self._handshake.receive(memoryview(scratch)[:count])
        except ProtocolError as error:
            self.refuse(str(error))
            return False
        self._emit_handshake()
        if self._handshake.state is HandshakeState.CLOSED:
            self.leave()
        elif self._handshake.state is HandshakeState.TLS:
            self.phase = Phase.TLS
            self._update_reader()
        elif self._handshake.state is HandshakeState.ADMISSION:
            self.phase = Phase.ADMISSION
            self._update_reader()
            self._hub.wants_in(self)
        self._read_on_if_pending()
        return True

    def _emit_handshake(self) -> None:
        data = self._handshake.data_to_send()
        if data:
            self._emit(data)

    def enter(self) -> None:
        """Let the client in; called by the hub."""
        self._handshake.admit()
        self.phase = Phase.SERVING
        self.was_let_in = True
        session, offer = self._handshake.session, self._handshake.offer
        self._rules = Rules(
            offer.size_bytes,
            offer.block_bytes,
            offer.read_only,
            session.structured,
            session.block_status,
        )
        self._replies = Replies(session.structured)
        self._service = Service(self._hub, self._replies, self._out, self._answered)
        self._emit_handshake()
        self._staging = bytearray(STAGING_BYTES)
        self._view = memoryview(self._staging)
        early = self._handshake.leftover()
        self._view[: len(early)] = early
        self._end = len(early)
        self._parse()
        self._update_reader()
        self._read_on_if_pending()

    def _receive_requests(self) -> bool:
        if self._pos:
            # What is left of the previous batch is less than a header.
            left = bytes(self._view[self._pos : self._end])
            self._view[: len(left)] = left
            self._pos, self._end = 0, len(left)
        count = self._recv_into(self._view[self._end :] if self._end else self._view)
        if count == BLOCKED:
            return False
        if count == 0:
            self.leave()
            return False
        self._end += count
        if self._message.active:
            self._message.advance(self._hub.loop.time(), count)
        self._parse()
        if self._payload is not None and self._stream.is_plain:
            # Clients tend to send header and payload one after the other.
            self._receive_payload()
        self._read_on_if_pending()
        return True

    def _receive_payload(self) -> bool:
        received = False
        for _ in range(PAYLOAD_READS):
            count = self._recv_into(self._payload_rest)
            if count == BLOCKED:
                return received
            if count == 0:
                self.leave()
                return False
            received = True
            self._message.advance(self._hub.loop.time(), count)
            if count < len(self._payload_rest):
                self._payload_rest = self._payload_rest[count:]
                continue
            if self._payload is not None:
                handle, flags, offset, buffer = self._payload
                self._payload = None
                self._message.end()
                self._service.write(handle, flags, offset, buffer)
            break
        self._read_on_if_pending()
        return received

    def _read_on_if_pending(self) -> None:
        """Bytes that TLS has decrypted already do not make the socket readable."""
        if self._stream.reads and self._stream.pending():
            self._hub.loop.call_soon(self._hub.readable, self)

    def _parse(self) -> None:
        """Carry out the complete requests of the staging buffer, until something stalls."""
        rules, service, limit = self._rules, self._service, self._hub.limits.in_flight
        counts = self._hub.stats.requests
        view, unpack = self._view, REQUEST.unpack_from
        pos, end = self._pos, self._end
        began = False
        self._stalled = False
        while True:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, end - pos)
                pos += skipped
                self._skip_bytes -= skipped
                if self._skip_bytes:
                    break
                self._emit(self._skip_reply)
            if end - pos < REQUEST_BYTES:
                break
            magic, flags, command, handle, offset, length = unpack(view, pos)
            if magic != REQUEST_MAGIC:
                self.close(f"request magic {magic:#x} is wrong")
                return
            began = True
            if command == _DISC:
                counts[_DISC] += 1
                self._pos = self._end = 0
                self.leave()
                return
            refusal = rules.refuse(command, flags, offset, length)
            if refusal is not None:
                pos += REQUEST_BYTES
                if not self._turn_down(refusal, command, handle, length):
                    return
                continue
            if service.in_flight >= limit:
                self._stalled = True
                break
            if command == _WRITE:
                buffer = self._hub.take(self, length)
                if buffer is None:
                    self._stalled = True
                    break
                pos += REQUEST_BYTES
                counts[_WRITE] += 1
                there = end - pos
                if there < length:
                    buffer[:there] = view[pos:end]
                    pos = end
                    self._payload = (handle, flags, offset, buffer)
                    self._payload_rest = buffer[there:]
                    break
                buffer[:] = view[pos : pos + length]
                pos += length
                service.write(handle, flags, offset, buffer)
            elif command == _READ:
                buffer = self._hub.take(self, length)
                if buffer is None:
                    self._stalled = True
                    break
                pos += REQUEST_BYTES
                counts[_READ] += 1
                service.read(handle, flags, offset, buffer)
            else:
                pos += REQUEST_BYTES
                counts[command] += 1
                service.other(command, flags, handle, offset, length)
        if pos == end:
            pos = end = 0
        self._pos, self._end = pos, end
        if self._stalled:
            self._message.end()
            self._update_reader()
        elif end or self._payload is not None or self._skip_bytes:
            if began or not self._message.active:
                self._message.begin(self._hub.loop.time())
        else:
            self._message.end()

    def _turn_down(self, refusal: Refusal, command: int, handle: int, length: int) -> bool:
        """Answer a request that is not carried out; False if the connection had to be dropped."""
        self._hub.stats.errors += 1
        reply = self._replies.failure(handle, refusal.error, refusal.message)
        if command != _WRITE or not length:
            self._emit(reply)
        elif length > MAX_SKIPPED_PAYLOAD_BYTES:
            self.close(f"a write of {length} bytes")
            return False
        else:
            self._skip_bytes = length
            self._skip_reply = reply
        return True

    # -- sending ------------------------------------------------------------------------
    def _emit(self, piece: bytes) -> None:
        self._out.add(piece)
        if not self._marked:
            self._marked = True
            self._hub.mark(self)

    def _answered(self) -> None:
        """A request has left the device; its answer, if one is wanted, is in the outbox."""
        if self.phase is Phase.CLOSED:
            if not self._service.in_flight:
                self._hub.orphan_finished(self)
        elif not self._marked:
            self._marked = True
            self._hub.mark(self)

    def flush(self) -> None:
        """Send the answers that have piled up, and go on with what they held up."""
        self._marked = False
        if self._out and not self._blocked:
            self._send()
        if self.phase is Phase.TLS and self._stream.is_plain and not self._out:
            self._start_tls()
        elif self.phase is Phase.LEAVING and not self.in_flight and not self._out:
            self.close()
        elif self._stalled and self._service.in_flight <= self._hub.limits.in_flight // 2:
            self.resume()

    def resume(self) -> None:
        """Parse on after a stall."""
        if self.phase is not Phase.SERVING or self._blocked:
            return
        if self._stalled:
            self._parse()
        if self._draining and not self._stalled and self.phase is Phase.SERVING:
            self.leave()
        self._update_reader()
        self._read_on_if_pending()

    def writable(self) -> None:
        """The socket takes data again."""
        self._stream.watch_writes(False)
        if self.phase is Phase.TLS and not self._stream.is_plain:
            self._stream.continue_tls()
            return
        was_blocked = self._blocked
        if self._out:
            self._send()
        self.flush()
        if was_blocked and not self._blocked:
            self.resume()

    def _send(self) -> None:
        out = self._out
        while out:
            try:
                count = self._stream.send(out)
            except OSError as error:
                # No news during the handshake: clients may leave without reading the answer.
                reason = f"sending failed: {error.strerror or error}" if self.was_let_in else None
                self.close(reason)
                return
            if count == BLOCKED:
                if not self._blocked:
                    self._blocked = True
                    self._taking.begin(self._hub.loop.time())
                self._update_reader()
                return
            if self._blocked:
                self._taking.advance(self._hub.loop.time(), count)
            for buffer in out.sent(count):
                self._hub.give(buffer)
        self._blocked = False
        self._taking.end()

    # -- TLS ----------------------------------------------------------------------------
    def _start_tls(self) -> None:
        if self._tls is None:
            raise RuntimeError("TLS was accepted without a context")
        self._stream.start_tls(self._tls, self._hub.tls_worker(), self.peer.origin, self._tls_ended)

    def _tls_ended(self, error: Exception | None) -> None:
        if error is not None:
            reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error
            self.refuse(f"TLS failed: {reason}")
            return
        self._handshake.tls_started()
        self.phase = Phase.HANDSHAKE
        self._update_reader()
        self._read_on_if_pending()

    # -- leaving ------------------------------------------------------------------------
    def drain(self) -> None:
        """Finish the requests that were received, then close."""
        self._draining = True
        if self.phase is not Phase.SERVING:
            if self.phase is not Phase.LEAVING:
                self.close("the server is stopping")
        elif self._stalled or self._blocked:
            self._update_reader()
        else:
            self.leave()

    def leave(self) -> None:
        """Read nothing more; close once everything received is carried out and answered."""
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.LEAVING
        self._message.end()
        self._drop_payload()
        self._update_reader()
        if not self._marked:
            self._marked = True
            self._hub.mark(self)

    def refuse(self, reason: str) -> None:
        """Drop a client that was not let in."""
        self._hub.refused(self, reason)
        self.close()

    def close(self, reason: str | None = None) -> None:
        """Drop the connection; harmless when it is closed."""
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        self._service.abandon()
        self._drop_payload()
        for buffer in self._out.clear():
            self._hub.give(buffer)
        self._stream.close()
        self._hub.closed(self, reason)

    def _drop_payload(self) -> None:
        if self._payload is not None:
            self._hub.give(self._payload[3])
            self._payload = None

    def _update_reader(self) -> None:
        wanted = self.phase is Phase.HANDSHAKE or (
            self.phase is Phase.SERVING and not (self._stalled or self._blocked or self._draining)
        )
        self._stream.watch_reads(wanted)
