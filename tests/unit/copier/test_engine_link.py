"""copier/engine: errors of either side, the link that comes and goes, writes that come late."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from itertools import pairwise

import pytest

from bitmapd.copier.engine import MAX_REFUSED, CopyState
from bitmapd.copier.late import QUIET_S
from bitmapd.copier.transfers import Trouble
from bitmapd.media.buffers import aligned
from tests.support.mirror import BLOCK, LATE_S, PER_EXTENT, Mirror, begun, equal, until_reads
from tests.support.sim import SimOp, drain


@pytest.fixture
def mirror() -> Mirror:
    return begun()


# -- errors of the primary --------------------------------------------------------------------


def test_a_bad_block_holds_back_itself_alone(mirror: Mirror) -> None:
    mirror.put(0, 4)
    until_reads(mirror)
    mirror.fail(mirror.primary, errno.EIO)  # all four in one read
    event = mirror.told("copy-error")[0]
    assert (event["offset_bytes"], event["length_bytes"]) == (0, 4 * BLOCK)
    assert event["message"] == "cannot read the primary: simulated EIO"
    assert mirror.pending(mirror.primary) == ["read"] * 4, "one by one"
    mirror.fail(mirror.primary, errno.EIO, 1)
    mirror.run()
    assert mirror.secondary.asked("write") == [(0, 1), (2, 1), (3, 1)]
    assert list(mirror.gate.taken.runs()) == [(1, 2)]
    assert mirror.recorded() == {0}, "the block stays dirty, its extent in the record"
    assert mirror.copier.read_errors == 2
    assert mirror.copier.state is CopyState.RUNNING
    mirror.run(2.0)
    mirror.run(2.0)
    assert equal(mirror)
    assert mirror.recorded() == set()


# -- the link ---------------------------------------------------------------------------------


def test_a_lost_link_stops_nothing_but_copying(mirror: Mirror) -> None:
    changes: list[CopyState] = []
    mirror.copier.on_change = lambda: changes.append(mirror.copier.state)
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    assert mirror.copier.state is CopyState.LINK_DOWN
    (event,) = mirror.told("link-down")
    assert event["secondary"] == "secondary"
    assert event["message"] == "the secondary failed: simulated ENOTCONN"
    mirror.put(9)  # hosts notice nothing
    assert mirror.recorded() == {0, 2}
    assert mirror.secondary.asked("open") == []
    mirror.loop.advance(0.5)
    assert mirror.secondary.calls[-2:] == [("close", 0, 0), ("open", 0, 0)]
    mirror.run()
    assert mirror.told("link-up") == [{"event": "link-up", "secondary": "secondary"}]
    mirror.run(1.0)
    assert equal(mirror)
    assert changes[:2] == [CopyState.LINK_DOWN, CopyState.RUNNING]


def test_copies_that_were_not_flushed_when_the_link_went_are_made_again(mirror: Mirror) -> None:
    mirror.put(0, 12)
    until_reads(mirror)
    for _ in range(3):
        mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    assert not mirror.gate.is_dirty(0, 4)
    mirror.secondary.connected = False
    mirror.finish(mirror.secondary)
    mirror.secondary.connected = True
    mirror.finish(mirror.secondary)  # one that began before the failure, and succeeds after it
    mirror.secondary.connected = False
    assert mirror.gate.is_dirty(0, 4)
    assert mirror.gate.is_dirty(8, 12)
    before = len(mirror.secondary.asked("write"))
    mirror.run(0.5)
    mirror.run(1.0)
    assert sorted(mirror.secondary.asked("write")[before:]) == [(0, 4), (4, 4), (8, 4)]
    assert equal(mirror)


def test_every_write_of_a_copy_has_to_succeed(mirror: Mirror) -> None:
    mirror.put(0)
    mirror.put(1, fill=0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    assert len(mirror.secondary.pending) == 2
    mirror.fail(mirror.secondary, errno.EIO)
    assert mirror.copier.state is CopyState.RUNNING, "the other piece is still in flight"
    mirror.finish(mirror.secondary)
    assert mirror.told("secondary-error")[0]["offset_bytes"] == 0
    assert mirror.gate.is_dirty(0, 2)


def test_waits_between_attempts_grow_and_a_success_resets_them(mirror: Mirror) -> None:
    mirror.secondary.fail_next = {"open": [errno.ECONNREFUSED] * 3}
    mirror.secondary.connected = False
    mirror.put(0)
    at: list[float] = []
    for _ in range(200):
        mirror.loop.advance(0.25)
        if "open" in mirror.pending(mirror.secondary):
            at.append(mirror.loop.now_s)
        drain(mirror.loop, *mirror.disks)
    assert [round(b - a, 2) for a, b in pairwise(at)] == [1.0, 2.0, 4.0]
    assert mirror.gate.in_sync
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    lost_at = mirror.loop.now_s
    while "open" not in mirror.pending(mirror.secondary):
        mirror.loop.advance(0.25)
    assert mirror.loop.now_s - lost_at == 0.5


def test_reopening_waits_for_requests_of_the_old_connection(mirror: Mirror) -> None:
    mirror.put(0, 8)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    mirror.loop.advance(3.0)
    assert mirror.secondary.asked("open") == []
    mirror.finish(mirror.secondary)
    mirror.loop.advance(0.5)
    assert mirror.secondary.asked("open") == [(0, 0)]


def test_a_volume_may_start_without_its_secondary() -> None:
    mirror = Mirror()
    mirror.secondary.connected = False
    mirror.copier.start()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.put(0)
    mirror.run(0.5)
    mirror.run(1.0)
    assert mirror.copier.state is CopyState.RUNNING
    assert equal(mirror)


@pytest.mark.parametrize("hands_over", [False, True])
def test_eras_end_without_a_link_while_another_node_takes_over(
    mirror: Mirror, hands_over: bool
) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    mirror.copier.rounds.hands_over = hands_over
    mirror.put(9)
    mirror.loop.advance(1.1)  # the server does not answer
    assert mirror.copier.state is CopyState.LINK_DOWN
    assert list(mirror.gate.taken.runs()) == ([(0, 1), (9, 10)] if hands_over else [(0, 1)])


def test_a_wrong_secondary_is_never_written(mirror: Mirror) -> None:
    mirror.refusal = OSError(errno.ENODEV, "another medium")
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    mirror.secondary.calls.clear()
    for _ in range(8):
        mirror.run(1.0)
    assert mirror.copier.state is CopyState.LINK_DOWN
    assert mirror.copier.last_error is mirror.refusal
    assert len(mirror.secondary.asked("open")) > 2, "it is looked for again and again"
    assert not mirror.secondary.connected, "and let go of each time"
    for _ in range(4):  # a pause does not make it the right one
        mirror.copier.pause()
        mirror.run(1.0)
        mirror.copier.resume()
        mirror.run(1.0)
    assert mirror.secondary.asked("write") == []
    mirror.refusal = None
    mirror.run(30.0)
    mirror.run(2.0)
    assert equal(mirror)


def test_a_wrong_secondary_that_appears_during_a_pause(mirror: Mirror) -> None:
    mirror.secondary.connected = False
    mirror.put(0)
    mirror.run(1.0)
    mirror.loop.advance(0.5)
    assert mirror.pending(mirror.secondary) == ["open"]
    mirror.secondary.calls.clear()
    mirror.copier.pause()
    mirror.refusal = OSError(errno.ENODEV, "another medium")
    mirror.run()
    assert mirror.copier.state is CopyState.PAUSED
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run(2.0)
    assert mirror.secondary.asked("write") == []


def test_a_connection_can_be_made_anew(mirror: Mirror) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.copier.reconnect()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.copier.reconnect()
    mirror.run(0.5)
    mirror.run(0.5)
    mirror.run(1.0)
    assert mirror.secondary.asked("open") == [(0, 0)]
    assert mirror.told("link-down") == [], "nothing failed"
    assert equal(mirror)
    assert mirror.recorded() == set()


def test_a_pass_is_not_done_with_what_a_new_connection_makes_doubtful(mirror: Mirror) -> None:
    """As after a resize: nothing failed, but what was copied was not flushed over the old one."""
    mirror.policy.kept = set(range(8))
    mirror.put(0, 12)
    mirror.gate.take_era(lambda: None)
    mirror.turn()
    mirror.copier.begin_pass(compare=False)
    mirror.turn()
    for _ in range(3):
        mirror.finish(mirror.primary)
    mirror.finish(mirror.secondary)
    mirror.finish(mirror.secondary)
    left = mirror.copier.passes.remaining_bytes
    assert left == 4 * BLOCK
    mirror.copier.reconnect()
    mirror.finish(mirror.secondary)
    mirror.loop.advance(0.5)
    mirror.finish(mirror.secondary)  # it is open
    assert mirror.copier.passes.remaining_bytes == 12 * BLOCK
    mirror.run(1.0)
    assert not mirror.copier.passes.under_way
    assert equal(mirror)


# -- a server that carries out late what it had received --------------------------------------


@pytest.fixture
def late() -> Mirror:
    """A connection was lost with the write of block 0 in flight, and has been made anew."""
    mirror = begun()
    mirror.secondary.writes_late = True
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.secondary.lose_connection()
    mirror.run(0.5)
    mirror.run()
    return mirror


def overtake(mirror: Mirror) -> None:
    """The old write is carried out at last."""
    buffer = aligned(BLOCK)
    buffer[:] = b"\1" * BLOCK
    mirror.secondary.write(0, buffer, lambda error: None)
    mirror.secondary.finish(-1)


def test_what_a_server_may_write_late_is_copied_once_more(late: Mirror) -> None:
    late.put(0, fill=2)
    late.run(1.0)
    assert equal(late)
    overtake(late)
    late.run(QUIET_S / 2)
    assert late.recorded() == {0}, "nobody may take it for clean"
    assert late.gate.may_differ(0, 1)
    assert not late.gate.in_sync
    late.run(QUIET_S)
    late.run(1.0)
    assert equal(late)
    assert late.gate.in_sync
    assert late.recorded() == {0}, "an older one may still come"
    overtake(late)
    assert not equal(late)
    late.run(LATE_S)
    late.run(2.0)
    assert equal(late)
    assert late.recorded() == set()


def test_a_copy_in_flight_when_the_time_is_over_does_not_count(late: Mirror) -> None:
    late.loop.advance(QUIET_S - 1.5)
    late.put(0, fill=2)
    until_reads(late)
    late.finish(late.primary)
    assert late.pending(late.secondary) == ["write"]
    late.loop.advance(1.0)
    late.finish(late.secondary)
    overtake(late)  # before the time was over; what the copy had written is gone with it
    late.run(2.0)
    late.run(1.0)
    assert equal(late)


def test_a_device_that_ends_its_writes_is_not_waited_for(mirror: Mirror) -> None:
    mirror.put(0)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.run(0.5)
    mirror.run(1.0)  # a place that was refused waits before it is tried again
    assert mirror.gate.in_sync


def test_a_pause_does_not_forget_what_may_come_late(late: Mirror) -> None:
    late.copier.pause()
    late.run(QUIET_S + 1.0)
    overtake(late)
    assert late.gate.is_dirty(0, 1)
    assert late.recorded() == {0}
    late.copier.resume()
    late.run(2.0)
    assert equal(late)


def test_a_connection_lost_while_there_was_nothing_to_do_is_noticed(mirror: Mirror) -> None:
    mirror.secondary.connected = False
    mirror.loop.advance(1.0)
    assert mirror.copier.state is CopyState.LINK_DOWN
    assert "the connection was lost" in mirror.told("link-down")[0]["message"]
    mirror.run(0.5)
    assert mirror.copier.state is CopyState.RUNNING


def refuse_writes(
    mirror: Mirror, refused: Callable[[SimOp], bool], number: int = errno.EIO
) -> None:
    """The secondary answers these writes with an error, and stays connected."""
    disk = mirror.secondary

    def finish(index: int = 0) -> None:
        op = disk.pending[index]
        disk.fail_next = {"write": [number]} if op.kind == "write" and refused(op) else {}
        type(disk).finish(disk, index)

    disk.finish = finish  # type: ignore[method-assign]


def test_a_place_that_can_never_be_written_holds_back_itself_only(mirror: Mirror) -> None:
    bad = 5 * BLOCK
    refuse_writes(mirror, lambda op: op.offset_bytes <= bad < op.offset_bytes + len(op.data))
    mirror.put(0, 12)
    for _ in range(60):
        mirror.run(1.0)
    assert list(mirror.gate.taken.runs()) == [(5, 6)]
    assert mirror.recorded() == {5 // PER_EXTENT}
    assert mirror.copier.stuck
    assert mirror.copier.transfers.troubles == {Trouble.REFUSED}
    assert len(mirror.told("secondary-error")) < 12, "it is tried less and less often"
    assert mirror.told("link-down") == []
    refuse_writes(mirror, lambda op: False)
    for _ in range(70):
        mirror.run(1.0)
    assert not mirror.copier.stuck
    assert mirror.gate.in_sync
    assert equal(mirror)


def test_errors_now_and_then_delay_copying_and_do_not_stop_it(mirror: Mirror) -> None:
    """Every eighth write fails: there are never as many in a row as there is to copy."""
    count = itertools.count(1)
    refuse_writes(mirror, lambda op: next(count) % 8 == 0)
    for extent in range(8):
        mirror.put(extent * PER_EXTENT, 1)
        mirror.put(extent * PER_EXTENT + 2, 1)
    for _ in range(60):
        mirror.run(1.0)
    assert mirror.told("secondary-error")
    assert mirror.told("link-down") == []
    assert mirror.gate.in_sync
    assert equal(mirror)


def test_many_errors_with_successes_between_them_interrupt_no_link(mirror: Mirror) -> None:
    count = itertools.count(1)
    refuse_writes(mirror, lambda op: next(count) % 3 == 0)
    for round_ in range(12):
        for block in range(0, 32, 2):
            mirror.put(block, fill=1 + round_)
        mirror.run(1.0)
    for _ in range(120):
        mirror.run(1.0)
    assert len(mirror.told("secondary-error")) > 2 * MAX_REFUSED
    assert mirror.told("link-down") == []
    assert equal(mirror)


def test_a_disk_that_refuses_everything_is_opened_again(mirror: Mirror) -> None:
    """One that was pulled out and has come back answers only who opens it again."""
    refuse_writes(mirror, lambda op: mirror.secondary.calls.count(("open", 0, 0)) == 0)
    mirror.put(0, 1)
    for _ in range(300):
        mirror.run(1.0)
    assert len(mirror.told("secondary-error")) == MAX_REFUSED - 1
    assert len(mirror.told("link-down")) == len(mirror.told("link-up")) == 1
    assert mirror.copier.transfers.troubles == set()
    assert equal(mirror)


def test_a_full_secondary_takes_what_has_its_room_and_goes_on_with_the_rest(mirror: Mirror) -> None:
    full = True
    number = errno.ENOSPC
    refuse_writes(mirror, lambda op: full and op.offset_bytes >= 4 * BLOCK, number)
    mirror.put(0, 12)
    for _ in range(600):
        mirror.run(1.0)
    assert mirror.copier.transfers.troubles == {Trouble.NO_ROOM}
    assert mirror.copier.state is CopyState.RUNNING
    assert mirror.told("link-down") == []
    assert mirror.recorded() == {1, 2}
    full = False
    for _ in range(70):
        mirror.run(1.0)
    assert mirror.copier.transfers.troubles == set()
    assert mirror.gate.in_sync
    assert equal(mirror)
