"""Record, gate and copier on simulated disks, put together for examples.

Nothing happens by itself: a test finishes one disk operation after another, or lets everything
run in order with `run`.  `ScriptedPolicy` says what the test tells it to and remembers what it was
told; `LoggedDisk` remembers what it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bitmapd.copier.engine import Copier
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.gate.direct import DirectPath
from bitmapd.gate.elsewhere import Asks, Elsewhere
from bitmapd.gate.gate import Gate
from bitmapd.gate.routes import Routes
from bitmapd.media.base import Done
from bitmapd.media.buffers import BufferPool, aligned
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.support.policies import Forgetful
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain
from tests.support.simkernel import SimKernel

BLOCK = 4096
PER_EXTENT = 4
LATE_S = 60.0  # the bound of what may land late, where a secondary has such
EXTENT = PER_EXTENT * BLOCK

Answers = list[OSError | None]


class ScriptedPolicy(Forgetful):
    """A `Policy`: answers are attributes, calls are in `told`."""

    name = "scripted"

    def __init__(self) -> None:
        self.predictions: list[tuple[int, int]] = []
        self.kept: set[int] = set()
        self.expiring: list[int] = []
        self.unloved: list[int] = []
        self.told: list[tuple[Any, ...]] = []

    def wrote(self, first: int, stop: int, now_s: float, hit: bool) -> None:
        self.told.append(("wrote", first, stop, hit))

    def predict(
        self, first: int, stop: int, now_s: float, limit: int, recorded: int
    ) -> Sequence[tuple[int, int]]:
        self.told.append(("predict", first, stop, limit, recorded))
        return self.predictions

    def added(self, first: int, stop: int, now_s: float) -> None:
        self.told.append(("added", first, stop))

    def dropped(self, extents: Iterable[int], now_s: float) -> None:
        self.told.append(("dropped", *extents))

    def wants(self, extent: int, now_s: float) -> bool:
        return extent in self.kept

    def expired(self, now_s: float) -> Sequence[int]:
        return self.expiring

    def victims(self, count: int, is_clean: Callable[[int], bool], now_s: float) -> Sequence[int]:
        self.told.append(("victims", count))
        return [extent for extent in self.unloved if is_clean(extent)][:count]


class LoggedDisk(SimDisk):
    """`calls` holds (name, offset, length) of every request in order of submission."""

    def __init__(self, name: str, size_bytes: int, content: bytes | None = None) -> None:
        super().__init__(name, size_bytes, content)
        self.calls: list[tuple[str, int, int]] = []
        self.fua: list[bool] = []

    def read(self, offset_bytes: int, buffer: memoryview, done: Done) -> None:
        self.calls.append(("read", offset_bytes, len(buffer)))
        super().read(offset_bytes, buffer, done)

    def write(self, offset_bytes: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self.calls.append(("write", offset_bytes, len(buffer)))
        self.fua.append(fua)
        super().write(offset_bytes, buffer, done, fua)

    def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
    ) -> None:
        self.calls.append(("zero", offset_bytes, length_bytes))
        super().zero(offset_bytes, length_bytes, done, fua=fua, unmap=unmap, fast=fast)

    def trim(self, offset_bytes: int, length_bytes: int, done: Done, *, fua: bool = False) -> None:
        self.calls.append(("trim", offset_bytes, length_bytes))
        super().trim(offset_bytes, length_bytes, done, fua=fua)

    def flush(self, done: Done) -> None:
        self.calls.append(("flush", 0, 0))
        super().flush(done)

    def open(self, done: Done) -> None:
        self.calls.append(("open", 0, 0))
        super().open(done)

    def close(self) -> None:
        self.calls.append(("close", 0, 0))
        super().close()

    def asked(self, name: str) -> list[tuple[int, int]]:
        """Offset and length of the requests of one kind, in blocks."""
        return [(at // BLOCK, n // BLOCK) for kind, at, n in self.calls if kind == name]


class Mirror:
    """Everything between a host and two disks; blocks of 4 KiB, four to an extent."""

    def __init__(
        self,
        extents: int = 8,
        *,
        size_bytes: int | None = None,
        extent_bytes: int = EXTENT,
        block_bytes: int = BLOCK,
        limit_extents: int = 100,
        rate_bytes_per_s: float | None = None,
        piece_bytes: int = 4 * BLOCK,
        pool_bytes: int = 4 << 20,
        secondary: bytes | None = None,
        hollow: bool = False,
        direct: bool = False,
        elsewhere: Sequence[Elsewhere] = (),
        asks: Asks | None = None,
        piecewise: bool = False,
        owns: Callable[[int], bool] | None = None,
    ) -> None:
        """`hollow` disks keep nothing that can be read: for volumes too large for memory.

        `direct`: hosts reach the primary and the gate through `kernel`; else others may write
        `elsewhere`.
        """
        size = size_bytes or extents * extent_bytes
        self.geometry = Geometry(size, extent_bytes, block_bytes)
        image = blank_image(self.geometry)
        self.loop = SimLoop()
        self.record = LoggedDisk("record", len(image), image)
        self.primary = LoggedDisk("primary", size, b"" if hollow else None)
        self.secondary = LoggedDisk("secondary", size, b"" if hollow else secondary)
        self.disks = (self.record, self.primary, self.secondary)
        self.events: list[dict[str, Any]] = []
        self.store = RecordStore(
            self.geometry, load_image(image), self.record, self.loop, self._emit
        )
        self.policy = ScriptedPolicy()
        self.kernel = SimKernel(self.geometry, self.primary)
        self.routes = Routes()
        self.path = DirectPath(self.geometry, self.kernel, self.routes, self._emit, since_era=1)
        self.gate = Gate(
            self.geometry,
            self.kernel.era if direct else self.primary,
            self.store,
            self.policy,
            self.loop,
            limit_extents=limit_extents,
            elsewhere=(self.path,) if direct else elsewhere,
            asks=asks,
            piecewise=piecewise,
            owns=owns,
        )
        self.kernel.new_gate(self.gate)
        self.pool = BufferPool(self.loop, pool_bytes)
        self.refusal: OSError | None = None  # what `check_secondary` answers
        self.copier = Copier(
            self.geometry,
            self.gate,
            self.primary,
            self.secondary,
            self.loop,
            self.pool,
            Throttle(rate_bytes_per_s, 4 * BLOCK),
            Backoff(jitter=lambda: 0.0),
            self._emit,
            check_secondary=lambda: self.refusal,
            era_interval_s=1.0,
            late_writes_s=LATE_S,
            piece_bytes=piece_bytes,
        )

    def _emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def told(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    # -- the host -------------------------------------------------------------------------
    def write(self, block: int, count: int = 1, fill: int = 1, fua: bool = False) -> Answers:
        """Submit a write of `count` blocks full of the byte `fill`."""
        answers: Answers = []
        buffer = aligned(count * BLOCK)
        buffer[:] = bytes([fill]) * len(buffer)
        self.gate.write(block * BLOCK, buffer, answers.append, fua)
        return answers

    def put(self, block: int, count: int = 1, fill: int = 1) -> None:
        """A write with everything that it needs, and nothing else."""
        answers = self.write(block, count, fill)
        drain(self.loop, self.record, self.primary)
        if answers != [None]:
            raise AssertionError(f"the write was answered with {answers}")

    # -- time and disks -------------------------------------------------------------------
    def turn(self) -> None:
        self.loop.run_soon()

    def finish(self, disk: SimDisk, index: int = 0) -> None:
        disk.finish(index)
        self.loop.run_soon()

    def fail(self, disk: SimDisk, number: int, index: int = 0) -> None:
        """A disk answers that it failed; one that writes late does not answer."""
        if disk.writes_late:
            disk.leave_unanswered(index, number)
            self.turn()
            return
        disk.fail_next = {disk.pending[index].kind: [number]}
        self.finish(disk, index)
        disk.fail_next = {}

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass and everything happen in order."""
        self.loop.advance(seconds)
        drain(self.loop, *self.disks)
        while self.kernel.can_step:
            self.kernel.step()
            drain(self.loop, *self.disks)

    def pending(self, disk: SimDisk) -> list[str]:
        return [op.kind for op in disk.pending]

    # -- what is stored -------------------------------------------------------------------
    def stored(self) -> set[int]:
        """Extents in the record as a power cut at this moment leaves it at least."""
        bits = load_image(bytes(self.record.durable)).bits
        return {extent for extent in range(self.geometry.extents) if bits[extent]}

    def recorded(self) -> set[int]:
        return {e for first, stop in self.store.recorded_runs() for e in range(first, stop)}


def begun(**options: Any) -> Mirror:
    """Its copier is started and has nothing to do."""
    mirror = Mirror(**options)
    mirror.copier.start()
    return mirror


def until_reads(mirror: Mirror) -> None:
    """The era is over, the barrier passed, and the copies have begun."""
    mirror.loop.advance(1.0)


def equal(mirror: Mirror) -> bool:
    return mirror.primary.visible == mirror.secondary.visible == mirror.secondary.durable


def number(answers: Answers) -> int | None:
    """The errno of the only answer; None if it is a success."""
    (error,) = answers
    return None if error is None else error.errno


def settled(mirror: Mirror) -> set[int]:
    """Settle what was copied, as the copier does once both sides are flushed."""
    extents = mirror.gate.begin_settle()
    mirror.gate.settle(extents)
    return extents


def copy_everything(mirror: Mirror) -> None:
    """What is dirty counts as copied; nothing is flushed yet."""
    mirror.gate.take_era(lambda: None)
    mirror.turn()
    for first, stop in list(mirror.gate.taken.runs()):
        mirror.gate.copied(first, stop)
