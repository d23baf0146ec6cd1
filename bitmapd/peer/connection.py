"""One connection on a socket of asyncio: what `Link` decides is carried out.

1. What is sent in one turn of the loop leaves in one `send`, at its end; in one batch of requests,
   if `soon` is the end of a batch.
2. Little waits in the transport (128 KiB); the rest waits in the link, which is bounded.
3. The owner hears nothing after `close`, and `lost` once without it.
4. What is wrong ends the connection with ERROR, as far as the other still reads.

A connection that was accepted is *arriving* until its first frame is here; only then does its owner
know of it.  So a client that connects and says nothing disturbs nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, Protocol, cast

from bitmapd.peer.frames import Frame, Kind, Part, PeerError, refusal
from bitmapd.peer.link import Link, Verdict

CHUNK_BYTES: Final = 64 << 10
HIGH_WATER_BYTES: Final = 128 << 10
LOW_WATER_BYTES: Final = 32 << 10
FAREWELL_S: Final = 1.0  # for what was sent last


class Owner(Protocol):
    """Calls come from the loop, one at a time."""

    def connected(self, connection: Connection) -> None:
        """The other node is there, and is who it has to be.  There may be an older connection: the
        owner decides, and closes one of them."""

    def frames(self, connection: Connection, frames: list[Frame]) -> None:
        """In order.  When one of them is a HELLO that fits: `connection.link.greeted`."""

    def ping_due(self, connection: Connection) -> None:
        """Nothing was sent for a while."""

    def drained(self, connection: Connection) -> None:
        """`link.has_room` again."""

    def lost(self, connection: Connection, reason: str) -> None:
        """It is gone; `connection.error` says what was wrong if that was the reason."""

    def failed(self, reason: str) -> None:
        """Nobody could be connected to, or somebody was refused."""


class Supervisor(Protocol):
    """What a connection tells the transport that made it."""

    def vet(self, transport: asyncio.Transport) -> str | None:
        """Why the other end may not come in, None if it may."""

    def established(self, connection: Connection) -> None: ...

    def ended(self, connection: Connection, reason: str) -> None:
        """It carries nothing any more, whoever ended it."""


class Connection(asyncio.BufferedProtocol):
    """See the module docstring.  `peer` names the other end for messages."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        owner: Owner,
        supervisor: Supervisor,
        peer: str,
        timeout_s: float,
        soon: Callable[[Callable[[], None]], object],
        *,
        dialled: bool,
    ) -> None:
        self.peer = peer
        self.link = Link(loop.time(), timeout_s)
        self.error: PeerError | None = None
        self.failed = False  # ERROR went one way or the other
        self._loop = loop
        self._soon = soon
        self._owner = owner
        self._supervisor = supervisor
        self._dialled = dialled
        self._transport: asyncio.Transport | None = None
        # Of one size: asyncio.Protocol has a new one of 256 KiB for each read.
        self._input = memoryview(bytearray(CHUNK_BYTES))
        self._established = False
        self._over = False  # the owner hears nothing any more
        self._paused = False
        self._reading = True
        self._flush_due = False
        self._was_full = False
        self._timer: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None

    # -- the owner's side -----------------------------------------------------------------------
    def send(self, parts: Iterable[Part]) -> int:
        """Returns the sequence of the last frame."""
        number = self.link.send(parts)
        self._was_full |= not self.link.has_room
        self._flush_soon()
        return number

    def read(self, on: bool) -> None:
        """Whether what the other sends is taken in; meanwhile the other has to wait."""
        if on is self._reading or self._over or self._transport is None:
            return
        self._reading = on
        if on:
            self.link.unread(self._loop.time())
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def close(self, error: PeerError | None = None) -> None:
        """After what was sent has left, and ERROR, if there is one."""
        if self._over:
            return
        if error is not None:
            self.failed = True
            self.error = error
            self.link.send([refusal(error.code, error.text)])
        self._end(error.text if error is not None else "closed")

    def discard(self) -> None:
        """Nobody hears anything of it any more."""
        self._over = True
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    def _end(self, reason: str) -> None:
        self._over = True
        self._stop_timer()
        self._supervisor.ended(self, reason)
        transport = self._transport
        if transport is not None and not transport.is_closing():
            while data := self.link.take(CHUNK_BYTES, self._loop.time()):
                transport.write(data)
            transport.close()
            self._farewell = self._loop.call_later(FAREWELL_S, transport.abort)

    # -- the socket's side ----------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._over:  # discarded while it was being made
            self._transport.abort()
            return
        fault = self._supervisor.vet(self._transport)
        if fault is not None:
            self._over = True
            self._supervisor.ended(self, f"{self.peer} is refused: {fault}")
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        self._watch()
        if self._dialled:
            self._establish()

    def _establish(self) -> None:
        self._established = True
        self._supervisor.established(self)
        self._owner.connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._input

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._input[:nbytes])
        try:
            while not self._over and (frames := self.link.receive(data, self._loop.time())):
                data = b""
                self.failed |= any(frame.kind == Kind.ERROR for frame in frames)
                if not self._established:
                    self._establish()
                if not self._over:
                    self._owner.frames(self, frames)
        except PeerError as error:
            self.close(error)
            if self._established:
                self._owner.lost(self, error.text)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        """Not the place to write or close: a transport that ends in here is ended twice by asyncio
        (CPython issue 156512)."""
        self._paused = False
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._soon(self.flush)

    def flush(self) -> None:
        """What was sent leaves, as far as the socket takes it; else that comes by itself."""
        self._flush_due = False
        transport = self._transport
        if self._over or transport is None or transport.is_closing():
            return
        while not self._paused and (data := self.link.take(CHUNK_BYTES, self._loop.time())):
            transport.write(data)
        if self._was_full and self.link.has_room:
            self._was_full = False
            self._owner.drained(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._farewell is not None:
            self._farewell.cancel()
        if self._over:
            return
        self._over = True
        reason = str(exc) if exc else "the other node ended the connection"
        self._supervisor.ended(self, reason)
        if self._established:
            self._owner.lost(self, reason)

    # -- silence --------------------------------------------------------------------------------
    def _watch(self) -> None:
        self._timer = self._loop.call_at(self.link.due_s(), self._judge)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _judge(self) -> None:
        if not self._reading:
            self.link.unread(self._loop.time())
        verdict = self.link.check(self._loop.time())
        for_long = f"for {self.link.timeout_s:g} s"
        if verdict is Verdict.SILENT:
            self._give_up(f"nothing came from the other node {for_long}")
        elif verdict is Verdict.STUCK:
            self._give_up(f"the other node has read nothing {for_long}")
        else:
            self._watch()
            if verdict is Verdict.PING:
                self._owner.ping_due(self)

    def _give_up(self, reason: str) -> None:
        self.discard()
        self._supervisor.ended(self, reason)
        if self._established:
            self._owner.lost(self, reason)
