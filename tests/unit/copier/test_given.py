"""copier: extents that are given away to somebody else who copies them from then on."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from bitmapd.copier.ages import Ages
from bitmapd.copier.engine import CopyState
from bitmapd.copier.leaving import Leaving
from bitmapd.copier.passes import Passes
from bitmapd.copier.plan import FIRST_RETRY_S, Plan
from bitmapd.gate.blockset import BlockSet
from tests.support.mirror import BLOCK, LATE_S, PER_EXTENT, Mirror, begun, until_reads
from tests.support.sim import SimLoop

SECOND = PER_EXTENT  # the first block of extent 1


class Freed:
    """What `free` was called for."""

    def __init__(self) -> None:
        self.extents: list[int] = []

    def __call__(self, extents: list[int]) -> None:
        self.extents += extents


def give(mirror: Mirror, *extents: int) -> tuple[set[int], Freed]:
    """The gate has let go of these; what the copier says of them."""
    unsettled = mirror.gate._unsettled
    for extent in extents:
        blocks = mirror.geometry.extent_blocks(extent, extent + 1)
        for dirty in (mirror.gate.current, mirror.gate.taken):
            dirty.discard(*blocks)
        unsettled._copied.discard(extent)
        unsettled._settling = unsettled._settling - {extent}
    mirror.store.drop(list(extents))
    freed = Freed()
    return mirror.copier.given(extents, freed), freed


def being_sent(**options: Any) -> Mirror:
    """The copy of extents 0 and 1 is on its way to the secondary, in one piece."""
    mirror = begun(piece_bytes=2 * PER_EXTENT * BLOCK, **options)
    mirror.put(0, 2 * PER_EXTENT, fill=1)
    until_reads(mirror)
    mirror.finish(mirror.primary)
    assert mirror.secondary.asked("write") == [(0, 2 * PER_EXTENT)]
    return mirror


def held(mirror: Mirror) -> int:
    return mirror.gate.suspect_blocks


# -- copies in flight -----------------------------------------------------------------------------


def test_a_place_without_a_copy_in_flight_is_free_at_once() -> None:
    mirror = begun()
    mirror.put(0)
    waiting, freed = give(mirror, 0, 5)
    assert waiting == set()
    mirror.run(5.0)
    assert freed.extents == []
    assert mirror.copier.in_sync
    assert mirror.copier.copied_bytes == 0


def test_a_place_is_free_when_its_copy_has_answered() -> None:
    mirror = being_sent()
    waiting, freed = give(mirror, 0, 5)
    assert waiting == {0}
    mirror.run(0.0)
    assert freed.extents == [0]


def test_what_was_given_does_not_count_and_its_neighbour_does() -> None:
    mirror = being_sent()
    give(mirror, 0)
    mirror.finish(mirror.secondary)
    assert mirror.copier.copied_bytes == PER_EXTENT * BLOCK
    assert not mirror.gate.may_differ(0, SECOND)
    assert mirror.gate.may_differ(SECOND, SECOND + 1), "until both sides are flushed"
    mirror.run(0.0)
    assert mirror.copier.in_sync


def test_nothing_more_is_sent_of_what_was_given_while_it_was_read() -> None:
    mirror = begun(piece_bytes=2 * PER_EXTENT * BLOCK)
    mirror.put(0, 2 * PER_EXTENT, fill=1)
    until_reads(mirror)
    waiting, freed = give(mirror, 0)
    mirror.run()
    assert waiting == {0}
    assert freed.extents == [0]
    assert mirror.secondary.asked("write") == [(SECOND, PER_EXTENT)]


def test_what_comes_back_is_copied_again_and_after_the_old_copy() -> None:
    mirror = being_sent()
    give(mirror, 0)
    mirror.put(2, fill=2)
    mirror.loop.advance(1.0)
    assert len(mirror.secondary.asked("write")) == 1
    mirror.run(1.0)
    assert mirror.secondary.asked("write")[1:] == [(2, 1)]


def test_a_place_that_came_and_went_again_is_freed_once() -> None:
    mirror = being_sent()
    _, first = give(mirror, 0)
    mirror.put(2, fill=2)
    waiting, second = give(mirror, 0)
    assert waiting == {0}
    mirror.run(1.0)
    assert (first.extents, second.extents) == ([], [0])


def test_a_read_error_of_what_was_given_is_no_trouble_of_ours() -> None:
    mirror = begun()
    mirror.put(0, fill=1)
    until_reads(mirror)
    _, freed = give(mirror, 0)
    mirror.fail(mirror.primary, errno.EIO)
    mirror.run()
    assert freed.extents == [0]
    assert mirror.told("copy-error") == []
    assert mirror.copier.transfers.withheld_blocks == 0


def test_an_error_of_the_secondary_does_not_bring_it_back() -> None:
    mirror = being_sent()
    give(mirror, 0)
    mirror.fail(mirror.secondary, errno.EIO)
    assert mirror.gate.taken.count() == PER_EXTENT
    mirror.run(5.0)
    assert all(first >= SECOND for first, _ in mirror.secondary.asked("write")[1:])
    assert mirror.copier.in_sync


def test_a_run_that_was_revoked_does_not_bring_it_back() -> None:
    mirror = being_sent()
    give(mirror, 0)
    mirror.copier.transfers.revoke()
    mirror.finish(mirror.secondary)
    assert mirror.gate.taken.count() == PER_EXTENT


def test_a_comparison_that_fails_does_not_bring_it_back() -> None:
    mirror = begun(piece_bytes=2 * PER_EXTENT * BLOCK)
    mirror.put(0, 2 * PER_EXTENT, fill=1)
    mirror.copier.transfers.compare = True
    until_reads(mirror)
    mirror.finish(mirror.primary)
    _, freed = give(mirror, 0)
    mirror.secondary.connected = False
    mirror.fail(mirror.secondary, errno.ENOTCONN)
    assert freed.extents == [0]
    assert mirror.gate.taken.count() == PER_EXTENT
    assert mirror.copier.state is CopyState.LINK_DOWN


# -- writes that may land late --------------------------------------------------------------------


def lose(mirror: Mirror) -> None:
    """The connection, with what is in flight."""
    mirror.secondary.connected = False
    mirror.fail(mirror.secondary, errno.ENOTCONN)


def test_what_was_lost_before_it_was_given_is_free_when_it_would_have_been_trusted() -> None:
    mirror = being_sent()
    mirror.secondary.writes_late = True
    lose(mirror)
    assert held(mirror) == 2 * PER_EXTENT
    waiting, freed = give(mirror, 0, 5)
    assert waiting == {0}
    assert held(mirror) == PER_EXTENT, "the neighbour"
    mirror.run(2.0)
    assert mirror.copier.state is CopyState.RUNNING
    mirror.run(LATE_S - 3.0)
    assert freed.extents == []
    mirror.run(3.0)
    assert freed.extents == [0]


def test_what_is_lost_after_it_was_given_is_free_no_earlier() -> None:
    mirror = being_sent()
    mirror.secondary.writes_late = True
    waiting, freed = give(mirror, 0)
    assert waiting == {0}
    lose(mirror)
    assert held(mirror) == PER_EXTENT, "the neighbour"
    mirror.run(2.0)
    mirror.run(LATE_S - 3.0)
    assert freed.extents == []
    mirror.run(3.0)
    assert freed.extents == [0]


def test_a_doubt_of_which_all_was_given_makes_nothing_dirty() -> None:
    mirror = being_sent()
    mirror.secondary.writes_late = True
    lose(mirror)
    _, freed = give(mirror, 0, 1)
    mirror.run(2.0)
    mirror.run(LATE_S)
    mirror.run(1.0)
    assert sorted(freed.extents) == [0, 1]
    assert mirror.copier.in_sync
    assert mirror.copier.oldest_content_s is None


def test_where_nothing_lands_late_the_answer_is_the_end_of_it() -> None:
    mirror = being_sent()
    _, freed = give(mirror, 0)
    lose(mirror)
    assert freed.extents == [0]


def test_what_a_predecessor_sent_is_waited_for() -> None:
    mirror = Mirror()
    mirror.secondary.writes_late = True
    mirror.put(0, 2 * PER_EXTENT)
    mirror.gate.take_recorded()
    mirror.copier.begin_pass(compare=False, predecessor=True)
    mirror.copier.start()
    waiting, freed = give(mirror, 0)
    assert waiting == {0}
    mirror.run(LATE_S - 1.0)
    assert freed.extents == []
    mirror.run(2.0)
    assert freed.extents == [0]


# -- passes, settles ------------------------------------------------------------------------------


def in_a_pass() -> tuple[Mirror, list[int]]:
    """Extents 0 and 1 are to be copied, and followed."""
    mirror = begun(piece_bytes=BLOCK)
    mirror.put(0, 2 * PER_EXTENT, fill=1)
    mirror.gate.take_recorded()
    done: list[int] = []
    mirror.copier.passes.on_done = lambda: done.append(mirror.gate.settles)
    mirror.copier.begin_pass(compare=False)
    return mirror, done


def test_a_pass_ends_without_what_was_given() -> None:
    mirror, done = in_a_pass()
    give(mirror, 0)
    mirror.run(3.0)
    assert len(done) == 1
    assert mirror.copier.passes.copied_bytes == PER_EXTENT * BLOCK


def test_a_pass_of_which_all_was_given_is_over() -> None:
    mirror, done = in_a_pass()
    give(mirror, 0, 1)
    assert done == [], "not from inside the call"
    mirror.turn()
    assert done == [0]
    assert not mirror.copier.passes.under_way
    mirror.run(3.0)
    assert len(done) == 1


@pytest.mark.parametrize("nothing_copied", [False, True])
def test_passes_1_a_settle_that_began_before_ends_it_only_if_nothing_waits(
    nothing_copied: bool,
) -> None:
    passes = Passes(Mirror().geometry)
    passes.begin(BlockSet([(0, 4)]))
    passes.settle_began()
    passes.given(BlockSet([(0, 8)]))
    assert passes.ended(nothing_copied=nothing_copied) is nothing_copied
    passes.settle_began()
    assert passes.ended(nothing_copied=False) is not nothing_copied


def test_passes_1_a_settle_that_began_before_a_pass_does_not_end_it() -> None:
    passes = Passes(Mirror().geometry)
    passes.begin(BlockSet([(0, 4)]))
    passes.copied(0, 4)
    passes.settle_began()
    passes.begin(BlockSet([(4, 8)]))
    passes.copied(4, 8)
    assert not passes.ended(nothing_copied=False)


def test_passes_1_a_settle_that_failed_ends_nothing_later() -> None:
    passes = Passes(Mirror().geometry)
    passes.begin(BlockSet([(0, 4)]))
    passes.copied(0, 4)
    passes.settle_began()
    passes.settle_failed({0})
    assert passes.remaining_bytes == PER_EXTENT * BLOCK
    passes.copied(0, 4)
    assert not passes.ended(nothing_copied=False)


def test_a_settle_that_fails_brings_nothing_back_that_was_given() -> None:
    mirror = being_sent()
    mirror.copier.begin_pass(compare=False)
    mirror.finish(mirror.secondary)
    assert mirror.pending(mirror.secondary) == ["flush"]
    give(mirror, 0)
    mirror.fail(mirror.secondary, errno.EIO)
    mirror.finish(mirror.primary)
    assert mirror.gate.taken.count() == PER_EXTENT
    assert mirror.copier.passes.remaining_bytes == PER_EXTENT * BLOCK


# -- the plan, ages, samples ----------------------------------------------------------------------


def test_the_plan_forgets_what_was_wrong_there() -> None:
    plan = Plan(4)
    taken = BlockSet([(0, 2)])
    assert plan.next(taken, 0.0, lambda *_: False) == (0, 2)
    plan.failed(0, 2, 0.0)
    assert plan.next(taken, 0.0, lambda *_: False) == (0, 1)
    plan.failed(0, 1, 0.0)
    assert plan.next(taken, 0.0, lambda *_: False) == (1, 2)
    plan.failed(1, 2, 0.0)
    plan.given(BlockSet([(0, 1)]))
    assert plan.busy_blocks == 1
    assert plan.next(taken, 0.0, lambda *_: False) == (0, 1), "back, and none the worse"
    assert plan.busy_blocks == 2
    assert plan.next(taken, 2 * FIRST_RETRY_S, lambda *_: False) == (1, 2)


def test_the_plan_forgets_that_it_was_passed_over() -> None:
    plan = Plan(4)
    taken = BlockSet([(0, 1)])
    assert plan.next(taken, 0.0, lambda *_: True) is None
    plan.given(taken)
    plan.new_round(taken, 100.0)
    assert plan.next(taken, 100.0, lambda *_: True) is None, "it is not due"


def test_ages_of_what_was_given_count_no_more() -> None:
    ages, taken = Ages(), BlockSet([(0, 2)])
    ages.joined(taken, 1.0)
    taken.discard(0, 1)
    ages.copied(0, 1, taken)
    taken.add(5, 6)
    ages.joined(taken, 7.0)
    taken.discard(1, 2)
    ages.given(BlockSet([(1, 2)]), taken, nothing_copied=False)
    assert ages.oldest_s == 1.0, "copied and not flushed"
    ages.given(BlockSet([(0, 1)]), taken, nothing_copied=True)
    assert ages.oldest_s == 7.0
    taken.discard(5, 6)
    ages.given(BlockSet([(5, 6)]), taken, nothing_copied=True)
    assert ages.oldest_s is None


def test_what_was_given_is_compared_no_more() -> None:
    mirror = begun()
    mirror.put(2)
    mirror.run(3.0)
    give(mirror, 0)
    assert mirror.copier.samples.lately == []
    mirror.primary.visible[2 * BLOCK] ^= 1  # by its new owner
    mirror.copier.reconnect()
    mirror.run(1.0)
    assert mirror.told("secondary-forgot") == []


def test_what_is_given_while_it_is_compared_is_not_judged() -> None:
    mirror = begun()
    mirror.put(2)
    mirror.run(3.0)
    mirror.primary.visible[2 * BLOCK] ^= 1
    mirror.copier.reconnect()
    mirror.loop.advance(1.0)
    mirror.finish(mirror.secondary)
    assert mirror.pending(mirror.secondary) == ["read"]
    give(mirror, 0)
    mirror.run(1.0)
    assert mirror.told("secondary-forgot") == []
    assert not mirror.copier.samples.checking


def test_what_is_given_before_it_was_read_is_not_read() -> None:
    mirror = begun()
    for extent in range(6):
        mirror.put(extent * PER_EXTENT)
        mirror.run(1.1)
    mirror.run(3.0)
    mirror.copier.reconnect()
    mirror.loop.advance(1.0)
    mirror.finish(mirror.secondary)
    reads = len(mirror.secondary.asked("read"))
    assert reads == 4, "a few at a time"
    give(mirror, 4, 5)
    mirror.run(1.0)
    assert len(mirror.secondary.asked("read")) == reads


# -- who waits for what ---------------------------------------------------------------------------


def test_leaving_3_free_comes_once_when_every_reason_is_over() -> None:
    loop = SimLoop()
    leaving = Leaving(loop)
    leaving.may_land([1, 2])
    leaving.may_land([1])
    freed = Freed()
    assert leaving.tell({1, 2, 3}, freed) == {1, 2}
    leaving.cannot_land([1, 2])
    assert freed.extents == [], "not from inside the call"
    loop.run_soon()
    assert freed.extents == [2]
    assert leaving
    assert leaving.waits(1)
    leaving.cannot_land([1])
    loop.run_soon()
    assert freed.extents == [2, 1]
    assert not leaving
