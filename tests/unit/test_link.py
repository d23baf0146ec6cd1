"""copier/link without a copier: the search, and what its owner is told, in which order."""

from __future__ import annotations

import errno

from bitmapd.copier.reconnect import LATE_WRITES_S, Link
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
        self.link = Link(
            self.mirror.gate,
            self.secondary,
            self.mirror.loop,
            Backoff(first_s=1.0, jitter=lambda: 0.0),
            lambda: self.mirror.refusal,
            self,
        )

    def opened(self) -> None:
        self.told.append(("opened", self.mirror.gate.may_differ(0, 1)))

    def not_opened(self, error: OSError) -> None:
        self.told.append(("not opened", error.errno, self.secondary.connected))

    def proceed(self) -> None:
        self.told.append(("proceed", self.mirror.loop.now_s))

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
    assert rig.told[1:] == [("opened", False)]
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


def test_what_may_come_late_is_held_before_the_first_copy_and_dirty_afterwards() -> None:
    rig = Rig()
    rig.secondary.writes_late = True
    rig.link.not_written(0, 1)
    rig.link.seek()
    rig.mirror.run(1.0)
    assert rig.told == [("opened", True)]
    assert not rig.mirror.gate.is_dirty(0, 1)
    rig.mirror.run(LATE_WRITES_S)
    assert rig.told[1:] == [("proceed", 1.0 + LATE_WRITES_S)]
    assert list(rig.mirror.gate.current.runs()) == [(0, 1)]


def test_a_device_that_ends_its_writes_leaves_nothing_to_wait_for() -> None:
    rig = Rig()
    rig.link.not_written(0, 1)
    rig.link.predecessor_died()
    assert rig.link.may_copy(0.0)
    rig.link.seek()
    rig.mirror.run(LATE_WRITES_S + 2.0)
    assert rig.told == [("opened", False)]


def test_after_a_process_that_died_the_first_copy_waits() -> None:
    rig = Rig()
    rig.secondary.writes_late = True
    assert rig.link.may_copy(0.0)
    rig.link.predecessor_died()
    assert not rig.link.may_copy(LATE_WRITES_S - 0.001)
    assert rig.link.may_copy(LATE_WRITES_S)
    rig.mirror.run(LATE_WRITES_S)
    assert rig.told == [("proceed", LATE_WRITES_S)]
