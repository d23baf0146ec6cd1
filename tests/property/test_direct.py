"""The direct path with all that is below it, on a kernel that is interrupted anywhere.

The model of `test_mirror`, with hosts that write through the kernel's table: to extents that are
direct without bitmapd's knowledge, to the others through the gate.  Every stage of a barrier is a
step of its own; it may be given up, its helper may die, and bitmapd may be killed and started again
while the kernel goes on.  After every step: whatever a power cut leaves, what may differ is in the
stored record; what is direct, or may be, is durably there; what is open does not leave it.  At the
end no write of a host is lost, both sides are equal, and the record can be emptied.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from bitmapd.gate.direct import DirectPath
from bitmapd.gate.gate import Gate
from bitmapd.gate.routes import Routes, Table
from bitmapd.media.base import Done
from tests.property.test_mirror import EXTENTS, GEOMETRY, SIZE, Clock, MirrorMachine, offsets, seeds
from tests.support.machines import machine_settings
from tests.support.policies import MischievousPolicy
from tests.support.records import blank_image
from tests.support.sim import SECTOR, SimDisk, drain
from tests.support.simkernel import SimKernel, finish_or_drop

TROUBLES = ("restart", "helper", "close", "gate", "pause", "cache", "cut", "counters")

failures = st.sampled_from(["given up", "old table", "new table", "cleared"])


class Keeping(MischievousPolicy):
    """Gives nothing up of itself."""

    def wants(self, extent: int, now_s: float) -> bool:
        return self.generous

    def expired(self, now_s: float) -> Sequence[int]:
        return ()


class DirectMachine(MirrorMachine):
    @initialize(
        seed=seeds,
        compare=st.booleans(),
        direct=st.integers(0, EXTENTS),
        troubles=st.sets(st.sampled_from(TROUBLES)),
        calm=st.booleans(),
    )
    def first_boot(
        self, seed: int, compare: bool, direct: int, troubles: set[str], calm: bool
    ) -> None:
        """Begin with an empty record, or with some extents that are direct already."""
        self.compare = compare
        self.serial = 0
        self.rng = Random(seed)
        # A restart or a power cut has everything copied that is recorded, which hides mistakes: so
        # each example has some troubles only, or none.
        self.troubles = sorted(troubles)
        # So does a policy that always has the table changed.
        self.calm = calm
        self.boot(blank_image(GEOMETRY), bytes(SIZE), bytes(SIZE))
        if direct:
            self.store.add([(0, direct)], (), lambda error: None)
            drain(self.loop, *self.disks)
            self.kernel.table = Table(((0, direct),)).segments(GEOMETRY.extent_bytes, SIZE)
            self.start_again(Random(seed), swap=False)

    def boot(self, record: bytes, primary: bytes, secondary: bytes) -> None:
        if hasattr(self, "kernel"):
            self.kernel.end()
        self.kernel: SimKernel | None = None
        super().boot(record, primary, secondary)

    def begin(self) -> None:
        self.closed = False  # no host has the volume open
        super().begin()
        if self.calm:
            self.policy = Keeping(EXTENTS, self.rng)
            self.gate.set_policy(self.policy)
        self.kernel.new_gate(self.gate)

    def make_gate(self) -> Gate:
        if self.kernel is None:
            self.kernel = SimKernel(GEOMETRY, self.primary)
            self.kernel.era.counts_at_start = self.rng.random() < 0.5
            if self.rng.random() < 0.5:
                self.kernel.era.defers = lambda: self.rng.random() < 0.3
        kernel = self.kernel
        self.routes = Routes(
            max_segments=self.rng.choice([3, 5, 2000]), growth_hits=self.rng.choice([1, 16])
        )
        self.routes.adopt((extent, extent + 1) for extent in kernel.direct(kernel.table))
        self.direct = DirectPath(
            GEOMETRY, kernel, self.routes, lambda *a, **k: None, since_era=kernel.era.current
        )
        return Gate(
            GEOMETRY,
            kernel.era,
            self.store,
            self.policy,
            self.loop,
            limit_extents=3,
            elsewhere=(self.direct,),
        )

    # -- the host -------------------------------------------------------------------------
    @rule(offset=offsets, sectors=st.integers(1, 20), fua=st.booleans(), kind=st.integers(0, 5))
    def write(self, offset: int, sectors: int, fua: bool, kind: int) -> None:
        if not self.closed:
            super().write(offset, sectors, fua, kind)

    @rule(data=st.data(), count=st.integers(1, 3))
    def write_direct(self, data: st.DataObject, count: int) -> None:
        """To where bitmapd does not look, if the table is in force."""
        extents = sorted(self.kernel.direct(self.kernel.table))
        for _ in range(count):
            if extents and not self.closed:
                self.write_into(data, data.draw(st.sampled_from(extents)))

    def write_into(self, data: st.DataObject, extent: int) -> None:
        """Often a discard, and often one that ends in another block than it begins in."""
        start = extent * GEOMETRY.extent_bytes + data.draw(st.integers(4, 13)) * SECTOR
        if start < SIZE:
            self.write(start, data.draw(st.integers(1, 9)), False, data.draw(st.integers(0, 1)))

    @rule(
        data=st.data(),
        failed=st.none() | failures,
        cool=st.booleans(),
        early=st.booleans(),
        stages=st.sampled_from([0, 1, 2, 3, 3, 4, 5, 6]),
        then=st.sampled_from(["nothing", "finish", "hang", "rest", "fail", "fail next", "close"]),
    )
    def write_during_barrier(
        self,
        data: st.DataObject,
        failed: str | None,
        cool: bool,
        early: bool,
        stages: int,
        then: str,
    ) -> None:
        """To what is direct and will not be so any more, if there are such extents.

        `early`: they are sent before the barrier begins, and the era device gets to them then.
        """
        if self.closed:
            self.start_again(self.rng, swap=cool)  # killed while it stopped
        if failed is not None:
            self.barrier_fails(4, failed, 1)
        if cool:
            self.drain(*self.disks)
            self.tick()
        kernel, era = self.kernel, self.kernel.era
        if early:
            defers, era.defers = era.defers, lambda: True
            for extent in sorted(kernel.direct(kernel.table)):
                self.write_into(data, extent)
            era.defers = defers
        self.begin_barrier(stages)
        if early:
            era.work()
        else:
            extents = kernel.direct(kernel.table)
            if kernel.busy is not None and kernel.busy.segments is not None:
                extents = extents - kernel.direct(kernel.busy.segments) or extents
            for extent in sorted(extents):
                self.write_into(data, extent)
        if then == "hang":
            self.run_while_writes_hang(0.0)
        elif then != "nothing":
            self.kernel.era.work()
            drain(self.loop, self.primary)
        if then == "close":
            self.close_hosts_now()
        if then == "fail next":
            self.drain(*self.disks)
        if then in ("fail", "fail next"):
            self.barrier_fails(3, data.draw(failures), data.draw(st.integers(1, 2)))
        if then not in ("nothing", "finish", "hang"):
            self.rest(2)

    @precondition(lambda self: not self.closed)
    @rule(extent=st.integers(0, EXTENTS - 1), fails=st.none() | failures)
    def work_on(self, extent: int, fails: str | None) -> None:
        """Have an extent recorded, and let a barrier see that the gate is asked for it again."""
        for sectors in (15, 16):
            self.write(extent * GEOMETRY.extent_bytes, sectors, False, 1)
            self.drain(*self.disks)
        self.loop.advance(1.1)
        if fails is not None:
            self.barrier_fails(4, fails, 1)
        self.drain(*self.disks)

    def submit(self, kind: str, offset: int, data: bytes, done: Done, fua: bool) -> None:
        if kind == "zero":
            kind = self.rng.choice(["zero", "trim", "trim"])
        self.kernel.write(kind, offset, data, done, fua)

    def submit_flush(self, done: Done) -> None:
        self.kernel.flush(done)

    # -- the kernel and the processes -----------------------------------------------------
    def drain(self, *disks: SimDisk) -> None:
        era = self.kernel.era
        drain(self.loop, *disks)
        while self.kernel.can_step or era.has_deferred:
            if self.kernel.can_step:
                self.step_kernel()
            era.work()
            drain(self.loop, *disks)

    @precondition(lambda self: self.kernel.era.has_deferred)
    @rule()
    def era_works(self) -> None:
        self.kernel.era.work()

    def step_kernel(self) -> None:
        self.kernel.step()
        self.loop.run_soon()

    @precondition(lambda self: self.kernel.can_step)
    @rule(count=st.integers(1, 4))
    def barrier_goes_on(self, count: int) -> None:
        for _ in range(count):
            if self.kernel.can_step:
                self.step_kernel()

    def begin_barrier(self, stages: int) -> None:
        """Have a barrier under way and take it so many stages further, if that can be done."""
        if self.kernel.busy is None:
            self.loop.advance(1.1)
        for _ in range(stages):
            if self.kernel.can_step:
                self.step_kernel()

    @precondition(lambda self: not self.closed)
    @rule(extent=st.integers(0, EXTENTS - 1), stages=st.integers(0, 5))
    def grow(self, extent: int, stages: int) -> None:
        """Have the table grow, if a hit is enough for it, while the era goes on."""
        for sectors in (15, 16):
            self.write(extent * GEOMETRY.extent_bytes, sectors, False, 1)
            self.drain(*self.disks)
        self.loop.advance(0.0)
        for _ in range(stages):
            if self.kernel.can_step:
                self.step_kernel()

    @rule(stages=st.integers(0, 8), how=failures, times=st.integers(1, 3))
    def barrier_fails(self, stages: int, how: str, times: int) -> None:
        for _ in range(times):
            self.begin_barrier(stages)
            if how == "given up":
                self.kernel.give_up()
            elif how == "cleared":
                self.kernel.inactive = None  # by another program
            else:
                self.kernel.lose_helper(swap=how == "new table")
            self.loop.run_soon()

    def start_again(self, rng: Random, swap: bool) -> None:
        """bitmapd is killed and another one takes over; hosts and the kernel go on."""
        self.kernel.bitmapd_died(rng, swap=swap)
        for disk in (self.record, self.secondary):
            finish_or_drop(disk, list(disk.pending), rng)
        now_s, self.loop = self.loop.now_s, Clock()
        self.loop.now_s = now_s
        self.begin()

    @rule()
    def cool(self) -> None:
        """Have the record give up what it can, as far as one barrier goes."""
        self.tick()
        self.loop.advance(1.1)

    @rule(rounds=st.integers(1, 3))
    def rest(self, rounds: int) -> None:
        """One era after another ends, undisturbed.  What one spoils the next may mend: look."""
        for _ in range(rounds):
            self.drain(*self.disks)
            self.in_sync_is_true()
            self.tick()
            self.drain(*self.disks)
            self.superset_now()
            self.loop.advance(1.1)

    @rule(seconds=st.sampled_from([0.0, 1.1]))
    def run_while_writes_hang(self, seconds: float) -> None:
        """What hosts have written directly takes its time; everything else goes on."""
        self.loop.advance(seconds)
        kernel = self.kernel
        while True:
            drain(self.loop, self.record, self.secondary)
            mine = [i for i, op in enumerate(self.primary.pending) if not kernel.owns(op)]
            if mine:
                self.primary.finish(mine[0])
                self.loop.run_soon()
            elif kernel.can_step:
                self.step_kernel()
            elif kernel.era.has_deferred:
                kernel.era.work()
            else:
                break

    @precondition(lambda self: "restart" in self.troubles)
    @rule(data=st.data(), stages=st.integers(0, 3), failed=st.none() | failures)
    def restart_while_a_write_hangs(
        self, data: st.DataObject, stages: int, failed: str | None
    ) -> None:
        """It may be marked in an era that has ended when the next process begins to count them."""
        self.write_direct(data, 1)
        self.begin_barrier(stages)
        self.start_again(self.rng, swap=False)
        if failed is not None:
            self.barrier_fails(0, failed, 1)
        self.run_while_writes_hang(0.0)

    # -- what happens now and then: one rule for all of it, so that the others come up ------
    @precondition(lambda self: self.troubles)
    @rule(seed=seeds)
    def disturb(self, seed: int) -> None:
        what = self.rng.choice(self.troubles)
        if what == "restart":
            self.start_again(Random(seed), swap=bool(seed & 1))
        elif what == "helper":
            self.kernel.lose_helper(swap=bool(seed & 1))
            self.loop.run_soon()
        elif what == "close":
            self.close_hosts_now()
        elif what == "gate":
            self.routes.gate_all(wanted=bool(seed & 1))
        elif what == "pause":
            super().pause_or_resume(0)
        elif what == "counters":
            self.kernel.era.counting = False
        elif what == "cache":
            super().lose_secondary_cache(seed, 0)
        else:
            super().power_cut(seed, 0)

    def close_hosts_now(self) -> None:
        """As before a stop; it is refused while a host still uses the device."""
        if not self.pending_writes:
            self.closed = True
            self.routes.seal()

    def pause_or_resume(self, rarely: int) -> None:
        """See `disturb`."""

    def lose_secondary_cache(self, seed: int, rarely: int) -> None:
        """See `disturb`."""

    def power_cut(self, seed: int, rarely: int) -> None:
        """See `disturb`."""

    # -- judging --------------------------------------------------------------------------
    @invariant()
    def what_is_open_is_recorded(self) -> None:
        if not hasattr(self, "routes"):
            return
        certain = self.certainly_recorded()
        if self.routes.all_gated:
            assert not list(self.kernel.may_be_direct()), "not everything goes through the gate"
        for extent in self.kernel.may_be_direct():
            assert certain[extent], f"extent {extent} is direct and not recorded for certain"
            assert self.routes.is_open(extent), f"extent {extent} is direct and not open"
        for extent in filter(self.routes.is_open, range(EXTENTS)):
            assert self.store.recorded[extent], f"extent {extent} is open and left the record"

    @invariant()
    def in_sync_is_true(self) -> None:
        if hasattr(self, "routes") and self.gate.in_sync and not self.pending_writes:
            assert self.primary.visible == self.primary.durable == self.secondary.durable

    def is_busy(self) -> bool:
        return super().is_busy() or self.kernel.busy is not None or self.kernel.era.has_deferred

    def settle_everything(self) -> None:
        super().settle_everything()
        for sector, data in self.acknowledged.items():
            if sector not in self.unsure:
                found = self.primary.visible[sector * SECTOR : (sector + 1) * SECTOR]
                assert found == data, f"sector {sector} was written and is lost"
        assert self.primary.visible == self.secondary.durable
        self.closed = True
        self.routes.seal()
        for _ in range(3):
            self.copier.wake()
            self.drain(*self.disks)
        assert not self.routes.settling


DirectMachine.TestCase.settings = machine_settings(500, 50)
# The helper is a thread that takes turns with the machine: 20 s of switches, more under coverage.
TestDirect = pytest.mark.timeout(600)(DirectMachine.TestCase)
