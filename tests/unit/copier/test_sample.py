"""sample: a secondary that comes back and has lost what it confirmed (invariants by number)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bitmapd.copier import sample
from bitmapd.copier.engine import CopyState
from bitmapd.copier.sample import CHECK_S, REMEMBERED, SAMPLES, Samples
from tests.support.mirror import BLOCK, PER_EXTENT, Mirror, equal


def in_sync(*blocks: int, **options: Any) -> Mirror:
    """Its copier runs, and has brought these blocks to the secondary."""
    mirror = Mirror(**options)
    mirror.copier.start()
    for block in blocks:
        mirror.put(block, fill=block % 250 + 1)
        mirror.run(1.1)
    mirror.run(1.1)
    assert mirror.copier.in_sync
    return mirror


def lose(mirror: Mirror, *blocks: int) -> None:
    for block in blocks:
        for image in (mirror.secondary.visible, mirror.secondary.durable):
            image[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)


def come_back(mirror: Mirror) -> None:
    mirror.copier.reconnect()
    mirror.run(1.0)


def forgot(mirror: Mirror) -> list[dict[str, Any]]:
    return mirror.told("secondary-forgot")


# -- finding it out -------------------------------------------------------------------------------


def test_3_one_block_that_is_lost_brings_everything_back() -> None:
    mirror = in_sync(5, 9)
    lose(mirror, 5)
    mirror.secondary.visible[30 * BLOCK] ^= 1  # which was never written: nobody looks there
    come_back(mirror)
    (event,) = forgot(mirror)
    assert event["offset_bytes"] == 5 * BLOCK
    assert event["secondary"] == "secondary"
    assert mirror.stored() == set(range(8))
    mirror.run(5.0)
    assert mirror.copier.in_sync
    assert equal(mirror)
    assert not mirror.copier.passes.under_way


def test_only_what_differs_is_sent() -> None:
    mirror = in_sync(5, 9)
    lose(mirror, 5)
    sent = mirror.copier.transfers.sent_bytes
    come_back(mirror)
    mirror.run(5.0)
    assert mirror.copier.transfers.sent_bytes == sent + BLOCK


def test_at_the_start_what_was_remembered_is_compared() -> None:
    mirror = Mirror()
    mirror.primary.visible[7 * BLOCK] = mirror.primary.durable[7 * BLOCK] = 1
    mirror.copier.samples.remember([3, 7, 999, -1])
    mirror.copier.start()
    assert not mirror.copier.in_sync
    assert not mirror.copier.idle
    mirror.run(3.0)
    assert [event["offset_bytes"] for event in forgot(mirror)] == [7 * BLOCK]
    assert mirror.copier.in_sync
    assert equal(mirror)


def test_a_secondary_that_is_away_at_the_start_is_looked_at_when_it_comes() -> None:
    mirror = Mirror()
    mirror.primary.visible[7 * BLOCK] = mirror.primary.durable[7 * BLOCK] = 1
    mirror.copier.samples.remember([7])
    mirror.secondary.connected = False
    mirror.copier.start()
    assert mirror.secondary.calls == []
    mirror.run(1.0)
    assert len(forgot(mirror)) == 1


def test_equal_blocks_are_no_event_and_the_volume_is_in_sync_again() -> None:
    mirror = in_sync(5, 9)
    told: list[bool] = []
    mirror.copier.on_change = lambda: told.append(mirror.copier.in_sync)
    reads = len(mirror.secondary.asked("read"))
    come_back(mirror)
    assert len(mirror.secondary.asked("read")) == reads + 2
    assert forgot(mirror) == []
    assert told[-1] is True
    assert False in told, "not in sync while it was compared"


# -- 1: what proves nothing -----------------------------------------------------------------------


def test_1_blocks_that_may_differ_are_left_out() -> None:
    mirror = in_sync(5, 9)
    lose(mirror, 5)
    mirror.put(5, fill=77)  # it is written again before the secondary is back
    come_back(mirror)
    mirror.run(2.0)
    assert forgot(mirror) == []
    assert equal(mirror)


def test_1_a_write_that_comes_between_the_reads_is_no_loss() -> None:
    mirror = in_sync(5)
    mirror.copier.reconnect()
    mirror.loop.advance(1.0)
    mirror.finish(mirror.secondary)  # the connection
    assert mirror.pending(mirror.secondary) == ["read"]
    mirror.finish(mirror.secondary)
    mirror.write(5, fill=99)
    for disk in (mirror.primary, mirror.primary):
        mirror.finish(disk, len(disk.pending) - 1)
    mirror.run(2.0)
    assert forgot(mirror) == []
    assert equal(mirror)


# -- 2: bounds ------------------------------------------------------------------------------------


def test_2_the_newest_and_some_of_the_older_ones() -> None:
    mirror = Mirror(extents=2 * REMEMBERED, hollow=True)
    samples = mirror.copier.samples
    for block in range(3 * REMEMBERED):
        samples.copied(block)
    samples.copied(3 * REMEMBERED - 5)  # again: the newest of all
    lately = samples.lately
    assert len(lately) == len(set(lately)) == SAMPLES
    assert lately[-1] == 3 * REMEMBERED - 5
    assert set(range(3 * REMEMBERED - 20, 3 * REMEMBERED)) <= set(lately)
    assert min(lately) == 2 * REMEMBERED, "the oldest that is remembered"


@pytest.mark.parametrize("count", [0, 1, 2, SAMPLES // 2, SAMPLES, SAMPLES + 1])
def test_2_few_blocks_are_all_of_them(count: int) -> None:
    mirror = Mirror(extents=100)
    mirror.copier.samples.remember(range(count))
    assert mirror.copier.samples.lately[-1:] == ([count - 1] if count else [])
    assert len(mirror.copier.samples.lately) >= min(count, SAMPLES) - 1


def test_2_large_blocks_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLE_BYTES", 3 * BLOCK - 1)
    mirror = Mirror()
    samples = Samples(
        mirror.geometry, mirror.gate, mirror.primary, mirror.secondary, mirror.loop,
        mirror.pool, lambda _: None,
    )  # fmt: skip
    samples.remember(range(9))
    assert len(samples.lately) == 2


def test_2_a_secondary_that_is_slow_is_not_waited_for() -> None:
    """What was compared until then counts."""
    mirror = in_sync(*range(0, 6 * PER_EXTENT, 4))
    lose(mirror, 8)
    mirror.copier.reconnect()
    mirror.loop.advance(1.0)
    mirror.finish(mirror.secondary)
    assert len(mirror.pending(mirror.secondary)) == 4, "a few at a time"
    for disk in (mirror.primary, mirror.secondary):
        mirror.finish(disk, 2)  # block 8
    mirror.loop.advance(CHECK_S)
    assert not mirror.copier.idle, "its reads are under way"
    assert forgot(mirror) == []
    mirror.run()
    assert len(mirror.told("secondary-forgot")) == 1


def test_a_connection_that_is_lost_meanwhile_is_looked_for_again() -> None:
    mirror = in_sync(5)
    lose(mirror, 5)
    mirror.copier.reconnect()
    mirror.loop.advance(1.0)
    mirror.finish(mirror.secondary)
    mirror.secondary.connected = False
    for _ in range(5):
        mirror.run(1.0)
    assert len(forgot(mirror)) == 1, "the next connection brought it to light"
    mirror.run(5.0)
    assert equal(mirror)


def test_a_record_that_cannot_be_written_keeps_nobody_from_copying() -> None:
    mirror = in_sync(5)
    lose(mirror, 5)
    mirror.record.fail_next = {"write": [errno.EIO]}
    come_back(mirror)
    assert mirror.copier.last_error is not None
    mirror.run(5.0)
    assert equal(mirror)


def test_a_stop_waits_for_it_and_what_it_finds_stays_recorded() -> None:
    mirror = in_sync(5)
    lose(mirror, 5)
    mirror.copier.reconnect()
    mirror.loop.advance(1.0)
    mirror.finish(mirror.secondary)
    stopped: list[bool] = []
    mirror.copier.stop(lambda: stopped.append(True))
    mirror.turn()
    assert stopped == []
    mirror.run()
    assert stopped == [True]
    assert len(forgot(mirror)) == 1
    assert mirror.stored() == set(range(8))
    assert not mirror.gate.in_sync


def test_a_volume_that_has_grown_remembers_more() -> None:
    mirror = Mirror(4)
    samples = mirror.copier.samples
    samples.remember([4 * PER_EXTENT])
    assert samples.lately == []
    mirror.copier.grow(Mirror(8).geometry)
    samples.remember([4 * PER_EXTENT])
    assert samples.lately == [4 * PER_EXTENT]


# -- a secondary that was left equal ----------------------------------------------------------


def left_equal(**options: Any) -> tuple[Mirror, list[Any]]:
    """A volume starts whose sides were left equal; block 7 of the secondary was written since."""
    mirror = Mirror(**options)
    changed: list[Any] = []
    mirror.copier.on_changed_secondary = changed.append
    mirror.copier.samples.remember([3, 7])
    mirror.secondary.visible[7 * BLOCK] = mirror.secondary.durable[7 * BLOCK] = 1
    return mirror, changed


def test_guarded_nothing_is_copied_over_a_secondary_that_was_written() -> None:
    mirror, changed = left_equal()
    mirror.copier.start(guarded=True)
    mirror.put(20)
    mirror.run(2.0)
    assert [list(places) for places in changed] == [[(7 * BLOCK, BLOCK)]]
    assert mirror.copier.state is CopyState.PAUSED
    assert mirror.secondary.asked("write") == []
    assert forgot(mirror) == []


def test_guarded_nothing_is_copied_before_the_comparison_is_over() -> None:
    mirror = Mirror()
    mirror.copier.samples.remember([3])
    mirror.copier.start(guarded=True)
    mirror.put(20)
    mirror.loop.advance(2.0)
    assert mirror.pending(mirror.secondary) == ["read"]
    mirror.run(2.0)
    assert mirror.secondary.asked("write") == [(20, 1)]
    assert mirror.copier.in_sync


def test_guarded_one_that_is_away_is_compared_when_it_comes() -> None:
    mirror, changed = left_equal()
    mirror.secondary.connected = False
    mirror.copier.start(guarded=True)
    mirror.put(20)
    mirror.run(5.0)
    assert len(changed) == 1
    assert mirror.secondary.asked("write") == []


def test_guarded_a_comparison_that_the_link_ended_is_made_again() -> None:
    mirror, changed = left_equal()
    mirror.copier.start(guarded=True)
    mirror.turn()
    mirror.secondary.connected = False
    mirror.put(20)
    for _ in range(5):
        mirror.run(1.0)
    assert len(changed) == 1
    assert mirror.secondary.asked("write") == []


def test_guarded_it_is_no_guard_for_the_rest_of_the_session() -> None:
    mirror, changed = left_equal()
    mirror.secondary.visible[7 * BLOCK] = mirror.secondary.durable[7 * BLOCK] = 0
    mirror.copier.start(guarded=True)
    mirror.run(2.0)
    lose(mirror, 7)
    mirror.secondary.visible[7 * BLOCK] = 1
    come_back(mirror)
    assert len(forgot(mirror)) == 1
    assert changed == []
