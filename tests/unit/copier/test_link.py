"""copier/reconnect without a copier: the search, and what its owner hears, in which order."""

from __future__ import annotations

import errno

from bitmapd.copier.reconnect import Reconnect
from bitmapd.copier.throttle import Backoff
from tests.support.mirror import Mirror


class Rig:
    """A link of a mirror whose own copier is never started; `told` holds what the owner hears."""

    def __init__(self) -> None:
        self.mirror = Mirror()
        self.secondary = self.mirror.secondary
        self.told: list[object] = []
        self.wants_link = True
        self.idle = True
        self.link = Reconnect(
            self.secondary,
            self.mirror.loop,
            Backoff(first_s=1.0, jitter=lambda: 0.0),
            lambda: self.mirror.refusal,
            self,
        )

    def replaced(self) -> None:
        self.told.append("replaced")

    def opened(self) -> None:
        self.told.append("opened")

    def not_opened(self, error: OSError) -> None:
        self.told.append(("not opened", error.errno, self.secondary.connected))

    def opens(self) -> int:
        return len(self.secondary.asked("open"))


def test_one_search_at_a_time_until_the_secondary_is_there() -> None:
    rig = Rig()
    rig.secondary.connected = False
    rig.secondary.fail_next = {"open": [errno.ECONNREFUSED]}
    rig.link.seek()
    rig.link.seek()
    assert rig.opens() == 0
    rig.mirror.run(1.0)
    assert rig.told == [("not opened", errno.ECONNREFUSED, False)]
    rig.link.seek()
    rig.mirror.run(2.0)
    rig.mirror.run(60.0)
    assert rig.told[1:] == ["replaced", "opened"]
    assert rig.opens() == 2


def test_waits_grow_until_the_secondary_has_proved_itself() -> None:
    rig = Rig()
    waits = []
    for _ in range(3):
        began_s = rig.mirror.loop.now_s
        rig.link.seek()
        while "open" not in rig.mirror.pending(rig.secondary):
            rig.mirror.loop.advance(0.5)
        waits.append(rig.mirror.loop.now_s - began_s)
        rig.mirror.run()
        if len(waits) == 2:
            rig.link.works()
    assert waits == [1.0, 2.0, 1.0], "that it could be opened proves nothing"


def test_nothing_is_opened_while_the_old_connection_is_busy_or_when_it_is_unwanted() -> None:
    rig = Rig()
    rig.idle = False
    rig.link.seek()
    rig.mirror.run(10.0)
    assert rig.secondary.calls == [], "neither closed nor opened"
    rig.idle = True
    rig.wants_link = False
    rig.mirror.run(10.0)
    assert rig.secondary.calls == []
    rig.wants_link = True
    rig.mirror.run(10.0)
    assert rig.secondary.calls == [], "that search is over"
    rig.link.seek()
    rig.mirror.run(10.0)
    assert [call[0] for call in rig.secondary.calls] == ["close", "open"]


def test_a_refused_medium_is_closed_before_the_owner_hears_of_it() -> None:
    rig = Rig()
    rig.mirror.refusal = OSError(errno.ENODEV, "another medium")
    rig.link.seek()
    rig.mirror.run(1.0)
    assert rig.told == [("not opened", errno.ENODEV, False)]
    rig.wants_link = False
    rig.mirror.loop.advance(1.0)
    rig.mirror.run()
    assert rig.told[1:] == []


def test_what_a_new_connection_means_is_settled_even_if_nobody_wants_it_any_more() -> None:
    rig = Rig()
    rig.secondary.connected = False
    rig.link.seek()
    rig.mirror.loop.advance(1.0)
    assert rig.link.seeking
    rig.wants_link = False  # a pause, or a stop
    rig.mirror.run()
    assert rig.told == ["replaced"]
    assert rig.secondary.connected
    assert not rig.link.seeking
