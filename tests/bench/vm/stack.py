"""A volume attached with device-mapper, as the benchmark uses it: made with dmctl, then asked over
its control socket, since a command of dmctl costs a second of the emulated processor."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.machine import processor_s
from tests.bench.vm.command import dmctl
from tests.bench.vm.far import Site
from tests.bench.vm.media import MIB, Media
from tests.support.volumes import Control

WAIT_S = 60.0
POLL_S = 0.1
RECORD_BYTES = 8 * MIB
PAGE_BYTES = 4096
# The record of an idle volume shrinks to nothing; it counts as idle after 30 s, and a turn of
# another contender may last for half of that.
IDLE_S = 8.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What a volume is made with; `options` are those of `dmctl create`."""

    name: str
    size_bytes: int
    extent_bytes: int
    options: tuple[str, ...] = ()
    latency_us: int = 0  # of primary and secondary
    points: bool = False  # the secondary is the image of a receiver


@dataclass(frozen=True, slots=True)
class Delta:
    """What a volume did in a measurement."""

    seconds: float
    writes: int
    misses: int
    gate_writes: int
    copied_bytes: int
    barriers: int
    table_loads: int
    suspended_s: float
    processor_s: float  # that bitmapd has had

    @property
    def hit_share(self) -> float | None:
        return 1 - self.misses / self.writes if self.writes else None

    @property
    def direct_share(self) -> float | None:
        return 1 - self.gate_writes / self.writes if self.writes else None


class Stack(AbstractContextManager["Stack"]):
    """See the module docstring.  It begins with `start`; whatever there is of it ends."""

    def __init__(self, media: Media, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self.name = f"bvm-{shape.name}"
        self.device = f"/dev/mapper/{self.name}"
        self.primary = media.make(f"{shape.name}-p", shape.size_bytes, shape.latency_us)
        self.secondary = self._make_secondary(media)
        self._record = media.make(f"{shape.name}-r", RECORD_BYTES)
        self._folder = folder
        self._fd = -1
        self._written_at = 0.0
        self._direct: list[int] = []

    def _make_secondary(self, media: Media) -> str:
        return media.make(f"{self.shape.name}-s", self.shape.size_bytes, self.shape.latency_us)

    def start(self) -> None:
        devices = ("--primary", self.primary, "--secondary", self.secondary)
        extent = ("--extent-size", f"{self.shape.extent_bytes}B", "--initial-sync", "skip")
        self._dmctl(
            *("create", self.name, "--attach", "dm", *devices, "--record", self._record),
            *(*extent, *self.shape.options),
        )
        self._dmctl("start", self.name)
        self._fd = os.open(self.device, os.O_RDWR | os.O_DIRECT)

    def __exit__(self, *_: object) -> None:
        self._close()
        self._dmctl("stop", self.name, "--now", check=False)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def stop(self) -> bool:
        """An orderly stop; whether both ends hold the same bytes afterwards."""
        self._close()
        self._dmctl("stop", self.name)
        return _same(self.primary, self.secondary, self.shape.size_bytes)

    def _dmctl(self, *words: str, check: bool = True) -> None:
        dmctl(self._folder, *words, check=check)

    # -- asking -------------------------------------------------------------------------------
    def call(self, verb: str, **args: Any) -> Any:
        """On a connection of its own: an idle one is closed by the volume after a while."""
        with Control(self._folder / "run" / f"{self.name}.ctl", WAIT_S) as control:
            return control.call(verb, **args)

    def status(self) -> dict[str, Any]:
        return dict(self.call("status"))

    def settle(self) -> None:
        """Return when the copier has nothing left to do."""
        self.call("wait", **{"for": "in-sync"})

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        end_s = time.monotonic() + WAIT_S
        while not condition(status := self.status()):
            if time.monotonic() > end_s:
                raise TimeoutError(f"volume '{self.name}': not {what} in {WAIT_S} s: {status}")
            time.sleep(POLL_S)

    # -- writing ------------------------------------------------------------------------------
    def touch(self, offsets: Iterable[int] = (0,)) -> None:
        """Write a page at each of these."""
        with mmap.mmap(-1, PAGE_BYTES) as page:
            for offset in offsets:
                os.pwrite(self._fd, page, offset)
        self._written_at = time.monotonic()

    def make_direct(self, offsets: list[int]) -> None:
        """Have the extents at these offsets, and no others, on the direct path.

        Written once they are in the record; written again they are worth a change of the table.
        """
        self._direct = offsets
        self.touch(offsets)
        self.touch(offsets)
        self.until(lambda status: status["direct_extents"] == len(offsets), "direct")
        self.settle()

    def keep_awake(self) -> None:
        """So that its record stays while others are measured."""
        if time.monotonic() - self._written_at > IDLE_S:
            self.touch()

    def make_ready(self) -> None:
        """What was made direct is so, and there is nothing to copy."""
        if self._direct and self.status()["direct_extents"] != len(self._direct):
            self.make_direct(self._direct)
        self.settle()

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Delta]]:
        """What it does meanwhile is in the list afterwards."""
        found: list[Delta] = []
        pid = int((self._folder / "run" / f"{self.name}.pid").read_text())
        before, began_s, had_s = self.status(), time.monotonic(), processor_s(pid)
        yield found
        self._written_at = time.monotonic()
        had_s = processor_s(pid) - had_s
        after = self.status()
        found.append(_delta(before, after, time.monotonic() - began_s, had_s))

    @contextlib.contextmanager
    def sampled(self) -> Iterator[list[float]]:
        """Seconds for which each barrier held writes meanwhile.

        Barriers that end between two looks share the sum of their times.
        """
        found: list[float] = []
        over = threading.Event()

        def look() -> None:
            last = self.status()
            while not over.wait(POLL_S):
                now = self.status()
                passed = _took_place(now) - _took_place(last)
                if passed:
                    held_s = now["suspended_seconds_total"] - last["suspended_seconds_total"]
                    found.extend([held_s / passed] * passed)
                    last = now

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()


class PointStack(Stack):
    """A volume with a receiver at another site; points are cut when that is asked."""

    def __init__(self, media: Media, folder: Path, shape: Shape, site: Site) -> None:
        self._site = site
        super().__init__(media, folder, shape)

    def _make_secondary(self, media: Media) -> str:
        return self._site.image

    def start(self) -> None:
        self._dmctl(
            *("create", self.name, "--attach", "dm", "--primary", self.primary),
            *(*self._site.options, "--record", self._record, "--point-interval", "1h"),
            *("--extent-size", f"{self.shape.extent_bytes}B", *self.shape.options),
        )
        self._dmctl("start", self.name)
        self._fd = os.open(self.device, os.O_RDWR | os.O_DIRECT)
        self._dmctl("wait", self.name, "--for", "point", "--newer-than", "0")

    def settle(self) -> None:
        """Return when a point has everything, and the image has that point."""
        self.call("point", wait=True)
        super().settle()
        self.until(
            lambda status: status["receiver"]["applied"] == status["receiver"]["committed"],
            "applied",
        )

    def make_ready(self) -> None:
        """As before a cut: next to nothing is dirty, and hosts write past the gate again, which
        they do once they are seen to write."""
        self.settle()
        self.touch(self._direct)
        self.touch(self._direct)
        self.until(
            lambda status: status["direct_extents"] == len(self._direct), "direct after a cut"
        )

    def stop(self) -> bool:
        self.settle()
        return super().stop()

    @contextlib.contextmanager
    def cut_after(self, seconds: float) -> Iterator[None]:
        """A point is cut so long after the beginning."""
        over = threading.Event()
        asked: list[Any] = []

        def cut() -> None:
            if not over.wait(seconds):
                asked.append(self.call("point"))

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if not asked:
            raise RuntimeError(f"volume '{self.name}' was not cut while it was measured")


def _took_place(status: dict[str, Any]) -> int:
    return int(status["barriers_total"] - status["barriers_skipped_total"])


def _delta(before: dict[str, Any], after: dict[str, Any], seconds: float, had_s: float) -> Delta:
    def grown(key: str) -> Any:
        return after[key] - before[key]

    return Delta(
        seconds=seconds,
        writes=grown("writes_total"),
        misses=grown("misses_total"),
        gate_writes=grown("gate_writes_total"),
        copied_bytes=grown("copied_bytes_total"),
        barriers=_took_place(after) - _took_place(before),
        table_loads=grown("table_loads_total"),
        suspended_s=grown("suspended_seconds_total"),
        processor_s=had_s,
    )


def _same(one: str, other: str, size_bytes: int) -> bool:
    """Past the page cache, which device-mapper does not feed."""
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in (one, other)]
    pieces = [mmap.mmap(-1, 4 * MIB) for _ in fds]
    try:
        for offset in range(0, size_bytes, 4 * MIB):
            for fd, piece in zip(fds, pieces, strict=True):
                os.preadv(fd, [piece], offset)
            if pieces[0][:] != pieces[1][:]:
                return False
        return True
    finally:
        for fd, piece in zip(fds, pieces, strict=True):
            os.close(fd)
            piece.close()
