"""Processes and media that never answer: every command ends, says who did not answer, and does what
can be done for the other volumes meanwhile."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.faulty import faulty_disk
from tests.support.volumes import DMCTL, MIB, Volume, make_file, noise, wait_gone

SIZE = 8 * MIB
OPTIONS = ["--initial-sync", "skip", "--era-interval", "100ms"]


@contextmanager
def started(folder: Path, *names: str) -> Iterator[list[Volume]]:
    with ExitStack() as stack:
        volumes = [Volume(folder, SIZE, name, options=OPTIONS) for name in names]
        for volume in volumes:
            stack.enter_context(volume)
            volume.create()
            volume.start()
        yield volumes


@contextmanager
def hung(*volumes: Volume) -> Iterator[None]:
    """They stand still, and go on afterwards, if they are still there."""
    pids = [volume.pid for volume in volumes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue


def begin(volume: Volume, *words: str) -> subprocess.Popen[str]:
    folders = ["--config-dir", str(volume.folder / "etc"), "--run-dir", str(volume.folder / "run")]
    return subprocess.Popen(
        [str(DMCTL), *folders, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_no_command_waits_for_ever_for_a_process_that_hangs(short_path: Path) -> None:
    with started(short_path, "a") as (volume,), hung(volume):
        commands = {
            words: begin(volume, *words)
            for words in (
                ("stop", "a"),
                ("stop", "a", "--now", "--timeout", "3s"),
                ("pause", "a"),
                ("resume", "a"),
                ("resync", "--all"),
                ("verify", "a", "--repair"),
                ("set", "a", "copy-rate=1MiB"),
                ("resize", "a"),
                ("wait", "a", "--for", "in-sync"),
                ("wait", "a", "--for", "stopped", "--timeout", "1s"),
                ("start", "a"),
                ("events", "--now"),
                ("events", "a", "--now"),
                ("remove", "a", "--yes"),
            )
        }
        for words, process in commands.items():
            status, _, err = end(process)
            assert status == 40, (words, err)
            assert "'a'" in err, words
            if words[:2] != ("wait", "a") or "stopped" not in words:
                assert "did not answer in time" in err, words
                assert "dmctl stop a --kill" in err, words


def test_one_that_hangs_holds_up_no_other(short_path: Path) -> None:
    """The volumes come in the order of their names, and the last is the one that answers."""
    with started(short_path, "a", "b", "c") as volumes, hung(*volumes[:2]):
        told = json.loads(volumes[0].dmctl("--json", "status"))["volumes"]
        assert [volume["state"] for volume in told] == ["failed", "failed", "in-sync"]
        events = begin(volumes[0], "events", "--now")
        resync = begin(volumes[0], "--json", "resync", "--all")
        status, out, err = end(events)
        assert status == 40
        assert {json.loads(line)["volume"] for line in out.splitlines()} == {"c"}
        assert "'a' did not answer" in err
        assert "'b' did not answer" in err
        status, out, _ = end(resync)
        assert status == 40
        rows = json.loads(out)["volumes"]
        assert [(row["name"], row["result"]) for row in rows] == [
            ("a", "failed"),
            ("b", "failed"),
            ("c", "done"),
        ]
        pid = volumes[2].pid
        stop = begin(volumes[0], "--json", "stop", "--all")
        wait_gone(pid)
        assert stop.poll() is None, "it waits for the two that hang"
        status, out, _ = end(stop)
        assert status == 40
        rows = json.loads(out)["volumes"]
        assert [row["error"] and row["error"]["code"] for row in rows] == [
            "time-out",
            "time-out",
            None,
        ]


# -- stop --kill --------------------------------------------------------------------------


def test_a_process_that_hangs_can_be_killed_and_nothing_is_lost(short_path: Path) -> None:
    with started(short_path, "a") as (volume,):
        volume.dmctl("pause", "a")
        volume.write(3 * MIB, noise(1, MIB))
        pid = volume.pid
        with hung(volume):
            answer = json.loads(volume.dmctl("--json", "stop", "a", "--kill", "--timeout", "3s"))
        (row,) = answer["volumes"]
        assert (row["result"], row["clean"], row["error"]) == ("killed", False, None)
        assert row["record_extents"] == len(volume.recorded())
        wait_gone(pid)
        assert volume.differing() == {3} <= volume.recorded()
        assert volume.status()["state"] == "stopped"
        volume.start()
        assert volume.status()["state"] == "paused"
        volume.dmctl("resume", "a")
        volume.wait_in_sync()
        volume.stop("--kill")
        assert volume.recorded() == set()
        assert volume.differing() == set()


def test_a_process_without_a_socket_is_no_stopped_volume(short_path: Path) -> None:
    """As one that hangs at its start, or when its socket was removed."""
    with started(short_path, "a") as (volume,):
        (short_path / "run" / "a.ctl").unlink()
        error = volume.refused("stop", "a")
        assert error["exit_status"] == 40
        assert f"process {volume.pid} holds the record" in error["message"]
        pid = volume.pid
        said = volume.dmctl_process("stop", "a", "--kill")
        assert said.returncode == 0
        assert f"process {pid} was killed" in said.stderr
        wait_gone(pid)
        assert "stopped already" in volume.dmctl_process("stop", "a").stderr


def test_only_the_process_that_holds_the_record_is_killed(short_path: Path) -> None:
    """Not one that listens in its place, or has got a number that a pid file names."""
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(9)\n"
        "record = open(sys.argv[2], 'rb')\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    with Volume(short_path, SIZE, "a", options=OPTIONS) as volume:
        volume.create()
        run_dir = short_path / "run"
        run_dir.mkdir(exist_ok=True)
        command = [sys.executable, "-c", code, str(run_dir / "a.ctl"), str(volume.record)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
            try:
                assert other.stdout is not None
                assert other.stdout.readline() == b"ready\n"
                (run_dir / "a.pid").write_text(str(other.pid))
                error = volume.refused("stop", "a", "--kill", "--timeout", "2s")
                assert error["exit_status"] == 1
                assert "no process of volume 'a' is found" in error["message"]
                pidfd = os.pidfd_open(other.pid)
                assert not select.select([pidfd], [], [], 0)[0], "it is alive"
                os.close(pidfd)
            finally:
                other.kill()


def test_idle_connections_and_waiting_commands_keep_nobody_out(short_path: Path) -> None:
    with started(short_path, "a") as (volume,), ExitStack() as stack:
        for number in range(70):
            stack.enter_context(volume.control())
            if number % 10 == 0:
                assert volume.ask("ping"), "those before it are accepted when it is answered"
        for _ in range(33):
            follower = stack.enter_context(volume.control())
            follower.send("events", now=False)
            follower.line()  # the first event, or that there are too many
        assert volume.status()["state"] == "in-sync"
        assert volume.refused("wait", "a", "--for", "in-sync")["exit_status"] == 12
        volume.stop()


# -- media that never answer ------------------------------------------------------------------


@contextmanager
def impatient(volume: Volume) -> Iterator[subprocess.Popen[str]]:
    """Its bitmapd in the foreground, which waits for media during a stop for a second only."""
    folders = ["--config-dir", str(volume.folder / "etc"), "--run-dir", str(volume.folder / "run")]
    code = "import bitmapd.daemon as d, bitmapd.process as p; p.STOP_TIMEOUT_S = 1.0;"
    code += " raise SystemExit(d.main())"
    command = [sys.executable, "-P", "-c", code, volume.name, "--foreground", *folders]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            volume.dmctl("wait", volume.name, "--for", "started", "--timeout", "60s")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("role", ["record", "secondary", "primary"])
def test_a_stop_ends_though_a_medium_never_answers(short_path: Path, role: str) -> None:
    """As by a crash: with the medium named, and what differs in the record."""
    backing = make_file(short_path / "backing", SIZE)
    with ExitStack() as stack:
        disk = stack.enter_context(faulty_disk(short_path / "faulty", backing))
        media: dict[str, Path | str] = {role: disk.path}
        volume = stack.enter_context(Volume(short_path, SIZE, "a", options=OPTIONS, media=media))
        volume.create()
        with impatient(volume) as process:
            volume.write(0, noise(1, MIB))
            volume.dmctl("set", "a", "era-interval=10min")
            volume.write(MIB, noise(2, 2 * MIB))
            with disk.hanging():
                error = volume.refused("stop", "a")
                assert error["exit_status"] == 40
                assert "bitmapd ends as by a crash" in error["message"]
                assert f"{role} {disk.path}" in error["message"]
            assert process.wait(60) == 40
            assert process.stderr is not None
            assert "bitmapd ends as by a crash" in process.stderr.read()
        assert volume.differing() <= volume.recorded()
        assert volume.status()["last_error"]["code"] == "time-out"
        volume.start()
        volume.wait_in_sync()
        volume.stop()
        assert volume.differing() == set()
