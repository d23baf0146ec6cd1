"""The real disk engine on real files: whatever goes wrong, every operation is answered once.

Completions that raise, results that are short, empty or errors, a kernel without memory for what is
submitted, waits that are cancelled, in any mixture.  Afterwards nothing is in flight, every `done`
was called once, what raised was reported, and the file holds what was written to it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.media import aio
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import aligned
from bitmapd.media.kdevice import KernelDevice

PLACE = 16 << 10
PLACES = 24
PAGE = 4096
WAIT_S = 10.0

# What the kernel says of an operation in place of the truth: the share that was transferred, in
# pages, or an error.
BENT = [None, None, None, 1, 3, 0, -errno.EIO]
KINDS = ["write", "read", "write_fua", "flush", "read_aside", "zero", "trim", "allocation", "call"]


@dataclass(frozen=True, slots=True)
class Step:
    kind: str
    raises: bool
    bent: int | None
    cancelled: bool


class BentEngine(AioEngine):
    """One whose kernel has bad days: `refusals` of the next submissions, `bent` results."""

    def __init__(self, loop: asyncio.AbstractEventLoop, refusals: list[bool]) -> None:
        super().__init__(loop, depth=8)
        self.bent: dict[int, int] = {}  # by address of the buffer
        self.refusals = refusals
        self._really = self._syscall
        self._syscall: Any = self._maybe

    def _maybe(self, number: Any, *arguments: Any) -> int:
        if number is self._arg_submit and self.refusals and self.refusals.pop():
            ctypes.set_errno(errno.EAGAIN)
            return -1
        return int(self._really(number, *arguments))

    def _take_events(self, events: memoryview) -> list[tuple[int, int]]:
        return [self._bend(*found) for found in super()._take_events(events)]

    def _ask_for_events(self) -> list[tuple[int, int]]:
        return [self._bend(*found) for found in super()._ask_for_events()]

    def _bend(self, slot: int, result: int) -> tuple[int, int]:
        operation = self._slots[slot]
        if operation is None or operation[2] is None or result != operation[3]:
            return slot, result
        pages = self.bent.pop(id(operation[6]), None)
        if pages is None or pages * PAGE >= result:
            return slot, result
        return slot, pages * PAGE if pages >= 0 else pages


@dataclass
class Run:
    """The answers, by number of the step."""

    answers: dict[int, list[OSError | None]] = field(default_factory=dict)
    raised: list[int] = field(default_factory=list)
    reported: list[int] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)


class Wanted(Exception):
    """Raised by a completion, with the number of its step."""


@pytest.fixture(params=["disk", "memory"], scope="module")
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = "/dev/shm" if request.param == "memory" else None
    with tempfile.TemporaryDirectory(prefix="bitmapd-test-", dir=folder) as name:
        yield Path(name) / "disk"


@pytest.mark.parametrize("from_ring", [True, False])
@given(
    steps=st.lists(
        st.builds(
            Step, st.sampled_from(KINDS), st.booleans(), st.sampled_from(BENT), st.booleans()
        ),
        min_size=1,
        max_size=PLACES,
    ),
    refusals=st.lists(st.booleans(), max_size=6),
    aside=st.booleans(),
)
def test_every_operation_is_answered_once(
    path: Path, from_ring: bool, steps: list[Step], refusals: list[bool], aside: bool
) -> None:
    path.write_bytes(bytes(PLACE * PLACES))
    before, aio._READS_IN_ORDER = aio._READS_IN_ORDER, from_ring and aio._READS_IN_ORDER
    try:
        run = asyncio.run(asyncio.wait_for(carry_out(path, steps, list(refusals), aside), WAIT_S))
    finally:
        aio._READS_IN_ORDER = before
    assert {number: len(got) for number, got in run.answers.items()} == dict.fromkeys(
        range(len(steps)), 1
    )
    assert sorted(run.reported) == sorted(run.raised)
    content = path.read_bytes()
    for number, fill in run.written.items():
        place = content[number * PLACE : (number + 1) * PLACE]
        assert place == bytes([fill]) * PLACE, f"step {number}"


async def carry_out(path: Path, steps: list[Step], refusals: list[bool], aside: bool) -> Run:
    loop = asyncio.get_running_loop()
    run = Run()

    def report(_: object, context: dict[str, Any]) -> None:
        error = context["exception"]
        if not isinstance(error, Wanted):
            raise error
        run.reported.append(error.args[0])

    loop.set_exception_handler(report)
    engine = BentEngine(loop, refusals)
    device = await engine.call(lambda: KernelDevice(path, engine, aside=aside))
    waits = [begin(engine, device, number, step, run) for number, step in enumerate(steps)]
    for task, step in zip(waits, steps, strict=True):
        if task is not None and step.cancelled:
            await asyncio.sleep(0)
            task.cancel()
    idle = asyncio.Event()
    engine.when_idle(idle.set)
    await idle.wait()
    await asyncio.gather(*(task for task in waits if task is not None), return_exceptions=True)
    assert engine.in_flight == 0
    # It serves on.
    last: asyncio.Future[OSError | None] = loop.create_future()
    device.read(0, aligned(PAGE), last.set_result)
    assert await last is None
    device.close()
    engine.when_idle(idle.set)
    await engine.call(os.getpid)
    engine.close()
    return run


def begin(
    engine: BentEngine, device: KernelDevice, number: int, step: Step, run: Run
) -> asyncio.Task[Any] | None:
    offset = number * PLACE

    def done(error: OSError | None, *_: object) -> None:
        run.answers.setdefault(number, []).append(error)
        if error is None and step.kind.startswith("write"):
            run.written[number] = number + 1
        if error is None and step.kind in ("zero", "trim"):
            run.written[number] = 0
        if step.raises:
            run.raised.append(number)
            raise Wanted(number)

    buffer = aligned(PLACE)
    buffer[:] = bytes([number + 1]) * PLACE
    if step.bent is not None and not device._aio_blocks:
        engine.bent[id(done)] = step.bent
    if step.kind == "call":
        return engine.loop.create_task(awaited(engine, number, run))
    if step.kind in ("write", "write_fua"):
        device.write(offset, buffer, done, step.kind == "write_fua")
    elif step.kind == "read":
        device.read(offset, buffer, done)
    elif step.kind == "read_aside":
        device.read_aside(offset, buffer, done)
    elif step.kind == "flush":
        device.flush(done)
    elif step.kind == "zero":
        device.zero(offset, PLACE, done, unmap=False)
    elif step.kind == "trim":
        device.trim(offset, PLACE, done)
    else:
        device.allocation(offset, PLACE, done)
    return None


async def awaited(engine: AioEngine, number: int, run: Run) -> None:
    """A wait that may be cancelled; the call itself goes on and is counted."""
    try:
        await engine.call(os.getpid)
    finally:
        run.answers.setdefault(number, []).append(None)
