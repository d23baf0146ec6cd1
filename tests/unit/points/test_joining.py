"""The first receiver after a promotion: nothing is sent before its differences are recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bitmapd.copier.throttle import SpeedMeter, Throttle
from bitmapd.media.base import Done
from bitmapd.net.uri import is_remote
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.points.lineage import Verdict
from bitmapd.points.messages import NIL, Feature, Have, Hello2, Map, Message
from bitmapd.points.spool import Spool
from bitmapd.points.uplink import Uplink
from bitmapd.record.geometry import Geometry
from tests.unit.points.homes import GENERATION, IDENTITY, OURS, Home, hello

OLD = b"o" * 16
GEOMETRY = Geometry(8 << 20, 1 << 20, 1 << 16)
PROMOTED = replace(IDENTITY, generations=(GENERATION, OLD, NIL, NIL), committed=0, promoted=True)


class Wire:
    has_room = True

    def __init__(self) -> None:
        self.error: PeerError | None = None
        self.is_open = True

    def send(self, message: Message) -> int:
        return 1

    def greeted(self, geometry: Geometry) -> None: ...

    def read(self, on: bool) -> None: ...

    def close(self, error: PeerError | None = None) -> None:
        self.error, self.is_open = error, False


class Owner:
    """Records when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Runs, Done]] = []
        self.links = 0
        self.comparing: list[Callable[[], None]] = []

    def compare(self, done: Callable[[], None]) -> None:
        self.comparing.append(done)

    def differs(self, extents: Runs, done: Done) -> None:
        self.asked.append((extents, done))

    def linked(self, lost: list[int]) -> None:
        self.links += 1

    def committed(self) -> None: ...

    def needed(self, runs: Runs) -> None: ...

    def not_followed(self, verdict: Verdict, receiver: Hello2) -> None: ...

    def unlinked(self, reason: str) -> None: ...

    def other(self, message: Message) -> None: ...


class Ends:
    def __init__(self) -> None:
        self.owner = Owner()
        self.uplink = Uplink(
            GEOMETRY, PROMOTED, Spool(1 << 20), Throttle(None), SpeedMeter(), self.owner,
            soon=lambda work: work(), compress=False,
        )  # fmt: skip

    def greet(self, generation: bytes, features: Feature = Feature.ZSTD) -> Wire:
        """Up to the last HAVE."""
        wire = Wire()
        self.uplink.connected(wire)
        theirs = hello(committed=0, generations=(generation, NIL, NIL, NIL), features=features)
        self.uplink.received(wire, theirs)
        self.uplink.received(wire, Have(0, OURS, (), True))
        return wire


@pytest.fixture
def ends() -> Ends:
    return Ends()


def test_an_old_primary_says_where_it_may_differ_before_anything_is_sent(ends: Ends) -> None:
    wire = ends.greet(OLD)
    assert (ends.owner.asked, ends.owner.links) == ([], 0)
    ends.uplink.received(wire, Map(((2, 5),)))
    ((extents, recorded),) = ends.owner.asked
    assert (extents, ends.owner.links) == (((2, 5),), 0)
    recorded(None)
    assert ends.owner.links == 1
    assert ends.uplink.is_ready
    ends.uplink.received(wire, Map(((6, 7),)))  # said once more: it was taken
    assert len(ends.owner.asked) == 1
    ends.greet(OLD)  # what was recorded stays recorded
    assert (len(ends.owner.asked), ends.owner.links) == (1, 2)


@pytest.mark.parametrize("generation", [NIL, GENERATION])
def test_of_whom_nobody_knows_where_it_differs_differs_everywhere(
    ends: Ends, generation: bytes
) -> None:
    ends.greet(generation)
    ((extents, recorded),) = ends.owner.asked
    assert extents == ((0, GEOMETRY.extents),)
    recorded(None)
    assert ends.owner.links == 1


def test_a_record_that_cannot_be_written_ends_the_connection(ends: Ends) -> None:
    wire = ends.greet(OLD)
    ends.uplink.received(wire, Map(((0, 1),)))
    ends.owner.asked[0][1](OSError(5, "broken"))
    assert wire.error is not None
    assert wire.error.code == ErrorCode.INTERNAL
    assert ends.owner.links == 0
    again = ends.greet(OLD)
    ends.uplink.received(again, Map(((0, 1),)))
    assert len(ends.owner.asked) == 2  # it has to be said again


def test_what_is_recorded_after_the_connection_was_lost_counts_for_the_next(ends: Ends) -> None:
    wire = ends.greet(OLD)
    ends.uplink.received(wire, Map(((0, 1),)))
    ends.uplink.lost(wire, "cut")
    ends.owner.asked[0][1](None)
    assert ends.owner.links == 0
    ends.greet(OLD)
    assert (len(ends.owner.asked), ends.owner.links) == (1, 1)


def test_what_is_recorded_is_compared_before_anything_is_sent(ends: Ends) -> None:
    wire = ends.greet(OLD, Feature.PIECES)
    ends.uplink.received(wire, Map(((2, 5),)))
    ends.owner.asked[0][1](None)
    (compared,) = ends.owner.comparing
    assert not ends.uplink.is_ready
    ends.uplink.lost(wire, "cut")
    compared()  # of a connection that is gone
    assert ends.owner.links == 0
    ends.greet(OLD, Feature.PIECES)  # goes on where it was
    assert ends.owner.links == 0
    ends.owner.comparing[1]()
    assert ends.owner.links == 1


def test_the_sender_has_what_a_receiver_lacks_recorded_and_sent() -> None:
    home = Home(identity=PROMOTED)
    home.sender.start()
    home.connect()
    home.say(hello(generations=(OLD, NIL, NIL, NIL)))
    home.say(Have(0, OURS, (), True))
    home.say(Map(((1, 3), (4, 5))))
    home.run(1.0)
    assert home.recorded() == {1, 2, 4}
    assert home.sender.uplink.is_ready


def test_nothing_to_be_recorded_is_recorded_at_once() -> None:
    home = Home(identity=PROMOTED)
    home.sender.start()
    home.connect()
    home.say(hello(generations=(OLD, NIL, NIL, NIL)))
    home.say(Have(0, OURS, (), True))
    home.say(Map(()))
    home.run(1.0)
    assert home.recorded() == set()
    assert home.sender.uplink.is_ready


def test_a_receiver_that_is_not_followed_is_reported() -> None:
    home = Home()
    heard: list[Verdict] = []
    home.sender.on_not_followed = lambda verdict, receiver: heard.append(verdict)
    home.sender.start()
    home.connect()
    home.say(hello(generations=(OLD, GENERATION, NIL, NIL)))
    assert heard == [Verdict.SENDER_IS_OLD]


def test_what_is_reached_over_a_socket() -> None:
    assert is_remote("nbd://a/b")
    assert is_remote("receiver+tls://a/b")
    assert not is_remote("/dev/sda")
