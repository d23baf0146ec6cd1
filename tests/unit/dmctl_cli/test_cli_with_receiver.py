"""create with a receiver as the secondary: what it makes, what it refuses without a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.config import load_volume
from bitmapd.record import tool
from dmctl.cli.withreceiver import notes_on_points
from tests.support.cli import MIB, Cli, new_cli

FAR = "receiver+unix:///far?socket=/run/far.sock"


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        made.medium("p")
        made.medium("r", MIB)
        yield made


def words(cli: Cli, **options: str) -> list[str]:
    values = {
        "primary": f"{cli.folder}/p",
        "secondary": FAR,
        "record": f"{cli.folder}/r",
        **{key.replace("_", "-"): value for key, value in options.items()},
    }
    return ["create", "vol0", *(f"--{key}={value}" for key, value in values.items())]


def test_a_volume_with_a_receiver_is_served_over_nbd_and_everything_is_to_be_sent(
    cli: Cli,
) -> None:
    spool = {"spool_limit": "8MiB", "spool": str(cli.folder), "spool_file_limit": "1GiB"}
    cli.ok(*words(cli, point_interval="300ms", start_alone="no", **spool))
    config = load_volume(cli.paths, "vol0")
    assert (config.secondary, config.attach) == (FAR, "nbd")
    assert (config.point_interval_s, config.spool_limit_bytes) == (0.3, 8 * MIB)
    assert (config.spool, config.spool_file_limit_bytes) == (str(cli.folder), 1024 * MIB)
    loaded = tool.load(cli.folder / "r")
    assert loaded.superblock.secondary == FAR
    assert loaded.bits.all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"secondary": "receiver+tls://far/v"}, "--partner-certificates: the receiver needs"),
        ({"secondary": "receiver+tls://far"}, "name is missing"),
        ({"initial_sync": "skip"}, "--initial-sync: skip is for secondaries that can be read"),
        ({"block_size": "512KiB"}, "--block-size is larger than 256KiB"),
        ({"point_interval": "1ms"}, "--point-interval"),
        ({"compress": "yes"}, "--compress"),
    ],
)
def test_what_cannot_come_true_is_refused(cli: Cli, options: dict[str, str], reason: str) -> None:
    before = (cli.folder / "r").read_bytes()
    outcome = cli.call(*words(cli, **options))
    assert outcome.status == 2
    assert reason in outcome.err
    assert not cli.paths.volume_file("vol0").exists()
    assert (cli.folder / "r").read_bytes() == before


@pytest.mark.parametrize("option", ["point_interval", "spool_limit", "compress", "start_alone"])
def test_options_of_points_need_a_receiver(cli: Cli, option: str) -> None:
    cli.medium("s")
    value = {"point_interval": "1s", "spool_limit": "1MiB", "compress": "off"}.get(option, "no")
    outcome = cli.call(*words(cli, secondary=f"{cli.folder}/s", **{option: value}))
    assert outcome.status == 2
    assert "receiver" in outcome.err
    assert not cli.paths.volume_file("vol0").exists()


def test_certificates_that_are_not_there_are_reported_at_once(cli: Cli) -> None:
    folder = str(cli.folder)
    outcome = cli.call(*words(cli, secondary="receiver+tls://far/v", partner_certificates=folder))
    assert outcome.status != 0
    assert folder in outcome.err


@pytest.mark.parametrize(
    ("attach", "interval_s", "warns"),
    [("dm", 9.9, True), ("dm", 10.0, False), ("nbd", 1.0, False)],
)
def test_many_points_of_a_volume_in_the_kernel_are_warned_of(
    cli: Cli, attach: str, interval_s: float, warns: bool
) -> None:
    cli.ok(*words(cli))
    config = load_volume(cli.paths, "vol0")
    notes = notes_on_points(dataclasses.replace(config, attach=attach, point_interval_s=interval_s))
    assert bool(notes) is warns
    assert all("two barriers" in note for note in notes)
    cli.medium("s")
    plain = dataclasses.replace(config, secondary=f"{cli.folder}/s", attach="dm")
    assert not notes_on_points(dataclasses.replace(plain, point_interval_s=1.0))
