"""The disk of the configuration, or /run, is full: what is reported, what is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitmapd.record import tool
from tests.support.cli import MIB, Cli, Outcome, new_cli
from tests.support.faulty import small_filesystem


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made, small_filesystem(made.paths.config_dir, 1):
        yield made
        made.clean_up()  # while the file system is still there


@contextmanager
def full(cli: Cli) -> Iterator[None]:
    ballast = cli.paths.config_dir / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(2 * MIB))
    yield
    ballast.unlink()


def no_space(outcome: Outcome, file: Path) -> None:
    assert outcome.status == 13, outcome
    assert f"{file}: No space left on device" in outcome.err
    assert "Errno" not in outcome.err


def test_a_volume_that_cannot_be_created_leaves_its_record_empty(cli: Cli) -> None:
    with full(cli):
        outcome = cli.create()
    no_space(outcome, cli.paths.volume_file("vol0"))
    assert "cannot create 'vol0'" in outcome.err
    assert tool.probe(cli.folder / "vol0.record") is None
    assert cli.create("vol0", "--force").status == 0


def test_a_setting_that_cannot_be_kept_is_not_taken_up(cli: Cli) -> None:
    cli.create("vol0", "--force")
    cli.ok("start", "vol0")
    with full(cli):
        no_space(cli.call("set", "vol0", "copy-rate=1m"), cli.paths.volume_file("vol0"))
    cli.ok("set", "vol0", "copy-rate=1m")


def test_a_start_that_cannot_note_its_session(cli: Cli) -> None:
    cli.create("vol0", "--force")
    uuid = cli.status()["uuid"]
    with full(cli):
        outcome = cli.call("start", "vol0")
    no_space(outcome, cli.paths.config_dir / "state" / f"{uuid}.json")
    assert "cannot start 'vol0'" in outcome.err
    cli.ok("start", "vol0")


def test_a_log_of_requests_in_a_folder_that_is_not_there(cli: Cli) -> None:
    cli.create("vol0", "--force")
    cli.ok("start", "vol0")
    outcome = cli.call("set", "vol0", "trace=/nope/x")
    assert outcome.status == 10
    assert "/nope/x: No such file or directory" in outcome.err


# -- /run -------------------------------------------------------------------------------------


@pytest.fixture
def run_cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made, small_filesystem(made.paths.run_dir, 1):
        yield made
        made.clean_up()


def test_run_is_full(run_cli: Cli) -> None:
    assert run_cli.create().status == 0
    ballast = run_cli.paths.run_dir / "ballast"

    def fill() -> None:
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(2 * MIB))

    fill()
    no_space(run_cli.call("start", "vol0"), run_cli.paths.error_file("vol0"))
    assert run_cli.call("status", "vol0").status == 0
    ballast.unlink()
    run_cli.ok("start", "vol0")
    fill()
    assert run_cli.ok("start", "vol0", "--json").json["volumes"][0]["result"] == "running"
    assert run_cli.status()["state"] != "failed"
    run_cli.ok("stop", "vol0", "--now")
