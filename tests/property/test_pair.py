"""Two appliances in a simulated world (`tests/support/simpair`), at random.

docs/partner-protocol.md names the rules that hold after every step.

`PAIR_STEPS` is the number of steps of each kind of trouble.
"""

from __future__ import annotations

import errno
import os

import pytest

from bitmapd.errors import BitmapdError
from bitmapd.media.buffers import aligned
from bitmapd.partner.node import Phase, State
from tests.support.simpair import BLOCK, EXTENT, SIZE, Side, World, walk

STEPS = int(os.environ.get("PAIR_STEPS", "24000"))
LENGTHS = (60, 400, 1500)  # of one walk

TROUBLES = {
    "nothing": (),
    "cuts": ("cut",),
    "hand-overs": ("cut", "hand-over"),
    "crashes": ("crash",),
    "takeovers": ("cut", "takeover"),
    "fencing": ("cut", "crash", "takeover"),
    "stops": ("cut", "stop"),
    "planned": ("cut", "take"),
    "errors": ("cut", "errors", "hand-over"),
    "records": ("cut", "records", "crash", "takeover"),
    "growth": ("cut", "resize", "crash"),
    "failing growth": ("cut", "resize", "crash", "records"),
    "kernels": ("cut", "crash", "takeover", "stop", "take", "hand-over", "kernel"),
    "lies": ("lie", "hand-over"),
    "everything": (
        *("cut", "crash", "takeover", "hand-over", "stop", "take", "errors", "records", "resize"),
    ),
}


@pytest.mark.walk
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("troubles", TROUBLES)
def test_the_rules_hold_whatever_happens(troubles: str, length: int) -> None:
    for seed in range(max(1, STEPS // len(LENGTHS) // length)):
        walk(seed, frozenset(TROUBLES[troubles]), length)


@pytest.mark.walk
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("troubles", sorted(TROUBLES.keys() - {"lies", "hand-overs", "kernels"}))
def test_they_hold_for_a_keeper_and_its_host_whose_record_is_lost_again_and_again(
    troubles: str, length: int
) -> None:
    for seed in range(max(1, STEPS // len(LENGTHS) // length // 3)):
        walk(seed, frozenset(TROUBLES[troubles]), length, kept=True)


@pytest.mark.parametrize(
    ("seed", "troubles", "length"),
    [
        # The first exchange, while the record of node 1 cannot be written: node 2 has the flag.
        pytest.param(7000282, "errors", 60, id="only-one-can-say-VOLATILE"),
        pytest.param(7000284, "errors", 1500, id="the-other-says-it-of-what-is-on-its-way"),
        # One has READY and may go on in a cut, before the other has come up with it.
        pytest.param(7000634, "cuts", 400, id="gone-on-before-the-other-is-up"),
    ],
)
def test_walks_that_have_shown_something(seed: int, troubles: str, length: int) -> None:
    walk(seed, frozenset(TROUBLES[troubles]), length)


@pytest.mark.parametrize(
    ("seed", "troubles", "length"),
    [
        # A host with a new record: its superblock named the volume before its record named what it
        # had learnt of a keeper that lacked something itself.
        pytest.param(9500023, "stops", 400, id="paired-and-not-stored"),
        pytest.param(9500067, "crashes", 1500, id="exchanging-and-not-stored"),
        pytest.param(9500219, "everything", 1500, id="a-keeper-that-has-said-BYE"),
        pytest.param(9500347, "failing growth", 1500, id="a-size-that-is-not-in-force"),
    ],
)
def test_walks_with_a_keeper_that_have_shown_something(
    seed: int, troubles: str, length: int
) -> None:
    walk(seed, frozenset(TROUBLES[troubles]), length, kept=True)


def settle(world: World, turns: int) -> None:
    """Everything that is under way ends, and what is clean leaves the records."""
    for _ in range(turns):
        moved = True
        while moved:
            moved = False
            for side in world.sides:
                while world.deliver(side) or world.superblock(side):
                    moved = True
                while world.finish(side, anything=True):
                    moved = True
        for side in world.sides:
            side.gate.policy.generous = False
            side.loop.advance(1.1)
            side.gate.tick()
            side.rights.tick()
            side.node.tick()
        world.check()


def test_a_new_size_that_has_landed_with_an_error_is_named_whatever_comes_of_the_old_end() -> None:
    """The write of a superblock fails and has landed, the extent of the old end is given away,
    copied and dropped, and both nodes die before the command is given again."""
    world = World(1, frozenset())
    one, two = world.sides
    one.relies = two.relies = False  # else everything would be compared
    world.connect()
    settle(world, 3)
    assert one.node.state is two.node.state is State.PAIRED
    world.size_bytes = SIZE + BLOCK
    ended: list[BitmapdError | None] = []
    one.node.growth.begin(world.size_bytes, ended.append)
    while not one.superblocks:
        settle_one(world)
    write, done, _ = one.superblocks.pop()
    write()
    done(OSError(errno.EIO, "simulated"))
    settle(world, 3)
    assert isinstance(ended[0], BitmapdError)
    last = one.geometry.extents - 1
    block = aligned(BLOCK)
    block[:] = b"\xaa" * BLOCK
    written: list[OSError | None] = []
    two.gate.write(last * EXTENT, block, written.append)
    settle(world, 25)
    assert written == [None]
    for side in world.sides:
        assert not side.rights.own[last]
        assert not side.store.recorded[last]
        assert side.store.settled
        assert not side.lasting.volatile
    for side in world.sides:
        world.crash(side)
        world.check()
    for side in world.sides:
        world.restart(side)
        assert side.geometry.size_bytes == world.size_bytes, "the next process begins with it"
    world.heal()


def settle_one(world: World) -> None:
    """One thing at each side, but no superblock of node 1."""
    for side in world.sides:
        world.deliver(side)
        world.finish(side, anything=True)
        side.loop.run_soon()
    world.superblock(world.sides[1])


def write_to(world: World, number: int, extent: int) -> list[OSError | None]:
    """A block of a host's, at this node; how it ends."""
    ended: list[OSError | None] = []
    block = aligned(BLOCK)
    block[:] = b"\xcc" * BLOCK
    world.sides[number - 1].gate.write(extent * EXTENT, block, ended.append)
    return ended


def finish_all(side: Side, world: World) -> None:
    while world.finish(side, anything=True) or world.superblock(side):
        pass


def test_what_a_node_has_stored_before_it_said_ready_counts_though_it_never_came_up() -> None:
    """The other comes up with that READY, and relies on it: its own record fails.  The link is
    lost before this node has come up, and then the other dies."""
    world = World(3, frozenset())
    world.falls_back, world.record_on, world.stored_often = True, "both", 1.0
    one, two = world.sides
    for side in world.sides:
        side.die()
        world.restart(side)
    world.connect()
    settle(world, 3)
    assert one.node.state is two.node.state is State.PAIRED
    world.crash(two)
    world.notice(one)
    world.takeover(one)
    settle(world, 1)
    assert one.node.state is State.ALONE
    one.broken = True
    ended = write_to(world, 1, 0)
    settle(world, 3)
    assert ended[0] is not None
    assert one.rights.own[0]
    assert one.store.failing
    world.restart(two)
    world.connect()
    while two.node.phase is not Phase.READY or not world.connection.queues[0]:
        world.deliver(one)
        if two.node.phase is not Phase.READY:
            world.deliver(two)
        finish_all(two, world)
    while world.deliver(one):
        pass
    assert (one.node.state, two.node.state) == (State.PAIRED, State.WAITING)
    ended = write_to(world, 1, 0)
    finish_all(one, world)
    assert ended == [None]
    world.check()
    world.connection.queues[1].clear()
    world.cut()
    world.crash(one)
    one.broken = False
    world.notice(two)
    world.restart(one)
    world.check()
    world.heal()
