"""The AIO engine, kernel devices and buffers on real files and loop devices."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from bitmapd.errors import NotFoundError, UsageError
from bitmapd.media import aio
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Done
from bitmapd.media.buffers import (
    IDLE_BYTES,
    IDLE_S,
    KEEP_BYTES,
    BufferPool,
    address_of,
    aligned,
)
from bitmapd.media.kdevice import KernelDevice
from tests.support.loops import memory_folder
from tests.support.sim import SimLoop

MIB = 1 << 20


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(params=[True, False], ids=["from the ring", "from the kernel"])
def engine(
    loop: asyncio.AbstractEventLoop, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AioEngine]:
    """Both ways to learn what the kernel has finished."""
    if request.param and not aio._READS_IN_ORDER:
        pytest.skip("EVENTS ARE NOT TAKEN FROM THE RING ON THIS KIND OF PROCESSOR")
    monkeypatch.setattr(aio, "_READS_IN_ORDER", request.param)
    engine = AioEngine(loop, depth=32)
    yield engine
    engine.close()


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where kernel AIO works, and where plain calls and threads take its place."""
    if request.param == "disk":
        yield tmp_path
        return
    with memory_folder() as path:
        yield path


def finish(
    loop: asyncio.AbstractEventLoop, *submits: Callable[[Done], None]
) -> list[OSError | None]:
    """Submit everything, run the loop until all have called back, return results in order."""
    results: dict[int, OSError | None] = {}
    complete = loop.create_future()

    def done(index: int, error: OSError | None) -> None:
        assert index not in results, "done was called twice"
        results[index] = error
        if len(results) == len(submits):
            complete.set_result(None)

    for index, submit in enumerate(submits):
        submit(lambda error, index=index: done(index, error))
        assert index not in results, "done was called from inside the submitting call"
    loop.run_until_complete(asyncio.wait_for(complete, 20))
    return [results[index] for index in range(len(submits))]


def file_of(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture(params=[512, 4096])
def loop_device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    backing = file_of(tmp_path / "backing", 8 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", str(request.param), str(backing)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"NO LOOP DEVICE HERE: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    yield path, request.param
    subprocess.run(["losetup", "--detach", str(path)], check=True)


def test_random_writes_read_back(
    loop: asyncio.AbstractEventLoop, engine: AioEngine, folder: Path
) -> None:
    path = file_of(folder / "disk", 4 * MIB)
    device = KernelDevice(path, engine)
    rng = random.Random(7)
    expected = bytearray(4 * MIB)
    for _ in range(5):
        submits = []
        slots = rng.sample(range(1024), 200)  # more than the engine's depth
        for slot in slots:
            data = rng.randbytes(4096)
            buffer = aligned(4096)
            buffer[:] = data
            expected[slot * 4096 : slot * 4096 + 4096] = data
            submits.append(
                lambda done, slot=slot, buffer=buffer: device.write(slot * 4096, buffer, done)
            )
        assert finish(loop, *submits) == [None] * 200
    assert finish(loop, device.flush) == [None]
    whole = aligned(4 * MIB)
    assert finish(loop, lambda done: device.read(0, whole, done)) == [None]
    assert whole == expected
    assert path.read_bytes() == expected
    assert engine.in_flight == 0
    device.close()


@pytest.mark.parametrize("length", [4096, MIB])
def test_what_goes_on_beside_hosts(
    loop: asyncio.AbstractEventLoop, engine: AioEngine, folder: Path, length: int
) -> None:
    """Copying: one device for it alone, and the aside reads of one that hosts work on too."""
    total = 16 * length
    primary = KernelDevice(file_of(folder / "primary", total), engine)
    secondary = KernelDevice(file_of(folder / "secondary", total), engine, aside=True)
    data = random.Random(11).randbytes(total)
    (folder / "primary").write_bytes(data)
    buffers = [aligned(length) for _ in range(16)]
    small = aligned(4096)
    reads = [
        lambda done, at=at: primary.read_aside(at * length, buffers[at], done) for at in range(16)
    ]
    host = [lambda done, at=at: primary.read(at * 4096, small, done) for at in range(16)]
    assert finish(loop, *(submit for pair in zip(reads, host, strict=True) for submit in pair)) == (
        [None] * 32
    )
    assert b"".join(buffers) == data
    writes = [
        lambda done, at=at: secondary.write(at * length, buffers[at], done, at % 2 == 0)
        for at in range(16)
    ]
    assert finish(loop, *writes) == [None] * 16
    assert finish(loop, secondary.flush) == [None]
    assert (folder / "secondary").read_bytes() == data
    back = aligned(length)
    assert finish(loop, lambda done: secondary.read(3 * length, back, done)) == [None]
    assert back == buffers[3]
    assert engine.in_flight == 0
    primary.close()
    secondary.close()


@pytest.mark.parametrize("length", [4096, MIB])
def test_errors_beside_hosts_reach_done(
    loop: asyncio.AbstractEventLoop, engine: AioEngine, folder: Path, length: int
) -> None:
    file = file_of(folder / "ro", 4 * MIB)
    device = KernelDevice(file, engine, read_only=True, aside=True)
    os.truncate(file, 2 * MIB + length // 2)
    buffer = aligned(length)
    buffer[:] = b"x" * length
    cut, beyond, refused, fua = finish(
        loop,
        lambda done: device.read(2 * MIB, buffer, done),
        lambda done: device.read_aside(3 * MIB, aligned(length), done),
        lambda done: device.write(0, buffer, done),
        lambda done: device.write(0, buffer, done, True),
    )
    end = f"{os.path.realpath(file)} ends at byte {2 * MIB + length // 2}"
    assert [error and error.strerror for error in (cut, beyond)] == [end, end]
    assert [error and error.errno for error in (cut, beyond)] == [errno.EIO, errno.EIO]
    assert [error and error.errno for error in (refused, fua)] == [errno.EBADF, errno.EBADF]
    assert engine.in_flight == 0
    device.close()


def test_a_completion_may_submit_the_next(loop: asyncio.AbstractEventLoop, folder: Path) -> None:
    """A chain of operations of all kinds, longer than what one kick completes."""
    engine = AioEngine(loop, depth=4)
    device = KernelDevice(file_of(folder / "disk", 4 * MIB), engine)
    small, large = aligned(4096), aligned(MIB)
    ended = loop.create_future()
    order: list[int] = []

    def step(error: OSError | None) -> None:
        assert error is None
        order.append(engine.in_flight)
        if len(order) == 90:
            ended.set_result(None)
        elif len(order) % 3 == 0:
            device.read_aside(MIB, large, step)
        elif len(order) % 3 == 1:
            device.write(0, small, step)
        else:
            device.flush(step)
        assert len(order) == 90 or engine.in_flight == 1

    step(None)
    loop.run_until_complete(asyncio.wait_for(ended, 20))
    assert order == [0] * 90
    device.close()
    engine.close()


def test_a_reservation_conflict_is_told_whichever_way_it_comes(
    loop: asyncio.AbstractEventLoop, engine: AioEngine
) -> None:
    """And no other error."""
    told: list[str] = []
    errors: list[OSError | None] = []
    ended = loop.create_future()

    def over(error: OSError | None, _: object = None) -> None:
        errors.append(error)
        if len(errors) == 4:
            ended.set_result(None)

    def refuse(number: int) -> None:
        raise OSError(number, os.strerror(number))

    engine.on_shut_out = lambda: told.append("shut out")
    for number in (errno.EIO, errno.EBADE):
        engine._called((aio.PWRITE, -1, aligned(4096), 4096, 0, 0, over), -number)
        engine.offload(partial(refuse, number), over)
    loop.run_until_complete(ended)
    loop.run_until_complete(asyncio.sleep(0))
    assert sorted(error.errno or 0 for error in errors if error) == [
        errno.EIO, errno.EIO, errno.EBADE, errno.EBADE,
    ]  # fmt: skip
    assert told == ["shut out"] * 2


def test_closing_waits_for_threads(loop: asyncio.AbstractEventLoop) -> None:
    with memory_folder() as folder:
        engine = AioEngine(loop)
        device = KernelDevice(file_of(folder / "disk", 64 * MIB), engine, aside=True)
        buffer = aligned(MIB)
        buffer[:] = b"y" * MIB
        for at in range(64):
            device.write(at * MIB, buffer, lambda error: None)
        engine.close()
        assert (folder / "disk").read_bytes() == b"y" * (64 * MIB)
        device.close()


def test_loop_device_sector_size(
    loop: asyncio.AbstractEventLoop, engine: AioEngine, loop_device: tuple[Path, int]
) -> None:
    path, sector = loop_device
    device = KernelDevice(path, engine)
    assert device.block_size_bytes == sector
    assert device.size_bytes == 8 * MIB
    assert device.direct
    buffer = aligned(sector)
    buffer[:] = b"x" * sector
    back = aligned(4 * sector)
    assert finish(loop, lambda done: device.write(sector, buffer, done, True)) == [None]
    assert finish(loop, lambda done: device.read(0, back, done)) == [None]
    assert bytes(back) == bytes(sector) + b"x" * sector + bytes(2 * sector)
    if sector == 4096:
        (error,) = finish(loop, lambda done: device.read(512, aligned(512), done))
        assert error is not None
        assert error.errno == errno.EINVAL
    device.close()


@pytest.mark.parametrize("unmap", [True, False])
def test_zero_and_trim(
    loop: asyncio.AbstractEventLoop,
    engine: AioEngine,
    loop_device: tuple[Path, int],
    tmp_path: Path,
    unmap: bool,
) -> None:
    block, sector = loop_device
    for path in (block, file_of(tmp_path / "file", 8 * MIB)):
        device = KernelDevice(path, engine)
        full = aligned(8 * MIB)
        full[:] = b"\xaa" * (8 * MIB)
        assert finish(loop, lambda done: device.write(0, full, done)) == [None]
        assert finish(
            loop, lambda done: device.zero(sector, 2 * MIB, done, unmap=unmap, fua=True)
        ) == [None]
        assert finish(loop, lambda done: device.trim(4 * MIB, MIB, done, fua=True)) == [None]
        assert finish(loop, lambda done: device.read(0, full, done)) == [None]
        assert bytes(full[:sector]) == b"\xaa" * sector
        assert bytes(full[sector : sector + 2 * MIB]) == bytes(2 * MIB)
        assert bytes(full[2 * MIB + sector : 4 * MIB]) == b"\xaa" * (2 * MIB - sector)
        assert bytes(full[5 * MIB :]) == b"\xaa" * (3 * MIB)
        device.close()


def test_zeros_are_written_where_the_file_system_cannot_zero(
    loop: asyncio.AbstractEventLoop, engine: AioEngine
) -> None:
    """tmpfs has no ZERO_RANGE, so a zero without unmap must write, and a fast one must refuse."""
    with memory_folder() as folder:
        path = folder / "disk"
        path.write_bytes(b"\xbb" * (3 * MIB))
        device = KernelDevice(path, engine)
        (error,) = finish(loop, lambda done: device.zero(0, 4096, done, unmap=False, fast=True))
        assert error is not None
        assert error.errno == errno.EOPNOTSUPP
        length = 2 * MIB + 4096
        assert finish(loop, lambda done: device.zero(4096, length, done, unmap=False)) == [None]
        expected = b"\xbb" * 4096 + bytes(length)
        assert path.read_bytes() == expected + b"\xbb" * (3 * MIB - len(expected))
        device.close()


def test_allocation_of_a_sparse_file(
    loop: asyncio.AbstractEventLoop, engine: AioEngine, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "sparse", 4 * MIB)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"y" * MIB)
    device = KernelDevice(path, engine)
    found: list[tuple[int, int]] = []

    def submit(done: Done) -> None:
        def answer(error: OSError | None, pieces: list[tuple[int, int]]) -> None:
            found.extend(pieces)
            done(error)

        device.allocation(0, 4 * MIB, answer)

    assert finish(loop, submit) == [None]
    assert sum(length for length, _ in found) == 4 * MIB
    assert [flags for _, flags in found] == [3, 0, 3]
    assert found[0][0] == MIB
    device.close()


def test_errors_reach_done(
    loop: asyncio.AbstractEventLoop, engine: AioEngine, folder: Path
) -> None:
    device = KernelDevice(file_of(folder / "ro", MIB), engine, read_only=True)
    buffer = aligned(4096)
    beyond, refused = finish(
        loop,
        lambda done: device.read(2 * MIB, buffer, done),
        lambda done: device.write(0, buffer, done),
    )
    assert beyond is not None
    assert beyond.errno == errno.EIO
    assert refused is not None
    assert refused.errno == errno.EBADF
    device.close()


def test_opening_what_is_not_there(engine: AioEngine, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        KernelDevice(tmp_path / "absent", engine)
    with pytest.raises(UsageError, match="neither a block device nor a regular file"):
        KernelDevice("/dev/null", engine)


def test_reopen(loop: asyncio.AbstractEventLoop, engine: AioEngine, folder: Path) -> None:
    path = file_of(folder / "disk", MIB)
    device = KernelDevice(path, engine)
    path.unlink()
    (error,) = finish(loop, device.open)
    assert error is not None
    assert not device.connected
    file_of(path, 2 * MIB)
    assert finish(loop, device.open) == [None]
    assert device.connected
    assert device.size_bytes == 2 * MIB
    device.close()


def test_pool_limit_and_reuse(loop: asyncio.AbstractEventLoop) -> None:
    pool = BufferPool(loop, 64 << 10)
    large = pool.take(1 << 20)  # above the limit, but nothing is out
    assert large is not None
    assert len(large) == 1 << 20
    assert pool.take(1) is None
    called: list[int] = []
    pool.when_free(lambda: called.append(1))
    pool.give(large)
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert called == [1]
    taken = [pool.take(5000) for _ in range(8)]
    assert all(buffer is not None and len(buffer) == 5000 for buffer in taken)
    assert pool.out_bytes == 64 << 10
    assert pool.take(1) is None
    for buffer in taken:
        assert buffer is not None
        assert address_of(buffer) % 4096 == 0
        pool.give(buffer)
    assert pool.out_bytes == 0
    huge = pool.take(4 * KEEP_BYTES)
    assert huge is not None
    pool.give(huge)
    with pytest.raises(TypeError):
        pool.give(memoryview(bytearray(10)))


def test_a_size_that_is_asked_for_now_is_kept_in_the_place_of_larger_ones(
    loop: asyncio.AbstractEventLoop,
) -> None:
    """Else one burst of large requests has each small one map its own memory from then on."""
    pool = BufferPool(loop, 4 * KEEP_BYTES)
    burst = [pool.take(1 << 20) for _ in range(KEEP_BYTES >> 20)]
    small = pool.take(4096)
    for buffer in [*burst, small]:
        assert buffer is not None
        pool.give(buffer)
    first = pool.take(4096)
    assert first is not None
    pool.give(first)
    again = pool.take(4096)
    assert again is not None
    assert address_of(again) == address_of(first)
    assert again.obj is first.obj


def burst(pool: BufferPool) -> None:
    """Take as many buffers of 1 MiB as a pool keeps, and give them back."""
    for buffer in [pool.take(1 << 20) for _ in range(KEEP_BYTES >> 20)]:
        assert buffer is not None
        pool.give(buffer)


def test_an_idle_pool_keeps_little_and_one_in_use_what_it_has() -> None:
    loop = SimLoop()
    pool = BufferPool(loop, 4 * KEEP_BYTES)
    for _ in range(2):
        burst(pool)
        for _ in range(5):
            loop.advance(IDLE_S / 2)
            assert pool.kept_bytes == KEEP_BYTES
            burst(pool)
        loop.advance(2 * IDLE_S)
        assert pool.kept_bytes <= IDLE_BYTES
