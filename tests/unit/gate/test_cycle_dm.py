"""gate/cycle where hosts write past the gate (invariant 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest

from bitmapd.gate.cycle import CutGate
from bitmapd.gate.elsewhere import Collected, Run
from bitmapd.gate.routes import Routes
from tests.support.mirror import PER_EXTENT
from tests.support.sim import drain
from tests.unit.gate.test_cycle import Cuts


class Past:
    """What of a direct path a gate with cuts asks in these tests."""

    def __init__(self) -> None:
        self.routes = Routes()
        self.is_still, self.written, self.can_grow = True, False, True
        self.asked: list[tuple[list[Run], Collected]] = []
        self.grown: list[list[Run]] = []

    def barrier(self, recorded: Iterable[Run], done: Collected) -> None:
        self.asked.append((list(recorded), done))

    def grow(self, recorded: Iterable[Run], done: Callable[[], None]) -> None:
        self.grown.append(list(recorded))
        done()

    def bring(self, runs: Sequence[Run] | None) -> None:
        self.asked[-1][1](runs)

    def gated_hit(self, first: int, stop: int) -> None:
        self.routes.gated_hit(first, stop)

    def is_open(self, extent: int) -> bool:
        return self.routes.is_open(extent)


@pytest.fixture
def past() -> Past:
    return Past()


@pytest.fixture
def cuts(past: Past) -> Cuts:
    made = Cuts()
    made.gate = CutGate(
        made.geometry,
        made.primary,
        made.store,
        made.policy,
        made.loop,
        limit_extents=100,
        direct=past,  # type: ignore[arg-type]
    )
    made.gate.reader = made
    return made


def put(cuts: Cuts, block: int) -> None:
    cuts.write(block)
    drain(cuts.loop, cuts.record, cuts.primary)


def test_no_cut_is_made_while_hosts_write_past_the_gate(cuts: Cuts, past: Past) -> None:
    past.is_still = False
    with pytest.raises(RuntimeError, match="past the gate"):
        cuts.gate.begin_cut(lambda: None)
    past.is_still = True
    cuts.gate.begin_cut(lambda: None)
    assert not past.asked, "a cut needs no barrier"


def test_nobody_to_follow(cuts: Cuts) -> None:
    with pytest.raises(RuntimeError):
        Cuts().gate.follow(lambda passed: None)


def test_in_a_cut_only_what_was_read_may_be_direct(cuts: Cuts, past: Past) -> None:
    for block in (0, PER_EXTENT, 3 * PER_EXTENT):
        put(cuts, block)
    cuts.gate.begin_cut(lambda: None)
    cuts.loop.run_soon()
    cuts.gate.copied(PER_EXTENT, PER_EXTENT + 1)
    passed: list[bool] = []
    cuts.gate.follow(passed.append)
    assert past.asked[-1][0] == [(1, 2)]
    past.bring(())
    assert not passed, "from inside"
    cuts.loop.run_soon()
    grown: list[bool] = []
    cuts.gate.grow_direct(lambda: grown.append(True))
    assert past.grown == [[(1, 2)]]
    assert not grown, "from inside"
    cuts.loop.run_soon()
    assert grown
    cuts.gate.end_cut()
    cuts.gate.follow(passed.append)
    assert past.asked[-1][0] == [(0, 2), (3, 4)]
    past.bring(None)
    cuts.loop.run_soon()
    assert passed == [True, False]


def test_what_a_barrier_brings_is_of_this_era_and_changed_who_knows_where(
    cuts: Cuts, past: Past
) -> None:
    for block in (0, 5):
        put(cuts, block)
    cuts.gate.begin_cut(lambda: None)
    cuts.loop.run_soon()
    put(cuts, 6)
    since = cuts.gate.oldest_dirty_s()
    cuts.gate.follow(lambda passed: None)
    past.bring([(4, 7)])
    gate = cuts.gate
    assert list(gate.current.runs()) == [(4, 7)]
    assert list(gate.taken.runs()) == [(0, 1), (5, 6)], "nothing becomes pending"
    assert gate.changes.of(5, pending=True) is not None
    assert gate.changes.of(5, pending=False) is None
    assert gate.oldest_dirty_s() == since


def test_what_a_round_brings_is_unknown_too(cuts: Cuts, past: Past) -> None:
    put(cuts, 0)
    cuts.gate.take_era(lambda: None)
    past.bring([(0, 2)])
    assert list(cuts.gate.taken.runs()) == [(0, 2)]
    assert cuts.gate.changes.of(0, pending=False) is None


def test_the_table_is_no_reason_for_a_point(cuts: Cuts, past: Past) -> None:
    assert not cuts.gate.wants_era
    past.written = True
    assert cuts.gate.wants_era
