"""A view of a point, while a receiver goes on to take, commit and apply later ones.

V1 What is read from a view is the point that it was opened at, byte for byte, with what was written
   to the view since; whatever was applied meanwhile, and in whatever order the disks answer.
V2 What is written to a view is in no image.
V3 A view delays no point for good: one that is full, fails or is too slow ends, and the point is
   applied.
"""

from __future__ import annotations

import errno
import os
import random

import pytest

from bitmapd.receiver.view import PATIENCE_S, View
from tests.support.machines import sim_seeds
from tests.support.sim import SECTOR, SimDisk, drain
from tests.support.simreceiver import (
    BLOCK,
    GEOMETRY,
    IMAGE_BYTES,
    Machine,
    Script,
    exchange,
    fresh,
    point,
    small,
)

RUNS = int(os.environ.get("VIEW_RUNS", "12"))
STEPS = int(os.environ.get("VIEW_STEPS", "600"))


@pytest.fixture(autouse=True)
def few_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


class World:
    """A receiver with two points, and a view of the second one."""

    def __init__(self, seed: int, limit_bytes: int = IMAGE_BYTES) -> None:
        self.rng = random.Random(seed)
        self.machine, self.script = fresh(), Script(self.rng)
        for _ in range(2):
            self.script.write()
            point(self.script, self.machine)
        self.overlay = SimDisk("overlay", IMAGE_BYTES)
        self.ends: list[OSError] = []
        self.model = bytearray(self.image)
        self.busy = False
        self.reads = 0
        self.view = open_view(self.machine, self.overlay, limit_bytes, self.ends)

    @property
    def image(self) -> bytes:
        return bytes(self.machine.image.visible[: GEOMETRY.size_bytes])

    def operate(self) -> None:
        """Something somewhere, in whole sectors, by one user of the view after the other."""
        rng = self.rng
        first = rng.randrange(GEOMETRY.size_bytes // SECTOR)
        length = min(rng.choice((1, 8, 9, 40, 400)), GEOMETRY.size_bytes // SECTOR - first)
        offset, length = first * SECTOR, length * SECTOR
        self.busy = True
        kind = rng.random()
        if kind < 0.6:
            buffer = memoryview(bytearray(length))

            def was_read(error: OSError | None) -> None:
                self.busy = False
                if self.view.has_ended:
                    assert error is not None
                    return
                assert error is None
                assert buffer == self.model[offset : offset + length]  # V1
                self.reads += 1

            self.view.read(offset, buffer, was_read)
            return
        data = bytes(length) if kind < 0.7 else rng.randbytes(length)

        def was_written(error: OSError | None) -> None:
            self.busy = False
            if error is None:
                self.model[offset : offset + length] = data

        if kind < 0.7:
            self.view.zero(offset, length, was_written)
        else:
            self.view.write(offset, memoryview(bytearray(data)), was_written)

    def step(self) -> None:
        rng, script = self.rng, self.script
        x = rng.random()
        if x < 0.5:
            busy = [disk for disk in (*self.machine.disks, self.overlay) if disk.pending]
            if busy:
                disk = rng.choice(busy)
                disk.finish(rng.randrange(len(disk.pending)))
            self.machine.loop.run_soon()
        elif x < 0.65:
            if not self.busy:
                self.operate()
        elif x < 0.7:
            if len(script.dirty) < 3:
                script.write()
        elif x < 0.8:
            if script.wire is None:
                script.connect(self.machine)
            else:
                script.wire.deliver()
        elif x < 0.9:
            script.take()
        elif x < 0.95:
            script.send(rng.choice((1, 2, 5)))
        else:
            script.end()

    def settle(self) -> None:
        drain(self.machine.loop, *self.machine.disks, self.overlay)


def open_view(machine: Machine, overlay: SimDisk, limit_bytes: int, ends: list[OSError]) -> View:
    applier = machine.receiver.applier
    assert applier is not None
    assert applier.is_whole
    view = View(GEOMETRY, machine.image, overlay, limit_bytes, machine.loop, ends.append)
    applier.guard(view)
    return view


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_a_view_stays_at_its_point_and_points_go_on(seed: int) -> None:
    world = World(seed)
    for _ in range(STEPS):
        world.step()
    world.settle()
    exchange(world.script, world.machine, lambda: world.settle() is not None)
    while world.script.send(4):
        exchange(world.script, world.machine)
        world.settle()
    world.script.end()
    for _ in range(10):
        exchange(world.script, world.machine)
        world.settle()
    page = world.machine.receiver.journal.page
    assert page.applied == page.committed > 2
    incarnation = world.script.committed_by[page.applied]
    assert world.image == world.script.points[incarnation, page.applied]  # V2
    assert not world.ends
    assert world.reads
    whole = memoryview(bytearray(GEOMETRY.size_bytes))
    errors: list[OSError | None] = []
    world.view.read(0, whole, errors.append)
    world.settle()
    assert errors == [None]
    assert whole == world.model  # V1


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_a_view_that_is_full_ends_and_the_point_is_applied(seed: int) -> None:
    world = World(seed, limit_bytes=2 * BLOCK)
    for _ in range(STEPS):
        world.step()
        if world.ends:
            break
    for _ in range(STEPS):
        world.step()
    world.settle()
    page = world.machine.receiver.journal.page
    assert page.applied == page.committed
    if world.ends:
        assert [error.errno for error in world.ends] == [errno.ENOSPC]
        assert world.view.has_ended
    assert world.view.overlay_bytes <= world.view.limit_bytes


def one_more_point(world: World) -> int:
    """Committed, and the number of it."""
    script, machine = world.script, world.machine
    script.write()
    exchange(script, machine)
    while script.send(4):
        exchange(script, machine)
    assert script.end()
    exchange(script, machine)
    return machine.receiver.journal.page.committed


def test_a_view_whose_overlay_does_not_answer_ends_after_a_while() -> None:
    world = World(1)
    number = one_more_point(world)  # `exchange` leaves the overlay alone
    page = world.machine.receiver.journal.page
    assert (page.committed, page.applied) == (number, number - 1)
    assert world.overlay.pending
    world.machine.loop.advance(PATIENCE_S - 0.1)
    assert not world.ends
    world.machine.loop.advance(0.2)
    world.machine.settle()
    assert world.machine.receiver.journal.page.applied == number  # V3
    assert [error.errno for error in world.ends] == [errno.ETIMEDOUT]
    idle: list[bool] = []
    world.view.when_idle(lambda: idle.append(True))
    assert not idle
    world.settle()
    assert idle


@pytest.mark.parametrize("disk", ["image", "overlay"])
def test_a_view_that_cannot_copy_ends_and_the_point_is_applied(disk: str) -> None:
    world = World(1)
    if disk == "image":
        world.machine.image.fail_next["read"] = [errno.EIO]
    else:
        world.overlay.fail_next["write"] = [errno.EIO]
    number = one_more_point(world)
    world.settle()
    assert world.machine.receiver.journal.page.applied == number  # V3
    assert [error.errno for error in world.ends] == [errno.EIO]


def test_a_user_who_finds_no_room_is_refused_and_the_view_goes_on() -> None:
    world = World(1, limit_bytes=BLOCK)
    errors: list[OSError | None] = []
    world.view.write(0, memoryview(bytearray(b"a" * BLOCK)), errors.append)
    world.settle()
    world.view.write(BLOCK, memoryview(bytearray(b"b" * BLOCK)), errors.append)
    world.settle()
    world.view.write(2 * BLOCK, memoryview(bytearray(b"b" * SECTOR)), errors.append)
    world.settle()
    world.view.write(SECTOR, memoryview(bytearray(b"c" * SECTOR)), errors.append)
    world.settle()
    assert [error and error.errno for error in errors] == [None, errno.ENOSPC, errno.ENOSPC, None]
    assert world.view.overlay_bytes == BLOCK
    assert not world.view.has_ended


def test_what_the_overlay_refuses_is_no_part_of_the_view() -> None:
    world = World(1)
    errors: list[OSError | None] = []
    world.overlay.fail_next["write"] = [errno.EIO]
    world.view.write(0, memoryview(bytearray(b"a" * BLOCK)), errors.append)
    world.settle()
    world.machine.image.fail_next["read"] = [errno.EIO]
    world.view.write(0, memoryview(bytearray(b"a" * SECTOR)), errors.append)
    world.settle()
    assert [error and error.errno for error in errors] == [errno.EIO, errno.EIO]
    assert world.view.overlay_bytes == 0
    whole = memoryview(bytearray(GEOMETRY.size_bytes))
    world.view.read(0, whole, errors.append)
    world.settle()
    assert whole == world.model


def test_two_users_of_one_block_take_turns() -> None:
    """The second one sees what the first one wrote; another block's user does not wait."""
    world = World(1)
    done: list[str] = []
    first, second = b"a" * SECTOR, memoryview(bytearray(SECTOR))
    apart = memoryview(bytearray(SECTOR))
    world.view.write(0, memoryview(bytearray(first)), lambda error: done.append("write"))
    world.view.read(0, second, lambda error: done.append("read"))
    world.view.read(3 * BLOCK, apart, lambda error: done.append("apart"))
    world.machine.loop.run_soon()
    (reading,) = [op for op in world.machine.image.pending if op.offset_bytes == 3 * BLOCK]
    world.machine.image.finish(world.machine.image.pending.index(reading))
    assert done == ["apart"]
    world.settle()
    assert done == ["apart", "write", "read"]
    assert second == first


def test_hints_and_flushes_succeed_and_change_nothing() -> None:
    world = World(1)
    errors: list[OSError | None] = []
    found: list[list[tuple[int, int]]] = []
    world.view.trim(0, BLOCK, errors.append)
    world.view.flush(errors.append)
    world.view.allocation(0, BLOCK, lambda error, parts: found.append(parts))
    assert errors == []
    world.settle()
    assert errors == [None, None]
    assert found == [[(BLOCK, 0)]]
    assert not world.overlay.history


def test_what_was_on_its_way_when_the_view_ended_is_refused() -> None:
    world = World(1)
    errors: list[OSError | None] = []
    world.view.read(0, memoryview(bytearray(SECTOR)), errors.append)
    world.machine.loop.run_soon()
    world.view.end()
    world.view.read(0, memoryview(bytearray(SECTOR)), errors.append)
    idle: list[bool] = []
    world.view.when_idle(lambda: idle.append(True))
    world.settle()
    assert [error and error.errno for error in errors] == [errno.EIO, errno.EIO]
    assert idle
    number = one_more_point(world)
    assert world.machine.receiver.journal.page.applied == number
