"""The wiring helper, as bitmapd uses it, in a real kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.attach.helper import Wiring
from bitmapd.attach.helper_frames import HelperError, unpack_runs
from bitmapd.errors import WrongStateError
from bitmapd.media import blockstat
from dmctl.kernel import barrier, helper
from dmctl.kernel.dm_ioctl import DeviceMapper
from dmctl.kernel.execute import Dmsetup
from dmctl.kernel.selftest import selftest
from dmctl.model.stack import Goal, Volume, Wanted
from tests.vm.guest.disks import MIB, Disk, disks, sh
from tests.vm.guest.erastack import BLOCK, direct, queue
from tests.vm.guest.test_nbd_attach import Server, serving

SIZE = 32 * MIB
UUID = "fedcba9876543210" * 2
NAME = "help-me"
ERA, WRITE, TOP = "dmctl-help--me-era", "dmctl-help--me-w", "help-me"
HALF: list[tuple[int, int, str]] = [(0, SIZE // 2, "direct"), (SIZE // 2, SIZE, "gate")]
DIRECT: list[tuple[int, int, str]] = [(0, SIZE, "direct")]


class Volumes:
    """A primary, and helpers for a volume over it."""

    def __init__(self, primary: Disk) -> None:
        self.primary = primary
        self.events: list[dict[str, Any]] = []

    def hello(self) -> dict[str, Any]:
        return {
            "name": NAME,
            "uuid": UUID,
            "primary": os.path.realpath(self.primary.path),
            "size_bytes": SIZE,
            "logical_block_bytes": 512,
            "block_bytes": BLOCK,
        }

    def run(self, work: Callable[[Wiring], Awaitable[Any]]) -> Any:
        """With a helper of its own, which ends afterwards."""

        async def main() -> Any:
            def emit(event: str, **fields: Any) -> None:
                self.events.append({"event": event, **fields})

            wiring = Wiring(asyncio.get_running_loop(), self.hello(), emit)
            try:
                return await work(wiring)
            finally:
                wiring.close()

        return asyncio.run(main())


@pytest.fixture
def volumes() -> Iterator[Volumes]:
    with disks(("primary", SIZE)) as (primary,):
        try:
            yield Volumes(primary)
        finally:
            mapper = DeviceMapper()
            try:
                volume = Volume(NAME, UUID, primary.path, SIZE, 512, BLOCK)
                Dmsetup(mapper).reach(Wanted(volume, Goal.GONE))
            finally:
                mapper.close()


async def attach(
    wiring: Wiring, server: Server, segments: list[tuple[int, int, str]] = DIRECT
) -> dict[str, Any]:
    await wiring.call("build")
    await connect(wiring, server)
    return (await wiring.call("attach", {"segments": segments})).header


async def connect(wiring: Wiring, server: Server) -> dict[str, Any]:
    fields = {
        "size_bytes": SIZE,
        "logical_block_bytes": 512,
        "timeout_s": 10,
        "dead_conn_timeout_s": 1000,
    }
    sock = await asyncio.to_thread(server.connect)
    try:
        fields["flags"] = server.flags
        return (await wiring.call("connect", fields, fds=[sock.fileno()])).header
    finally:
        sock.close()


async def blocks(wiring: Wiring, **fields: Any) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    frame = await wiring.call(
        "barrier", {"segments": None, "deadline_s": 5.0, "lapses": 0, **fields}
    )
    return unpack_runs(frame.payload), frame.header


async def put(path: str, *numbers: int) -> None:
    def write() -> None:
        with direct(path) as to:
            for number in numbers:
                to(number * BLOCK, b"x" * 4096)

    await asyncio.to_thread(write)


def mapped() -> set[str]:
    return set(sh("dmsetup", "ls", "--noheadings").split()[::2]) if sh("dmsetup", "ls") else set()


@contextlib.contextmanager
def gate(folder: Path) -> Iterator[Server]:
    folder.mkdir(exist_ok=True)
    with (folder / "image").open("wb") as stream:
        stream.truncate(SIZE)
    with serving(folder) as server:
        yield server


def test_from_nothing_to_nothing(volumes: Volumes, tmp_path: Path) -> None:
    before = mapped()
    rams = set(Path("/sys/block").glob("zram*"))

    async def work(wiring: Wiring) -> None:
        built = (await wiring.call("build")).header
        assert wiring.observed["era"] is False
        assert built["era_device"] == f"/dev/mapper/{ERA}"
        assert built["adopted"] is False
        assert built["current_era"] >= 1
        assert built["mark_us"] > 0
        assert queue(f"/dev/mapper/{ERA}", "discard_max_bytes") <= BLOCK
        index = (await connect(wiring, server))["index"]
        assert queue(f"/dev/nbd{index}", "max_sectors_kb") == queue(
            volumes.primary.path, "max_sectors_kb"
        )
        made = (await wiring.call("attach", {"segments": HALF})).header
        assert made["write_device"] == WRITE
        assert made["top_device"] == TOP
        assert [tuple(segment) for segment in made["segments"]] == HALF
        assert mapped() - before == {ERA, WRITE, TOP}
        await put(f"/dev/mapper/{TOP}", 1, 2, 200, 500)
        runs, header = await blocks(wiring, since_era=built["current_era"])
        assert runs == [(1, 3), (200, 201)]
        assert header["skipped"] is False
        assert header["window_s"] > 0
        status = (await wiring.call("stat")).header
        assert status["write"]["writes"] >= 4
        assert status["era"]["written_bytes"] >= 3 * 4096
        assert 0 < status["metadata_used"] < status["metadata_total"]
        await wiring.call("close_top")
        assert TOP not in mapped()
        await wiring.call("detach")
        await wiring.call("detach")

    with gate(tmp_path / "gate") as server:
        volumes.run(work)
    assert mapped() == before
    assert set(Path("/sys/block").glob("zram*")) == rams
    assert volumes.events == []


def test_barriers_follow_one_another(volumes: Volumes, tmp_path: Path) -> None:
    async def work(wiring: Wiring) -> None:
        await attach(wiring, server)
        await put(f"/dev/mapper/{TOP}", 7)
        runs, first = await blocks(wiring, since_era=1)
        assert runs == [(7, 8)]
        runs, first = await blocks(wiring, since_era=first["collected_to_era"] + 1)
        assert runs == []
        assert first["skipped"] is False
        runs, second = await blocks(wiring, since_era=first["collected_to_era"] + 1)
        assert runs == []
        assert second["skipped"] is True
        assert second["collected_to_era"] == first["collected_to_era"]
        await put(f"/dev/mapper/{TOP}", 8, 400)
        since = second["collected_to_era"] + 1
        runs, third = await blocks(wiring, since_era=since, segments=HALF)
        assert runs == [(8, 9), (400, 401)]
        # From here on the upper half goes through the gate, which is no tracked device here.
        await put(f"/dev/mapper/{TOP}", 9, 401)
        runs, _ = await blocks(wiring, since_era=third["collected_to_era"] + 1)
        assert runs == [(9, 10)]

    with gate(tmp_path / "gate") as server:
        volumes.run(work)


def test_what_a_dead_helper_left_is_taken_over(volumes: Volumes, tmp_path: Path) -> None:
    """Fault case 23: it died, and the write device is suspended."""

    async def first(wiring: Wiring) -> None:
        await attach(wiring, server, HALF)
        await put(f"/dev/mapper/{TOP}", 3)
        assert wiring._process is not None
        os.kill(wiring._process.pid, signal.SIGKILL)
        sh("dmsetup", "message", ERA, "0", "take_metadata_snap")
        sh("dmsetup", "load", WRITE, "--table", f"0 {SIZE // 512} linear /dev/mapper/{ERA} 0")
        sh("dmsetup", "suspend", "--noflush", "--nolockfs", WRITE)
        with pytest.raises(HelperError, match="the wiring helper failed at 'stat'"):
            await wiring.call("stat")
        await wiring.call("stat")
        assert wiring.observed["top"] is True
        await put(f"/dev/mapper/{TOP}", 4)
        again = (await wiring.call("build")).header
        assert again["adopted"] is True
        # The table of the dead one was never in force.
        kept = (await wiring.call("attach", {"segments": DIRECT})).header["segments"]
        assert [tuple(segment) for segment in kept] == HALF
        runs, _ = await blocks(wiring, since_era=1)
        assert runs == [(3, 5)]

    with gate(tmp_path / "gate") as server:
        volumes.run(first)
    assert [event["event"] for event in volumes.events] == ["helper-died"]


def test_a_device_that_hosts_use_is_not_closed(volumes: Volumes, tmp_path: Path) -> None:
    async def work(wiring: Wiring) -> None:
        await attach(wiring, server)
        with open(f"/dev/mapper/{TOP}", "rb"):
            with pytest.raises(HelperError, match="in use") as refused:
                await wiring.call("close_top")
            assert refused.value.code == "EBUSY"
        await wiring.call("close_top")

    with gate(tmp_path / "gate") as server:
        volumes.run(work)


def test_a_new_gate_takes_over_the_device(volumes: Volumes, tmp_path: Path) -> None:
    async def first(wiring: Wiring) -> int:
        await attach(wiring, server, [(0, SIZE, "gate")])
        await put(f"/dev/mapper/{TOP}", 1)
        return int(str(wiring.observed["nbd"] or 0))

    async def second(wiring: Wiring) -> None:
        assert (await wiring.call("build")).header["adopted"] is True
        late = asyncio.create_task(put(f"/dev/mapper/{TOP}", 2))
        await connect(wiring, other)
        await late

    with gate(tmp_path / "gate") as server:
        volumes.run(first)
        server.kill()
        with serving(tmp_path / "gate") as other:
            volumes.run(second)


def test_one_helper_at_a_time(volumes: Volumes) -> None:
    async def work(wiring: Wiring) -> None:
        await wiring.call("build")
        assert wiring._process is not None
        pid = wiring._process.pid
        other = Wiring(asyncio.get_running_loop(), volumes.hello(), lambda *_, **__: None)
        waiting = asyncio.create_task(other.call("build"))
        try:
            done, _ = await asyncio.wait([waiting], timeout=1.0)
            assert not done
            os.kill(pid, signal.SIGKILL)
            assert (await waiting).header["adopted"] is True
        finally:
            other.close()

    volumes.run(work)


def test_it_needs_nothing_that_could_wait_for_the_volume(volumes: Volumes) -> None:
    async def work(wiring: Wiring) -> None:
        await wiring.call("build")
        assert wiring._process is not None
        folder = Path("/proc", str(wiring._process.pid))
        status = dict(
            line.split(":", 1)
            for line in (folder / "status").read_text().splitlines()
            if ":" in line
        )
        assert wiring.observed["warnings"] == []
        assert int(status["VmLck"].split()[0]) > 4096
        assert int((folder / "oom_score_adj").read_text()) == -1000
        assert int(status["Threads"]) == 1
        # PR_SET_IO_FLUSHER shows as PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE.
        flags = int((folder / "stat").read_text().rpartition(")")[2].split()[6])
        assert flags & 0x00080000
        assert flags & 0x00100000
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(wiring._process.pid, number)
        await wiring.call("stat")

    volumes.run(work)


def test_requests_that_make_no_sense_are_refused(volumes: Volumes) -> None:
    async def work(wiring: Wiring) -> None:
        for verb, fields, code in (
            ("dance", {}, "usage"),
            ("hello", {}, "wrong-state"),
            ("stat", {}, "wrong-state"),
            ("connect", {"timeout_s": "soon"}, "usage"),
            ("barrier", {"since_era": 1, "deadline_s": 1, "lapses": 0}, "wrong-state"),
            ("barrier", {"since_era": True, "deadline_s": 1, "lapses": 0}, "usage"),
            ("attach", {"segments": [[0, SIZE]]}, "usage"),
            ("attach", {"segments": DIRECT}, "wrong-state"),
        ):
            with pytest.raises(HelperError) as refused:
                await wiring.call(verb, fields)
            assert refused.value.code == code, (verb, refused.value)

    volumes.run(work)


def test_the_selftest_holds_on_this_kernel_and_leaves_nothing() -> None:
    sh("modprobe", "-a", "dm-mod", "dm-era", "zram")
    before, rams = mapped(), set(Path("/sys/block").glob("zram*"))
    mapper = DeviceMapper()
    try:
        mark_s = selftest(mapper, Dmsetup(mapper))
    finally:
        mapper.close()
    assert 0 < mark_s < 1
    assert mapped() == before
    assert set(Path("/sys/block").glob("zram*")) == rams


def _marks_nothing(since: int, written: Any, *, truth: Any = barrier.Barrier._collect) -> Any:
    blocks, era = truth(since, written)
    blocks.setall(0)
    return blocks, era


def _does_not_cut_discards(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("owner", "name", "lie", "fact"),
    [
        (barrier, "widen", lambda blocks: blocks, "of a discard of blocks 8 to 13"),
        (barrier.Barrier, "_collect", _marks_nothing, "of a write to block 3"),
        (Dmsetup, "limit_discard", _does_not_cut_discards, "discards of up to"),
        (
            blockstat.BlockStat,
            "read",
            lambda _: [0] * 17,
            "the counter of writes of a mapped device stands still",
        ),
    ],
)
def test_the_selftest_names_what_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, lie: Any, fact: str
) -> None:
    """A kernel that behaves otherwise, as seen through a reader that does."""
    sh("modprobe", "-a", "dm-mod", "dm-era", "zram")
    before = mapped()
    monkeypatch.setattr(owner, name, lie)
    mapper = DeviceMapper()
    try:
        with pytest.raises(WrongStateError, match=fact) as refused:
            selftest(mapper, Dmsetup(mapper))
    finally:
        mapper.close()
    assert os.uname().release in refused.value.message
    assert mapped() == before


def test_what_a_killed_selftest_left_is_removed() -> None:
    sh("modprobe", "-a", "dm-mod", "dm-era", "zram")
    before, rams = mapped(), set(Path("/sys/block").glob("zram*"))
    code = (
        "import os, signal; from dmctl.kernel import selftest as s;"
        "from dmctl.kernel.dm_ioctl import DeviceMapper; from dmctl.kernel.execute import Dmsetup;"
        "s._zeroes = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "m = DeviceMapper(); s.selftest(m, Dmsetup(m))"
    )
    done = subprocess.run([helper.sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(mapped() - before) == 2
    mapper = DeviceMapper()
    try:
        selftest(mapper, Dmsetup(mapper))
    finally:
        mapper.close()
    assert mapped() == before
    assert set(Path("/sys/block").glob("zram*")) == rams
