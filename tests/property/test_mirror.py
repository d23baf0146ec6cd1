"""Gate, store and copier together on disks that forget, tear, reorder and fail.

The model: every write that was acknowledged and flushed survives a power cut; after a power cut at
any moment every extent that differs between primary and secondary is in the stored record; after
recovery, with nothing going wrong, both sides are equal.  Every completion of every disk operation
is a step of its own, so a crash can come after each single effect.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import Any

from bitarray import bitarray
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bitmapd.copier.comparing import BothRead
from bitmapd.copier.engine import Copier, CopyState
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.copier.verify import Verify, VerifyResult
from bitmapd.gate.gate import Gate
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool, aligned
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.support.machines import machine_settings
from tests.support.policies import MischievousPolicy
from tests.support.records import blank_image, load_image
from tests.support.sim import SECTOR, SimDisk, SimLoop, SimTimer, drain

BLOCK = 4096
EXTENT = 2 * BLOCK
EXTENTS = 6
SIZE = EXTENTS * EXTENT - BLOCK - 3 * SECTOR  # the last extent and the last block are short
GEOMETRY = Geometry(SIZE, EXTENT, BLOCK)

offsets = st.integers(0, SIZE // SECTOR - 1).map(lambda sector: sector * SECTOR)
seeds = st.integers(0, 1 << 30)


class Clock(SimLoop):
    """Time is a sum of fractions here, so what is left of a delay may be too little to move it."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> SimTimer:
        return super().call_later(max(delay, 1e-6) if delay > 0 else delay, callback, *args)


class MirrorMachine(RuleBasedStateMachine):
    pool_bytes = 1 << 20  # for copies
    late_writes_s = 0.0
    geometry = GEOMETRY

    @initialize(seed=seeds, compare=st.booleans())
    def first_boot(self, seed: int, compare: bool) -> None:
        self.compare = compare
        self.serial = 0
        self.rng = Random(seed)
        # Power cuts before the first sync are as good as any: start equal, record empty.
        self.boot(blank_image(GEOMETRY), bytes(SIZE), bytes(SIZE))

    def boot(
        self, record: bytes, primary: bytes, secondary: bytes, far: SimDisk | None = None
    ) -> None:
        """The machine starts with these contents; `far` is a secondary that went on meanwhile."""
        self.loop = Clock()
        self.record = SimDisk("record", len(record), record)
        self.primary = SimDisk("primary", len(primary), primary)
        self.secondary = far or SimDisk("secondary", len(secondary), secondary)
        self.disks = (self.record, self.primary, self.secondary)
        self.begin()
        self.pending_writes: list[tuple[int, bytes]] = []  # sent, not acknowledged
        self.acknowledged: dict[int, bytes] = {}  # sector -> content, since the last boot
        self.flushed: dict[int, bytes] = {}  # sector -> content that a flush made durable
        self.unsure: set[int] = set()  # sectors that concurrent or failed writes have touched

    def begin(self) -> None:
        """A process starts on the disks as they are."""
        loaded = load_image(bytes(self.record.durable))
        self.geometry = loaded.superblock.geometry
        self.store = RecordStore(
            self.geometry, loaded, self.record, self.loop, lambda *a, **k: None
        )
        self.policy = MischievousPolicy(self.geometry.extents, self.rng)
        self.gate = self.make_gate()
        self.copier = self.make_copier()
        self.gate.take_recorded()
        if self.gate.taken:
            self.copier.begin_pass(compare=self.compare, predecessor=True)
        self.copier.start()

    def make_gate(self) -> Gate:
        return Gate(
            self.geometry, self.primary, self.store, self.policy, self.loop, limit_extents=3
        )

    def make_copier(self) -> Copier:
        return Copier(
            self.geometry,
            self.gate,
            self.primary,
            self.secondary,
            self.loop,
            BufferPool(self.loop, self.pool_bytes),
            Throttle(None),
            Backoff(jitter=lambda: 0.5),
            lambda *a, **k: None,
            check_secondary=lambda: None,
            era_interval_s=1.0,
            late_writes_s=self.late_writes_s,
            piece_bytes=2 * BLOCK,
        )

    # -- the host -------------------------------------------------------------------------
    def sectors_of(self, offset: int, length: int) -> range:
        return range(offset // SECTOR, (offset + length) // SECTOR)

    @rule(offset=offsets, sectors=st.integers(1, 20), fua=st.booleans(), kind=st.integers(0, 5))
    def write(self, offset: int, sectors: int, fua: bool, kind: int) -> None:
        length = min(sectors * SECTOR, self.geometry.size_bytes - offset)
        self.serial += 1
        zeroing = kind == 0
        data = bytes(length) if zeroing else self.serial.to_bytes(2, "big") * (length // 2)
        touched = set(self.sectors_of(offset, length))
        for other, other_data in self.pending_writes:
            overlap = touched & set(self.sectors_of(other, len(other_data)))
            self.unsure |= overlap
        entry = (offset, data)
        self.pending_writes.append(entry)

        def done(error: OSError | None) -> None:
            self.pending_writes.remove(entry)
            for sector in touched:
                if error is not None:
                    self.unsure.add(sector)
                piece = data[sector * SECTOR - offset :][:SECTOR]
                self.acknowledged[sector] = piece
                self.flushed.pop(sector, None)
                if fua and error is None:
                    self.flushed[sector] = piece

        self.submit("zero" if zeroing else "write", offset, data, done, fua)

    def submit(self, kind: str, offset: int, data: bytes, done: Done, fua: bool) -> None:
        if kind == "zero":
            self.gate.zero(offset, len(data), done, fua=fua)
        else:
            buffer = aligned(len(data))
            buffer[:] = data
            self.gate.write(offset, buffer, done, fua)

    @rule()
    def flush(self) -> None:
        promised = dict(self.acknowledged)

        def done(error: OSError | None) -> None:
            for sector, data in promised.items():
                if error is not None:  # and the host knows that it may be lost
                    self.unsure.update({sector} - self.flushed.keys())
                elif self.acknowledged.get(sector) == data:
                    self.flushed[sector] = data

        self.submit_flush(done)

    def submit_flush(self, done: Done) -> None:
        self.gate.flush(done)

    # -- time and disks -------------------------------------------------------------------
    @rule(seconds=st.sampled_from([0.0, 0.1, 1.1, 6.0]))
    def advance(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @rule()
    def tick(self) -> None:
        self.gate.tick()
        self.loop.run_soon()

    @precondition(lambda self: any(disk.pending for disk in self.disks))
    @rule(data=st.data(), count=st.integers(1, 6))
    def finish(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            busy = [disk for disk in self.disks if disk.pending]
            if not busy:
                break
            disk = data.draw(st.sampled_from(busy))
            disk.finish(data.draw(st.integers(0, len(disk.pending) - 1)))
            self.loop.run_soon()

    @rule(seconds=st.sampled_from([0.0, 1.1]), leave=st.sampled_from([None, 0, 1, 2]))
    def run(self, seconds: float, leave: int | None) -> None:
        """Everything happens in order, but for one disk that answers nothing."""
        self.loop.advance(seconds)
        self.drain(*(disk for index, disk in enumerate(self.disks) if index != leave))

    def drain(self, *disks: SimDisk) -> None:
        drain(self.loop, *disks)

    @precondition(lambda self: any(disk.pending for disk in self.disks))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """An operation ends in an error; a failed write may have been carried out in part."""
        disk = data.draw(st.sampled_from([d for d in self.disks if d.pending]))
        self.fail_one(disk, data.draw(st.integers(0, len(disk.pending) - 1)))

    def fail_one(self, disk: SimDisk, index: int) -> None:
        disk.fail_next = {disk.pending[index].kind: [errno.EIO]}
        disk.finish(index)
        disk.fail_next = {}
        self.loop.run_soon()

    @rule(rarely=st.integers(0, 3))
    def pause_or_resume(self, rarely: int) -> None:
        if rarely:
            return
        if self.copier.state is CopyState.PAUSED:
            self.copier.resume()
        else:
            self.copier.pause()
        self.loop.run_soon()

    @rule(seed=seeds, rarely=st.integers(0, 2))
    def lose_secondary_cache(self, seed: int, rarely: int) -> None:
        """The secondary's server restarts: what it had not made durable may be gone."""
        if rarely:
            return
        self.secondary.disappear(Random(seed))
        self.loop.run_soon()

    # -- judging --------------------------------------------------------------------------
    def differing(self, primary: bytes, secondary: bytes, size_bytes: int) -> set[int]:
        """The extents of a volume of that size in which they differ."""
        return {
            at // EXTENT
            for at in range(0, size_bytes, EXTENT)
            if primary[at : min(at + EXTENT, size_bytes)]
            != secondary[at : min(at + EXTENT, size_bytes)]
        }

    @rule(seed=seeds, rarely=st.integers(0, 5))
    def power_cut(self, seed: int, rarely: int) -> None:
        if rarely:
            return
        rng = Random(seed)
        record, primary, secondary = (disk.crash(rng) for disk in self.disks)
        loaded = load_image(record)
        assert not loaded.damaged
        stored = {extent for extent, is_set in enumerate(loaded.bits) if is_set}
        size_bytes = loaded.superblock.geometry.size_bytes
        unrecorded = self.differing(primary, secondary, size_bytes) - stored
        assert not unrecorded, f"extents {unrecorded} differ and are not in the record {stored}"
        in_flight = {
            sector
            for offset, data in self.pending_writes
            for sector in self.sectors_of(offset, len(data))
        }
        for sector, data in self.flushed.items():
            if sector not in self.unsure and sector not in in_flight:
                found = primary[sector * SECTOR : (sector + 1) * SECTOR]
                assert found == data, f"sector {sector} was flushed and is lost"
        self.boot(record, primary, secondary)

    def possible(self, disk: SimDisk) -> dict[int, set[bytes]]:
        """Sector -> what a power cut at this moment may leave there, where that is not certain."""
        contents: dict[int, set[bytes]] = {}
        writes = [(offset, data) for _, offset, data in disk.volatile]
        writes += [(op.offset_bytes, op.data) for op in disk.to_come]
        for offset, data in writes:
            for at in range(0, len(data), SECTOR):
                sector = (offset + at) // SECTOR
                durable = bytes(disk.durable[sector * SECTOR : (sector + 1) * SECTOR])
                contents.setdefault(sector, {durable}).add(data[at : at + SECTOR])
        return contents

    def size_after_a_cut(self) -> int:
        """Of the volume, as the superblock says that is in force."""
        return load_image(bytes(self.record.durable)).superblock.geometry.size_bytes

    def certainly_recorded(self) -> bitarray:
        """The extents that a power cut at this moment leaves in the record in any case."""
        image = bytearray(self.record.durable)
        certain = load_image(bytes(image)).bits
        for op in self.record.pending:
            if op.kind == "write":
                written = image.copy()
                written[op.offset_bytes : op.offset_bytes + op.length_bytes] = op.data
                certain &= load_image(bytes(written)).bits
        return certain

    @invariant()
    def superset_now(self) -> None:
        """Whatever a power cut leaves on either disk: what may differ is in every such record."""
        if not hasattr(self, "record"):
            return
        certain = self.certainly_recorded()
        size_bytes = self.size_after_a_cut()
        primary, secondary = self.possible(self.primary), self.possible(self.secondary)
        for extent in range(len(certain)):
            if certain[extent]:
                continue
            start, end = extent * EXTENT, min((extent + 1) * EXTENT, size_bytes)
            assert self.primary.durable[start:end] == self.secondary.durable[start:end]
            for sector in range(start // SECTOR, end // SECTOR):
                one = primary.get(sector, set()) | secondary.get(sector, set())
                assert len(one) <= 1, f"sector {sector} may come to differ, unrecorded"

    def settle_everything(self) -> None:
        if self.copier.state is CopyState.PAUSED:
            self.copier.resume()
        for _ in range(80):
            self.drain(*self.disks)
            self.gate.tick()
            self.loop.advance(2.0)
            if self.gate.in_sync and not self.pending_writes and not self.is_busy():
                break
        self.drain(*self.disks)

    def is_busy(self) -> bool:
        return any(disk.pending for disk in self.disks)

    def teardown(self) -> None:
        if not hasattr(self, "record"):
            return
        self.settle_everything()
        assert not self.pending_writes, "a write was never answered"
        assert self.gate.in_sync
        assert not self.copier.passes.under_way
        size_bytes = self.geometry.size_bytes
        assert self.primary.visible[:size_bytes] == self.secondary.durable[:size_bytes]
        self.secondary.connected = True  # it may have gone unnoticed while there was no work
        results: list[tuple[OSError | None, VerifyResult]] = []
        verify = Verify(
            self.geometry,
            self.gate,
            BothRead(self.geometry, self.primary, self.secondary, BufferPool(self.loop, 1 << 20)),
            self.loop,
            repair=False,
            done=lambda error, result: results.append((error, result)),
        )
        verify.start()
        self.drain(*self.disks)
        ((error, result),) = results
        assert error is None
        assert result.compared_bytes == size_bytes
        assert result.unexpected_bytes == 0
        # What an idle volume costs: nothing, once the policy lets go.
        self.policy.generous = False
        self.gate.drop_all_clean()
        self.store.flush_clears()
        self.drain(*self.disks)
        assert load_image(bytes(self.record.durable)).bits.count() == 0


MirrorMachine.TestCase.settings = machine_settings(250, 50)
TestMirror = MirrorMachine.TestCase
