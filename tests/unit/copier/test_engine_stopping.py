"""copier/engine: pause, resume, stop."""

from __future__ import annotations

import errno

import pytest

from bitmapd.copier.engine import CopyState
from tests.support.mirror import BLOCK, Mirror, begun, equal, until_reads


@pytest.fixture
def mirror() -> Mirror:
    return begun()


# -- pause, resume, stop ----------------------------------------------------------------------


def test_a_pause_lets_what_is_in_flight_finish_and_starts_nothing(mirror: Mirror) -> None:
    mirror.put(0, 2)
    until_reads(mirror)
    mirror.copier.pause()
    mirror.write(9)
    mirror.run(3.0)
    assert mirror.secondary.asked("write") == [(0, 2)]
    assert mirror.copier.state is CopyState.PAUSED
    assert mirror.recorded() == {0, 2}, "writes go on, the record grows"
    mirror.copier.resume()
    mirror.run(1.0)
    assert equal(mirror)
    assert mirror.recorded() == set()


def test_resuming_what_is_not_paused_does_nothing(mirror: Mirror) -> None:
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.RUNNING


def test_resuming_without_a_secondary_looks_for_it(mirror: Mirror) -> None:
    mirror.copier.pause()
    mirror.secondary.connected = False
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run(0.5)
    assert mirror.copier.state is CopyState.RUNNING


def test_a_pause_ends_the_search_and_a_resume_begins_it_again(mirror: Mirror) -> None:
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.copier.pause()
    mirror.run(30.0)
    assert mirror.secondary.asked("open") == []
    mirror.copier.resume()
    mirror.run(2.0)
    mirror.run(1.0)
    assert equal(mirror)


def test_an_error_during_a_pause_takes_back_the_copies_beside_it(mirror: Mirror) -> None:
    mirror.put(0, 8)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.primary)
    mirror.copier.pause()
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.finish(mirror.secondary)
    assert mirror.copier.state is CopyState.PAUSED
    assert mirror.told("link-down") == []
    assert mirror.gate.is_dirty(0, 4)
    assert mirror.gate.is_dirty(4, 8)
    mirror.copier.resume()
    mirror.run(1.0)
    assert equal(mirror)


def test_stopping_waits_for_copies_and_for_the_settle(mirror: Mirror) -> None:
    stopped: list[bool] = []
    mirror.put(0)
    until_reads(mirror)
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.turn()
    assert stopped == []
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert stopped == [True]
    assert mirror.pending(mirror.secondary) == [], "nothing is begun any more"
    assert mirror.recorded() == {0}, "copied and not flushed"
    mirror.copier.pause()
    assert mirror.copier.state is CopyState.STOPPED
    mirror.run(10.0)
    assert mirror.secondary.asked("write") == [(0, 1)]


def test_stopping_during_the_settle(mirror: Mirror) -> None:
    stopped: list[bool] = []
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.finish(mirror.secondary)
    assert stopped == []
    mirror.finish(mirror.primary)
    assert stopped == [True]
    assert mirror.recorded() == set()


def test_stopping_during_the_barrier(mirror: Mirror) -> None:
    stopped: list[bool] = []
    mirror.put(0)
    mirror.write(0)
    mirror.loop.advance(1.0)
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.turn()
    assert stopped == []
    mirror.finish(mirror.primary)
    assert stopped == [True]
    assert mirror.primary.asked("read") == []


def test_stopping_what_was_not_started_and_while_the_secondary_is_sought() -> None:
    mirror = Mirror()
    stopped: list[int] = []
    mirror.copier.stop(lambda: stopped.append(1))
    assert stopped == [], "not inside the call"
    mirror.turn()
    other = Mirror()
    other.secondary.connected = False
    other.copier.start()
    other.loop.advance(0.5)
    other.copier.stop(lambda: stopped.append(2))
    other.run()
    assert stopped == [1, 2]
    assert other.copier.state is CopyState.STOPPED
    other.run(60.0)
    assert other.secondary.asked("open") == [(0, 0)], "it is looked for no more"


def test_stopping_cancels_a_wait_for_the_throttle() -> None:
    mirror = begun(rate_bytes_per_s=BLOCK)
    mirror.put(0, 12)
    mirror.run(1.0)
    assert len(mirror.secondary.asked("write")) == 1
    stopped: list[bool] = []
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.run(60.0)
    assert stopped == [True]
    assert len(mirror.secondary.asked("write")) == 1
