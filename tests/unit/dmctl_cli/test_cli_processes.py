"""Starting through systemd (a `systemctl` of ours on PATH), and processes one can hardly see."""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.config import unit_instance
from bitmapd.control.client import ControlClient
from bitmapd.errors import BitmapdError
from dmctl.cli import processes
from dmctl.cli.killing import stays_stopped
from tests.support.cli import Cli, control_thread, new_cli


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


@pytest.fixture
def systemd(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host where systemd runs; what `systemctl start` does is written into the file."""
    monkeypatch.setattr(processes, "SYSTEMD_RUNS", cli.folder)
    monkeypatch.setattr(processes, "DEFAULT_CONFIG_DIR", str(cli.paths.config_dir))
    monkeypatch.setattr(processes, "DEFAULT_RUN_DIR", str(cli.paths.run_dir))
    tools = cli.folder / "bin"
    tools.mkdir()
    begin = cli.folder / "begin"
    begin.write_text("exit 1\n")
    log = shlex.quote(str(cli.folder / "log"))
    (tools / "systemctl").write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = cat ] && exit 0\n. {shlex.quote(str(begin))}\n'
    )
    (tools / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return begin


def bitmapd(cli: Cli) -> str:
    words = [sys.executable, "-P", "-m", "bitmapd.daemon", "vol0"]
    words += ["--config-dir", str(cli.paths.config_dir), "--run-dir", str(cli.paths.run_dir)]
    return shlex.join(words)


def test_a_unit_that_is_installed_is_used(cli: Cli, systemd: Path) -> None:
    cli.create()
    systemd.write_text(f"{bitmapd(cli)}\n")
    cli.ok("start", "vol0")
    log = (cli.folder / "log").read_text()
    assert log == "cat bitmapd@vol0.service\nstart bitmapd@vol0.service\n"
    assert cli.status()["state"] != "stopped"


def test_a_unit_that_fails_shows_what_bitmapd_reported(cli: Cli, systemd: Path) -> None:
    cli.create()
    (cli.folder / "vol0.primary").unlink()
    systemd.write_text(f"{bitmapd(cli)} --foreground 2>/dev/null\nexit 1\n")
    outcome = cli.call("start", "vol0")
    assert outcome.status == 10, outcome
    assert "vol0.primary" in outcome.err


def test_a_unit_that_fails_by_itself(cli: Cli, systemd: Path) -> None:
    cli.create()
    systemd.write_text("echo 'Failed to start: masked' >&2\nexit 1\n")
    outcome = cli.call("start", "vol0")
    assert outcome.status == 1
    assert "Failed to start: masked" in outcome.err
    assert "journalctl -u bitmapd@vol0" in outcome.err


def test_a_unit_that_takes_too_long(cli: Cli, systemd: Path) -> None:
    cli.create()
    systemd.write_text("exec sleep 30\n")
    assert cli.call("start", "vol0", "--timeout", "200ms").status == 40


def test_without_the_unit_bitmapd_is_started_directly(cli: Cli, systemd: Path) -> None:
    tool = systemd.parent / "bin/systemctl"
    tool.write_text(tool.read_text().replace("exit 0", "exit 1"))
    cli.create()
    cli.ok("start", "vol0")
    assert "start" not in (cli.folder / "log").read_text()


def test_a_unit_whose_process_was_killed_is_stopped_under_its_own_name(
    cli: Cli, systemd: Path
) -> None:
    """Else systemd would start it again; the names of units allow less than those of volumes."""
    systemd.write_text("exit 0\n")
    stays_stopped(cli.paths, "a+b")
    asked = (cli.folder / "log").read_text().splitlines()
    assert asked[-1] == f"stop --no-block bitmapd@{unit_instance('a+b')}.service"
    assert "+" not in asked[-1]


def test_a_systemd_that_does_not_answer(
    cli: Cli, systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SYSTEMCTL_TIMEOUT_S", 0.2)
    tool = systemd.parent / "bin/systemctl"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    cli.create()
    outcome = cli.call("start", "vol0")
    assert outcome.status == 40
    assert "'systemctl cat bitmapd@vol0.service' did not end in time" in outcome.err


def test_a_unit_serves_the_default_folders_only(
    cli: Cli, systemd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "DEFAULT_RUN_DIR", "/elsewhere")
    cli.create()
    cli.ok("start", "vol0")
    assert not (cli.folder / "log").exists()


def test_a_daemon_that_dies_before_it_is_ready(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it starts: there is a pid file, and no error file will ever come."""
    cli.create()
    script = cli.folder / "python"
    pid_file = shlex.quote(str(cli.paths.pid_file("vol0")))
    script.write_text(f"#!/bin/sh\nsleep 0.3 >/dev/null 2>&1 &\necho $! > {pid_file}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(script))
    monkeypatch.setattr(processes, "SILENT_S", 60.0)
    outcome = cli.call("start", "vol0")
    assert outcome.status == 1
    assert "ended without saying why" in outcome.err


def test_a_bitmapd_that_does_not_become_a_daemon(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.create()
    script = cli.folder / "python"
    script.write_text("#!/bin/sh\nexec sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    assert cli.call("start", "vol0", "--timeout", "200ms").status == 40


def test_a_stale_pid_file_deceives_nobody(cli: Cli) -> None:
    cli.create()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    cli.paths.pid_file("vol0").write_text(f"{gone.pid}\n")
    cli.ok("start", "vol0")
    assert cli.pid() != gone.pid


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000], ids=["list", "cut", "deep"])
def test_an_error_file_of_somebody_else_is_not_an_error(cli: Cli, content: str) -> None:
    cli.create()
    cli.paths.error_file("vol0").write_text(content)
    assert cli.status()["last_error"] is None


def test_status_says_when_it_was_that_something_failed(cli: Cli) -> None:
    cli.create()
    file = cli.paths.error_file("vol0")
    file.write_text(json.dumps({"code": "io-error", "message": "a disk is gone"}))
    os.utime(file, (1_772_359_200, 1_772_359_200))
    last = "vol0: last error, 2026-03-01T10:00:00.000+00:00: a disk is gone"
    assert last in cli.ok("status").err.splitlines()


def test_where_the_process_cannot_be_seen_the_end_of_the_connection_counts(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "peer_credentials", lambda _sock: (0, 0))
    path = cli.paths.control_socket("vol0")
    with control_thread(path, {}):
        client = ControlClient(path, "vol0")
        watched = processes.Watched(client)
        assert watched.wait(0.05) is False
    assert watched.wait(10) is True
    watched.close()
    client.close()


def test_a_second_lock_waits_for_the_first(cli: Cli) -> None:
    with processes.start_lock(cli.paths, "vol0") as path:
        again = cli.popen("start", "vol0")
        probe = subprocess.run(["flock", "--nonblock", str(path), "true"], check=False)
        assert probe.returncode == 1
        assert again.poll() is None or again.returncode == 10
    with again:
        assert again.wait(30) == 10


def test_a_socket_that_answers_nonsense_is_an_error(cli: Cli) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(cli.paths.control_socket("vol0")))
        server.listen(1)
        with ControlClient(cli.paths.control_socket("vol0"), "vol0") as client:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"hello\n")
                with pytest.raises(BitmapdError, match="not JSON"):
                    client.call("ping")
