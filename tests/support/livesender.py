"""The sender of `simreceiver.Script` over a real connection to a bitmapd that receives."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

from bitmapd.net.uri import parse_receiver_uri
from bitmapd.peer.transport import Settings
from bitmapd.points.messages import Hello2, Message
from bitmapd.points.wire import MessageWire, PointTransport
from tests.support.simreceiver import GEOMETRY, Script


class LiveWire:
    """What `Script` needs of a connection; messages that came wait for it."""

    def __init__(self, wire: MessageWire) -> None:
        self.wire = wire
        self.to_sender: deque[Message] = deque()

    @property
    def is_open(self) -> bool:
        return self.wire.is_open

    def say(self, message: Message) -> None:
        self.wire.send(message)

    def answer(self) -> Message | None:
        return self.to_sender.popleft() if self.to_sender else None


class LiveSender:
    """`got` are all messages of the receiver, `losses` why connections ended."""

    def __init__(
        self, listen: str, certificates: Path | None = None, receiver_name: str | None = None
    ) -> None:
        self.script = Script(random.Random(3))
        self.got: list[Message] = []
        self.losses: list[str] = []
        self.failures: list[str] = []
        self._changed = asyncio.Event()
        settings = Settings(
            parse_receiver_uri(listen).peer, None, receiver_name, certificates, None, 10.0
        )
        self.transport = PointTransport(asyncio.get_running_loop(), settings, self)
        self.transport.start()

    # -- PointEnd -------------------------------------------------------------------------------
    def connected(self, wire: MessageWire) -> None:
        live = LiveWire(wire)
        self.script.wire = live  # type: ignore[assignment]
        self.script.ready = False
        self.script.here = {}
        live.say(self.script.hello())
        self._changed.set()

    def received(self, wire: MessageWire, message: Message) -> None:
        if isinstance(message, Hello2):
            wire.greeted(GEOMETRY)
        self.got.append(message)
        live = self.script.wire
        assert isinstance(live, LiveWire)
        live.to_sender.append(message)
        self.script.take()
        self._changed.set()

    def drained(self, wire: MessageWire) -> None:
        self._changed.set()

    def lost(self, wire: MessageWire, reason: str) -> None:
        self.script.wire, self.script.ready = None, False
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

    async def greeted(self) -> None:
        await self.until(lambda: self.script.ready)

    async def point(self) -> int:
        """One more point; its number, when it is committed."""
        script = self.script
        await self.greeted()
        number = script.point
        while script.point == number:
            script.send(4) or script.end()
            if script.ended or not script.ready:
                await self.until(lambda: script.point > number or script.ready)
                if script.ended and script.point == number:
                    self._changed.clear()
                    await self._changed.wait()
        return number

    def close(self) -> None:
        self.transport.close()
        if self.script.wire is not None:
            live = self.script.wire
            assert isinstance(live, LiveWire)
            live.wire.close()
