"""A volume with points whose hosts write past the gate: `simpoints` over `simkernel`.

The kernel's part outlives a process that is killed, and goes with the power.  A host's write is a
bio, which the table in force sends to the era device or to the gate; `World.model` follows what is
submitted to the era device, whichever way it came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.gate.cycle import CutGate
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.routes import Routes
from bitmapd.media.base import Device, Done, Scheduler
from bitmapd.predict.policy import Policy
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.support.sim import SimDisk
from tests.support.simkernel import SimEra, SimKernel
from tests.support.simpoints import LedgerDisk, PrimaryDisk, Site, World, Wrong, size_said
from tests.support.simreceiver import GEOMETRY


class ToldEra(SimEra):
    """Tells what is submitted to it, which may get to the disk later."""

    submitted: Callable[[int, bytes], None]

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self.submitted(offset_bytes, bytes(buffer))
        super().write(offset_bytes, buffer, done, fua)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        self.submitted(offset_bytes, bytes(length_bytes))
        super().trim(offset_bytes, length_bytes, done, fua=fua)


class DmWorld(World):
    """See the module docstring; to be ended with `end`."""

    kernel: SimKernel
    path: DirectPath
    path_class: type[DirectPath] = DirectPath

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.kernel.era.counts_at_start = self.rng.random() < 0.5

    def gate_class(  # type: ignore[override]
        self,
        geometry: Geometry,
        primary: Device,
        store: RecordStore,
        policy: Policy,
        loop: Scheduler,
        *,
        limit_extents: int,
    ) -> CutGate:
        routes = Routes(growth_hits=2)
        routes.adopt(_runs(self.kernel.direct(self.kernel.table)))
        self.path = self.path_class(
            geometry, self.kernel, routes, lambda *a, **k: None, since_era=self.kernel.era.current
        )
        return CutGate(
            geometry,
            self.kernel.era,
            store,
            policy,
            loop,
            limit_extents=limit_extents,
            direct=self.path,
        )

    # -- processes --------------------------------------------------------------------------
    def boot(self, primary: bytes, record: bytes, ledger: bytes) -> None:
        disk = PrimaryDisk("primary", len(primary), primary)
        self.model[:] = primary[: size_said(ledger)]
        self.flying = set()
        era = ToldEra(disk, GEOMETRY)
        era.submitted = self.submitted
        self.kernel = SimKernel(GEOMETRY, disk, era)
        self.kernel.era.defers = lambda: self.rng.random() < 0.2
        self._begin(disk, record, ledger)

    def _begin(self, disk: PrimaryDisk, record: bytes, ledger: bytes) -> None:
        self.site = Site(
            self,
            disk,
            SimDisk("record", len(record), record),
            LedgerDisk("ledger", len(ledger), ledger),
            None if self.policy is None else self.policy(),
        )
        disk.submitted = None  # it is the era device that tells
        self.kernel.new_gate(self.site.gate)

    def crash_sender(self, *, power: bool = True) -> None:
        if power:
            self.kernel.end()
            super().crash_sender(power=True)
            return
        self.count["crashes"] += 1
        self.cut_link()
        self.note()
        images = []
        for disk in (self.site.record, self.site.ledger):
            disk.sync()
            images.append(disk.crash(self.rng))
        self.kernel.bitmapd_died(self.rng, swap=self.rng.random() < 0.5)
        disk = self.site.primary
        self.model[:] = disk.visible[: len(self.model)]  # without what the kernel will send again
        for op in disk.pending:
            if op.kind == "write":
                self.model[op.offset_bytes : op.offset_bytes + op.length_bytes] = op.data
        self._begin(disk, *images)

    def note(self) -> None:
        super().note()
        self.count["barriers"] += self.path.barriers
        self.count["moved"] += self.path.routes.moved

    def end(self) -> None:
        super().end()
        self.kernel.end()

    # -- hosts ------------------------------------------------------------------------------
    def flush(self) -> None:
        self.kernel.flush(lambda error: None)

    def change(self, kind: str, offset: int, data: bytes, done: Done) -> None:
        self.kernel.write(kind, offset, data, done, fua=False)

    def submitted(self, offset: int, data: bytes) -> None:
        super().submitted(offset, data)
        self.count["direct" if self.kernel.era.for_hosts else "gated"] += 1

    # -- one thing at a time ----------------------------------------------------------------
    def beside(self, *, faults: bool) -> list[tuple[float, Callable[[], object]]]:
        kernel = self.kernel
        may: list[tuple[float, Callable[[], object]]] = []
        if kernel.can_step:
            may.append((3.0, kernel.step))
        if kernel.era.has_deferred:
            may.append((3.0, kernel.era.work))
        if faults:
            may.append((0.7, self.host))
            if kernel.busy is not None:
                may.append((0.03, kernel.give_up))
                may.append((0.03, lambda: kernel.lose_helper(swap=self.rng.random() < 0.5)))
        return may

    def moves(self) -> bool:
        kernel = self.kernel
        moved = kernel.era.has_deferred or kernel.can_step
        kernel.era.work()
        while kernel.can_step:
            kernel.step()
            self.run_soon()
        return moved


class CutWorld(DmWorld):
    """Cut after cut of a volume that is at rest before each: what hosts write while barriers pass
    is nearly all that is dirty then, so nothing else brings it into the point.  No faults."""

    def rounds(self, count: int) -> None:
        self.connect()
        for _ in range(count):
            self.rest()
            for _ in range(self.rng.randrange(5)):
                self.host()
            self.site.sender.cut()
            seen = self.seen
            for _ in range(300):
                self.step()
                if self.seen > seen:
                    break
            self.check()

    def rest(self) -> None:
        for number in range(5000):
            self.step(faults=False)
            if number % 7 == 0 and self.at_rest():
                self.settle()
                return
        raise Wrong(f"I3 it never came to rest: {self.site.sender.figures()}")

    def fault(self) -> None:
        """Nothing."""

    def host(self) -> None:
        if not self.site.gate.is_cutting or self.rng.random() < 0.3:  # most cuts become points
            super().host()

    def beside(self, *, faults: bool) -> list[tuple[float, Callable[[], object]]]:
        may = super().beside(faults=False)
        if faults and self.kernel.busy is not None:
            may.append((3.0, self.host))
        if faults and self.site.gate.is_cutting:
            may.append((1.0, self.site.sender.wake))  # barriers while it is being read
        return may


def _runs(extents: Iterable[int]) -> list[tuple[int, int]]:
    return [(extent, extent + 1) for extent in sorted(extents)]
