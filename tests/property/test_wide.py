"""The mirror of `test_mirror` in a worse world, with an administrator who does as he pleases.

What is worse: a write that fails is carried out in part; a flush that fails has lost data, and
reports it once; the secondary is a server that keeps what a lost connection or a dead process had
sent, and carries it out within `LATE_S` of the next connection; bitmapd is killed with requests
queued; memory for copies is short.  What is done meanwhile, at any moment: pause, resume, resync
with and without comparing, verify with repair, other settings, another policy, a new connection,
and growth: in the order of bitmapd/volume/resize and `Volume._grow`, cut short by an error or a
crash anywhere, and asked for again with another size.

Each example has some of these troubles only, since some hide what others show: after a start
everything recorded is copied.

In sync means: equal, but for places that the record names and that are watched.  That, and what
`test_mirror` demands, after every step.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from bitmapd.copier.comparing import BothRead
from bitmapd.copier.engine import CopyState
from bitmapd.copier.verify import Verify, VerifyResult
from bitmapd.errors import BitmapdError
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool
from bitmapd.record import tool
from bitmapd.record.updates import SuperblockUpdates
from bitmapd.volume.resize import new_page_states
from tests.property.test_mirror import BLOCK, EXTENT, GEOMETRY, SIZE, Clock, MirrorMachine, seeds
from tests.support.machines import machine_settings, sim_seeds
from tests.support.policies import MischievousPolicy
from tests.support.records import SimMedium, blank_image, load_image
from tests.support.sim import LATE_S, SECTOR, SimDisk

TROUBLES = (
    "link", "kill", "cut", "cache", "pause", "resync", "verify", "repair", "policy", "settings",
    "reconnect", "resize",
)  # fmt: skip


LARGEST = SIZE + 5 * EXTENT + SECTOR
FATES = (None, None, 0.0, 0.5, 1.0)


class FarDisk(SimDisk):
    """Ghosts of a lost connection have their time from when there is a new one."""

    machine: WideMachine

    def finish(self, index: int = 0) -> None:
        opened = self.pending[index].kind == "open"
        super().finish(index)
        if opened and self.connected:
            self.greet(self.machine.loop, self.machine.rng)


class WideMachine(MirrorMachine):
    pool_bytes = 4 * BLOCK

    @property
    def late_writes_s(self) -> float:
        return LATE_S if self.late else 0.0

    @initialize(
        seed=seeds,
        compare=st.booleans(),
        late=st.booleans(),
        harm=st.booleans(),
        troubles=st.sets(st.sampled_from(TROUBLES)),
    )
    def first_boot(
        self, seed: int, compare: bool, late: bool, harm: bool, troubles: set[str]
    ) -> None:
        self.compare = compare
        self.late = late
        self.harm = harm
        self.troubles = sorted(troubles)
        self.serial = 0
        self.rng = Random(seed)
        self.verifying: Verify | None = None
        self.secondary = self.far_disk(bytes(SIZE))
        self.boot(blank_image(GEOMETRY), bytes(SIZE), bytes(SIZE))

    def far_disk(self, content: bytes) -> FarDisk:
        disk = FarDisk("secondary", len(content), content)
        disk.machine = self
        disk.writes_late = self.late
        return disk

    def boot(self, record: bytes, primary: bytes, secondary: bytes) -> None:
        """A server outlives a power cut of the host."""
        if self.late:
            self.secondary.abandon()  # the connection of the process that is gone
        far = self.secondary if self.late else self.far_disk(secondary)
        super().boot(record, primary, secondary, far)

    def begin(self) -> None:
        self.verifying = None
        self.growing = self.grown_in_part = False
        if self.harm:
            for disk in self.disks:
                disk.luck = self.rng
        loaded = load_image(bytes(self.record.durable))
        size_bytes = loaded.superblock.geometry.size_bytes
        if self.primary.size_bytes < size_bytes:  # or nobody could start the volume
            self.primary.resize(size_bytes, b"\x5a")
        self.medium = SimMedium(self.record, self.superset_now)
        self.updates = SuperblockUpdates(self.medium, loaded)
        super().begin()
        self.losses = self.gate.lost_writes.listener()  # a host's connection
        if self.late and self.secondary.connected:
            self.secondary.greet(self.loop, self.rng)

    # -- the host -------------------------------------------------------------------------
    def submit(self, kind: str, offset: int, data: bytes, done: Done, fua: bool) -> None:
        def durable(error: OSError | None) -> None:
            error = self.losses.answer(error)
            if error is not None:  # the host has been told, if not by a flush
                self.unsure.update(self.acknowledged.keys() - self.flushed.keys())
            done(error)

        super().submit(kind, offset, data, durable if fua else done, fua)

    def submit_flush(self, done: Done) -> None:
        answer = self.losses.answer
        super().submit_flush(lambda error: done(answer(error)))

    # -- what happens now and then --------------------------------------------------------
    @precondition(lambda self: self.troubles)
    @rule(seed=seeds)
    def disturb(self, seed: int) -> None:
        what = self.rng.choice(self.troubles)
        if what == "link":
            self.leave_writes_on_their_way()
            self.secondary.lose_connection()
        elif what == "kill":
            if seed & 1:
                self.leave_writes_on_their_way()
            self.kill()
        elif what == "cut":
            super().power_cut(seed, 0)
        elif what == "cache":
            super().lose_secondary_cache(seed, 0)
        elif what == "pause":
            if self.copier.state is CopyState.LINK_DOWN:
                self.run(1.1, 2)  # it is being opened now
            super().pause_or_resume(0)
        elif what == "resync":
            self.resync(compare=bool(seed & 1))
        elif what == "verify":
            self.verify()
        elif what == "repair":
            block = seed % self.geometry.blocks
            self.gate.mark(block, block + 1, lambda error: None)
        elif what == "policy":
            self.exchange_policy()
        elif what == "resize":
            self.resize(Random(seed))
            self.loop.run_soon()
            for _ in range(seed % 8):
                self.finish_any()
                self.superset_now()
            if seed & 16:
                super().power_cut(seed, 0)
        elif what == "settings":
            self.gate.limit_extents = 1 + seed % self.geometry.extents
            self.copier.throttle.set_rate(self.rng.choice([None, BLOCK, 64 * BLOCK]))
        else:
            self.copier.reconnect()
        self.loop.run_soon()

    @precondition(lambda self: self.secondary.ghosts)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        self.secondary.land(data.draw(st.sampled_from(self.secondary.ghosts)))

    def finish_any(self) -> None:
        busy = [disk for disk in self.disks if disk.pending]
        if busy:
            disk = self.rng.choice(busy)
            disk.finish(self.rng.randrange(len(disk.pending)))
            self.loop.run_soon()

    def leave_writes_on_their_way(self) -> None:
        """Have the secondary asked to write something that it has not answered."""
        for _ in range(4):
            if any(op.kind == "write" for op in self.secondary.pending):
                return
            sectors = self.geometry.size_bytes // SECTOR
            self.write(self.rng.randrange(sectors) * SECTOR, 8, False, 1)
            self.run(1.1, 2)

    def kill(self) -> None:
        """kill -9 of bitmapd, and another one starts."""
        for offset, data in self.pending_writes:
            self.unsure.update(self.sectors_of(offset, len(data)))
        self.pending_writes.clear()
        if self.losses.answer(None) is not None:
            # The disk has lost writes and said so once, to a process that is gone before it could
            # tell the host: nobody ever will (docs/recovery.md, "The primary fails").
            self.unsure.update(self.acknowledged.keys() - self.flushed.keys())
        self.rng.shuffle(self.primary.pending)
        for disk in self.disks:
            disk.abandon()
        now_s, self.loop = self.loop.now_s, Clock()
        self.loop.now_s = now_s
        self.begin()

    def resync(self, compare: bool) -> None:
        """As `Volume.resync` does."""
        if self.copier.state is CopyState.PAUSED or self.copier.passes.under_way:
            return
        if compare and self.store.recorded_extents:
            self.gate.take_recorded()
            self.copier.begin_pass(compare=True)
        else:
            self.copier.wake()

    def verify(self) -> None:
        if self.verifying is not None or self.copier.state is CopyState.LINK_DOWN:
            return

        def done(error: OSError | None, result: VerifyResult) -> None:
            self.verifying = None
            assert not result.unexpected_bytes, f"{result.unexpected} differ, unrecorded"

        self.verifying = Verify(
            self.geometry,
            self.gate,
            BothRead(self.geometry, self.primary, self.secondary, BufferPool(self.loop, 1 << 20)),
            self.loop,
            repair=True,
            done=done,
        )
        self.verifying.start()

    def resize(self, rng: Random, fates: Sequence[float | None] = FATES) -> None:
        """As `Volume.resize` does; the superblock's writes have these fates."""
        if self.growing or self.geometry.size_bytes == LARGEST:
            return
        larger_bytes = SECTOR * rng.choice([1, 3, 8, 11, 16, 40])
        size_bytes = min(self.geometry.size_bytes + larger_bytes, LARGEST)
        self.growing = self.grown_in_part = True
        self.primary.resize(size_bytes, b"\x5a")
        if self.secondary.size_bytes < size_bytes:
            self.secondary.resize(size_bytes, b"\xa5")
        new = dataclasses.replace(self.geometry, size_bytes=size_bytes)
        tool.add_pages(self.medium, self.updates.superblock, new)

        def kept(error: OSError | None) -> None:
            if error is None:
                self.store.prepare_growth(new, named)
            else:
                self.growing = False

        def named(error: OSError | None) -> None:
            self.growing = False
            if error is not None:
                return
            self.medium.fates = rng.choices(fates, k=2)
            try:
                self.updates.update(1, geometry=new, primary_size_bytes=size_bytes)
            except BitmapdError:
                return
            self.store.grow(new, new_page_states(self.geometry, new))
            self.copier.grow(new)
            self.gate.grow(new)
            self.geometry, self.grown_in_part = new, False
            self.exchange_policy()
            self.copier.reconnect()

        self.gate.prepare_growth(kept)

    def exchange_policy(self) -> None:
        policy = MischievousPolicy(self.geometry.extents, self.rng)
        for first, stop in self.store.recorded_runs():
            policy.added(first, stop, self.loop.time())
        self.policy = policy
        self.gate.set_policy(policy)

    def pause_or_resume(self, rarely: int) -> None:
        """See `disturb`."""

    def lose_secondary_cache(self, seed: int, rarely: int) -> None:
        """See `disturb`."""

    def power_cut(self, seed: int, rarely: int) -> None:
        """See `disturb`."""

    # -- judging --------------------------------------------------------------------------
    @invariant()
    def in_sync_is_true(self) -> None:
        if not hasattr(self, "copier") or not self.gate.in_sync or self.pending_writes:
            return
        for block in range(self.geometry.blocks):
            offset, length = self.geometry.block_bytes_range(block, block + 1)
            end = offset + length
            if self.primary.visible[offset:end] != self.secondary.durable[offset:end]:
                assert self.gate.may_differ(block, block + 1), f"block {block} is old, unwatched"

    def settle_everything(self) -> None:
        self.copier.throttle.set_rate(None)
        super().settle_everything()
        if self.grown_in_part:  # which leaves an extent in the record
            self.resize(Random(0), (None,))
            super().settle_everything()
            assert not self.grown_in_part

    def is_busy(self) -> bool:
        return (
            super().is_busy()
            or bool(self.gate.suspect_blocks or self.secondary.ghosts)
            or self.verifying is not None
        )


# -- many steps, by a plain random walk ---------------------------------------------------
# Hypothesis finds small examples of what it can reach in a few dozen steps.  Some of this takes
# longer: a connection is lost, the place is written again, copied, settled, and then the old write
# lands.  A walk does a thousand steps in the time of a hundred, and its seed repeats it.


def walk(seed: int, steps: int) -> None:
    """Take so many steps at random, judge after each, and settle everything in the end."""
    rng = Random(seed)
    machine = WideMachine()
    troubles = {trouble for trouble in TROUBLES if rng.random() < 0.4}
    machine.first_boot(seed, rng.random() < 0.3, rng.random() < 0.7, rng.random() < 0.5, troubles)
    actions = list(ACTIONS)
    weights = [weight * rng.choice([0.2, 1, 1, 2]) for weight in ACTIONS.values()]
    for _ in range(steps):
        (action,) = rng.choices(actions, weights)
        action(machine, rng)
        machine.superset_now()
        machine.in_sync_is_true()
    machine.teardown()


def _write(machine: WideMachine, rng: Random) -> None:
    sector = rng.randrange(machine.geometry.size_bytes // SECTOR)
    machine.write(sector * SECTOR, rng.randint(1, 20), rng.random() < 0.2, rng.randrange(6))


def _finish(machine: WideMachine, rng: Random) -> None:
    for _ in range(rng.randint(1, 6)):
        busy = [disk for disk in machine.disks if disk.pending]
        if busy:
            disk = rng.choice(busy)
            disk.finish(rng.randrange(len(disk.pending)))
            machine.loop.run_soon()


def _fail(machine: WideMachine, rng: Random) -> None:
    """A flush rather than anything else: it does the most harm, and there are few."""
    pending = [(disk, index) for disk in machine.disks for index in range(len(disk.pending))]
    flushes = [(disk, index) for disk, index in pending if disk.pending[index].kind == "flush"]
    if pending:
        machine.fail_one(*rng.choice(flushes or pending))


def _land(machine: WideMachine, rng: Random) -> None:
    if machine.secondary.ghosts:
        machine.secondary.land(rng.choice(machine.secondary.ghosts))


def _disturb(machine: WideMachine, rng: Random) -> None:
    if machine.troubles:
        machine.disturb(rng.getrandbits(30))


ACTIONS: dict[Callable[[WideMachine, Random], None], float] = {
    _write: 10,
    _finish: 10,
    lambda machine, rng: machine.run(rng.choice([0.0, 1.1, 1.1]), rng.choice([None, 0, 1, 2])): 6,
    lambda machine, rng: machine.run(1.1, None): 6,
    lambda machine, rng: machine.advance(rng.choice([0.1, 1.1, 6.0])): 3,
    lambda machine, rng: machine.tick(): 6,
    lambda machine, rng: machine.flush(): 2,
    _fail: 2,
    _land: 1,
    _disturb: 3,
}


@pytest.mark.parametrize("seed", sim_seeds(int(os.environ.get("WALKS", "40"))))
def test_walk(seed: int) -> None:
    walk(seed, 400)


WideMachine.TestCase.settings = machine_settings(300, 60)
TestWide = WideMachine.TestCase
