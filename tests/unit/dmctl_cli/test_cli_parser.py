"""The parser tree: every command runs something, help, completion, errors, exit of the process."""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmctl.cli.parser import build_parser
from tests.support.cli import Cli, new_cli

COMMANDS = (
    *("create", "start", "stop", "status", "wait", "resync", "verify", "pause", "resume", "set"),
    *("resize", "promote", "demote", "failback", "remove", "record", "events", "probe"),
    *("receive", "points", "test-failover", "switchover"),
    *("simulate", "takeover", "partner", "config", "assemble", "monitor"),
    *("udev-rules", "plan", "partner-keys", "point"),
)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def leaves(
    parser: argparse.ArgumentParser, name: str = "dmctl"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not actions:
        yield name, parser
    for action in actions:
        for word, child in action.choices.items():
            yield from leaves(child, f"{name} {word}")


def test_every_command_of_the_contract_is_there_and_nothing_else() -> None:
    names = {name.split()[1] for name, _ in leaves(build_parser())}
    assert names == set(COMMANDS)


@pytest.mark.parametrize(("name", "parser"), list(leaves(build_parser())))
def test_every_command_runs_a_function_and_has_help(
    name: str, parser: argparse.ArgumentParser
) -> None:
    module, _, function = parser.get_default("run").partition(":")
    assert callable(getattr(importlib.import_module(f"dmctl.cli.{module}"), function))
    text = parser.format_help()
    assert parser.description is not None
    assert parser.description.endswith(".")
    assert "--json" in text
    assert all(action.help for action in parser._actions), name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_exits_with_0(cli: Cli, command: str) -> None:
    outcome = cli.call(command, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"usage: dmctl {command}")


def test_the_main_help_lists_commands_and_exit_codes(cli: Cli) -> None:
    text = cli.call("--help").out
    assert all(f"\n    {command}" in text for command in COMMANDS)
    assert "22 record of another volume" in text
    assert "101 link-down, alone, paused, secondary-failing" in cli.call("status", "--help").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("strat", "vol0"), "there is no command 'strat'"),
        ((), "required: COMMAND"),
        (("wait", "vol0"), "required: --for"),
        (("wait", "vol0", "--for", "heaven"), "invalid choice: 'heaven'"),
        (("wait", "vol0", "--for", "stopped", "--timeout", "5"), "the unit is missing"),
        (("start",), "no volume was named"),
        (("start", "a", "--all"), "exclude each other"),
        (("record", "repair", "/dev/null"), "required: --output"),
        (("record", "dmup", "x"), "there is no command 'dmup'"),
        (("status", "--max-point-age", "1s"), "goes with --check"),
        (("wait", "v", "--for", "started", "--newer-than", "2"), "--newer-than goes with"),
        (("wait", "v", "--for", "point", "--newer-than", "-2"), "not a whole number"),
        (("status", "--jso"), "unrecognized arguments"),
        (("set", "vol0", "copy-rate"), "not of the form KEY=VALUE"),
        (("set", "vol0", "copy-rate=1m", "copy_rate=2m"), "given twice"),
    ],
)
def test_wrong_usage_is_status_2(cli: Cli, words: tuple[str, ...], message: str) -> None:
    outcome = cli.call(*words)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.startswith("dmctl: error: ")
    assert outcome.out == ""
    as_json = cli.call("--json", *words)
    assert as_json.err == ""
    error = as_json.json["error"]
    assert message in error["message"]
    assert set(error) >= {"code", "exit_status", "message", "hint"}


def test_a_command_that_is_nearly_right_gets_a_hint(cli: Cli) -> None:
    assert "did you mean 'start'?" in cli.call("strat", "vol0").err


def test_global_options_before_and_after_the_command(cli: Cli) -> None:
    other = ("--config-dir", str(cli.folder / "other"))
    (cli.folder / "other/volumes").mkdir(parents=True)
    (cli.folder / "other/volumes/v.toml").write_text("?")
    for words in ((*other, "config", "check"), ("config", "check", *other)):
        outcome = cli.call(*words)
        assert outcome.status == 2
        assert "other/volumes/v.toml" in outcome.err
    assert cli.call("--json", "status").json == cli.call("status", "--json").json


def test_version(cli: Cli) -> None:
    assert cli.call("--version").out.startswith("dmctl 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_valid_for_its_shell(cli: Cli, shell: str) -> None:
    outcome = cli.call("--print-completion", shell)
    assert outcome.status == 0
    assert "resync" in outcome.out
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed: the script was made, its syntax is not checked")
    subprocess.run([program, "-n"], input=outcome.out, text=True, check=True, timeout=20)


def test_the_package_can_be_run(cli: Cli) -> None:
    outcome = cli.run("status", "--json")
    assert outcome.status == 0
    assert outcome.json == {
        "output_version": {"command": "status", "major": 1, "minor": 0},
        "volumes": [],
    }


def test_a_reader_that_goes_away_ends_it_quietly(cli: Cli) -> None:
    with cli.popen("--help") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(20) in (120, 128 + signal.SIGPIPE)
        assert "Traceback" not in process.stderr.read()


def test_a_mistake_of_the_program_is_told_without_a_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        raise KeyError("mistake")

    monkeypatch.setattr("dmctl.cli.status.status", broken)
    outcome = cli.call("status")
    assert outcome.status == 1
    assert "internal error: KeyError" in outcome.err
    assert "Traceback" not in outcome.err
    assert "Traceback" in cli.call("status", "--debug").err


def test_an_interrupt_is_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dmctl.cli.status.status", interrupted)
    assert cli.call("status").status == 130


def test_errors_of_the_system_get_our_exit_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, status in ((2, 10), (13, 30), (16, 12), (17, 11), (28, 13), (110, 40), (5, 1)):

        def fails(*_: object, number: int = number) -> int:
            raise OSError(number, "reason", "/some/file")

        monkeypatch.setattr("dmctl.cli.status.status", fails)
        outcome = cli.call("status")
        assert outcome.status == status
        assert outcome.err == "dmctl: error: /some/file: reason\n"
