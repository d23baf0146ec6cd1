"""Messages of points over real sockets: both ways of dialling, order, what ends a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.transport import Settings
from bitmapd.peer.words import Error
from bitmapd.points.codec import encode
from bitmapd.points.messages import Applied, Hello2, Message, Need, Role
from bitmapd.points.wire import MessageWire, PointTransport
from tests.support.peers import unix_pair
from tests.support.pointmessages import GEOMETRY

LIMIT_S = 30  # nothing here takes a tenth of it


def hello(role: Role) -> Hello2:
    return Hello2(
        bytes(range(16)), b"i" * 16, (b"g" * 16,) * 4, GEOMETRY.size_bytes, GEOMETRY.block_bytes,
        GEOMETRY.extent_bytes, 0, 0, 0, role, 0, 0, 0, "vol0", "test",
    )  # fmt: skip


class End:
    """One of the two; `role` None: says nothing by itself."""

    def __init__(self, settings: Settings, role: Role) -> None:
        self.transport = PointTransport(asyncio.get_running_loop(), settings, self)
        self.role = role
        self.wires: list[MessageWire] = []
        self.got: list[Message] = []
        self.losses: list[str] = []
        self.drains = 0
        self._changed = asyncio.Event()

    def connected(self, wire: MessageWire) -> None:
        self.wires.append(wire)
        if self.role is Role.SENDER:
            wire.send(hello(self.role))
        self._changed.set()

    def received(self, wire: MessageWire, message: Message) -> None:
        if isinstance(message, Hello2):
            wire.greeted(GEOMETRY)
            if self.role is Role.RECEIVER:
                wire.send(hello(self.role))
        self.got.append(message)
        self._changed.set()

    def drained(self, wire: MessageWire) -> None:
        self.drains += 1
        self._changed.set()

    def lost(self, wire: MessageWire, reason: str) -> None:
        self.losses.append(reason)
        self._changed.set()

    def failed(self, reason: str) -> None:
        self._changed.set()

    async def until(self, there: Callable[[], object]) -> None:
        while not there():
            self._changed.clear()
            await self._changed.wait()

    async def greeted(self) -> MessageWire:
        await self.until(lambda: any(isinstance(one, Hello2) for one in self.got))
        return self.wires[-1]


@contextmanager
def ends(folder: Path, timeout_s: float = 10.0) -> Iterator[tuple[End, End]]:
    """A sender, which dials, and a receiver."""
    listening, dialling = unix_pair(folder, timeout_s)
    sender, receiver = End(dialling, Role.SENDER), End(listening, Role.RECEIVER)
    for end in (receiver, sender):
        end.transport.start()
    try:
        yield sender, receiver
    finally:
        for end in (sender, receiver):
            end.transport.close()
            if end.wires and end.wires[-1].is_open:
                end.wires[-1].close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """In a loop of its own, to which no callback's exception may come."""

    async def whole() -> None:
        faults: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: faults.append(context))
        async with asyncio.timeout(LIMIT_S):
            await scenario()
        assert not faults

    asyncio.run(whole())


def test_messages_come_whole_and_in_order_and_their_bytes_are_counted(short_path: Path) -> None:
    async def scenario() -> None:
        with ends(short_path) as (sender, receiver):
            here, there = await sender.greeted(), await receiver.greeted()
            sent: list[Message] = [Need(((n, n + 1),)) for n in range(200)]
            for message in sent:
                parts = encode(message)
                assert here.send(message) == sum(32 + len(part.payload) for part in parts)
            there.send(Applied(7))
            await receiver.until(lambda: len(receiver.got) == 201)
            await sender.until(lambda: len(sender.got) == 2)
            assert receiver.got[1:] == sent
            assert sender.got[1] == Applied(7)

    run(scenario)


def test_what_is_not_read_waits_at_the_other_end(short_path: Path) -> None:
    """A receiver whose image is slow takes nothing in, and the sender has no room any more."""

    async def scenario() -> None:
        with ends(short_path) as (sender, receiver):
            here, there = await sender.greeted(), await receiver.greeted()
            there.read(False)
            runs = tuple((block, block + 1) for block in range(0, GEOMETRY.blocks, 2))
            sent = 0
            while here.has_room:
                here.send(Need(runs))
                sent += 1
            await asyncio.sleep(0)
            there.send(Applied(1))
            await sender.until(lambda: len(sender.got) == 2)
            assert len(receiver.got) == 1
            there.read(True)
            await receiver.until(lambda: len(receiver.got) == 1 + sent)
            assert sender.drains == 1

    run(scenario)


def test_a_wrong_frame_ends_the_connection_and_both_hear_why(short_path: Path) -> None:
    async def scenario() -> None:
        with ends(short_path) as (sender, receiver):
            here = await sender.greeted()
            await receiver.greeted()
            here.send(Need(((GEOMETRY.blocks, GEOMETRY.blocks + 1),)))
            await receiver.until(lambda: receiver.losses)
            await sender.until(lambda: sender.losses)
            (error,) = [message for message in sender.got if isinstance(message, Error)]
            assert error.code == ErrorCode.RUNS
            assert error.text == receiver.losses[0]
            await sender.until(lambda: len(sender.wires) == 2)  # it dials again

    run(scenario)


def test_who_closes_hears_no_loss_and_the_other_hears_the_reason(short_path: Path) -> None:
    async def scenario() -> None:
        with ends(short_path) as (sender, receiver):
            await sender.greeted()
            (await receiver.greeted()).close(PeerError(ErrorCode.OTHER, "enough"))
            await sender.until(lambda: sender.losses)
            assert sender.got[-1] == Error(ErrorCode.OTHER, "enough")
            assert receiver.losses == []

    run(scenario)


def test_a_connection_that_comes_again_takes_the_place_of_the_old_one(short_path: Path) -> None:
    async def scenario() -> None:
        with ends(short_path) as (sender, receiver):
            await sender.greeted()
            old = await receiver.greeted()
            _, dialling = unix_pair(short_path)
            again = End(dialling, Role.SENDER)
            again.transport.start()
            await again.greeted()
            assert receiver.losses == ["the other end has come again"]
            assert not old.is_open
            await sender.until(lambda: sender.losses)
            again.transport.close()
            again.wires[-1].close()

    run(scenario)
