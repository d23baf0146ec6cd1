"""Consistent points over real gate, record, sender and receiver (see tests/support/simpoints)."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from bitmapd.points.messages import Have
from bitmapd.points.pieces import Digest
from bitmapd.points.sender import Phase
from bitmapd.points.uplink import Uplink
from tests.support import simpoints
from tests.support.pointmistakes import MISTAKES
from tests.support.policies import KeepNothing
from tests.support.sim import drain
from tests.support.simpoints import World, Wrong
from tests.support.simreceiver import BLOCK

RUNS = int(os.environ.get("POINTS_RUNS", "10"))
STEPS = int(os.environ.get("POINTS_STEPS", "300"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    simpoints.small(monkeypatch)


@pytest.mark.parametrize("seed", range(RUNS))
def test_whatever_happens_the_receiver_has_the_last_point(seed: int) -> None:
    world = World(seed)
    world.run(STEPS)
    assert world.count["points"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(Wrong):
        run_many(range(40))


def run_many(seeds: Iterable[int]) -> None:
    for seed in seeds:
        World(seed).run(400)


class Quiet(World):
    """Nothing happens but what a test does."""

    policy = KeepNothing


def connected() -> Quiet:
    world = Quiet()
    world.connect()
    world.settle()
    world.advance(0.01)
    return world


def put(world: World, block: int, fill: int) -> None:
    world.site.write(block * BLOCK, bytes([fill]) * BLOCK, lambda error: None)
    world.run_soon()
    drain(world.site.loop, world.site.record, world.site.primary)


def sent_again_and_lost(world: World) -> None:
    """A block is sent ahead and arrives, is written again, and its second sending gets lost."""
    sender = world.site.sender
    put(world, 1, 1)
    sender.cut()
    world.run_soon()
    world.site.gate.give_up_cut(simpoints.ASKED)
    while world.site.primary.pending:
        world.finish(world.site.primary)
    while world.to_receiver():
        world.run_soon()
    assert sender.uplink.entries == 1
    put(world, 1, 2)
    world.advance(3.0)
    while world.site.primary.pending:
        world.finish(world.site.primary)
    assert sender.phase is Phase.ENDED
    world.cut_link()
    world.connect()


def test_a_sending_that_was_lost_is_not_the_one_before_it() -> None:
    world = connected()
    sent_again_and_lost(world)
    for _ in range(5):
        world.settle()
        world.advance(3.0)
        world.check()
    assert world.at_rest()
    assert world.count["points"] == 1


def test_blocks_alone_do_not_tell_one_sending_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same with a sender and a receiver that compare blocks and not stamps."""

    def have(self: Uplink, message: Have) -> None:
        here = {first + at for first, count, _ in message.runs for at in range(count)}
        for line in self._sent.lines():
            if line[0] in here:
                self._kept.add(line[0], line[0] + 1)
        if message.last:
            self._compared()

    def add(self: Digest, block: int, stamp: int, mask: int, sum64: int) -> None:
        self._sum += 1 << block

    def remove(self: Digest, block: int, stamp: int, mask: int, sum64: int) -> None:
        self._sum -= 1 << block

    monkeypatch.setattr(Uplink, "_have", have)
    monkeypatch.setattr(Digest, "add", add)
    monkeypatch.setattr(Digest, "remove", remove)
    world = connected()
    sent_again_and_lost(world)
    world.settle()
    with pytest.raises(Wrong, match="I1"):
        world.check()


def test_an_extent_that_left_the_record_while_a_write_waited_is_recorded_again() -> None:
    """A write over two extents waits in one for a read, and the other, which is clean and recorded,
    is evicted meanwhile."""
    world = connected()
    gate, sender = world.site.gate, world.site.sender
    per = simpoints.GEOMETRY.blocks_per_extent
    put(world, per - 1, 1)
    world.site.store.add([(1, 2)], (), lambda error: None)
    world.run_soon()
    while world.site.record.pending:
        world.finish(world.site.record)
    sender.cut()
    world.run_soon()
    assert gate.is_pending(per - 1)
    world.site.write((per - 1) * BLOCK, b"\2" * (2 * BLOCK), lambda error: None)
    gate.drop_clean([1])
    world.site.store.flush_clears()
    while world.site.record.pending:
        world.finish(world.site.record)
    world.finish(world.site.primary)  # the read
    for _ in range(20):
        world.check()
    for _ in range(5):
        world.settle()
        world.advance(3.0)
        world.check()
    assert world.at_rest()
