"""What becomes of a command whose output cannot be written: full, closed, or without a reader.

Real processes: what the interpreter does with its streams at the exit is part of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmctl.cli.parser import build_parser
from tests.support.cli import TIMEOUT_S, Cli, new_cli

READER_GONE = 128 + signal.SIGPIPE
TRACE = Path(__file__).parents[1] / "data/traces"

# Words -> exit status.  Each command of the parser is here, or in `ELSEWHERE`.
COMMANDS: dict[str, int] = {
    "--help": 0,
    "--version": 0,
    "--print-completion bash": 0,
    "create --help": 0,
    "status": 0,
    "status -v": 0,
    "status --json": 0,
    "status --check": 14,
    "status nosuch": 10,
    "status nosuch --json": 10,
    "nosuch": 2,
    "start nosuch": 10,
    "start nosuch --json": 10,
    "stop vol0": 0,
    "stop vol0 --json": 0,
    "wait vol0 --for stopped": 0,
    "wait vol0 --for stopped --json": 0,
    "resync vol0 --json": 14,
    "verify vol0": 14,
    "verify vol0 --json": 14,
    "pause vol0": 14,
    "resume vol0": 14,
    "set vol0 copy-rate=none": 14,
    "resize vol0": 14,
    "plan vol0": 14,
    "assemble nosuch": 10,
    "create vol0 --primary /no1 --secondary /no2 --record /no3": 10,
    "remove nosuch --yes": 10,
    "record dump {record}": 0,
    "record dump {record} --json": 0,
    "record check {record}": 0,
    "record check {record} --json": 0,
    "record repair {record} --output {record}": 2,
    "events --now": 0,
    "events --explain": 0,
    "probe {record}": 0,
    "probe {record} --export": 0,
    "udev-rules --print": 0,
    "simulate {trace} --record-limit 64MiB": 0,
    "simulate {trace} --record-limit 64MiB --json": 0,
    "config show": 0,
    "config show --explain": 0,
    "config check": 0,
    "config check --json": 0,
    "takeover vol0": 14,
}
# Never end, or answer as `takeover` does.
ELSEWHERE = {
    *(
        "monitor",
        "demote",
        "failback",
        "promote",
        "switchover",
        "test-failover",
        "partner",
        "partner-keys",
    ),
    *("receive", "points", "point"),
}


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with new_cli(tmp_path_factory.mktemp("streams")) as made:
        assert made.create().status == 0
        yield made


def words(cli: Cli, command: str) -> list[str]:
    trace = sorted(TRACE.glob("*.csv*"))[0]
    return command.format(record=cli.folder / "vol0.record", trace=trace).split()


def run(cli: Cli, command: str, **streams: Any) -> tuple[int, str, str]:
    with cli.popen(*words(cli, command), **streams) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out or "", err or ""


def reader_gone() -> int:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_every_command_is_tried() -> None:
    tried = {command.split()[0] for command in COMMANDS}
    for action in build_parser()._actions:
        if action.dest == "command":
            assert set(action.choices or ()) <= tried | ELSEWHERE


@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_nobody_takes(cli: Cli, command: str) -> None:
    status, out, err = run(cli, command)
    assert status == COMMANDS[command], (out, err)

    with open("/dev/full", "w") as full:
        got, _, said = run(cli, command, stdout=full)
        if out:
            assert got == 13
            last = said.splitlines()[-1]
            assert last == "dmctl: error: standard output: No space left on device"
        else:
            assert (got, said) == (status, err)
        # Whatever cannot be said on stderr, stdout and the status are as they were.
        if err:
            got, printed, _ = run(cli, command, stderr=full)
            assert (got, stable(printed)) == (status, stable(out))
        got, _, _ = run(cli, command, stdout=full, stderr=full)
        assert got == (13 if out else status)

    for number in (1, 2):
        got, printed, said = closed(cli, command, number)
        assert got == status
        if number == 2:
            assert stable(printed) == stable(out)
        else:
            assert stable(said) == stable(err)

    pipe = reader_gone()
    try:
        got, _, said = run(cli, command, stdout=pipe)
        assert got == (READER_GONE if out else status)
        assert said == "" if out and not err else "Traceback" not in said
        if err:
            got, printed, _ = run(cli, command, stderr=pipe)
            assert (got, stable(printed)) == (status, stable(out))
    finally:
        os.close(pipe)


def closed(cli: Cli, command: str, number: int) -> tuple[int, str, str]:
    """Run with a descriptor that is closed from the start."""
    script = f'exec {number}>&- "$@"'
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", sys.executable, "-P", "-m", "dmctl", *words(cli, command)],
        env=cli._environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def stable(text: str) -> str:
    """Without what is another one at every run: times."""
    try:
        document = json.loads(text)
    except ValueError:
        return "\n".join(line for line in text.splitlines() if " ms" not in line)
    for volume in document.get("volumes", []):
        if isinstance(volume, dict) and volume.get("last_error"):
            volume["last_error"] = None
    return json.dumps(document)


def test_a_medium_never_becomes_standard_error(tmp_path: Path) -> None:
    """What was opened as descriptor 2 would take what libraries and children print."""
    opens = "import os; print(os.open('medium', os.O_RDWR | os.O_CREAT))"
    guard = "from bitmapd.hardening import keep_standard_descriptors as keep; keep(); "
    for prefix, expected in ("", {"0", "2"}), (guard, {"3"}):
        for shut in ("0<&- 2>&-", "2>&-"):
            done = subprocess.run(
                ["/bin/sh", "-c", f'exec {shut}; "$0" -P -c "$1"', sys.executable, prefix + opens],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT_S,
                check=True,
            )
            assert done.stdout.strip() in expected
