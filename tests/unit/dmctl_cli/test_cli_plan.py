"""`dmctl plan`: the script that it prints."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from bitmapd.config import VolumeConfig, build_volume
from bitmapd.errors import NotFoundError
from bitmapd.record.geometry import Geometry
from dmctl.cli.plan import build_commands, plan_text, volume_of
from dmctl.model.plan import plan
from dmctl.model.stack import (
    Goal,
    Mapped,
    Nbd,
    Observed,
    Primary,
    Ram,
    Volume,
    Wanted,
    era_table,
)

MIB = 1 << 20
UUID_TEXT = "00112233-4455-6677-8899-aabbccddeeff"
VOLUME = Volume("vol0", UUID(UUID_TEXT).hex, "/dev/sda", 64 * MIB, 512, 64 << 10)
PRIMARY = Primary("/dev/sda", "8:0", 64 * MIB, 512, 512)


def text(observed: Observed, goal: Goal) -> list[str]:
    return plan_text(observed, goal, plan(observed, Wanted(VOLUME, goal)))


def test_nothing_is_there() -> None:
    lines = text(Observed(primary=PRIMARY), Goal.ATTACHED)
    assert lines[0] == "# nothing of the volume is there"
    assert lines[1] == "# to attach it ('dmctl start' does it):"
    assert lines[-1].startswith("dmsetup create vol0 ")
    assert text(Observed(primary=PRIMARY), Goal.GONE) == [
        "# nothing of the volume is there",
        "# nothing is left to do",
    ]


def test_something_is_there() -> None:
    table = era_table(VOLUME, ram="252:0", primary="8:0")
    era = Mapped("dmctl-vol0-era", f"DMCTL-{VOLUME.uuid}-era", "253:0", table=table)
    write = Mapped(
        "dmctl-vol0-w", f"DMCTL-{VOLUME.uuid}-write", "253:1", suspended=True, inactive=True
    )
    observed = Observed(
        primary=PRIMARY,
        devices=(era, write),
        nbd=Nbd("/dev/nbd3", "43:96", 64 * MIB, 512),
        rams=(Ram("/dev/zram0", "252:0"),),
    )
    assert text(observed, Goal.GONE) == [
        "# there is:",
        "#   dmctl-vol0-era (253:0, open 0)",
        "#     0 131072 era 252:0 8:0 128",
        "#   dmctl-vol0-w (253:1, open 0, suspended, with a table that is not in force)",
        "#   /dev/nbd3: connected to bitmapd",
        "#   /dev/zram0: metadata of the era device",
        "# to remove it:",
        "dmsetup clear dmctl-vol0-w",
        "dmsetup resume dmctl-vol0-w --noflush --nolockfs --noudevsync",
    ]


def test_the_script_is_one_for_a_shell() -> None:
    lines = text(Observed(primary=PRIMARY), Goal.ATTACHED)
    done = subprocess.run(
        ["sh", "-n"], input="\n".join(lines), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def config_of(primary: str) -> VolumeConfig:
    table = {"uuid": UUID_TEXT, "primary": primary, "secondary": "/s", "record": "/r"}
    config, problems = build_volume("vol0", table, {}, "test", "nbd+unix:///vol0?socket=/x")
    assert config is not None, problems
    return config


def test_a_primary_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    for primary in (str(path), str(tmp_path / "none")):
        with pytest.raises(NotFoundError, match="is no block device"):
            volume_of(config_of(primary), Geometry(MIB))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("SKIPPED: only root can make loop devices")
    path = tmp_path / "image"
    with path.open("wb") as stream:
        stream.truncate(16 * MIB)
    done = subprocess.run(
        ["losetup", "-f", "--show", str(path)], text=True, capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"SKIPPED: no loop device: {done.stderr}")
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "-d", done.stdout.strip()], check=False)


def test_a_volume_that_is_yet_to_be_created(loop: str, tmp_path: Path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to(loop)
    config = config_of(str(link))
    volume = volume_of(config, Geometry(16 * MIB))
    assert volume.primary == loop
    assert volume.logical_block_bytes == 512
    commands = build_commands(config, Geometry(16 * MIB))
    assert f"era '\"$RAM\"' {loop} 128'" in commands[1]
    assert commands[-1].startswith("dmsetup create vol0 ")
