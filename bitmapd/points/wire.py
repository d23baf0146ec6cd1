"""Messages of points over the connections of `peer.transport` (edge).

Either end of a sender and its receiver may be the one that dials.  `PointTransport` makes messages
of frames and gives them to the end, one connection at a time; `MessageWire` is one connection, as
`Uplink` and `Receiver` want it.

1. A new connection takes the place of an older one: who comes in is the other end, and the older
   connection is one that it has given up.
2. A frame that is wrong ends its connection, with ERROR.  The end hears `lost` for each connection
   that it heard `connected` of, unless it closed it itself.
3. Before the greeting frames are short, and come one at a time: `greeted` ends that.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from bitmapd.peer.connection import Connection
from bitmapd.peer.frames import HEADER_BYTES, Frame, PeerError
from bitmapd.peer.transport import PeerTransport, Settings
from bitmapd.points.codec import Decoder, encode
from bitmapd.points.messages import Message, Ping
from bitmapd.record.geometry import Geometry

TIMEOUT_S: Final = 10.0  # of silence: points are no matter of a moment


class PointEnd(Protocol):
    """Calls come from the loop, one at a time, and never from inside a call of a wire."""

    def connected(self, wire: MessageWire) -> None:
        """The other end is there, and is who it has to be."""

    def received(self, wire: MessageWire, message: Message) -> None: ...

    def drained(self, wire: MessageWire) -> None:
        """`has_room` again."""

    def lost(self, wire: MessageWire, reason: str) -> None: ...

    def failed(self, reason: str) -> None:
        """The other end could not be reached, or somebody else was refused."""


class MessageWire:
    """One connection; see the module docstring."""

    def __init__(self, connection: Connection) -> None:
        self.peer = connection.peer
        self.is_open = True
        self._connection = connection
        self._decoder = Decoder()

    @property
    def has_room(self) -> bool:
        return self._connection.link.has_room

    def send(self, message: Message) -> int:
        """Returns the bytes on the wire."""
        parts = encode(message)
        self._connection.send(parts)
        return sum(HEADER_BYTES + len(part.payload) for part in parts)

    def greeted(self, geometry: Geometry) -> None:
        """The other's HELLO2 fits: blocks are those of this volume from now on."""
        self._decoder.set_geometry(geometry)
        self._connection.link.greeted()

    def read(self, on: bool) -> None:
        """Whether more is to be received."""
        self._connection.read(on)

    def close(self, error: PeerError | None = None) -> None:
        """After what was sent; nothing of it is heard any more."""
        self.is_open = False
        self._connection.close(error)

    def decode(self, frame: Frame) -> Message | None:
        return self._decoder.feed(frame)


class PointTransport:
    """See the module docstring.  `start` raises a BitmapdError that says what is wrong."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: Settings, end: PointEnd) -> None:
        self._loop = loop
        self._end = end
        self._transport = PeerTransport(loop, settings, self)
        self._connection: Connection | None = None
        self._wire: MessageWire | None = None

    @property
    def listening(self) -> tuple[str, int] | None:
        """Where over TCP."""
        return self._transport.listening

    def start(self) -> None:
        self._transport.start()

    def close(self) -> None:
        """Nobody comes in any more, and nobody is dialled.  The wire is the end's own to close."""
        self._transport.close()

    # -- Owner of the transport -----------------------------------------------------------------
    def connected(self, connection: Connection) -> None:
        before = self._wire
        self._connection, self._wire = connection, MessageWire(connection)
        if before is not None and before.is_open:
            before.close()
            self._end.lost(before, "the other end has come again")
        self._end.connected(self._wire)

    def frames(self, connection: Connection, frames: list[Frame]) -> None:
        wire = self._wire
        if connection is not self._connection or wire is None:
            return
        for frame in frames:
            if not wire.is_open:
                return
            try:
                message = wire.decode(frame)
            except PeerError as error:
                wire.close(error)
                self._end.lost(wire, error.text)
                return
            if message is not None:
                self._end.received(wire, message)

    def ping_due(self, connection: Connection) -> None:
        if connection is self._connection and self._wire is not None:
            self._wire.send(Ping(int(self._loop.time() * 1e6)))

    def drained(self, connection: Connection) -> None:
        if connection is self._connection and self._wire is not None:
            self._end.drained(self._wire)

    def lost(self, connection: Connection, reason: str) -> None:
        wire = self._wire
        if connection is self._connection and wire is not None and wire.is_open:
            wire.is_open = False
            self._connection = self._wire = None
            self._end.lost(wire, reason)

    def failed(self, reason: str) -> None:
        self._end.failed(reason)
