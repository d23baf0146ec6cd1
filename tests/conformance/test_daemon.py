"""daemon: the life of the process, started as an administrator or a service manager starts it."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bitmapd import __version__, is_compiled
from bitmapd.control.client import ControlClient
from bitmapd.daemon import build_parser, main
from bitmapd.errors import BitmapdError, NoSpaceError, NotFoundError, UsageError
from bitmapd.record.geometry import KIB, MIB
from bitmapd.record.layout import SUPERBLOCK_OFFSETS, RecordFlag
from tests.support.local import LocalVolume
from tests.support.rawnbd import WRITE, RawNbd

WAIT_S = 60.0


class Process:
    """`bitmapd NAME --foreground`; killed at the end of the test."""

    def __init__(self, local: LocalVolume, **environment: str) -> None:
        self.local = local
        command = [sys.executable, "-P", "-m", "bitmapd.daemon", *arguments(local), "--foreground"]
        self._popen = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []

    @property
    def pid(self) -> int:
        return self._popen.pid

    def until(self, event: str) -> str:
        """Read the log up to the first line that tells of this event."""
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            self.log.append(line)
            if re.search(rf"(?<![-\w]){event}(?![-\w])", line):
                return line
        raise AssertionError(f"no {event} in:\n{''.join(self.log)}")

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def ended(self) -> int:
        _, rest = self._popen.communicate(timeout=WAIT_S)
        self.log.append(rest)
        return self._popen.returncode

    def call(self, verb: str, **args: Any) -> Any:
        with ControlClient(self.local.paths.control_socket(self.local.name), "vol0") as client:
            return client.call(verb, args, timeout_s=WAIT_S)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        if self._popen.stderr is not None:
            self._popen.stderr.close()


def arguments(local: LocalVolume) -> list[str]:
    paths = local.paths
    return [local.name, "--config-dir", str(paths.config_dir), "--run-dir", str(paths.run_dir)]


@pytest.fixture
def local(tmp_path: Path, short_path: Path) -> LocalVolume:
    return LocalVolume(tmp_path, short_path)


class Starter:
    """Starts processes, and ends those that are left."""

    def __init__(self) -> None:
        self.started: list[Process] = []

    def __call__(self, local: LocalVolume, **environment: str) -> Process:
        process = Process(local, **environment)
        self.started.append(process)
        return process


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for process in starter.started:
        process.kill()


def error_file(local: LocalVolume) -> dict[str, Any]:
    return dict(json.loads(local.paths.error_file(local.name).read_text()))


def write(local: LocalVolume, offset: int, data: bytes) -> None:
    with RawNbd(local.paths.nbd_socket(local.name), local.name) as host:
        host.call(WRITE, offset, len(data), data)


# -- the command line -------------------------------------------------------------------------


def test_arguments() -> None:
    found = build_parser().parse_args(["vol0", "--foreground", "--run-dir", "/r"])
    assert (found.name, found.foreground) == ("vol0", True)
    assert (found.config_dir, found.run_dir) == (None, "/r")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"bitmapd {__version__}\n"


# -- starts that fail -------------------------------------------------------------------------


def test_a_bad_configuration_is_told_to_whoever_typed_the_command(
    local: LocalVolume, capsys: pytest.CaptureFixture[str]
) -> None:
    with local.paths.volume_file("vol0").open("a") as stream:
        stream.write('era_intervall = "1s"\ncopy_rate = "fast"\n')
    assert main([*arguments(local), "--foreground"]) == UsageError.exit_status
    said = capsys.readouterr().err
    assert said.startswith("bitmapd: error: ")
    assert "era_intervall" in said
    assert "copy_rate" in said, "all mistakes at once"
    error = error_file(local)
    assert (error["code"], error["exit_status"]) == ("usage", 2)
    assert "era_intervall" in error["message"]


def test_a_volume_that_does_not_exist(
    local: LocalVolume, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vol9", *arguments(local)[1:]]
    assert main(command) == NotFoundError.exit_status
    assert "there is no volume 'vol9'" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_made(
    local: LocalVolume, capsys: pytest.CaptureFixture[str]
) -> None:
    file = local.paths.run_dir / "f"
    file.touch()
    command = [*arguments(local)[:3], "--run-dir", str(file / "run")]
    assert main(command) == NotFoundError.exit_status
    assert capsys.readouterr().err == f"bitmapd: error: {file}/run: Not a directory\n"


def test_a_second_instance_is_refused(local: LocalVolume, start: Starter) -> None:
    first = start(local)
    first.until("started")
    second = start(local)
    assert second.ended() == 12
    assert "'vol0'" in "".join(second.log)
    error = error_file(local)
    assert (error["code"], error["exit_status"]) == ("busy", 12)
    assert first.call("ping")["pid"] == first.pid, "the first one is not disturbed"
    write(local, 0, b"x" * 4096)


def test_a_start_that_fails_leaves_its_error_and_a_later_one_takes_it_away(
    local: LocalVolume, start: Starter
) -> None:
    os.truncate(local.primary, 7 * MIB)
    process = start(local)
    assert process.ended() == 1
    assert "it has shrunk" in error_file(local)["message"]
    assert "failed" in process.log[-1]
    os.truncate(local.primary, 8 * MIB)
    start(local).until("started")
    assert not local.paths.error_file("vol0").exists()


def test_a_control_socket_that_cannot_be_made_stops_the_volume_again(
    local: LocalVolume, start: Starter
) -> None:
    local.paths.control_socket("vol0").mkdir()
    process = start(local)
    assert process.ended() == 11
    assert error_file(local)["code"] == "exists"
    assert "stopped" in "".join(process.log)
    assert local.superblock.flags & RecordFlag.CLEAN, "and in order"


# -- a service --------------------------------------------------------------------------------


def test_the_service_manager_is_told_when_the_volume_can_be_used(
    local: LocalVolume, start: Starter
) -> None:
    address = local.paths.run_dir / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(WAIT_S)
        process = start(local, NOTIFY_SOCKET=str(address))
        assert manager.recv(100) == b"READY=1"
        write(local, 0, b"x" * 4096)
        assert process.call("ping")["state"] == "ready"
        process.send(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
    assert process.ended() == 0


def test_a_service_manager_that_is_gone_spoils_no_clean_stop(
    local: LocalVolume, start: Starter
) -> None:
    address = local.paths.run_dir / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(WAIT_S)
        process = start(local, NOTIFY_SOCKET=str(address))
        assert manager.recv(100) == b"READY=1"
    process.send(signal.SIGTERM)
    assert process.ended() == 0
    assert local.superblock.clean


def test_under_the_journal_lines_begin_with_a_level(local: LocalVolume, start: Starter) -> None:
    process = start(local, JOURNAL_STREAM="1:1")
    assert re.match(r"<\d>", process.until("started"))


def test_sigterm_leaves_the_rest_in_the_record(local: LocalVolume, start: Starter) -> None:
    process = start(local)
    process.until("started")
    process.call("pause")
    write(local, 5 * MIB, b"t" * 64 * KIB)
    process.send(signal.SIGTERM)
    assert process.ended() == 0
    assert 5 in local.recorded()
    assert local.differing() == {5}
    assert not local.paths.control_socket("vol0").exists()
    assert not local.paths.nbd_socket("vol0").exists()


def test_sigkill_loses_nothing_that_was_acknowledged(local: LocalVolume, start: Starter) -> None:
    process = start(local)
    process.until("started")
    process.call("pause")
    for extent in (1, 6):
        write(local, extent * MIB, b"k" * 64 * KIB)
    process.kill()
    assert local.differing() == {1, 6}
    recorded = local.recorded()
    assert recorded >= {1, 6}
    again = start(local)
    again.until("started")
    again.call("resume")
    again.call("wait", **{"for": "in-sync"})
    recovery = again.call("status")["last_recovery"]
    assert (recovery["reason"], recovery["bytes_total"]) == ("crash", len(recorded) * MIB)
    assert again.call("stop")["clean"] is True
    assert again.ended() == 0
    assert local.differing() == set()


def test_sighup_reads_the_configuration_again(local: LocalVolume, start: Starter) -> None:
    process = start(local)
    process.until("started")
    file = local.paths.volume_file("vol0")
    file.write_text(file.read_text() + 'record_limit = "300MiB"\n')
    process.send(signal.SIGHUP)
    process.until("settings-changed")
    assert process.call("status")["record_limit_bytes"] == 300 * MIB
    file.write_text(file.read_text() + "nonsense\n")
    process.send(signal.SIGHUP)
    assert "not TOML" in process.until("settings-refused")
    assert process.call("status")["record_limit_bytes"] == 300 * MIB


def test_what_cannot_be_taken_up_is_reported(local: LocalVolume, start: Starter) -> None:
    """An edited primary must not become the one that a resize measures."""
    file = local.paths.volume_file("vol0")
    text = file.read_text()
    process = start(local)
    process.until("started")
    file.write_text(text.replace(str(local.primary), f"{local.primary}2") + 'copy_rate = "1MiB"\n')
    process.send(signal.SIGHUP)
    assert "primary of the configuration: no effect" in process.until("settings-ignored")
    process.until("settings-changed")
    assert process.call("status")["primary"] == str(local.primary)
    process.call("stop")
    assert process.ended() == 0
    file.write_text(text + 'extent_size = "4MiB"\n')
    process = start(local)
    told = process.until("settings-ignored")
    assert "extent_size of the configuration: no effect" in told
    assert "created with extent_size = 1MiB" in told
    process.until("started")


def test_a_second_stop_hurries_the_first(local: LocalVolume, start: Starter) -> None:
    file = local.paths.volume_file("vol0")
    file.write_text(file.read_text() + 'copy_rate = "64KiB"\n')
    process = start(local)
    process.until("started")
    write(local, 0, b"h" * 8 * MIB)
    with ControlClient(local.paths.control_socket("vol0"), "vol0") as client:
        client.send("stop")
        answers = client.receive()
        assert answers, "progress is told while it copies"
        assert answers[0].fields["dirty_bytes"] > 0  # type: ignore[union-attr]
        process.send(signal.SIGTERM)
        assert process.ended() == 0
    assert local.recorded() >= local.differing() > set()


def test_a_stop_that_fails_ends_the_process_all_the_same(
    local: LocalVolume, start: Starter
) -> None:
    process = start(local)
    process.until("started")
    # The second superblock lies where this process may not write any more.
    limit = SUPERBLOCK_OFFSETS[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(NoSpaceError, match="cannot write"):
        process.call("stop")
    process.ended()
    assert "the stop failed" in "".join(process.log)
    assert local.recorded() == set()


# -- verbs ------------------------------------------------------------------------------------


def test_verbs(local: LocalVolume, start: Starter) -> None:
    process = start(local)
    process.until("started")
    said = process.call("ping")
    assert said.pop("compiled") is is_compiled()
    assert said == {"state": "ready", "pid": process.pid, "version": __version__}
    assert process.call("pause") == {"state": "paused"}
    assert process.call("resume") == {"state": "in-sync"}
    assert process.call("wait", **{"for": "in-sync"}) == {"state": "in-sync"}
    assert process.call("resync") == {"extents": 0, "state": "in-sync"}
    assert process.call("resync", checksum=True) == {"extents": 0, "state": "in-sync"}
    local.scribble(local.secondary, 2 * MIB)
    assert process.call("verify")["unexpected_bytes"] == 64 * KIB
    assert process.call("verify", repair=True)["repaired_bytes"] == 64 * KIB
    assert process.call("resize") == {"size_bytes": 8 * MIB, "changed": False}
    assert process.call("status")["name"] == "vol0"
    assert process.call("stop") == {"clean": True, "record_extents": 0, "paused": False}
    assert process.ended() == 0


def test_settings_are_changed_in_the_file_as_well(local: LocalVolume, start: Starter) -> None:
    process = start(local)
    process.until("started")
    answer = process.call("set", **{"copy-rate": "1MiB", "predictor": "lru"})
    assert answer == {"changed": ["copy_rate", "predictor"]}
    text = local.paths.volume_file("vol0").read_text()
    assert 'predictor = "lru"' in text
    assert "copy_rate" in text
    for changes in ({}, {"predictor": "nosuch"}, {"primary": "/elsewhere"}, {"nonsense": "1"}):
        with pytest.raises(UsageError):
            process.call("set", **changes)
    assert local.paths.volume_file("vol0").read_text() == text


def test_metrics_are_served_where_the_configuration_says(
    local: LocalVolume, start: Starter
) -> None:
    address = local.paths.run_dir / "metrics"
    file = local.paths.volume_file("vol0")
    file.write_text(file.read_text() + f'metrics_listen = "unix:{address}"\n')
    process = start(local)
    process.until("started")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_S)
        client.connect(str(address))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(65536), b""))
    assert b"bitmapd_" in text
    process.send(signal.SIGTERM)
    assert process.ended() == 0
    assert not address.exists()


# -- a daemon ---------------------------------------------------------------------------------


class Daemonised:
    """`bitmapd NAME` without `--foreground`, known by its pid file."""

    def __init__(self, local: LocalVolume) -> None:
        self.local = local
        command = [sys.executable, "-P", "-m", "bitmapd.daemon", *arguments(local)]
        subprocess.run(command, check=True, timeout=WAIT_S, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT_S
        while not self.answers():
            if time.monotonic() > deadline or local.paths.error_file("vol0").exists():
                raise AssertionError("the daemon does not come up")
            time.sleep(0.02)  # a daemon that has let go of its parent sends no event
        self.pid = int(local.paths.pid_file("vol0").read_text())
        self._pidfd = os.pidfd_open(self.pid)

    def answers(self) -> bool:
        with suppress(BitmapdError):
            return bool(self.call("ping"))
        return False

    def call(self, verb: str) -> Any:
        with ControlClient(self.local.paths.control_socket("vol0"), "vol0") as client:
            return client.call(verb, timeout_s=WAIT_S)

    def await_end(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        assert poll.poll(WAIT_S * 1000), "the daemon does not end"

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.await_end()
        os.close(self._pidfd)


@pytest.fixture
def daemonised(local: LocalVolume) -> Iterator[Daemonised]:
    daemon = Daemonised(local)
    yield daemon
    daemon.kill()


def test_a_daemon_has_a_pid_file_as_long_as_it_lives(daemonised: Daemonised) -> None:
    assert daemonised.call("ping")["pid"] == daemonised.pid
    assert os.getsid(daemonised.pid) != os.getsid(0), "it has let go of the terminal"
    assert daemonised.call("stop")["clean"] is True
    daemonised.await_end()
    assert not daemonised.local.paths.pid_file("vol0").exists()


def test_a_pid_file_that_was_left_behind_is_in_nobodys_way(local: LocalVolume) -> None:
    first = Daemonised(local)
    first.kill()
    assert local.paths.pid_file("vol0").exists()
    second = Daemonised(local)
    try:
        assert second.pid != first.pid
    finally:
        second.kill()


def test_a_second_daemon_leaves_the_first_one_its_pid_file(daemonised: Daemonised) -> None:
    local = daemonised.local
    command = [sys.executable, "-P", "-m", "bitmapd.daemon", *arguments(local)]
    second = subprocess.run(command, check=False, timeout=WAIT_S, capture_output=True, text=True)
    assert second.returncode == 12
    assert "is in use" in second.stderr
    assert error_file(local)["code"] == "busy"
    assert int(local.paths.pid_file("vol0").read_text()) == daemonised.pid
