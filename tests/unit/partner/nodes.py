"""Two real nodes at desks; a link that the test carries."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from bitarray import bitarray

from bitmapd.media.base import Done
from bitmapd.partner.messages import Hello, HelloFlag, Message
from bitmapd.partner.node import Lasting, Node, Phase, Proof, State
from bitmapd.partner.rights import Rights
from bitmapd.peer.frames import PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import bits_of
from tests.support.sim import SimLoop
from tests.unit.partner.hellos import VOLUME, generations, hello
from tests.unit.partner.homes import GEOMETRY, Desk


class Cable:
    """One node's end: what it has sent waits in `queue`."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Message, int]] = deque()
        self.closed = False
        self.error: PeerError | None = None
        self.sent = 0

    def send(self, message: Message) -> int:
        self.sent += 1
        self.queue.append((message, self.sent))
        return self.sent

    def close(self, error: PeerError | None) -> None:
        self.closed, self.error = True, error


class Station:
    """One node, its desk and its superblock."""

    def __init__(
        self,
        number: int,
        *,
        paired: bool = True,
        stored: Runs = (),
        size_bytes: int = GEOMETRY.size_bytes,
    ) -> None:
        geometry = replace(GEOMETRY, size_bytes=size_bytes)
        self.number = number
        self.loop = SimLoop()
        self.desk = Desk()
        self.was_stored = bits_of(stored, geometry.extents)
        self.flags = HelloFlag(0)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.died: list[Runs] = []
        self.relies, self.destage_waits = False, False
        self.destages: list[Done] = []
        self.readings: list[Callable[[bitarray | None], None]] = []  # of the other's record
        self.reads_late = False
        self.writes: deque[tuple[Lasting, Callable[[OSError | None], None]]] = deque()
        self.on_change: Callable[[], None] = lambda: None
        self.cable = Cable()
        self.rights = Rights(geometry, number, self.loop, self.desk)
        self.desk.drop = self.rights.drop
        lasting = Lasting(not paired, 3, generations("a"), VOLUME)
        self.node = Node(number, lasting, self.rights, self.loop, self)
        self.desk.send = self._send  # type: ignore[method-assign]

    def _send(self, message: Message) -> int:
        return self.cable.send(message)

    # -- Surroundings -----------------------------------------------
    def store(self, lasting: Lasting, done: Callable[[OSError | None], None]) -> None:
        self.writes.append((lasting, done))

    def rely(self, on: bool) -> None:
        self.relies = on

    def destage(self, done: Done) -> bool:
        self.destages.append(done)
        return self.destage_waits

    def new_generation(self) -> bytes:
        return b"n" * 16

    def hello(self) -> Hello:
        return hello(self.number, flags=self.flags, size_bytes=self.rights.size_bytes)

    def stored(self) -> bitarray:
        return self.was_stored

    def partner_record(self, done: Callable[[bitarray | None], None]) -> None:
        self.readings.append(done)
        if not self.reads_late:
            self.read(None)

    def other_died(self, extents: Runs) -> None:
        self.died.append(extents)

    def changed(self) -> None:
        self.on_change()

    def emit(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    # -- the test's side --------------------------------------------
    def connect(self) -> None:
        self.cable = Cable()
        self.node.connected(self.cable)

    def write(self, error: OSError | None = None) -> Lasting:
        """The superblock is written."""
        lasting, done = self.writes.popleft()
        done(error)
        self.loop.run_soon()
        return lasting

    def read(self, found: Runs | None) -> None:
        """The other's record names these; or cannot be read."""
        bits = None if found is None else bits_of(found, len(self.rights.own))
        self.loop.call_soon(self.readings.pop(), bits)
        self.loop.run_soon()

    def told(self, event: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.events if name == event]

    def receive(self, *messages: Message) -> None:
        for message in messages:
            self.node.received(message, 1)
            self.loop.run_soon()

    def sent(self) -> list[Message]:
        found = [message for message, _ in self.cable.queue]
        self.cable.queue.clear()
        return found

    def land(self) -> None:
        landing, self.desk.landing = self.desk.landing, []
        for call in landing:
            call()
        self.loop.run_soon()


class Two:
    """Both, by default with superblocks of a pair that has met before."""

    def __init__(self, one: Station | None = None, two: Station | None = None) -> None:
        self.one = one or Station(1)
        self.two = two or Station(2)
        for station in (self.one, self.two):
            station.node.start()

    def connect(self) -> None:
        for station in (self.one, self.two):
            station.connect()

    def carry(self, *, most: int = 1000, write: bool = True) -> None:
        """Messages go both ways until there are none."""
        moved = True
        while moved and most:
            moved = False
            for here, there in ((self.one, self.two), (self.two, self.one)):
                here.loop.run_soon()
                here.land()
                if write and here.writes:
                    here.write()
                    moved = True
                if here.cable.queue and most:
                    message, sequence = here.cable.queue.popleft()
                    there.node.received(message, sequence)
                    there.loop.run_soon()
                    moved, most = True, most - 1

    def pair(self) -> None:
        self.connect()
        self.carry()
        assert self.one.node.state is State.PAIRED
        assert self.two.node.state is State.PAIRED

    def cut(self) -> None:
        for station in (self.one, self.two):
            station.node.lost()
            station.loop.run_soon()

    def own(self, station: Station, *extents: int) -> None:
        """It comes to own them, by asking."""
        for extent in extents:
            station.rights.want(extent, lambda error: True)
        self.carry()
        assert all(station.rights.held[extent] for extent in extents)


__all__ = ["Lasting", "Node", "Phase", "Proof", "State", "Station", "Two"]
