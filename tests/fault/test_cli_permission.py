"""What a user may not touch is status 30, whatever it is: file, folder, device, socket.

The commands run as `nobody` where the tests run as root, else as the user of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import TIMEOUT_S, Cli, Outcome

NOBODY = 65534
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli() -> Iterator[Cli]:
    folder = Path(tempfile.mkdtemp(prefix="dmctl-"))
    folder.chmod(0o755)
    run_dir = folder / "run"
    run_dir.mkdir(mode=0o755)
    made = Cli(folder, run_dir)
    assert made.create().status == 0
    for path in (made.paths.config_dir, made.paths.volumes_dir):
        path.chmod(0o755)
    made.paths.volume_file("vol0").chmod(0o644)
    for medium in ("primary", "secondary", "record"):
        (folder / f"vol0.{medium}").chmod(0o666)
    yield made
    made.clean_up()
    shutil.rmtree(folder)


def as_nobody(cli: Cli, *words: str) -> Outcome:
    options: dict[str, Any] = {"cwd": "/"}
    if os.geteuid() == 0:
        options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    environment = {**cli._environment(), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "dmctl", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return Outcome(process.returncode, out, err)


def closed(path: Path, mode: int = 0) -> None:
    path.chmod(mode)


def create(cli: Cli, **media: str) -> list[str]:
    paths = {
        role: media.get(role, str(cli.folder / f"new.{role}"))
        for role in ("primary", "secondary", "record")
    }
    for path in paths.values():
        if path.startswith(str(cli.folder)) and not Path(path).exists():
            shutil.copy(cli.folder / "vol0.primary", path)
            Path(path).chmod(0o666)
    return ["create", "new", *(word for role in paths for word in (f"--{role}", paths[role]))]


CONFIG_DIR = "config check", "config show", "status", "status vol0", "start vol0", "start --all", \
    "stop --all", "resync --all", "verify vol0", "events --now", "wait vol0 --for started", \
    "remove vol0 --yes", "plan vol0", "assemble vol0", "pause vol0", "resize vol0", \
    "set vol0 copy-rate=none"  # fmt: skip


@pytest.mark.parametrize("command", CONFIG_DIR)
def test_the_folder_of_the_volumes(cli: Cli, command: str) -> None:
    closed(cli.paths.volumes_dir)
    outcome = as_nobody(cli, *command.split())
    assert outcome.status == 30, outcome
    assert str(cli.paths.volumes_dir) in outcome.err


@pytest.mark.parametrize("command", sorted(set(CONFIG_DIR) - {"stop --all", "events --now"}))
@pytest.mark.parametrize("which", ["volume", "defaults"])
def test_one_file(cli: Cli, command: str, which: str) -> None:
    cli.paths.defaults_file.write_text("[defaults]\n")
    file = cli.paths.volume_file("vol0") if which == "volume" else cli.paths.defaults_file
    closed(file)
    outcome = as_nobody(cli, *command.split())
    assert outcome.status == 30, outcome
    assert str(file) in outcome.err


def test_a_mistake_beside_what_may_not_be_read_is_a_mistake(cli: Cli) -> None:
    closed(cli.paths.volume_file("vol0"))
    cli.paths.volume_file("other").write_text("x = 1")
    cli.paths.volume_file("other").chmod(0o644)
    outcome = as_nobody(cli, "config", "check")
    assert outcome.status == 2
    assert "cannot be read: Permission denied" in outcome.err


@pytest.mark.parametrize("command", ["start vol0", "remove vol0 --yes"])
def test_the_run_folder_may_not_be_written(cli: Cli, command: str) -> None:
    outcome = as_nobody(cli, *command.split())
    assert outcome.status == 30, outcome
    assert str(cli.paths.run_dir) in outcome.err


@pytest.mark.parametrize("command", ["status vol0", "stop vol0", "start vol0", "pause vol0",
                                     "wait vol0 --for stopped", "remove vol0 --yes",
                                     "events vol0 --now"])  # fmt: skip
def test_the_run_folder_may_not_be_entered(cli: Cli, command: str) -> None:
    closed(cli.paths.run_dir)
    outcome = as_nobody(cli, *command.split())
    assert outcome.status == 30, outcome
    assert str(cli.paths.run_dir) in outcome.err


def test_the_control_socket_of_another_user(cli: Cli) -> None:
    if os.geteuid() != 0:
        pytest.skip("NEEDS root, to have two users")
    cli.ok("start", "vol0")
    for command in ("status vol0", "stop vol0", "events vol0 --now"):
        outcome = as_nobody(cli, *command.split())
        assert outcome.status == 30, outcome
        assert str(cli.paths.control_socket("vol0")) in outcome.err
    cli.ok("stop", "vol0")


@pytest.mark.parametrize("role", ["primary", "secondary", "record"])
def test_a_medium(cli: Cli, role: str) -> None:
    words = create(cli)
    closed(cli.folder / f"new.{role}")
    cli.paths.volumes_dir.chmod(0o777)
    outcome = as_nobody(cli, *words)
    assert outcome.status == 30, outcome
    assert str(cli.folder / f"new.{role}") in outcome.err
    assert outcome.err.count(f"new.{role}") == 1, "said once"


def test_the_folder_of_a_new_volume(cli: Cli) -> None:
    outcome = as_nobody(cli, *create(cli))
    assert outcome.status == 30, outcome
    assert str(cli.paths.volume_file("new")) in outcome.err


@pytest.mark.parametrize("command", ["record dump {}", "record check {}", "probe {}", "simulate {}",
                                     "record repair {} --output /nosuch"])  # fmt: skip
def test_a_record_or_a_trace(cli: Cli, command: str) -> None:
    record = cli.folder / "vol0.record"
    closed(record)
    outcome = as_nobody(cli, *command.format(record).split())
    assert outcome.status == 30, outcome
    assert str(record) in outcome.err


@pytest.mark.parametrize(
    "command",
    [
        "record dump {record} --output {output}",
        "record repair {record} --output {output}",
        "simulate {trace} --record-limit 64MiB --plot {output}.svg",
    ],
)
def test_an_output_file(cli: Cli, command: str) -> None:
    trace = cli.folder / "trace.csv"
    trace.write_text("0.0,W,0,4096\n1.0,W,1048576,4096\n")
    output = cli.folder / "output"
    words = command.format(record=cli.folder / "vol0.record", trace=trace, output=output).split()
    outcome = as_nobody(cli, *words)
    assert outcome.status == 30, outcome
    assert str(output) in outcome.err


def test_certificates(cli: Cli) -> None:
    folder = cli.folder / "pki"
    folder.mkdir()
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (folder / name).write_text("secret")
        closed(folder / name)
    words = [*create(cli), "--listen", "nbds://127.0.0.1:10999/new"]
    outcome = as_nobody(cli, *words, "--tls-certificates", str(folder))
    assert outcome.status == 30, outcome
    assert "ca-cert.pem" in outcome.err


def test_a_place_to_listen(cli: Cli) -> None:
    """Also what bitmapd reports: of a socket's folder, and of a port below 1024."""
    cli.paths.run_dir.chmod(0o777)
    closed_dir = cli.folder / "closed"
    closed_dir.mkdir(mode=0o755)
    places = [f'listen = "nbd+unix:///x?socket={closed_dir}/s"']
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as stream:
        if int(stream.read()) > 999:
            places.append('listen = "nbd://127.0.0.1:999/x"\nallow_plaintext_loopback = true')
            places.append('metrics_listen = "127.0.0.1:998"')
    places.append(f'metrics_listen = "unix:{closed_dir}/m"')
    file = cli.paths.volume_file("vol0")
    text = file.read_text()
    cli.paths.config_dir.chmod(0o777)
    for place in places:
        file.write_text(f"{text}\n{place}\n")
        outcome = as_nobody(cli, "start", "vol0")
        assert outcome.status == 30, (place, outcome)
        assert "Permission denied" in outcome.err
