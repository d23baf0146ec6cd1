"""Fault cases of a volume attached with device-mapper; the numbers are those of tests/fault."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmctl.cli.main import main
from tests.vm.guest.disks import MIB, SECTOR, Disk, disks, drop_cache, sh
from tests.vm.guest.dmvolume import WAIT_S, DmVolume, helpers_of, wiring_of
from tests.vm.guest.erastack import direct
from tests.vm.guest.test_volume import VERIFY

FAR = 40 * MIB
SOON_S = 120.0  # the machine that emulates this one may be busy
# A table that changes all the time: small extents, few of them in the record, short eras.
RESTLESS = (
    *("--extent-size", "128KiB", "--block-size", "64KiB"),
    *("--record-limit", "8MiB", "--era-interval", "100ms"),
)
# Of volumes as small as these it would soon have everything in the record, and nothing would miss.
NO_PREDICTIONS = ("--predictor", "lru")


@dataclass(frozen=True, slots=True)
class Medium:
    """Any block device, as a medium of a volume."""

    path: str
    size_bytes: int

    @property
    def lower(self) -> str:
        return self.path


class Quick(DmVolume):
    """Its commands are carried out in this process: starting one takes seconds in the lab."""

    def dmctl(self, *words: str, status: int | None = 0, timeout_s: float = WAIT_S) -> str:
        del timeout_s
        said = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            for key in ("DMCTL_CONFIG_DIR", "DMCTL_RUN_DIR", "NO_COLOR"):
                patch.setenv(key, self.environment[key])
            outcome = main(words)
        if status is not None and outcome != status:
            raise AssertionError(f"dmctl {words}: {outcome}\n{said.getvalue()}\n{self.log()}")
        return said.getvalue()


@contextlib.contextmanager
def quick_volume(name: str, *options: str, size_bytes: int = 64 * MIB) -> Iterator[DmVolume]:
    sizes = [(f"{name}-p", size_bytes), (f"{name}-s", size_bytes), (f"{name}-r", 4 * MIB)]
    with (
        tempfile.TemporaryDirectory(prefix="dmv-") as folder,
        disks(*sizes) as media,
        over(name, Path(folder), media, *NO_PREDICTIONS, *options) as volume,
    ):
        yield volume


@contextlib.contextmanager
def over(
    name: str, folder: Path, media: Sequence[Disk | Medium], *options: str
) -> Iterator[DmVolume]:
    volume = Quick(name, folder, list(media))  # type: ignore[arg-type]
    try:
        volume.create(*options)
        volume.start()
        yield volume
    finally:
        volume.destroy()


class Kept:
    """A volume that several tests use one after the other, and a new one after one that failed."""

    def __init__(self, name: str, *options: str) -> None:
        self._name = name
        self._options = ("--initial-sync", "checksum", *options)
        self._stack = contextlib.ExitStack()
        self._volume: DmVolume | None = None

    def get(self) -> DmVolume:
        if self._volume is None or self._volume.status()["state"] != "in-sync":
            self.close()
            self._volume = self._stack.enter_context(quick_volume(self._name, *self._options))
            self._volume.wait_in_sync()
        return self._volume

    def close(self) -> None:
        self._volume = None
        self._stack.close()


@pytest.fixture(scope="module")
def _calm() -> Iterator[Kept]:
    with contextlib.closing(Kept("calm", "--era-interval", "500ms")) as kept:
        yield kept


@pytest.fixture(scope="module")
def _restless() -> Iterator[Kept]:
    with contextlib.closing(Kept("restless", *RESTLESS)) as kept:
        yield kept


@pytest.fixture
def volume(_calm: Kept) -> DmVolume:
    """One that is in sync, and is to be so afterwards."""
    return _calm.get()


@pytest.fixture
def restless(_restless: Kept) -> DmVolume:
    """The same, with a table that changes all the time."""
    return _restless.get()


def put(path: str, offset: int, letter: bytes = b"x") -> None:
    """A write of 4 KiB past the page cache, in which it would wait for others."""
    with direct(path) as to:
        to(offset, letter * 4096)  # type: ignore[operator]


def put_directly(volume: DmVolume, offset: int) -> None:
    """Write there until that does not pass the gate any more."""
    end_s = time.monotonic() + SOON_S
    while True:
        before = volume.status()["gate_writes_total"]
        put(volume.device, offset)
        if volume.status()["gate_writes_total"] == before:
            return
        assert time.monotonic() < end_s, volume.status()


class Writing(threading.Thread):
    """A write that may take long."""

    def __init__(self, volume: DmVolume, offset: int, letter: bytes = b"x") -> None:
        super().__init__(daemon=True)
        self._arguments = (volume.device, offset, letter)
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            put(*self._arguments)
        except OSError as error:
            self.error = error

    def finish(self) -> None:
        self.join(SOON_S)
        assert not self.is_alive(), sh("dmesg")[-3000:]
        assert self.error is None, self.error


@contextlib.contextmanager
def fio_at_work(
    volume: DmVolume, *options: str, finished: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """`finished`: wait for its end; otherwise it is ended."""
    words = ["fio", "--name=job", f"--filename={volume.device}", "--direct=1", "--rw=randwrite"]
    words += ["--ioengine=libaio", "--bs=4k", "--iodepth=8", *VERIFY, *(options or ("--loops=2",))]
    words += ["--thread"]  # not a process of its own, which would go on when this one has died
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            yield job
            if finished:
                output, _ = job.communicate(timeout=300)
                assert job.returncode == 0, output
        finally:
            job.send_signal(signal.SIGTERM if not finished else signal.SIGKILL)
            job.communicate(timeout=300)  # it is killed by a pipe that nobody reads


def layers(volume: DmVolume) -> list[str]:
    """What the kernel has of the volume."""
    names = sh("dmsetup", "ls").split()
    inner = volume.name.replace("-", "--")
    return [name for name in names if name == volume.name or name.startswith(f"dmctl-{inner}-")]


def holds(disk: Disk, offset: int) -> bytes:
    """The byte that a disk has there, whatever a page cache may say."""
    drop_cache(disk.lower)
    with open(disk.lower, "rb") as stream:
        stream.seek(offset)
        return stream.read(1)


def recorded(volume: DmVolume) -> set[int]:
    """The extents of the stored record, while it is in use."""
    content = json.loads(volume.dmctl("--json", "record", "dump", volume.record.path))
    return {e for first, count in content["extents"]["runs"] for e in range(first, first + count)}


def elsewhere(volume: DmVolume) -> int:
    """Offset of an extent that is not in the record, and none of its neighbours is."""
    taken = recorded(volume)
    extents = range(2, volume.size_bytes // MIB - 8)
    return next(e for e in extents if taken.isdisjoint(range(e - 2, e + 8))) * MIB


def equal(volume: DmVolume) -> None:
    volume.wait_in_sync()
    assert volume.is_equal()


def stopped_and_equal(volume: DmVolume) -> None:
    volume.wait_in_sync()
    volume.stop()
    assert volume.is_equal()


def await_cut(before: str) -> None:
    """Until the kernel has given its connection to bitmapd up: no answer came, or, where so much is
    written that the socket's buffer is full, nothing could be sent."""
    end_s = time.monotonic() + SOON_S
    while not re.search("timed out|Dead connection", sh("dmesg").removeprefix(before)):
        assert time.monotonic() < end_s, "the kernel waits for a gate that does not answer"
        time.sleep(0.2)  # a line of the kernel's log has no event


def test_case_02_a_primary_that_was_written_past_the_stopped_volume(volume: DmVolume) -> None:
    put(volume.device, 0)
    stopped_and_equal(volume)
    put(volume.primary.path, 0, b"y")
    said = volume.dmctl("start", volume.name, status=22)
    assert "was written while" in said
    assert layers(volume) == []
    volume.dmctl("start", volume.name, "--resync-all")
    equal(volume)
    assert holds(volume.secondary, 0) == b"y"


def test_case_07_a_record_that_is_missing(volume: DmVolume) -> None:
    put(volume.device, 0)
    volume.stop("--now")
    record = volume.record
    sh("dmsetup", "remove", "--noudevsync", record.name)
    sh("dmsetup", "mknodes")
    said = volume.dmctl("start", volume.name, status=10)
    assert record.path in said
    assert layers(volume) == []
    table = f"0 {record.size_bytes // SECTOR} linear {record.lower} 0"
    sh("dmsetup", "create", record.name, "--noudevsync", "--table", table)
    sh("dmsetup", "mknodes")
    volume.start()
    equal(volume)


def test_case_14_writes_that_the_primary_refuses(volume: DmVolume) -> None:
    put_directly(volume, 0)
    volume.wait_in_sync()
    before, far = volume.status(), elsewhere(volume)
    volume.primary.break_it()
    for offset in (0, far):
        with pytest.raises(OSError, match="Input/output error"):
            put(volume.device, offset, b"e")
    status = volume.status()
    assert status["gate_writes_total"] == before["gate_writes_total"] + 1
    assert status["primary_errors_total"] == before["primary_errors_total"] + 1
    assert "primary-error" in volume.dmctl("events", volume.name, "--now")
    # Its place is in the record: a crash in this moment would have it copied.
    assert far // MIB in recorded(volume)
    volume.primary.mend()
    for offset in (0, far):
        put(volume.device, offset, b"m")
    equal(volume)
    assert holds(volume.secondary, far) == b"m"


def test_case_15_a_record_that_does_not_answer(volume: DmVolume) -> None:
    """Misses wait, longer than the kernel waits for its server; hits do not."""
    put_directly(volume, 0)
    log, far = sh("dmesg"), elsewhere(volume)
    before = holds(volume.primary, far)
    letter = b"o" if before == b"m" else b"m"
    sh("dmsetup", "suspend", "--noflush", "--nolockfs", volume.record.name)
    try:
        miss = Writing(volume, far, letter)
        volume.until(lambda status: status["state"] == "degraded")
        put(volume.device, 0)
        await_cut(log)
        put(volume.device, 0)
        assert miss.is_alive()
        assert holds(volume.primary, far) == before
    finally:
        sh("dmsetup", "resume", "--noudevsync", volume.record.name)
    miss.finish()
    assert holds(volume.primary, far) == letter
    put(volume.device, far + 4 * MIB)
    volume.until(lambda status: status["state"] != "degraded")
    equal(volume)


def test_case_21_a_primary_that_shrank(volume: DmVolume) -> None:
    half = f"0 {volume.size_bytes // 2 // SECTOR} linear {volume.primary.lower} 0"
    volume.primary.load(half)
    assert "cannot shrink" in volume.dmctl("resize", volume.name, status=14)
    volume.primary.mend()
    put(volume.device, FAR)
    stopped_and_equal(volume)
    volume.primary.load(half)
    assert "has shrunk" in volume.dmctl("start", volume.name, status=1)
    assert layers(volume) == []
    volume.primary.mend()
    volume.start()
    equal(volume)


@pytest.mark.parametrize("has_grown", [False, True])
def test_case_22_a_gate_that_stands_still(volume: DmVolume, has_grown: bool) -> None:
    """Longer than the kernel waits for it; what it is late with never lands upon newer data.  The
    connection that comes after a growth is made anew as the first one is."""
    if has_grown:
        volume.size_bytes += 32 * MIB
        volume.primary.grow(volume.size_bytes)
        volume.secondary.grow(volume.size_bytes)
        volume.dmctl("resize", volume.name)
    put_directly(volume, 0)
    log, far, pid = sh("dmesg"), elsewhere(volume), volume.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        late = [Writing(volume, far + at * MIB, b"1") for at in range(4)]
        put(volume.device, 0, b"2")
        await_cut(log)
        assert all(write.is_alive() for write in late)
    finally:
        os.kill(pid, signal.SIGCONT)
    for at, write in enumerate(late):
        write.finish()
        put(volume.device, far + at * MIB, b"2")
    assert volume.pid == pid
    equal(volume)
    for at in range(4):
        assert holds(volume.secondary, far + at * MIB) == b"2"


def test_case_25_metadata_of_the_era_device_that_cannot_grow(volume: DmVolume) -> None:
    """An error is an error to the host, and nothing is lost; with memory again, writes go on."""
    put_directly(volume, 0)
    ram = sh("dmsetup", "table", f"dmctl-{volume.name}-era").split()[3]
    limit = Path("/sys/dev/block", ram, "mem_limit")
    written, refused = [], 0
    limit.write_text("4096")
    try:
        for block in random.Random(25).sample(range(1024), 200):
            try:
                put(volume.device, block * 64 * 1024, b"n")
                written.append(block)
            except OSError:
                refused += 1
    finally:
        limit.write_text("0")
    assert refused, "the limit was without effect"
    primary = volume.primary.read()
    assert all(primary[block * 64 * 1024] == ord("n") for block in written)
    volume.dmctl("stop", volume.name, "--now")
    volume.start()
    put(volume.device, FAR, b"m")
    equal(volume)


def test_case_26_modules_that_may_not_be_loaded(volume: DmVolume) -> None:
    forbidden = Path("/etc/modprobe.d/dmtest.conf")
    forbidden.parent.mkdir(exist_ok=True)
    volume.stop()
    rams = set(Path("/sys/block").glob("zram*"))
    for module in ("nbd", "dm_era"):
        sh("modprobe", "-r", module)
        forbidden.write_text(f"install {module} /bin/false\n")
        try:
            said = volume.dmctl("start", volume.name, status=None)
            assert "error:" in said
            assert module.replace("dm_", "") in said
            assert volume.status()["state"] == "stopped"
            assert layers(volume) == []
            assert set(Path("/sys/block").glob("zram*")) == rams
        finally:
            forbidden.unlink()
            sh("modprobe", module)
    volume.start()
    equal(volume)


# -- case 39: primaries of other kinds ------------------------------------------------------------
@contextlib.contextmanager
def mapped(name: str, table: str) -> Iterator[Medium]:
    sh("dmsetup", "create", name, "--noudevsync", "--table", table)
    sh("dmsetup", "mknodes", name)
    try:
        yield Medium(f"/dev/mapper/{name}", int(table.split()[1]) * SECTOR)
    finally:
        sh("dmsetup", "remove", "--noudevsync", "--retry", name)
        sh("dmsetup", "mknodes")


def crypt(one: Disk, other: Disk) -> str:
    del other
    return f"0 {one.size_bytes // SECTOR} crypt aes-xts-plain64 {'5a' * 64} 0 {one.path} 0"


def raid(one: Disk, other: Disk) -> str:
    sectors = one.size_bytes // SECTOR
    return f"0 {sectors} raid raid1 2 0 nosync 2 - {one.path} - {other.path}"


@pytest.mark.parametrize(("module", "table"), [("dm-crypt", crypt), ("dm-raid", raid)])
def test_case_39_a_primary_that_is_encrypted_or_mirrored(
    module: str, table: Callable[[Disk, Disk], str], tmp_path: Path
) -> None:
    sh("modprobe", module)
    sizes = [("one", 32 * MIB), ("other", 32 * MIB), ("s", 32 * MIB), ("r", 4 * MIB)]
    with (
        disks(*sizes) as (one, other, secondary, record),
        mapped("dmtest-primary", table(one, other)) as primary,
        over("vol0", tmp_path, [primary, secondary, record]) as volume,
    ):
        with fio_at_work(volume, "--size=8m", "--loops=1"):
            pass
        stopped_and_equal(volume)


def test_case_39_a_primary_that_cannot_be_written(volume: DmVolume) -> None:
    volume.stop()
    sh("blockdev", "--setro", volume.primary.path)
    try:
        assert "cannot be written" in volume.dmctl("start", volume.name, status=30)
        assert layers(volume) == []
    finally:
        sh("blockdev", "--setrw", volume.primary.path)
    volume.start()
    put(volume.device, 0)
    equal(volume)


# -- while the table changes all the time ----------------------------------------------------------
def test_case_19_programs_that_look_at_devices_during_swaps(restless: DmVolume) -> None:
    commands = [["dmsetup", "status"], ["dmsetup", "table"], ["dmsetup", "info", "-c"]]
    commands += [["lsblk", "-f"], ["blkid"], ["pvs", "-a"]]
    end = threading.Event()
    rounds = dict.fromkeys(range(len(commands)), 0)

    def look(which: int) -> None:
        while not end.is_set():
            # What they say of a device that is about to go is of no interest.
            subprocess.run(commands[which], capture_output=True, timeout=SOON_S, check=False)
            rounds[which] += 1

    loads = restless.status()["table_loads_total"]
    threads = [threading.Thread(target=look, args=(n,)) for n in range(len(commands))]
    for thread in threads:
        thread.start()
    try:
        with fio_at_work(restless, "--size=16m", "--loops=2"):
            pass
    finally:
        end.set()
        for thread in threads:
            thread.join(SOON_S)
    assert not any(thread.is_alive() for thread in threads)
    assert min(rounds.values()) > 2
    assert restless.status()["table_loads_total"] > loads + 5
    equal(restless)


def test_case_23_a_helper_that_is_killed_at_any_moment(restless: DmVolume) -> None:
    chance = random.Random(23)
    killed = 0
    with fio_at_work(restless, "--size=32m", "--loops=3") as job:
        while job.poll() is None and killed < 6:
            barriers = restless.status()["barriers_total"]
            restless.until(lambda status: status["barriers_total"] > barriers + 1)
            time.sleep(chance.random() * 0.2)  # anywhere between two barriers, or in one
            helpers = helpers_of(restless)  # none between the death of one and its successor
            if helpers:
                os.kill(chance.choice(helpers), signal.SIGKILL)
                killed += 1
    assert killed > 2
    put(restless.device, FAR)
    equal(restless)
    assert "helper-died" in restless.dmctl("events", restless.name, "--now")


@contextlib.contextmanager
def hung(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_case_03_and_23_nobody_waits_for_a_secondary_that_hangs(tmp_path: Path) -> None:
    """Not the writes that a helper has left held which was killed, and not 'stop --now'."""
    size = 16 * MIB
    socket, pid = tmp_path / "socket", tmp_path / "pid"
    sh("nbdkit", "--unix", str(socket), f"--pidfile={pid}", "memory", str(size))
    server = int(pid.read_text())
    secondary = Medium(f"nbd+unix:///?socket={socket}", size)
    with (
        disks(("hung-p", size), ("hung-r", 4 * MIB)) as (primary, record),
        over("hung", tmp_path, [primary, secondary, record], *NO_PREDICTIONS) as volume,
    ):
        put_directly(volume, 0)
        volume.wait_in_sync()
        with hung(server):
            put(volume.device, 0)
            volume.until(lambda status: status["dirty_bytes"] > 0)
            wiring = wiring_of(volume)
            os.kill(wiring, signal.SIGSTOP)  # before it can resume
            sh("dmsetup", "suspend", "--noflush", "--nolockfs", f"dmctl-{volume.name}-w")
            os.kill(wiring, signal.SIGKILL)
            Writing(volume, 0).finish()
            volume.stop("--now")
        assert layers(volume) == []
    os.kill(server, signal.SIGTERM)


def test_case_04_and_22_when_the_kernel_has_no_room_for_more(restless: DmVolume) -> None:
    """A suspend under way waits for what the kernel cannot send, since nobody answers."""
    chance = random.Random(4)
    flood = ("--bs=4k", "--size=40m", "--loops=1000", "--iodepth=512")
    with fio_at_work(restless, *flood, finished=False) as job:
        for turn in range(4):
            writes = restless.status()["writes_total"]
            restless.until(lambda status, so_far=writes: status["writes_total"] > so_far + 1000)
            time.sleep(chance.random() * 0.3)
            if turn % 2:
                restless.kill()
                restless.start()
            else:
                log = sh("dmesg")
                os.kill(restless.pid, signal.SIGSTOP)
                # What fio writes may all be direct by now, and then nothing waits for the gate.
                waiting = Writing(restless, (44 + 8 * turn) * MIB)
                try:
                    await_cut(log)
                finally:
                    os.kill(restless.pid, signal.SIGCONT)
                waiting.finish()
        writes = restless.status()["writes_total"]
        restless.until(lambda status: status["writes_total"] > writes + 1000)
        assert job.poll() is None
    equal(restless)


def test_case_25_does_not_come_by_itself(restless: DmVolume) -> None:
    """Metadata of the era device do not grow with time."""
    used = []
    for _ in range(2):
        eras = restless.status()["barriers_total"]
        with fio_at_work(restless, "--size=16m", "--loops=1"):
            pass
        restless.until(lambda status: status["barriers_total"] > eras + 5)
        used.append(metadata(restless))
    assert all(blocks < total / 4 for blocks, total in used), used
    restless.wait_in_sync()
    restless.stop()
    assert restless.is_equal()


def metadata(volume: DmVolume) -> tuple[int, int]:
    """Blocks of the era device's metadata that are used, and all of them."""
    words = sh("dmsetup", "status", f"dmctl-{volume.name}-era").split()
    used, total = words[4].split("/")
    return int(used), int(total)


def iostats(name: str) -> Path:
    number = os.stat(f"/dev/mapper/{name}").st_rdev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/iostats")


def test_counters_that_another_program_switches_off(volume: DmVolume) -> None:
    """Newer kernels than the lab's count nothing then; that it is seen and undone holds for all."""
    put_directly(volume, 0)
    equal(volume)
    for name in layers(volume):
        iostats(name).write_text("0")
    put(volume.device, 0, b"z")
    equal(volume)
    assert holds(volume.secondary, 0) == b"z"
    assert {iostats(name).read_text().strip() for name in layers(volume)} == {"1"}
    assert "counters-restored" in volume.dmctl("events", volume.name, "--now")
