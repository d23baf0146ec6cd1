"""Consistent points over real gate, record, sender and receiver (see tests/support/simpoints)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial

import pytest

from bitmapd.errors import RecordDamagedError
from bitmapd.points.messages import Data, Have
from bitmapd.points.pieces import Digest
from bitmapd.points.sender import Phase
from bitmapd.points.uplink import Uplink
from bitmapd.receiver.receiver import Receiver, State
from bitmapd.record.geometry import PIECE_BYTES
from tests.support import simpoints
from tests.support.machines import sim_seeds
from tests.support.pointmistakes import (
    MISTAKES,
    pieces_of_what_is_unknown,
    pieces_since_the_cut,
)
from tests.support.policies import KeepNothing
from tests.support.sim import drain
from tests.support.simpoints import Growing, World, Wrong
from tests.support.simreceiver import BLOCK

RUNS = int(os.environ.get("POINTS_RUNS", "10"))
STEPS = int(os.environ.get("POINTS_STEPS", "300"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    simpoints.small(monkeypatch)


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_whatever_happens_the_receiver_has_the_last_point(seed: int) -> None:
    world = World(seed)
    world.run(STEPS)
    assert world.count["points"]


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_a_point_has_the_size_that_the_volume_had_at_its_cut(seed: int) -> None:
    """While it grows, and whoever dies meanwhile."""
    world = Growing(seed)
    world.run(STEPS)
    assert world.count["points"]


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_so_it_has_when_the_journal_has_to_be_arranged_anew(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    simpoints.moving(monkeypatch)
    world = Growing(seed)
    world.run(STEPS)
    assert world.count["points"]


@pytest.mark.parametrize("seed", range(3))
def test_what_the_image_has_lost_is_found_and_comes_with_the_next_point(seed: int) -> None:
    """I4, and that it does find something, while hosts write."""
    world = World(seed)
    world.run(100)
    world.damage(2)
    world.damage(7)
    world.verified.clear()
    world.connect()
    for _ in range(20_000):
        if world.verify(repair=True):
            break
        world.step(faults=False)
        if world.rng.random() < 0.02:
            world.host()
    ((error, result),) = world.verified
    assert error is None
    assert result.repaired_bytes == result.unexpected_bytes
    assert not result.undecided_blocks
    for _ in range(20_000):
        if world.at_rest():
            break
        world.step(faults=False)
    world.settle()
    world.check()
    assert world.are_equal


def test_sums_of_before_a_point_was_applied_accuse_nobody() -> None:
    """The receiver answers when what it had committed is in its image."""
    world = connected()
    put(world, 1, 1)
    world.advance(3.0)
    world.settle()
    put(world, 1, 2)
    world.advance(3.0)
    journal = world.machine.journal
    while world.count["points"] < 2:  # committed, and nothing is written to the image
        for disk in (*world.sender_disks, journal):
            while disk.pending:
                world.finish(disk)
        world.to_receiver()
        world.to_sender()
        world.run_soon()
    while world.site.ledger.pending or world.site.primary.pending:
        world.finish(world.site.ledger if world.site.ledger.pending else world.site.primary)
    assert world.machine.receiver.journal.page.applied == 1
    assert world.site.gate.in_sync
    world.verify()
    world.settle()
    for _ in range(4):
        world.advance(0.3)
        world.settle()
    ((error, result),) = world.verified
    assert (error, result.compared_bytes) == (None, simpoints.SIZE)


@pytest.mark.walk
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[mistake](monkeypatch)
    with pytest.raises((Wrong, RecordDamagedError)):  # a journal that cannot be read is lost
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

    def have(self: Uplink, message: Have) -> Iterator[None]:
        here = {first + at for first, count, _ in message.runs for at in range(count)}
        for line in self._sent.lines():
            if line[0] in here:
                self._kept.add(line[0], line[0] + 1)
        if message.last:
            yield from self._compared()

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


def sent_masks(world: World, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(block, mask) of all that is sent from now on."""
    sent: list[tuple[int, int]] = []

    def take(receiver: Receiver, data: Data) -> None:
        sent.extend((entry.block, entry.mask) for entry in data.entries)
        right(receiver, data)

    right = Receiver._take_data
    receiver = world.machine.receiver
    monkeypatch.setitem(receiver._allowed, (State.RECEIVING, Data), partial(take, receiver))
    return sent


def write_pieces(world: World, block: int, piece: int, fill: int) -> None:
    offset = block * BLOCK + piece * PIECE_BYTES
    world.site.write(offset, bytes([fill]) * PIECE_BYTES, lambda error: None)
    world.run_soon()
    drain(world.site.loop, world.site.record, world.site.primary)


def point(world: World) -> None:
    """Cut, send, commit, apply."""
    world.site.sender.cut()
    world.settle()
    world.check()


def twice_in_a_point(world: World) -> None:
    """A piece is sent, the cut is given up, and another piece of the block is written."""
    put(world, 1, 1)
    point(world)
    write_pieces(world, 1, 0, 2)
    world.site.sender.cut()
    world.run_soon()
    world.site.gate.give_up_cut(simpoints.ASKED)
    world.finish(world.site.primary)  # the read
    while world.to_receiver():
        world.run_soon()
    write_pieces(world, 1, 2, 3)
    world.advance(3.0)


def test_a_block_is_sent_with_all_that_changed_since_the_last_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = connected()
    twice_in_a_point(world)
    sent = sent_masks(world, monkeypatch)
    point(world)
    assert sent == [(1, 0b0101)]
    write_pieces(world, 1, 3, 4)
    del sent[:]
    point(world)
    assert sent == [(1, 0b1000)]


def test_pieces_of_a_cut_that_was_given_up_must_not_be_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces_since_the_cut(monkeypatch)
    world = connected()
    twice_in_a_point(world)
    with pytest.raises(Wrong, match="I1"):
        point(world)


def written_before_and_after_a_crash() -> Quiet:
    world = connected()
    put(world, 1, 1)
    point(world)
    write_pieces(world, 1, 0, 2)
    world.crash_sender(power=False)
    world.connect()
    write_pieces(world, 1, 2, 3)
    return world


def test_after_a_crash_of_the_sender_blocks_are_sent_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = written_before_and_after_a_crash()
    sent = sent_masks(world, monkeypatch)
    point(world)
    assert dict(sent)[1] == 0b1111


def test_what_the_record_names_after_a_crash_is_not_known_by_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces_of_what_is_unknown(monkeypatch)
    world = written_before_and_after_a_crash()
    with pytest.raises(Wrong, match="I1"):
        point(world)
