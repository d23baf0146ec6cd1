"""copier/late: what a lost connection or a dead process left on its way stays recorded (rule 2)."""

from __future__ import annotations

import errno

import pytest

from bitmapd.copier.engine import CopyState
from bitmapd.copier.late import QUIET_S
from bitmapd.errors import Unanswered
from tests.support.mirror import BLOCK, EXTENT, LATE_S, Mirror, begun, equal, until_reads
from tests.support.sim import SimOp, drain


def lost_on_its_way(*, late: bool = True) -> tuple[Mirror, SimOp]:
    """The connection was lost with the first version of block 2 in flight; the host has written a
    second one since."""
    mirror = begun()
    mirror.secondary.writes_late = late
    mirror.put(2, fill=1)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    (stuck,) = mirror.secondary.pending
    mirror.secondary.pending.clear()
    mirror.secondary.connected = False
    stuck.done(Unanswered(errno.ENOTCONN, "the connection was lost"))
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.put(2, fill=2)
    return mirror, stuck


def land(mirror: Mirror, stuck: SimOp) -> None:
    """The server carries the old write out at last."""
    for side in (mirror.secondary.visible, mirror.secondary.durable):
        side[stuck.offset_bytes : stuck.offset_bytes + len(stuck.data)] = stuck.data


def until_opening(mirror: Mirror) -> None:
    """The search has come to the point where the secondary is being opened."""
    while "open" not in mirror.pending(mirror.secondary):
        mirror.loop.advance(0.25)
        drain(mirror.loop, mirror.primary, mirror.record)
    assert mirror.pending(mirror.secondary) == ["open"]


def seconds(mirror: Mirror, count: float) -> None:
    for _ in range(int(count)):
        mirror.run(1.0)
        mirror.gate.tick()
        mirror.run()


def test_a_write_that_lands_after_a_long_time_finds_its_place_recorded() -> None:
    mirror, stuck = lost_on_its_way()
    seconds(mirror, 40)
    assert mirror.gate.in_sync, "for as much as can be known"
    assert mirror.gate.suspect_blocks == 1
    assert not mirror.gate.is_clean(0)
    assert mirror.stored() == {0}
    land(mirror, stuck)
    assert not equal(mirror)
    seconds(mirror, LATE_S)
    assert equal(mirror)
    assert mirror.gate.suspect_blocks == 0
    assert mirror.stored() == set()


def test_nothing_is_in_sync_while_it_is_likely_that_something_lands() -> None:
    mirror, stuck = lost_on_its_way()
    seconds(mirror, 3)
    assert equal(mirror)
    assert not mirror.gate.in_sync
    land(mirror, stuck)
    seconds(mirror, QUIET_S + 1)
    assert mirror.gate.in_sync
    assert equal(mirror)


@pytest.mark.parametrize("when", ["while it is opened", "before the search", "over the whole time"])
def test_a_pause_at_any_moment_does_not_forget_it(when: str) -> None:
    mirror, stuck = lost_on_its_way()
    if when == "before the search":
        mirror.copier.pause()
        mirror.run(1.0)
        assert mirror.secondary.asked("open") == []
        mirror.copier.resume()
    until_opening(mirror)
    if when != "before the search":
        mirror.copier.pause()
    mirror.finish(mirror.secondary)
    if when == "over the whole time":
        seconds(mirror, QUIET_S + LATE_S)
        assert mirror.stored() == {0}
    mirror.copier.resume()
    seconds(mirror, 3)
    if when != "over the whole time":
        land(mirror, stuck)
        assert mirror.stored() == {0}
    seconds(mirror, QUIET_S + LATE_S)
    assert equal(mirror)
    assert mirror.stored() == set()


def test_a_stop_while_it_is_opened_leaves_it_in_the_record() -> None:
    mirror, _ = lost_on_its_way()
    until_opening(mirror)
    mirror.copier.stop(lambda: None)
    mirror.finish(mirror.secondary)
    mirror.gate.drop_all_clean()
    mirror.store.flush_clears()
    mirror.run()
    assert mirror.stored() == {0}


def test_what_was_copied_and_not_flushed_is_forgotten_even_if_a_pause_met_the_opening() -> None:
    mirror = begun()
    mirror.put(2)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.copier.pause()
    mirror.finish(mirror.secondary)
    assert mirror.gate.has_copied, "and not flushed, for that is no work of a pause"
    mirror.secondary.connected = False
    mirror.copier.resume()
    until_opening(mirror)
    mirror.copier.pause()
    mirror.finish(mirror.secondary)
    assert not mirror.gate.has_copied
    assert mirror.gate.is_dirty(2, 3)


def test_a_device_that_is_being_opened_is_not_taken_for_opened() -> None:
    """A device may count as connected before its opening was reported."""
    mirror, _ = lost_on_its_way()
    until_opening(mirror)
    mirror.copier.pause()
    mirror.secondary.connected = True
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.LINK_DOWN
    mirror.run()
    assert mirror.copier.state is CopyState.RUNNING


def test_a_disk_that_fails_and_is_not_opened_again_is_covered_as_well() -> None:
    mirror = begun()
    mirror.secondary.writes_late = True
    mirror.put(2, fill=1)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    (stuck,) = mirror.secondary.pending
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.put(2, fill=2)
    mirror.copier.pause()
    mirror.run(5.0)  # the search ends, for nobody wants the secondary
    mirror.copier.resume()
    assert mirror.copier.state is CopyState.RUNNING
    seconds(mirror, 30)
    assert mirror.stored() == {0}
    land(mirror, stuck)
    seconds(mirror, LATE_S)
    assert equal(mirror)
    assert mirror.stored() == set()


def test_everything_that_one_connection_lost_is_one_doubt() -> None:
    mirror = begun()
    mirror.secondary.writes_late = True
    mirror.put(0, 2 * EXTENT // BLOCK, fill=1)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    mirror.finish(mirror.primary)
    mirror.secondary.connected = False
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    assert mirror.gate.suspect_blocks == 2 * EXTENT // BLOCK
    seconds(mirror, QUIET_S + LATE_S)
    assert mirror.gate.suspect_blocks == 0
    assert mirror.stored() == set()
    assert equal(mirror)


def test_a_second_loss_has_a_time_of_its_own() -> None:
    mirror, _ = lost_on_its_way()
    seconds(mirror, LATE_S / 2)
    mirror.put(20, fill=3)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    (stuck,) = mirror.secondary.pending
    mirror.secondary.lose_connection()
    mirror.put(20, fill=4)
    seconds(mirror, LATE_S - 5)
    assert mirror.stored() == {5}, "the first is over"
    land(mirror, stuck)
    seconds(mirror, 10)
    assert equal(mirror)
    assert mirror.stored() == set()


@pytest.mark.parametrize("late", [False, True])
def test_who_ends_a_connection_before_the_next_one_leaves_nothing_to_wait_for(late: bool) -> None:
    mirror, _ = lost_on_its_way(late=late)
    mirror.copier.late.bound_s = 0.0
    seconds(mirror, 3)
    assert mirror.gate.in_sync
    assert mirror.stored() == set()


# -- a process that died ----------------------------------------------------------------------


def successor(*, bound_s: float = LATE_S, connected: bool = True) -> Mirror:
    """A process starts, with extents 0 and 1 in the record."""
    mirror = Mirror()
    mirror.secondary.writes_late = True
    mirror.secondary.connected = connected
    mirror.put(0, EXTENT // BLOCK, fill=1)
    mirror.put(EXTENT // BLOCK, EXTENT // BLOCK, fill=1)
    mirror.copier.late.bound_s = bound_s
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False, predecessor=True)
    mirror.copier.start()
    return mirror


def test_everything_recorded_is_suspect_after_a_process_that_died() -> None:
    mirror = successor()
    seconds(mirror, QUIET_S - 1)
    assert mirror.copier.copied_bytes == 0
    seconds(mirror, 3)
    assert not mirror.copier.passes.under_way
    assert mirror.gate.in_sync
    assert equal(mirror)
    mirror.secondary.durable[0:BLOCK] = mirror.secondary.visible[0:BLOCK] = b"old!" * (BLOCK // 4)
    assert mirror.stored() == {0, 1}
    seconds(mirror, LATE_S)
    assert equal(mirror)
    assert mirror.stored() == set()


def test_its_time_runs_from_when_the_secondary_is_there() -> None:
    mirror = successor(connected=False)
    mirror.secondary.fail_next = {"open": [errno.ECONNREFUSED] * 6}
    seconds(mirror, 2 * LATE_S)
    assert mirror.copier.state is CopyState.RUNNING
    assert mirror.stored() == {0, 1}
    seconds(mirror, 2 * LATE_S)
    assert equal(mirror)
    assert mirror.stored() == set()


def test_without_a_bound_nobody_waits() -> None:
    mirror = successor(bound_s=0.0)
    seconds(mirror, 2)
    assert equal(mirror)
    assert mirror.stored() == set()


def test_a_short_bound_is_all_that_is_waited_for() -> None:
    mirror = successor(bound_s=2.0)
    seconds(mirror, 1)
    assert mirror.copier.copied_bytes == 0
    seconds(mirror, 5)
    assert equal(mirror)
    assert mirror.stored() == set()


@pytest.mark.parametrize("twice", [False, True])
def test_what_another_node_had_copied_is_suspect_once_it_is_ours(twice: bool) -> None:
    """It had writes on their way to the secondary when it died; its extents are dirty here."""
    mirror = begun()
    mirror.secondary.writes_late = True
    mirror.put(0, 8, fill=3)  # extents 0 and 1
    mirror.copier.late.other_node_died([(0, 1)] if twice else [(0, 2)])
    if twice:
        mirror.copier.late.other_node_died([(1, 2)])
    mirror.copier.late.arrived()
    assert mirror.gate.suspect_blocks == 8
    seconds(mirror, QUIET_S - 1)
    assert mirror.copier.copied_bytes == 0, "what the dead one had sent lands first"
    seconds(mirror, 3)
    assert equal(mirror)
    mirror.secondary.durable[0:BLOCK] = mirror.secondary.visible[0:BLOCK] = b"old!" * (BLOCK // 4)
    assert mirror.stored() == {0, 1}
    seconds(mirror, LATE_S)
    assert equal(mirror)
    assert mirror.stored() == set()


def test_a_server_that_ends_its_connections_leaves_nothing_of_another_node() -> None:
    mirror = begun()
    mirror.copier.late.bound_s = 0.0
    mirror.put(0, fill=3)
    mirror.copier.late.other_node_died([(0, 1)])
    assert mirror.gate.suspect_blocks == 0
    seconds(mirror, 3)
    assert equal(mirror)
