"""requestlog: what hosts change, recorded beside the volume and read by the simulator."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from bitmapd import daemon
from bitmapd.config import changed, load_volume
from bitmapd.errors import ExistsError, UsageError
from bitmapd.media.waiting import completion
from bitmapd.record.geometry import KIB
from bitmapd.volume.requestlog import (
    BATCH_REQUESTS,
    BATCHES,
    HEADER,
    Recording,
    RequestLog,
    check_log,
    open_log,
)
from dmctl.simulate.files import load_trace
from tests.support.cli import Cli, new_cli
from tests.support.local import LocalVolume
from tests.support.serving import process_of, run, serving


def no_error(error: OSError) -> None:
    raise AssertionError(f"the log failed: {error}")


def test_requests_are_written_as_the_simulator_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "log"
    log = RequestLog(file, 1000.0, no_error)
    log.note(1.0, "W", 4096, 512)
    log.note(1.5, "Z", 0, 8192)
    log.close()
    log = RequestLog(file, 1000.0, no_error)
    log.note(4.25, "T", 65536, 4096)
    log.close()
    lines = file.read_text().splitlines()
    assert lines == [
        "time_s,op,offset_bytes,length_bytes",
        "1001.000000,W,4096,512",
        "1001.500000,Z,0,8192",
        "1004.250000,T,65536,4096",
    ]
    trace = load_trace(file)
    assert list(trace.time_s) == [0.0, 0.5, 3.25]
    assert list(trace.end_byte) == [4608, 8192, 69632]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_not_a_new_or_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        check_log("/dev/null")
    with pytest.raises(FileNotFoundError):
        check_log(tmp_path / "nowhere" / "log")
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        open_log(tmp_path / "link")
    check_log(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("content", [b"uuid = 1\n", bytes(4096), HEADER[:-1]])
def test_a_file_that_holds_something_else_is_refused_and_kept(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "primary"
    file.write_bytes(content)
    with pytest.raises(ExistsError, match="primary exists and is not a log of requests"):
        check_log(file)
    assert file.read_bytes() == content


def test_a_full_batch_is_handed_over_at_once(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", 0.0, no_error)
    for i in range(BATCH_REQUESTS):
        log.note(float(i), "W", i * 512, 512)
    assert not log._entries
    log.flush()
    log.close()
    assert len((tmp_path / "log").read_text().splitlines()) == 1 + BATCH_REQUESTS


class Stuck(RequestLog):
    """Its file hangs until it is let go."""

    def __init__(self, path: Path) -> None:
        self.go = threading.Event()
        super().__init__(path, 0.0, no_error)

    def _write(self, text: bytes) -> None:
        self.go.wait()
        super()._write(text)


def test_what_the_file_cannot_take_is_dropped_and_counted(tmp_path: Path) -> None:
    log = Stuck(tmp_path / "log")
    total = (BATCHES + 8) * BATCH_REQUESTS
    for i in range(total):  # nobody waits for the file
        log.note(float(i), "W", i * 512, 512)
    assert 0 < log.dropped <= 8 * BATCH_REQUESTS
    assert log._queue.qsize() <= BATCHES
    log.go.set()
    while log._queue.qsize():
        os.sched_yield()
    log.note(1e6, "W", 0, 512)
    log.close()
    text = (tmp_path / "log").read_text()
    assert f"# {log.dropped} requests were not recorded\n1000000.000000,W" in text
    assert len(load_trace(tmp_path / "log")) == total - log.dropped + 1


def test_the_first_error_ends_the_log(tmp_path: Path) -> None:
    errors: list[OSError] = []

    class Full(RequestLog):
        def _write(self, text: bytes) -> None:
            if text != HEADER:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = Full(tmp_path / "log", 0.0, errors.append)
    log.note(1.0, "W", 0, 512)
    log.close()
    assert [error.errno for error in errors] == [errno.ENOSPC]
    assert not log._thread.is_alive()


# -- with a volume ------------------------------------------------------------------------
def test_a_volume_records_what_hosts_change(local: LocalVolume, tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    local.config = dataclasses.replace(local.config, trace=str(first))

    async def test() -> None:
        async with serving(local) as served:
            volume = served.volume
            await served.write(64 * KIB, b"a" * 4096)
            volume.reconfigure(volume.config)  # goes on
            await completion(lambda done: volume.gate.zero(0, 8192, done))
            await completion(lambda done: volume.gate.trim(128 * KIB, 4096, done))
            volume.reconfigure(changed(volume.config, {"trace": str(second)}))
            await served.write(0, b"b" * 512)
            volume.reconfigure(changed(volume.config, {"trace": "none"}))
            assert volume.gate.watch is None
            await served.write(0, b"c" * 512)

    run(test())
    lines = [line.split(",") for line in first.read_text().splitlines()[1:]]
    assert [line[1:] for line in lines] == [
        ["W", "65536", "4096"],
        ["Z", "0", "8192"],
        ["T", "131072", "4096"],
    ]
    assert abs(float(lines[0][0]) - time.time()) < 3600
    assert len(second.read_text().splitlines()) == 2


def test_a_log_that_cannot_be_begun_keeps_nobody_from_working(
    local: LocalVolume, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere" / "log")
    local.config = dataclasses.replace(local.config, trace=nowhere)

    async def test() -> None:
        async with serving(local) as served:
            (event,) = served.named("trace-error")
            assert event["file"] == nowhere
            assert "No such file" in event["message"]
            await served.write(0, b"a" * 512)
            served.volume.reconfigure(changed(served.volume.config, {"trace": "/dev/null"}))
            assert "not a regular file" in served.named("trace-error")[1]["message"]

    run(test())


def test_what_is_set_while_a_file_is_looked_at_stays(
    local: LocalVolume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(local) as served:
            process = process_of(local.paths, served.volume)
            loop, progress = asyncio.get_running_loop(), AsyncMock()

            def look(_path: str) -> None:
                other = process._set({"copy-rate": "1MiB"}, progress)
                asyncio.run_coroutine_threadsafe(other, loop).result()

            monkeypatch.setattr(daemon, "check_log", look)
            await process._set({"trace": str(tmp_path / "log")}, progress)
            config = served.volume.config
            assert (config.trace, config.copy_rate_bytes_per_s) == (str(tmp_path / "log"), 1 << 20)
            assert load_volume(local.paths, "vol0") == config

    run(test())


def test_an_error_of_the_file_is_told_and_ends_the_recording(tmp_path: Path) -> None:
    class Gate:
        watch: object = None

    events: list[dict[str, object]] = []
    told = asyncio.Event()

    def emit(event: str, **fields: object) -> None:
        events.append({"event": event, **fields})
        told.set()

    async def test() -> None:
        gate = Gate()
        recording = Recording(gate, asyncio.get_running_loop(), emit)  # type: ignore[arg-type]
        assert recording.dropped == 0
        recording.flush()
        file = str(tmp_path / "log")
        recording.record_to(file)
        log = recording._log
        assert log is not None
        assert recording.dropped == 0
        os.dup2(os.open("/dev/full", os.O_WRONLY), log._fd)
        log.note(1.0, "W", 0, 512)
        recording.flush()
        await told.wait()
        assert events[0]["file"] == file
        assert gate.watch is None
        assert recording._log is None
        recording._ended(file, OSError(errno.EIO, "late"))  # of a log that is over
        recording.close()

    run(test())
    assert len(events) == 2


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def test_recording_is_begun_and_ended_by_command(cli: Cli) -> None:
    cli.create()
    cli.ok("start", "vol0")
    file = cli.folder / "requests.csv"
    cli.ok("set", "vol0", f"trace={file}")
    assert file.exists()
    assert f'trace = "{file}"' in cli.paths.volume_file("vol0").read_text()
    wrong = cli.call("set", "vol0", f"trace={cli.folder}/nowhere/log")
    assert wrong.status == 10
    assert "nowhere/log: No such file" in wrong.err
    assert f'trace = "{file}"' in cli.paths.volume_file("vol0").read_text()
    assert cli.call("set", "vol0", "trace=/dev/null").status == 2
    cli.ok("set", "vol0", "trace=")
    assert 'trace = "none"' in cli.paths.volume_file("vol0").read_text()
    cli.ok("stop", "vol0")
    assert file.read_bytes() == HEADER
