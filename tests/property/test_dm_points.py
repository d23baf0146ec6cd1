"""Consistent points of a volume whose hosts write past the gate (see tests/support/simdmpoints)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.support import simpoints
from tests.support.dmpointmistakes import MISTAKES
from tests.support.machines import sim_seeds
from tests.support.simdmpoints import CutWorld, DmWorld
from tests.support.simpoints import EXTENT, SECTOR, Wrong

RUNS = int(os.environ.get("POINTS_RUNS", "10"))
STEPS = int(os.environ.get("POINTS_STEPS", "300"))

Begin = Callable[[int], DmWorld]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    simpoints.small(monkeypatch)


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Worlds that end with the test."""
    worlds: list[DmWorld] = []

    def made(seed: int) -> DmWorld:
        worlds.append(DmWorld(seed))
        return worlds[-1]

    yield made
    for world in worlds:
        world.end()


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_whatever_happens_the_receiver_has_the_last_point(seed: int, begin: Begin) -> None:
    world = begin(seed)
    world.run(STEPS)
    assert world.count["points"]


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_a_point_has_what_hosts_write_while_its_barriers_pass(seed: int) -> None:
    world = CutWorld(seed)
    try:
        world.rounds(20)
    finally:
        world.end()
    assert world.count["points"] >= 20
    assert world.count["direct"]


@pytest.mark.walk
@pytest.mark.parametrize("swap", [False, True], ids=["broken off", "with the new table"])
def test_a_helper_that_dies_at_a_call_of_a_cuts_barriers_costs_no_point(swap: bool) -> None:
    """`points/25`.  `swap`: what was held had been let go on, and nobody was told."""
    found: Counter[str] = Counter()
    for call in count(1):
        world = LosingWorld(22)  # something is direct after two rounds
        try:
            while not world.kernel.direct(world.kernel.table):
                world.rounds(2)
                world.rest()
            world.place = direct_place(world)
            before = world.count["direct"]
            world.write(b"1")  # past the gate
            assert world.count["direct"] > before
            world.left, world.swap = call, swap
            world.site.sender.cut()
            seen = world.seen
            while world.seen == seen:
                world.step(faults=False)
                world.check()
            if world.left > 0:  # the point took fewer
                break
            world.rest()
            world.check()
            assert world.are_equal
        finally:
            world.end()
        found += world.found
    assert found["suspended"]
    assert found["not suspended"]


def direct_place(world: DmWorld) -> int:
    """Where hosts write past the gate; bytes."""
    return min(world.kernel.direct(world.kernel.table)) * EXTENT


class LosingWorld(CutWorld):
    """Its helper dies after so many calls to the kernel."""

    left = 0
    swap = False
    place = 0
    unanswered = 0

    def at_rest(self) -> bool:
        return super().at_rest() and not self.unanswered

    def write(self, fill: bytes) -> None:
        def done(error: OSError | None) -> None:
            self.unanswered -= 1

        self.unanswered += 1
        self.change("write", self.place, fill * SECTOR, done)

    def boot(self, primary: bytes, record: bytes, ledger: bytes) -> None:
        super().boot(primary, record, ledger)
        self.found: Counter[str] = Counter()
        kernel, step = self.kernel, self.kernel.step

        def counted() -> None:
            step()
            self.left -= 1
            if not self.left:
                self.found["suspended" if kernel.suspended else "not suspended"] += 1
                self.write(b"2")
                kernel.lose_helper(swap=self.swap)
                assert not kernel.suspended

        kernel.step = counted  # type: ignore[method-assign]


@pytest.mark.walk
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(Wrong):
        run_many(begin)


def run_many(begin: Begin) -> None:
    for seed in range(30):
        world = CutWorld(seed)
        try:
            world.rounds(20)
        finally:
            world.end()
    for seed in range(60):
        begin(seed).run(400)


def test_it_stops_when_no_barrier_of_its_own_is_under_way(begin: Begin) -> None:
    world = begin(1)
    while not world.kernel.direct(world.kernel.table):
        world.run(50)
    world.change("write", direct_place(world), bytes(4096), lambda error: None)
    world.settle()
    following = world.site.sender.following
    assert following is not None
    for _ in range(10):  # QUIET_S, and up to LOOK_S until that is seen
        if not following.under_way:
            world.advance(0.25)
            world.site.loop.run_soon()
    assert following.under_way
    stopped: list[bool] = []
    world.site.sender.stop(lambda: stopped.append(True))
    world.run_soon()
    assert not stopped
    world.settle()
    assert stopped
