"""The sender: what is read for a point, when it ends, when it counts, what hosts wait for."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest

from bitmapd.copier import transfers
from bitmapd.copier.engine import CopyState
from bitmapd.copier.throttle import Throttle
from bitmapd.gate.cycle import PATIENCE_S, Void
from bitmapd.points import sender, uplink
from bitmapd.points.messages import (
    Applied,
    ApplyUpTo,
    Begin,
    Committed,
    Credit,
    Data,
    End,
    Feature,
    Hello2,
    Need,
)
from bitmapd.points.overflow import BATCH_BYTES
from bitmapd.points.sender import Phase
from bitmapd.record.geometry import Geometry
from tests.support.mirror import BLOCK, EXTENT
from tests.support.sim import SimDisk, drain
from tests.unit.points.homes import EXTENTS, OURS, Home, begun


def cutting(home: Home) -> None:
    """A cut is open, its reads are asked for, and none has ended."""
    home.sender.cut()
    home.turn()
    assert home.sender.phase is Phase.READING


# -- a point ------------------------------------------------------------------------------------


def test_what_is_dirty_is_read_sent_ended_and_then_leaves_the_record() -> None:
    home = begun()
    home.put(1, 2)
    home.put(9)
    assert home.recorded() == {0, 2}
    home.run(1.0)
    told = home.told()
    assert [type(message) for message in told] == [Begin, Data, Data, Begin, End]
    assert not home.sender.in_sync
    home.commit(1)
    assert home.ledger.points == [1]
    assert home.recorded() == set()
    assert home.sender.in_sync
    assert home.sender.points == 1
    assert home.names() == ["link-up", "point-committed"]


def test_the_primary_is_flushed_after_the_end_and_before_anything_is_settled() -> None:
    home = begun()
    home.put(1)
    cutting(home)
    home.finish("read")
    assert [op.kind for op in home.primary.pending] == ["flush"]
    home.say(Committed(1, OURS))
    assert home.ledger.points == [], "not before it was flushed"
    assert not home.sender.idle
    home.finish("flush")
    assert home.ledger.points == [1]
    assert home.recorded() == {0}, "not before the record names the point"
    assert not home.sender.idle
    home.ledger.finish()
    home.turn()
    assert home.recorded() == set()
    assert home.sender.idle


def test_a_point_that_the_record_cannot_name_is_sent_again() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    home.run(1.0)
    home.say(Committed(1, OURS))
    home.ledger.finish(OSError(errno.EIO, "no superblock"))
    home.turn()
    assert home.sender.last_error is not None
    assert home.recorded() == {0}
    home.told()
    home.run(2.0)
    assert sorted(home.blocks()) == [0, 1, 2, 3], (
        "of the whole extent, since blocks are known no more"
    )


def test_a_flush_that_fails_has_all_of_it_read_again() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    cutting(home)
    home.finish("read")
    home.primary.fail_next = {"flush": [errno.EIO]}
    home.finish("flush")
    home.commit(1)
    assert home.recorded() == {0}
    assert home.names() == ["link-up", "copy-error", "point-committed"]
    assert home.sender.primary_failed_s == home.loop.time()
    home.told()
    home.run(3.0)
    assert sorted(home.blocks()) == [0, 1, 2, 3]
    home.commit(2)
    assert home.recorded() == set()


def test_a_flush_of_a_host_that_fails_counts_for_what_was_read_before() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    cutting(home)
    home.finish("read")
    home.finish("flush")
    home.primary.fail_next = {"flush": [errno.EIO]}
    home.gate.flush(lambda error: None)
    home.run()
    home.commit(1)
    assert home.recorded() == {0}


def test_a_flush_that_fails_while_a_point_is_stored_takes_it_back() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    home.run(1.0)
    home.say(Committed(1, OURS))
    home.primary.fail_next = {"flush": [errno.EIO]}
    home.gate.flush(lambda error: None)
    home.run()
    home.ledger.finish()
    home.turn()
    assert home.recorded() == {0}
    assert home.gate.taken.any(1, 2)


def test_reads_that_are_in_flight_when_a_flush_fails_do_not_count() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    cutting(home)
    home.primary.fail_next = {"flush": [errno.EIO]}
    home.gate.flush(lambda error: None)
    home.finish("flush")
    assert home.sender.phase is Phase.OPEN, "the cut is given up"
    home.finish("read")
    assert home.gate.taken.any(1, 2)
    assert home.blocks() == []
    home.run(2.0)
    assert home.blocks() == [0, 1, 2, 3] or home.gate.in_sync is False


def test_a_flush_that_fails_while_the_spool_is_sent_gives_the_point_up() -> None:
    home = begun(interval_s=1.0)
    home.wire.has_room = False
    home.put(1)
    cutting(home)
    home.finish("read")
    assert home.sender.phase is Phase.SENDING
    home.primary.fail_next = {"flush": [errno.EIO]}
    home.gate.flush(lambda error: None)
    home.run()
    assert home.sender.phase is Phase.OPEN
    assert home.sender.voids[Void.FLUSH_ERROR] == 1
    assert home.gate.taken.any(1, 2)


def test_nothing_is_cut_when_nothing_has_changed_unless_somebody_asks() -> None:
    home = begun(interval_s=1.0)
    home.run(60.0)
    assert home.told() == []
    home.sender.cut("release 7")
    home.run()
    begin, end = home.told()
    assert isinstance(begin, Begin)
    assert begin.label == "release 7"
    assert isinstance(end, End)
    assert end.entries == 0
    home.commit(1)
    home.run(60.0)
    assert home.told() == []


def test_the_next_cut_comes_an_interval_later_or_when_there_is_a_hurry() -> None:
    home = begun()
    home.put(1)
    home.run(1.0)
    home.commit(1)
    home.told()
    home.put(1)
    home.run(28.0)
    assert home.told() == []
    home.run(2.5)
    assert home.blocks() == [1]
    home.commit(2)
    home.put(1)
    home.sender.wake()
    home.run()
    assert home.blocks() == [1]


def test_no_cut_comes_before_the_last_point_was_committed() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    home.run(1.0)
    home.told()
    home.put(1)
    home.put(6)
    home.run(60.0)
    assert home.told() == []
    home.commit(1)
    home.run(2.0)
    assert sorted(home.blocks()) == [1, 6]


def test_what_was_written_after_the_cut_stays_dirty() -> None:
    home = begun()
    home.put(1)
    home.put(2, fill=3)
    cutting(home)
    home.finish("read")
    home.write(1, fill=9)
    home.run()
    home.commit(1)
    assert home.recorded() == {0}
    assert home.gate.current.any(1, 2)
    assert not home.gate.current.any(2, 3)


def past_the_gate(spool_blocks: int) -> Home:
    """Hosts could write past it.  That nothing is known to be written was the first point."""
    home = begun(spool_blocks=spool_blocks, past_gate=True)
    home.commit(1)
    home.run(2.0)
    assert home.gate.direct is not None
    assert home.gate.direct.is_still
    home.told()
    return home


@pytest.mark.parametrize("past_gate", [False, True])
def test_a_cut_is_read_before_it_is_sent_where_hosts_write_past_the_gate(past_gate: bool) -> None:
    home = past_the_gate(16) if past_gate else begun(spool_blocks=16)
    home.put(0, 6)
    cutting(home)
    home.told()
    home.finish("read")
    home.turn()
    assert home.sender.phase is Phase.READING
    assert bool(home.blocks()) is not past_gate
    home.run()
    assert home.sender.phase is Phase.ENDED
    assert 5 in home.blocks()


@pytest.mark.parametrize("past_gate", [False, True])
def test_a_cut_that_hosts_wait_for_is_read_as_if_they_were_idle(
    past_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "YIELD_PIECE_BYTES", BLOCK)
    home = past_the_gate(16) if past_gate else begun(spool_blocks=16)
    home.put(0, 6)
    home.primary.calls.clear()
    cutting(home)
    home.turn()
    assert home.primary.asked("read")[0] == (0, 2 if past_gate else 1)


def test_a_cut_that_the_spool_cannot_hold_is_sent_while_it_is_read() -> None:
    home = past_the_gate(16)
    home.put(0, 8)
    home.sender.spool.limit_bytes = 4 * BLOCK
    cutting(home)
    home.run()
    assert home.sender.phase is Phase.ENDED
    assert sorted(home.blocks()) == list(range(8))


# -- labels -----------------------------------------------------------------------------------


def labels(home: Home) -> list[str]:
    """Of the points that were ended, as END repeats them; see `Uplink.end`."""
    told = home.told()
    ends = [at for at, message in enumerate(told) if isinstance(message, End)]
    return [begin.label for at in ends if isinstance(begin := told[at - 1], Begin)]


def test_a_label_is_that_of_its_cut_and_of_no_later_one() -> None:
    home = begun()
    home.put(0, 4)
    home.sender.cut("L")
    home.run()
    assert labels(home) == ["L"]
    home.lose()
    home.greet()  # the receiver has nothing of it
    assert ("point-void", {"point": 1, "reason": "link", "label": "L"}) in home.events
    home.run(2.0)
    assert labels(home) == [""]


def test_a_pause_takes_the_label_of_an_open_cut_and_that_is_said() -> None:
    home = begun()
    home.put(0, 4)
    home.sender.cut("L")
    home.turn()
    home.sender.pause()
    assert ("point-void", {"point": 1, "reason": "asked", "label": "L"}) in home.events


def test_what_nobody_waits_for_any_more_has_no_label_unless_it_is_cut() -> None:
    home = begun()
    home.put(1)
    home.sender.cut("L")
    home.sender.withdraw()
    home.run(2.0)
    assert labels(home) == [""]
    home.commit(1)
    home.put(1, fill=2)
    home.sender.cut("M")
    home.turn()
    home.sender.withdraw()
    home.run()
    assert labels(home) == ["M"]


def test_how_long_nothing_could_be_sent() -> None:
    home = begun()
    assert home.sender.away_s == 0.0
    home.lose()
    home.loop.advance(2.0)
    assert home.sender.away_s == 2.0
    home.greet()
    assert home.sender.away_s == 0.0


def test_who_gives_its_role_away_is_not_cut() -> None:
    home = begun()
    assert home.sender.cut_obstacle == "its receiver is away, or of a version without groups"
    home.sender.is_leaving = True
    assert home.sender.cut_obstacle == "it gives its role away"


# -- copy before write ----------------------------------------------------------------------------


def test_a_write_to_a_pending_block_waits_for_a_read_of_its_own() -> None:
    home = begun(spool_blocks=16)
    home.put(0, 8)
    home.sender.spool.limit_bytes = 4 * BLOCK  # two are read ahead, and two may be
    cutting(home)
    home.primary.calls.clear()
    answers = home.write(5, fill=9)
    assert home.primary.asked("read") == [(5, 1)]
    assert home.sender.reading.copies_before_write == 1
    home.primary.finish(len(home.primary.pending) - 1)
    assert home.primary.asked("write") == [(5, 1)]
    home.run()
    assert answers == [None]
    home.run(1.0)
    sent = [e for m in home.told() if isinstance(m, Data) for e in m.entries]
    assert sorted(e.block for e in sent) == list(range(8))
    assert home.gate.current.any(5, 6)


def test_a_block_that_is_being_read_is_not_read_again_for_a_host() -> None:
    home = begun()
    home.put(1)
    cutting(home)
    home.primary.calls.clear()
    answers = home.write(1, fill=9), home.write(1, fill=8)
    assert home.primary.calls == []
    assert home.sender.reading.copies_before_write == 0
    home.run()
    assert answers == ([None], [None])


def test_one_read_serves_all_who_wait() -> None:
    home = begun(spool_blocks=16)
    home.put(0, 8)
    home.sender.spool.limit_bytes = 4 * BLOCK
    cutting(home)
    home.primary.calls.clear()
    home.write(5, fill=9)
    home.write(5, fill=8)
    assert home.primary.asked("read") == [(5, 1)]


def test_reads_for_hosts_wait_for_writes_of_before_the_cut() -> None:
    home = begun()
    home.put(9)
    home.run(1.0)
    home.commit(1)
    home.put(1)
    home.write(1, fill=2)  # in flight at the cut
    home.sender.cut()
    home.turn()
    assert home.sender.phase is Phase.CUTTING
    home.primary.calls.clear()
    later = home.write(1, fill=3)
    assert home.primary.calls == []
    home.finish("write")
    assert home.primary.asked("read")[0] == (1, 1)
    home.finish("read")
    assert home.sender.spool.first(1, 1) == [] or home.blocks() == [1]
    home.run()
    assert later == [None]


@pytest.mark.parametrize("blocks", [6, 3])
def test_more_than_the_spool_can_take_gives_the_cut_up(blocks: int) -> None:
    """More than it has, or than it has left."""
    home = begun(spool_blocks=16)
    home.put(0, 8)
    home.sender.spool.limit_bytes = 4 * BLOCK
    cutting(home)  # two are being read
    answers = home.write(2, blocks, fill=9)
    assert home.sender.phase is Phase.OPEN
    assert home.sender.voids[Void.SPOOL] == 1
    home.run()
    assert answers == [None]
    assert ("point-void", {"point": 1, "reason": "spool", "label": ""}) in home.events


def test_a_host_that_waits_too_long_gives_the_cut_up_and_nothing_is_lost() -> None:
    home = begun()
    home.put(1, 2)
    cutting(home)
    home.write(1, fill=9)
    home.loop.advance(PATIENCE_S)
    assert home.sender.phase is Phase.OPEN
    home.run()
    assert home.blocks() == [1, 2], "what is read now was not pending, but goes on as if ahead"
    home.run(3.0)
    end = home.ended()
    assert end is not None
    assert end.entries == 2
    home.commit(1)
    assert home.sender.in_sync


def test_a_read_for_a_host_waits_for_memory() -> None:
    home = begun(pool_bytes=2 * BLOCK)
    home.put(0, 2)
    home.put(8)
    cutting(home)
    home.primary.calls.clear()
    answers = home.write(8, fill=9)
    assert home.primary.asked("read") == []
    home.run()
    assert answers == [None]
    home.run(1.0)
    assert sorted(home.blocks()) == [0, 1, 8]
    home.commit(1)
    assert home.gate.current.any(8, 9)


def test_memory_that_comes_after_the_cut_reads_nothing() -> None:
    home = begun(pool_bytes=2 * BLOCK)
    home.put(0, 2)
    home.put(8)
    cutting(home)
    home.write(8, fill=9)
    home.gate.give_up_cut(Void.ASKED)
    home.primary.calls.clear()
    home.finish("read")
    assert (8, 1) not in home.primary.asked("read")[1:]


def test_an_error_of_a_read_that_a_host_waits_for_gives_the_cut_up() -> None:
    home = begun(spool_blocks=16)
    home.put(0, 8)
    home.sender.spool.limit_bytes = 4 * BLOCK
    cutting(home)
    answers = home.write(5, fill=9)
    home.primary.fail_next = {"read": [errno.EIO]}
    home.primary.finish(len(home.primary.pending) - 1)
    assert home.sender.voids[Void.READ_ERROR] == 1
    home.run()
    assert answers == [None]
    assert home.sender.read_errors == 1


def test_a_read_for_a_host_that_ends_after_the_cut_does_not_count_for_the_next() -> None:
    home = begun(spool_blocks=16)
    home.put(0, 8)
    home.sender.spool.limit_bytes = 4 * BLOCK
    cutting(home)
    home.write(5, fill=9)
    home.gate.give_up_cut(Void.ASKED)
    home.loop.advance(5.0)
    assert home.sender.phase is Phase.OPEN, "reads of before have not ended"
    home.run()
    assert home.blocks().count(5) == 2, "as if copied ahead, and then as it was written"


def test_a_point_is_not_sent_before_every_read_of_its_cut_has_ended() -> None:
    """Also one of what was read meanwhile for a host: it may end after anything."""
    home = begun(spool_blocks=16)
    home.put(0, 2)
    home.put(4, 2)
    home.sender.spool.limit_bytes = 4 * BLOCK
    cutting(home)
    home.write(4, 2, fill=9)
    home.finish("read")  # of 0 and 1; then 4 and 5 are due, too
    assert [op.kind for op in home.primary.pending] == ["read", "read"]
    home.finish("read")  # the host's
    assert not home.gate.taken
    assert home.sender.phase is Phase.READING
    home.run()
    assert home.sender.phase is Phase.ENDED
    assert home.blocks() == [0, 1, 4, 5]


def test_an_era_does_not_end_while_something_is_being_read() -> None:
    """A block that is written while it is read would lose its mark."""
    home = begun()
    home.put(0, 4)
    cutting(home)
    home.gate.give_up_cut(Void.ASKED)
    home.write(8, 8)  # much is dirty now
    era = home.gate.era
    while any(op.kind == "write" for op in home.primary.pending):
        home.finish("write")
    home.loop.advance(60.0)
    assert home.gate.era == era
    home.run(1.0)
    assert home.gate.era > era


def test_a_cut_may_be_given_up_before_anything_can_be_read() -> None:
    home = begun()
    home.put(1)
    home.write(1, fill=2)
    home.sender.cut()
    home.turn()
    home.gate.give_up_cut(Void.ASKED)
    home.finish("write")
    assert home.sender.phase is Phase.OPEN
    assert home.gate.taken.any(1, 2)


@pytest.mark.parametrize("blocks", [4, 8])
def test_reading_leaves_the_disk_to_hosts_that_are_at_work(blocks: int) -> None:
    home = begun()
    home.sender.transfers._load.throttle = Throttle(BLOCK / 2, BLOCK)
    home.sender.transfers._load._sample_s = float("inf")  # a rate that stays
    home.put(0, blocks)
    home.gate.reads += 1
    home.sender.wake()
    home.turn()
    home.gate.reads += 1
    home.finish("read")
    assert [op.kind for op in home.primary.pending] == []
    home.run(60.0)
    assert sorted(home.blocks()) == list(range(blocks))


def test_what_is_never_asked_of_the_spool_would_be_refused() -> None:
    home = begun()
    intake = home.sender.transfers._secondary
    errors: list[OSError | None] = []
    intake.read(0, memoryview(bytearray(BLOCK)), errors.append)
    home.turn()
    assert isinstance(errors[0], OSError)
    assert not intake.lands_late(errors[0])


# -- errors of the primary ------------------------------------------------------------------------


def test_a_block_that_cannot_be_read_blocks_points_until_it_can() -> None:
    home = begun()
    home.primary.unreadable = {1 * BLOCK}
    home.put(1)
    home.put(9)
    home.run(1.0)
    home.run(1.0)
    assert home.sender.voids[Void.READ_ERROR] == 1
    assert home.sender.figures()["state"] == "blocked"
    assert home.sender.stuck
    assert home.ended() is None
    home.run(70.0)
    assert home.ended() is None
    home.primary.unreadable = set()
    for _ in range(100):
        home.run(1.0)
    end = home.ended()
    assert end is not None
    assert not home.sender.stuck


# -- copying ahead --------------------------------------------------------------------------------


def test_much_is_copied_ahead_before_the_cut() -> None:
    home = begun(spool_blocks=8)
    home.put(0, 8)
    home.put(16, 4)
    phases = []
    for _ in range(30):
        phases.append(home.sender.phase)
        home.run(0.3)
    told = home.told()
    assert sum(isinstance(message, End) for message in told) == 1
    assert isinstance(told[-1], End)
    assert told[-1].entries == 12
    assert Phase.OPEN in phases
    home.commit(1)
    assert home.sender.in_sync
    figures = home.sender.figures()
    assert figures["precopied_bytes_total"] == figures["sent_bytes_total"] == 12 * BLOCK
    home.put(5)
    home.run(31.0)
    home.run(1.0)
    figures = home.sender.figures()
    assert figures["sent_bytes_total"] - figures["precopied_bytes_total"] == BLOCK


def test_what_is_written_while_much_is_copied_is_sent_again() -> None:
    home = begun()
    home.put(0, 8)
    home.sender.wake()
    home.turn()
    assert home.sender.phase is Phase.OPEN
    home.finish("read")
    home.write(0, fill=9)
    home.run(3.0)
    told = home.told()
    sent = [e.block for m in told if isinstance(m, Data) for e in m.entries]
    assert sorted(sent) == [0, *range(8)]
    end = told[-1]
    assert isinstance(end, End)
    assert end.entries == 8


def test_hosts_that_write_as_fast_as_the_link_carries_are_told() -> None:
    home = begun(spool_blocks=4, rate_bytes_per_s=1000.0)
    home.put(0, 32)
    for number in range(120):
        home.write(number % 32, fill=number)
        home.write((number * 7) % 32, fill=number)
        home.run(0.5)
    assert home.names().count("cannot-keep-up") == 1


# -- the receiver's journal -----------------------------------------------------------------------


def after_point_1(**options: Any) -> Home:
    home = begun(interval_s=1.0, compress=False, **options)
    home.put(31)
    home.run(1.0)
    home.commit(1)
    home.names()
    home.told()
    return home


def test_what_does_not_fit_the_journal_is_not_begun() -> None:
    home = after_point_1()
    home.greet(committed=1, applied=1, credit_bytes=4 * BLOCK - 1)
    home.put(0, 4)
    home.run(30.0)
    assert home.told() == []
    assert home.names() == ["journal-full"]
    assert home.sender.room.is_full
    home.say(Credit(4 * BLOCK))
    home.run(2.0)
    assert sorted(home.blocks()) == [0, 1, 2, 3]
    home.commit(2)
    assert not home.sender.room.is_full


def test_what_a_cut_has_left_in_the_spool_begins_no_point_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of it would be sent, have no room for the rest, and be dropped, for ever."""
    monkeypatch.setattr(uplink, "FRAME_BYTES", 4 * BLOCK)
    home = after_point_1(spool_blocks=16)
    home.greet(committed=1, applied=1, credit_bytes=99 * BLOCK)
    home.wire.has_room = False
    home.put(0, 8)
    cutting(home)
    home.gate.give_up_cut(Void.ASKED)
    home.run()
    assert len(home.sender.spool) == 8
    home.lose()
    room = {"committed": 1, "applied": 1, "credit_bytes": 6 * BLOCK}
    home.greet(**room, features=Feature.CATCH_UP)
    for _ in range(5):
        home.run(1.0)
    assert home.blocks() == []
    assert home.wire.is_open
    for _ in range(10):
        home.run(1.0)
    assert not home.wire.is_open
    home.connect()
    (said,) = (message for message in home.told() if isinstance(message, Hello2))
    assert Feature.IN_PLACE in said.features


def test_nothing_is_copied_ahead_that_would_keep_the_point_from_ending() -> None:
    home = after_point_1(spool_blocks=8)
    home.greet(committed=1, applied=1, credit_bytes=13 * BLOCK)
    home.put(0, 6)
    home.sender.wake()
    home.turn()
    home.finish("read")
    assert home.sender.schedule.copies_ahead
    home.write(8, 7)  # what is left would still fit, but only once
    home.finish("read")
    home.run()
    assert home.sender.phase is not Phase.OPEN


def with_entries(home: Home, credit_bytes: int, applied: int) -> None:
    """Two blocks have been sent, and so much credit is left."""
    home.greet(committed=1, applied=applied, credit_bytes=8 * 8192)
    home.put(0, 2)
    cutting(home)
    home.gate.give_up_cut(Void.ASKED)
    home.run()
    assert home.blocks() == [0, 1]
    home.sender.uplink.credit_bytes = credit_bytes


@pytest.mark.parametrize("phase", [Phase.READING, Phase.SENDING, Phase.OPEN])
def test_an_open_point_that_fills_the_journal_is_dropped_and_sent_anew(phase: Phase) -> None:
    home = after_point_1(spool_blocks=16)
    with_entries(home, credit_bytes=8192, applied=1)
    incarnation = home.sender.uplink._identity.incarnation
    home.put(4, 4)
    home.sender.cut()
    home.loop.advance(2.0)
    assert home.sender.phase is Phase.READING
    if phase is Phase.OPEN:
        home.gate.give_up_cut(Void.ASKED)
        home.run()
    elif phase is Phase.SENDING:
        home.run()
    else:
        home.sender.spool.put(4, 1, bytes(BLOCK))
        home.sender.spool.put(5, 1, bytes(BLOCK))
    home.loop.advance(1.0)
    assert home.sender.phase is phase
    assert home.names() == ["journal-full"]
    home.loop.advance(8.0)
    assert home.wire.is_open
    home.loop.advance(3.0)
    assert not home.wire.is_open
    assert home.sender.voids[Void.JOURNAL] == 1
    home.greet(committed=1, applied=1, credit_bytes=8 * 8192)
    for _ in range(20):
        home.run(1.0)
    end = home.ended()
    assert end is not None
    assert (end.entries, end.incarnation == incarnation) == (6, False)


def test_credit_that_may_still_come_is_waited_for() -> None:
    home = after_point_1(spool_blocks=16)
    with_entries(home, credit_bytes=8192, applied=0)
    home.put(4, 4)
    home.sender.cut()
    home.run(60.0)
    assert home.names() == ["journal-full"]
    home.say(Applied(1))
    home.run(5.0)
    assert home.wire.is_open, "it follows what is said of points"
    home.say(Credit(8 * 8192))
    home.run(1.0)
    assert home.ended() is not None


def test_what_the_receiver_holds_and_nobody_counts_makes_room_for_the_point() -> None:
    """It has sendings of the open point that were all lost or written again: in its journal they
    take the room without which the point is not begun."""
    home = after_point_1(spool_blocks=16)
    with_entries(home, credit_bytes=8192, applied=1)
    incarnation = home.sender.uplink._identity.incarnation
    home.connect()
    home.greet(committed=1, applied=1, credit_bytes=BLOCK)  # and of its entries it names none
    assert home.sender.uplink.entries == 0
    for _ in range(8):
        home.run(1.0)
    assert home.wire.is_open
    for _ in range(8):
        home.run(1.0)
    assert not home.wire.is_open
    home.greet(committed=1, applied=1, credit_bytes=8 * 8192)
    for _ in range(40):
        home.run(1.0)
    end = home.ended()
    assert end is not None
    assert (end.entries, end.incarnation == incarnation) == (2, False)


def test_what_could_not_be_read_is_tried_again_in_a_journal_that_is_nearly_full() -> None:
    home = after_point_1(spool_blocks=16)
    with_entries(home, credit_bytes=5 * BLOCK, applied=1)
    home.primary.unreadable = {4 * BLOCK}
    home.put(4, 4)
    home.sender.cut()
    for _ in range(5):
        home.run(1.0)
    assert home.sender.reading.is_blocked
    home.sender.uplink.credit_bytes = BLOCK // 2
    home.primary.unreadable = set()
    for _ in range(9):
        home.run(1.0)
    assert not home.gate.taken


def test_before_point_1_a_slow_image_is_waited_for() -> None:
    home = begun(compress=False)
    home.put(0, 4)
    home.sender.uplink.credit_bytes = 8192
    home.run(1.0)
    home.run(60.0)
    assert home.names() == ["link-up", "journal-full"]
    assert home.wire.is_open
    home.say(Credit(8 * 8192))
    home.run(1.0)
    assert home.ended() is not None


# -- the link -------------------------------------------------------------------------------------


def test_without_a_receiver_nothing_is_cut() -> None:
    home = Home()
    home.sender.start()
    home.put(1)
    home.run(60.0)
    assert home.sender.state is CopyState.LINK_DOWN
    assert home.sender.phase is Phase.OPEN
    home.greet()
    assert home.sender.state is CopyState.RUNNING
    home.run(1.0)
    assert home.ended() is not None


def test_a_cut_goes_on_while_the_link_is_away() -> None:
    home = begun()
    home.put(1, 2)
    cutting(home)
    home.lose()
    assert home.sender.state is CopyState.LINK_DOWN
    home.run()
    assert home.sender.phase is Phase.SENDING
    home.greet()
    home.run()
    assert home.blocks() == [1, 2]


def test_what_was_lost_on_the_way_gives_the_cut_up() -> None:
    for phase, lost in ((Phase.READING, 2), (Phase.SENDING, 4)):
        home = begun(spool_blocks=16)
        home.put(0, 2)
        home.put(8, 2)
        cutting(home)
        home.finish("read")
        if phase is Phase.SENDING:
            home.wire.has_room = False
            home.finish("read")
        assert home.sender.phase is phase
        home.lose()
        home.greet()
        assert home.sender.phase is Phase.OPEN
        assert home.sender.voids[Void.LINK] == 1
        assert home.gate.current.count() == 2
        assert lost


def test_an_end_that_was_lost_is_said_again() -> None:
    home = begun()
    home.put(1)
    home.run(1.0)
    assert home.sender.phase is Phase.ENDED
    home.lose()
    home.greet(point=1, runs=((1, 1, 1),))
    assert home.sender.phase is Phase.ENDED
    home.commit(1)
    assert home.sender.in_sync


def test_a_commit_that_was_lost_is_heard_with_the_next_greeting() -> None:
    home = begun()
    home.put(1)
    home.run(1.0)
    home.lose()
    home.greet(committed=1)
    assert home.ledger.points == [1]
    home.ledger.finish()
    home.turn()
    assert home.sender.in_sync
    assert home.sender.state is CopyState.RUNNING
    assert home.sender.uplink.point == 2


def test_a_greeting_while_a_point_is_stored_changes_nothing() -> None:
    home = begun(interval_s=1.0)
    home.put(1)
    home.run(1.0)
    home.say(Committed(1, OURS))
    home.greet(committed=1)
    assert home.sender.closing.storing
    assert home.sender.uplink.known_committed == 1
    home.ledger.finish()
    home.turn()
    home.put(1)
    home.run(2.0)
    assert home.blocks() == [1]


def test_what_the_receiver_needs_is_sent_with_the_next_point() -> None:
    home = begun(interval_s=1.0)
    home.say(Need(((1, 3), (9, 10))))
    home.run()
    assert home.recorded() == {0, 2}
    home.run(3.0)
    assert sorted(home.blocks()) == [1, 2, 9]


def test_what_is_needed_and_cannot_be_recorded_is_told() -> None:
    home = begun()
    home.record.fail_next = {"write": [errno.EIO] * 9}
    home.say(Need(((1, 3),)))
    home.run(20.0)
    assert home.sender.last_error is not None


def test_who_cannot_be_reached_is_told() -> None:
    home = Home()
    home.sender.failed("connection refused")
    assert home.names() == ["link-error"]


# -- what an administrator wants ----------------------------------------------------------------


def test_a_pause_gives_the_cut_up_and_sends_nothing() -> None:
    home = begun()
    home.put(1)
    cutting(home)
    answers = home.write(1, fill=2)
    home.sender.pause()
    assert home.sender.state is CopyState.PAUSED
    home.run(60.0)
    assert answers == [None]
    assert home.told() == []
    assert home.sender.idle
    assert home.changes > 1
    home.sender.resume()
    home.run(2.0)
    assert home.ended() is not None


def test_a_pause_before_the_start_of_copying_and_without_a_link() -> None:
    home = Home()
    home.sender.pause()
    assert home.sender.state is CopyState.STOPPED
    home.sender.start(paused=True)
    home.sender.resume()
    assert home.sender.state is CopyState.LINK_DOWN
    home.sender.resume()
    home.lose()
    assert home.sender.state is CopyState.LINK_DOWN


def test_a_receiver_that_comes_while_paused_is_not_sent_to() -> None:
    home = Home()
    home.sender.start(paused=True)
    home.greet()
    assert home.sender.state is CopyState.PAUSED
    home.put(1)
    home.run(60.0)
    assert home.told() == []
    home.lose()
    assert home.sender.state is CopyState.PAUSED


def test_a_stop_waits_for_what_is_in_flight() -> None:
    home = begun()
    home.put(1)
    cutting(home)
    answers = home.write(1, fill=2)
    stopped: list[int] = []
    home.sender.stop(lambda: stopped.append(1))
    home.turn()
    assert stopped == []
    home.run()
    assert (stopped, answers) == ([1], [None])
    home.run(60.0)
    assert home.told() == []
    assert home.sender.state is CopyState.STOPPED


def test_a_stop_waits_for_the_flush_of_a_point_and_not_for_its_receiver() -> None:
    home = begun()
    home.put(1)
    cutting(home)
    home.finish("read")
    home.turn()
    assert home.ended() is not None
    assert home.primary.pending[0].kind == "flush"
    home.lose()
    stopped: list[int] = []
    home.sender.stop(lambda: stopped.append(1))
    home.turn()
    assert stopped == []
    home.finish("flush")
    home.turn()
    assert stopped == [1]


def test_a_stop_ends_the_timers() -> None:
    home = begun(interval_s=3.0)
    home.put(1)
    home.run(1.0)
    home.commit(1)
    home.put(1)
    home.run(2.5)  # the next cut has a timer of its own
    stopped: list[int] = []
    home.sender.stop(lambda: stopped.append(1))
    home.run(60.0)
    assert stopped == [1]
    other = Home()
    other.sender.stop(lambda: stopped.append(2))
    other.turn()
    assert stopped == [1, 2]


def test_a_sender_that_nobody_watches_works_as_well() -> None:
    home = begun()
    home.sender.on_change = None
    home.put(1)
    home.run(1.0)
    home.commit(1)
    assert home.sender.in_sync


def test_the_connection_can_be_given_up() -> None:
    home = begun()
    home.sender.reconnect()
    assert not home.wire.is_open
    assert home.sender.state is CopyState.LINK_DOWN
    home.sender.reconnect()


def test_a_pass_is_over_when_its_point_is_committed() -> None:
    home = begun()
    done: list[int] = []
    home.sender.passes.on_done = lambda: done.append(1)
    home.gate.take_everything(lambda error: None)
    home.sender.begin_pass(compare=False)
    assert home.sender.passes.under_way
    for _ in range(20):
        home.run(1.0)
    assert done == []
    assert home.sender.passes.remaining_bytes == 0
    home.commit(1)
    assert done == [1]
    assert home.sender.in_sync


def test_a_volume_that_has_grown_is_sent_whole() -> None:
    home = begun(interval_s=1.0)
    larger = Geometry((EXTENTS + 1) * EXTENT, EXTENT, BLOCK)
    home.primary.resize(larger.size_bytes, b"\5")
    home.gate.grow(larger)
    home.sender.grow(larger)
    home.run(2.0)
    told = home.told()
    begin = told[0]
    assert isinstance(begin, Begin)
    assert begin.size_bytes == larger.size_bytes
    sent = [e.block for m in told if isinstance(m, Data) for e in m.entries]
    assert sent == [4 * EXTENTS + n for n in range(4)]


# -- what it says of itself ---------------------------------------------------------------------


def test_the_figures_say_how_old_the_newest_point_is() -> None:
    home = begun(interval_s=5.0)
    home.put(1)
    assert home.sender.figures()["age_seconds"] is None
    home.run(1.0)
    home.commit(1)
    assert home.sender.figures()["age_seconds"] == 0.0, "it has everything"
    home.put(1)
    home.run(3.0)
    figures = home.sender.figures()
    assert figures["age_seconds"] == pytest.approx(home.loop.time() - 1.0, abs=0.1)
    assert (figures["number"], figures["state"], figures["committed_total"]) == (1, "none", 1)
    assert home.sender.oldest_content_s == home.gate.oldest_dirty_s()
    assert home.sender.now_s == home.loop.time()


def test_points_of_a_process_follow_those_of_the_one_before() -> None:
    first = Home()
    assert first.sender.figures()["number"] == 0
    second = Home(identity=replace(first.sender.uplink._identity, committed=6))
    assert second.sender.uplink.known_committed == 6
    assert second.sender.figures()["number"] == 6


# -- the spool's file -----------------------------------------------------------------------------


def with_file() -> tuple[Home, SimDisk]:
    """Sixteen blocks of a cut have been read with a memory of eight, and nothing could be sent."""
    disk = SimDisk("spool", 16 * BATCH_BYTES)
    home = begun(spool_blocks=8, spool_file=disk)
    home.put(0, 16)
    home.wire.has_room = False
    home.run(1.0)
    assert home.sender.phase is Phase.SENDING, "hosts wait for nothing any more"
    return home, disk


def test_a_point_larger_than_memory_is_read_at_once_where_there_is_a_file() -> None:
    home, _ = with_file()
    figures = home.sender.figures()
    assert figures["spool_bytes"] + figures["spool_file_bytes"] == 16 * BLOCK
    assert figures["spool_bytes"] <= 4 * BLOCK
    assert figures["spool_file_limit_bytes"] == 16 * BATCH_BYTES
    home.wire.has_room = True
    home.sender.drained(home.wire)
    home.run()
    told = home.told()
    sent = [entry.block for m in told if isinstance(m, Data) for entry in m.entries]
    assert sorted(sent) == list(range(16))
    assert isinstance(told[-1], End)
    home.commit(1)
    assert home.recorded() == set()


def test_without_a_file_it_is_read_as_it_is_sent() -> None:
    home = begun(spool_blocks=8)
    home.put(0, 16)
    home.wire.has_room = False
    home.run(1.0)
    assert home.sender.phase is not Phase.SENDING
    assert home.sender.figures()["spool_file_bytes"] is None
    assert home.sender.figures()["spool_file_limit_bytes"] is None


def test_what_the_file_loses_is_read_anew_and_the_cut_is_given_up() -> None:
    home, disk = with_file()
    disk.fail_next = {"read": [errno.EIO]}
    home.wire.has_room = True
    home.sender.drained(home.wire)
    home.run()
    assert home.sender.phase is Phase.OPEN
    assert home.sender.voids[Void.SPOOL] == 1
    assert home.sender.figures()["spool_file_limit_bytes"] == 0
    (error,) = (fields for name, fields in home.events if name == "spool-error")
    assert error["blocks"] > 0
    assert "point-void" in home.names()
    home.run(3.0)
    assert home.ended() is not None
    home.commit(1)
    assert home.recorded() == set()


def test_a_file_that_is_full_leaves_what_memory_has() -> None:
    disk = SimDisk("spool", 16 * BATCH_BYTES)
    disk.fail_next = {"write": [errno.ENOSPC]}
    home = begun(spool_blocks=8, spool_file=disk)
    home.put(0, 4)
    home.wire.has_room = False
    home.run(1.0)
    home.put(6)
    home.wire.has_room = True
    home.sender.drained(home.wire)
    home.run()
    assert home.ended() is not None
    assert "spool-error" in home.names()
    assert sum(home.sender.voids.values()) == 0


def test_a_stop_waits_for_the_file() -> None:
    disk = SimDisk("spool", 16 * BATCH_BYTES)
    home = begun(spool_blocks=8, spool_file=disk)
    home.put(0, 4)
    home.wire.has_room = False
    home.sender.cut()
    home.turn()
    drain(home.loop, home.primary)
    assert disk.pending
    stopped: list[bool] = []
    home.sender.stop(lambda: stopped.append(True))
    home.turn()
    assert stopped == []
    drain(home.loop, disk)
    assert stopped == [True]


def test_what_memory_may_hold_changes_while_in_use() -> None:
    home, _ = with_file()
    home.sender.limit_spool(4 * BLOCK)
    assert home.sender.figures()["spool_limit_bytes"] == 4 * BLOCK
    assert home.sender.schedule.spool_bytes == 4 * BLOCK + 16 * BATCH_BYTES


def test_what_is_too_much_to_be_counted_block_by_block_is_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "COUNTED_BLOCKS", 0)
    home = begun(spool_blocks=8)
    home.put(0, 16)
    home.run(3.0)
    assert home.ended() is not None
    home.commit(1)
    assert home.recorded() == set()


# -- of a group -------------------------------------------------------------------------------


def member_after_point_1(credit_bytes: int = 1 << 20) -> Home:
    home = after_point_1()
    features = Feature.ZSTD | Feature.GROUP
    home.greet(committed=1, applied=1, credit_bytes=credit_bytes, features=features)
    return home


def test_who_cannot_be_cut_with_its_group_says_why() -> None:
    home = member_after_point_1()
    assert home.sender.cut_obstacle == ""
    home.sender.say(ApplyUpTo(7))
    assert ApplyUpTo(7) in home.told()
    home.lose()
    home.sender.say(ApplyUpTo(8))  # to nobody
    assert home.told() == []
    assert "is away" in home.sender.cut_obstacle


def test_one_that_cannot_be_read_is_not_cut_with_its_group() -> None:
    home = member_after_point_1()
    home.primary.unreadable = {4 * BLOCK}
    home.put(4)
    home.sender.cut()
    for _ in range(5):
        home.run(1.0)
    assert "cannot be read" in home.sender.cut_obstacle


def test_one_that_copies_ahead_is_not_cut_with_its_group() -> None:
    home = member_after_point_1(credit_bytes=13 * BLOCK)
    home.put(0, 6)
    assert "begins to copy ahead" in home.sender.cut_obstacle
    home.sender.wake()
    home.turn()
    assert home.sender.cut_obstacle == "it copies ahead"


def test_one_whose_receiver_has_no_room_is_not_cut_with_its_group() -> None:
    home = member_after_point_1(credit_bytes=4 * BLOCK - 1)
    home.put(0, 4)
    assert "journal of its receiver is full" in home.sender.cut_obstacle
