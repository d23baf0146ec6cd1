"""copier/transfers without a copier: what `begin` answers, and what the owner is told, when."""

from __future__ import annotations

import errno
import math

import pytest

from bitmapd.copier.leaving import Leaving
from bitmapd.copier.refusals import Refusal
from bitmapd.copier.throttle import SpeedMeter, Throttle
from bitmapd.copier.transfers import Transfers, Trouble
from tests.support.mirror import BLOCK, Mirror

PIECE = 4


class Rig:
    """Transfers of a mirror whose own copier never starts; `told` holds what the owner hears."""

    def __init__(
        self,
        blocks: int,
        *,
        rate_bytes_per_s: float | None = None,
        pool: int = 1 << 20,
        fill: int = 1,
    ):
        self.mirror = Mirror(pool_bytes=pool)
        self.primary, self.secondary = self.mirror.primary, self.mirror.secondary
        self.told: list[object] = []
        self.transfers = Transfers(
            self.mirror.geometry,
            self.mirror.gate,
            self.primary.read,
            self.secondary,
            self.mirror.loop,
            self.mirror.pool,
            Throttle(rate_bytes_per_s, PIECE * BLOCK),
            SpeedMeter(),
            Leaving(self.mirror.loop),
            owner=self,
            piece_bytes=PIECE * BLOCK,
        )
        self.mirror.put(0, blocks, fill)
        self.mirror.gate.take_era(lambda: None)
        self.mirror.turn()
        self.mirror.loop.advance(1.0)  # hosts are quiet

    def begin(self, most_bytes: float = math.inf) -> float | None:
        return self.transfers.begin(self.mirror.loop.now_s, most_bytes)

    # What the owner is told, with what is in flight and out of the pool at that moment.
    def copied(self, first: int, stop: int, length_bytes: int) -> None:
        self.told.append(("copied", first, stop, length_bytes, self.transfers.in_flight_bytes))

    def not_read(self, first: int, stop: int, error: OSError) -> None:
        self.told.append(("not read", first, stop, error.errno))

    def not_compared(self, error: OSError) -> None:
        self.told.append(("not compared", error.errno))

    def not_written(self, first: int, stop: int, error: OSError, refusal: Refusal) -> None:
        self.told.append(("not written", first, stop, error.errno, refusal))

    def proceed(self) -> None:
        self.told.append(("proceed", self.mirror.pool.out_bytes))


def test_a_run_is_reported_while_it_is_in_flight_and_the_gate_is_left_alone() -> None:
    rig = Rig(3)
    assert rig.begin() is None
    assert not rig.transfers.idle
    rig.mirror.finish(rig.primary)
    rig.mirror.finish(rig.secondary)
    assert rig.told == [("copied", 0, 3, 3 * BLOCK, 3 * BLOCK), ("proceed", 0)]
    assert rig.transfers.idle
    assert list(rig.mirror.gate.taken.runs()) == [(0, 3)]
    assert not rig.mirror.gate.has_copied


def test_no_transfer_begins_once_so_much_is_in_flight() -> None:
    rig = Rig(12)
    assert rig.begin(0) is None
    assert rig.transfers.idle
    assert rig.begin(BLOCK) is None
    assert rig.transfers.in_flight_bytes == PIECE * BLOCK
    assert rig.begin(PIECE * BLOCK) is None
    assert rig.begin(PIECE * BLOCK + 1) is None
    assert rig.primary.asked("read") == [(0, PIECE), (PIECE, PIECE)]


def test_begin_says_how_long_the_rate_holds_back_the_next() -> None:
    rig = Rig(8, rate_bytes_per_s=2 * BLOCK)
    assert rig.begin() == PIECE / 2
    assert rig.primary.asked("read") == [(0, PIECE)]
    assert rig.transfers.withheld_blocks == PIECE, "the other is handed out again"
    rig.mirror.loop.advance(PIECE / 2)
    assert rig.begin() is None
    assert rig.primary.asked("read") == [(0, PIECE), (PIECE, PIECE)]


def test_memory_that_is_free_again_is_a_reason_to_proceed() -> None:
    rig = Rig(4, pool=PIECE * BLOCK)
    other = rig.mirror.pool.take(PIECE * BLOCK)
    assert other is not None
    assert rig.begin() == rig.begin() == 0.0
    assert rig.told == []
    rig.mirror.pool.give(other)
    rig.mirror.turn()
    assert rig.told == [("proceed", 0)]
    assert rig.begin() is None
    assert rig.primary.asked("read") == [(0, PIECE)]


def test_what_was_in_flight_when_it_was_revoked_is_not_reported_and_copied_again() -> None:
    rig = Rig(4)
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.transfers.revoke()
    rig.mirror.finish(rig.secondary)
    assert rig.told == [("proceed", 0)]
    assert rig.begin() is None
    rig.mirror.finish(rig.primary)
    rig.mirror.finish(rig.secondary)
    assert rig.told[1:] == [("copied", 0, PIECE, PIECE * BLOCK, PIECE * BLOCK), ("proceed", 0)]


def test_comparing_is_decided_when_the_primary_has_been_read() -> None:
    rig = Rig(8)
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.transfers.compare = True
    rig.mirror.finish(rig.primary)
    assert rig.secondary.asked("write") == [(0, PIECE)]
    assert rig.secondary.asked("read") == [(PIECE, PIECE)]


@pytest.mark.parametrize(
    ("step", "number", "told", "withheld"),
    [
        ("read", errno.EIO, ("not read", 0, 1, errno.EIO), 1),
        ("compare", errno.ENOTCONN, ("not compared", errno.ENOTCONN), 0),
        ("compare", errno.ENODEV, ("not compared", errno.ENODEV), 0),
        ("write", errno.EIO, ("not written", 0, 1, errno.EIO, Refusal.PLACE), 1),
        ("write", errno.ENOSPC, ("not written", 0, 1, errno.ENOSPC, Refusal.FULL), 1),
        ("write", errno.EROFS, ("not written", 0, 1, errno.EROFS, Refusal.PLACE), 1),
        ("write", errno.ENODEV, ("not written", 0, 1, errno.ENODEV, Refusal.GONE), 1),
        ("write", errno.ENOTCONN, ("not written", 0, 1, errno.ENOTCONN, Refusal.GONE), 0),
    ],
)
def test_a_bad_place_waits_and_a_lost_connection_does_not(
    step: str, number: int, told: tuple[object, ...], withheld: int
) -> None:
    rig = Rig(1)
    rig.transfers.compare = step == "compare"
    rig.begin()
    if step != "read":
        rig.mirror.finish(rig.primary)
    rig.secondary.connected = number != errno.ENOTCONN
    rig.mirror.fail(rig.primary if step == "read" else rig.secondary, number)
    assert rig.told == [told, ("proceed", 0)]
    assert rig.transfers.withheld_blocks == withheld


# -- what the secondary need not do -----------------------------------------------------------


def zeros_refused(number: int) -> Rig:
    """A run of zeros was sent, and zeroing answered with an error."""
    rig = Rig(2, fill=0)
    rig.begin()
    rig.mirror.finish(rig.primary)
    assert rig.secondary.asked("zero") == [(0, 2)]
    rig.secondary.fail_next = {"write": [number]}  # a simulated disk zeroes by writing
    rig.mirror.finish(rig.secondary)
    rig.secondary.fail_next = {}
    return rig


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC]
)
def test_zeros_that_are_refused_are_written(number: int) -> None:
    rig = zeros_refused(number)
    assert rig.told == []
    assert rig.secondary.asked("write") == [(0, 2)]
    rig.mirror.finish(rig.secondary)
    assert rig.told == [("copied", 0, 2, 2 * BLOCK, 2 * BLOCK), ("proceed", 0)]


def test_zeros_that_cannot_be_written_either_are_a_bad_place() -> None:
    rig = zeros_refused(errno.EIO)
    rig.mirror.fail(rig.secondary, errno.EIO)
    assert rig.told == [("not written", 0, 2, errno.EIO, Refusal.PLACE), ("proceed", 0)]


def test_zeroing_on_a_lost_link_is_not_tried_in_another_form() -> None:
    rig = zeros_refused(errno.ENODEV)
    assert rig.told == [("not written", 0, 2, errno.ENODEV, Refusal.GONE), ("proceed", 0)]
    assert rig.secondary.asked("write") == []


def test_what_a_secondary_may_still_carry_out_is_not_tried_in_another_form() -> None:
    """The zeroing could overtake the write that was to replace it."""
    rig = Rig(1, fill=0)
    rig.secondary.writes_late = True
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.mirror.fail(rig.secondary, errno.EIO)
    assert rig.told[0] == ("not written", 0, 1, errno.EIO, Refusal.GONE)


@pytest.mark.parametrize("first", ["answered", "unanswered"])
def test_one_part_that_may_land_late_goes_before_others_that_failed(first: str) -> None:
    rig = Rig(3)
    rig.primary.visible[BLOCK : 2 * BLOCK] = bytes(BLOCK)  # so there are three parts
    rig.secondary.writes_late = True
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.secondary.finish(1)
    rig.secondary.fail_next = {"write": [errno.ENOSPC]}
    if first == "answered":
        rig.secondary.finish(0)
    rig.secondary.leave_unanswered(0, errno.EIO)
    if first == "unanswered":
        rig.secondary.finish(0)
    rig.mirror.turn()
    assert rig.told[0] == ("not written", 0, 3, errno.EIO, Refusal.GONE)


def test_what_cannot_be_compared_is_sent() -> None:
    rig = Rig(2)
    rig.transfers.compare = True
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.mirror.fail(rig.secondary, errno.EIO)
    assert rig.told == []
    assert rig.secondary.asked("write") == [(0, 2)]
    rig.mirror.finish(rig.secondary)
    assert rig.told == [("copied", 0, 2, 2 * BLOCK, 2 * BLOCK), ("proceed", 0)]


def test_a_run_that_is_refused_is_tried_block_by_block_before_it_is_in_trouble() -> None:
    rig = Rig(2)
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.mirror.fail(rig.secondary, errno.EIO)
    assert rig.transfers.troubles == set()
    rig.begin()
    assert rig.primary.asked("read") == [(0, 2), (0, 1), (1, 1)]


def test_a_trouble_lasts_until_its_place_is_copied() -> None:
    rig = Rig(1)
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.mirror.fail(rig.secondary, errno.ENOSPC)
    assert rig.transfers.troubles == {Trouble.NO_ROOM}
    rig.mirror.loop.advance(1.0)
    rig.begin()
    rig.mirror.fail(rig.primary, errno.EIO)
    assert rig.transfers.troubles == {Trouble.UNREADABLE}, "the latest reason"
    rig.mirror.loop.advance(2.0)
    rig.begin()
    rig.mirror.finish(rig.primary)
    rig.mirror.finish(rig.secondary)
    assert rig.transfers.troubles == set()
