"""record dump, check, repair and probe, on golden images and on strange ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.record import tool
from tests.support.cli import MIB, Cli, new_cli

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


def golden(cli: Cli, name: str) -> str:
    path = cli.folder / f"{name}.img"
    path.write_bytes(gzip.decompress((DATA / f"{name}.img.gz").read_bytes()))
    return str(path)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("clean", 0),
        ("dirty", 0),
        ("torn-page", 0),
        ("rotten-page", 20),
        ("one-superblock", 20),
        ("no-superblock", 20),
        ("newer-format", 21),
    ],
)
def test_check(cli: Cli, name: str, status: int) -> None:
    image = golden(cli, name)
    outcome = cli.call("record", "check", image)
    assert outcome.status == status, outcome
    report = cli.call("record", "check", image, "--json")
    assert report.status == report.json["exit_status"] == status
    assert report.json["output_version"]["command"] == "record check"
    for finding in report.json["findings"]:
        assert f"{finding['severity']}: {finding['message']}" in outcome.out


def test_dump(cli: Cli) -> None:
    image = golden(cli, "dirty")
    document = cli.ok("record", "dump", image, "--json").json
    assert document["extents"]["recorded"] > 0
    assert document["superblock"]["name"] in cli.ok("record", "dump", image).out
    first, count = document["extents"]["runs"][0]
    assert f"\n  {first} +{count}\n" in cli.ok("record", "dump", image).out
    output = cli.folder / "dump.json"
    outcome = cli.ok("record", "dump", image, "--output", str(output))
    assert outcome.out == ""
    written = json.loads(output.read_text())
    assert written == {key: document[key] for key in written}
    assert cli.call("record", "dump", image, "--output", str(output)).status == 11
    assert "page" in cli.ok("record", "dump", golden(cli, "rotten-page")).out
    assert cli.call("record", "dump", golden(cli, "newer-format")).status == 21


def test_a_dump_shows_what_the_record_says_of_a_pair(cli: Cli) -> None:
    joined = golden(cli, "pair-joined")
    pair = cli.ok("record", "dump", joined, "--json").json["superblock"]["pair"]
    assert (pair["node"], pair["term"], pair["record_on"]) == (2, 3, "partner")
    assert f"\n{'pair':<24} {json.dumps(pair)}\n" in cli.ok("record", "dump", joined).out
    single = cli.ok("record", "dump", golden(cli, "dirty"), "--json").json
    assert single["superblock"]["pair"] is None


def test_repair_writes_elsewhere(cli: Cli) -> None:
    image = golden(cli, "rotten-page")
    before = Path(image).read_bytes()
    output = str(cli.folder / "healed")
    document = cli.ok("record", "repair", image, "--output", output, "--json").json
    assert document["damaged_pages"]
    assert Path(image).read_bytes() == before
    assert cli.call("record", "check", output).status == 0
    assert document["recorded_extents"] == tool.load(output).bits.count()
    assert cli.call("record", "repair", image, "--output", image).status == 2
    assert cli.call("record", "repair", image, "--output", output).status == 11


def test_probe(cli: Cli) -> None:
    cli.create()
    record = str(cli.folder / "vol0.record")
    lines = dict(
        line.split("=", 1) for line in cli.ok("probe", record, "--export").out.splitlines()
    )
    document = cli.ok("probe", record, "--json").json
    assert lines["DMCTL_TYPE"] == "record"
    assert lines["DMCTL_VOLUME_NAME"] == "vol0"
    assert lines["DMCTL_VOLUME_UUID"] == document["volume_uuid"]
    assert lines["DMCTL_CLEAN"] == "0"
    assert int(lines["DMCTL_SIZE_BYTES"]) == document["size_bytes"] == 8 * MIB
    assert "record of volume 'vol0'" in cli.ok("probe", record).out


def test_probe_of_something_else(cli: Cli) -> None:
    assert cli.call("probe", cli.medium("blank")).status == 10
    assert cli.call("probe", "/nonexistent").status == 10
    assert cli.call("probe", str(cli.folder)).status == 2
    assert cli.call("probe", golden(cli, "newer-format"), "--export").status == 21


def test_a_hostile_name_does_not_reach_udev(cli: Cli) -> None:
    cli.create()
    path = cli.folder / "vol0.record"
    with tool.RecordMedium.open(path) as medium:
        old = tool.load(medium).superblock
        tool.write_superblock(medium, old.updated(0, name='x"\nRUN+="evil'))
    outcome = cli.ok("probe", str(path), "--export")
    assert "evil" not in outcome.out
    assert "DMCTL_TYPE=record" in outcome.out
