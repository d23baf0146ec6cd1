"""A loss of cached writes is reported once by the medium, and told to every host by us."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bitmapd.copier import settling
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Done
from bitmapd.media.buffers import aligned
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.lost import LostWrites
from bitmapd.record.geometry import MIB
from tests.support.local import LocalVolume
from tests.support.rawnbd import FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES, RawNbd
from tests.support.serving import Served, serving

GONE = OSError(errno.EIO, "the cache is gone")
FULL = OSError(errno.ENOSPC, "no space")


# -- who is told what -------------------------------------------------------------------------


def test_every_listener_is_told_once() -> None:
    lost = LostWrites()
    one, other = lost.listener(), lost.listener()
    assert one.answer(None) is None
    assert lost.report(GONE)
    assert [one.answer(None), one.answer(None)] == [GONE, None]
    assert [other.answer(None), other.answer(None)] == [GONE, None]


def test_who_fails_by_itself_has_been_told() -> None:
    lost = LostWrites()
    one, other = lost.listener(), lost.listener()
    lost.report(GONE)
    assert one.answer(GONE) is GONE
    assert one.answer(None) is None
    assert other.answer(FULL) is FULL
    assert other.answer(None) is None


def test_several_losses_are_told_as_the_latest() -> None:
    lost = LostWrites()
    one = lost.listener()
    lost.report(GONE)
    lost.report(FULL)
    assert [one.answer(None), one.answer(None)] == [FULL, None]


def test_whoever_comes_later_is_told_what_nobody_has_been_told() -> None:
    lost = LostWrites()
    lost.report(GONE)
    late, later = lost.listener(), lost.listener()
    assert [late.answer(None), later.answer(None)] == [GONE, GONE]
    assert lost.listener().answer(None) is None


def test_an_error_that_several_share_is_one_loss() -> None:
    lost = LostWrites()
    one = lost.listener()
    assert lost.report(GONE)
    assert one.answer(GONE) is GONE
    assert not lost.report(GONE)
    assert one.answer(None) is None


# -- hosts of a volume ------------------------------------------------------------------------

Submit = Callable[[int, Done], None]


@pytest.fixture
def settling_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that failed is tried again after a moment."""
    monkeypatch.setattr(settling, "SETTLE_INTERVAL_S", 0.05)


# `Failing` takes the place of a method of the disk engine.
pytestmark = pytest.mark.interpreted


class Failing:
    """In place of the disk engine's flush: the primary fails when asked to."""

    def __init__(self, served: Served) -> None:
        self._really: Submit = served.volume._parts.engine.flush
        self._primary = served.volume._parts.primary
        self.failures: list[OSError] = []
        served.volume._parts.engine.flush = self  # type: ignore[method-assign, assignment]

    def __call__(self, fd: int, done: Done) -> None:
        if fd == self._primary.fd and self.failures:
            asyncio.get_running_loop().call_soon(done, self.failures.pop())
        else:
            self._really(fd, done)


def number(host: RawNbd, command: int, **options: Any) -> int:
    """The error of a request, 0 for none."""
    length = 0 if command == FLUSH else 4096
    try:
        host.call(command, 0, length, b"x" * length if command == WRITE else b"", **options)
    except OSError as error:
        return error.errno or -1
    return 0


@contextmanager
def hosts(local: LocalVolume, count: int) -> Iterator[list[RawNbd]]:
    with ExitStack() as stack:
        socket = local.paths.nbd_socket(local.name)
        yield [stack.enter_context(RawNbd(socket, local.name)) for _ in range(count)]


@pytest.mark.usefixtures("settling_soon")
@pytest.mark.parametrize("durable", ["write", "zero", "trim"])
def test_what_the_copiers_flush_is_told_all_hosts_are_told(
    local: LocalVolume, durable: str
) -> None:
    command = {"write": WRITE, "zero": WRITE_ZEROES, "trim": TRIM}[durable]

    def act(one: RawNbd, other: RawNbd, third: RawNbd) -> list[int]:
        return [
            number(other, WRITE),  # answered as ever: it may sit in a cache
            number(one, FLUSH),
            number(one, FLUSH),
            number(other, command, flags=FUA),
            number(other, FLUSH),
            number(third, FLUSH),
            number(third, FLUSH),
        ]

    async def run() -> None:
        async with serving(local) as served:
            failing = Failing(served)
            failing.failures.append(GONE)
            open_hosts = hosts(local, 3)
            one, other, third = await asyncio.to_thread(open_hosts.__enter__)
            await served.write(3 * MIB, b"w" * 65536)
            await served.event("copy-error")
            answers = await asyncio.to_thread(act, one, other, third)
            assert answers == [0, errno.EIO, 0, errno.EIO, 0, errno.EIO, 0]
            later = hosts(local, 1)
            (fourth,) = await asyncio.to_thread(later.__enter__)
            assert await asyncio.to_thread(number, fourth, FLUSH) == 0, "others were told"
            later.__exit__(None, None, None)
            open_hosts.__exit__(None, None, None)
            await served.in_sync()

    asyncio.run(run())
    assert local.differing() == set()


def test_what_one_host_is_told_the_others_and_the_next_are_told(local: LocalVolume) -> None:
    async def run() -> None:
        async with serving(local) as served:
            failing = Failing(served)
            pair = hosts(local, 2)
            one, other = await asyncio.to_thread(pair.__enter__)
            failing.failures.append(GONE)
            assert await asyncio.to_thread(number, one, FLUSH) == errno.EIO
            assert await asyncio.to_thread(number, one, FLUSH) == 0
            assert await asyncio.to_thread(number, other, FLUSH) == errno.EIO
            assert await asyncio.to_thread(number, other, FLUSH) == 0
            pair.__exit__(None, None, None)

    asyncio.run(run())


@pytest.mark.usefixtures("settling_soon")
def test_with_nobody_there_the_next_host_is_told(local: LocalVolume) -> None:
    async def run() -> None:
        async with serving(local) as served:
            Failing(served).failures.append(GONE)
            await served.write(0, b"w" * 65536)
            await served.event("copy-error")
            alone = hosts(local, 1)
            (one,) = await asyncio.to_thread(alone.__enter__)
            assert await asyncio.to_thread(number, one, FLUSH) == errno.EIO
            assert await asyncio.to_thread(number, one, FLUSH) == 0
            alone.__exit__(None, None, None)

    asyncio.run(run())


# -- the device: in which order it is told ----------------------------------------------------


class Held:
    """In place of the engine's flush and write: both wait until the test lets them end."""

    def __init__(self, disk: AioEngine) -> None:
        self.waiting: list[tuple[str, Done]] = []
        disk.flush = lambda fd, done: self.waiting.append(("flush", done))  # type: ignore[method-assign]
        for name in ("write", "write_now", "write_aside"):
            setattr(disk, name, self._write)

    def _write(self, fd: int, at: int, buffer: memoryview, done: Done, fua: bool = False) -> None:
        self.waiting.append(("write", done))

    def end(self, kind: str, error: OSError | None = None) -> None:
        index = [waiting for waiting, _ in self.waiting].index(kind)
        self.waiting.pop(index)[1](error)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[KernelDevice, Held]]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    loop = asyncio.new_event_loop()
    disk = AioEngine(loop)
    device = KernelDevice(path, disk)
    yield device, Held(disk)
    device.close()
    disk.close()
    loop.close()


def test_flushes_go_one_at_a_time_and_those_that_wait_share_the_next(
    held: tuple[KernelDevice, Held],
) -> None:
    device, disk = held
    told: list[tuple[int, OSError | None]] = []
    for index in range(4):
        device.flush(lambda error, index=index: told.append((index, error)))  # type: ignore[misc]
    assert len(disk.waiting) == 1
    disk.end("flush")
    assert told == [(0, None)]
    disk.end("flush", GONE)
    assert told == [(0, None), (1, GONE), (2, GONE), (3, GONE)]
    assert not disk.waiting


@pytest.mark.parametrize("others", [0, 1])
def test_a_flush_does_not_succeed_before_a_durable_write_has_told_what_it_was_told(
    held: tuple[KernelDevice, Held], others: int
) -> None:
    device, disk = held
    told: list[tuple[str, OSError | None]] = []
    for index in range(1 + others):
        device.write(4096 * index, aligned(4096), lambda error: told.append(("write", error)), True)
    device.flush(lambda error: told.append(("flush", error)))
    disk.end("flush")
    device.write(65536, aligned(4096), lambda error: told.append(("later", error)), True)
    assert told == []
    for _ in range(others):
        disk.end("write")
    disk.end("write", GONE)
    assert told == [("write", None)] * others + [("write", GONE), ("flush", None)]
    device.flush(lambda error: told.append(("flush", error)))
    disk.end("write")
    disk.end("flush")
    assert told[-2:] == [("later", None), ("flush", None)]
