"""The barrier over a real dm-era: what it brings has landed, and nothing is missing."""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmctl.kernel.barrier import TAKE_SNAPSHOT
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.dm_wire import Target
from tests.vm.guest.disks import MIB, disks
from tests.vm.guest.erastack import (
    BLOCK,
    WRITE,
    Stack,
    blocks,
    clear_head,
    direct,
    stack,
    stack_over,
)

SOON_S = 20.0


def at_work(made: Stack) -> bool:
    found = made.mapper.device(WRITE)
    assert found is not None
    return not found.suspended and not found.has_inactive_table


def write(path: str, *numbers: int) -> None:
    with direct(path) as put:
        for block in numbers:
            put(block * BLOCK, b"w" * 4096)


def test_brings_what_was_written_and_nothing_else() -> None:
    with stack() as made:
        write(made.write, 3, 700, 701, 1023)
        first = made.barrier(None, 1, SOON_S)
        assert blocks(first.blocks) == {3, 700, 701, 1023}
        assert not first.skipped
        assert not first.widened
        write(made.write, 3)
        second = made.barrier(None, first.to_era + 1, SOON_S)
        assert blocks(second.blocks) == {3}
        assert second.to_era > first.to_era
        again = made.barrier(made.linear(), 1, SOON_S)
        assert blocks(again.blocks) == {3, 700, 701, 1023}


def test_skipped_when_nothing_was_written() -> None:
    with stack() as made:
        write(made.write, 5)
        first = made.barrier(None, 1, SOON_S)
        before = made.barrier.status().current_era
        empty = made.barrier(None, first.to_era + 1, SOON_S)
        assert not empty.skipped
        assert blocks(empty.blocks) == set()
        first, before = empty, made.barrier.status().current_era
        second = made.barrier(None, first.to_era + 1, SOON_S)
        assert second.skipped
        assert second.to_era == first.to_era
        assert made.barrier.status().current_era == before
        wanted = made.barrier(made.linear(), first.to_era + 1, SOON_S)
        assert not wanted.skipped
        assert blocks(wanted.blocks) == set()
        write(made.write, 6)
        assert blocks(made.barrier(None, wanted.to_era + 1, SOON_S).blocks) == {6}


def test_what_got_lost_on_its_way_is_brought_again() -> None:
    with stack() as made:
        write(made.write, 5)
        for _ in range(4):  # nobody has got the answer: the same era is asked for again
            lost = made.barrier(None, 1, SOON_S)
            assert not lost.skipped
            assert blocks(lost.blocks) == {5}
        # Two readings of barriers whose answers have arrived say that nothing is unknown.
        empty = made.barrier(None, lost.to_era + 1, SOON_S)
        assert blocks(empty.blocks) == set()
        assert made.barrier(None, empty.to_era + 1, SOON_S).skipped


def test_the_eras_of_a_helper_that_died_are_collected_by_the_next() -> None:
    with stack() as made:
        write(made.write, 1)
        made.mapper.message("dmtest-era", TAKE_SNAPSHOT)  # it died holding it
        write(made.write, 2)
        made.renew_barrier()
        assert blocks(made.barrier(None, 1, SOON_S).blocks) == {1, 2}
        assert made.barrier.status().held_root is None


def test_a_new_table_is_in_force_afterwards() -> None:
    with stack() as made:
        half = made.sectors // 2
        table = [
            Target(0, half, "linear", f"{made.era} 0"),
            Target(half, made.sectors - half, "linear", f"{made.lower} {half}"),
        ]
        made.barrier(table, 1, SOON_S)
        assert [t.first_sector for t in made.mapper.table(WRITE)] == [0, half]
        assert at_work(made)
        write(made.write, 1, 1000)
        assert blocks(made.barrier(None, 2, SOON_S).blocks) == {1}
        # And the one in force stays when none is named.
        assert len(made.mapper.table(WRITE)) == 2


def test_a_table_that_cannot_be_loaded_leaves_the_old_one() -> None:
    with stack() as made:
        write(made.write, 9)
        unknown = [Target(0, made.sectors, "linear", "/dev/there-is-none 0")]
        with pytest.raises(OSError, match="cannot load a table into 'dmtest-w'"):
            made.barrier(unknown, 1, SOON_S)
        assert at_work(made)
        # One that the kernel refuses only when it is put in force.
        beyond = [Target(0, made.sectors, "linear", f"{made.era} 8")]
        with pytest.raises(OSError, match="cannot hold the writes of 'dmtest-w'"):
            made.barrier(beyond, 1, SOON_S)
        assert at_work(made)
        assert made.barrier.status().held_root is None
        write(made.write, 10)
        assert blocks(made.barrier(None, 1, SOON_S).blocks) == {9, 10}


def test_a_deadline_that_passes_changes_nothing() -> None:
    """Fault case 38: a write that is in flight for long."""
    with stack(delay_ms=1500) as made:
        slow = threading.Thread(target=write, args=(made.write, 4))
        slow.start()
        await_in_flight(made)
        half = made.sectors // 2
        other = [
            Target(0, half, "linear", f"{made.era} 0"),
            Target(half, made.sectors - half, "linear", f"{made.era} {half}"),
        ]
        with pytest.raises(TimeoutError, match="in flight for longer than"):
            made.barrier(other, 1, 0.2)
        assert slow.is_alive()
        assert at_work(made)
        assert len(made.mapper.table(WRITE)) == 1
        assert made.barrier.status().held_root is None
        slow.join()
        write(made.write, 8)
        assert blocks(made.barrier(None, 1, SOON_S).blocks) == {4, 8}


def test_no_era_is_ended_while_half_of_the_metadata_are_in_use() -> None:
    """Fault case 25: dm-era fails writes when it runs out of room."""
    with disks(("lower", 64 * MIB), ("meta", 64 << 10)) as (lower, metadata):
        clear_head(metadata.path)
        with stack_over(lower.path, metadata.path, 64 * MIB) as made:
            write(made.write, 1)
            before = made.barrier.status()
            assert 2 * before.used_blocks >= before.total_blocks, "the metadata are too large"
            with pytest.raises(OSError, match="of 16 metadata blocks are in use") as caught:
                made.barrier(made.linear(), 1, SOON_S)
            assert caught.value.errno == errno.ENOBUFS
            assert made.barrier.status() == before
            assert at_work(made)


def test_marks_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(16 * MIB))
    with stack() as made:
        write(made.write, 1)
        made.renew_barrier(metadata=str(zeros))
        era = made.barrier.status().current_era
        found = made.barrier(made.linear(), 1, SOON_S)
        assert "checksum" in found.damage
        assert found.to_era == era
        assert made.barrier.status().held_root is None
        made.renew_barrier()
        assert blocks(made.barrier(None, 1, SOON_S).blocks) == {1}


def await_in_flight(made: Stack) -> None:
    """Nothing tells of the moment; the write under way is seen in the counters."""
    end_s = time.monotonic() + SOON_S
    path = f"/sys/block/{os.path.basename(made.write)}/inflight"
    while time.monotonic() < end_s:
        with open(path) as stream:
            if int(stream.read().split()[1]):
                return
        time.sleep(0.005)
    raise AssertionError("no write is in flight")


class Mirror:
    """Copies what barriers bring, as the copier does, from the disk under everything."""

    def __init__(self, made: Stack) -> None:
        self._fd = os.open(made.lower, os.O_RDONLY | os.O_DIRECT)
        self._memory = mmap.mmap(-1, BLOCK)
        self._count = made.sectors * 512 // BLOCK
        self.content = [self._read(block) for block in range(self._count)]

    def _read(self, block: int) -> bytes:
        os.preadv(self._fd, [self._memory], block * BLOCK)
        return bytes(self._memory)

    def copy(self, numbers: set[int]) -> None:
        for block in numbers:
            self.content[block] = self._read(block)

    def differing(self) -> list[int]:
        return [b for b in range(self._count) if self._read(b) != self.content[b]]

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def mirror(made: Stack) -> Iterator[Mirror]:
    copy = Mirror(made)
    try:
        yield copy
    finally:
        copy.close()


@contextlib.contextmanager
def writers(made: Stack, count: int, seed: int, hot_bytes: int) -> Iterator[Callable[[], int]]:
    """Random writes of 512 bytes to 128 KiB; a function that ends them and counts."""
    end = threading.Event()
    totals = [0] * count

    def run(which: int) -> None:
        chance = random.Random(seed * 100 + which)
        with direct(made.write) as put:
            while not end.is_set():
                length = chance.choice((512, 4096, 4096, 65536, 131072))
                room = hot_bytes if chance.random() < 0.7 else made.sectors * 512
                offset = chance.randrange((room - length) // 512) * 512
                totals[which] += 1
                text = b"%08d%08d" % (which, totals[which])
                put(offset, text * (length // len(text)))

    threads = [threading.Thread(target=run, args=(which,)) for which in range(count)]

    def stop() -> int:
        end.set()
        for thread in threads:
            thread.join()
        return sum(totals)

    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop()


def test_writes_in_flight_across_the_end_of_an_era_are_not_lost() -> None:
    """Fault case 38: every block is copied after all writes of its era have landed."""
    with stack(16 * MIB, delay_ms=40) as made, mirror(made) as copy:
        era = made.barrier(made.linear(), 1, SOON_S).to_era
        with writers(made, 16, seed=1, hot_bytes=4 * MIB) as stop:
            for turn in range(25):
                time.sleep(0.05)
                table = made.linear() if turn % 2 else None
                landed = made.barrier(table, era + 1, SOON_S)
                era = landed.to_era
                copy.copy(blocks(landed.blocks))
            assert stop() > 150
        copy.copy(blocks(made.barrier(made.linear(), era + 1, SOON_S).blocks))
        assert copy.differing() == []


def test_without_the_drain_writes_are_lost() -> None:
    """The test above can fail: this is what it would see."""
    with stack(8 * MIB, delay_ms=400) as made, mirror(made) as copy:
        slow = threading.Thread(target=write, args=(made.write, 7))
        slow.start()
        await_in_flight(made)
        made.barrier._drain = lambda hold_first, deadline_s: 0.0  # type: ignore[method-assign]
        landed = made.barrier(None, 1, SOON_S)
        assert blocks(landed.blocks) == {7}
        copy.copy({7})
        slow.join()
        assert blocks(made.barrier(None, landed.to_era + 1, SOON_S).blocks) == set()
        assert copy.differing() == [7]


def test_fio_verifies_through_new_tables() -> None:
    with stack(64 * MIB) as made:
        step = made.sectors // 64
        with subprocess.Popen(
            [
                *("fio", "--name=job", f"--filename={made.write}", "--rw=randwrite", "--bs=4k"),
                *("--ioengine=libaio", "--iodepth=16", "--direct=1", "--size=32m"),
                *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512", "--randseed=3"),
                "--verify_state_save=0",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as fio:
            era, swaps = 0, 0
            try:
                while fio.poll() is None:
                    table = [
                        Target(
                            at * step,
                            step,
                            "linear",
                            f"{(made.era, made.lower)[(at + swaps) % 2]} {at * step}",
                        )
                        for at in range(64)
                    ]
                    era = made.barrier(table, era + 1, SOON_S).to_era
                    swaps += 1
            finally:
                fio.kill()
            assert fio.stdout is not None
            assert fio.returncode == 0, fio.stdout.read()
        assert swaps > 5


def _barriers(ready: object, made: Stack, with_table: bool) -> None:
    made.mapper = DeviceMapper()
    made.renew_barrier()
    ready.set()  # type: ignore[attr-defined]
    while True:
        made.barrier(made.linear() if with_table else None, 1, SOON_S)


@pytest.mark.parametrize("with_table", [True, False])
def test_a_helper_killed_at_any_moment_stops_no_write(with_table: bool) -> None:
    """Fault case 23.  Without a new table the next helper has to resume the device first."""
    chance = random.Random(5)
    fork = multiprocessing.get_context("fork")
    with stack(16 * MIB, delay_ms=5) as made:
        for _ in range(10):
            ready = fork.Event()
            helper = fork.Process(target=_barriers, args=(ready, made, with_table))
            helper.start()
            with writers(made, 4, seed=chance.randrange(1000), hot_bytes=MIB):
                assert ready.wait(SOON_S)
                time.sleep(chance.random() * 0.2)
                assert helper.pid is not None
                os.kill(helper.pid, signal.SIGKILL)
                helper.join(SOON_S)
                if not with_table:
                    made.mapper.clear(WRITE)
                    made.mapper.resume(WRITE)
            assert helper.exitcode == -signal.SIGKILL
            found = made.mapper.device(WRITE)
            assert found is not None
            assert not found.suspended
        made.mapper.clear(WRITE)
        write(made.write, 2)
        made.renew_barrier()
        assert 2 in blocks(made.barrier(None, 1, SOON_S).blocks)


def test_who_asks_for_the_status_all_the_time_disturbs_nothing() -> None:
    """Fault case 19, the part that concerns a barrier."""
    with stack(16 * MIB, delay_ms=5) as made:
        command = "while :; do dmsetup status; dmsetup info; dmsetup table; done >/dev/null 2>&1"
        with subprocess.Popen(["sh", "-c", command], start_new_session=True) as monitor:
            try:
                with writers(made, 4, seed=2, hot_bytes=MIB):
                    era = 0
                    for _ in range(30):
                        era = made.barrier(made.linear(), era + 1, SOON_S).to_era
            finally:
                os.killpg(monitor.pid, signal.SIGKILL)
