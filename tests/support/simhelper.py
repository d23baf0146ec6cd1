"""The wiring helper of a simulated kernel: the real barrier, one call to the kernel at a time.

`SimHelper` is the process.  What it remembers from one barrier to the next is that of
`dmctl.kernel.barrier.Barrier`, which runs on a thread of its own.  The two threads never run at the
same time: the barrier's goes on when `step` says so, up to its next call that changes or looks at
something, and only the other one lets time pass.

Between two calls anything may happen.  `fail` has the call that comes next end with an error, and
the barrier tidies up; `kill` ends it there, and it makes no call any more.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from dmctl.kernel.barrier import Barrier, Collected, counters
from dmctl.kernel.dm_wire import Target
from dmctl.kernel.verbs import wired
from dmctl.model.era import read_superblock
from dmctl.model.stack import Segment, Volume, segments_of, write_table
from dmctl.model.targets import SECTOR_BYTES, Line, parse_target
from tests.data.era.build import Image, image

ERA, NBD = "253:1", "43:0"
ERA_NAME, WRITE_NAME = "dmctl-sim-era", "dmctl-sim-w"
METADATA_BLOCKS = 4096
KEPT_ERAS = 3  # the marks of older ones are digested


class Killed(BaseException):
    """The process was killed in this call."""


class Lockstep:
    """A process that runs between two of its calls, and only when it is told to."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: OSError | None = None
        self.ended = False
        self.waits_for: Callable[[], bool] = lambda: True  # when its call can go on
        self.failed_at_drop = False
        self.calling = ""
        self._next: BaseException | None = None
        self._killed = False
        self._hurries = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                self.result = work()
        except OSError as error:
            self.error = error
        except Killed:
            self.error = OSError(errno.EPIPE, "killed")
        finally:
            self.ended = True
            self._done.release()

    def call(self, what: str, waits_for: Callable[[], bool] = lambda: True) -> None:
        """By the process: a call to the kernel, which others may come before."""
        if self._killed:
            raise Killed
        if self._hurries and waits_for():
            return
        self.waits_for, self.calling = waits_for, what
        self._done.release()
        self._go.acquire()
        self.waits_for = lambda: True
        if self._killed:
            raise Killed
        if self._next is not None:
            error, self._next = self._next, None
            raise error

    def step(self) -> None:
        """By the others: let it go on, up to its next call."""
        self._go.release()
        self._done.acquire()

    def fail(self, error: OSError) -> None:
        """Its next call ends like that; it does the rest of its work at once."""
        self._next, self._hurries = error, True
        self.failed_at_drop = self.calling == "drop_metadata_snap"
        self.step()

    def kill(self) -> None:
        if not self.ended:
            self._killed = True
            self.step()
        self._thread.join()


class Marks:
    """What dm-era's metadata say of the eras before `current`."""

    def __init__(self, blocks: int, current: int, marks: Mapping[int, Collection[int]]) -> None:
        oldest = max(1, current - KEPT_ERAS)
        digested = [0] * blocks
        for era in range(1, oldest):
            for block in marks.get(era, ()):
                digested[block] = era
        kept = {era: marks.get(era, ()) for era in range(oldest, current)}
        self.image: Image = image(blocks, kept, digested, current, snapshot=True)
        self.root = read_superblock(self.image.read(0)).snapshot_root


class Tables(Protocol):
    """The kernel below: the write device, and the era device's marks and counters."""

    size_bytes: int
    block_bytes: int
    snapshot: Marks | None
    metadata_used: int

    @property
    def drained(self) -> bool: ...

    @property
    def is_suspended(self) -> bool: ...

    @property
    def has_inactive(self) -> bool: ...

    def load(self, segments: list[Segment] | None) -> None: ...

    def suspend(self, *, to_swap: bool) -> None: ...

    def resume(self, *, swap: bool) -> None: ...

    def take_snapshot(self) -> Marks: ...

    def stat(self) -> SimStat: ...


class SimStat(Protocol):
    """As `bitmapd.media.blockstat.BlockStat`."""

    lapses: int

    def read(self) -> list[int]: ...

    def switch_on(self) -> bool: ...


class SimHelper:
    """See the module docstring; it is all of `DeviceMapper` that a barrier asks for, too."""

    def __init__(self, kernel: Tables, current_era: Callable[[], int]) -> None:
        self._kernel = kernel
        self._current_era = current_era
        self._volume = Volume(
            "sim", "0" * 32, "/dev/sim", kernel.size_bytes, SECTOR_BYTES, kernel.block_bytes
        )
        self._stat = kernel.stat()
        self._lapses = self._restored = 0
        self.switched_on = False  # at the latest barrier; its answer says so
        self._process: Lockstep | None = None
        self._barrier = Barrier(
            self,  # type: ignore[arg-type]
            ERA_NAME,
            WRITE_NAME,
            self,
            self._counters,
            deadline=_no_alarm,
        )

    # -- the others' side -------------------------------------------------------------------
    def begin(self, segments: Sequence[Segment] | None, since_era: int, lapses: int) -> Lockstep:
        def work() -> Collected:
            self.switched_on = self._stat.switch_on()
            self._restored += self.switched_on
            self._lapses = lapses + self._restored
            table = None
            if segments is not None:
                table = wired(write_table(self._volume, segments, era=ERA, nbd=NBD))
            return self._barrier(table, since_era, 5.0)

        self._process = Lockstep(work)
        return self._process

    def begin_swap(self, segments: Sequence[Segment]) -> Lockstep:
        table = wired(write_table(self._volume, segments, era=ERA, nbd=NBD))
        self._process = Lockstep(lambda: self._barrier.swap(table, 5.0))
        return self._process

    # -- what the barrier asks for ----------------------------------------------------------
    def _call(self, what: str, waits_for: Callable[[], bool] = lambda: True) -> None:
        if self._process is None:
            raise AssertionError("a call of no process")
        self._process.call(what, waits_for)

    def _counters(self) -> Any:
        self._call("counters")
        return counters(self._stat, self._lapses)  # type: ignore[arg-type]

    def message(self, name: str, text: str) -> None:
        assert name == ERA_NAME
        self._call(text)
        kernel = self._kernel
        taking = text == "take_metadata_snap"
        if taking == (kernel.snapshot is not None):
            raise OSError(errno.EINVAL, f"'{text}': a snapshot is held, or none")
        kernel.snapshot = kernel.take_snapshot() if taking else None

    def status(self, name: str) -> list[Target]:
        assert name == ERA_NAME
        held = self._kernel.snapshot
        root = "-" if held is None else held.root
        used = self._kernel.metadata_used
        return [Target(0, 1, "era", f"8 {used}/{METADATA_BLOCKS} {self._current_era()} {root}")]

    def load(self, name: str, table: Sequence[Target]) -> None:
        assert name == WRITE_NAME
        self._call("load")
        lines = [
            Line(
                target.first_sector * SECTOR_BYTES,
                target.sectors * SECTOR_BYTES,
                parse_target(target.kind, target.parameters),
            )
            for target in table
        ]
        segments = segments_of(lines, era=ERA, nbd=NBD)
        if segments is None or segments[-1][1] != self._kernel.size_bytes:
            raise OSError(errno.EINVAL, f"{table} is no table of the volume")
        self._kernel.load(segments)

    def clear(self, name: str) -> None:
        assert name == WRITE_NAME
        self._call("clear")
        self._kernel.load(None)

    def resume(self, name: str) -> None:
        self.going_on(name)()

    def holding(self, name: str) -> Callable[[], None]:
        assert name == WRITE_NAME
        return self._hold

    def _hold(self) -> None:
        self._call("hold")
        self._kernel.suspend(to_swap=False)
        self._until_drained()

    def _until_drained(self) -> None:
        try:
            self._call("drain", lambda: self._kernel.drained)
        except OSError:
            self._kernel.resume(swap=False)
            raise

    def going_on(self, name: str) -> GoOn:
        assert name == WRITE_NAME
        return GoOn(self)

    def go_on(self) -> bool:
        self._call("go on")
        kernel = self._kernel
        if not kernel.is_suspended:
            if not kernel.has_inactive:
                return False
            kernel.suspend(to_swap=True)
            self._until_drained()
        kernel.resume(swap=True)
        return True

    def read_block(self, number: int) -> bytes:
        held = self._kernel.snapshot
        if held is None:
            raise OSError(errno.EIO, "the metadata are read without a snapshot")
        return bytes(held.image.read(number))

    def read_blocks(self, numbers: Sequence[int]) -> list[bytes]:
        return [self.read_block(number) for number in numbers]


class GoOn:
    """As `dm_ioctl.Prepared`."""

    def __init__(self, helper: SimHelper) -> None:
        self._helper = helper
        self.resumed = False

    def __call__(self) -> None:
        self.resumed = self._helper.go_on()


@contextlib.contextmanager
def _no_alarm(seconds: float) -> Iterator[None]:
    del seconds
    yield
