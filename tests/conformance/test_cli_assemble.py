"""assemble, monitor, probe and udev-rules, with media that are files.

That devices come and go under a real udevd is tested in the guest (tests/vm/guest/test_boot.py).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitmapd.record import tool
from dmctl.cli.media import present
from tests.support.cli import TIMEOUT_S, Cli, new_cli
from tests.support.loops import loop_device, sparse_file

MEDIA = ("primary", "secondary", "record")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def away(cli: Cli, role: str, name: str = "vol0") -> None:
    (cli.folder / f"{name}.{role}").rename(cli.folder / f"{name}.{role}.away")


def back(cli: Cli, role: str, name: str = "vol0") -> None:
    (cli.folder / f"{name}.{role}.away").rename(cli.folder / f"{name}.{role}")


# -- assemble ---------------------------------------------------------------------------------


def test_a_volume_starts_when_its_media_are_there(cli: Cli) -> None:
    cli.create()
    for role in ("primary", "record"):
        away(cli, role)
    outcome = cli.ok("assemble", "vol0")
    primary, record = cli.folder / "vol0.primary", cli.folder / "vol0.record"
    assert outcome.err == f"volume 'vol0' waits for its primary {primary} and its record {record}\n"
    back(cli, "primary")
    (row,) = cli.ok("--json", "assemble", "vol0").json["volumes"]
    assert row == {
        "name": "vol0",
        "result": "waiting",
        "missing": [{"role": "record", "path": str(record)}],
        "error": None,
    }
    assert not cli.paths.control_socket("vol0").exists()
    back(cli, "record")
    assert cli.ok("assemble", "vol0").err == "volume 'vol0' is started\n"
    assert cli.ok("assemble", "vol0").err == "volume 'vol0' runs already\n"
    assert cli.status()["state"] != "stopped"


def test_without_its_secondary_only_when_told_to(cli: Cli) -> None:
    cli.create()
    away(cli, "secondary")
    assert cli.ok("assemble", "vol0").err.endswith("; --degraded starts it without\n")
    outcome = cli.ok("assemble", "vol0", "--degraded")
    path = cli.folder / "vol0.secondary"
    assert outcome.err == f"volume 'vol0' is started without its secondary {path}\n"
    assert cli.status()["state"] == "link-down"


def test_a_missing_record_is_not_overcome(cli: Cli) -> None:
    cli.create()
    away(cli, "record")
    assert "waits for its record" in cli.ok("assemble", "vol0", "--degraded").err


def test_all_are_those_that_are_to_be_started(cli: Cli) -> None:
    cli.create("one")
    cli.create("two")
    with cli.paths.volume_file("two").open("a") as stream:
        stream.write("start_at_boot = false\n")
    rows = cli.ok("--json", "assemble", "--all").json["volumes"]
    assert [row["result"] for row in rows] == ["started", "not wanted"]
    # The one that has to be named may be.
    assert "is started" in cli.ok("assemble", "two").err


def test_an_error_of_one_does_not_keep_the_others_down(cli: Cli) -> None:
    cli.create("one")
    cli.create("two")
    sparse_file(cli.folder / "one.record", 1 << 20)
    outcome = cli.call("assemble", "--all")
    assert outcome.status == 10
    assert "cannot assemble 'one'" in outcome.err
    assert cli.status("two")["state"] != "stopped"


def test_what_is_present(tmp_path: Path) -> None:
    assert not present(str(tmp_path))
    assert not present(str(tmp_path / "x"))
    assert not present("/dev/null")
    assert not present("a\0b")
    image = sparse_file(tmp_path / "x", 1 << 20)
    assert present(str(image))
    with loop_device(image) as name:
        assert present(name)
    assert not present(name)  # the node stays, without a size


# -- assemble --wait and monitor --------------------------------------------------------------


class Waiter:
    """A process whose events are read line by line; SIGHUP has it look again."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._rest = b""

    def line(self, *words: str) -> str:
        """The next line, which has to hold these words."""
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        end_s = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._rest:
            ready, _, _ = select.select([fd], [], [], max(0.0, end_s - time.monotonic()))
            data = os.read(fd, 4096) if ready else b""
            assert data, f"nothing with {words}: {self._rest!r}"
            self._rest += data
        raw, _, self._rest = self._rest.partition(b"\n")
        line = raw.decode()
        assert all(word in line for word in words), line
        return line

    def look(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def ended(self) -> int:
        return self.process.wait(TIMEOUT_S)


@contextmanager
def waiter(cli: Cli, *words: str) -> Iterator[Waiter]:
    with cli.popen(*words) as process:
        try:
            yield Waiter(process)
        finally:
            process.kill()


def test_waiting_until_a_volume_is_up(cli: Cli) -> None:
    cli.create()
    away(cli, "record")
    away(cli, "secondary")
    with waiter(cli, "assemble", "vol0", "--wait") as waiting:
        waiting.line("vol0: waiting", f"record={cli.folder}/vol0.record", "secondary=")
        back(cli, "secondary")
        waiting.look()
        assert "secondary" not in waiting.line("vol0: waiting", "record=")
        back(cli, "record")
        waiting.look()
        waiting.line("vol0: assembled")
        assert waiting.ended() == 0
    assert cli.status()["state"] != "stopped"


def test_waiting_ends_with_an_error_that_cannot_be_waited_out(cli: Cli) -> None:
    cli.create()
    sparse_file(cli.folder / "vol0.record", 1 << 20)
    with waiter(cli, "assemble", "vol0", "--wait") as waiting:
        waiting.line("not-assembled", "code=not-found", "no record here")
        waiting.line("dmctl: error: ")
        assert waiting.ended() == 10
    with waiter(cli, "assemble", "nobody", "--wait") as waiting:
        waiting.line("there is no volume 'nobody'")
        assert waiting.ended() == 10


def test_waiting_can_be_called_off(cli: Cli) -> None:
    cli.create()
    away(cli, "record")
    with waiter(cli, "assemble", "vol0", "--wait") as waiting:
        waiting.line("waiting")
        waiting.process.terminate()
        assert waiting.ended() == 0


def test_a_start_that_failed_for_a_while_is_tried_again(cli: Cli) -> None:
    cli.create()
    with waiter(cli, "assemble", "vol0", "--wait") as waiting:
        with tool.RecordMedium.open(cli.folder / "vol0.record") as medium:
            medium.lock()  # somebody else uses it
            waiting.line("not-assembled", "code=busy", "again_in_s=1")
        waiting.line("vol0: assembled")
        assert waiting.ended() == 0


def test_the_monitor_starts_what_was_there_and_leaves_what_is_made_later(cli: Cli) -> None:
    cli.create("one")
    with waiter(cli, "monitor", "--patience", "100ms") as monitor:
        monitor.line("one: assembled")
        cli.create("two")
        cli.create("three")
        away(cli, "primary", "three")
        cli.paths.volume_file("two").with_name("bad.toml").write_text("x")
        monitor.look()
        monitor.line("bad: not-assembled", "code=usage")
        monitor.line("three: waiting")
        away(cli, "secondary", "three")
        back(cli, "primary", "three")
        monitor.look()
        monitor.line("three: waiting", "secondary=")
        monitor.line("three: assembled", "without_secondary=")
        assert cli.status("two")["state"] == "stopped"
        cli.ok("stop", "one", "--now")
        cli.ok("remove", "one", "--yes")
        monitor.look()
        cli.kill("three")
        monitor.line("three: died", "again_in_s=1")
        monitor.line("three: assembled")
        refused = cli.call("monitor")
        assert refused.status == 12
        assert "another 'dmctl monitor' runs" in refused.err
        monitor.process.terminate()
        assert monitor.ended() == 0
    assert cli.status("three")["state"] == "link-down"


def test_the_monitor_in_the_background(cli: Cli) -> None:
    cli.create()
    away(cli, "record")
    # The option is what clean-up knows the process by.
    assert cli.run("monitor", "--daemon", "--run-dir", str(cli.paths.run_dir)).status == 0
    end_s = time.monotonic() + TIMEOUT_S
    while not (text := (cli.paths.run_dir / ".monitor.lock").read_text()):
        assert time.monotonic() < end_s
        time.sleep(0.05)  # nothing tells when a daemon has begun
    assert cli.call("monitor", "--daemon").status == 12
    back(cli, "record")
    pidfd = os.pidfd_open(int(text))
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGHUP)
        cli.ok("wait", "vol0", "--for", "started", "--timeout", "60s")
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], TIMEOUT_S)[0]
    finally:
        os.close(pidfd)
    assert cli.status()["state"] != "stopped"


# -- probe and udev-rules ---------------------------------------------------------------------


def test_probe_tells_udev_which_volume_of_this_host_it_is(cli: Cli) -> None:
    cli.create()
    record = str(cli.folder / "vol0.record")
    lines = dict(line.split("=") for line in cli.ok("probe", record, "--export").out.splitlines())
    assert lines["DMCTL_TYPE"] == "record"
    assert lines["DMCTL_VOLUME_NAME"] == "vol0"
    assert (lines["DMCTL_VOLUME"], lines["DMCTL_ROLE"]) == ("vol0", "record")
    assert lines["DMCTL_ASSEMBLE"] == "1"
    # Only the configuration makes it one of ours, whatever the record calls itself.
    cli.paths.volume_file("vol0").rename(cli.paths.volume_file("renamed"))
    cli.paths.volume_file("bad").write_text("x")
    assert "DMCTL_VOLUME=renamed\n" in cli.ok("probe", record, "--export").out
    cli.paths.volume_file("renamed").unlink()
    assert "DMCTL_VOLUME=" not in cli.ok("probe", record, "--export").out
    assert cli.call("probe", str(cli.folder / "vol0.primary")).status == 10


def test_rules_of_another_configuration_are_only_shown(cli: Cli) -> None:
    cli.create()
    outcome = cli.ok("udev-rules", "--print")
    assert 'LABEL="dmctl_volumes_end"' in outcome.out
    assert "rules" in cli.ok("--json", "udev-rules", "--print").json
    refused = cli.call("udev-rules")
    assert refused.status == 14
    assert "--print" in refused.err


def test_rules_of_the_host_are_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = cli.as_host(monkeypatch) / "udev/rules.d/63-volumes-dmctl.rules"
    cli.create()
    assert rules.exists()
    rules.unlink()
    assert cli.ok("udev-rules").err == f"written: {rules}\n"
    assert cli.ok("udev-rules").err == "everything is up to date\n"
    assert cli.ok("--json", "udev-rules").json["written"] == []
    rules.unlink()
    rules.mkdir()
    assert "note: udev's rules were not brought up to date" in cli.ok("remove", "vol0", "--yes").err
