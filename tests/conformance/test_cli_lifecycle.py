"""Volumes that really run, from the command line: start, stop, status, wait, copying, events."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import load_volume, unit_instance
from bitmapd.control.server import Progress
from bitmapd.control.states import STATES
from bitmapd.errors import BusyError
from bitmapd.net.uri import parse_uri
from bitmapd.record import tool
from tests.support.cli import MIB, Cli, check_status, control_thread, new_cli
from tests.support.rawnbd import WRITE, RawNbd


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


@pytest.fixture
def started(cli: Cli) -> Cli:
    """`vol0`, running and in sync."""
    assert cli.create().status == 0
    cli.ok("start", "vol0")
    cli.ok("wait", "vol0", "--for", "in-sync", "--timeout", "30s")
    return cli


def write(cli: Cli, offset_bytes: int, data: bytes, name: str = "vol0") -> None:
    with RawNbd(cli.paths.nbd_socket(name), name) as host:
        host.submit(WRITE, offset_bytes, len(data), data)
        assert host.reply().error == 0


def fall_behind(cli: Cli) -> None:
    """Two MiB are left to copy, for half a minute; four are free at first."""
    cli.ok("set", "vol0", "copy-rate=64KiB")
    for mib in range(6):
        write(cli, mib * MIB, b"z" * MIB)


# -- the way of a volume ----------------------------------------------------------------------


def test_from_create_to_remove(cli: Cli) -> None:
    cli.create()
    before = cli.status()
    assert before["state"] == "stopped"
    assert before["record_extents"] == 8
    assert before["dirty_bytes"] is None
    begun = cli.run("start", "vol0")
    assert begun.status == 0, begun
    assert "nbd+unix:///vol0" in begun.err
    assert cli.call("wait", "vol0", "--for", "in-sync", "--timeout", "30s").status == 0
    write(cli, 3 * MIB, b"x" * 4096)
    cli.ok("wait", "vol0", "--for", "in-sync", "--timeout", "30s")
    running = cli.status()
    assert running["state"] == "in-sync"
    assert running["writes_total"] == 1
    assert running["misses_total"] == 1
    assert running["last_recovery"]["reason"] == "initial"
    stopped = cli.ok("stop", "vol0", "--json").json
    assert stopped["volumes"][0]["result"] == "stopped"
    assert stopped["volumes"][0]["clean"] is True
    after = cli.status()
    assert (after["state"], after["record_extents"], after["dirty_bytes"]) == ("stopped", 0, 0)
    primary, secondary = (cli.folder / f"vol0.{side}" for side in ("primary", "secondary"))
    assert primary.read_bytes() == secondary.read_bytes()
    assert primary.read_bytes()[3 * MIB : 3 * MIB + 4096] == b"x" * 4096
    note = cli.paths.sides_file(load_volume(cli.paths, "vol0").uuid)
    cli.ok("remove", "vol0", "--yes")
    assert cli.call("status", "vol0").status == 10
    assert os.listdir(cli.paths.run_dir) == []
    # What is left is what `create` asks by before it overwrites a good copy.
    assert [path for path in cli.paths.config_dir.rglob("*") if path.is_file()] == [note]


@pytest.mark.parametrize("name", ["+Vol.1_a-b", "A" * 64])
def test_a_name_of_any_kind_that_lvm_allows(cli: Cli, name: str) -> None:
    assert cli.create(name).status == 0
    cli.ok("start", unit_instance(name))
    cli.ok("wait", name, "--for", "in-sync", "--timeout", "30s")
    status = cli.status(name)
    assert (status["name"], status["state"]) == (name, "in-sync")
    uri = parse_uri(status["device"])
    assert (uri.export, uri.socket_path) == (name, str(cli.paths.nbd_socket(name)))
    write(cli, 0, b"x" * 4096, name)
    cli.ok("stop", name)
    cli.ok("remove", name, "--yes")


def test_starting_and_stopping_again_is_a_success_that_does_nothing(started: Cli) -> None:
    pid = started.pid()
    again = started.ok("start", "vol0", "--json").json
    assert again["volumes"] == [
        {
            "name": "vol0",
            "result": "running",
            "device": started.status()["device"],
            "paused": False,
            "error": None,
        }
    ]
    assert started.pid() == pid
    started.ok("stop", "vol0")
    assert "stopped already" in started.ok("stop", "vol0").err


def test_two_starts_at_once_make_one_process(cli: Cli) -> None:
    cli.create()
    with cli.popen("start", "vol0") as one, cli.popen("start", "vol0") as other:
        words = sorted([one.communicate(timeout=60)[1], other.communicate(timeout=60)[1]])
        assert (one.returncode, other.returncode) == (0, 0)
    assert "runs already:" in words[0] or "runs already:" in words[1]
    assert cli.call("stop", "vol0").status == 0


def test_many_volumes_go_on_after_an_error_with_the_worst_status(cli: Cli) -> None:
    cli.create("a")
    cli.create("c")
    (cli.folder / "b.toml").write_text("?")
    shutil.copy(cli.folder / "b.toml", cli.paths.volume_file("b"))
    outcome = cli.call("start", "--all")
    assert outcome.status == 2
    assert "cannot start 'b'" in outcome.err
    assert cli.status("a")["state"] != "stopped"
    assert cli.status("c")["state"] != "stopped"
    everything = cli.call("status", "--json")
    assert everything.status == 2
    assert [volume["name"] for volume in everything.json["volumes"]] == ["a", "c"]
    assert everything.json["error"]["code"] == "usage"
    assert "b.toml" in cli.call("status").err
    document = cli.call("stop", "a", "nosuch", "c", "--json")
    assert document.status == 10
    assert [row["result"] for row in document.json["volumes"]] == ["stopped", "failed", "stopped"]
    assert document.json["error"]["exit_status"] == 10


# -- starts that fail -------------------------------------------------------------------------


def test_the_record_of_another_volume(cli: Cli) -> None:
    cli.create()
    cli.create("other")
    shutil.copy(cli.folder / "other.record", cli.folder / "vol0.record")
    outcome = cli.call("start", "vol0")
    assert outcome.status == 22, outcome
    assert "cannot start 'vol0'" in outcome.err
    assert "belongs to volume 'other'" in outcome.err
    document = cli.call("start", "vol0", "--json")
    assert document.json["error"]["code"] == "foreign-record"
    assert cli.status()["state"] == "stopped"
    assert cli.status()["last_error"]["code"] == "foreign-record"


def test_a_record_without_superblocks(cli: Cli) -> None:
    cli.create()
    with (cli.folder / "vol0.record").open("r+b") as stream:
        for offset in (64, 65536 + 64):
            stream.seek(offset)
            stream.write(b"\xff" * 8)
    assert cli.call("start", "vol0").status == 20
    stopped = cli.status()
    assert stopped["size_bytes"] is None
    assert stopped["last_error"]["code"] == "record-damaged"


def test_a_primary_that_is_gone(cli: Cli) -> None:
    cli.create()
    (cli.folder / "vol0.primary").unlink()
    outcome = cli.call("start", "vol0")
    assert outcome.status == 10, outcome
    assert "vol0.primary" in outcome.err


def test_a_bitmapd_that_cannot_run_at_all(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is another program here: what it prints is shown, and its status told."""
    cli.create()
    broken = cli.folder / "python"
    broken.write_text("#!/bin/sh\necho 'cannot find myself' >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(broken))
    outcome = cli.call("start", "vol0")
    assert outcome.status == 1
    assert "ended with status 7: cannot find myself" in outcome.err


def test_a_bitmapd_that_vanishes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.create()
    monkeypatch.setattr("sys.executable", shutil.which("true"))
    monkeypatch.setattr("dmctl.cli.processes.SILENT_S", 0.1)
    outcome = cli.call("start", "vol0")
    assert outcome.status == 1
    assert "without saying why" in outcome.err


def test_a_start_that_takes_too_long(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.create()
    monkeypatch.setattr("sys.executable", shutil.which("true"))
    outcome = cli.call("start", "vol0", "--timeout", "100ms")
    assert outcome.status == 40
    assert "dmctl wait vol0 --for started" in outcome.err


# -- after a crash ----------------------------------------------------------------------------


def test_after_a_kill_it_is_stopped_and_starts_again(started: Cli) -> None:
    write(started, 0, b"y" * 4096)
    started.kill()
    assert started.status()["state"] == "stopped"
    assert started.call("stop", "vol0").status == 0
    assert started.ok("start", "vol0").status == 0
    started.ok("wait", "vol0", "--for", "in-sync", "--timeout", "30s")
    assert (started.folder / "vol0.secondary").read_bytes()[:4096] == b"y" * 4096
    assert started.status()["last_recovery"]["reason"] in ("crash", "clean")


@pytest.mark.parametrize("content", ["", "nonsense\n"])
def test_a_pid_file_that_says_nothing_holds_up_no_start(cli: Cli, content: str) -> None:
    cli.create()
    file = cli.paths.pid_file("vol0")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    cli.ok("start", "vol0")
    assert int(file.read_text()) > 0
    cli.ok("stop", "vol0")
    assert not file.exists()


def test_a_bitmapd_that_hangs_is_failed(started: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmctl.cli.status.ANSWER_TIMEOUT_S", 0.2)
    os.kill(started.pid(), signal.SIGSTOP)
    try:
        outcome = started.call("status", "--check", "--json")
    finally:
        os.kill(started.pid(), signal.SIGCONT)
    assert outcome.status == 1
    volume = outcome.json["volumes"][0]
    check_status(volume)
    assert volume["state"] == "failed"
    assert volume["last_error"]["code"] == "time-out"


# -- status -----------------------------------------------------------------------------------


CHECKED = {name: state.check_status for name, state in STATES.items()} | {"unheard-of": 1}


@pytest.mark.parametrize(("state", "status"), CHECKED.items())
def test_check_turns_the_state_into_the_exit_status(cli: Cli, state: str, status: int) -> None:
    cli.create()
    volume = cli.status() | {
        "state": state,
        "writes_total": 10,
        "hits_total": 9,
        "lag_seconds": 75.0,
        "dirty_bytes": 1536,
        "resync": {"total_bytes": 100, "remaining_bytes": 25} if state == "resyncing" else None,
    }

    async def answer(_args: dict[str, Any], _progress: Progress) -> Any:
        return volume

    with control_thread(cli.paths.control_socket("vol0"), {"status": answer}):
        assert cli.call("status").status == 0
        outcome = cli.call("status", "--check")
        assert outcome.status == status
        assert outcome.out.startswith("VOLUME")
        row = outcome.out.splitlines()[1].split("  ")
        shown = f"{state} 75%" if state == "resyncing" else state
        assert [cell.strip() for cell in row if cell.strip()][1:5] == [
            shown,
            "8.0 MiB",
            "1.5 KiB",
            "1:15 min",
        ]
        assert cli.call("status", "--check", "-q").out == ""
        said = [line.split() for line in cli.call("status", "-v").out.splitlines()]
        assert ["hits", "9"] in said
        assert ["extent", "size", "1.0", "MiB"] in said
        assert ["record", cli.status()["record"]] in said
        assert not [line for line in said if line and "_" in line[0]]


def test_the_worst_of_several_states(cli: Cli) -> None:
    cli.create("a")
    cli.create("b")

    async def answer(_args: dict[str, Any], _progress: Progress) -> Any:
        return cli.status("b") | {"name": "a", "state": "paused"}

    with control_thread(cli.paths.control_socket("a"), {"status": answer}):
        assert cli.call("status", "a", "--check").status == 101
        assert cli.call("status", "--check").status == 14


def test_no_volumes(cli: Cli) -> None:
    assert "no volumes" in cli.ok("status").err
    assert cli.ok("status", "--check").status == 0


# -- wait -------------------------------------------------------------------------------------


def test_wait(started: Cli) -> None:
    assert started.ok("wait", "vol0", "--for", "started", "--json").json["state"] == "started"
    outcome = started.call("wait", "vol0", "--for", "stopped", "--timeout", "100ms")
    assert outcome.status == 40
    with started.popen("wait", "vol0", "--for", "stopped") as waiting:
        started.ok("stop", "vol0")
        assert waiting.wait(30) == 0
    assert started.ok("wait", "vol0", "--for", "stopped").status == 0
    assert started.call("wait", "vol0", "--for", "started", "--timeout", "100ms").status == 40
    assert started.call("wait", "vol0", "--for", "in-sync").status == 14
    assert started.call("wait", "nosuch", "--for", "stopped").status == 10


def test_wait_for_in_sync_ends_with_the_time_or_with_the_volume(started: Cli) -> None:
    fall_behind(started)
    short = started.call("wait", "vol0", "--for", "in-sync", "--timeout", "200ms")
    assert short.status == 40
    with started.popen("wait", "vol0", "--for", "in-sync") as waiting:
        started.ok("stop", "vol0", "--now")
        _, err = waiting.communicate(timeout=30)
        assert waiting.returncode == 14
        # It may have been gone before the other had asked it.
        assert "not running" in err or "was stopped before it was in-sync" in err
    assert started.status()["record_extents"] > 0


# -- copying ----------------------------------------------------------------------------------


def test_pause_resume_resync(started: Cli) -> None:
    assert started.ok("pause", "vol0", "--json").json["name"] == "vol0"
    assert started.status()["state"] == "paused"
    write(started, MIB, b"w" * 4096)
    assert started.call("resync", "vol0").status == 14
    told = started.ok("resync", "--all").err
    reason = "volume 'vol0' is paused: nothing is copied; first: dmctl resume vol0"
    assert told == f"passed over: {reason}\n"
    assert started.ok("--quiet", "resync", "--all").err == ""
    row = started.ok("--quiet", "resync", "--all", "--json").json["volumes"][0]
    assert (row["result"], row["error"]) == ("passed over", None)
    assert "is paused" in row["reason"]
    started.ok("resume", "vol0")
    started.ok("wait", "vol0", "--for", "in-sync", "--timeout", "30s")
    row = started.ok("resync", "vol0", "--json").json["volumes"][0]
    assert (row["name"], row["result"], row["error"]) == ("vol0", "done", None)
    started.ok("stop", "vol0")
    assert started.ok("resync", "--all").err == "", "nothing is left in its record"
    assert "passed over" in started.ok("resync", "-v").err
    assert started.call("resync", "vol0").status == 14
    assert started.call("resync", "nosuch").status == 10


def test_resync_tells_which_volumes_it_can_do_nothing_for(cli: Cli) -> None:
    cli.create("left")
    cli.create("damaged")
    cli.create("away")
    with (cli.folder / "damaged.record").open("r+b") as stream:
        stream.write(bytes(MIB))

    async def resync(_args: dict[str, Any], _progress: Progress) -> Any:
        return {"extents": 0, "state": "link-down"}

    with control_thread(cli.paths.control_socket("away"), {"resync": resync}):
        outcome = cli.ok("resync", "--all")
    away, damaged, left = sorted(outcome.err.splitlines())
    assert away.startswith("passed over: volume 'away' is link-down: it copies as soon as its")
    assert damaged.startswith("passed over: volume 'damaged' is not running, and its record")
    assert "cannot be read" in damaged
    assert left == (
        "passed over: volume 'left' is not running, and its record names 8 extents that the"
        " secondary may lack; first: dmctl start left"
    )


def test_verify(started: Cli) -> None:
    result = started.ok("verify", "vol0", "--json").json
    assert result["compared_bytes"] == 8 * MIB
    assert result["unexpected"] == []
    with (started.folder / "vol0.secondary").open("r+b") as stream:
        stream.seek(5 * MIB)
        stream.write(b"rot")
    found = started.call("verify", "vol0")
    assert found.status == 101
    assert "unexpected difference" in found.out
    assert "--repair" in found.err
    document = started.call("verify", "vol0", "--json")
    assert document.status == 101
    assert document.json["error"]["code"] == "differences"
    assert document.json["unexpected_bytes"] > 0
    assert "repaired" in started.ok("verify", "vol0", "--repair").err
    assert started.ok("verify", "vol0").status == 0
    started.ok("stop", "vol0")
    assert started.call("verify", "vol0").status == 14


def test_set(started: Cli) -> None:
    started.ok("set", "vol0", "copy-rate=7MiB/s", "resync-target=10s")
    text = started.paths.volume_file("vol0").read_text()
    assert 'copy_rate = "7MiB/s"' in text
    assert 'resync_target = "10s"' in text
    started.ok("set", "vol0", "record-limit=100m")
    assert started.status()["record_limit_bytes"] == 100 * MIB
    wrong = started.call("set", "vol0", "copy-rat=1m", "era-interval=5", "primary=/dev/x")
    assert wrong.status == 2
    assert "did you mean copy_rate?" in wrong.err
    assert "era_interval" in wrong.err
    assert "cannot be changed while the volume runs" in wrong.err
    assert started.call("set", "vol0", "predictor=nosuch").status == 2
    started.ok("stop", "vol0")
    assert started.call("set", "vol0", "copy-rate=1m").status == 14
    wrong = started.call("set", "vol0", "foo=1")
    assert wrong.status == 2
    assert "foo: unknown key" in wrong.err


def test_resize(started: Cli) -> None:
    assert started.status()["size_bytes"] == 8 * MIB
    assert started.ok("resize", "vol0").err == "volume 'vol0': still 8.0 MiB, it has not grown\n"
    for side in ("secondary", "primary"):
        os.truncate(started.folder / f"vol0.{side}", 16 * MIB)
    assert started.ok("resize", "vol0", "--json").json["name"] == "vol0"
    assert started.status()["size_bytes"] == 16 * MIB
    write(started, 15 * MIB, b"u" * 4096)
    started.ok("wait", "vol0", "--for", "in-sync", "--timeout", "30s")
    started.ok("stop", "vol0")
    secondary = (started.folder / "vol0.secondary").read_bytes()
    assert secondary == (started.folder / "vol0.primary").read_bytes()
    assert secondary[15 * MIB : 15 * MIB + 4096] == b"u" * 4096
    assert started.call("resize", "vol0").status == 14


# -- stop -------------------------------------------------------------------------------------


def test_a_stop_that_takes_too_long_goes_on(cli: Cli) -> None:
    cli.create()

    async def stop(_args: dict[str, Any], progress: Progress) -> Any:
        while True:
            await progress({"dirty_bytes": 4096})

    async def ping(_args: dict[str, Any], _progress: Progress) -> Any:
        return {"state": "ready"}

    with control_thread(cli.paths.control_socket("vol0"), {"stop": stop, "ping": ping}):
        outcome = cli.call("stop", "vol0", "--timeout", "100ms")
        assert outcome.status == 40
        assert "--now" in outcome.err


def test_stop_now_leaves_the_rest_in_the_record(started: Cli) -> None:
    started.ok("pause", "vol0")
    write(started, 2 * MIB, b"v" * 4096)
    outcome = started.ok("stop", "vol0", "--now")
    assert "left in its record" in outcome.err
    loaded = tool.load(started.folder / "vol0.record")
    assert loaded.bits[2] == 1
    assert not loaded.superblock.clean


# -- events -----------------------------------------------------------------------------------


def test_events(started: Cli) -> None:
    entries = [json.loads(line) for line in started.ok("events", "vol0", "--now").out.splitlines()]
    names = [entry["event"] for entry in entries]
    assert "started" in names
    assert "in-sync" in names
    assert all(entry["volume"] == "vol0" for entry in entries)
    times = [datetime.fromisoformat(entry["at"]) for entry in entries]
    assert times == sorted(times)
    with started.popen("events") as following:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["volume"] == "vol0"
        started.ok("stop", "vol0")
        rest = [json.loads(line)["event"] for line in following.stdout]
        assert rest[-1] == "stopped"
        assert following.wait(30) == 0
    assert started.call("events", "vol0").status == 14
    assert started.call("events", "nosuch").status == 10
    assert started.ok("events", "--now").out == ""


def test_events_are_followed_to_the_end_or_to_an_error(cli: Cli) -> None:
    cli.create()

    async def once(_args: dict[str, Any], progress: Progress) -> Any:
        await progress({"event": "in-sync"})
        return {"events": 1}

    async def broken(_args: dict[str, Any], _progress: Progress) -> Any:
        raise BusyError("too many readers")

    path = cli.paths.control_socket("vol0")
    with control_thread(path, {"events": broken}):
        assert cli.call("events").status == 12
    with control_thread(path, {"events": once}):
        following = cli.popen("events", "vol0")
        assert following.stdout is not None
        assert json.loads(following.stdout.readline()) == {"event": "in-sync"}
    with following:
        assert following.wait(30) == 0


def test_events_of_a_reader_that_goes_away(started: Cli) -> None:
    with started.popen("events") as following:
        assert following.stdout is not None
        assert following.stderr is not None
        following.stdout.readline()
        following.stdout.close()
        started.ok("stop", "vol0")
        assert following.wait(30) == 128 + signal.SIGPIPE
        assert following.stderr.read() == ""


def test_an_interrupted_command_ends_with_130(started: Cli) -> None:
    with started.popen("events") as following:
        assert following.stdout is not None
        assert following.stderr is not None
        following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == 130
        assert following.stderr.read() == ""


# -- remove -----------------------------------------------------------------------------------


def test_remove_asks_and_says_what_would_be_lost(cli: Cli) -> None:
    cli.create()
    silent = cli.call("remove", "vol0")
    assert silent.status == 2
    assert "--yes" in silent.err
    refused = cli.call("remove", "vol0", "--wipe-record", answer="no\n")
    assert refused.status == 1
    assert "8 extents that the secondary may lack" in refused.err
    assert cli.status()["state"] == "stopped"
    done = cli.call("remove", "vol0", "--wipe-record", "--json", answer="y\n")
    assert done.status == 0
    assert done.json["record_wiped"] is True
    assert tool.probe(cli.folder / "vol0.record") is None
    assert cli.call("remove", "vol0", "--yes").status == 10


def test_remove_never_takes_what_runs(started: Cli) -> None:
    assert started.call("remove", "vol0", "--yes").status == 14
    assert started.status()["state"] == "in-sync"


def test_the_record_of_another_volume_is_not_wiped(cli: Cli) -> None:
    cli.create()
    cli.create("other")
    shutil.copy(cli.folder / "other.record", cli.folder / "vol0.record")
    assert cli.call("remove", "vol0", "--wipe-record", "--yes").status == 22
    assert cli.status()["state"] == "stopped"
    cli.ok("remove", "vol0", "--yes")
    assert tool.probe(cli.folder / "vol0.record") is not None


def test_a_volume_with_a_broken_file_can_be_removed(cli: Cli) -> None:
    cli.create()
    cli.paths.volume_file("vol0").write_text("?")
    assert cli.call("remove", "vol0", "--wipe-record", "--yes").status == 2
    cli.ok("remove", "vol0", "--yes")


def test_a_socket_of_nobody_is_no_running_volume(cli: Cli) -> None:
    cli.create()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(cli.paths.control_socket("vol0")))
    assert cli.status()["state"] == "stopped"
